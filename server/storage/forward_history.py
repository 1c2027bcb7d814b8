"""Since when every stored event is also kept for a provider, and what was purged.

What is delivered leaves no trace but its absence: from an event that neither waits nor is dead, one
can only conclude that it was delivered if it was kept for the provider in the first place.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from server.errors import Unavailable
from server.storage.connection import GuardedConnection
from server.storage.database_thread import DatabaseThread
from server.storage.errors import Conflict

_ROUND_SECONDS = 60.0
_RETRY_SECONDS = 5.0
_QUERY_SECONDS = 10.0

# A service without the provider may have stored events since it last said so. When it has been
# silent for two rounds, it has gone.
_NOTE_ENABLED = text("""
UPDATE forward_history SET enabled_since = now() + make_interval(secs => :margin)
 WHERE provider = ANY(:providers) AND enabled_since IS NULL
""")
_NOTE_NEW = text("""
INSERT INTO forward_history (provider, enabled_since)
SELECT name, now() FROM unnest(CAST(:providers AS text[])) AS name
    ON CONFLICT (provider) DO NOTHING
""")
_NOTE_DISABLED = text("""
INSERT INTO forward_history AS known (provider)
SELECT name FROM unnest(CAST(:providers AS text[])) AS name
    ON CONFLICT (provider) DO UPDATE SET enabled_since = NULL
 WHERE known.enabled_since IS NOT NULL
""")
_READ = text("SELECT provider, enabled_since, purged_until FROM forward_history ORDER BY provider")


@dataclass(frozen=True)
class ProviderHistory:
    """What is known of a provider; None if it is not enabled, or if nothing was purged."""

    provider: str
    enabled_since: datetime | None
    purged_until: datetime | None


def note_providers(
    connection: Connection, enabled: Collection[str], disabled: Collection[str]
) -> None:
    """Note which providers the events of a service are kept for, and which not."""
    with connection.begin():
        values = {"providers": sorted(enabled), "margin": 2 * _ROUND_SECONDS}
        connection.execute(_NOTE_ENABLED, values)
        connection.execute(_NOTE_NEW, values)
        connection.execute(_NOTE_DISABLED, {"providers": sorted(disabled)})


def read_history(connection: Connection) -> list[ProviderHistory]:
    """Return what is known of each provider that any service has known."""
    return [ProviderHistory(**row) for row in connection.execute(_READ).mappings()]


class ProviderNotes(DatabaseThread):
    """A thread that notes the providers of a service when it starts, and every minute."""

    STOP_SECONDS = _QUERY_SECONDS

    def __init__(
        self, connection: GuardedConnection, enabled: Collection[str], disabled: Collection[str]
    ) -> None:
        super().__init__("providers", connection)
        self._enabled = enabled
        self._disabled = disabled

    def _run_round(self) -> float:
        try:
            with self._connection.connected(_QUERY_SECONDS) as connection:
                note_providers(connection, self._enabled, self._disabled)
        except (Conflict, Unavailable):
            return _RETRY_SECONDS
        return _ROUND_SECONDS
