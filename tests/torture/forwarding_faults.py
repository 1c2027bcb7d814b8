"""Forwarders that get little of a processor, and providers that answer because of single events."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil  # type: ignore[import-untyped]

from productgraph.v1.event_pb2 import Event as Message
from tests.support.patience import PATIENCE
from tests.support.provider_servers import Event, Script
from tests.support.services import wait_until
from tests.torture.clients import STORED
from tests.torture.events import Batch, EventSource
from tests.torture.machine import frozen
from tests.torture.provider_faults import UNHINDERED_SECONDS, catch_up, count_dead, find_missing
from tests.torture.providers import answer
from tests.torture.trial import Fault, Inject, Trial

ATTACK = "https://shop.example/?file=../../etc/passwd"
QUOTA_USER = "user-over-quota"
_SLICE_SECONDS = 0.01
_STARVED_SHARE, _DENSE_SHARE = 0.05, 0.05
# Events of a backlog: many small ones, and fewer that are dear to map.
_SMALL_BATCHES, _SMALL_SIZE = 9, 1000
_DENSE_BATCHES, _DENSE_SIZE, _DENSE_VALUES = 2, 25, 24_000
# Of a processor, in which each provider must get something: on no machine does that depend on how
# long it takes. Healthy forwarders were seen to need a quarter of it.
_PROCESSOR_SECONDS = 3.0
# Until when the forwarder must have had that much.
_STARVED_SECONDS = 600.0 * PATIENCE
_SIZE, _OVER_QUOTA = 200, 20
_BRING_FORWARD = "UPDATE outbox_deliveries SET due_at = now() WHERE due_at > now() + '30 min'"


@contextmanager
def _starved(trial: Trial, share: float) -> Iterator[Callable[[], float]]:
    """Let the forwarder have at most that share of a processor; provide what it has had of it."""
    [process] = trial.cluster.find_children("forward")
    done, begun, before = threading.Event(), time.monotonic(), _measure_processor(process)

    def measure_spent() -> float:
        return _measure_processor(process) - before

    def run() -> None:
        with suppress(psutil.NoSuchProcess):
            while not done.wait(_SLICE_SECONDS):
                is_over = measure_spent() > share * (time.monotonic() - begun)
                process.send_signal(signal.SIGSTOP if is_over else signal.SIGCONT)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield measure_spent
    finally:
        done.set()
        thread.join()
        process.send_signal(signal.SIGCONT)
        spent, seconds = measure_spent(), time.monotonic() - begun
        trial.evidence.append(
            f"the forwarder had {spent:.2f} s of a processor in {seconds:.1f} s"
            f" ({spent / seconds:.1%})"
        )


def _measure_processor(process: psutil.Process) -> float:
    user, system, *_ = process.cpu_times()
    return float(user + system)


def _starve_with(share: float, make_backlog: Callable[[EventSource], Iterator[Batch]]) -> Inject:
    """Pile up events; something must be sent though the forwarder hardly runs."""

    def inject(trial: Trial) -> float:
        providers = trial.cluster.providers.values()
        trial.warm_up()
        # What the forwarder sends after this, it has claimed after this.
        catch_up(trial, *providers)
        with frozen(trial.cluster.find_children("forward")):
            for batch in make_backlog(trial.load.source):
                trial.load.send_batch(trial.cluster.open_clients()[-1], batch)
        with _starved(trial, share) as measure_spent:
            _expect_progress(trial, measure_spent)
        return 0.0 if trial.problems else catch_up(trial, *providers)

    return inject


def _pile_up_small(source: EventSource) -> Iterator[Batch]:
    for _ in range(_SMALL_BATCHES):
        yield source.make_batch(size=_SMALL_SIZE, has_body=False)


def _pile_up_dense(source: EventSource) -> Iterator[Batch]:
    """Make events that are dear to map: over gRPC, since in JSON so many values are refused."""
    dense = Message()
    dense.metadata.update({"dense": [True] * _DENSE_VALUES})
    for _ in range(_DENSE_BATCHES):
        yield source.make_batch(
            size=_DENSE_SIZE, change=lambda _, event: event.MergeFrom(dense), has_body=False
        )


def _expect_progress(trial: Trial, measure_spent: Callable[[], float]) -> None:
    """Wait until each provider gets something, within the time that it may take the forwarder."""
    providers = trial.cluster.providers
    before = {name: len(find_missing(trial, provider)) for name, provider in providers.items()}
    trial.show(sum(before.values()), "events waited while it was starved")

    def find_idle() -> list[str]:
        return [
            name for name, n in before.items() if len(find_missing(trial, providers[name])) == n
        ]

    wait_until(lambda: not find_idle() or measure_spent() > _PROCESSOR_SECONDS, _STARVED_SECONDS)
    trial.problems += [
        f"{name} was sent nothing in {measure_spent():.1f} s of a processor" for name in find_idle()
    ]


def _refuse_by_content(trial: Trial) -> float:
    """Let a firewall before both providers answer 403 because of one event."""
    refusals: list[Script] = []

    def behave(events: Sequence[Event]) -> Script | None:
        if ATTACK not in json.dumps(events):
            return None
        refusals.append(answer(403, b"blocked"))
        return refusals[-1]

    def attack_first(index: int, event: Message) -> None:
        if index == 0:
            event.page_url = ATTACK

    providers = trial.cluster.providers.values()
    for provider in providers:
        provider.behave = behave
    try:
        trial.warm_up()
        batch = trial.load.source.make_batch(size=_SIZE, refused=1, change=attack_first)
        trial.load.send_batch(trial.cluster.open_clients()[0], batch)
        seconds = catch_up(trial, *providers)
        dead = len(providers)
        wait_until(lambda: count_dead(trial, batch.refused) == dead, UNHINDERED_SECONDS)
    finally:
        for provider in providers:
            provider.behave = lambda _: None
    trial.show(len(refusals), "requests were answered 403")
    return seconds


def _exceed_quota(trial: Trial) -> float:
    """Let Amplitude answer 429 because of one user's daily quota; the others do not wait."""
    amplitude, refusals = trial.cluster.providers["amplitude"], []

    def behave(events: Sequence[Event]) -> Script | None:
        count = sum(event.get("user_id") == QUOTA_USER for event in events)
        if not count:
            return None
        report = {"code": 429, "exceeded_daily_quota_users": {QUOTA_USER: count}}
        refusals.append(answer(429, json.dumps(report).encode()))
        return refusals[-1]

    def make_heavy(index: int, event: Message) -> None:
        if index < _OVER_QUOTA:
            event.user_id = QUOTA_USER

    amplitude.behave = behave
    try:
        trial.warm_up()
        batch = trial.load.source.make_batch(size=_SIZE, change=make_heavy)
        trial.load.send_batch(trial.cluster.open_clients()[0], batch)
        trial.load.stop()
        wait_until(lambda: len(find_missing(trial, amplitude)) == _OVER_QUOTA, UNHINDERED_SECONDS)
        wait_until(
            lambda: trial.cluster.query(_COUNT_HOURLY) == [(_OVER_QUOTA,)], UNHINDERED_SECONDS
        )
    finally:
        amplitude.behave = lambda _: None
    trial.show(len(refusals), "requests were answered 429")
    trial.cluster.query(_BRING_FORWARD)
    return catch_up(trial, *trial.cluster.providers.values())


_COUNT_HOURLY = """
SELECT coalesce(sum(event_count), 0)::integer FROM outbox_deliveries
 WHERE due_at > now() + interval '30 min'
"""

FAULTS = (
    Fault("forwarder-starved", _starve_with(_STARVED_SHARE, _pile_up_small), 50, 1, STORED),
    Fault("dense-events", _starve_with(_DENSE_SHARE, _pile_up_dense), 50, 1, STORED),
    Fault("provider-403-by-content", _refuse_by_content, 50, 1, STORED),
    Fault("provider-quota", _exceed_quota, 50, 1, STORED),
)
