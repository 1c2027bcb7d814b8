"""The TLS certificates of the gRPC port: read from files, and again when the files change.

Certificates are renewed every few weeks by replacing their files. A service that noticed only at a
restart would one day present an expired one.
"""

import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.config import TLS_VARIABLES, InvalidSetting, TlsFiles

_CHAIN, _KEY, _CLIENT_CA = TLS_VARIABLES
_LOOK_SECONDS = 1.0
_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH")

_log = logging.getLogger("productgraph.certificates")


@dataclass(frozen=True)
class Certificates:
    """A server's certificate chain and key, and the CA of its clients' certificates, all in PEM."""

    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None


def read_certificates(files: TlsFiles) -> Certificates:
    """Read the files. Raises InvalidSetting for the first that cannot be used."""
    certificates = Certificates(
        _read(_CHAIN, files.chain),
        _read(_KEY, files.key),
        _read(_CLIENT_CA, files.client_ca) if files.client_ca else None,
    )
    _check_certificate(_CHAIN, files.chain)
    _check_key(files)
    if files.client_ca:
        _check_certificate(_CLIENT_CA, files.client_ca)
    return certificates


def _read(variable: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidSetting(f"{variable}: cannot read '{path}': {error.strerror}") from error


def _check_certificate(variable: str, path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError):
        raise InvalidSetting(f"{variable}: '{path}' is not a certificate in PEM") from None


def _check_key(files: TlsFiles) -> None:
    def refuse_password() -> str:
        raise InvalidSetting(f"{_KEY}: the key in '{files.key}' is encrypted")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.chain, files.key, refuse_password)
    except ssl.SSLError as error:
        raise InvalidSetting(f"{_KEY}: {_explain(error, files)}") from None
    except OSError as error:  # gone since it was read
        raise InvalidSetting(f"{_KEY}: cannot read '{files.key}': {error.strerror}") from error


def _explain(error: ssl.SSLError, files: TlsFiles) -> str:
    if error.reason in _MISMATCHES:
        return f"the key in '{files.key}' does not belong to the certificate in '{files.chain}'"
    if error.reason and error.reason.endswith("TOO_SMALL"):
        return f"the key in '{files.key}' is too small"
    return f"'{files.key}' is not a private key in PEM"


class CertificateSource:
    """Notices that the files have changed. Not thread-safe."""

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the files. Raises InvalidSetting. The clock counts seconds."""
        self._files = files
        self._clock = clock
        self._next_look = clock() + _LOOK_SECONDS
        # Before the files are read: a file written meanwhile is noticed at the next look.
        self._seen = _identify(files)
        self.first = read_certificates(files)

    def find_renewed(self) -> Certificates | None:
        """Return the new certificates if the files have changed and can be used, else None.

        Looks at the files at most once a second, and reads them only if they have changed. Logs
        files that cannot be used once; the caller keeps the certificates that it has.
        """
        now = self._clock()
        if now < self._next_look:
            return None
        self._next_look = now + _LOOK_SECONDS
        identity = _identify(self._files)
        if identity == self._seen:
            return None
        self._seen = identity
        try:
            renewed = read_certificates(self._files)
        except InvalidSetting as problem:
            _log.warning("certificate not renewed, the old one stays in use: %s", problem)
            return None
        _log.info("certificate renewed")
        return renewed


def _identify(files: TlsFiles) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(_identify_one(path) for path in (files.chain, files.key, files.client_ca) if path)


def _identify_one(path: Path) -> tuple[int, ...] | None:
    """Return what differs if a file, or a link to it, is replaced; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
