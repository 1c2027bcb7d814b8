"""Every error has its place in both protocols."""

from collections.abc import Iterator
from typing import cast

import grpc
import pytest
from falcon.testing import TestClient

import server.app.worker  # noqa: F401 - so that the errors of every module are known
from server.deferral import ENVIRON_KEY, Deferral
from server.errors import IngestError, InvalidEvents, ResourceExhausted, Unavailable
from server.events.json_codec import JsonCodec
from server.events.schema import EVENT_SCHEMA
from server.http.api import create_app
from server.ingest.admission import Admission
from server.ingest.ingestion import Ingestion
from server.ingest.request_record import RequestRecorder
from server.ingest.service import IngestService
from server.protocols import HTTP

# The statuses that google.rpc.Code gives for these codes.
HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
}


def find_subclasses(root: type[IngestError]) -> Iterator[type[IngestError]]:
    """Yield the class and all that derive from it."""
    yield root
    for subclass in root.__subclasses__():
        yield from find_subclasses(subclass)


ERRORS = sorted(set(find_subclasses(IngestError)), key=lambda error: error.__name__)


class Stranger:
    """Stands in for admission: no key is known."""

    def identify(self, _key: str) -> None:
        """Return nobody."""


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Return the HTTP application of a service that was never started."""
    service = IngestService(
        cast(Admission, Stranger()),
        cast(Ingestion, None),
        {HTTP: JsonCodec(EVENT_SCHEMA)},
        timeout_seconds=1,
    )
    app = create_app(service, RequestRecorder(), bool, description=b"{}", allowed_origins={"*"})
    return TestClient(app)


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_its_http_status(kind: type[IngestError], client: TestClient) -> None:
    """Over HTTP, each error has the status that corresponds to its code, and its text."""
    error = kind.__new__(kind, "what went wrong")
    deferral = Deferral()
    deferral.failure = error
    answer = client.simulate_post("/v1/events", extras={ENVIRON_KEY: deferral})
    refuses_events = issubclass(kind, InvalidEvents)
    assert answer.status_code == (422 if refuses_events else HTTP_STATUS[kind.code])
    outcome = {"accepted": 0, "rejected": 0, "errors": []} if refuses_events else {}
    assert answer.json == {"error": "what went wrong"} | outcome
    retry_after = answer.headers.get("Retry-After")
    assert retry_after == (kind.retry_after_seconds and str(kind.retry_after_seconds))


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_its_grpc_code(kind: type[IngestError]) -> None:
    """In gRPC, each error's code is one of the protocol's, and it is no success."""
    assert grpc.StatusCode[kind.code] is not grpc.StatusCode.OK


@pytest.mark.parametrize("kind", ERRORS)
def test_only_retryable_errors_say_when(kind: type[IngestError]) -> None:
    """What can be sent again says when, and nothing else does."""
    assert (kind.retry_after_seconds is not None) is issubclass(
        kind, Unavailable | ResourceExhausted
    )
