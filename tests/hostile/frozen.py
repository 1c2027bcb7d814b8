"""A database that is there and says nothing."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import psutil  # type: ignore[import-untyped]

from tests.hostile.connection import Answer, Connection, NoAnswer, encode_post
from tests.hostile.grammar import encode_batch, make_event
from tests.hostile.record import LIMIT_SECONDS, Record
from tests.hostile.target import Target
from tests.hostile.volume import probing_health
from tests.support.clients import bind_ingest, encode_request
from tests.support.events import to_message
from tests.support.patience import PATIENCE
from tests.support.projects import Project
from tests.support.services import wait_until

_CLIENTS = 8
_UNREADY_SECONDS = 4.0 * PATIENCE
_RECOVERY_SECONDS = 5.0 * PATIENCE
# So many over new connections, and each of the two workers has had one.
_NORMAL_ROW = 12


def attack_database(target: Target, record: Record, seconds: float, _seed: int) -> None:
    """Check that /health answers, /ready is 503, and events are answered in time."""
    project = target.create_project()
    first = _post(target, record, project, 0)
    record.require(first is not None and first.status == 202, f"before: {first}")
    with probing_health(target, record):
        with frozen_database(target):
            accepted = _attack(target, record, project, seconds)
        recovered = _measure_recovery(target, record, project)
    record.notes.append(f"normal {recovered:.1f} s after the database")
    record.require(recovered <= _RECOVERY_SECONDS, f"normal only after {recovered:.1f} s")
    record.require(accepted == 0, f"{accepted} requests accepted by a frozen database")


@contextmanager
def frozen_database(target: Target) -> Iterator[None]:
    """Stop all of the database's processes."""
    processes = target.find_postgres()
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def _attack(target: Target, record: Record, project: Project, seconds: float) -> int:
    """Return how many requests were accepted."""
    started_at, stop = time.monotonic(), threading.Event()
    with ThreadPoolExecutor(_CLIENTS + 1) as pool:
        posts = [
            pool.submit(_repeat, target, record, project, client + 1, stop)
            for client in range(_CLIENTS)
        ]
        calls = pool.submit(_call, target, record, project)
        try:
            wait_until(lambda: _ask(target, record, "/ready") == 503, _UNREADY_SECONDS)
        except AssertionError:
            record.violate(f"/ready is not 503 after {_UNREADY_SECONDS} s")
        stop.wait(max(0.0, started_at + seconds - time.monotonic()))
        record.require(_ask(target, record, "/ready") == 503, "/ready is not 503 any more")
        stop.set()
        calls.result()
        return sum(post.result() for post in posts)


def _repeat(
    target: Target, record: Record, project: Project, client: int, stop: threading.Event
) -> int:
    accepted = 0
    while not stop.is_set():
        answer = _post(target, record, project, client)
        accepted += answer is not None and answer.status == 202
        stop.wait(0.05)
    return accepted


def _post(target: Target, record: Record, project: Project, number: int) -> Answer | None:
    """Send a request over a new connection."""
    body = encode_batch([make_event(project.id, number)])
    answer = _exchange(target, record, encode_post(body, project.key))
    if answer is not None:
        late = answer.status == 503 and answer.has_retry_after
        record.require(answer.status == 202 or late, f"answered {answer}")
    return answer


def _ask(target: Target, record: Record, path: str) -> int | None:
    answer = _exchange(target, record, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return None if answer is None else answer.status


def _exchange(target: Target, record: Record, request: bytes) -> Answer | None:
    connection = Connection(target.port)
    try:
        answer = connection.exchange(request)
    except NoAnswer as error:
        record.violate(f"{error} to {request[:20]!r}")
        return None
    finally:
        connection.close()
    record.add(answer.status, answer.seconds)
    return answer


def _call(target: Target, record: Record, project: Project) -> None:
    request = encode_request([to_message(make_event(project.id, 99))])
    started_at, code = time.monotonic(), "OK"
    with grpc.insecure_channel(target.grpc_target) as channel:
        ingest = bind_ingest(channel)
        metadata = (("x-pg-api-key", project.key),)
        try:
            ingest(request, timeout=4 * LIMIT_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code().name
    record.add(code, time.monotonic() - started_at)
    record.require(code == "UNAVAILABLE", f"gRPC answered {code}")


def _measure_recovery(target: Target, record: Record, project: Project) -> float:
    """Return the seconds until the first of several requests in a row with normal answers."""
    started_at = row_started_at = time.monotonic()
    row = 0
    while row < _NORMAL_ROW and time.monotonic() < started_at + 4 * _RECOVERY_SECONDS:
        answer = _post(target, record, project, 100)
        if answer and answer.status == 202 and _ask(target, record, "/ready") == 200:
            row += 1
        else:
            time.sleep(0.05)
            row, row_started_at = 0, time.monotonic()
    return row_started_at - started_at
