"""Clients over both protocols: one request at a time, and in one word what was answered."""

import http.client
from typing import Protocol, cast

import grpc

from tests.support.clients import HttpConnection, bind_ingest
from tests.support.patience import PATIENCE
from tests.torture.events import Batch

STORED = frozenset({"202", "OK"})
# The service's answers to events that could not be stored.
NOT_STORED = frozenset({"503", "UNAVAILABLE"})
# There was no answer, since the connection ended or none was to be had.
LOST = "lost"
# Of calls whose server has died or is leaving.
BROKEN = frozenset({LOST, "CANCELLED"})

_ANSWER_SECONDS = 20.0 * PATIENCE
_RECONNECT = [
    ("grpc.use_local_subchannel_pool", 1),
    # A call whose server has left is sent again here, and told of: not by the library, in silence.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class Client(Protocol):
    """Sends batches over one connection, which it renews."""

    def send(self, batch: Batch) -> str:
        """Return the status, and more if other events were accepted than should have been."""

    def close(self) -> None:
        """End the connection."""


class HttpClient:
    """A connection kept alive; if it ends before an answer, the request is sent once more."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = HttpConnection(port, key, _ANSWER_SECONDS)

    def send(self, batch: Batch) -> str:
        """Return the HTTP status."""
        is_reused = self._connection.is_open
        try:
            return self._post(batch)
        except TimeoutError:
            self._connection.close()
            return "no answer"
        except (OSError, http.client.HTTPException):
            self._connection.close()
        return self._send_again(batch) if is_reused else LOST

    def _send_again(self, batch: Batch) -> str:
        try:
            return self._post(batch)
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return LOST

    def _post(self, batch: Batch) -> str:
        self._connection.begin(batch.body)
        answer = self._connection.end()
        if answer.status != 202:
            return str(answer.status)
        return _judge("202", batch, answer.json["accepted"], answer.json["rejected"])

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


class GrpcClient:
    """A channel with a connection of its own."""

    def __init__(self, port: int, key: str) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", _RECONNECT)
        self._ingest = bind_ingest(self._channel)
        self._metadata = (("x-pg-api-key", key),)

    def send(self, batch: Batch) -> str:
        """Return the name of the status code."""
        try:
            response = self._ingest(batch.request, timeout=_ANSWER_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            return _read_code(cast(grpc.Call, error))
        return _judge("OK", batch, response.accepted, response.rejected)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


def _read_code(failed: grpc.Call) -> str:
    code: str = failed.code().name
    # The service's own comes with details; the other one is of a connection that broke.
    is_ours = any(key == "grpc-status-details-bin" for key, _ in failed.trailing_metadata() or ())
    return LOST if code == "UNAVAILABLE" and not is_ours else code


def _judge(status: str, batch: Batch, accepted: int, rejected: int) -> str:
    if (accepted, rejected) == (len(batch.insert_ids), len(batch.rejected)):
        return status
    expected = f"{len(batch.insert_ids)} and {len(batch.rejected)}"
    return f"{status}: {accepted} accepted and {rejected} rejected instead of {expected}"
