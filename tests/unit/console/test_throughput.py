"""The console's memory of how many events came, and when."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.console.throughput import PERIOD_SECONDS, STEP_SECONDS, Throughput, Totals

STEPS = PERIOD_SECONDS // STEP_SECONDS


class Scene:
    """A service whose time and totals are the test's."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.totals = Totals(0, 0, 0)
        self.throughput = Throughput(lambda: self.totals, lambda: self.now)

    def take(self, stored: int) -> None:
        """Store events."""
        self.totals = self.totals._replace(stored=self.totals.stored + stored)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the steps that end be noted."""
        self.now += seconds
        self.throughput.note()

    def read(self) -> Any:
        """Return the numbers of stored events, step by step."""
        return self.throughput.describe()["stored"]


def test_each_event_counts_in_its_step() -> None:
    """Events are counted in the step in which they came, also in one that has not ended."""
    scene = Scene()
    scene.take(3)
    assert scene.read() == [3]
    scene.pass_time(STEP_SECONDS)
    scene.take(2)
    assert scene.read() == [3, 2]
    scene.pass_time(STEP_SECONDS)
    assert scene.read() == [3, 2, 0]


def test_a_process_that_stood_still_shows_a_gap() -> None:
    """Steps that nobody noted are empty, and what came meanwhile is in the last of them."""
    scene = Scene()
    scene.take(3)
    scene.pass_time(STEP_SECONDS)
    scene.take(4)
    scene.pass_time(3 * STEP_SECONDS)
    assert scene.read() == [3, 0, 0, 4, 0]


@pytest.mark.parametrize("seconds", [PERIOD_SECONDS * 3, 10.0**9])
def test_throughput_forgets_what_is_older_than_its_period(seconds: float) -> None:
    """After any time there is one period, and nothing of what came before it."""
    scene = Scene()
    scene.take(5)
    scene.pass_time(STEP_SECONDS)
    scene.pass_time(seconds)
    assert scene.read() == [0] * STEPS


@given(moves=st.lists(st.tuples(st.integers(0, 50), st.floats(0.0, 30.0)), max_size=40))
def test_no_event_is_lost_from_the_plot(moves: list[tuple[int, float]]) -> None:
    """Within a period, the steps add up to all that was counted."""
    scene = Scene()
    for stored, seconds in moves[:25]:
        scene.take(stored)
        scene.pass_time(seconds)
    steps = scene.read()
    assert sum(steps) == scene.totals.stored
    assert len(steps) == int(scene.now) // STEP_SECONDS - 1000 // STEP_SECONDS + 1
