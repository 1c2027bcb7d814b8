"""Parts that more than one kind of process is built from."""

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.config import InvalidSetting, Settings
from server.events.copy_rows import RowEncoder
from server.events.json_codec import JsonCodec
from server.events.persons import RowIds
from server.events.protobuf_codec import ProtobufCodec
from server.events.quick_json import QuickReader
from server.events.quick_protobuf import QuickProtobufReader
from server.events.redaction import RedactionRule, Redactor, find_fault
from server.events.schema import EVENT_SCHEMA
from server.forwarding.providers.provider import CURRENT_MAPPING_VERSION
from server.privacy.block_list import FindBlocked, check_recognised, find_nobody, load_blocked
from server.privacy.digests import Digests
from server.storage.connection import Connection
from server.storage.embedded import EmbeddedPostgres
from server.storage.events import AlsoStore
from server.storage.outbox import Outbox
from server.storage.places import locate_data

if TYPE_CHECKING:
    from server.telemetry.tracing import Tracing

DEMO_PROJECT = "proj_demo"
# The variable by which a worker learns the file descriptor of the buckets that all of them share.
BUCKETS = "PRODUCTGRAPH_BUCKETS"

# Set by scripts/serve to the command line that runs other commands.
_COMMAND_VARIABLE = "PRODUCTGRAPH_COMMAND"

_log = logging.getLogger("productgraph")


@contextmanager
def opened_database(settings: Settings, *, create: bool = False) -> Iterator[str]:
    """Provide the database's URL; an embedded PostgreSQL runs until the context ends.

    With `create`, an embedded one is made if it is missing. Raises EmbeddedPostgresError.
    """
    if settings.database_url is not None:
        yield settings.database_url
    else:
        with EmbeddedPostgres(find_data(settings, create=create), create=create) as embedded:
            yield embedded.url


def find_data(settings: Settings, *, create: bool = False) -> Path:
    """Return the directory of the embedded database, or with `create` the one to make it in.

    Raises EmbeddedPostgresError.
    """
    if not settings.data_dir_is_default:
        return settings.data_dir
    return locate_data(settings.data_dir, create=create)


def name_command() -> str:
    """Return how a shell calls the other commands."""
    return shlex.quote(os.environ.get(_COMMAND_VARIABLE, "productgraph"))


def open_outbox(settings: Settings) -> AlsoStore | None:
    """Return the statements that queue stored events for the enabled providers, if any."""
    if not settings.destinations:
        return None
    return Outbox(tuple(settings.destinations), CURRENT_MAPPING_VERSION).statements_for


def open_json_codec(settings: Settings) -> JsonCodec:
    """Return the codec of HTTP's events; it keeps their protobuf if they are forwarded."""
    columns = RowEncoder(EVENT_SCHEMA).columns
    quick = QuickReader(EVENT_SCHEMA, columns, keep_encoded=bool(settings.destinations))
    return JsonCodec(EVENT_SCHEMA, quick, open_redactor(settings))


def open_protobuf_codec(settings: Settings) -> ProtobufCodec:
    """Return the codec of gRPC's events; it keeps their protobuf if they are forwarded."""
    quick = QuickProtobufReader(EVENT_SCHEMA, keep_encoded=bool(settings.destinations))
    return ProtobufCodec(EVENT_SCHEMA, quick, open_redactor(settings))


def open_redactor(settings: Settings) -> Redactor | None:
    """Return the redactor of incoming events, or None without REDACT. Raises InvalidSetting."""
    if not settings.redact:
        return None
    rules = [RedactionRule(*each) for each in settings.redact]
    if faults := list(filter(None, map(find_fault, rules))):
        raise InvalidSetting(f"REDACT: {faults[0]}")
    return Redactor(rules, Digests(settings.privacy_secret or "").of_value)


def open_digests(settings: Settings) -> Digests | None:
    """Return the digests of ids under PRIVACY_SECRET, or None without it."""
    return None if settings.privacy_secret is None else Digests(settings.privacy_secret)


def load_block_list(settings: Settings, connection: Connection) -> FindBlocked:
    """Return a function that finds the blocked persons of a project, as they are now.

    Raises DatabaseError if somebody was blocked under another PRIVACY_SECRET, or there is none.
    """
    digests = open_digests(settings)
    check_recognised(connection, digests)
    if digests is None:
        return find_nobody
    return load_blocked(connection, digests, RowIds(RowEncoder(EVENT_SCHEMA).columns)).get


def open_tracing(settings: Settings) -> "Tracing | None":
    """Start tracing, or return None if it is off; OpenTelemetry is imported only if it is on."""
    if not settings.tracing:
        return None
    try:
        from server.telemetry.tracing import Tracing
    except ImportError as error:
        # The variables are often set for a whole cluster: that is no reason not to serve.
        _log.warning(
            "no traces: the extra otel is missing (pip install ./gen '.[otel]')",
            extra={"missing": error.name},
        )
        return None
    return Tracing()
