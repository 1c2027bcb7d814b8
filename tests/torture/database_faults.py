"""A database that dies, freezes or has no room, and a bad connection to it."""

import os
import signal
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.support.patience import PATIENCE
from tests.support.services import ask, wait_until
from tests.torture.cluster import Setup
from tests.torture.machine import frozen
from tests.torture.proxy import CommitCut, Weather
from tests.torture.trial import Fault, Inject, Trial

_PROXIED = Setup(has_proxied_database=True)
_SMALL_DISK = Setup(disk_megabytes=256)
_RECOVERY_SECONDS = 5.0 * PATIENCE
_RESTART_SECONDS = 30.0 * PATIENCE
# Of a database that does not answer, /ready tells after so long.
_NOTICE_SECONDS = 4.0 * PATIENCE
_LOOK_SECONDS = 0.2
_CHUNK = b"\0" * (1 << 16)


def _recover_with_database(trial: Trial, since: float) -> float:
    """Return the recovery since the fault, within five seconds of the database's first answer."""
    trial.cluster.wait_for_database()
    trial.recover(time.monotonic(), _RECOVERY_SECONDS)
    return trial.recover(since)


def _kill_database(trial: Trial) -> float:
    trial.warm_up()
    processes = trial.cluster.find_postgres()
    victims = processes
    if trial.draw.random() < 0.2:  # one backend takes all others with it
        victims = [trial.draw.choice(processes[1:])]
    killed_at = time.monotonic()
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return _recover_with_database(trial, killed_at)


def _stop_database(trial: Trial) -> float:
    trial.warm_up()
    postmaster = trial.cluster.find_postgres()[0]
    stopped_at = time.monotonic()
    postmaster.send_signal(signal.SIGQUIT)
    postmaster.wait(_RESTART_SECONDS)
    return _recover_with_database(trial, stopped_at)


def _freeze_database(seconds: float) -> Inject:
    def inject(trial: Trial) -> float:
        trial.warm_up()
        with frozen(trial.cluster.find_postgres()):
            _watch_health(trial, seconds)
        return trial.recover(time.monotonic(), _RECOVERY_SECONDS)

    return inject


def _watch_health(trial: Trial, seconds: float) -> None:
    url, begun_at = trial.cluster.service.http_url, time.monotonic()
    while (since := time.monotonic() - begun_at) < seconds:
        if since >= _NOTICE_SECONDS and ask(f"{url}/ready") != 503:
            trial.problems.append(f"/ready is not 503 after {since:.1f} s")
        if ask(f"{url}/health") != 200:
            trial.problems.append(f"/health is not 200 after {since:.1f} s")
        time.sleep(min(_LOOK_SECONDS, seconds))


def _fill_disk(trial: Trial) -> float:
    trial.warm_up()
    ballast = trial.cluster.data / "ballast"
    _fill(ballast)
    try:
        if trial.draw.random() < 0.5:  # a new segment of the WAL, which PostgreSQL dies of
            with suppress(Exception), closing(trial.cluster.connect()) as connection:
                connection.cursor().execute("SELECT pg_switch_wal()")
        wait_until(lambda: _was_refused(trial), 30.0 * PATIENCE)
        trial.wait(0.2, 1.0)
    finally:
        ballast.unlink()
    freed_at = time.monotonic()
    seconds = _recover_with_database(trial, freed_at)
    trial.cluster.query("CHECKPOINT")  # gives back the room that the WAL takes
    return seconds


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(_CHUNK)
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(_CHUNK[: os.sysconf("SC_PAGE_SIZE")]):
            pass


def _was_refused(trial: Trial) -> bool:
    statuses = trial.load.count_statuses()
    return bool(statuses["503"] or statuses["UNAVAILABLE"])


def _cut_at_commit(trial: Trial) -> float:
    trial.warm_up()
    trial.cluster.database_proxy.cut_commit(trial.draw.choice(list(CommitCut)))
    return trial.recover(time.monotonic(), _RECOVERY_SECONDS)


def _weather(weather: Weather, least: float, most: float) -> Inject:
    def inject(trial: Trial) -> float:
        trial.warm_up()
        with trial.cluster.database_proxy.weather(weather):
            trial.wait(least, most)
        return trial.recover(time.monotonic(), _RECOVERY_SECONDS)

    return inject


def _cut(*, reset: bool) -> Inject:
    def inject(trial: Trial) -> float:
        trial.warm_up()
        for _ in range(trial.draw.randint(1, 5)):
            trial.cluster.database_proxy.cut(reset=reset)
            trial.wait(0.0, 0.2)
        return trial.recover(time.monotonic(), _RECOVERY_SECONDS)

    return inject


FAULTS = (
    Fault("database-kill", _kill_database, 100, 3),
    Fault("database-stop", _stop_database, 20, 1),
    Fault("database-freeze-1", _freeze_database(1.0), 20, 1),
    Fault("database-freeze-10", _freeze_database(10.0), 20, 0),
    Fault("database-freeze-60", _freeze_database(60.0), 3, 0),
    Fault("disk-full", _fill_disk, 10, 1, setup=_SMALL_DISK),
    Fault("cut-at-commit", _cut_at_commit, 200, 6, setup=_PROXIED),
    Fault("database-delay", _weather(Weather(delay=0.2), 0.5, 1.5), 20, 1, setup=_PROXIED),
    Fault("database-stall", _weather(Weather(stalled=True), 0.5, 8.0), 20, 1, setup=_PROXIED),
    Fault("database-slice", _weather(Weather(piece_bytes=7), 0.5, 1.5), 20, 1, setup=_PROXIED),
    Fault("database-cut", _cut(reset=False), 20, 1, setup=_PROXIED),
    Fault("database-reset", _cut(reset=True), 20, 1, setup=_PROXIED),
)
