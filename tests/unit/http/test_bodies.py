"""What is held of bodies on their way is bounded, at the cost of who holds most."""

from dataclasses import dataclass, field

import pytest

from server.errors import Unavailable
from server.http.bodies import BodyBudget, DroppedBody


@dataclass(eq=False)
class Upload:
    """A request whose body arrives."""

    key: str
    headers: dict[str, str] = field(default_factory=dict)
    completed: bool = False
    held_bytes: int = 0
    budget: BodyBudget | None = None
    refusal: BaseException | None = None

    def __post_init__(self) -> None:
        self.headers["X_PG_API_KEY"] = self.key

    def refuse_body(self, error: BaseException) -> None:
        """Remember the refusal."""
        self.refusal = error


@pytest.fixture
def budget() -> BodyBudget:
    """Return a budget of 100 bytes."""
    return BodyBudget(100)


def test_the_sender_that_holds_most_is_refused(budget: BodyBudget) -> None:
    """Over the budget, the oldest unfinished request of the greediest sender is refused."""
    small, *greedy = Upload("small"), Upload("greedy"), Upload("greedy"), Upload("greedy")
    budget.note(small, 30)
    for upload in greedy:
        budget.note(upload, 20)
    assert [upload.refusal for upload in (small, *greedy)] == [None] * 4
    budget.note(small, 45)
    assert isinstance(greedy[0].refusal, Unavailable)
    assert [upload.refusal for upload in (small, *greedy[1:])] == [None] * 3


def test_finished_bodies_count_and_are_kept(budget: BodyBudget) -> None:
    """What has arrived in full is not refused any more, but leaves others less room."""
    finished, late = Upload("a", completed=True), Upload("b")
    budget.note(finished, 90)
    budget.note(late, 20)
    assert finished.refusal is None
    assert isinstance(late.refusal, Unavailable)


def test_released_bodies_make_room(budget: BodyBudget) -> None:
    """What is released does not count any more, however often it is."""
    for _ in range(10):
        upload = Upload("a")
        budget.note(upload, 60)
        budget.note(upload, 90)
        budget.release(upload)
        budget.release(upload)
        assert (upload.refusal, upload.held_bytes) == (None, 0)


def test_a_dropped_body_is_counted_and_not_kept() -> None:
    """Of a dropped body only the length is known."""
    body = DroppedBody(3)
    body.append(b"1234")
    assert (len(body), body.getfile().read()) == (7, b"")
