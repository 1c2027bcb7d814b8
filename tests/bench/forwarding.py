"""What forwarding costs ingestion, and how both fare when a provider hangs or much is pending."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.bench.backlog import measure_backlog
from tests.bench.paced_load import PacedResult, percentile
from tests.bench.providers import NAMES, Providers, running_providers
from tests.bench.report import Document
from tests.bench.run import OnStep
from tests.bench.side import RATE, Side, describe, running_side

_ROUNDS = 7
_WARM_UP_SECONDS = 0.5
_HANG_SECONDS = 60.0
_CALM_SECONDS = 20.0


class _Workload(NamedTuple):
    batch: int  # events a request
    rate: float  # requests a second
    requests: int  # a round


_WORKLOADS = (_Workload(1, RATE, 2000), _Workload(20, 50.0, 500))


def measure_cost(directory: Path, providers: Providers, scale: float, on_step: OnStep) -> Document:
    """Measure ingestion at a moderate rate: analytics off, on, and on without a forwarder here.

    The last is named `away`: it queues as if the forwarders ran on another machine.
    """
    settings = {
        "off": {"ANALYTICS_ENABLED": "false"},
        "away": providers.settings | {"FORWARDERS": "0"},
        "on": providers.settings,
    }
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(running_side(directory / name, each))
            for name, each in settings.items()
        }
        on, sent = sides["on"], set[str]()
        status = {"before": on.show_status()}
        workloads = {
            str(each.batch): _compare_sides(sides, each, scale, sent, on_step)
            for each in _WORKLOADS
        }
        status["during"] = _show_status_during(on, _WORKLOADS[0], scale, sent)
        on.wait_until_forwarded()
        status["after"] = on.show_status()
        arrivals = providers.read_arrivals()
        return {
            "workloads": workloads,
            "acknowledged": len(sent),
            "arrived": {name: len(sent & arrivals[name].keys()) for name in NAMES},
            "pending": on.count_pending(),
            "status": status,
        }


def _compare_sides(
    sides: Mapping[str, Side], workload: _Workload, scale: float, sent: set[str], on_step: OnStep
) -> Document:
    batch, rate, requests = workload
    count, warm_up = round(requests * scale), round(rate * _WARM_UP_SECONDS * scale)
    rounds: list[dict[str, PacedResult]] = []
    for number in range(_ROUNDS):
        results = {}
        for name in sorted(sides, reverse=number % 2 == 1):
            on_step(f"round {number + 1} of {_ROUNDS}, {batch} a request, analytics {name}")
            results[name] = sides[name].send(count, warm_up, batch=batch, rate=rate)
            sides["on"].wait_until_forwarded()
        sent.update(results["on"].acknowledged)
        rounds.append(results)
    return {
        "requests_per_second": rate,
        "rounds": [{name: describe(result) for name, result in each.items()} for each in rounds],
        "p50_ratios": _compare(rounds, 0.5),
        "p99_ratios": _compare(rounds, 0.99),
    }


def _compare(rounds: Sequence[Mapping[str, PacedResult]], share: float) -> dict[str, float]:
    """Return the latencies as multiples of that of `off`, each the median of the rounds."""
    return {
        name: median(
            each[name].percentile_ms(share) / each["off"].percentile_ms(share) for each in rounds
        )
        for name in ("away", "on")
    }


def _show_status_during(side: Side, workload: _Workload, scale: float, sent: set[str]) -> list[str]:
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(side.send, round(workload.requests * scale))
        time.sleep(workload.requests * scale / workload.rate / 2)
        lines = side.show_status()
        sent.update(load.result().acknowledged)
    return lines


def measure_hang(directory: Path, providers: Providers, scale: float, on_step: OnStep) -> Document:
    """Let one provider hang for a minute, and measure what the other one and ingestion notice."""
    hung, other = NAMES
    with running_side(directory / "on", providers.settings) as side:
        warm_up = round(RATE * _WARM_UP_SECONDS * scale)
        on_step("both providers answer")
        calm = side.send(round(_CALM_SECONDS * scale * RATE), warm_up)
        side.wait_until_forwarded()
        status = {"before": side.show_status()}
        on_step(f"{hung} hangs")
        providers.hang(hung)
        troubled = side.send(round(_HANG_SECONDS * scale * RATE))
        status["during"] = side.show_status()
        pending = side.count_pending()
        on_step(f"{hung} answers again")
        providers.answer(hung)
        drained_seconds = side.wait_until_forwarded()
        status["after"] = side.show_status()
        arrivals = providers.read_arrivals()
        sent = calm.acknowledged | troubled.acknowledged
        return {
            "hung": hung,
            "other": other,
            "before": describe(calm) | _describe_lag(calm, arrivals[other]),
            "during": describe(troubled) | _describe_lag(troubled, arrivals[other]),
            "pending_after_the_hang": pending,
            "drained_seconds": drained_seconds,
            "acknowledged": len(sent),
            "arrived": {name: len(sent.keys() & arrivals[name].keys()) for name in NAMES},
            "pending": side.count_pending(),
            "status": status,
        }


def _describe_lag(result: PacedResult, arrivals: Mapping[str, float]) -> Document:
    """Describe the time from acknowledgement to arrival, leaving out arrivals seen before it."""
    lags = [
        max(0.0, arrivals[insert_id] - acknowledged_at) * 1000
        for insert_id, acknowledged_at in result.acknowledged.items()
        if insert_id in arrivals
    ]
    return {"lag_p50_ms": percentile(lags, 0.5), "lag_p99_ms": percentile(lags, 0.99)}


PARTS = {"cost": measure_cost, "hang": measure_hang, "backlog": measure_backlog}


def run_forwarding(parts: Sequence[str], scale: float, on_step: OnStep) -> Document:
    """Measure these parts, each with its own database and stand-ins. Raises BenchFailed."""
    document: Document = {}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="bench-") as name, running_providers() as providers:
            directory = Path(name)
            directory.chmod(0o711)  # PostgreSQL may run under an account of its own
            on_step(f"{part}: starting")
            document[part] = PARTS[part](directory, providers, scale, on_step)
    return document
