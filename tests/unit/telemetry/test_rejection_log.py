"""What a project keeps doing wrong is in the log, and does not flood it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsResponse
from server.caller import Caller
from server.events.problems import Problem, Reason
from server.ingest.request_record import RequestRecorder
from server.telemetry.request_log import RejectionLog

MISSING = Problem("event_id", Reason.REQUIRED, "required")
LONG = Problem("session.id", Reason.TOO_LONG, "longer than 255 bytes")


class Clients:
    """Requests of several projects, at moments of the test's choosing."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.now = 0.0
        self._caplog = caplog
        self._recorder = RequestRecorder((RejectionLog(seconds=600.0),), clock=lambda: self.now)

    def reject(self, project: str, *problems: Problem) -> None:
        """Finish a request of a project with these problems."""
        record = self._recorder.begin("http", "/v1/events")
        record.authenticated(Caller(project))
        record.decoded(IngestEventsResponse(rejected=len(problems)), problems)
        record.finish(202)

    @contextmanager
    def logging(self) -> Iterator[list[tuple[str, str, str, int]]]:
        """Yield a list that has the lines logged in the context, once it is over."""
        lines: list[tuple[str, str, str, int]] = []
        self._caplog.clear()
        yield lines
        for record in self._caplog.records:
            assert (record.levelno, record.message) == (logging.WARNING, "events rejected")
            fields = vars(record)
            lines.append((fields["project"], fields["field"], fields["reason"], fields["rejected"]))


@pytest.fixture
def clients(caplog: pytest.LogCaptureFixture) -> Clients:
    """Return clients whose rejected events are logged."""
    return Clients(caplog)


def test_rejections_are_warned_of_at_intervals(clients: Clients) -> None:
    """The first rejection of a kind is logged at once, further ones together ten minutes later."""
    with clients.logging() as first:
        clients.reject("a", MISSING, MISSING, LONG)
        clients.reject("b", MISSING)
    assert first == [
        ("a", "event_id", "required", 2),
        ("a", "session.id", "too_long", 1),
        ("b", "event_id", "required", 1),
    ]
    with clients.logging() as between:
        for _ in range(5):
            clients.now += 100.0
            clients.reject("a", MISSING)
    assert between == []
    clients.now = 600.0
    with clients.logging() as later:
        clients.reject("a", MISSING)
    assert later == [("a", "event_id", "required", 6)]


def test_requests_without_rejections_are_silent(clients: Clients) -> None:
    """A request whose every event is accepted has no line of this kind."""
    with clients.logging() as lines:
        clients.reject("a")
    assert lines == []


def test_rejections_of_many_projects_take_bounded_memory(clients: Clients) -> None:
    """The kinds that are remembered are at most a thousand; a forgotten one is logged anew."""
    with clients.logging() as lines:
        for number in range(1001):
            clients.reject(f"project-{number}", MISSING)
        clients.reject("project-0", MISSING)
        clients.reject("project-1000", MISSING)
    assert len(lines) == 1002
