"""Rounds of faults on one cluster, and what was found."""

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2

from tests.support.patience import PATIENCE
from tests.torture.checks import Findings, Ledger, check
from tests.torture.cluster import Cluster, Setup
from tests.torture.events import EventSource
from tests.torture.load import Load
from tests.torture.secrets import find_leaks
from tests.torture.trial import ANSWER_SECONDS, Fault, Trial

# Mixpanel takes events of an hour ahead at the most, so the rounds' times begin in the past.
_EPOCH_AGE = timedelta(hours=12)
# What a killed forwarder had claimed is due again after 60 s.
_DRAIN_SECONDS = 90.0 * PATIENCE
_SHORT_DRAIN_SECONDS = 3.0
_BETWEEN_FAULTS_SECONDS = 10.0
_COUNT_PENDING = "SELECT count(*) FROM outbox_deliveries"
# Retries that are far ahead are brought forward; leases are waited for, unless in a hurry.
_HURRY_RETRIES = "UPDATE outbox_deliveries SET due_at = now() WHERE attempts > 0 AND due_at > now()"
_END_LEASES = "UPDATE outbox_deliveries SET due_at = now() WHERE due_at > now()"


@dataclass
class Tally:
    """What the rounds of one fault came to; recoveries are in seconds."""

    name: str
    rounds: int = 0
    sent: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    recoveries: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)

    def add(self, load: Load, findings: Findings) -> None:
        """Enter a round."""
        self.sent += sum(len(batch.insert_ids) for batch in load.sent)
        self.acknowledged += sum(len(batch.insert_ids) for batch in load.acknowledged)
        self.lost += findings.lost
        self.duplicated += findings.duplicated
        self.note(findings.violations)

    def note(self, violations: list[str]) -> None:
        """Enter what is wrong, with the round in which it was found."""
        self.violations += [f"round {self.rounds}: {text}" for text in violations]


class Session:
    """One cluster, and everything that was ever sent to it."""

    def __init__(self, cluster: Cluster, seed: str) -> None:
        self.cluster = cluster
        self._seed = seed
        self._epoch = datetime.now(UTC).replace(microsecond=0) - _EPOCH_AGE
        self._number = 0
        self._ledger = Ledger()

    def run_rounds(self, fault: Fault, rounds: int, tally: Tally) -> None:
        """Inject a fault this many times, or until a round finds a violation."""
        # What the fault before has left would delay what this one waits for.
        self._is_drained(_BETWEEN_FAULTS_SECONDS)
        while tally.rounds < rounds and not tally.violations:
            tally.rounds += 1
            try:
                self._run_round(fault, tally)
            except (AssertionError, OSError, psycopg2.Error) as failure:
                tally.note([f"the round could not be ended: {failure}"])
        for provider in self.cluster.providers.values():
            provider.behave = lambda _: None
            provider.forget_repeats()
        while self.cluster.extra_forwarders:
            forwarder = self.cluster.extra_forwarders.pop()
            forwarder.terminate()
            forwarder.wait(30 * PATIENCE)

    def _run_round(self, fault: Fault, tally: Tally) -> None:
        seed = f"{self._seed}/{fault.name}/{tally.rounds}"
        source = EventSource(self._epoch, self._number, seed)
        self._number += 1
        load = Load(self.cluster.open_clients(), source, seed)
        trial = Trial(self.cluster, load, random.Random(seed))
        load.start()
        try:
            tally.recoveries.append(fault.inject(trial))
        finally:
            load.stop()
            self._ledger.add(load)
        self.cluster.wait_until_serving()
        self._judge(fault, trial, tally)

    def _judge(self, fault: Fault, trial: Trial, tally: Tally) -> None:
        load, ledger = trial.load, Ledger()
        ledger.add(load)
        findings = check(self.cluster, ledger, load.source.begin, load.source.end)
        tally.add(load, findings)
        tally.note(trial.problems)
        tally.evidence += [f"round {tally.rounds}: {text}" for text in trial.evidence]
        unexpected = load.count_statuses().keys() - fault.statuses
        tally.note([f"answered {status}" for status in sorted(unexpected)])
        if fault.has_deadline and (longest := load.measure_longest()) > ANSWER_SECONDS:
            tally.note([f"answered after {longest:.1f} s"])
        tally.note(find_leaks(self.cluster))

    def finish(self, tally: Tally, *, in_a_hurry: bool = False) -> None:
        """Wait until all is forwarded, and check everything once more.

        If a violation is known anyway, not for long: what is pending then is no other one.
        """
        is_drained = self._drain(
            _SHORT_DRAIN_SECONDS if in_a_hurry else _DRAIN_SECONDS,
            _SHORT_DRAIN_SECONDS if tally.violations else _DRAIN_SECONDS,
        )
        findings = check(
            self.cluster,
            self._ledger,
            self._epoch,
            self._epoch + timedelta(seconds=self._number),
            is_over=is_drained or not tally.violations,
        )
        tally.lost = max(tally.lost, findings.lost)
        tally.duplicated = max(tally.duplicated, findings.duplicated)
        tally.note(findings.violations)
        tally.note(find_leaks(self.cluster))

    def _drain(self, lease_seconds: float, seconds: float) -> bool:
        """Wait until all is forwarded, at first as leases allow, and return whether it is."""
        self.cluster.query(_HURRY_RETRIES)
        if self._is_drained(lease_seconds):
            return True
        self.cluster.query(_END_LEASES)
        return self._is_drained(seconds)

    def _is_drained(self, seconds: float) -> bool:
        """Wait until nothing is pending, for as long as it gets less within `seconds`."""
        least, deadline = math.inf, time.monotonic() + seconds
        while time.monotonic() < deadline:
            [(pending,)] = self.cluster.query(_COUNT_PENDING)
            if not pending:
                return True
            if pending < least:
                least, deadline = pending, time.monotonic() + seconds
            time.sleep(0.1)
        return False


@contextmanager
def open_session(setup: Setup, root: Path, seed: str) -> Iterator[Session]:
    """Run a cluster of the code in `root`, in directories of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o711)  # the account of an embedded PostgreSQL has to get through
        cluster = Cluster(Path(directory), setup, root, seed)
        with cluster.running():
            yield Session(cluster, seed)


@dataclass(frozen=True)
class Plan:
    """Which faults, how often (None: as often as each says), of which code, drawn from what.

    `logs` is the directory for the logs of a fault that has found a violation.
    """

    faults: list[Fault]
    rounds: int | None
    root: Path
    seed: str
    logs: Path
    is_quick: bool = False
    is_hurried: bool = False

    def count_rounds(self, fault: Fault) -> int:
        """Return how many rounds of a fault there are."""
        if self.rounds is not None:
            return self.rounds
        return fault.quick_rounds if self.is_quick else fault.rounds


def run(plan: Plan, on_tally: Callable[[Tally], None]) -> None:
    """Run the plan; a quick one has one cluster for all faults of a setup."""
    chosen = [fault for fault in plan.faults if plan.count_rounds(fault)]
    setups = dict.fromkeys(fault.setup for fault in chosen)
    groups = [[f for f in chosen if f.setup == setup] for setup in setups]
    for group in groups if plan.is_quick else [[fault] for fault in chosen]:
        _run_group(plan, group, on_tally)


def _run_group(plan: Plan, group: list[Fault], on_tally: Callable[[Tally], None]) -> None:
    left = list(group)
    while left:  # what follows a violation has a cluster of its own
        with open_session(left[0].setup, plan.root, plan.seed) as session:
            while left:
                fault = left.pop(0)
                tally = Tally(fault.name)
                session.run_rounds(fault, plan.count_rounds(fault), tally)
                if not left or tally.violations:
                    session.finish(tally, in_a_hurry=plan.is_hurried)
                on_tally(tally)
                if tally.violations:
                    session.cluster.keep_logs(plan.logs / fault.name)
                    break
