"""What the texts of settings mean. Each function raises ValueError for a text that is unusable."""

import re
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from psycopg2 import ProgrammingError
from psycopg2.extensions import parse_dsn

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PASSWORD_LENGTH = 12
_SECRET_LENGTH = 32
# What can become of a field that is redacted.
DROP, HASH, NO_QUERY = "drop", "hash", "no-query"
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?", re.ASCII
)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
# Of an address of a database in keywords, what may be shown.
_PLACE = ("service", "host", "hostaddr", "port", "dbname", "target_session_attrs")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError(f"must be a whole number from {low} to {high}, is {text!r}")
        return int(text)

    return parse


def parse_path(text: str) -> Path:
    """Return an absolute path; `~` is the home directory."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:  # neither HOME nor an account tells what ~ is
        raise ValueError(f"has a home directory that is unknown, is {text!r}") from None


def parse_optional_port(text: str) -> int | None:
    """Return a port, or None for off."""
    if text.lower() in ("off", "false", "no"):  # not 0, which is any free port
        return None
    try:
        return whole_number(0, 65535)(text)
    except ValueError:
        raise ValueError(f"must be off or a whole number from 0 to 65535, is {text!r}") from None


def parse_seconds(text: str) -> float:
    """Return a number of seconds from 1 to 60."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds <= 60.0:
        raise ValueError(f"must be a number of seconds from 1 to 60, is {text!r}")
    return seconds


def parse_flag(text: str) -> bool:
    """Return whether a flag is on."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(f"must be true or false, is {text!r}")


def parse_console(text: str) -> bool | None:
    """Return whether the console is on, or None for auto."""
    if text.lower() == "auto":
        return None
    try:
        return parse_flag(text)
    except ValueError:
        raise ValueError(f"must be auto, on or off, is {text!r}") from None


def parse_password(text: str) -> str | None:
    """Return a password, or None for none. The text is never shown."""
    if text and len(text) < _PASSWORD_LENGTH:
        raise ValueError(f"must have at least {_PASSWORD_LENGTH} characters")
    return text or None


def parse_secret(text: str) -> str | None:
    """Return a secret, or None if the text is empty. No error shows the text."""
    if text and len(text) < _SECRET_LENGTH:
        raise ValueError(f"must have at least {_SECRET_LENGTH} characters")
    return text or None


def parse_redaction(text: str) -> tuple[tuple[str, str], ...]:
    """Return the names of fields, each with what becomes of it."""
    rules: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, action = (each.strip() for each in part.partition("="))
        if not name or action not in {DROP, HASH, NO_QUERY} or name in rules:
            raise ValueError(
                "must be different fields, and of each drop, hash or no-query, such as"
                f" page.url=no-query,metadata.email=hash, has {part!r}"
            )
        rules[name] = action
    return tuple(rules.items())


def parse_hosts(text: str) -> frozenset[str]:
    """Return the names of hosts in a list separated by commas, without ports."""
    names = frozenset(name.strip().strip("[]").lower() for name in text.split(","))
    for name in names:
        if not re.fullmatch(r"[a-z0-9_.-]+|[0-9a-f:.]+", name, re.ASCII):
            raise ValueError(f"must be names of hosts without ports, has {name!r}")
    return names


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on reaches this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_level(text: str) -> str:
    """Return the name of a level of logs."""
    if text.upper() not in _LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(_LOG_LEVELS)}, is {text!r}")
    return text.upper()


def parse_endpoint(text: str) -> str:
    """Return the URL of a provider.

    Plain HTTP is for tests: it would show the events and the credential to anybody in between.
    """
    if _has_valid_port(text):
        parts = urlsplit(text)
        if parts.scheme == "https" and parts.hostname:
            return text
        if parts.scheme == "http" and parts.hostname in _LOOPBACK:
            return text
    raise ValueError("must be an https:// URL, or http:// on the loopback interface")


def parse_collector(text: str) -> str:
    """Return the URL of a collector of traces, or an empty text for none."""
    if text and not (
        _has_valid_port(text)
        and urlsplit(text).scheme in ("http", "https")
        and urlsplit(text).hostname
    ):
        raise ValueError("must be a URL such as http://collector:4318")
    return text


def parse_protocol(text: str) -> str:
    """Return the protocol to a collector, of which there is one."""
    if text != "http/protobuf":
        raise ValueError(f"must be http/protobuf, the only protocol spoken here, is {text!r}")
    return text


def parse_duration(text: str) -> float:
    """Return the seconds of an age such as 3d."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if match is None:
        raise ValueError("must be a number and a unit (s, m, h or d), such as 3d")
    return float(int(match[1]) * _UNIT_SECONDS[match[2]])


def parse_origins(text: str) -> frozenset[str]:
    """Return the origins of a list separated by commas; `*` is one of them."""
    origins = frozenset(origin.strip() for origin in text.split(",") if origin.strip())
    for origin in origins - {"*"}:
        parts = urlsplit(origin)
        if not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise ValueError(f"must be * or origins such as https://example.com, has {origin!r}")
    return origins


def parse_pages(text: str) -> frozenset[str]:
    """Return the origins of a list separated by commas, as browsers spell them."""
    origins = [origin.strip().lower() for origin in text.split(",")]
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"must be origins such as https://example.com, has {origin!r}")
    return frozenset(map(_spell_origin, origins))


def _spell_origin(origin: str) -> str:
    port = _DEFAULT_PORTS.get(origin.partition(":")[0], "")
    return origin.removesuffix(port)


def parse_database_url(text: str) -> str | None:
    """Return the address as libpq takes it. Never show the text, which may hold a password."""
    if not text:
        return None
    address = re.sub(r"^postgresql\+psycopg2://", "postgresql://", text)
    if not _is_database_address(address):
        raise ValueError(
            "must be like postgresql://user:password@host:5432/database, with other characters"
            " than letters, digits and -._~ in the password percent-encoded, or another form that"
            " libpq takes"
        )
    return address


def _is_database_address(address: str) -> bool:
    """Return whether libpq takes it, and takes no part of a password for a host or a port."""
    try:
        parameters = parse_dsn(address)
    except ProgrammingError:  # not shown: it may quote a password
        return False
    ports = parameters.get("port", "").split(",")
    return "@" not in parameters.get("host", "") and all(map(_is_port, filter(None, ports)))


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= 65535


def _has_valid_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:  # not shown: if a password is malformed, it holds a part of it
        return False


def hide_credentials(url: str) -> str:
    """Return a valid URL without what may be a credential: account and query."""
    scheme, separator, rest = url.partition("://")
    account, at, place = rest.rpartition("@")
    place, question, _ = place.partition("?")
    return scheme + separator + ("***@" if at else account) + place + ("?***" if question else "")


def hide_password(address: str) -> str:
    """Return a valid address of a database, a URL or keywords, without what may be a credential."""
    if not address or address.startswith(("postgresql", "postgres:")):
        return hide_credentials(address)
    known = parse_dsn(address)
    shown = [f"{name}={known[name]}" for name in _PLACE if name in known]
    return " ".join([*shown, *(["***"] if known.keys() - set(_PLACE) else [])])
