"""The way from bytes to row stays short."""

import platform
import shutil

import pytest

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
