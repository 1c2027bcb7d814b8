"""Processes of the service that die or are told to end."""

import signal
import subprocess
import time

import psutil  # type: ignore[import-untyped]

from server import failpoints
from tests.support.patience import PATIENCE
from tests.support.services import ask, wait_until
from tests.torture.clients import STORED
from tests.torture.cluster import WORKERS
from tests.torture.trial import WITHOUT_ANSWER, Fault, Inject, Trial

# A gRPC call may arrive in the very moment in which its worker stops listening.
_LEAVING = STORED | {"CANCELLED"}
_EXIT_SECONDS = 30.0 * PATIENCE
# A forwarder yields to everything else on the machine, its start included.
_REACH_SECONDS = 120.0 * PATIENCE
_EXTRA_FORWARDERS = 2
_SLOW_SECONDS = 0.5
# What a provider has taken is claimed for 60 s, of which 35 may have passed until it answered.
_LEASE_REST_SECONDS = 20.0
_FIND_OVERLONG = """
SELECT count(*) FROM outbox_deliveries WHERE due_at > now() + interval '60 s' AND attempts = 0
"""


def _leave_alone(trial: Trial) -> float:
    trial.warm_up()
    trial.wait(0.3, 0.6)
    return 0.0


def _kill_service(trial: Trial) -> float:
    trial.warm_up()
    [victims] = trial.draw.choices(["worker", "workers", "parent", "all"], [4, 3, 1, 2])
    service = trial.cluster.service
    workers = trial.cluster.find_children("worker")
    killed_at = time.monotonic()
    if victims in ("parent", "all"):
        # The parent first, so that it starts nobody anew.
        everybody = psutil.Process(service.process.pid).children()
        service.process.kill()
        for process in everybody if victims == "all" else []:
            process.kill()
        trial.cluster.revive_service()
    else:
        for worker in workers if victims == "workers" else [trial.draw.choice(workers)]:
            worker.kill()
    return trial.recover(killed_at)


def _die_at(point: str) -> Inject:
    def inject(trial: Trial) -> float:
        arrivals = [len(p.arrivals) for p in trial.cluster.providers.values()]
        trial.warm_up()
        if point == failpoints.AFTER_PROVIDER:
            # A forwarder that has just been started may have little to send.
            now = trial.cluster.providers.values()
            wait_until(
                lambda: sum(len(p.arrivals) for p in now) > sum(arrivals) + 10, _REACH_SECONDS
            )
        armed = trial.cluster.failpoints / point
        armed.touch()
        wait_until(lambda: not armed.exists(), _REACH_SECONDS)
        return trial.recover(time.monotonic())

    return inject


def _terminate(trial: Trial) -> float:
    trial.warm_up()
    process = trial.cluster.service.process
    sent_at = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        trial.problems.append(f"runs on {_EXIT_SECONDS:.0f} s after SIGTERM")
        process.kill()
    else:
        if status:
            trial.problems.append(f"exit status {status} after SIGTERM")
    trial.cluster.revive_service()
    return trial.recover(sent_at)


def _replace_workers(trial: Trial) -> float:
    trial.cluster.wait_until_serving(WORKERS)
    trial.warm_up()
    before = set(trial.cluster.find_children("worker"))
    sent_at = time.monotonic()
    trial.cluster.service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not before & set(trial.cluster.find_children("worker")), 60.0 * PATIENCE)
    trial.cluster.wait_until_serving(WORKERS)
    if ask(f"{trial.cluster.service.http_url}/health") != 200:
        trial.problems.append("/health is not 200 after SIGHUP")
    return trial.recover(sent_at)


def _kill_forwarder(trial: Trial) -> float:
    cluster = trial.cluster
    while len(cluster.extra_forwarders) < _EXTRA_FORWARDERS:
        cluster.start_forwarder()
    for provider in cluster.providers.values():
        # Long enough for another one to look meanwhile, and claim the same if nothing kept it off.
        provider.behave = lambda _: time.sleep(_SLOW_SECONDS)
    trial.warm_up()
    trial.wait(1.0, 2.0)  # in which each of them looks for more
    victim = trial.draw.randrange(_EXTRA_FORWARDERS + 1)
    killed_at = time.monotonic()
    if victim < _EXTRA_FORWARDERS:
        process = cluster.extra_forwarders.pop(victim)
        process.kill()
        process.wait()
    else:
        for process in cluster.find_children("forward"):
            process.kill()
    _check_leases(trial)
    return trial.recover(killed_at)


def _check_leases(trial: Trial) -> None:
    [(overlong,)] = trial.cluster.query(_FIND_OVERLONG)
    if overlong:
        trial.problems.append(f"{overlong} deliveries are claimed for longer than a lease")
    for name, provider in trial.cluster.providers.items():
        if hasty := provider.find_hasty_repeats(_LEASE_REST_SECONDS):
            trial.problems.append(f"{hasty} events went to {name} again within their lease")


FAULTS = (
    Fault("calm", _leave_alone, 5, 1, STORED),
    Fault("service-kill", _kill_service, 300, 3, WITHOUT_ANSWER, has_deadline=False),
    Fault(
        "kill-before-commit",
        _die_at(failpoints.BEFORE_COMMIT),
        100,
        statuses=WITHOUT_ANSWER,
    ),
    Fault("kill-after-commit", _die_at(failpoints.AFTER_COMMIT), 100, statuses=WITHOUT_ANSWER),
    Fault("kill-after-provider", _die_at(failpoints.AFTER_PROVIDER), 100, statuses=STORED),
    Fault("forwarder-kill", _kill_forwarder, 300, 3, STORED),
    Fault("terminate", _terminate, 100, 2, WITHOUT_ANSWER, has_deadline=False),
    Fault("replace-workers", _replace_workers, 20, 1, _LEAVING),
)
