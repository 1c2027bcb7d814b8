"""What of a provider's answer may be shown: answers echo credentials and events."""

import re
from collections.abc import Iterable, Sequence

import orjson

_SHOWN_CHARACTERS = 200
# Read before anything is hidden, which makes a text shorter.
_READ_CHARACTERS = 600
_READ_BYTES = 65_536
# So many characters in a row that a request has too are taken for an echo.
_ECHO_CHARACTERS = 8
_WORD_BYTES = 4
_HIDDEN = "…"
_FIELD_NAME = re.compile(rb'"[$a-z_]{1,32}":')


def quote_answer(body: bytes, payloads: Sequence[bytes], secrets: Iterable[str]) -> str:
    """Return the begin of an answer on one line, without credentials and without the request."""
    return _hide(_read_body(body)[:_READ_CHARACTERS], b"\n".join(payloads), secrets)


def quote_reason(reason: str, payloads: Sequence[bytes], secrets: Iterable[str]) -> str:
    """Return the begin of a reason in the same way, except that names of fields are shown."""
    return _hide(reason, _FIELD_NAME.sub(b"", b"\n".join(payloads)), secrets)


def _hide(text: str, request: bytes, secrets: Iterable[str]) -> str:
    shown = _replace_echoes(hide_secrets(text, secrets), request)
    return "".join(map(_escape, shown))[:_SHOWN_CHARACTERS]


def hide_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return a text without credentials, in upper or lower case."""
    for secret in filter(None, secrets):
        text = re.sub(re.escape(secret), _HIDDEN, text, flags=re.IGNORECASE)
    return text


def _read_body(body: bytes) -> str:
    """Return a body as text; JSON with the escapes that our own requests have."""
    text = body[:_READ_BYTES].decode(errors="replace")
    try:
        return orjson.dumps(orjson.loads(text)).decode()
    except (orjson.JSONDecodeError, TypeError):
        return text


def _replace_echoes(text: str, request: bytes) -> str:
    pieces = [text[at : at + _ECHO_CHARACTERS].encode() for at in range(len(text))]
    words = _find_words(pieces, request)
    is_echo = [False] * len(text)
    for at in range(len(text) - _ECHO_CHARACTERS + 1):
        if _has_word(pieces[at], words) and pieces[at] in request:
            is_echo[at : at + _ECHO_CHARACTERS] = [True] * _ECHO_CHARACTERS
    return "".join(
        _HIDDEN if echoed and not (at and is_echo[at - 1]) else "" if echoed else text[at]
        for at, echoed in enumerate(is_echo)
    )


def _find_words(pieces: Sequence[bytes], request: bytes) -> set[int]:
    """Return the machine words of the pieces that the request has at an aligned place.

    A piece that the request holds covers such a word. Most pieces are ruled out by this one pass,
    instead of a search through megabytes for each.
    """
    words = {word for piece in pieces for word in _words_of(piece)}
    whole = len(request) // _WORD_BYTES * _WORD_BYTES
    return words.intersection(memoryview(request)[:whole].cast("I"))


def _words_of(piece: bytes) -> list[int]:
    starts = range(len(piece) - _WORD_BYTES + 1)
    return [memoryview(piece[at : at + _WORD_BYTES]).cast("I")[0] for at in starts]


def _has_word(piece: bytes, words: set[int]) -> bool:
    return any(word in words for word in _words_of(piece))


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
