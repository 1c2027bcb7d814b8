"""A person's events are exported from every place where they are kept."""

import json
import uuid
from typing import Any

import pytest

from productgraph.v1.event_pb2 import Event
from server.protocols import GRPC, HTTP
from tests.support.events import make_message
from tests.support.persons import PersonDatabase
from tests.support.services import run_command

ODD_IDS = ["o'neill\"x", "žofie@example.org", "日本 \\ %s", "--", "4711"]


@pytest.fixture
def database(url: str) -> PersonDatabase:
    """Return the module's database."""
    return PersonDatabase(url)


@pytest.fixture
def project() -> str:
    """Return the name of a project that no other test has."""
    return f"p_{uuid.uuid4().hex[:8]}"


def export(database: PersonDatabase, project: str, *options: str) -> tuple[list[Any], str]:
    """Return the lines of an export, and its summary."""
    settings = {"DATABASE_URL": database.url}
    done = run_command("person", "export", "--project", project, *options, settings=settings)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def find_ids(lines: list[Any]) -> list[tuple[str, str]]:
    """Return where each exported event was found, and its id."""
    return sorted((line["found_in"], line["event"]["event_id"]) for line in lines)


@pytest.mark.parametrize("user", ODD_IDS)
def test_an_export_has_a_person_from_every_place(
    database: PersonDatabase, project: str, user: str
) -> None:
    """An export finds a user's events in every place, and no neighbour's, whatever the id."""
    database.scatter(project, "own", user_id=user)
    database.scatter(project, "other", user_id=f"{user}2")
    database.scatter(f"{project}_2", "elsewhere", user_id=user)
    lines, summary = export(database, project, f"--user={user}")
    assert find_ids(lines) == [
        ("dead", "own-dead"),
        ("events", "own-stored"),
        ("outbox", "own-stored"),
        ("rejected", "own-grpc"),
        ("rejected", "own-http"),
    ]
    assert all(line["event"]["user.id"] == user for line in lines)
    assert summary == (
        "1 in events, 1 in the outbox, 1 among dead events, 2 among rejected events\n"
    )


def test_an_export_takes_anonymous_ids_too(database: PersonDatabase, project: str) -> None:
    """Events with one of the anonymous ids are the person's, sent as text or as number."""
    event = make_message(project, "text")
    event.attributes["user.anonymous_id"] = "anön-1"
    number = make_message(project, "number")
    number.attributes["user.anonymous_id"] = 4711
    neighbour = make_message(project, "neighbour", user_id="anön-1")
    neighbour.metadata["user.anonymous_id"] = "anön-1"
    database.store([event, number, neighbour])
    database.reject(project, HTTP, '{"user.anonymous_id":"anön-1","event_id":"r"}'.encode())
    lines, _ = export(database, project, "--anonymous-id", "anön-1", "--anonymous-id", "4711")
    assert find_ids(lines) == [
        ("events", "number"),
        ("events", "text"),
        ("outbox", "number"),
        ("outbox", "text"),
        ("rejected", "r"),
    ]


def test_an_export_says_which_providers_wait(database: PersonDatabase, project: str) -> None:
    """Of an event in the outbox it says which providers wait for it."""
    database.store([make_message(project, f"e{n}", user_id="u") for n in range(2)])
    database.query(
        "UPDATE outbox_deliveries SET positions = '{1}', event_count = 1"
        " WHERE provider = 'mixpanel' AND project_id = %s",
        project,
    )
    lines, _ = export(database, project, "--user", "u")
    waiting = {n["event"]["event_id"]: n["waits_for"] for n in lines if n["found_in"] == "outbox"}
    assert waiting == {"e0": ["amplitude"], "e1": ["amplitude", "mixpanel"]}


def test_an_export_names_the_unreadable_by_number(database: PersonDatabase, project: str) -> None:
    """What cannot be read is named by number; a malformed event whose ids can be read is found."""
    database.reject(project, HTTP, b'{"event_id":"e","user.id":"u"', size=200_000)
    database.reject(project, GRPC, b"\xff\xff")
    malformed = Event(event_id="e", user_id="u").SerializeToString() + b"\x1a\x01\xff"
    database.reject(project, GRPC, malformed)
    numbers = [
        number
        for (number,) in database.query(
            "SELECT id FROM rejected_events WHERE project_id = %s ORDER BY id", project
        )
    ]
    lines, summary = export(database, project, "--user", "u")
    assert [(line["number"], line["event"]) for line in lines if "event" in line] == []
    assert [line["number"] for line in lines] == numbers[2:]
    assert f"left alone: rejected events {numbers[0]}, {numbers[1]}\n" in summary


def test_a_person_needs_an_id(database: PersonDatabase) -> None:
    """Without an id, or with an empty one, nobody is meant: the command says so."""
    for options in ((), ("--user", ""), ("--user", "u", "--anonymous-id", "")):
        settings = {"DATABASE_URL": database.url}
        done = run_command("person", "export", "--project", "p", *options, settings=settings)
        assert (done.returncode, done.stdout) == (2, "")
        assert "give --user, --anonymous-id, or both" in done.stderr
