"""`productgraph keys`: makes, lists, limits and revokes API keys."""

import argparse
import sys
from collections.abc import Callable

from server.cli.command import Commands, add_command, add_group, opened_tables
from server.config import Settings
from server.rates import format_byte_rate, format_event_rate, parse_byte_rate, parse_event_rate
from server.storage import keys


def add_key_commands(commands: Commands) -> None:
    """Adds the command and those below it."""
    actions = add_group(commands, "keys", "Makes, lists, limits and revokes API keys.")
    create = add_command(
        actions,
        "create",
        _create,
        "Makes an API key and prints it, and nothing else. It works at once, and cannot be shown"
        " again. A project can have several, to change from one to the next.",
    )
    create.add_argument("--project", required=True, help="the project that its events belong to")
    create.add_argument("--name", default="", help="what it is for, for your own memory")
    _add_rates(create)
    add_command(actions, "list", _list, "Lists all API keys, without the keys themselves.")
    limit = add_command(
        actions, "limit", _limit, "Sets how much may be sent with an API key, within 30 s."
    )
    revoke = add_command(
        actions, "revoke", _revoke, "Revokes an API key; a running service refuses it in 30 s."
    )
    for command in (limit, revoke):
        command.add_argument("id", type=int, help="its number in `productgraph keys list`")
    _add_rates(limit)


def _add_rates(command: argparse.ArgumentParser) -> None:
    for option, parse, text in (
        ("rate", parse_event_rate, "events a second"),
        ("byte-rate", parse_byte_rate, "bytes a second, such as 5MB"),
    ):
        command.add_argument(
            f"--{option}",
            type=_with_default(parse),
            default=argparse.SUPPRESS,
            dest=parse.__name__.removeprefix("parse_"),
            metavar="RATE",
            help=f"{text}, off, or default: as the service is set",
        )


def _with_default(parse: Callable[[str], int]) -> Callable[[str], int | None]:
    def parse_rate(text: str) -> int | None:
        try:
            return None if text.lower() == "default" else parse(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    return parse_rate


def _read_rates(options: argparse.Namespace) -> dict[str, int | None]:
    """Those that were given."""
    return {name: rate for name, rate in vars(options).items() if name.endswith("_rate")}


def _create(settings: Settings, options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        key = keys.create_key(connection, options.project, options.name, **_read_rates(options))
    print(key)
    return 0


def _list(settings: Settings, _options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        known = keys.list_keys(connection)
    print(
        f"{'ID':>4}  {'PROJECT':20}  {'NAME':20}  {'RATE':>10}  {'BYTE RATE':>10}"
        f"  {'CREATED':16}  {'LAST USED':16}  REVOKED"
    )
    for key in known:
        rates = f"{format_event_rate(key.event_rate):>10}  {format_byte_rate(key.byte_rate):>10}"
        moments = (key.created_at, key.last_used_at, key.revoked_at)
        created, used, revoked = (f"{m:%Y-%m-%d %H:%M}" if m else "-" for m in moments)
        print(
            f"{key.id:4}  {key.project_id:20}  {key.name:20}  {rates}"
            f"  {created:16}  {used:16}  {revoked}"
        )
    return 0


def _limit(settings: Settings, options: argparse.Namespace) -> int:
    rates = _read_rates(options)
    if not rates:
        print("productgraph: give --rate, --byte-rate or both", file=sys.stderr)
        return 1
    with opened_tables(settings) as connection:
        limited = keys.limit_key(connection, options.id, **rates)
    if limited:
        return 0
    print(f"productgraph: no key {options.id}", file=sys.stderr)
    return 1


def _revoke(settings: Settings, options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        revoked = keys.revoke_key(connection, options.id)
    if revoked:
        return 0
    print(f"productgraph: no key {options.id} that is not revoked", file=sys.stderr)
    return 1
