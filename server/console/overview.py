"""The overview: the service, its throughput and its providers, from memory alone."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

import orjson

from server.console.throughput import Throughput
from server.storage.lanes import LaneStatus


@dataclass(frozen=True)
class ServiceState:
    """The state of the service at one moment."""

    version: str
    started_at: datetime
    workers: int
    is_database_up: bool
    keeps_rejected: bool
    # The command line that replays rejected events begins with this.
    command: str


class Overview:
    """Builds the overview from memory; never waits.

    `read_lanes` returns None if the state of the lanes is not known.
    """

    def __init__(
        self,
        read_state: Callable[[], ServiceState],
        throughput: Throughput,
        read_lanes: Callable[[], Sequence[LaneStatus] | None],
        providers: Sequence[str],
    ) -> None:
        self._read_state = read_state
        self._throughput = throughput
        self._read_lanes = read_lanes
        self._idle = [LaneStatus(provider, 0, None, 0, 0, None) for provider in providers]
        self._enabled = frozenset(providers)

    def encode(self) -> bytes:
        """Return the overview as JSON."""
        shown = {
            "service": self._read_state(),
            "throughput": self._throughput.describe(),
            "providers": self._describe_providers(),
        }
        return orjson.dumps(shown, option=orjson.OPT_UTC_Z)

    def _describe_providers(self) -> list[dict[str, object]] | None:
        if (lanes := self._read_lanes()) is None:
            return None
        known = {lane.provider: lane for lane in (*self._idle, *lanes)}
        return [
            {**asdict(lane), "enabled": lane.provider in self._enabled} for lane in known.values()
        ]
