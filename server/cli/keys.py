"""`productgraph keys`: makes, shows, limits, replaces and revokes API keys."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from server.cli.command import (
    NUMBER,
    Failure,
    ProjectId,
    format_moment,
    json_option,
    make_printable,
    opened_tables,
    print_json,
    with_settings,
)
from server.config import Settings
from server.rates import format_byte_rate, format_event_rate, parse_byte_rate, parse_event_rate
from server.storage.keys import (
    ApiKey,
    KeyReplaced,
    KeyUse,
    allow_origins,
    create_key,
    find_key,
    find_successor,
    limit_key,
    list_keys,
    list_uses,
    replace_key,
    revoke_key,
)
from server.values import parse_duration, parse_pages

# Stands for an option that was not given, where None means the default rate.
_UNCHANGED = -1


class _Rate(click.ParamType[int | None]):
    name = "rate"

    def __init__(self, parse: Callable[[str], int]) -> None:
        self._parse = parse

    def convert(
        self, value: str | int, parameter: click.Parameter | None, context: click.Context | None
    ) -> int | None:
        if isinstance(value, int):
            return value
        try:
            return None if value.lower() == "default" else self._parse(value)
        except ValueError as problem:
            self.fail(str(problem), parameter, context)


class _Age(click.ParamType[timedelta]):
    name = "time"

    def convert(
        self,
        value: str | timedelta,
        parameter: click.Parameter | None,
        context: click.Context | None,
    ) -> timedelta:
        if isinstance(value, timedelta):
            return value
        try:
            return timedelta(seconds=parse_duration(value))
        except ValueError as problem:
            self.fail(f"{problem}, is {value!r}", parameter, context)


class _Pages(click.ParamType[frozenset[str] | None]):
    name = "origins"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> frozenset[str] | None:
        try:
            return None if value.lower() == "any" else parse_pages(value)
        except ValueError as problem:
            self.fail(str(problem), parameter, context)


_event_rate_option = click.option(
    "--rate",
    "event_rate",
    type=_Rate(parse_event_rate),
    default=_UNCHANGED,
    help="Events a second; off; or default: as the service is set.",
)
_byte_rate_option = click.option(
    "--byte-rate",
    type=_Rate(parse_byte_rate),
    default=_UNCHANGED,
    help="Bytes a second, such as 5MB; off; or default.",
)
_expires_option = click.option(
    "--expires", type=_Age(), help="When the key ends, such as 90d (s, m, h or d)."
)
_key_argument = click.argument("key_id", type=NUMBER, metavar="ID")


@click.group()
def keys() -> None:
    """Make, show, limit, replace and revoke API keys."""


@keys.command()
@click.option(
    "--project", type=ProjectId(), required=True, help="The project that its events belong to."
)
@click.option("--name", default="", help="What the key is for, for your own memory.")
@_event_rate_option
@_byte_rate_option
@_expires_option
@click.option(
    "--origins",
    type=_Pages(),
    default="any",
    help="The pages that may use it, such as https://shop.example; several with commas.",
)
@with_settings
def create(
    settings: Settings,
    project: str,
    name: str,
    event_rate: int | None,
    byte_rate: int | None,
    expires: timedelta | None,
    origins: frozenset[str] | None,
) -> None:
    """Make an API key and print it.

    Prints nothing else. The key works at once, and cannot be shown again. A project can have
    several, to change from one to the next.
    """
    rates = _given_rates(event_rate, byte_rate)
    with opened_tables(settings) as connection:
        key = create_key(connection, project, name, lifetime=expires, origins=origins, **rates)
        click.echo(key)


def _given_rates(event_rate: int | None, byte_rate: int | None) -> dict[str, int | None]:
    rates = {"event_rate": event_rate, "byte_rate": byte_rate}
    return {name: rate for name, rate in rates.items() if rate != _UNCHANGED}


@keys.command(name="list")
@json_option
@with_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List all API keys, without the keys themselves."""
    with opened_tables(settings) as connection:
        known = list_keys(connection)
    if as_json:
        now = datetime.now(UTC)
        print_json(key.describe(now) for key in known)
        return
    click.echo(
        f"{'ID':>4}  {'PROJECT':20}  {'NAME':20}  {'RATE':>10}  {'BYTE RATE':>10}"
        f"  {'CREATED':16}  {'LAST USED':16}  {'EXPIRES':16}  REVOKED"
    )
    for key in known:
        click.echo(_describe(key))


def _describe(key: ApiKey) -> str:
    rates = f"{format_event_rate(key.event_rate):>10}  {format_byte_rate(key.byte_rate):>10}"
    moments = (key.created_at, key.last_used_at, key.ends_at, key.revoked_at)
    created, used, ends, revoked = map(format_moment, moments)
    names = f"{make_printable(key.project_id):20}  {make_printable(key.name):20}"
    return f"{key.id:4}  {names}  {rates}  {created:16}  {used:16}  {ends:16}  {revoked}"


@keys.command()
@_key_argument
@json_option
@with_settings
def show(settings: Settings, key_id: int, as_json: bool) -> None:
    """Show what is known of an API key.

    With it comes its last use on each of the last 90 days. Uses are noted once a minute. Days and
    times are in UTC.
    """
    with opened_tables(settings) as connection:
        key, uses = find_key(connection, key_id), list_uses(connection, key_id)
        successor = find_successor(connection, key_id)
    if key is None:
        raise Failure(f"no key {key_id}")
    if as_json:
        described = key.describe(datetime.now(UTC))
        print_json([{**described, "replaced_by": successor, "uses": [*map(asdict, uses)]}])
        return
    click.echo("\n".join(_describe_whole(key, successor, uses)))


def _describe_whole(key: ApiKey, successor: int | None, uses: Sequence[KeyUse]) -> Iterator[str]:
    facts = {
        "key": str(key.id),
        "project": make_printable(key.project_id),
        "name": make_printable(key.name) or "-",
        "rate": format_event_rate(key.event_rate),
        "byte rate": format_byte_rate(key.byte_rate),
        "origins": "any" if key.origins is None else ", ".join(key.origins),
        "created": format_moment(key.created_at),
        "expires": format_moment(key.ends_at),
        "revoked": format_moment(key.revoked_at),
        "replaces": f"key {key.replaces}" if key.replaces else "-",
        "replaced by": f"key {successor}" if successor else "-",
        "last used": format_moment(key.last_used_at),
    }
    yield from (f"{name:11}  {fact}" for name, fact in facts.items())
    yield from (f"{' ':11}  {use.day}  {use.last_used_at.astimezone(UTC):%H:%M}" for use in uses)


@keys.command()
@_key_argument
@_event_rate_option
@_byte_rate_option
@with_settings
def limit(settings: Settings, key_id: int, event_rate: int | None, byte_rate: int | None) -> None:
    """Set how much may be sent with an API key.

    The service applies it within 30 seconds.
    """
    rates = _given_rates(event_rate, byte_rate)
    if not rates:
        raise click.UsageError("give --rate, --byte-rate or both")
    with opened_tables(settings) as connection:
        if not limit_key(connection, key_id, **rates):
            raise Failure(f"no key {key_id}")


@keys.command()
@_key_argument
@click.argument("pages", type=_Pages(), metavar="ORIGINS")
@with_settings
def origins(settings: Settings, key_id: int, pages: frozenset[str] | None) -> None:
    """Set which pages may use an API key.

    ORIGINS are such as https://shop.example, several with commas; or any. The service applies it
    within 30 seconds. Programs other than browsers can name any origin, or none, and are let in.
    """
    with opened_tables(settings) as connection:
        if not allow_origins(connection, key_id, pages):
            raise Failure(f"no key {key_id}")


@keys.command()
@_key_argument
@click.option(
    "--grace",
    type=_Age(),
    default="7d",
    show_default=True,
    help="How long the old key still works (s, m, h or d).",
)
@_expires_option
@with_settings
def rotate(settings: Settings, key_id: int, grace: timedelta, expires: timedelta | None) -> None:
    """Make the next API key and print it.

    The old one ends after a time of grace. The next key has the project, name and limits of the old
    one, and its lifetime unless --expires gives another. It works at once. A key that has leaked
    must be revoked instead.
    """
    with opened_tables(settings) as connection:
        try:
            key = replace_key(connection, key_id, grace, expires)
        except KeyReplaced as problem:
            raise Failure(str(problem)) from None
        if key is None:
            raise Failure(f"no key {key_id} that can be used")
        click.echo(key)


@keys.command()
@_key_argument
@with_settings
def revoke(settings: Settings, key_id: int) -> None:
    """Revoke an API key.

    A running service refuses it within 30 seconds.
    """
    with opened_tables(settings) as connection:
        if not revoke_key(connection, key_id):
            raise Failure(f"no key {key_id} that is not revoked")
