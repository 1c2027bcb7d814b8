"""What a client asks for beyond its request: RFC 7240, over both protocols."""

import re

# What a strict batch is answered with, by the name of the header in RFC 7240.
STRICT_APPLIED = "handling=strict"
# One preference of a list: its commas may stand in quoted strings, too.
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*(?:"|$))+')


def is_strict(prefer: str | None) -> bool:
    """Return whether a list of preferences asks to store all events of a batch or none.

    If a preference is there more than once, the first counts.
    """
    preferences: list[str] = _PREFERENCE.findall(prefer or "")
    for preference in preferences:
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "handling":
            return value.strip().strip('"').lower() == "strict"
    return False
