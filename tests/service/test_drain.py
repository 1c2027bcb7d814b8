"""Ends and replacements of running services lose no request."""

import http.client
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from queue import SimpleQueue
from typing import Any, cast

import grpc
import psycopg2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from productgraph.v1.event_ingestion_service_pb2 import StreamEventsResponse
from tests.support.clients import STREAM, encode_request
from tests.support.events import make_event, to_message
from tests.support.load import (
    STORED,
    Client,
    GrpcClient,
    HttpClient,
    read_stored,
    running_load,
    send,
)
from tests.support.projects import Project, create_project
from tests.support.services import Service, running_service, wait_until

pytestmark = pytest.mark.slow

END_SECONDS = 30.0
RESTART_SECONDS = 120.0


@pytest.fixture
def leaver(create_migrated: Callable[[], str]) -> Iterator[Service]:
    """Provide a running service of a test's own."""
    with running_service({"DATABASE_URL": create_migrated()}) as service:
        yield service


@pytest.fixture
def project(leaver: Service) -> Project:
    """Return a project of that service."""
    return create_project(leaver)


@contextmanager
def locked_events(service: Service) -> Iterator[None]:
    """Keep every commit waiting for as long as the context lasts."""
    with closing(psycopg2.connect(service.database_url)) as connection:
        connection.cursor().execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        yield


def open_clients(service: Service, project: Project, stack: ExitStack) -> list[Client]:
    """Clients of both protocols, each with an open connection and a known key."""
    kinds: list[Callable[[Service, str], Client]] = [HttpClient] * 16 + [GrpcClient] * 8
    clients = [stack.enter_context(closing(kind(service, project.key))) for kind in kinds]
    for client in clients:
        assert send(client, [make_event(project.id)]) in STORED
    return clients


def begin_all(clients: Sequence[Client], project: Project) -> set[str]:
    """Send an event from each client, and return their ids once the server has them all."""
    events = [make_event(project.id) for _ in clients]
    for client, event in zip(clients, events, strict=True):
        client.begin([event])
        if isinstance(client, GrpcClient):  # what follows the call on its connection is answered
            health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest())
    return {event["event_id"] for event in events}


def is_listening(service: Service) -> bool:
    """Whether the HTTP port takes a connection."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", service.http_port)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_at_sigterm_get_true_answers(
    number: signal.Signals, leaver: Service, project: Project
) -> None:
    """Requests in flight at SIGTERM or Ctrl-C get their true answers, and the exit status is 0."""
    with ExitStack() as stack:
        clients = open_clients(leaver, project, stack)
        with locked_events(leaver):
            event_ids = begin_all(clients, project)
            leaver.process.send_signal(number)
            wait_until(lambda: not is_listening(leaver))
        assert {client.end() for client in clients} <= STORED
        assert leaver.process.wait(END_SECONDS) == 0
    assert event_ids <= set(read_stored(leaver, project))


def test_the_last_held_answer_closes_its_connection(leaver: Service, project: Project) -> None:
    """An answer that was held when the end began tells the client that its connection closes."""
    with closing(HttpClient(leaver, project.key)) as client:
        with locked_events(leaver):
            client.begin([make_event(project.id)])
            leaver.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not is_listening(leaver))
        assert client.end() == "202"
        assert not client.is_open


def test_connections_queued_at_sigterm_are_answered(leaver: Service, project: Project) -> None:
    """Connections that no one has accepted yet when SIGTERM comes are answered too."""
    (worker,) = leaver.find_workers()
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(HttpClient(leaver, project.key))) for _ in range(24)]
        worker.suspend()
        event_ids = begin_all(clients, project)
        worker.terminate()
        worker.resume()
        assert {client.end() for client in clients} == {"202"}
    assert event_ids <= set(read_stored(leaver, project))


def test_the_first_request_of_a_connection_is_waited_for(leaver: Service, project: Project) -> None:
    """Who connected before the end began has a moment to send the first request, and an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", leaver.http_port, timeout=END_SECONDS)
    headers = {"Content-Type": "application/json", "X-PG-API-Key": project.key}
    with closing(connection):
        connection.connect()
        leaver.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_listening(leaver))
        time.sleep(0.6)  # longer than a connection is kept that has been of use
        connection.auto_open = 0
        connection.request(
            "POST", "/v1/events", json.dumps({"events": [make_event(project.id)]}), headers
        )
        assert connection.getresponse().status == 202


def test_a_draining_service_is_unready_but_healthy(leaver: Service) -> None:
    """While draining, the service calls itself unready over both protocols, but healthy."""
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(leaver.grpc_target))
        states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        serving = health_pb2.HealthCheckResponse.SERVING
        assert any(state.status == serving for state in states)
        unfinished = {path: start_get(leaver, path, stack) for path in ("/ready", "/health")}
        leaver.process.send_signal(signal.SIGTERM)
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        states.cancel()
        wait_until(lambda: not is_listening(leaver))
        assert finish_get(unfinished["/ready"]) == (503, {"status": "unavailable"})
        assert finish_get(unfinished["/health"]) == (200, {"status": "ok"})
        assert leaver.process.wait(END_SECONDS) == 0


def start_get(service: Service, path: str, stack: ExitStack) -> http.client.HTTPConnection:
    """Return a connection on which the end of a request's head is missing."""
    connection = http.client.HTTPConnection("127.0.0.1", service.http_port, timeout=END_SECONDS)
    stack.enter_context(closing(connection))
    connection.connect()
    connection.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n".encode())
    return connection


def finish_get(connection: http.client.HTTPConnection) -> tuple[int, object]:
    """Return the status and content of the answer to a request that is complete now."""
    connection.sock.sendall(b"\r\n")
    with http.client.HTTPResponse(connection.sock) as answer:
        answer.begin()
        return answer.status, json.loads(answer.read())


def test_a_rolling_restart_loses_no_accepted_request(create_migrated: Callable[[], str]) -> None:
    """While SIGHUP replaces all workers, clients lose no request that was accepted."""
    with running_service({"DATABASE_URL": create_migrated(), "WORKERS": "2"}) as service:
        project, workers = create_project(service), service.find_workers()
        with running_load(service, project, http_clients=16, grpc_clients=8) as load:
            service.process.send_signal(signal.SIGHUP)
            wait_until(lambda: has_logged(service, "rolling restart done"), RESTART_SECONDS)
            count = len(load.answers)
            wait_until(lambda: len(load.answers) > count + 100)
        assert not set(workers) & set(service.find_workers())
        # In the moment of the switch gRPC's core drops a call: github.com/grpc/grpc/issues/41785
        assert load.statuses() - {"CANCELLED"} == STORED
        assert sorted(load.stored()) == sorted(read_stored(service, project))


def has_logged(service: Service, message: str) -> bool:
    """Whether the log has a record with this message."""
    return any(record["message"] == message for record in service.read_log())


def test_messages_of_a_stream_at_sigterm_are_all_answered(
    leaver: Service, project: Project
) -> None:
    """What a stream took before SIGTERM is stored and answered, and then the stream ends."""
    messages: SimpleQueue[bytes | None] = SimpleQueue()
    events = [make_event(project.id) for _ in range(40)]
    with grpc.insecure_channel(leaver.grpc_target) as channel:
        begin = channel.stream_stream(STREAM, bytes, StreamEventsResponse.FromString)
        metadata = (("x-pg-api-key", project.key),)
        answers: Any = begin(iter(messages.get, None), metadata=metadata)
        messages.put(b"")
        assert next(answers).response.accepted == 0
        with locked_events(leaver):
            for event in events:
                messages.put(encode_request([to_message(event)]))
            wait_until(leaver.is_waiting_for_lock)
            leaver.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not is_listening(leaver))
        found: list[StreamEventsResponse] = []
        with pytest.raises(grpc.RpcError) as ended:
            found.extend(answers)
        assert cast(grpc.Call, ended.value).code() is grpc.StatusCode.UNAVAILABLE
        assert leaver.process.wait(END_SECONDS) == 0
    assert found
    assert {answer.response.accepted for answer in found} == {1}
    answered = {event["event_id"] for event in events[: len(found)]}
    assert set(read_stored(leaver, project)) == answered
