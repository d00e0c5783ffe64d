"""Who holds the advisory keys of a database, since when; and how such a session is ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Optional

from audit_archiver.postgres import connect, locks

_HOLDERS_SQL = """
SELECT l.pid, CASE l.classid WHEN %s THEN 'run' ELSE 'transaction' END, l.mode <> 'ExclusiveLock',
       CASE WHEN l.objid = 0 THEN NULL ELSE coalesce(n.nspname || '.' || c.relname, l.objid::text) END,
       split_part(a.application_name, ' #', 1), a.usename::text, coalesce(host(a.client_addr), 'local socket'),
       to_char(since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), extract(epoch FROM clock_timestamp() - since)::float8, a.state,
       CASE l.classid WHEN %s THEN nullif(split_part(a.application_name, ' #', 2), '')::bigint END,
       CASE WHEN l.classid = %s THEN CASE WHEN a.state LIKE 'idle%%' THEN extract(epoch FROM clock_timestamp() - a.state_change)::float8
                                          WHEN a.state IS NOT NULL THEN 0 END END
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
     CROSS JOIN LATERAL (SELECT CASE l.classid WHEN %s THEN a.backend_start ELSE coalesce(a.xact_start, a.backend_start) END) s(since)
     LEFT JOIN pg_class c ON c.oid = l.objid AND l.objid <> 0 LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE l.locktype = 'advisory' AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.classid IN (%s, %s) AND l.objsubid = 2 AND l.pid <> pg_backend_pid()
  AND (%s::text IS NULL OR l.objid = 0 OR n.nspname || '.' || c.relname = %s)
ORDER BY a.backend_start, l.pid, l.classid, l.objid
"""


@dataclass(frozen=True)
class Holder:
    """A session with one of our keys. `kind` is run (K1: a driver's control connection) or transaction (K2: a batch);
    `table` is None for the database's key; `since` is when the session, or the transaction, began. Of a run, `token` is
    the fencing token of its last taking and `heartbeat_age_s` how long its session has been silent, None where the server does not tell."""

    pid: int
    kind: str
    shared: bool
    table: Optional[str]
    application: str
    user: str
    client: str
    since: str
    age_s: float
    state: Optional[str]
    token: Optional[int] = None
    heartbeat_age_s: Optional[float] = None

    @property
    def words(self) -> str:
        """One line for a person."""
        what = "locked" if self.kind == "run" else "used by a batch's transaction"
        more = "" if self.token is None else f", token {self.token}"
        more += "" if self.heartbeat_age_s is None else f", heartbeat {self.heartbeat_age_s:.0f} s ago"
        return (f"{what} by backend {self.pid} ('{self.application}', {self.user} from {self.client}, since {self.since}, "
                f"{self.state or 'state unknown'}{more})")

    def as_json(self) -> dict[str, Any]:
        """What --output json says."""
        return asdict(self)


def holders(connection: connect.Connection, table: Optional[str] = None) -> list[Holder]:
    """Every session that holds a key of the current database; with `table` (schema.table) only of its scope."""
    args = (locks.K1_CLASS,) * 5 + (locks.K2_CLASS, table, table)
    return [Holder(*row) for row in connect.rows(connection, _HOLDERS_SQL, args)]


def end(connection: connect.Connection, pids: list[int], table: Optional[str] = None) -> list[int]:
    """End those of the sessions `pids` that still hold a key, and wait until the server has freed it; returns them.

    Raises PermissionDenied without the role's membership or pg_signal_backend, Failed if one does not go.
    """
    found = sorted({each.pid for each in holders(connection, table)} & set(pids))
    locks.end(connection, found)
    return found
