"""The command behind `scripts/hostile`."""

import argparse
import secrets
import sys

from rich.console import Console
from rich.table import Table

from tests.hostile.record import Record
from tests.hostile.run import CAMPAIGNS, Campaign, choose_campaigns, run_campaigns

_HEADINGS = ("campaign", "what", "answers", "slowest s", "peak MB", "violations")


def main() -> int:
    """Run what the arguments say. Return 1 if a campaign saw a violation."""
    parser = _build_parser()
    options = parser.parse_args()
    try:
        campaigns = choose_campaigns(options.campaign)
    except ValueError as problem:
        parser.error(str(problem))
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    records = _run(campaigns, console, quick=options.quick, seed=seed)
    console.print(_tabulate(records), markup=False)
    console.print(f"--seed {seed}")
    return 1 if any(record.violation_count for record in records) else 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/hostile",
        description="Attacks a service of its own with hostile input, more load than its database"
        " can take, and a database that is frozen. Exits with 1 if an answer is not as it should"
        " be, is late, or memory is not bounded. A full run takes a quarter of an hour.",
        epilog=f"Campaigns: {', '.join(campaign.name for campaign in CAMPAIGNS)}.",
    )
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    parser.add_argument("--seed", type=int, help="repeats the inputs of another run")
    parser.add_argument(
        "--campaign", action="append", default=[], metavar="NAME", help="only this; repeatable"
    )
    return parser


def _run(campaigns: list[Campaign], console: Console, *, quick: bool, seed: int) -> list[Record]:
    records = []
    for record in run_campaigns(campaigns, quick=quick, seed=seed):
        records.append(record)
        console.print(f"{record.name}: {record.violation_count or 'no'} violations", markup=False)
        for line in (*record.notes, *record.violations):
            console.print(f"  {line}", markup=False)
    return records


def _tabulate(records: list[Record]) -> Table:
    table = Table(*_HEADINGS[:3])
    for heading in _HEADINGS[3:]:
        table.add_column(heading, justify="right")
    for record in records:
        answers = ", ".join(f"{name}: {count:,}" for name, count in record.answers.most_common())
        table.add_row(
            record.name,
            record.amount,
            answers,
            f"{record.slowest:.2f}",
            f"{record.peak_memory_mb:.0f}",
            str(record.violation_count),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
