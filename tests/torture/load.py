"""The load of one round: clients that send until they are told to stop, and lose nothing."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from tests.support.patience import PATIENCE
from tests.support.services import wait_until
from tests.torture.clients import STORED, Client
from tests.torture.events import Batch, EventSource

_PAUSE_SECONDS = 0.02
_RETRY_SECONDS = 0.05
# Some answers get lost on the way to a client, which then sends again what was acknowledged.
_REPEATED_SHARE = 0.1
# Until when all must have been acknowledged, after the last fault is over.
_GIVE_UP_SECONDS = 40.0 * PATIENCE


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client was told, with times of `time.monotonic`."""

    status: str
    sent_at: float
    answered_at: float


class Load:
    """Clients that send one batch after another, each until it is acknowledged."""

    def __init__(
        self, clients: Sequence[Callable[[], Client]], source: EventSource, seed: str
    ) -> None:
        self.source = source
        self.sent: list[Batch] = []
        self.acknowledged: list[Batch] = []
        self.answers: list[Answer] = []
        self.given_up: list[Batch] = []
        self.open_client = clients[0]
        self._stopping = threading.Event()
        self._give_up_at = float("inf")
        self._threads = [
            threading.Thread(target=self._run, args=(client, random.Random(f"{seed}/{number}")))
            for number, client in enumerate(clients)
        ]

    def start(self) -> None:
        """Start all clients."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Return when all that was sent is acknowledged or has been given up."""
        self._give_up_at = time.monotonic() + _GIVE_UP_SECONDS
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for_answers(self, count: int) -> None:
        """Return once this many requests have been acknowledged."""
        wait_until(lambda: len(self.acknowledged) >= count, 30.0 * PATIENCE)

    def measure_recovery(self, since: float, seconds: float = 60.0 * PATIENCE) -> float:
        """Return the seconds from `since` to the first acknowledgement of what was sent later."""
        wait_until(lambda: self._find_stored(since), seconds)
        return self._find_stored(since)[0] - since

    def _find_stored(self, since: float) -> list[float]:
        answers = tuple(self.answers)
        return [a.answered_at for a in answers if a.sent_at >= since and a.status in STORED][:1]

    def count_statuses(self) -> Counter[str]:
        """Return how often each status came."""
        return self.count_answers(since=0.0)

    def count_answers(self, since: float) -> Counter[str]:
        """Return how often each status came to what was sent since then."""
        return Counter(answer.status for answer in tuple(self.answers) if answer.sent_at >= since)

    def measure_longest(self) -> float:
        """Return how long the slowest answer took, in seconds."""
        return max((a.answered_at - a.sent_at for a in tuple(self.answers)), default=0.0)

    def measure_p99(self, since: float) -> float:
        """Return the 99th percentile of the answers to what was sent since then, in seconds."""
        times = sorted(a.answered_at - a.sent_at for a in tuple(self.answers) if a.sent_at >= since)
        return times[len(times) * 99 // 100] if times else 0.0

    def _run(self, open_client: Callable[[], Client], draw: random.Random) -> None:
        with closing(open_client()) as client:
            while not self._stopping.is_set():
                batch = self.source.make_batch()
                self.sent.append(batch)
                if not self._send_until_stored(client, batch):
                    self.given_up.append(batch)
                    return
                self.acknowledged.append(batch)
                if draw.random() < _REPEATED_SHARE:
                    self._send(client, batch)
                self._stopping.wait(_PAUSE_SECONDS)

    def send_batch(self, open_client: Callable[[], Client], batch: Batch) -> None:
        """Send one more batch until it is acknowledged."""
        self.sent.append(batch)
        self.resend(batch, open_client)

    def resend(self, batch: Batch, open_client: Callable[[], Client] | None = None) -> None:
        """Send a batch that has been sent before until it is acknowledged."""
        open_client = open_client or self.open_client
        with closing(open_client()) as client:
            stored = self._send_until_stored(client, batch)
        (self.acknowledged if stored else self.given_up).append(batch)

    def _send_until_stored(self, client: Client, batch: Batch) -> bool:
        while not self._send(client, batch):
            if time.monotonic() >= self._give_up_at:
                return False
            time.sleep(_RETRY_SECONDS)
        return True

    def _send(self, client: Client, batch: Batch) -> bool:
        sent_at = time.monotonic()
        status = client.send(batch)
        self.answers.append(Answer(status, sent_at, time.monotonic()))
        return status in STORED
