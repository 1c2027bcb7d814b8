"""What `scripts/bench --forwarding` prints and writes."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.bench.forwarding import run_forwarding
from tests.bench.report import Document


def report_forwarding(
    parts: Sequence[str], scale: float, directory: Path, console: Console
) -> None:
    """Measure these parts, print the results, and write forwarding.json."""
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    # Seldom refreshed, because refreshing takes time from the same cores.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as progress:
        task = progress.add_task("", total=None)
        document = run_forwarding(
            parts, scale, lambda step: progress.update(task, description=step)
        )
    for part, figures in document.items():
        _SHOW[part](figures, console)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "forwarding.json").write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"Written: {directory / 'forwarding.json'}")


def _make_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(headings[0], title=title)
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _show_cost(figures: Document, console: Console) -> None:
    for batch, compared in figures["workloads"].items():
        console.print(_tabulate_rounds(batch, compared))
    _show_delivery(figures, console)


def _tabulate_rounds(batch: str, figures: Document) -> Table:
    names = ("off", "away", "on")
    headings = ("round", *(f"{name} {share}" for name in names for share in ("p50", "p99")))
    load = f"{figures['requests_per_second']:.0f} requests/s of {batch} events"
    title = f"Ingestion with analytics off, on with forwarders away, and on: {load}, ms"
    table = _make_table(title, headings)
    for number, each in enumerate(figures["rounds"], 1):
        values = (each[name][share] for name in names for share in ("p50_ms", "p99_ms"))
        table.add_row(str(number), *(f"{value:.2f}" for value in values))
    shares = (figures["p50_ratios"], figures["p99_ratios"])
    ratios = (share[name] for name in names[1:] for share in shares)
    table.add_row("x off", "", "", *(f"{ratio:.2f}" for ratio in ratios))
    return table


def _show_hang(figures: Document, console: Console) -> None:
    headings = ("", "p50", "p99", "lag p50", "lag p99")
    title = f"Ingestion, and the lag of {figures['other']} while {figures['hung']} hangs, ms"
    table = _make_table(title, headings)
    for name in ("before", "during"):
        each = figures[name]
        values = (each["p50_ms"], each["p99_ms"], each["lag_p50_ms"], each["lag_p99_ms"])
        table.add_row(name, *(f"{value:.2f}" for value in values))
    console.print(table)
    pending = figures["pending_after_the_hang"][figures["hung"]]
    seconds = figures["drained_seconds"]
    console.print(f"{pending:,} pending after the hang, none {seconds:.0f} s later")
    _show_delivery(figures, console)


def _show_delivery(figures: Document, console: Console) -> None:
    arrived = ", ".join(f"{count:,} at {name}" for name, count in figures["arrived"].items())
    console.print(f"{figures['acknowledged']:,} events acknowledged; {arrived}")
    for moment, lines in figures["status"].items():
        console.print(f"productgraph forward status, {moment}:")
        for line in lines:
            console.print(f"  {line}", markup=False)


def _show_backlog(figures: Document, console: Console) -> None:
    for line in _describe_backlog(figures):
        console.print(line)


def _describe_backlog(figures: Document) -> Iterator[str]:
    yield f"A backlog of {figures['backlog_events']:,} events:"
    for name, speeds in figures["events_per_second"].items():
        each = ", ".join(f"{speed:,.0f}" for speed in speeds)
        yield f"  ingestion {name} it: {median(speeds):,.0f} events/s ({each})"
    for rows, milliseconds in figures["claim_ms"].items():
        yield f"  a claim with {int(rows):,} deliveries pending: {milliseconds:.2f} ms"
    drain = figures["drain"]
    yield f"  a forwarder drains {drain['events_per_second']:,.0f} events/s, both providers added"
    for name in ("without_forwarder", "with_forwarder"):
        each = drain[name]
        words = name.replace("_", " ")
        yield f"  ingestion {words}: p50 {each['p50_ms']:.2f} ms, p99 {each['p99_ms']:.2f} ms"


_SHOW: dict[str, Callable[[Document, Console], None]] = {
    "cost": _show_cost,
    "hang": _show_hang,
    "backlog": _show_backlog,
}
