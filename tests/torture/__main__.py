"""The command behind `scripts/torture`."""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from rich.console import Console

from tests.support.choice import choose_matching
from tests.support.network import find_namespace_problem
from tests.support.services import ROOT
from tests.torture import (
    database_faults,
    forwarding_faults,
    neighbour_faults,
    pair_faults,
    provider_faults,
    service_faults,
)
from tests.torture.machine import find_mount_problem
from tests.torture.report import HEADINGS, format_record, format_row, join_row
from tests.torture.session import Plan, Tally, run
from tests.torture.trial import Fault

# As wide as the table, even if the output is a file.
_console = Console(width=200, highlight=False, soft_wrap=True)

FAULTS = (
    *service_faults.FAULTS,
    *database_faults.FAULTS,
    *neighbour_faults.FAULTS,
    *pair_faults.FAULTS,
    *provider_faults.FAULTS,
    *forwarding_faults.FAULTS,
)


def main() -> int:
    """Run what the arguments say. Return 0, or 1 if anything was found wrong."""
    parser = _build_parser()
    options = parser.parse_args()
    try:
        chosen = _leave_out_impossible(choose_faults(options.fault or ["*"]))
    except ValueError as problem:
        parser.error(str(problem))
    root = options.root.resolve()
    plan = Plan(
        chosen,
        rounds=options.rounds,
        root=root,
        seed=options.seed,
        logs=options.logs,
        is_quick=options.quick,
        is_hurried=options.quick or options.hurry,
    )
    tallies: list[Tally] = []

    def show(tally: Tally) -> None:
        tallies.append(tally)
        _console.print(join_row(format_row(tally)), markup=False)
        for text in tally.evidence:
            _console.print(f"  {text}", markup=False)
        for text in tally.violations:
            _console.print(f"  VIOLATION {text}", markup=False)

    # So that nothing stays behind: what runs and what is mounted goes with its contexts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _console.print(join_row(HEADINGS), markup=False)
    run(plan, show)
    if options.record:
        with options.record.open("a") as file:
            file.write(format_record(shlex.join(["scripts/torture", *sys.argv[1:]]), tallies))
    return int(any(tally.violations for tally in tallies))


def choose_faults(patterns: list[str]) -> list[Fault]:
    """Return the faults that match. Raises ValueError for a pattern that none does."""
    return choose_matching(FAULTS, patterns, "there is no fault {pattern}, but: {names}")


def _leave_out_impossible(faults: list[Fault]) -> list[Fault]:
    disk, network = find_mount_problem(), find_namespace_problem()
    possible = []
    for fault in faults:
        problem = (fault.setup.disk_megabytes and disk) or (fault.setup.has_network and network)
        if problem:
            _console.print(f"{fault.name} is skipped: {problem}", markup=False)
        else:
            possible.append(fault)
    return possible


def _build_parser() -> argparse.ArgumentParser:
    names = ", ".join(f"{fault.name} ({fault.rounds})" for fault in FAULTS)
    parser = argparse.ArgumentParser(
        prog="scripts/torture",
        description="Injects faults into a running service, its database and its providers, round"
        " after round, and checks after each that what was acknowledged is stored, once, and"
        " forwarded. It starts all it needs; several may run side by side.",
        epilog=f"Faults, with the rounds of each: {names}.",
    )
    parser.add_argument(
        "--fault",
        action="append",
        metavar="FAULT",
        help="only this fault, or those that match, such as 'database-*'; may be repeated",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each fault")
    parser.add_argument(
        "--quick", action="store_true", help="a few rounds of most faults, in four minutes"
    )
    parser.add_argument(
        "--hurry", action="store_true", help="do not wait for the leases of killed forwarders"
    )
    parser.add_argument("--seed", default="1", help="what is drawn is drawn from this (1)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("build/torture"),
        metavar="DIR",
        help="where to keep the logs of a fault that finds a violation (build/torture)",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="append the table to FILE, as Markdown"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
