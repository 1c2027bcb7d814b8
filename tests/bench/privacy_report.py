"""What `scripts/bench --privacy` prints and writes."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.bench.privacy import run_privacy
from tests.bench.report import Document

_HEADINGS = (
    "",
    "load",
    "events/s without",
    "with",
    "speed",
    "CPU us without",
    "with",
    "MB",
    "with",
)


def report_privacy(parts: Sequence[str], scale: float, directory: Path, console: Console) -> None:
    """Measure these parts, print the results, and write privacy.json."""
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    # Seldom refreshed, because refreshing takes time from the same cores.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as progress:
        task = progress.add_task("", total=None)
        document = run_privacy(parts, scale, lambda step: progress.update(task, description=step))
    console.print(_tabulate(document))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "privacy.json").write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"Written: {directory / 'privacy.json'}")


def _tabulate(document: Document) -> Table:
    table = Table(*_HEADINGS[:2], title="One worker, medians; CPU of the service for each event")
    for heading in _HEADINGS[2:]:
        table.add_column(heading, justify="right")
    for change, loads in document.items():
        for load, figures in loads.items():
            before, after = figures["without"], figures["with"]
            table.add_row(
                change,
                load,
                *(f"{each['events_per_second']:,.0f}" for each in (before, after)),
                f"{figures['speed_ratio']:.2f}",
                *(f"{each['cpu_us_per_event']:.1f}" for each in (before, after)),
                *(f"{each['peak_memory_mb']:.0f}" for each in (before, after)),
            )
    return table
