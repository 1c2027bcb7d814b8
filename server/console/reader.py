"""Answers questions one by one over one connection, so as not to slow ingestion down."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import orjson

from server.console.questions import NotFound, Question
from server.errors import IngestError, Internal, Unavailable
from server.storage.connection import Connection, GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict, DatabaseError

# Longer than its statements may take: only a connection that hangs gets this far.
_QUESTION_SECONDS = 5.0
_MAX_WAITING = 64
_MAX_KEPT = 64
# For this long after the database has failed to answer, questions fail at once.
_FAILURE_SECONDS = 1.0
# An answer is kept for this many times as long as the question took.
_REST = 10
_WAIT_SECONDS = 60.0

_log = logging.getLogger("productgraph.console")


class _Kept(NamedTuple):
    answer: "Future[bytes]"
    until: float


class Reader(DatabaseThread):
    """Takes questions from any thread; each answer is JSON. Equal questions are asked once.

    Whoever asks gets a future, which fails with an IngestError or NotFound.
    """

    STOP_SECONDS = 2.0

    def __init__(
        self, connection: GuardedConnection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__("console", connection)
        self._clock = clock
        self._waiting: OrderedDict[Question, Future[bytes]] = OrderedDict()
        self._kept: OrderedDict[Question, _Kept] = OrderedDict()
        self._failed_until = float("-inf")

    def ask(self, question: Question) -> "Future[bytes]":
        """Return the future answer. Raises Unavailable if the question cannot be asked now."""
        with self._changed:
            kept = self._kept.get(question)
            if kept is not None and self._clock() < kept.until:
                return kept.answer
            if question in self._waiting:
                return self._waiting[question]
            if self._clock() < self._failed_until or self._stopping.is_set():
                raise Unavailable("the database does not answer")
            if len(self._waiting) >= _MAX_WAITING:
                raise Unavailable("too many questions are waiting")
            answer = self._waiting[question] = Future()
            self._changed.notify()
        return answer

    def _run_round(self) -> float:
        if (question := self._wait_for_question()) is None:
            return 0.0
        began = self._clock()
        try:
            with self._connection.connected(_QUESTION_SECONDS) as connection:
                answer = _ask(question, connection)
        except Unavailable:
            self._fail_all()
        except Conflict:
            self._settle(question, Unavailable("the tables are locked"))
        except Exception:  # noqa: BLE001 - logged; the others are answered
            _log.exception("a question could not be answered")
            self._settle(question, Internal())
        else:
            self._settle(question, answer, _REST * (self._clock() - began))
        return 0.0

    def _wait_for_question(self) -> Question | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._stopping.is_set(), timeout=_WAIT_SECONDS
            )
            return next(iter(self._waiting), None)

    def _settle(
        self, question: Question, answer: bytes | IngestError | NotFound, rest_seconds: float = 0.0
    ) -> None:
        with self._changed:
            waiting = self._waiting.pop(question, None)
            if waiting is None:  # it was given up
                return
            if isinstance(answer, bytes):
                until = self._clock() + max(question.rest_seconds, rest_seconds)
                self._keep(question, _Kept(waiting, until))
        if isinstance(answer, bytes):
            waiting.set_result(answer)
        else:
            waiting.set_exception(answer)

    def _keep(self, question: Question, kept: _Kept) -> None:
        self._kept[question] = kept
        self._kept.move_to_end(question)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    def _fail_all(self) -> None:
        with self._changed:
            self._failed_until = self._clock() + _FAILURE_SECONDS
            answers = [*self._waiting.values()]
            self._waiting.clear()
        for answer in answers:
            answer.set_exception(Unavailable("the database does not answer"))

    def _note_cut(self) -> None:
        self._fail_all()

    def _finish(self) -> None:
        self._fail_all()


def _ask(question: Question, connection: Connection) -> bytes | NotFound | Unavailable:
    """Return the answer, or the reason if there is none; either leaves the connection usable."""
    try:
        return orjson.dumps(question.ask(connection), option=orjson.OPT_UTC_Z)
    except NotFound as error:
        return error
    except DatabaseError:
        return Unavailable("it took too long: ask for less")
