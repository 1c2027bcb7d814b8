"""One run: the chosen campaigns, one after the other, against one service."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.hostile import bombs, drip, frozen, neighbours, overload, volume
from tests.hostile.record import Record
from tests.hostile.target import Target, running_target
from tests.support.services import ROOT

# Called with the target, the record to write to, how much to do, and the seed.
Attack = Callable[[Target, Record, "int", int], None]


class Campaign(NamedTuple):
    """An attack, and how much of it there is in a full run and in a quick one."""

    name: str
    attack: Callable[..., None]
    full: float
    quick: float
    unit: str


CAMPAIGNS: Sequence[Campaign] = (
    Campaign("bodies", volume.attack_bodies, 200_000, 2_000, "bodies"),
    Campaign("messages", volume.attack_messages, 50_000, 1_000, "messages"),
    Campaign("port", volume.attack_port, 20_000, 400, "streams"),
    Campaign("gzip", bombs.attack_gzip, 10, 1, "rounds"),
    Campaign("depth", bombs.attack_depth, 5, 1, "rounds"),
    Campaign("positions", bombs.attack_positions, 1_000, 7, "batches"),
    Campaign("memory", bombs.attack_memory, 2, 1, "rounds"),
    Campaign("drip", drip.attack_slowly, 3.0, 0.3, "s a window"),
    Campaign("idle", neighbours.attack_with_idle, 6_000, 300, "connections"),
    Campaign("unfinished", neighbours.attack_with_unfinished, 400, 40, "bodies"),
    Campaign("large", neighbours.attack_with_large, 5, 1, "rounds"),
    Campaign("dense", neighbours.attack_with_dense, 5, 1, "rounds"),
    Campaign("database", frozen.attack_database, 15.0, 5.0, "s"),
    Campaign("overload", overload.attack_with_load, 300.0, 5.0, "s"),
)


def choose_campaigns(names: Sequence[str]) -> list[Campaign]:
    """Return the campaigns of these names, or all. Raises ValueError for an unknown name."""
    known = [campaign.name for campaign in CAMPAIGNS]
    if unknown := set(names) - set(known):
        raise ValueError(f"no campaign {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [campaign for campaign in CAMPAIGNS if not names or campaign.name in names]


def run_campaigns(
    campaigns: Sequence[Campaign], *, quick: bool, seed: int, root: Path = ROOT
) -> Iterator[Record]:
    """Run them against the service of the code in `root`; yield what each saw when it ends."""
    with running_target(root) as target:
        for campaign in campaigns:
            yield _run(campaign, target, campaign.quick if quick else campaign.full, seed)


def _run(campaign: Campaign, target: Target, amount: float, seed: int) -> Record:
    record = Record(campaign.name, f"{amount:,.10g} {campaign.unit}")
    target.reset_peak_memory()
    campaign.attack(target, record, amount, seed)
    record.peak_memory_mb = max(record.peak_memory_mb, target.read_peak_memory())
    if problem := target.find_problem():
        record.violate(problem)
    return record
