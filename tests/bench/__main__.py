"""The command behind `scripts/bench`."""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import psycopg2
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from server.storage.errors import DatabaseError
from tests.bench import cells, forwarding, privacy, scale
from tests.bench.chart import draw_chart
from tests.bench.forwarding_report import report_forwarding
from tests.bench.privacy_report import report_privacy
from tests.bench.report import (
    CAPTION,
    HEADINGS,
    Document,
    build_document,
    describe,
    format_row,
    summarise,
)
from tests.bench.run import BenchFailed, Measurement, Plan, Results, run_bench
from tests.bench.scale import QUICK, ScalePlan, Sizes
from tests.bench.scale_report import report_scale

_COPIES = 4
_LARGE_ROWS = 10_000_000
_WIDTHS = (16, *[11] * 2, *[9] * 9)


def main() -> int:
    """Measure what the arguments say. Return the exit code."""
    parser = _build_parser()
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    try:
        if options.forwarding is not None:
            parts = _choose_parts(options.forwarding, forwarding.PARTS)
            report_forwarding(parts, options.share, options.output, console)
        elif options.privacy is not None:
            parts = _choose_parts(options.privacy, privacy.PARTS)
            report_privacy(parts, options.share, options.output, console)
        elif options.scale is not None:
            parts = _choose_parts(options.scale, scale.PARTS)
            prices = (options.vcpu_price, options.disk_price)
            report_scale(parts, _make_scale_plan(options), prices, options.output, console)
        else:
            _measure_loads(_make_plan(options), options.output, console)
    except ValueError as problem:
        parser.error(str(problem))
    except (BenchFailed, DatabaseError, psycopg2.Error) as failure:
        console.print(f"bench: {failure}", markup=False)
        return 1
    return 0


def _choose_parts(names: Sequence[str], parts: Collection[str]) -> list[str]:
    """Return the parts of these names, or all. Raises ValueError for an unknown name."""
    if unknown := set(names) - set(parts):
        raise ValueError(f"nothing is called {sorted(unknown)}; there are {', '.join(parts)}")
    return [part for part in parts if part in names or not names]


def _measure_loads(plan: Plan, directory: Path, console: Console) -> None:
    document = build_document(plan, _run(plan, console))
    _show(document, console)
    _write(document, directory, console)


def _build_parser() -> argparse.ArgumentParser:
    names = ", ".join(cell.name for cell in cells.ALL)
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures how fast the service stores events, beside PostgreSQL's own COPY and"
        " a straightforward program. It starts everything it needs; leave the machine alone.",
        epilog=f"Loads: {names}.",
    )
    parser.add_argument("--quick", action="store_true", help="a few loads, in about a minute")
    parser.add_argument(
        "--only",
        action="append",
        metavar="LOAD",
        help="measure only this load, or those that match, such as 'http-*-2'; may be repeated",
    )
    parser.add_argument("--seconds", type=float, help="how long each load is measured (4)")
    parser.add_argument(
        "--large",
        action="store_true",
        help=f"also on a table of {_LARGE_ROWS:,} rows; takes two minutes and 20 GB of disk",
    )
    parser.add_argument(
        "--forwarding",
        nargs="*",
        metavar="PART",
        help="what forwarding costs instead, in ten minutes, or a part of it:"
        f" {', '.join(forwarding.PARTS)}",
    )
    parser.add_argument(
        "--privacy",
        nargs="*",
        metavar="PART",
        help="what blocked persons and redaction cost instead, in four minutes, or a part of it:"
        f" {', '.join(privacy.PARTS)}",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="with --forwarding or --privacy: 0.1 for a tenth of the events and of the time (1)",
    )
    _add_scale_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/bench"),
        metavar="DIR",
        help="where the files go (build/bench)",
    )
    return parser


def _add_scale_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("growth")
    group.add_argument(
        "--scale",
        nargs="*",
        metavar="PART",
        help="how speed changes with size instead, in 20 minutes (--quick: two), or a part of it:"
        f" {', '.join(scale.PARTS)}",
    )
    group.add_argument(
        "--table-minutes",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="how long the table is filled at most (10)",
    )
    group.add_argument(
        "--database-url",
        metavar="URL",
        help="measure on this database of this machine, such as a coordinator of Citus, which must"
        " have no events; without the part `table`",
    )
    group.add_argument(
        "--vcpu-price", type=float, default=0.04, help="of a vCPU-hour (0.04, an example)"
    )
    group.add_argument(
        "--disk-price", type=float, default=0.1, help="of a GiB for a month (0.1, an example)"
    )


def _make_scale_plan(options: argparse.Namespace) -> ScalePlan:
    sizes = QUICK if options.quick else Sizes()
    seconds = options.seconds or (0.4 if options.quick else 4.0)
    return ScalePlan(sizes, seconds, options.database_url, options.table_minutes)


def _make_plan(options: argparse.Namespace) -> Plan:
    seconds = options.seconds or (2.0 if options.quick else 4.0)
    if seconds <= 0:
        raise ValueError("--seconds must be more than 0")
    patterns = options.only or (cells.QUICK if options.quick else ["*"])
    chosen = cells.choose_cells(patterns)
    return Plan(chosen, seconds, seconds / 4, _LARGE_ROWS if options.large else 0)


def _run(plan: Plan, console: Console) -> Results:
    steps = len(plan.cells) + _COPIES + (2 if plan.large_rows else 0)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Seldom refreshed, because refreshing takes time from the same cores.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as progress:
        task = progress.add_task("", total=steps)

        def show_step(step: str) -> None:
            progress.update(task, description=step)

        def show_measured(measurement: Measurement) -> None:
            progress.advance(task)
            console.print(_join(format_row(describe(measurement))))

        console.print(_join(HEADINGS[:-2]))
        return run_bench(plan, show_step, show_measured)


def _join(texts: tuple[str, ...]) -> str:
    first, *others = zip(texts, _WIDTHS, strict=False)
    return f"{first[0]:{first[1]}}" + "".join(f"{text:>{width}}" for text, width in others)


def _show(document: Document, console: Console) -> None:
    table = Table(*HEADINGS[:1], caption=CAPTION)
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for figures in document["measurements"]:
        table.add_row(*format_row(figures))
    console.print(table)
    for line in summarise(document):
        console.print(line)


def _write(document: Document, directory: Path, console: Console) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.json").write_text(json.dumps(document, indent=2) + "\n")
    (directory / "bench.svg").write_text(draw_chart(document))
    console.print(f"Written: {directory / 'bench.json'}, {directory / 'bench.svg'}")


if __name__ == "__main__":
    sys.exit(main())
