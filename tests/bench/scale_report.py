"""What `scripts/bench --scale` prints and writes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from tests.bench.chart import Panel, draw_panels
from tests.bench.growth_model import Inputs, calculate_need
from tests.bench.report import Document
from tests.bench.scale import ScalePlan, run_scale

_EVENTS_A_DAY = (1_000_000_000, 10_000_000_000, 100_000_000_000)
_HEADINGS = (
    *("part", "load", "events/s", "p50 ms", "p99 ms", "CPU µs service", "CPU µs PostgreSQL"),
    *("CPU µs sender", "MB", "failed", "remarks"),
)
_NEEDS = {
    "events a day": "{events_a_day:,}",
    "cores of the service": "{service_cores:,.1f}",
    "cores of PostgreSQL": "{database_cores:,.1f}",
    "vCPU-hours a day": "{vcpu_hours_a_day:,.0f}",
    "their cost a day": "{vcpu_cost_a_day:,.1f}",
    "GiB of disk a day": "{gib_a_day:,.0f}",
    "cost of 30 days of events on disk, a month": "{disk_cost_a_month:,.0f}",
}


def report_scale(
    parts: Sequence[str],
    plan: ScalePlan,
    prices: tuple[float, float],
    directory: Path,
    console: Console,
) -> None:
    """Measure these parts, print each load, the table and the model, and write three files."""
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    # Seldom refreshed, because refreshing takes time from the same cores.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show_step(step: str) -> None:
            progress.update(task, description=step)

        def show_measured(figures: Document) -> None:
            console.print(" | ".join(_format_load("", figures)[1:-1]), markup=False)

        document = run_scale(parts, plan, show_step, show_measured)
    document["model"] = _make_model(document, prices)
    text = "\n".join(_write_tables(document)) + "\n"
    console.print(text, markup=False, soft_wrap=True)
    directory.mkdir(parents=True, exist_ok=True)
    contents = {"json": json.dumps(document, indent=2), "md": text, "svg": _draw_scale(document)}
    for suffix, content in contents.items():
        path = directory / f"scale.{suffix}"
        path.write_text(content)
        console.print(f"Written: {path}")


def _make_model(document: Document, prices: tuple[float, float]) -> Document | None:
    """Return what a model makes of the largest table's figures, if one was measured."""
    *_, figures = document["parts"].get("table") or [None]
    if figures is None:
        return None
    cpu, size = figures["cpu_us_per_event"], figures["table_bytes"] / figures["table_rows"]
    inputs = Inputs(cpu["service"], cpu["database"], size, *prices)
    needs = [asdict(calculate_need(inputs, count)) for count in _EVENTS_A_DAY]
    return {"inputs": asdict(inputs), "needs": needs}


def _write_tables(document: Document) -> list[str]:
    """Return the lines of the tables, as Markdown."""
    place = "distributed over " if document["distributed"] else ""
    nodes = f"{document['nodes']} node{'s' if document['nodes'] > 1 else ''}"
    machine = document["machine"]
    lines = [
        f"PostgreSQL {document['postgresql']}, {place}{nodes}; {machine['cores']} cores for all"
        f" parts ({machine['processor']}), {document['date'][:10]}.",
        "",
        *_start_table(_HEADINGS),
    ]
    for part, loads in document["parts"].items():
        lines += [_join(_format_load(part, figures)) for figures in loads]
    if document["model"]:
        lines += ["", *_write_model(**document["model"])]
    return lines


def _write_model(inputs: Document, needs: Sequence[Document]) -> list[str]:
    return [
        f"A model, not measured. Its inputs: {inputs['service_us']:.1f} µs of CPU an event in the"
        f" service, {inputs['database_us']:.1f} in PostgreSQL, {inputs['bytes_per_event']:.0f}"
        f" bytes a row; the busiest second has {inputs['peak']:g} times the mean, and cores are"
        f" {inputs['busy']:.0%} busy then; example prices, {inputs['vcpu_price']:g} for a vCPU-hour"
        f" and {inputs['disk_price']:g} for a GiB of disk a month.",
        "",
        *_start_table(list(_NEEDS)),
        *(_join([form.format(**need) for form in _NEEDS.values()]) for need in needs),
    ]


def _start_table(headings: Sequence[str]) -> list[str]:
    return [_join(headings), "|" + "---|" * len(headings)]


def _join(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _format_load(part: str, figures: Document) -> tuple[str, ...]:
    cpu = figures["cpu_us_per_event"]
    return (
        part,
        figures["name"],
        f"{figures['events_per_second']:,.0f}",
        *(f"{figures[name]:.1f}" for name in ("p50_ms", "p99_ms")),
        *(f"{cpu[name]:.1f}" for name in ("service", "database", "load_generator")),
        f"{figures['memory_mb']:.0f}",
        f"{sum(figures['failures'].values())}",
        _remark(figures),
    )


def _remark(figures: Document) -> str:
    if "table_rows" in figures:
        size = figures["table_bytes"]
        each = size / figures["table_rows"]
        return f"{size / 2**30:.2f} GiB, {each:.0f} bytes a row; {figures['end']}"
    if "idle" in figures:
        return f"{figures['idle_open']:,} of {figures['idle']:,} idle ones open at the end"
    return ""


def _draw_scale(document: Document) -> str:
    """Draw speed and CPU time of every load, those of a part beside each other."""
    panels: list[Panel] = []
    for part, loads in document["parts"].items():
        if not loads:
            continue
        speeds = [(load["name"], load["events_per_second"], "http") for load in loads]
        costs = [(load["name"], _add_cpu(load), "other") for load in loads]
        panels += [(f"{part}: events/s", speeds), (f"{part}: CPU µs an event", costs)]
    return draw_panels("What changes with size", document, panels)


def _add_cpu(figures: Document) -> float:
    cpu = figures["cpu_us_per_event"]
    return float(cpu["service"] + cpu["database"])
