"""`productgraph rejected`: lists, shows and replays the events that validation rejected."""

import argparse
import json
import sys

from google.protobuf import text_format
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from productgraph.v1.event_pb2 import Event
from server import app
from server.cli.command import (
    Commands,
    add_command,
    add_group,
    opened_engine,
    opened_tables,
)
from server.config import Settings
from server.events.json_codec import HTTP
from server.ingest.replay import Replayed
from server.storage.connection import connected, transactional
from server.storage.rejected_events import StoredRejection, list_rejections, read_rejection


def add_rejected_commands(commands: Commands) -> None:
    """Adds the command and those below it."""
    text = "Lists, shows and replays the events that validation rejected."
    actions = add_group(commands, "rejected", text)
    listing = add_command(actions, "list", _list, "Lists rejected events, the newest first.")
    listing.add_argument("--project", help="only this project's")
    listing.add_argument("--limit", type=int, default=50, help="how many (50)")
    showing = add_command(
        actions, "show", _show, "Shows a rejected event as it was received, and the reason."
    )
    showing.add_argument("id", type=int, help="its number in `productgraph rejected list`")
    replay = add_command(
        actions,
        "replay",
        _replay,
        "Takes rejected events once more, as those of their project. What is accepted now is stored"
        " and forwarded like any event, and leaves the list; the others stay, with the reason of"
        " today. Run it with the settings of the service.",
    )
    replay.add_argument("--project", help="only this project's")
    chosen = replay.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--all", action="store_true", help="all of them")
    chosen.add_argument("ids", type=int, nargs="*", default=[], help="their numbers")


def _list(settings: Settings, options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        for rejection in list_rejections(connection, options.project, options.limit):
            print(_describe(rejection))
    return 0


def _describe(rejection: StoredRejection) -> str:
    return (
        f"{rejection.id}  {rejection.received_at:%Y-%m-%d %H:%M}  {rejection.protocol}"
        f"  {rejection.project_id}  {rejection.size} bytes  {rejection.reason}"
    )


def _show(settings: Settings, options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        rejection = read_rejection(connection, options.id)
    if rejection is None:
        return _fail_missing([options.id])
    print(_describe(rejection))
    if rejection.is_cut:
        print(f"Only its first {len(rejection.event)} bytes were kept.")
    print(_make_printable(_spell(rejection).rstrip()))
    return 0


def _fail_missing(ids: list[int]) -> int:
    numbers = ", ".join(map(str, ids))
    print(f"productgraph: no rejected event {numbers}", file=sys.stderr)
    return 1


def _spell(rejection: StoredRejection) -> str:
    """The event for reading: JSON, protobuf's text format, or what there is of them."""
    if rejection.protocol == HTTP:
        text = rejection.event.decode(errors="replace")
        try:
            return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
        except ValueError:
            return text
    # Where a text is no UTF-8, the fields can still be shown by their numbers.
    for kind in (Event, Empty):
        try:
            message: Message = kind.FromString(rejection.event)
        except DecodeError:
            continue
        return text_format.MessageToString(message, as_utf8=True, print_unknown_fields=True)
    return rejection.event.hex(" ")


def _make_printable(text: str) -> str:
    """Leaves nothing in that a terminal would obey."""
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def _replay(settings: Settings, options: argparse.Namespace) -> int:
    replayed = Replayed()
    with (
        opened_engine(settings) as engine,
        app.opened_replay(settings, engine) as replay,
        connected(transactional(engine)) as connection,
    ):
        replay.run(connection, options.project, options.ids, replayed)
    print(f"{len(replayed.accepted)} accepted, {len(replayed.rejected)} rejected again")
    missing = set(options.ids) - {*replayed.accepted, *replayed.rejected}
    return _fail_missing(sorted(missing)) if missing else 0
