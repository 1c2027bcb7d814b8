"""The table of a run."""

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

from tests.torture.session import Tally

HEADINGS = (
    *("fault", "rounds", "sent", "acknowledged", "lost", "duplicated"),
    *("recovery median", "max"),
)
_WIDTHS = (22, 7, 9, 13, 6, 11, 16, 9)


def format_row(tally: Tally) -> tuple[str, ...]:
    """Return the cells of a line."""
    seconds = tally.recoveries
    return (
        tally.name,
        str(tally.rounds),
        f"{tally.sent:,}",
        f"{tally.acknowledged:,}",
        str(tally.lost),
        str(tally.duplicated),
        f"{statistics.median(seconds):.2f} s" if seconds else "-",
        f"{max(seconds):.2f} s" if seconds else "-",
    )


def join_row(cells: Sequence[str]) -> str:
    """Return a line for a terminal."""
    first, *others = zip(cells, _WIDTHS, strict=True)
    return f"{first[0]:{first[1]}}" + "".join(f"{text:>{width}}" for text, width in others)


def format_record(command: str, tallies: Sequence[Tally]) -> str:
    """Return the whole run in Markdown, with the day and the command."""
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *map(format_row, tallies)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    found = [f"* {tally.name}, {text}" for tally in tallies for text in tally.violations]
    violations = "\n".join(found) if found else "No violation."
    shown = "".join(f"* {tally.name}, {text}\n" for tally in tallies for text in tally.evidence)
    evidence = f"\n\n{shown.rstrip()}" if shown else ""
    return f"{datetime.now(UTC):%Y-%m-%d}, `{command}`:\n\n{table}\n\n{violations}{evidence}\n\n"
