"""Requests at a fixed rate: `python -m tests.bench.paced_load` with a PacedPlan on its input.

As many are sent as are due, however fast they are answered: what is measured is the service at this
load, and not how it is when it has more than it can do.
"""

import json
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from google.protobuf.json_format import ParseDict

from productgraph.v1.event_pb2 import Event
from server.forwarding.providers.mapping import make_insert_id
from tests.bench.events import NumberedRequest, encode_http, make_events
from tests.bench.http_load import HttpConnection
from tests.bench.meter import Meter
from tests.bench.spread import open_evenly
from tests.support.services import ROOT, clean_environment

_CONNECTIONS = 8
_ANSWER_SECONDS = 30.0
_ACCEPTED = b'"rejected":0,'


@dataclass(frozen=True)
class PacedPlan:
    """What to send where; the first `warm_up` requests are not measured."""

    port: int
    key: str
    workers: Sequence[int]
    batch: int  # events a request
    rate: float  # requests a second
    warm_up: int
    count: int
    first_number: int


@dataclass(frozen=True)
class PacedResult:
    """What was measured; latencies in milliseconds, in the order of the answers."""

    latencies_ms: list[float]
    # When each event was acknowledged, by insert id, on the clock of `time.monotonic`.
    acknowledged: dict[str, float]
    failures: dict[str, int]

    def percentile_ms(self, share: float) -> float:
        """Return the latency under which this share of the requests stayed."""
        return percentile(self.latencies_ms, share)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value under which this share of the values stays."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def send_paced(plan: PacedPlan) -> PacedResult:
    """Send the requests from a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.bench.paced_load"],
        cwd=ROOT,
        env=clean_environment({}),
        input=json.dumps(asdict(plan)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return PacedResult(**json.loads(finished.stdout))


@dataclass
class _Pace:
    """Connections that take turns; of each busy one, since when its request has been waiting."""

    connections: Sequence[HttpConnection]
    rate: float
    meter: Meter = field(default_factory=Meter)
    answered_at: dict[int, float] = field(default_factory=dict)  # by number

    def run(self, count: int, first: int) -> None:
        """Send this many requests, numbered from `first` on, and return when all are answered.

        A request that is due and finds no connection free is waiting already.
        """
        self._idle = deque(self.connections)
        self._busy: dict[HttpConnection, tuple[int, float]] = {}
        sent, started_at = 0, time.monotonic()
        deadline = started_at + count / self.rate + _ANSWER_SECONDS
        while (sent < count or self._busy) and time.monotonic() < deadline:
            due_at = started_at + sent / self.rate
            if sent < count and self._idle and time.monotonic() >= due_at:
                self._send(first + sent, due_at)
                sent += 1
            else:
                wait = due_at - time.monotonic() if sent < count and self._idle else 0.1
                self._receive(max(0.0, wait))

    def _send(self, number: int, due_at: float) -> None:
        # With a connection to spare, that it is late is the load generator's own delay.
        waiting_since = time.monotonic() if len(self._idle) > 1 else due_at
        connection = self._idle.popleft()
        self._busy[connection] = number, waiting_since
        connection.start(number)

    def _receive(self, seconds: float) -> None:
        sockets = {connection.socket: connection for connection in self._busy}
        # Not epoll, which waits for whole milliseconds.
        for ready in select.select(list(sockets), [], [], seconds)[0]:
            connection = sockets[ready]
            if answer := connection.receive():
                self._note(connection, answer)

    def _note(self, connection: HttpConnection, answer: bytes) -> None:
        now = time.monotonic()
        number, waiting_since = self._busy.pop(connection)
        self._idle.append(connection)
        self.meter.latencies.append(now - waiting_since)
        if b" 202 " in answer[:16] and _ACCEPTED in answer:
            self.answered_at[number] = now
        else:
            self.meter.failures[answer.decode(errors="replace")] += 1


def _find_insert_ids(request: NumberedRequest, number: int) -> list[str]:
    request.number(number)
    body = json.loads(bytes(request.buffer).partition(b"\r\n\r\n")[2])
    return [make_insert_id(ParseDict(event, Event())) for event in body["events"]]


def run_paced(plan: PacedPlan) -> PacedResult:
    """Send the requests from this process."""
    events = make_events(plan.batch)

    def open_one() -> HttpConnection:
        return HttpConnection(plan.port, encode_http(events, plan.key))

    connections, _ = open_evenly(open_one, _CONNECTIONS, plan.workers)
    warm_up, measured = _Pace(connections, plan.rate), _Pace(connections, plan.rate)
    warm_up.run(plan.warm_up, plan.first_number)
    measured.run(plan.count, plan.first_number + plan.warm_up)
    for connection in connections:
        connection.close()
    request = encode_http(events, plan.key)
    answered = warm_up.answered_at | measured.answered_at
    return PacedResult(
        latencies_ms=[seconds * 1000 for seconds in measured.meter.latencies],
        acknowledged={
            insert_id: at
            for number, at in answered.items()
            for insert_id in _find_insert_ids(request, number)
        },
        failures=dict(warm_up.meter.failures + measured.meter.failures),
    )


def main() -> None:
    """Read the plan, and write the result."""
    json.dump(asdict(run_paced(PacedPlan(**json.load(sys.stdin)))), sys.stdout)


if __name__ == "__main__":
    main()
