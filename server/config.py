"""Settings, from the environment alone, checked before anything starts."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from server.rates import parse_byte_rate, parse_event_rate

T = TypeVar("T")

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
# The names of the analytics providers, as settings, tables and metrics have them.
AMPLITUDE, MIXPANEL = "amplitude", "mixpanel"
# Each provider's credential variable and default endpoint.
_PROVIDERS = {
    AMPLITUDE: ("AMPLITUDE_API_KEY", "https://api2.amplitude.com/batch"),
    MIXPANEL: ("MIXPANEL_TOKEN", "https://api.mixpanel.com/import"),
}
# Certificate, its key, and what clients' certificates are checked by.
TLS_VARIABLES = ("GRPC_TLS_CERT_FILE", "GRPC_TLS_KEY_FILE", "GRPC_TLS_CLIENT_CA_FILE")
# What scripts/ know better than the working directory: where the clone is that they belong to.
DEFAULT_DATA_DIR = "PRODUCTGRAPH_DEFAULT_DATA_DIR"
_POSTGRESQL_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg2")


class InvalidSetting(Exception):
    """A setting is unusable; the text is one line that names the variable and the problem."""


@dataclass(frozen=True)
class Destination:
    """An analytics provider that events are forwarded to."""

    endpoint: str
    credential: str = field(repr=False)


@dataclass(frozen=True)
class TlsFiles:
    """Where the certificates of the gRPC port are, in PEM."""

    chain: Path
    key: Path
    # With it, clients need a certificate that one of these has signed.
    client_ca: Path | None


@dataclass(frozen=True)
class RejectedKeep:
    """How many rejected events are kept of each project, the newest, and for how long."""

    count: int
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What the service runs with; the README's table explains each."""

    host: str
    port: int
    grpc_port: int
    # None: no metrics.
    metrics_port: int | None
    # Not shown: it may hold a password. None: an embedded PostgreSQL in data_dir.
    database_url: str | None = field(repr=False)
    data_dir: Path
    # Whether DATA_DIR is not set: then data_dir is only the usual place.
    data_dir_is_default: bool
    workers: int
    cors_allowed_origins: frozenset[str]
    grpc_reflection: bool
    # None: the gRPC port speaks plain text.
    grpc_tls: TlsFiles | None
    request_timeout_seconds: float
    max_waiting_bytes: int
    # What each API key may send a second, unless it has rates of its own; 0: any number.
    event_rate_limit: int
    byte_rate_limit: int
    # By provider name; empty where analytics is off.
    destinations: Mapping[str, Destination]
    forward_max_age_seconds: float
    # How many `serve` runs; others may run beside it.
    forwarders: int
    # None: rejected events are not kept.
    rejected_keep: RejectedKeep | None
    # Whether OpenTelemetry's own variables ask for traces.
    tracing: bool
    log_level: str


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Reads the settings; raises InvalidSetting for the first that is unusable."""
    read = _Reader(environment)
    return Settings(
        host=read("HOST", "127.0.0.1", str),
        port=read("PORT", "8080", _whole_number(0, 65535)),
        grpc_port=read("GRPC_PORT", "50051", _whole_number(0, 65535)),
        metrics_port=read("METRICS_PORT", "9464", _parse_optional_port),
        database_url=read("DATABASE_URL", "", _parse_database_url),
        data_dir=read("DATA_DIR", read(DEFAULT_DATA_DIR, "data", str), _parse_path),
        data_dir_is_default=not read("DATA_DIR", "", str),
        workers=read("WORKERS", "1", _whole_number(1, 64)),
        cors_allowed_origins=read("CORS_ALLOWED_ORIGINS", "*", _parse_origins),
        grpc_reflection=read("GRPC_REFLECTION", "true", _parse_flag),
        grpc_tls=_read_tls(read),
        request_timeout_seconds=read("REQUEST_TIMEOUT_SECONDS", "5", _parse_seconds),
        max_waiting_bytes=read("MAX_WAITING_MB", "64", _whole_number(1, 4096)) * 1024 * 1024,
        event_rate_limit=read("RATE_LIMIT", "off", parse_event_rate),
        byte_rate_limit=read("BYTE_RATE_LIMIT", "off", parse_byte_rate),
        destinations=_read_destinations(read),
        forward_max_age_seconds=read("FORWARD_MAX_AGE", "3d", _parse_duration),
        forwarders=read("FORWARDERS", "1", _whole_number(0, 16)),
        rejected_keep=read("REJECTED_KEEP", "10000/7d", _parse_rejected_keep),
        tracing=_read_tracing(read),
        log_level="DEBUG"
        if read("DEBUG", "false", _parse_flag)
        else read("LOG_LEVEL", "INFO", _parse_level),
    )


def _read_tracing(read: "_Reader") -> bool:
    """By https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    is_off = read("OTEL_SDK_DISABLED", "false", str.lower) == "true"
    exporters = read("OTEL_TRACES_EXPORTER", "otlp", str.lower)
    return any(read(name, "", str) for name in endpoints) and not is_off and exporters != "none"


def _read_destinations(read: "_Reader") -> dict[str, Destination]:
    if not read("ANALYTICS_ENABLED", "false", _parse_flag):
        return {}
    return {
        name: Destination(
            read(f"{name.upper()}_ENDPOINT", endpoint, _parse_endpoint),
            read(credential, "", _require(f"{name.upper()}_ENABLED")),
        )
        for name, (credential, endpoint) in _PROVIDERS.items()
        if read(f"{name.upper()}_ENABLED", "false", _parse_flag)
    }


def _read_tls(read: "_Reader") -> TlsFiles | None:
    """Whether the files can be used is seen where they are read."""
    chain, key, client_ca = (
        read(name, "", lambda text: _parse_path(text) if text else None) for name in TLS_VARIABLES
    )
    if chain and key:
        return TlsFiles(chain, key, client_ca)
    chain_variable, key_variable, _ = TLS_VARIABLES
    if chain:
        raise InvalidSetting(f"{key_variable}: must be set, since {chain_variable} is")
    if key or client_ca:
        raise InvalidSetting(f"{chain_variable}: must be set, since others of GRPC_TLS_… are")
    return None


class _Reader:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def __call__(self, name: str, default: str, parse: Callable[[str], T]) -> T:
        """The parsed value; an empty one means the default, as compose files set them."""
        try:
            return parse(self._environment.get(name, "").strip() or default)
        except ValueError as problem:
            raise InvalidSetting(f"{name}: {problem}") from None


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError(f"must be a whole number from {low} to {high}, is {text!r}")
        return int(text)

    return parse


def _parse_path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:  # neither HOME nor an account tells what ~ is
        raise ValueError(f"has a home directory that is unknown, is {text!r}") from None


def _parse_optional_port(text: str) -> int | None:
    if text.lower() in ("off", "false", "no"):  # not 0, which is any free port
        return None
    try:
        return _whole_number(0, 65535)(text)
    except ValueError:
        raise ValueError(f"must be off or a whole number from 0 to 65535, is {text!r}") from None


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds <= 60.0:
        raise ValueError(f"must be a number of seconds from 1 to 60, is {text!r}")
    return seconds


def _parse_flag(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"must be true or false, is {text!r}")


def _parse_level(text: str) -> str:
    if text.upper() not in _LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(_LOG_LEVELS)}, is {text!r}")
    return text.upper()


def _require(cause: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not text:
            raise ValueError(f"must be set, since {cause} is true")
        return text

    return parse


def _parse_endpoint(text: str) -> str:
    """Plain HTTP is for tests: it would show the events and the credential to anybody between."""
    if _has_valid_port(text):
        parts = urlsplit(text)
        if parts.scheme == "https" and parts.hostname:
            return text
        if parts.scheme == "http" and parts.hostname in _LOOPBACK:
            return text
    raise ValueError("must be an https:// URL, or http:// on the loopback interface")


def _parse_duration(text: str) -> float:
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if match is None:
        raise ValueError("must be a number and a unit (s, m, h or d), such as 3d")
    return float(int(match[1]) * _UNIT_SECONDS[match[2]])


def _parse_rejected_keep(text: str) -> RejectedKeep | None:
    if text.lower() in _FALSE:
        return None
    count, _, age = text.partition("/")
    try:
        return RejectedKeep(_whole_number(1, 1_000_000)(count), _parse_duration(age))
    except ValueError:
        raise ValueError(
            "must be off, or a number of events up to 1000000 and an age, such as 10000/7d"
        ) from None


def _parse_origins(text: str) -> frozenset[str]:
    origins = frozenset(origin.strip() for origin in text.split(",") if origin.strip())
    for origin in origins - {"*"}:
        parts = urlsplit(origin)
        if not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise ValueError(f"must be * or origins such as https://example.com, has {origin!r}")
    return origins


def _parse_database_url(text: str) -> str | None:
    """Never shows the text, which may hold a password."""
    if not text:
        return None
    scheme, separator, rest = text.partition("://")
    is_well_formed = _has_valid_port(text) and "%00" not in text and rest.count("@") <= 1
    if not separator or scheme not in _POSTGRESQL_SCHEMES or not is_well_formed:
        raise ValueError(
            "must be like postgresql://user:password@host:5432/database, with other characters"
            " than letters, digits and -._~ in the password percent-encoded"
        )
    return f"postgresql+psycopg2://{rest}"


def _has_valid_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:  # not shown: where a password is malformed, it holds a part of it
        return False
