"""A pair of servers that fails over, loses its standby, or is read-only for a while."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from urllib.request import urlopen

from tests.support.patience import PATIENCE
from tests.support.services import ask
from tests.torture.clients import NOT_STORED, STORED
from tests.torture.cluster import Setup
from tests.torture.machine import frozen
from tests.torture.pair import Server
from tests.torture.proxy import Weather
from tests.torture.trial import Fault, Inject, Trial

_PAIR = Setup(has_pair=True)
# How long nobody notices that the primary is gone.
_UNNOTICED_SECONDS = 2.0
# From the promotion to the first acknowledgement. A server that is silent costs more: a commit is
# given up after five seconds, of which two have passed, and a host after two.
_KILL_LIMIT_SECONDS, _SILENT_LIMIT_SECONDS = 3.0 * PATIENCE, 8.0 * PATIENCE
_RECOVERY_SECONDS = 5.0 * PATIENCE
# What may still be acknowledged after the standby has gone, as it had been sent to it before.
_GRACE_SECONDS = 0.5
_NOTICE_SECONDS = 4.0 * PATIENCE
_IS_UP = "\nproductgraph_database_up 1"
_OLD_PRIMARY_SECONDS = 0.5
_LOOK_SECONDS = 0.1
_SHOWN_SECONDS = 0.5
# Each connection of the service, and one more that was given up and still waits.
_MOST_BACKENDS = 2 * 15
_COUNT_BACKENDS = """
SELECT count(*), count(*) FILTER (WHERE wait_event = 'SyncRep') FROM pg_stat_activity
 WHERE application_name ^@ 'productgraph'
"""
_CANCEL_WAITS = """
SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'
"""


def _fail_over(trial: Trial, fault_at: float, limit: float) -> float:
    """Promote the standby when the fault is noticed; return the seconds until it acknowledges."""
    time.sleep(max(0.0, fault_at + _UNNOTICED_SECONDS - time.monotonic()))
    statuses = trial.load.count_answers(since=fault_at)
    promoted_at = trial.cluster.pair.promote()
    seconds = trial.recover(promoted_at, limit)
    stored = sum(statuses[status] for status in STORED)
    trial.evidence.append(
        f"promoted {promoted_at - fault_at:.1f} s after the fault, until then"
        f" {stored} answers of success and {sum(statuses.values()) - stored} others to what was"
        f" sent after it, acknowledged again after {seconds:.2f} s; from 0.5 s before the fault:"
        f" {_draw_timeline(trial, fault_at - _SHOWN_SECONDS, time.monotonic())}"
    )
    return seconds


def _draw_timeline(trial: Trial, begin: float, end: float) -> str:
    """Return a character for each tenth of a second: what those who were answered in it were told.

    + success, - refused, * some of both, . nobody was answered.
    """
    seen: dict[int, set[bool]] = {}
    for answer in tuple(trial.load.answers):
        if begin <= answer.answered_at < end:
            tenth = int((answer.answered_at - begin) * 10)
            seen.setdefault(tenth, set()).add(answer.status in STORED)
    signs = {frozenset({True}): "+", frozenset({False}): "-", frozenset(): "."}
    tenths = range(int((end - begin) * 10))
    return "".join(signs.get(frozenset(seen.get(tenth, ())), "*") for tenth in tenths)


def _kill_primary(trial: Trial) -> float:
    trial.warm_up()
    fault_at = time.monotonic()
    trial.cluster.pair.primary.kill()
    _require_death(trial, trial.cluster.pair.primary)
    seconds = _fail_over(trial, fault_at, _KILL_LIMIT_SECONDS)
    trial.cluster.pair.rebuild()
    return seconds


def _require_death(trial: Trial, server: Server) -> None:
    if server.find_processes():
        trial.problems.append("the primary lives on")


def _silence(silence: Callable[[Trial, Server], AbstractContextManager[object]]) -> Inject:
    """Make the primary silent, and let it come back for a moment when it is one no more."""

    def inject(trial: Trial) -> float:
        trial.warm_up()
        pair = trial.cluster.pair
        old = pair.primary
        with silence(trial, old):
            seconds = _fail_over(trial, time.monotonic(), _SILENT_LIMIT_SECONDS)
            if fenced := trial.draw.random() < 0.5:
                old.kill()
        if not fenced:
            trial.wait(0.0, _OLD_PRIMARY_SECONDS)
        pair.rebuild()
        return seconds

    return inject


def _freeze(_: Trial, server: Server) -> AbstractContextManager[object]:
    return frozen(server.find_processes())


@contextmanager
def _partition(trial: Trial, server: Server) -> Iterator[None]:
    """Take the primary's network away, from all at once, or from the standby first.

    Then an operator, who sees commits that wait for the standby, cancels them.
    """
    stalled = Weather(stalled=True)
    with server.replication.weather(stalled):
        if trial.draw.random() < 0.5:
            trial.show(_cancel_waits(server), "waits for the standby cancelled")
        with server.clients.weather(stalled):
            yield


def _cancel_waits(server: Server) -> int:
    cancelled, until = 0, time.monotonic() + _UNNOTICED_SECONDS
    while time.monotonic() < until:
        [(count,)] = server.query(_CANCEL_WAITS)
        cancelled += count
        time.sleep(_LOOK_SECONDS)
    return cancelled


def _lose_standby(least: float, most: float) -> Inject:
    def inject(trial: Trial) -> float:
        trial.warm_up()
        pair = trial.cluster.pair
        pair.standby.kill()
        lost_at = time.monotonic()
        backends, waiting = _watch_backends(pair.primary, lost_at + trial.draw.uniform(least, most))
        _forbid_success(trial, lost_at + _GRACE_SECONDS)
        pair.standby.start()
        back_at = time.monotonic()
        if backends > _MOST_BACKENDS:
            trial.problems.append(f"{backends} backends")
        refused = trial.load.count_answers(since=lost_at)
        count = sum(refused[status] for status in NOT_STORED)
        trial.show(waiting, "commits waited for the standby at once")
        trial.evidence.append(
            f"away for {back_at - lost_at:.1f} s, {count} requests refused, {backends} backends"
        )
        seconds = trial.recover(back_at, _RECOVERY_SECONDS)
        pair.wait_for_standby()
        return seconds

    return inject


def _watch_backends(primary: Server, until: float) -> tuple[int, int]:
    """Return the most backends of the service, and the most of them that waited for the standby."""
    most, most_waiting = 0, 0
    while time.monotonic() < until:
        [(backends, waiting)] = primary.query(_COUNT_BACKENDS)
        most, most_waiting = max(most, backends), max(most_waiting, waiting)
        time.sleep(_LOOK_SECONDS)
    return most, most_waiting


def _forbid_success(trial: Trial, since: float) -> None:
    """Note as a problem whatever was acknowledged of what was sent since then."""
    statuses = trial.load.count_answers(since)
    if stored := sum(statuses[status] for status in STORED):
        trial.problems.append(f"{stored} requests were acknowledged during the fault")


def _make_read_only(trial: Trial) -> float:
    trial.warm_up()
    primary = trial.cluster.pair.primary
    primary.configure("default_transaction_read_only", "on")
    begun_at = time.monotonic()
    try:
        unready_at = _wait_until_unready(trial, begun_at)
        trial.wait(0.2, 2.0)
        # A commit under way had begun before.
        _forbid_success(trial, begun_at + _GRACE_SECONDS)
        refused = trial.load.count_answers(since=begun_at)
        trial.show(sum(refused[status] for status in NOT_STORED), "requests refused")
        trial.evidence.append(f"unready after {unready_at - begun_at:.1f} s")
    finally:
        primary.configure("default_transaction_read_only", "off")
    return trial.recover(time.monotonic(), _RECOVERY_SECONDS)


def _wait_until_unready(trial: Trial, begun_at: float) -> float:
    service = trial.cluster.service
    while ask(f"{service.http_url}/ready") != 503 or _IS_UP in _read_page(service.metrics_url):
        if time.monotonic() > begun_at + _NOTICE_SECONDS:
            trial.problems.append(f"not unready after {_NOTICE_SECONDS:.0f} s")
            break
        time.sleep(_LOOK_SECONDS)
    return time.monotonic()


def _read_page(url: str) -> str:
    with urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


FAULTS = (
    Fault("primary-kill", _kill_primary, 50, 1, setup=_PAIR),
    Fault("primary-freeze", _silence(_freeze), 50, 0, setup=_PAIR),
    Fault("primary-partition", _silence(_partition), 50, 1, setup=_PAIR),
    Fault("standby-away", _lose_standby(2.0, 8.0), 50, 1, setup=_PAIR),
    Fault("standby-away-60", _lose_standby(60.0, 60.0), 1, 0, setup=_PAIR),
    Fault("read-only", _make_read_only, 50, 1, setup=_PAIR),
)
