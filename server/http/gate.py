"""Which bodies are taken at all: decided by the head of a request, before its body has arrived."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Protocol

from server.caller import Caller
from server.errors import IngestError
from server.events.schema import MAX_REQUEST_BYTES
from server.ingest.admission import Admission


class Head(Protocol):
    """The head of a request; the names of headers are in upper case, with underscores."""

    command: str
    path: str
    headers: Mapping[str, str]
    content_length: int


class BodyGate:
    """Takes the bodies of those who may send events to `path`, and nobody else's."""

    def __init__(self, admission: Admission, path: str) -> None:
        self._admission = admission
        self._path = path

    def __call__(self, head: Head) -> "bool | Exception | Future[Caller]":
        """Return whether a body is wanted, an error instead, or what to wait for first."""
        if head.command != "POST" or head.path != self._path:
            return False
        key = head.headers.get("X_PG_API_KEY", "")
        try:
            caller = self._admission.identify(key)
            if caller is None:
                return self._admission.look_up(key)
            self._admission.check_origin(caller, head.headers.get("ORIGIN"))
            self._admission.check_quota(caller)
        except IngestError as error:
            return error
        return head.content_length <= MAX_REQUEST_BYTES
