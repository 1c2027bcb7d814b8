"""TLS on the gRPC port: who gets in, and certificates that are replaced while it runs."""

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from server.config import InvalidSetting, TlsFiles
from server.grpc.certificates import CertificateSource, read_certificates
from tests.support.clients import bind_ingest
from tests.support.clock import Clock
from tests.support.projects import Project, create_project
from tests.support.services import Service, run_command, running_service, wait_until

CA, CLIENT_CA = trustme.CA(), trustme.CA()


def write_certificate(directory: Path, authority: trustme.CA = CA) -> TlsFiles:
    """Write a new certificate for localhost, and its key, over those that may be there."""
    issued = authority.issue_cert("localhost")
    files = TlsFiles(directory / "chain.pem", directory / "key.pem", None)
    files.chain.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    files.key.write_bytes(issued.private_key_pem.bytes())
    return files


def read_shown(service: Service) -> str:
    """Return the certificate that a new connection is shown."""
    host, port = service.grpc_target.split(":")
    return ssl.get_server_certificate((host, int(port)), timeout=60)


@dataclass(frozen=True)
class Secured:
    """A service with TLS, and the files that it reads."""

    service: Service
    files: TlsFiles
    project: Project

    @contextmanager
    def connected(self, credentials: grpc.ChannelCredentials | None) -> Iterator[grpc.Channel]:
        """Provide a new connection; without credentials, in plain text."""
        target = f"localhost:{self.service.grpc_target.rpartition(':')[2]}"
        # Of its own, or channels to one address would share a connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            channel = grpc.insecure_channel(target, options)
        else:
            channel = grpc.secure_channel(target, credentials, options)
        with channel:
            yield channel

    def answer(self, credentials: grpc.ChannelCredentials | None) -> str:
        """Return the code of a request over a new connection."""
        with self.connected(credentials) as channel:
            return self.send(channel)

    def send(self, channel: grpc.Channel) -> str:
        """Return the code of an empty batch with a valid key."""
        ingest = bind_ingest(channel)
        try:
            ingest(b"", timeout=60, metadata=(("x-pg-api-key", self.project.key),))
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"


def trusting(
    authority: trustme.CA = CA, client: trustme.LeafCert | None = None
) -> grpc.ChannelCredentials:
    """Credentials of a client that trusts an authority, and may show a certificate."""
    roots = authority.cert_pem.bytes()
    if client is None:
        return grpc.ssl_channel_credentials(roots)
    chain = b"".join(part.bytes() for part in client.cert_chain_pems)
    return grpc.ssl_channel_credentials(roots, client.private_key_pem.bytes(), chain)


@contextmanager
def running_secured(database_url: str, files: TlsFiles) -> Iterator[Secured]:
    """Provide a service with these certificates."""
    settings = {"DATABASE_URL": database_url} | name_files(files)
    with running_service(settings) as service:
        yield Secured(service, files, create_project(service))


def name_files(files: TlsFiles) -> dict[str, str]:
    """Return the settings that name these files."""
    settings = {"GRPC_TLS_CERT_FILE": str(files.chain), "GRPC_TLS_KEY_FILE": str(files.key)}
    if files.client_ca:
        settings["GRPC_TLS_CLIENT_CA_FILE"] = str(files.client_ca)
    return settings


@pytest.fixture(scope="module")
def secured(
    create_migrated: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    """Provide a service with TLS, to any client."""
    files = write_certificate(tmp_path_factory.mktemp("tls"))
    with running_secured(create_migrated(), files) as running:
        yield running


@pytest.fixture(scope="module")
def mutual(
    create_migrated: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    """Provide a service that asks for its clients' certificates."""
    files = write_certificate(tmp_path_factory.mktemp("mtls"))
    client_ca = files.chain.with_name("clients.pem")
    client_ca.write_bytes(CLIENT_CA.cert_pem.bytes())
    files = TlsFiles(files.chain, files.key, client_ca)
    with running_secured(create_migrated(), files) as running:
        yield running


def test_only_clients_that_trust_the_certificate_connect(secured: Secured) -> None:
    """A client that trusts the certificate is served, one that does not ends the connection."""
    assert secured.answer(trusting()) == "OK"
    assert secured.answer(trusting(trustme.CA())) == "UNAVAILABLE"


def test_a_tls_port_serves_no_plain_text(secured: Secured) -> None:
    """With TLS, a client that speaks plain text is not served, and breaks no line of the log."""
    assert secured.answer(None) == "UNAVAILABLE"
    assert secured.service.read_log()


def test_only_clients_with_certificates_are_served(mutual: Secured) -> None:
    """With an authority for clients, only those with a certificate of it are served."""
    known, stranger = CLIENT_CA.issue_cert("client"), CA.issue_cert("client")
    assert mutual.answer(trusting(client=known)) == "OK"
    assert mutual.answer(trusting(client=stranger)) == "UNAVAILABLE"
    assert mutual.answer(trusting()) == "UNAVAILABLE"


def test_a_client_certificate_does_not_replace_the_key(mutual: Secured) -> None:
    """A client's certificate does not take the place of its API key."""
    client = trusting(client=CLIENT_CA.issue_cert("client"))
    nobody = Secured(mutual.service, mutual.files, Project("none", "none"))
    assert nobody.answer(client) == "UNAUTHENTICATED"


def test_a_renewed_certificate_is_shown_without_restart(secured: Secured) -> None:
    """A new certificate is shown to new connections, without a restart; those before go on."""
    other = trustme.CA()
    with secured.connected(trusting()) as early:
        assert secured.send(early) == "OK"
        workers = secured.service.find_workers()
        write_certificate(secured.files.chain.parent, other)
        wait_until(lambda: secured.answer(trusting(other)) == "OK")
        assert secured.answer(trusting()) == "UNAVAILABLE"
        assert secured.send(early) == "OK"
    assert secured.service.find_workers() == workers
    write_certificate(secured.files.chain.parent)
    wait_until(lambda: secured.answer(trusting()) == "OK")


def test_the_client_authority_is_renewed_without_restart(mutual: Secured) -> None:
    """Whose certificates clients need can be changed without a restart as well."""
    assert mutual.files.client_ca is not None
    other = trustme.CA()
    newcomer = trusting(client=other.issue_cert("client"))
    assert mutual.answer(newcomer) == "UNAVAILABLE"
    mutual.files.client_ca.write_bytes(CLIENT_CA.cert_pem.bytes() + other.cert_pem.bytes())
    wait_until(lambda: mutual.answer(newcomer) == "OK")
    assert mutual.answer(trusting(client=CLIENT_CA.issue_cert("client"))) == "OK"


def test_a_broken_renewal_keeps_the_old_certificate(secured: Secured) -> None:
    """While the files are broken the old certificate stays, which one line of the log tells."""

    def warnings() -> list[str]:
        records = secured.service.read_log()
        return [r["message"] for r in records if "certificate not renewed" in r["message"]]

    def connect_and_look() -> list[str]:
        assert secured.answer(trusting()) == "OK"
        return warnings()

    before = len(warnings())
    shown = read_shown(secured.service)
    secured.files.key.unlink()
    wait_until(lambda: len(connect_and_look()) > before)
    assert "GRPC_TLS_KEY_FILE: cannot read" in warnings()[-1]
    for _ in range(3):
        assert read_shown(secured.service) == shown
    assert len(warnings()) == before + 1
    write_certificate(secured.files.chain.parent)
    wait_until(lambda: read_shown(secured.service) != shown)


def test_certificate_files_are_checked_once_a_second(tmp_path: Path) -> None:
    """However many connect, the files are looked at once a second, and read where they changed."""
    clock, files = Clock(0.0), write_certificate(tmp_path)
    os.utime(files.chain, (0, 0))  # or the next one may have the same time, in a coarse clock
    source = CertificateSource(files, clock)
    write_certificate(tmp_path)
    clock.now += 0.9
    assert source.find_renewed() is None
    clock.now += 0.2
    renewed = source.find_renewed()
    assert renewed is not None
    assert renewed.chain == (tmp_path / "chain.pem").read_bytes() != source.first.chain
    clock.now += 1.1
    assert source.find_renewed() is None


def test_a_relinked_certificate_is_a_change(tmp_path: Path) -> None:
    """A link that comes to point elsewhere, as Kubernetes mounts secrets, is a change."""
    clock, current = Clock(0.0), tmp_path / "current"
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write_certificate(tmp_path / name)
    current.symlink_to("old")
    source = CertificateSource(TlsFiles(current / "chain.pem", current / "key.pem", None), clock)
    (tmp_path / "next").symlink_to("new")
    os.replace(tmp_path / "next", current)
    clock.now += 1.1
    renewed = source.find_renewed()
    assert renewed is not None
    assert renewed.chain == (tmp_path / "new" / "chain.pem").read_bytes()


def put_directory(files: TlsFiles) -> None:
    """Put a directory in the place of the key."""
    files.key.unlink()
    files.key.mkdir()


def encrypt_key(files: TlsFiles) -> None:
    """Put a password on the key."""
    key = load_pem_private_key(files.key.read_bytes(), None)
    encryption = BestAvailableEncryption(b"secret")
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    files.key.write_bytes(encrypted)


FAULTS: dict[str, tuple[str, str, Callable[[TlsFiles], object]]] = {
    "no certificate": ("CERT", "No such file", lambda files: files.chain.unlink()),
    "no key": ("KEY", "No such file", lambda files: files.key.unlink()),
    "directory": ("KEY", "Is a directory", put_directory),
    "junk for a certificate": (
        "CERT",
        "not a certificate",
        lambda files: files.chain.write_text("junk"),
    ),
    "half a certificate": (
        "CERT",
        "not a certificate",
        lambda files: files.chain.write_bytes(files.chain.read_bytes()[:300]),
    ),
    "key for a certificate": (
        "CERT",
        "not a certificate",
        lambda files: files.chain.write_bytes(files.key.read_bytes()),
    ),
    "empty key": ("KEY", "not a private key", lambda files: files.key.write_text("")),
    "certificate for a key": (
        "KEY",
        "not a private key",
        lambda files: files.key.write_bytes(files.chain.read_bytes()),
    ),
    "key of another": (
        "KEY",
        "does not belong to the certificate",
        lambda files: files.key.write_bytes(CA.issue_cert("x").private_key_pem.bytes()),
    ),
    "encrypted key": ("KEY", "is encrypted", encrypt_key),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_tls_files_are_named_with_their_variable(fault: str, tmp_path: Path) -> None:
    """Files that cannot be used are refused in one line that names the variable and the file."""
    variable, problem, break_files = FAULTS[fault]
    files = write_certificate(tmp_path)
    break_files(files)
    with pytest.raises(InvalidSetting) as failure:
        read_certificates(files)
    message = str(failure.value)
    assert message.startswith(f"GRPC_TLS_{variable}_FILE: ")
    assert problem in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_an_unusable_client_authority_is_never_ignored(tmp_path: Path) -> None:
    """The authority for clients is checked like the others: it never counts as absent."""
    files = write_certificate(tmp_path)
    for content in (None, "", "junk"):
        client_ca = tmp_path / "clients.pem"
        if content is not None:
            client_ca.write_text(content)
        with pytest.raises(InvalidSetting, match=r"^GRPC_TLS_CLIENT_CA_FILE: .*clients\.pem"):
            read_certificates(TlsFiles(files.chain, files.key, client_ca))


def test_a_service_without_usable_certificate_does_not_start(tmp_path: Path) -> None:
    """A service whose certificate cannot be used does not start, and says why in one line."""
    files = write_certificate(tmp_path)
    write_key_of_another = FAULTS["key of another"][2]
    write_key_of_another(files)
    settings = {"PORT": "0", "GRPC_PORT": "0", "DATA_DIR": str(tmp_path / "data")}
    ended = run_command("serve", settings=settings | name_files(files))
    assert ended.returncode == 1
    assert ended.stderr.startswith("productgraph: GRPC_TLS_KEY_FILE: ")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()
