"""scripts/hostile: the service stands it, and what would not is caught."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.hostile.bodies import BodyGrammar
from tests.hostile.messages import MessageGrammar
from tests.hostile.record import Record
from tests.hostile.run import CAMPAIGNS, choose_campaigns, run_campaigns
from tests.hostile.streams import StreamGrammar
from tests.support.projects import Project
from tests.support.services import ROOT, break_build, run_program

PROJECTS = Project("proj_1", "key_1"), Project("proj_2", "key_2")
GRAMMARS: list[Callable[[int], Callable[[], object]]] = [
    lambda seed: BodyGrammar(Random(seed), 0, *PROJECTS),
    lambda seed: MessageGrammar(Random(seed), 0, *PROJECTS),
    lambda seed: StreamGrammar(Random(seed)),
]
# A file of the service, a line of it, and what the line is in a build that has to be caught.
SABOTAGE = {
    "one fault in a hundred": (
        "server/http/api.py",
        "        return PendingRequest(self._recorder.begin(",
        '        assert __import__("time").time_ns() // 1000 % 100\n'
        "        return PendingRequest(self._recorder.begin(",
    ),
    "a neighbour rejected": (
        "server/events/json_codec.py",
        "            row = quick.read(item, project_id, special)\n",
        '            if index and "event_id" not in received.items[index - 1]:\n'
        "                yield MalformedEvent(Event(), 0, NOT_AN_EVENT)\n"
        "                continue\n"
        "            row = quick.read(item, project_id, special)\n",
    ),
    "not stored": (
        "server/storage/events.py",
        'cursor.execute(more + b"COMMIT")',
        'cursor.execute(b"ROLLBACK" if len(stored) == 3 else more + b"COMMIT")',
    ),
}


@pytest.fixture(scope="module")
def finished() -> "subprocess.CompletedProcess[str]":
    """Run all that is not about time, quickly, and return what it found."""
    chosen = ["bodies", "messages", "port", "gzip", "depth", "positions", "database", "overload"]
    chosen += ["idle", "unfinished", "dense"]
    words = ("--quick", "--seed=7", *(f"--campaign={name}" for name in chosen))
    return run_program("tests.hostile", *words, timeout=900)


@pytest.mark.slow
def test_hostile_input_finds_no_violation(finished: "subprocess.CompletedProcess[str]") -> None:
    """A quick run finds no violation, and exits with 0."""
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "--seed 7" in finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGE)
def test_hostile_campaigns_catch_a_broken_build(name: str, tmp_path: Path) -> None:
    """A service with one line broken does not pass."""
    break_build(tmp_path, *SABOTAGE[name])
    [record] = run_campaigns(choose_campaigns(["bodies"]), quick=True, seed=1, root=tmp_path)
    assert record.violation_count > 0


def test_each_sabotage_finds_its_line() -> None:
    """What a broken build changes stands in its file once."""
    places = {
        name: (ROOT / file).read_text().count(right) for name, (file, right, _) in SABOTAGE.items()
    }
    assert places == dict.fromkeys(SABOTAGE, 1)


def test_an_answer_after_five_seconds_is_a_violation() -> None:
    """No answer may take more than five seconds."""
    record = Record("bodies", "2 bodies")
    record.add(202, 4.9)
    assert record.violation_count == 0
    record.add(202, 5.1)
    assert record.violation_count == 1


@pytest.mark.parametrize("make_grammar", GRAMMARS, ids=["bodies", "messages", "streams"])
def test_a_seed_repeats_the_hostile_inputs(
    make_grammar: Callable[[int], Callable[[], object]],
) -> None:
    """The same seed gives the same inputs, another one others."""
    first, again, other = make_grammar(1), make_grammar(1), make_grammar(2)
    inputs = [first() for _ in range(50)]
    assert inputs == [again() for _ in range(50)]
    assert inputs != [other() for _ in range(50)]


def test_an_unknown_campaign_is_answered_with_known_ones() -> None:
    """A misspelt name is answered with those there are."""
    with pytest.raises(ValueError, match="bodies"):
        choose_campaigns(["bodys"])
    assert choose_campaigns([]) == list(CAMPAIGNS)
