"""Logs hold neither credentials nor what is in the events, whatever went wrong."""

import base64
from collections.abc import Sequence
from pathlib import Path

from tests.torture.cluster import Cluster
from tests.torture.events import MARKER
from tests.torture.providers import MIXPANEL_TOKEN


def find_leaks(cluster: Cluster) -> list[str]:
    """Return the log files that hold a secret, without the secret."""
    encoded = base64.b64encode(f"{MIXPANEL_TOKEN}:".encode()).decode()
    words = [word.encode() for word in (*cluster.secrets, encoded, MARKER)]
    logs = [*cluster.logs.iterdir(), *(cluster.data / "postgres").glob("server.log*")]
    return [f"{log.name} holds a secret" for log in logs if _holds_any(log, words)]


def _holds_any(log: Path, words: Sequence[bytes]) -> bool:
    content = log.read_bytes()
    return any(word in content for word in words)
