"""Forwarders that get little of a processor, and providers that answer because of single events."""

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil  # type: ignore[import-untyped]

from productgraph.v1.event_pb2 import Event as Message
from tests.support.patience import PATIENCE
from tests.support.provider_servers import Event, Script
from tests.support.services import wait_until
from tests.torture.clients import STORED
from tests.torture.provider_faults import UNHINDERED_SECONDS, catch_up, count_dead, find_missing
from tests.torture.providers import answer
from tests.torture.trial import Fault, Trial

ATTACK = "https://shop.example/?file=../../etc/passwd"
QUOTA_USER = "user-over-quota"
_SLICE_SECONDS = 0.01
_STARVED_SHARE, _DENSE_SHARE = 0.03, 0.33
# Events of a backlog: many small ones, and fewer that are dear to map.
_SMALL_BATCHES, _DENSE_BATCHES, _DENSE_SIZE, _DENSE_VALUES = 12, 12, 25, 24_000
_PROGRESS_SECONDS = 60.0 * PATIENCE
_SIZE, _OVER_QUOTA = 200, 20
_BRING_FORWARD = "UPDATE outbox_deliveries SET due_at = now() WHERE due_at > now() + '30 min'"


@contextmanager
def _starved(trial: Trial, share: float) -> Iterator[None]:
    """Let the forwarder have at most that share of a processor."""
    [process] = trial.cluster.find_children("forward")
    done = threading.Event()
    begun, used = time.monotonic(), sum(process.cpu_times()[:2])

    def run() -> None:
        with suppress(psutil.NoSuchProcess):
            while not done.wait(_SLICE_SECONDS):
                spent = sum(process.cpu_times()[:2]) - used
                is_over = spent > share * (time.monotonic() - begun)
                process.send_signal(signal.SIGSTOP if is_over else signal.SIGCONT)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        process.send_signal(signal.SIGCONT)
        spent = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - begun)
        trial.evidence.append(f"the forwarder had {spent:.1%} of a processor")


def _starve(trial: Trial) -> float:
    """Pile up small events; something must be sent while the forwarder hardly runs."""
    trial.warm_up()
    trial.load.stop()
    with _starved(trial, _STARVED_SHARE):
        for _ in range(_SMALL_BATCHES):
            trial.load.send_batch(
                trial.cluster.open_clients()[0], trial.load.source.make_batch(size=1000)
            )
        _wait_for_progress(trial)
    return catch_up(trial, *trial.cluster.providers.values())


def _send_dense(trial: Trial) -> float:
    """Pile up events that are dear to map, for a forwarder with a third of a processor."""
    trial.warm_up()
    trial.load.stop()

    def make_dense(_index: int, event: Message) -> None:
        event.metadata.update({"dense": [True] * _DENSE_VALUES})

    with _starved(trial, _DENSE_SHARE):
        for _ in range(_DENSE_BATCHES):
            batch = trial.load.source.make_batch(size=_DENSE_SIZE, change=make_dense)
            # Over gRPC: in JSON so many values are refused.
            trial.load.send_batch(trial.cluster.open_clients()[-1], batch)
        _wait_for_progress(trial)
    return catch_up(trial, *trial.cluster.providers.values())


def _wait_for_progress(trial: Trial) -> None:
    """Wait until each provider gets more than it has."""
    providers = trial.cluster.providers.values()
    before = {provider: len(find_missing(trial, provider)) for provider in providers}
    trial.show(sum(before.values()), "events waited while it was starved")
    for provider, count in before.items():
        wait_until(
            lambda p=provider, n=count: len(find_missing(trial, p)) < n,  # type: ignore[misc]
            _PROGRESS_SECONDS,
        )


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
    # Not in a quick run: a machine that is busy anyway starves them of far more.
    Fault("forwarder-starved", _starve, 50, 0, STORED),
    Fault("dense-events", _send_dense, 50, 0, STORED),
    Fault("provider-403-by-content", _refuse_by_content, 50, 1, STORED),
    Fault("provider-quota", _exceed_quota, 50, 1, STORED),
)
