"""What a process counts, as plain numbers in its memory.

Each process reports what has changed since its last report, and one page adds up the reports of
all processes; see reports.py. Increments rather than totals: what a process has reported stays
counted when it is gone, without anything to keep for it.
"""

import os
import threading
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

import orjson

# A metric's name, followed by the values of its labels.
Series = tuple[str, ...]
# A metric's numbers by the values of its labels.
Sums = dict[tuple[str, ...], list[float]]
# The first label of metrics by project. At most MAX_PROJECTS projects have series of their own, and
# the others share one, so that the page stays small.
PROJECT = "project"
MAX_PROJECTS, OTHER_PROJECTS = 200, "other"
# Keeps a message far below what a socket takes at once, even if each label is as long as an
# event's field may be.
_SERIES_IN_MESSAGE = 50


class Kind(Enum):
    """How the numbers of several processes become one."""

    COUNTER = "counter"  # added up, and kept when the process is gone
    HISTOGRAM = "histogram"  # the same, for each bucket and for the sum
    GAUGE = "gauge"  # the last ones of the processes that live, added up


@dataclass(frozen=True)
class Metric:
    """A metric as it is declared, once for all processes."""

    kind: Kind
    name: str
    text: str
    labels: tuple[str, ...] = ()
    # The upper bounds of a histogram's buckets; one without a bound follows.
    bounds: tuple[float, ...] = ()
    # The series that are on the page from the start, by the values of their labels.
    known: tuple[tuple[str, ...], ...] = ()

    @property
    def width(self) -> int:
        """The length of a series: one, or a histogram's buckets and their sum at the end."""
        return len(self.bounds) + 2 if self.kind is Kind.HISTOGRAM else 1


@dataclass(frozen=True)
class Report:
    """What changed in a process since its last report: increments, and new values of gauges."""

    process: int
    increments: dict[Series, list[float]]
    gauges: dict[Series, float]

    def encode(self) -> list[bytes]:
        """Split the report into messages of a bounded size, each complete in itself."""
        increments = [(False, *item) for item in self.increments.items()]
        gauges = [(True, series, [value]) for series, value in self.gauges.items()]
        items = [*increments, *gauges]
        return [
            orjson.dumps((self.process, items[start : start + _SERIES_IN_MESSAGE]))
            for start in range(0, len(items), _SERIES_IN_MESSAGE)
        ]

    @classmethod
    def decode(cls, message: bytes) -> "Report":
        """Read a message that `encode` made."""
        process, items = orjson.loads(message)
        report = cls(process, {}, {})
        for is_gauge, series, numbers in items:
            if is_gauge:
                report.gauges[tuple(series)] = numbers[0]
            else:
                report.increments[tuple(series)] = numbers
        return report


class Counts:
    """Counts in one process, from any thread. It holds what was not taken yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._increments: dict[Series, list[float]] = {}
        self._gauges: dict[Series, float] = {}
        self._changed: dict[Series, float] = {}

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._find(metric, labels)[0] += amount

    def observe(self, metric: Metric, amounts: Collection[float], *labels: str) -> None:
        """Put amounts into a histogram."""
        if amounts:
            with self._lock:
                numbers = self._find(metric, labels)
                for amount in amounts:
                    numbers[bisect_left(metric.bounds, amount)] += 1
                numbers[-1] += sum(amounts)

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge."""
        series = (metric.name, *labels)
        with self._lock:
            if self._gauges.get(series) != value:
                self._gauges[series] = self._changed[series] = value

    def take(self) -> Report:
        """Return what changed since the last call."""
        with self._lock:
            report = Report(os.getpid(), self._increments, self._changed)
            self._increments, self._changed = {}, {}
        return report

    def _find(self, metric: Metric, labels: tuple[str, ...]) -> list[float]:
        series = (metric.name, *labels)
        numbers = self._increments.get(series)
        if numbers is None:
            numbers = self._increments[series] = [0.0] * metric.width
        return numbers


class Totals:
    """Adds up the numbers of all processes; from any thread.

    Those of its own process need no reports: they are taken from `own` when the page is read.
    """

    def __init__(self, metrics: Collection[Metric], own: Counts) -> None:
        self._own = own
        self._metrics = {metric.name: metric for metric in metrics}
        self._lock = threading.Lock()
        self._gauges: dict[int, dict[Series, float]] = {}
        self._sums = {metric.name: _make_known(metric) for metric in metrics}
        self._projects: set[str] = set()

    def add(self, report: Report) -> None:
        """Add a process's report.

        What is not declared here is left out: after a restart, workers can be newer than the page.
        """
        increments = [item for item in report.increments.items() if self._is_declared(*item)]
        gauges = {
            series: value
            for series, value in report.gauges.items()
            if self._is_declared(series, [value])
        }
        with self._lock:
            for (name, *labels), numbers in increments:
                _add_up(self._sums[name], self._bound(name, labels), numbers)
            if gauges:
                self._gauges.setdefault(report.process, {}).update(gauges)

    def forget(self, process: int) -> None:
        """Drop the gauges of a process that is gone; what it counted stays."""
        with self._lock:
            self._gauges.pop(process, None)

    def read(self) -> list[tuple[Metric, Sums]]:
        """Return each metric with its numbers, by the values of its labels."""
        self.add(self._own.take())
        with self._lock:
            sums = {
                name: {key: list(each) for key, each in found.items()}
                for name, found in self._sums.items()
            }
            for gauges in self._gauges.values():
                for (name, *labels), value in gauges.items():
                    _add_up(sums[name], tuple(labels), [value])
        return [(metric, sums[name]) for name, metric in self._metrics.items()]

    def add_up(self, metric: Metric) -> float:
        """Return what other processes counted in all series of a counter or a gauge."""
        with self._lock:
            return sum(numbers[0] for numbers in self._sums[metric.name].values()) + sum(
                value
                for gauges in self._gauges.values()
                for series, value in gauges.items()
                if series[0] == metric.name
            )

    def _bound(self, name: str, labels: list[str]) -> tuple[str, ...]:
        """Return the labels, with `other` for a project that has no series of its own.

        A project keeps its series until the restart, so that no counter ever goes back.
        """
        if self._metrics[name].labels[:1] != (PROJECT,):
            return tuple(labels)
        project, *others = labels
        if len(self._projects) < MAX_PROJECTS:
            self._projects.add(project)
        return (project if project in self._projects else OTHER_PROJECTS, *others)

    def _is_declared(self, series: Series, numbers: list[float]) -> bool:
        metric = self._metrics.get(series[0])
        return metric is not None and (
            (len(metric.labels), metric.width) == (len(series) - 1, len(numbers))
        )


def _make_known(metric: Metric) -> Sums:
    return {labels: [0.0] * metric.width for labels in metric.known}


def _add_up(sums: Sums, labels: tuple[str, ...], numbers: list[float]) -> None:
    total = sums.setdefault(labels, [0.0] * len(numbers))
    for index, number in enumerate(numbers):
        total[index] += number
