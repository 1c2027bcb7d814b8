"""`productgraph person`: exports, deletes and blocks one person's data."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from typing import IO, Any, Concatenate, ParamSpec

import click
import orjson

from server.cli.command import (
    Failure,
    format_moment,
    json_option,
    make_printable,
    opened_engine,
    opened_tables,
    print_json,
    with_settings,
)
from server.config import DELETION_VARIABLES, Settings
from server.events.persons import Person
from server.privacy.deletion import PLANNED, Deletion, describe_receipt, find_second_time
from server.privacy.digests import Digests
from server.privacy.export import Export
from server.privacy.places import DEAD, EVENTS, OUTBOX, REJECTED
from server.privacy.recognition import recognise_persons
from server.storage.blocked_persons import block_person, find_blocked, unblock_person
from server.storage.connection import Connection, connected
from server.storage.person_deletions import Receipt, find_receipts
from server.storage.provider_deletions import (
    ACCEPTED,
    WAITING,
    ProviderDeletion,
    read_provider_deletions,
)

P = ParamSpec("P")

# What the numbers of unreadable things are numbers of.
_NUMBERED = {OUTBOX: "payloads of the outbox", DEAD: "dead events", REJECTED: "rejected events"}
_PLACES = {
    EVENTS: "in events",
    OUTBOX: "in the outbox",
    DEAD: "among dead events",
    REJECTED: "among rejected events",
}


_providers_option = click.option(
    "--providers",
    "with_providers",
    is_flag=True,
    help="Also ask the analytics providers to delete them; `status` shows how that stands.",
)


@click.group()
def person() -> None:
    """Export, delete and block one person's data.

    A person is who sent events with this user.id, or with one of these user.anonymous_ids, in one
    project.
    """


def _with_person(run: Callable[Concatenate[Settings, Person, P], None]) -> Callable[..., None]:
    """Add the options that name a person, and give the command the person."""

    @click.option("--project", required=True, help="The project of their events.")
    @click.option("--user", "user_id", metavar="ID", help="Their user.id.")
    @click.option(
        "--anonymous-id",
        "anonymous_ids",
        multiple=True,
        metavar="ID",
        help="A user.anonymous_id of theirs; can be given several times.",
    )
    @wraps(run)
    def run_with_person(
        settings: Settings,
        project: str,
        user_id: str | None,
        anonymous_ids: tuple[str, ...],
        *args: P.args,
        **options: P.kwargs,
    ) -> None:
        wanted = Person(project, user_id, tuple(dict.fromkeys(anonymous_ids)))
        if not wanted.ids or "" in wanted.ids:
            raise click.UsageError("give --user, --anonymous-id, or both; neither can be empty")
        run(settings, wanted, *args, **options)

    return run_with_person


@person.command()
@with_settings
@_with_person
def export(settings: Settings, wanted: Person) -> None:
    """Write a person's events to standard output, as lines of JSON.

    Each has its place and the event by its names on the wire: stored, waiting for providers, dead
    or rejected. The summary on standard error counts them by place, and has the numbers of what
    cannot be read. The service goes on meanwhile.
    """
    with opened_engine(settings) as engine, connected(engine) as connection:
        search = Export(connection, wanted)
        for line in search.run():
            sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_UTC_Z) + b"\n")
        sys.stdout.buffer.flush()
    click.echo(_count_places(search.counts), err=True)
    _report_unreadable(search.unreadable)


@person.command()
@with_settings
@_with_person
@click.option("--yes", is_flag=True, help="Delete it; without it, only its counts are shown.")
@click.option("--no-wait", is_flag=True, help="Leave the second time to another run.")
@_providers_option
def delete(
    settings: Settings, wanted: Person, yes: bool, no_wait: bool, with_providers: bool
) -> None:
    """Delete a person's events, wherever they are kept.

    Without --yes it only counts them. With it, it goes through everything twice, the second time
    once nothing that came before can be in the memory of a worker, and prints a receipt as JSON.
    Whatever ends it, run it again: it completes what is left. Needs PRIVACY_SECRET.

    With --providers, forwarders then ask Amplitude and Mixpanel to delete the person, which takes
    weeks there; needs AMPLITUDE_SECRET_KEY and MIXPANEL_GDPR_TOKEN.
    """
    digests = _require_digests(settings)
    providers = _choose_providers(settings) if with_providers else ()
    with opened_engine(settings) as engine, connected(engine) as connection:
        if not yes:
            _count(connection, wanted)
            return
        deletion = Deletion(connection, wanted, digests, lambda text: click.echo(text, err=True))
        receipt = deletion.run(wait=not no_wait, providers=providers)
        print_json([_describe(connection, receipt)])
    _report_unreadable(receipt.unreadable)
    if receipt.finished_at is None:
        due_at = find_second_time(receipt)
        click.echo(f"not complete: run it again after {due_at:%Y-%m-%d %H:%M:%S} UTC", err=True)


@person.command()
@click.argument("receipts", type=click.File("rb"), metavar="RECEIPTS")
@click.option("--yes", is_flag=True, help="Delete them; without it, they are only shown.")
@click.option("--no-wait", is_flag=True, help="Leave the second time to another run.")
@_providers_option
@with_settings
def again(
    settings: Settings, receipts: IO[bytes], yes: bool, no_wait: bool, with_providers: bool
) -> None:
    """Delete persons again whom a restored backup has brought back.

    RECEIPTS is a file with the lines that `delete` has printed, or - for standard input. Prints the
    persons that are found, and with --yes their new receipts.
    """
    digests, lines = _require_digests(settings), _read_receipts(receipts)
    if any(line["secret_mark"] != digests.mark.hex() for line in lines):
        raise Failure("some receipts are under another PRIVACY_SECRET")
    providers = _choose_providers(settings) if with_providers else ()
    with opened_engine(settings) as engine, connected(engine) as connection:
        found = list(recognise_persons(connection, digests, lines))
        if not yes:
            print_json(map(asdict, found))
            return
        deletions = [Deletion(connection, each, digests, lambda _: None) for each in found]
        begun = [each.run(wait=False, providers=providers) for each in deletions]
        for deletion, receipt in zip(deletions, begun, strict=True):
            if receipt.finished_at is None and not no_wait:  # the first wait is enough for all
                receipt = deletion.run(wait=True)
            print_json([_describe(connection, receipt)])


def _read_receipts(file: IO[bytes]) -> list[dict[str, Any]]:
    try:
        lines = [orjson.loads(line) for line in file if line.strip()]
        for line in lines:
            if not {"project_id", "digests", "secret_mark"} <= line.keys():
                raise ValueError
    except (ValueError, AttributeError):
        raise Failure("RECEIPTS must have a receipt of `person delete` on each line") from None
    return lines


@person.command()
@with_settings
@_with_person
def block(settings: Settings, wanted: Person) -> None:
    """Drop a person's later events.

    They are answered as if they were stored. In force within ten seconds, on every service with the
    same PRIVACY_SECRET. What is stored already stays: see delete.
    """
    digests = _require_digests(settings)
    with opened_tables(settings) as connection:
        count = block_person(connection, wanted.project_id, digests.of_person(wanted), digests.mark)
    click.echo(f"{count} of {len(wanted.ids)} ids are blocked now; the others were before")


@person.command()
@with_settings
@_with_person
def unblock(settings: Settings, wanted: Person) -> None:
    """Take a person's later events again, within ten seconds."""
    digests = _require_digests(settings)
    with opened_tables(settings) as connection:
        count = unblock_person(connection, wanted.project_id, digests.of_person(wanted))
    click.echo(f"{count} of {len(wanted.ids)} ids were blocked, and are no longer")


@person.command()
@with_settings
@_with_person
@json_option
def status(settings: Settings, wanted: Person, as_json: bool) -> None:
    """Show since when a person is blocked, and what was deleted.

    Of providers that were asked to delete them, too, how that stands: what was accepted, done, or
    failed, the last error and the next try.
    """
    digests = _require_digests(settings)
    of_person = digests.of_person(wanted)
    with opened_engine(settings) as engine, connected(engine) as connection:
        receipts = find_receipts(connection, wanted.project_id, of_person)
        asked = read_provider_deletions(connection, [receipt.id for receipt in receipts])
        blocked = find_blocked(connection, wanted.project_id, of_person)
    if as_json:
        since = {digest.hex(): moment for digest, moment in blocked.items()}
        shown = [describe_receipt(receipt, asked[receipt.id]) for receipt in receipts]
        print_json([{"blocked": since, "receipts": shown}])
        return
    oldest = min(blocked.values(), default=None)
    click.echo(f"blocked since {format_moment(oldest)}: {len(blocked)} of {len(of_person)} ids")
    for receipt in receipts:
        end = format_moment(receipt.finished_at) if receipt.finished_at else "not complete"
        deleted = Counter(receipt.deleted) + Counter(receipt.deleted_again)
        begin = format_moment(receipt.began_at)
        click.echo(f"receipt {receipt.id}, {begin} to {end}: {_count_places(deleted)}")
        for line in _list_asked(receipt, asked[receipt.id], digests.mark):
            click.echo(make_printable(f"  {line}"))


def _require_digests(settings: Settings) -> Digests:
    if settings.privacy_secret is None:
        raise Failure("PRIVACY_SECRET must be set: ids are kept as HMACs under it")
    return Digests(settings.privacy_secret)


def _choose_providers(settings: Settings) -> tuple[str, ...]:
    """Return the providers to ask: all that can be, if those that have events are among them."""
    lacking = settings.destinations.keys() - settings.deletions.keys()
    if lacking or not settings.deletions:
        names = sorted(lacking or DELETION_VARIABLES)
        variables = " and ".join(DELETION_VARIABLES[name] for name in names)
        raise Failure(f"--providers needs {variables}")
    return tuple(settings.deletions)


def _describe(connection: Connection, receipt: Receipt) -> Mapping[str, Any]:
    return describe_receipt(receipt, read_provider_deletions(connection, [receipt.id])[receipt.id])


def _list_asked(receipt: Receipt, asked: Sequence[ProviderDeletion], mark: bytes) -> Iterator[str]:
    """Yield a line for each thing that a provider is or was asked."""
    if not asked:
        yield from (f"{name}: {PLANNED}, for after the second time" for name in receipt.providers)
    for each in asked:
        moment = each.ended_at or each.accepted_at or each.requested_at
        words = [f"{each.provider}: {each.state} since {format_moment(moment)}"]
        words += [f"job {each.job}"] if each.state == ACCEPTED else []
        words += [each.detail] if each.detail else []
        if each.state == WAITING and receipt.secret_mark != mark:
            words.append("its ids are under another PRIVACY_SECRET")
        yield ", ".join(words)
        if each.last_error:
            yield f"  last error at {format_moment(each.last_error_at)}: {each.last_error}"
            yield f"  next try at {format_moment(each.next_try_at)}"


def _count(connection: Connection, wanted: Person) -> None:
    search = Export(connection, wanted)
    for _ in search.run():
        pass
    click.echo(f"{_count_places(search.counts)}; --yes deletes them")
    _report_unreadable(search.unreadable)


def _count_places(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts.get(place, 0)} {text}" for place, text in _PLACES.items())


def _report_unreadable(unreadable: Mapping[str, Sequence[int]]) -> None:
    """Name by number what cannot be read, and so may be anybody's."""
    for place, numbers in unreadable.items():
        listed = ", ".join(map(str, dict.fromkeys(numbers)))
        click.echo(f"unreadable, and left alone: {_NUMBERED[place]} {listed}", err=True)
