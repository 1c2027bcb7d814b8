"""The way from bytes to row stays short."""

import platform
import shutil

import pytest

from server.protocols import GRPC
from tests.bench.instructions import count_instructions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    # Each version takes another number: the bound is one for the version that it was measured on.
    pytest.mark.skipif(
        platform.python_version_tuple()[:2] != ("3", "11"), reason="counted on Python 3.11"
    ),
]


def test_an_event_takes_few_instructions_from_bytes_to_row() -> None:
    """An event of a batch of 1,000 is read into its row in 90,000 instructions at most."""
    assert count_instructions("usual") < 90_000


def test_a_protobuf_event_takes_few_instructions_too() -> None:
    """An event of a batch of 1,000 over gRPC is read into its row in 125,000 at most."""
    assert count_instructions("usual", GRPC) < 125_000


def test_dirt_in_events_costs_two_fifths_at_most() -> None:
    """An event with nulls, unnamed fields and escapes takes 1.4 times as many as one without."""
    assert count_instructions("dirty") < 1.4 * count_instructions("usual")
