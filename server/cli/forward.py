"""`productgraph forward`: forwards events, shows how that stands, deals with dead ones."""

import argparse
from datetime import UTC, datetime

from productgraph.v1.event_pb2 import Event
from server import app
from server.cli.command import Commands, add_command, add_group, opened_tables
from server.config import Settings
from server.storage.dead_events import list_dead, purge_dead, retry_dead
from server.storage.outbox import read_status


def add_forward_commands(commands: Commands) -> None:
    """Adds the command and those below it."""
    forward = add_command(
        commands,
        "forward",
        _forward,
        "Forwards stored events to the enabled analytics providers, until SIGTERM or Ctrl-C."
        " `serve` runs FORWARDERS of these when analytics is enabled; any number may run, on any"
        " number of machines.",
    )
    actions = forward.add_subparsers(metavar="ACTION")
    add_command(actions, "status", _show_forwarding, "Shows how far each provider has come.")
    text = "Lists, retries and purges the events that a provider refused for good."
    letters = add_group(actions, "dead", text)
    listing = add_command(letters, "list", _list_dead, "Lists dead events, the newest first.")
    listing.add_argument("--limit", type=int, default=50, help="how many (50)")
    listing.add_argument("--provider", help="only this provider's")
    for name, run, summary in (
        ("retry", _retry_dead, "Puts dead events back into the queue."),
        ("purge", _purge_dead, "Deletes dead events."),
    ):
        command = add_command(letters, name, run, summary)
        command.add_argument("--provider", help="only this provider's")
        chosen = command.add_mutually_exclusive_group(required=True)
        chosen.add_argument("--all", action="store_true", help="all of them")
        chosen.add_argument("ids", type=int, nargs="*", default=[], help="their numbers")


def _forward(settings: Settings, _options: argparse.Namespace) -> int:
    app.run_forwarder(settings)
    return 0


def _show_forwarding(settings: Settings, _options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        lanes = read_status(connection)
    print(f"{'PROVIDER':10}  {'PENDING':>9}  {'OLDEST':>9}  {'DELIVERED':>11}  {'DEAD':>7}  STATE")
    for lane in lanes:
        age = (
            f"{(datetime.now(UTC) - lane.oldest_at).total_seconds():.0f} s"
            if lane.oldest_at
            else "-"
        )
        state = f"stopped: {lane.stopped_reason}" if lane.stopped_reason else "forwarding"
        counts = f"{lane.pending:9}  {age:>9}  {lane.delivered:11}  {lane.dead:7}"
        print(f"{lane.provider:10}  {counts}  {state}")
    return 0


def _list_dead(settings: Settings, options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        for letter in list_dead(connection, options.provider, options.limit):
            event = Event.FromString(letter.event)
            print(
                f"{letter.id}  {letter.died_at:%Y-%m-%d %H:%M}  {letter.provider}"
                f"  {letter.project_id}  {event.event_id!r}  {letter.reason}"
            )
    return 0


def _retry_dead(settings: Settings, options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        count = retry_dead(connection, options.provider, options.ids)
    print(f"{count} put back into the queue")
    return 0


def _purge_dead(settings: Settings, options: argparse.Namespace) -> int:
    with opened_tables(settings) as connection:
        count = purge_dead(connection, options.provider, options.ids)
    print(f"{count} deleted")
    return 0
