"""Somebody else who holds an event: an operator's transaction, or a peer that has vanished."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from productgraph.v1.event_ingestion_service_pb2 import IngestEventsRequest
from tests.support.holder import BEFORE_COMMIT, HOLDING, IN_COPY
from tests.support.patience import PATIENCE
from tests.torture.clients import STORED
from tests.torture.cluster import Setup
from tests.torture.events import Batch
from tests.torture.trial import PLAIN, Fault, Inject, Trial

_NETWORKED = Setup(has_proxied_database=True, has_network=True)
# How long the load runs alone, for comparison, and how often the held event is sent again.
_CALM_SECONDS, _RETRY_SECONDS = 1.5, 1.0
_LEAST_HOLD_SECONDS, _MOST_HOLD_SECONDS = 3.0, 6.0
# A vanished peer is given up after eight seconds, and the machine may be busy.
_RELEASE_SECONDS = 25.0 * PATIENCE
# What the 99th percentile of the others may be, unless it was worse before.
_SLOW_SECONDS, _SLOW_FACTOR = 0.5 * PATIENCE, 3.0
_FIND_HELD = """
SELECT count(*) FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid
 WHERE a.client_addr <<= '198.18.0.0/15' AND l.locktype = 'transactionid' AND l.granted
"""

_END_HELD = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
 WHERE client_addr <<= '198.18.0.0/15'
"""


class _Watch:
    """Sends the held event again and again, beside the load, and notes what becomes of both."""

    def __init__(self, trial: Trial, batch: Batch) -> None:
        self._trial = trial
        self._batch = batch
        self._answers: Counter[str] = Counter()
        self._calm_p99 = trial.load.measure_p99(since=time.monotonic() - _CALM_SECONDS)
        self._begun_at = time.monotonic()

    def retry_until(self, is_over: Callable[[bool], bool]) -> None:
        """Send the event once a second until `is_over`, which is told whether it is stored."""
        with closing(self._trial.load.open_client()) as client:
            while True:
                status = client.send(self._batch)
                self._answers[status] += 1
                if is_over(status in STORED):
                    return
                time.sleep(_RETRY_SECONDS)

    def conclude(self) -> None:
        """Note what the round shows, and what the others must not have suffered."""
        seconds = time.monotonic() - self._begun_at
        p99 = self._trial.load.measure_p99(since=self._begun_at)
        refused = sum(n for status, n in self._answers.items() if status not in STORED)
        self._trial.evidence.append(
            f"held for {seconds:.1f} s, refused {refused} times ({dict(self._answers)}),"
            f" the others' p99 {1000 * p99:.0f} ms, before {1000 * self._calm_p99:.0f} ms"
        )
        if not refused:
            self._trial.problems.append("the event was not held")
        if p99 > max(_SLOW_SECONDS, _SLOW_FACTOR * self._calm_p99):
            self._trial.problems.append(f"the others' p99 was {1000 * p99:.0f} ms")


def _hold_row(trial: Trial) -> float:
    trial.warm_up()
    batch = trial.load.source.make_batch(size=1)
    trial.load.send_batch(trial.load.open_client, batch)
    time.sleep(_CALM_SECONDS)
    watch = _Watch(trial, batch)
    hold_until = time.monotonic() + trial.draw.uniform(_LEAST_HOLD_SECONDS, _MOST_HOLD_SECONDS)
    [event_id] = batch.insert_ids
    with closing(trial.cluster.connect()) as operator, operator.cursor() as cursor:
        cursor.execute("DELETE FROM events WHERE event_id = %s", (event_id,))
        assert cursor.rowcount == 1
        watch.retry_until(lambda _: time.monotonic() >= hold_until)
        watch.conclude()
        operator.rollback()
    return trial.recover(time.monotonic())


def _vanish(point: str) -> Inject:
    def inject(trial: Trial) -> float:
        trial.warm_up()
        time.sleep(_CALM_SECONDS)
        batch = trial.load.source.make_batch(size=1)
        with _holding(trial, point, batch):
            trial.cluster.namespace.vanish()
            vanished_at = time.monotonic()
            trial.load.sent.append(batch)
            watch = _Watch(trial, batch)
            [(held,)] = trial.cluster.query(_FIND_HELD)
            trial.evidence.append(f"{held} transaction of a peer without a network, {point}")
            watch.retry_until(
                lambda is_stored: is_stored or time.monotonic() > vanished_at + _RELEASE_SECONDS
            )
            watch.conclude()
            [(still_held,)] = trial.cluster.query(_FIND_HELD)
            if still_held:
                trial.problems.append(f"held {_RELEASE_SECONDS:.0f} s after the peer vanished")
                trial.cluster.query(_END_HELD)
        trial.cluster.namespace.restore()
        trial.load.resend(batch)
        return trial.recover(vanished_at)

    return inject


@contextmanager
def _holding(trial: Trial, point: str, batch: Batch) -> Iterator[None]:
    """Have a peer store the event, by the code of the service, and stop at the point."""
    [event] = IngestEventsRequest.FromString(batch.request).events
    with trial.cluster.spawn_peer(
        [sys.executable, "-m", "tests.support.holder"], point, event.SerializeToString().hex()
    ) as peer:
        assert peer.stdout is not None
        assert peer.stdout.readline().decode().strip() == HOLDING
        try:
            yield
        finally:
            peer.kill()


FAULTS = (
    Fault("held-row", _hold_row, 50, 1, STORED, setup=PLAIN),
    Fault("vanish-in-copy", _vanish(IN_COPY), 50, 1, STORED, setup=_NETWORKED),
    Fault("vanish-before-commit", _vanish(BEFORE_COMMIT), 50, 1, STORED, setup=_NETWORKED),
)
