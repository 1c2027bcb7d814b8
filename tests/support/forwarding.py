"""A database, both providers' stand-ins, and lanes that forward from one to the others."""

import asyncio
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import Queue
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from productgraph.v1.event_pb2 import Event
from server.events.encoded_events_pb2 import EncodedEvents
from server.forwarding.http_client import Transport
from server.forwarding.lane import Lane
from server.forwarding.lane_health import LaneHealth
from server.forwarding.providers.amplitude import Amplitude
from server.forwarding.providers.mapping import make_insert_id
from server.forwarding.providers.mixpanel import Mixpanel
from server.forwarding.providers.provider import Provider
from server.forwarding.queries import Queries
from server.forwarding.round import REQUESTS_IN_FLIGHT
from server.forwarding.sender import Sender
from server.storage.connection import GuardedConnection, open_engine
from tests.support.database import PROVIDERS, Database
from tests.support.events import make_message
from tests.support.provider_servers import ProviderServer
from tests.support.services import ROOT, clean_environment, wait_until

SECRET = "s3cret"
PENDING = """
SELECT d.positions, p.events FROM outbox_deliveries d JOIN outbox_payloads p ON p.id = d.payload_id
 WHERE d.provider = %s
"""
KEYS = """
SELECT project_id, event_id, (extract(epoch FROM event_timestamp) * 1000000)::bigint FROM events
"""
END_LEASES = "UPDATE outbox_deliveries SET due_at = now()"


# Settings of a service that queues events for a provider, and can deliver nothing.
QUEUE_ALONE = {
    "ANALYTICS_ENABLED": "true",
    "MIXPANEL_ENABLED": "true",
    "MIXPANEL_TOKEN": "token",
    "MIXPANEL_ENDPOINT": "http://127.0.0.1:1/import",
}


def enable_providers(servers: Mapping[str, ProviderServer], secret: str) -> dict[str, str]:
    """Return the settings of a service that forwards to these servers, by providers' names."""
    enabled = {f"{name.upper()}_ENABLED": "true" for name in servers}
    endpoints = {f"{name.upper()}_ENDPOINT": server.url for name, server in servers.items()}
    secrets = {"AMPLITUDE_API_KEY": secret, "MIXPANEL_TOKEN": secret}
    return {"ANALYTICS_ENABLED": "true"} | enabled | endpoints | secrets


@dataclass(frozen=True)
class Bench(Database):
    """A database and both providers' servers, to which its stored events are to be forwarded."""

    servers: dict[str, ProviderServer]

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a process that forwards here."""
        return {"DATABASE_URL": self.url} | enable_providers(self.servers, SECRET)

    def build_provider(self, name: str) -> Provider:
        """Return a provider that sends to one of the servers."""
        types: dict[str, type[Amplitude | Mixpanel]] = {
            "amplitude": Amplitude,
            "mixpanel": Mixpanel,
        }
        return types[name](SECRET, self.servers[name].url)

    def open_connection(self) -> GuardedConnection:
        """Return a connection such as a lane's."""
        return GuardedConnection(open_engine(self.url))

    @contextmanager
    def forwarding(
        self,
        *names: str,
        max_age: timedelta = timedelta(days=3),
        transport: type[Transport] = Transport,
        counts: "Counter[tuple[str, str]] | None" = None,
    ) -> Iterator[None]:
        """Lanes to these providers, or to all, run until the context ends."""
        stops: Queue[Callable[[], object]] = Queue()

        def count(provider: str, outcome: str) -> None:
            if counts is not None:
                counts[provider, outcome] += 1

        async def run(name: str, stop: asyncio.Event) -> None:
            own, connection = transport(REQUESTS_IN_FLIGHT), self.open_connection()
            provider = self.build_provider(name)
            health = LaneHealth(provider, count)
            sender = Sender(provider, own, health, stop)
            try:
                await Lane(sender, Queries(connection), health, max_age=max_age).run()
            finally:
                await own.close()
                connection.close()

        async def run_all() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()
            stops.put(lambda: loop.call_soon_threadsafe(stop.set))
            await asyncio.gather(*(run(name, stop) for name in names or PROVIDERS))

        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(asyncio.run, run_all())
            try:
                yield
            finally:
                stops.get()()
            running.result()

    @contextmanager
    def process(
        self,
        settings: Mapping[str, str] | None = None,
        stderr: int = subprocess.DEVNULL,
        root: Path = ROOT,
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """`productgraph forward` in a process of its own, killed at the end."""
        command = [sys.executable, "-m", "server", "forward"]
        environment = clean_environment(self.settings if settings is None else settings, root)
        with subprocess.Popen(command, cwd=root, env=environment, stderr=stderr) as process:
            try:
                yield process
            finally:
                process.kill()

    def read_stored(self) -> set[str]:
        """Return the insert ids of the events in the table."""
        events = (
            Event(
                project_id=p,
                event_id=e,
                event_timestamp=Timestamp(seconds=us // 10**6, nanos=us % 10**6 * 1000),
            )
            for p, e, us in self.query(KEYS)
        )
        return {make_insert_id(event) for event in events}

    def read_dead(self, name: str) -> dict[str, str]:
        """Return the insert ids of a provider's dead events, with the reasons."""
        dead = self.query("SELECT event, reason FROM dead_events WHERE provider = %s", name)
        return {make_insert_id(Event.FromString(bytes(e))): reason for e, reason in dead}

    def read_pending(self, name: str) -> set[str]:
        """Return the insert ids of what a provider still has to get."""
        pending = set()
        for positions, payload in self.query(PENDING, name):
            frames = EncodedEvents.FromString(bytes(payload)).events
            chosen = range(len(frames)) if positions is None else positions
            pending |= {make_insert_id(Event.FromString(frames[p])) for p in chosen}
        return pending

    def is_done(self) -> bool:
        """Whether nothing is pending."""
        return self.query("SELECT count(*) FROM outbox_payloads") == [(0,)]

    def check(self) -> None:
        """Check the property that must hold at any time."""
        stored = self.read_stored()
        for name, server in self.servers.items():
            # Pending first: what is delivered meanwhile is in both.
            found = self.read_pending(name) | self.read_dead(name).keys() | server.insert_ids
            assert found == stored
            payloads = defaultdict(set)
            for delivery in tuple(server.deliveries):
                payloads[delivery.insert_id].add(delivery.payload)
            assert payloads.keys() <= stored
            assert all(len(different) == 1 for different in payloads.values())
            assert server.count_duplicates() == 0

    def finish(self) -> None:
        """Wait until nothing is pending, and check what became of it all."""
        wait_until(self.is_done)
        assert self.query("SELECT count(*) FROM outbox_deliveries") == [(0,)]
        self.check()
        for name, server in self.servers.items():
            assert server.insert_ids.isdisjoint(self.read_dead(name))


def make_events(project: str, count: int, **fields: Any) -> list[Event]:
    """Return new events that differ in their ids."""
    return [make_message(project, f"e{number}", **fields) for number in range(count)]
