"""Quotas of projects: set, listed, and what is used of them in each period.

Periods are days and months in UTC, by the clock of the database, so that all machines agree.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import date
from typing import NamedTuple

from sqlalchemy import Connection, text

from server.caller import Quota

# A quota is near its end once this share of it is used.
NEAR_END = 0.8
# For how many days the use of a quota is kept, and how many quotas the metrics show at most.
_KEPT_DAYS = 400
_MAX_WATCHED = 200

# The periods that go on, of all projects that have a quota.
_PERIODS = """
SELECT project_id, period, events, CAST(starts_at AS date) AS began,
       CAST(extract(epoch FROM ends_at - starts_at) AS bigint) AS seconds,
       CAST(extract(epoch FROM ends_at - (clock_timestamp() AT TIME ZONE 'UTC')) AS float8)
           AS ends_in
  FROM quotas
 CROSS JOIN (SELECT date_trunc('day', now() AT TIME ZONE 'UTC') AS day,
                    date_trunc('month', now() AT TIME ZONE 'UTC') AS month) AS clock
 CROSS JOIN LATERAL (VALUES ('daily', daily, day, day + interval '1 day'),
                            ('monthly', monthly, month, month + interval '1 month')
       ) AS periods (period, events, starts_at, ends_at)
 WHERE events IS NOT NULL
"""
_STANDING = "period, events, began, seconds, ends_in, used, warned_for"

_SET = text("""
INSERT INTO quotas (project_id, daily, monthly) VALUES (:project, :daily, :monthly)
    ON CONFLICT (project_id) DO UPDATE SET daily = excluded.daily, monthly = excluded.monthly
""")
_REMOVE = text("DELETE FROM quotas WHERE project_id = :project")
_FIND = text("SELECT daily, monthly FROM quotas WHERE project_id = :project")
_LIST = text(f"""
WITH periods AS ({_PERIODS})
SELECT project_id, period, events, began, seconds, ends_in, coalesce(used, 0), warned_for
  FROM periods LEFT JOIN quota_uses USING (project_id, period, began)
 WHERE project_id = :project OR CAST(:project AS text) IS NULL
 ORDER BY project_id, period
""")  # noqa: S608 - nothing in it comes from outside
_WATCH = text(f"""
WITH periods AS ({_PERIODS})
SELECT project_id, period, coalesce(used, 0) / CAST(events AS float8) AS share
  FROM periods LEFT JOIN quota_uses USING (project_id, period, began)
 ORDER BY share DESC, project_id, period LIMIT :limit
""")  # noqa: S608 - as above
_LIST_USES = text("""
SELECT period, began, used FROM quota_uses WHERE project_id = :project ORDER BY period, began DESC
""")
# Makes the rows of the periods that go on, or locks them. All do that in the same order.
_LOCK = text(f"""
WITH periods AS ({_PERIODS} AND project_id = ANY(:projects)
), forgotten AS (
    DELETE FROM quota_uses
     WHERE project_id = ANY(:projects) AND period IN ('daily', 'monthly')
       AND began < CAST(now() AS date) - :days
), locked AS (
    INSERT INTO quota_uses (project_id, period, began)
    SELECT project_id, period, began FROM periods ORDER BY project_id, period
        ON CONFLICT (project_id, period, began) DO UPDATE SET used = quota_uses.used
    RETURNING project_id, period, used, warned_for
)
SELECT project_id, {_STANDING} FROM periods JOIN locked USING (project_id, period)
 ORDER BY project_id, period
""")  # noqa: S608 - as above
_TAKE = text("""
UPDATE quota_uses SET used = quota_uses.used + taken.events,
       warned_for = coalesce(taken.warned_for, quota_uses.warned_for)
  FROM unnest(CAST(:projects AS text[]), CAST(:periods AS text[]), CAST(:began AS date[]),
              CAST(:events AS bigint[]), CAST(:warned_for AS bigint[])
       ) AS taken (project_id, period, began, events, warned_for)
 WHERE (quota_uses.project_id, quota_uses.period, quota_uses.began)
     = (taken.project_id, taken.period, taken.began)
""")
_GIVE_BACK = text("""
WITH returned AS (
    SELECT project_id, period, began, sum(events) AS events
      FROM unnest(CAST(:projects AS text[]), CAST(:periods AS text[]), CAST(:began AS date[]),
                  CAST(:events AS bigint[])) AS one (project_id, period, began, events)
     GROUP BY project_id, period, began
), locked AS (
    SELECT project_id, period, began, returned.events
      FROM quota_uses JOIN returned USING (project_id, period, began)
     ORDER BY project_id, period, began FOR UPDATE OF quota_uses
)
UPDATE quota_uses SET used = greatest(0, used - locked.events) FROM locked
 WHERE (quota_uses.project_id, quota_uses.period, quota_uses.began)
     = (locked.project_id, locked.period, locked.began)
""")


class Standing(NamedTuple):
    """A project's quota of the period that goes on, and what is used of it.

    The period takes `seconds`, and ends in `ends_in` seconds.
    """

    period: str
    events: int
    began: date
    seconds: int
    ends_in: float
    used: int
    warned_for: int | None

    @property
    def left(self) -> int:
        """Return how many events are left; none if the quota was lowered below what is used."""
        return max(0, self.events - self.used)


class PeriodUse(NamedTuple):
    """What was used of a quota in a period."""

    period: str
    began: date
    used: int


class Share(NamedTuple):
    """How much of a quota is used: 1.0 is all of it."""

    project_id: str
    period: str
    used: float


class Change(NamedTuple):
    """Events that are taken of a quota in a period, or given back to it."""

    project_id: str
    period: str
    began: date
    events: int
    warned_for: int | None = None


def find_quota(connection: Connection, project_id: str) -> Quota | None:
    """Return a project's quota, or None if it has none."""
    row = connection.execute(_FIND, {"project": project_id}).one_or_none()
    return None if row is None else Quota(*row)


def set_quota(connection: Connection, project_id: str, quota: Quota) -> None:
    """Give a project another quota, or take it away if nothing is limited by it."""
    if quota == Quota():
        connection.execute(_REMOVE, {"project": project_id})
    else:
        connection.execute(_SET, {"project": project_id, **quota._asdict()})


def list_standings(
    connection: Connection, project_id: str | None = None
) -> list[tuple[str, Standing]]:
    """Return the projects that have a quota, or one of them, each with each period."""
    rows = connection.execute(_LIST, {"project": project_id})
    return [(project, Standing(*columns)) for project, *columns in rows]


def list_uses(connection: Connection, project_id: str) -> list[PeriodUse]:
    """Return what a project has used in each period, the latest first."""
    return [PeriodUse(*row) for row in connection.execute(_LIST_USES, {"project": project_id})]


def list_shares(connection: Connection) -> list[Share]:
    """Return how much of the quotas is used; if there are many, of those that are used most."""
    return [Share(*row) for row in connection.execute(_WATCH, {"limit": _MAX_WATCHED})]


def lock_standings(connection: Connection, projects: Collection[str]) -> dict[str, list[Standing]]:
    """Return how these projects stand; nobody else changes that until the transaction ends.

    A project without a quota is missing.
    """
    standings: dict[str, list[Standing]] = {}
    rows = connection.execute(_LOCK, {"projects": list(projects), "days": _KEPT_DAYS})
    for project, *columns in rows:
        standings.setdefault(project, []).append(Standing(*columns))
    return standings


def take_events(connection: Connection, changes: Sequence[Change]) -> None:
    """Take events of quotas that `lock_standings` has locked."""
    connection.execute(_TAKE, _columns_of(changes))


def give_back_events(connection: Connection, changes: Sequence[Change]) -> None:
    """Give back events that were taken and not used, whichever period they were taken in."""
    connection.execute(_GIVE_BACK, _columns_of(changes))


def _columns_of(changes: Iterable[Change]) -> dict[str, list[object]]:
    projects, periods, began, events, warned_for = map(list, zip(*changes, strict=True))
    return {
        "projects": projects,
        "periods": periods,
        "began": began,
        "events": events,
        "warned_for": warned_for,
    }
