"""The figures of a run: as lines while it runs, and as a document."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.bench.cells import name_twin
from tests.bench.run import Measurement, Plan, Results

Document = dict[str, Any]


def describe(measurement: Measurement) -> Document:
    """Return the figures of one load, without comparisons."""
    cell, load = measurement.cell, measurement.load
    events_per_second = load.events / load.seconds
    return {
        "name": cell.name,
        "server": cell.server,
        "protocol": cell.protocol,
        "events_per_request": cell.events_per_request,
        "workers": cell.workers,
        "connections": cell.connections,
        "streams": cell.streams,
        "connections_per_worker": list(load.connections_per_worker),
        "seconds": load.seconds,
        "events_per_second": events_per_second,
        "requests_per_second": load.requests / load.seconds,
        "p50_ms": load.p50_ms,
        "p99_ms": load.p99_ms,
        "cpu_us_per_event": load.cpu_us_per_event,
        # Of one core; at 1.0 the load generator would be what is measured.
        "load_generator_busy": load.cpu_seconds["load_generator"] / load.seconds,
        "peak_memory_mb": measurement.peak_memory_mb,
        "later_memory_mb": measurement.later_memory_mb,
        "failures": dict(load.failures),
    }


def build_document(plan: Plan, results: Results) -> Document:
    """Return all figures of a run, what each is compared with, and where they were measured."""
    copy = statistics.median(results.copies)
    described = [describe(measurement) for measurement in results.measurements]
    speeds = {figures["name"]: figures["events_per_second"] for figures in described}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "postgresql": results.postgresql,
        "seconds": plan.seconds,
        "warm_up_seconds": plan.warm_up_seconds,
        "copy": {"rows_per_second": copy, "each_time": results.copies},
        "measurements": [_compare(figures, copy, speeds) for figures in described],
        "large_table": _compare_tables(plan, described),
    }


def _compare(figures: Document, copy: float, speeds: Mapping[str, float]) -> Document:
    speed, twin = figures["events_per_second"], speeds.get(name_twin(figures["name"]))
    return figures | {
        "ratio_to_copy": speed / copy,
        "ratio_to_baseline": speed / twin if twin else None,
    }


def _compare_tables(plan: Plan, described: Sequence[Document]) -> Document | None:
    speeds = {figures["name"]: figures["events_per_second"] for figures in described}
    if not plan.large_rows:
        return None
    ratio = speeds["large-table"] / speeds["empty-table"]
    return {"rows": plan.large_rows, "ratio_to_empty_table": ratio}


def describe_machine() -> Document:
    """Return what the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "processor": _read_processor(),
        "memory_mb": psutil.virtual_memory().total // 1_000_000,
        "system": f"{platform.system()} {platform.release()}",
    }


def _read_processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


HEADINGS = (
    *("load", "events/s", "requests/s", "p50 ms", "p99 ms"),
    *("service", "database", "sender", "busy", "MB", "COPY", "baseline"),
)
CAPTION = (
    "service, database, sender: CPU microseconds an event; the sender is the load generator. busy:"
    " how much of one core it used. MB: peak memory of a worker. COPY, baseline: speed divided by"
    " theirs."
)


def format_row(figures: Document) -> tuple[str, ...]:
    """Return a row of the table, without the comparisons that are not known yet."""
    cpu = figures["cpu_us_per_event"]
    failed = sum(figures["failures"].values())
    return (
        figures["name"] + (f" ({failed} failed)" if failed else ""),
        f"{figures['events_per_second']:,.0f}",
        f"{figures['requests_per_second']:,.0f}",
        f"{figures['p50_ms']:.1f}",
        f"{figures['p99_ms']:.1f}",
        *(f"{cpu[name]:.1f}" for name in ("service", "database", "load_generator")),
        f"{figures['load_generator_busy']:.0%}",
        f"{figures['peak_memory_mb']:.0f}",
        _format_ratio(figures.get("ratio_to_copy")),
        _format_ratio(figures.get("ratio_to_baseline")),
    )


def _format_ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def summarise(document: Document) -> list[str]:
    """Return what does not fit into the table, one sentence each."""
    copy = document["copy"]
    times = ", ".join(f"{speed:,.0f}" for speed in copy["each_time"])
    lines = [f"COPY alone: {copy['rows_per_second']:,.0f} rows/s (median of {times})."]
    for figures in document["measurements"]:
        if figures["later_memory_mb"] is not None:
            lines.append(
                f"Memory of a worker: {figures['peak_memory_mb']:.0f} MB under eight bodies of"
                f" 10 MB at once, {figures['later_memory_mb']:.0f} MB five seconds later."
            )
    if table := document["large_table"]:
        lines.append(
            f"On a table of {table['rows']:,} rows: {table['ratio_to_empty_table']:.2f} of the"
            " speed on an empty one."
        )
    return lines
