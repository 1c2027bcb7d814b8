"""The thread that asks the console's questions, with a real database."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from sqlalchemy import text

from server.console.reader import Reader
from server.errors import Internal, Unavailable
from server.storage.connection import Connection, Engine, GuardedConnection, open_engine
from server.storage.health import Watchdog
from tests.support.services import wait_until

PATIENCE = 30.0


@dataclass(frozen=True)
class Counted:
    """A question that notes each time it is asked, and waits if it is told to."""

    name: str
    asked: list[str] = field(compare=False, default_factory=list)
    statement: str = "SELECT 1"
    go_on: threading.Event | None = field(compare=False, default=None)
    rest_seconds: ClassVar[float] = 60.0

    def ask(self, connection: Connection) -> dict[str, Any]:
        """Ask the database."""
        self.asked.append(self.name)
        if self.go_on is not None:
            assert self.go_on.wait(PATIENCE)
        return {"answer": connection.scalar(text(self.statement))}


@pytest.fixture
def reader(engine: Engine) -> Iterator[Reader]:
    """Provide a reader that runs."""
    reader = Reader(GuardedConnection(engine))
    with Watchdog(reader.check), reader:
        yield reader


def test_equal_questions_are_asked_once(reader: Reader) -> None:
    """Whoever asks the same shares one answer, while it is waited for and for a while after."""
    asked: list[str] = []
    go_on = threading.Event()
    waiting = [reader.ask(Counted("a", asked, go_on=go_on)) for _ in range(10)]
    go_on.set()
    assert {future.result(PATIENCE) for future in waiting} == {b'{"answer":1}'}
    assert reader.ask(Counted("a", asked)).result(PATIENCE) == b'{"answer":1}'
    assert asked == ["a"]


def test_only_so_many_questions_wait(reader: Reader) -> None:
    """A question too many is refused at once; those that wait are answered."""
    go_on, asked = threading.Event(), list[str]()
    first = reader.ask(Counted("first", asked, go_on=go_on))
    waiting: list[Future[bytes]] = []
    with pytest.raises(Unavailable, match="too many"):
        waiting.extend(reader.ask(Counted(str(number))) for number in range(1000))
    go_on.set()
    assert first.result(PATIENCE)
    assert 10 < len(waiting) < 100
    assert {future.result(PATIENCE) for future in waiting} == {b'{"answer":1}'}


def test_a_fault_fails_its_own_question_alone(reader: Reader) -> None:
    """A statement that PostgreSQL refuses fails as a fault, and the next question is answered."""
    with pytest.raises(Internal):
        reader.ask(Counted("bad", statement="SELECT 1/0")).result(PATIENCE)
    assert reader.ask(Counted("good")).result(PATIENCE) == b'{"answer":1}'


def test_a_gone_database_fails_all_who_wait() -> None:
    """Without a database every question fails, those that come at once without an attempt."""
    # Its clock stands still: a moment after the failure is not over on any machine.
    unreachable = GuardedConnection(open_engine("postgresql://127.0.0.1:1/none"))
    reader = Reader(unreachable, clock=lambda: 100.0)
    with Watchdog(reader.check), reader:
        waiting = [reader.ask(Counted(name)) for name in "abc"]
        for future in waiting:
            with pytest.raises(Unavailable, match="does not answer"):
                future.result(PATIENCE)
        with pytest.raises(Unavailable, match="does not answer"):
            reader.ask(Counted("d"))


def test_questions_are_answered_after_the_database_returns(engine: Engine, reader: Reader) -> None:
    """A connection that is ended costs one answer, and a moment later there are others."""
    [pid] = [reader.ask(Counted("pid", statement="SELECT pg_backend_pid()")).result(PATIENCE)]
    number = int(pid.decode().removeprefix('{"answer":').removesuffix("}"))
    with engine.connect() as connection:
        connection.execute(text(f"SELECT pg_terminate_backend({number})"))
        connection.commit()
    with pytest.raises(Unavailable):
        reader.ask(Counted("cut")).result(PATIENCE)

    def is_answered() -> bool:
        try:
            return reader.ask(Counted("again")).result(PATIENCE) == b'{"answer":1}'
        except Unavailable:
            return False

    wait_until(is_answered)


def test_a_stopped_reader_fails_its_questions(engine: Engine) -> None:
    """Nobody waits for a reader that has ended."""
    reader = Reader(GuardedConnection(engine))
    with reader:
        pass
    with pytest.raises(Unavailable):
        reader.ask(Counted("late"))
