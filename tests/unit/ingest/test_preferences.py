"""What a client asks for beyond its request."""

import pytest

from server.ingest.preferences import is_strict


@pytest.mark.parametrize(
    "prefer",
    [
        "handling=strict",
        "Handling = STRICT",
        'handling="strict"',
        "respond-async, handling=strict; why=tests",
        'note="a, handling=lenient", wait=10,handling=strict',
        "handling=strict, handling=lenient",
        ",, handling=strict",
    ],
)
def test_strict_handling_is_found_among_preferences(prefer: str) -> None:
    """The preference counts in every form that RFC 7240 has for it."""
    assert is_strict(prefer)


@pytest.mark.parametrize(
    "prefer",
    [
        None,
        "",
        "handling",
        "handling=lenient",
        "handling=lenient, handling=strict",
        "strict",
        "x-handling=strict",
        'note="handling=strict"',
        'note="a, handling=strict"',
        'note="a\\", handling=strict',
        "wait=10; handling=strict",
    ],
)
def test_other_preferences_are_not_strict_handling(prefer: str | None) -> None:
    """What only looks like the preference does not count."""
    assert not is_strict(prefer)
