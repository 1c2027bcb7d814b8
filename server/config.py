"""Settings, from the environment alone, checked before anything starts.

Each is declared once, below; the table in OPERATIONS.md and `productgraph config` show the same.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar

from server.rates import parse_byte_rate, parse_event_rate
from server.values import (
    FALSE,
    HASH,
    hide_credentials,
    hide_password,
    is_loopback,
    parse_collector,
    parse_console,
    parse_database_url,
    parse_duration,
    parse_endpoint,
    parse_flag,
    parse_hosts,
    parse_level,
    parse_optional_port,
    parse_origins,
    parse_password,
    parse_path,
    parse_protocol,
    parse_redaction,
    parse_seconds,
    parse_secret,
    whole_number,
)

T = TypeVar("T")

# The names of the analytics providers, as settings, tables and metrics have them.
AMPLITUDE, MIXPANEL = "amplitude", "mixpanel"
# Certificate, its key, and what clients' certificates are checked by.
TLS_VARIABLES = ("GRPC_TLS_CERT_FILE", "GRPC_TLS_KEY_FILE", "GRPC_TLS_CLIENT_CA_FILE")
# The variable by which scripts/ name a place in their clone, which the working directory is not.
DEFAULT_DATA_DIR = "PRODUCTGRAPH_DEFAULT_DATA_DIR"
# How alike two names are that mean the same, from 0 to 1; shorter names must be the same.
_NEAR, _NEAR_LENGTH = 0.88, 6
# Kubernetes gives every container the addresses of services in such variables.
_ADDRESSES = ("tcp://", "udp://", "sctp://")


class InvalidSetting(Exception):
    """A setting is unusable; the text is one line that names the variable and the problem."""


@dataclass(frozen=True)
class Destination:
    """An analytics provider that events are forwarded to."""

    endpoint: str
    credential: str = field(repr=False)


@dataclass(frozen=True)
class DeletionAccess:
    """How an analytics provider is asked to delete persons."""

    endpoint: str
    # What names the project there, and what only its owner has.
    project_key: str = field(repr=False)
    secret: str = field(repr=False)
    # Between two requests, whoever makes them.
    pause_seconds: float


@dataclass(frozen=True)
class TlsFiles:
    """Where the certificates of the gRPC port are, in PEM."""

    chain: Path
    key: Path
    # With it, clients need a certificate that one of these has signed.
    client_ca: Path | None


@dataclass(frozen=True)
class RejectedKeep:
    """How many rejected events are kept of each project, the newest, and for how long."""

    count: int
    seconds: float


@dataclass(frozen=True)
class ConsoleSettings:
    """Under which names of hosts the console may be asked for, and the password if it needs one."""

    hosts: frozenset[str]
    password: str | None = field(repr=False)


@dataclass(frozen=True)
class Settings:
    """What the service runs with; the README's table explains each."""

    host: str
    port: int
    grpc_port: int
    # None: no metrics.
    metrics_port: int | None
    # None: no console.
    console: ConsoleSettings | None
    # Not shown: it may hold a password. None: an embedded PostgreSQL in data_dir.
    database_url: str | None = field(repr=False)
    data_dir: Path
    # Whether DATA_DIR is not set: then data_dir is only the usual place.
    data_dir_is_default: bool
    workers: int
    cors_allowed_origins: frozenset[str]
    grpc_reflection: bool
    # None: the gRPC port speaks plain text.
    grpc_tls: TlsFiles | None
    request_timeout_seconds: float
    max_waiting_bytes: int
    # What each API key may send a second, unless it has rates of its own; 0: any number.
    event_rate_limit: int
    byte_rate_limit: int
    # By provider name; empty if analytics is off.
    destinations: Mapping[str, Destination]
    # By provider name; those that can be asked to delete persons.
    deletions: Mapping[str, DeletionAccess]
    forward_max_age_seconds: float
    # How many `serve` runs; others may run beside it.
    forwarders: int
    # None: rejected events are not kept.
    rejected_keep: RejectedKeep | None
    # None: no person's data can be deleted.
    privacy_secret: str | None = field(repr=False)
    # Names of fields, and what becomes of each on the way in.
    redact: tuple[tuple[str, str], ...]
    # Whether OpenTelemetry's own variables ask for traces.
    tracing: bool
    log_level: str


def _parse_optional_path(text: str) -> Path | None:
    return parse_path(text) if text else None


def _parse_rejected_keep(text: str) -> RejectedKeep | None:
    if text.lower() in FALSE:
        return None
    count, _, age = text.partition("/")
    try:
        return RejectedKeep(whole_number(1, 1_000_000)(count), parse_duration(age))
    except ValueError:
        raise ValueError(
            "must be off, or a number of events up to 1000000 and an age, such as 10000/7d"
        ) from None


def _mask(text: str) -> str:
    return "***" if text else ""


@dataclass(frozen=True)
class Setting(Generic[T]):
    """A variable of the environment, as it is declared."""

    name: str
    default: str
    meaning: str
    parse: Callable[[str], T]
    # What of its text may be shown.
    show: Callable[[str], str] = str

    def find(self, environment: Mapping[str, str]) -> str:
        """Return its text; an empty one means the default, as compose files set them."""
        return environment.get(self.name, "").strip() or self.default

    def read(self, environment: Mapping[str, str]) -> T:
        """Return its value. Raises InvalidSetting."""
        try:
            return self.parse(self.find(environment))
        except ValueError as problem:
            raise InvalidSetting(f"{self.name}: {problem}") from None


_PORT = Setting("PORT", "8080", "HTTP port", whole_number(0, 65535))
_GRPC_PORT = Setting("GRPC_PORT", "50051", "gRPC port", whole_number(0, 65535))
_METRICS_PORT = Setting(
    "METRICS_PORT", "9464", "port of `GET /metrics`; `off`: none", parse_optional_port
)
_CONSOLE = Setting(
    "CONSOLE",
    "auto",
    "whether the port of the metrics shows the console: `on`, `off`; `auto`: only with"
    " the embedded PostgreSQL, and if `HOST` is this machine's loopback address",
    parse_console,
)
_CONSOLE_PASSWORD = Setting(
    "CONSOLE_PASSWORD",
    "",
    "password that the console asks for, at least 12 characters; `CONSOLE=on` needs it unless"
    " `auto` would do",
    parse_password,
    _mask,
)
_CONSOLE_HOSTS = Setting(
    "CONSOLE_HOSTS",
    "localhost,127.0.0.1,::1",
    "names of hosts under which browsers may ask for the console, separated by commas",
    parse_hosts,
)
_HOST = Setting(
    "HOST",
    "127.0.0.1",
    "address to listen on; the Docker image sets 0.0.0.0, all interfaces",
    str,
)
_DATABASE_URL = Setting(
    "DATABASE_URL",
    "",
    "`postgresql://user:password@host:5432/database`, or whatever else libpq takes, such as several"
    " hosts ([a pair](#a-pair)); without it an embedded PostgreSQL runs",
    parse_database_url,
    hide_password,
)
_DATA_DIR = Setting(
    "DATA_DIR",
    "./data",
    "directory of the embedded PostgreSQL's data; as root, if PostgreSQL's account cannot enter the"
    " default, one below `/var/lib/productgraph`",
    parse_path,
)
_WORKERS = Setting(
    "WORKERS", "1", "worker processes; one for each core is a good number", whole_number(1, 64)
)
_CORS_ALLOWED_ORIGINS = Setting(
    "CORS_ALLOWED_ORIGINS",
    "*",
    "origins of pages that may send events, separated by commas; `*` is any; a browser may go by"
    " the old list for a day",
    parse_origins,
)
_GRPC_REFLECTION = Setting(
    "GRPC_REFLECTION", "true", "whether gRPC reflection is offered", parse_flag
)
_TLS_CHAIN, _TLS_KEY, _TLS_CLIENT_CA = (
    Setting(name, "", meaning, _parse_optional_path)
    for name, meaning in zip(
        TLS_VARIABLES,
        (
            "TLS on the gRPC port: the certificate chain, PEM; without it, plain text is spoken",
            "the certificate's key, PEM",
            "mTLS: clients need a certificate of one of these authorities, beside their API key",
        ),
        strict=True,
    )
)
_REQUEST_TIMEOUT_SECONDS = Setting(
    "REQUEST_TIMEOUT_SECONDS",
    "5",
    "how long a request may wait to be stored before it is answered 503",
    parse_seconds,
)
_MAX_WAITING_MB = Setting(
    "MAX_WAITING_MB",
    "64",
    "how much may wait to be stored, in each worker, before requests are answered 503",
    whole_number(1, 4096),
)
_RATE_LIMIT = Setting(
    "RATE_LIMIT", "off", "events a second that may be sent with each API key", parse_event_rate
)
_BYTE_RATE_LIMIT = Setting(
    "BYTE_RATE_LIMIT",
    "off",
    "bytes a second, such as `5MB` (KB, MB and GB are powers of 1,024; at least 1KB)",
    parse_byte_rate,
)
_ANALYTICS_ENABLED = Setting(
    "ANALYTICS_ENABLED", "false", "whether events are forwarded at all", parse_flag
)
_AMPLITUDE_ENABLED = Setting(
    "AMPLITUDE_ENABLED", "false", "whether they are forwarded to Amplitude", parse_flag
)
_AMPLITUDE_API_KEY = Setting(
    "AMPLITUDE_API_KEY", "", "the API key of the project in Amplitude", str, _mask
)
_AMPLITUDE_ENDPOINT = Setting(
    "AMPLITUDE_ENDPOINT",
    "https://api2.amplitude.com/batch",
    "the whole URL; EU: `https://api.eu.amplitude.com/batch`",
    parse_endpoint,
    hide_credentials,
)
_AMPLITUDE_SECRET_KEY = Setting(
    "AMPLITUDE_SECRET_KEY",
    "",
    "the secret key of the project in Amplitude, for [`person delete"
    " --providers`](#providers-deletions)",
    str,
    _mask,
)
_AMPLITUDE_DELETION_ENDPOINT = Setting(
    "AMPLITUDE_DELETION_ENDPOINT",
    "https://amplitude.com/api/2/deletions/users",
    "the whole URL; EU: `https://analytics.eu.amplitude.com/…`",
    parse_endpoint,
    hide_credentials,
)
_AMPLITUDE_DELETION_PAUSE = Setting(
    "AMPLITUDE_DELETION_PAUSE",
    "2s",
    "how long to wait between two of these requests; Amplitude takes one a second",
    parse_duration,
)
_MIXPANEL_ENABLED = Setting(
    "MIXPANEL_ENABLED", "false", "whether they are forwarded to Mixpanel", parse_flag
)
_MIXPANEL_TOKEN = Setting("MIXPANEL_TOKEN", "", "the token of the project in Mixpanel", str, _mask)
_MIXPANEL_ENDPOINT = Setting(
    "MIXPANEL_ENDPOINT",
    "https://api.mixpanel.com/import",
    "the whole URL; EU: `https://api-eu.…`, India: `https://api-in.…`",
    parse_endpoint,
    hide_credentials,
)
_MIXPANEL_GDPR_TOKEN = Setting(
    "MIXPANEL_GDPR_TOKEN",
    "",
    "an OAuth token of Mixpanel's GDPR API, for [`person delete"
    " --providers`](#providers-deletions)",
    str,
    _mask,
)
_MIXPANEL_DELETION_ENDPOINT = Setting(
    "MIXPANEL_DELETION_ENDPOINT",
    "https://mixpanel.com/api/app/data-deletions/v3.0/",
    "the whole URL; EU: `https://eu.mixpanel.com/…`, India: `https://in.mixpanel.com/…`",
    parse_endpoint,
    hide_credentials,
)
_MIXPANEL_DELETION_PAUSE = Setting(
    "MIXPANEL_DELETION_PAUSE",
    "2s",
    "how long to wait between two of these requests; Mixpanel takes one a second",
    parse_duration,
)
_FORWARD_MAX_AGE = Setting(
    "FORWARD_MAX_AGE",
    "3d",
    "when to give up an event that cannot be delivered (s, m, h or d)",
    parse_duration,
)
_FORWARDERS = Setting(
    "FORWARDERS",
    "1",
    "forwarders that `serve` runs; 0 if they are deployments of their own",
    whole_number(0, 16),
)
_REJECTED_KEEP = Setting(
    "REJECTED_KEEP",
    "10000/7d",
    "how many rejected events of each project are kept, and for how long; `off`: none",
    _parse_rejected_keep,
)
_PRIVACY_SECRET = Setting(
    "PRIVACY_SECRET",
    "",
    "at least 32 random characters under which ids of persons are kept as HMACs ([a person's"
    " data](#a-persons-data)); the same for every service, and never in the database",
    parse_secret,
    _mask,
)
_REDACT = Setting(
    "REDACT",
    "",
    "fields that are dropped, hashed or freed of a URL's query on the way in, such as"
    " `page.url=no-query,metadata.email=hash,error.stack=drop` ([redaction](#redaction))",
    parse_redaction,
)
_LOG_LEVEL = Setting("LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR", parse_level)
_DEBUG = Setting("DEBUG", "false", "true: the same as `LOG_LEVEL=DEBUG`", parse_flag)
# In the order of the table.
SETTINGS: tuple[Setting[Any], ...] = (
    *(_PORT, _GRPC_PORT, _METRICS_PORT, _CONSOLE, _CONSOLE_PASSWORD, _CONSOLE_HOSTS),
    *(_HOST, _DATABASE_URL, _DATA_DIR, _WORKERS),
    *(_CORS_ALLOWED_ORIGINS, _GRPC_REFLECTION, _TLS_CHAIN, _TLS_KEY, _TLS_CLIENT_CA),
    *(_REQUEST_TIMEOUT_SECONDS, _MAX_WAITING_MB, _RATE_LIMIT, _BYTE_RATE_LIMIT),
    *(_ANALYTICS_ENABLED, _AMPLITUDE_ENABLED, _AMPLITUDE_API_KEY, _AMPLITUDE_ENDPOINT),
    *(_AMPLITUDE_SECRET_KEY, _AMPLITUDE_DELETION_ENDPOINT, _AMPLITUDE_DELETION_PAUSE),
    *(_MIXPANEL_ENABLED, _MIXPANEL_TOKEN, _MIXPANEL_ENDPOINT),
    *(_MIXPANEL_GDPR_TOKEN, _MIXPANEL_DELETION_ENDPOINT, _MIXPANEL_DELETION_PAUSE),
    *(_FORWARD_MAX_AGE, _FORWARDERS),
    *(_REJECTED_KEEP, _PRIVACY_SECRET, _REDACT, _LOG_LEVEL, _DEBUG),
)

# Those of OpenTelemetry that decide whether there are traces; it reads all others by itself:
# https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
_COLLECTORS = tuple(
    Setting(name, "", "where traces are sent", parse_collector, hide_credentials)
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
)
_PROTOCOLS = tuple(
    Setting(name, "http/protobuf", "how traces are sent", parse_protocol)
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
)
_SDK_DISABLED = Setting("OTEL_SDK_DISABLED", "false", "whether traces are off", str.lower)
_TRACES_EXPORTER = Setting("OTEL_TRACES_EXPORTER", "otlp", "`none`: no traces", str.lower)

# Each provider's switch, endpoint and credential.
_PROVIDERS = {
    AMPLITUDE: (_AMPLITUDE_ENABLED, _AMPLITUDE_ENDPOINT, _AMPLITUDE_API_KEY),
    MIXPANEL: (_MIXPANEL_ENABLED, _MIXPANEL_ENDPOINT, _MIXPANEL_TOKEN),
}
# What deletions at each provider need: the project's key, a secret, the endpoint, the pause.
_DELETIONS = {
    AMPLITUDE: (
        _AMPLITUDE_API_KEY,
        _AMPLITUDE_SECRET_KEY,
        _AMPLITUDE_DELETION_ENDPOINT,
        _AMPLITUDE_DELETION_PAUSE,
    ),
    MIXPANEL: (
        _MIXPANEL_TOKEN,
        _MIXPANEL_GDPR_TOKEN,
        _MIXPANEL_DELETION_ENDPOINT,
        _MIXPANEL_DELETION_PAUSE,
    ),
}
# The variables without which a provider cannot be asked to delete persons.
DELETION_VARIABLES = {name: secret.name for name, (_, secret, _, _) in _DELETIONS.items()}


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises InvalidSetting for the first that is unusable."""
    return Settings(
        host=_HOST.read(environment),
        port=_PORT.read(environment),
        grpc_port=_GRPC_PORT.read(environment),
        metrics_port=_METRICS_PORT.read(environment),
        console=_read_console(environment),
        database_url=_DATABASE_URL.read(environment),
        data_dir=_find_data_dir(environment).read(environment),
        data_dir_is_default=not environment.get(_DATA_DIR.name, "").strip(),
        workers=_WORKERS.read(environment),
        cors_allowed_origins=_CORS_ALLOWED_ORIGINS.read(environment),
        grpc_reflection=_GRPC_REFLECTION.read(environment),
        grpc_tls=_read_tls(environment),
        request_timeout_seconds=_REQUEST_TIMEOUT_SECONDS.read(environment),
        max_waiting_bytes=_MAX_WAITING_MB.read(environment) * 1024 * 1024,
        event_rate_limit=_RATE_LIMIT.read(environment),
        byte_rate_limit=_BYTE_RATE_LIMIT.read(environment),
        destinations=_read_destinations(environment),
        deletions=_read_deletions(environment),
        forward_max_age_seconds=_FORWARD_MAX_AGE.read(environment),
        forwarders=_FORWARDERS.read(environment),
        rejected_keep=_REJECTED_KEEP.read(environment),
        privacy_secret=_PRIVACY_SECRET.read(environment),
        redact=_read_redaction(environment),
        tracing=_read_tracing(environment),
        log_level="DEBUG" if _DEBUG.read(environment) else _LOG_LEVEL.read(environment),
    )


def show_settings(environment: Mapping[str, str] = os.environ) -> Iterator[tuple[str, str]]:
    """Yield each setting's name and, without secrets, the text that is in effect."""
    for declared in SETTINGS:
        setting = _find_data_dir(environment) if declared is _DATA_DIR else declared
        yield setting.name, setting.show(setting.find(environment))


def _find_data_dir(environment: Mapping[str, str]) -> Setting[Path]:
    default = environment.get(DEFAULT_DATA_DIR, "").strip() or _DATA_DIR.default
    return replace(_DATA_DIR, default=default)


def _read_console(environment: Mapping[str, str]) -> ConsoleSettings | None:
    """Return how the console is shown, or None; to others than this machine only by a password."""
    wanted, password = _CONSOLE.read(environment), _CONSOLE_PASSWORD.read(environment)
    is_private = _DATABASE_URL.read(environment) is None and is_loopback(_HOST.read(environment))
    has_port = _METRICS_PORT.read(environment) is not None
    if wanted is False or (wanted is None and not (is_private and has_port)):
        return None
    if not has_port:
        raise InvalidSetting(f"{_METRICS_PORT.name}: must not be off, since {_CONSOLE.name} is on")
    if password is None and not is_private:
        raise InvalidSetting(f"{_CONSOLE_PASSWORD.name}: must be set, since {_CONSOLE.name} is on")
    return ConsoleSettings(_CONSOLE_HOSTS.read(environment), password)


def _read_tracing(environment: Mapping[str, str]) -> bool:
    """Return whether OpenTelemetry's variables ask for traces; if so, they must be usable."""
    if _SDK_DISABLED.read(environment) == "true" or _TRACES_EXPORTER.read(environment) == "none":
        return False
    collectors = [setting.read(environment) for setting in _COLLECTORS]
    if not any(collectors):
        return False
    for setting in _PROTOCOLS:
        setting.read(environment)
    return True


def _read_destinations(environment: Mapping[str, str]) -> dict[str, Destination]:
    if not _ANALYTICS_ENABLED.read(environment):
        return {}
    return {
        name: Destination(
            endpoint.read(environment), _require(credential, f"{switch.name} is true", environment)
        )
        for name, (switch, endpoint, credential) in _PROVIDERS.items()
        if switch.read(environment)
    }


def _read_deletions(environment: Mapping[str, str]) -> dict[str, DeletionAccess]:
    """Return those for which a secret is set, whether events are forwarded there or not."""
    found = {}
    for name, (key, secret, endpoint, pause) in _DELETIONS.items():
        place, seconds = endpoint.read(environment), pause.read(environment)
        if text := secret.read(environment):
            cause = f"{secret.name} is"
            project_key = _require(key, cause, environment)
            _require(_PRIVACY_SECRET, cause, environment)
            found[name] = DeletionAccess(place, project_key, text, seconds)
    return found


def _require(setting: Setting[T], cause: str, environment: Mapping[str, str]) -> T:
    if not (value := setting.read(environment)):
        raise InvalidSetting(f"{setting.name}: must be set, since {cause}")
    return value


def _read_redaction(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    rules = _REDACT.read(environment)
    if any(action == HASH for _, action in rules) and not _PRIVACY_SECRET.read(environment):
        raise InvalidSetting(f"{_PRIVACY_SECRET.name}: must be set, since {_REDACT.name} hashes")
    return rules


def _read_tls(environment: Mapping[str, str]) -> TlsFiles | None:
    """Return the files, which are only looked at when they are read."""
    chain, key, client_ca = (
        setting.read(environment) for setting in (_TLS_CHAIN, _TLS_KEY, _TLS_CLIENT_CA)
    )
    if chain and key:
        return TlsFiles(chain, key, client_ca)
    if chain:
        raise InvalidSetting(f"{_TLS_KEY.name}: must be set, since {_TLS_CHAIN.name} is")
    if key or client_ca:
        raise InvalidSetting(f"{_TLS_CHAIN.name}: must be set, since others of GRPC_TLS_… are")
    return None


def find_strays(environment: Mapping[str, str] = os.environ) -> Iterator[tuple[str, str]]:
    """Yield each name that is nearly that of a setting, with the setting that may be meant."""
    names = {_simplify(setting.name): setting.name for setting in SETTINGS}
    long = [name for name in names if len(name) >= _NEAR_LENGTH]
    for name, text in environment.items():
        if name in names.values() or text.startswith(_ADDRESSES):
            continue
        simple = _simplify(name)
        near = [simple] if simple in names else get_close_matches(simple, long, 1, _NEAR)
        if near:
            yield name, names[near[0]]


def _simplify(name: str) -> str:
    return name.replace("_", "").replace("-", "").upper()
