"""Who waits for our transactions, and which locks they hold that nobody expects of them; reads only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from audit_archiver.postgres import connect

# pg_blocking_pids stops the lock manager for a moment, so it is asked of those only that wait for a lock at all
_WAITING_SQL = """
SELECT a.pid, a.application_name, coalesce(a.usename::text, 'a role that is not shown'), l.locktype = 'relation',
       coalesce(l.relation::regclass::text, '')
FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid AND NOT l.granted
WHERE a.wait_event_type = 'Lock' AND a.pid <> ALL(%s) AND pg_blocking_pids(a.pid) && %s ORDER BY a.pid
"""

_STRONG_SQL = """
SELECT l.relation::regclass::text, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE l.locktype = 'relation' AND l.granted AND l.pid = ANY(%s) AND c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
  AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock') ORDER BY 1, 2
"""


@dataclass(frozen=True)
class Waiting:
    """A session that waits for us: for the table (to alter it, for instance) or for rows."""

    pid: int
    application: str
    user: str
    for_table: bool
    table: str

    @property
    def words(self) -> str:
        """Who it is."""
        return f"{self.application or self.user} (backend {self.pid})"


def behind(connection: connect.Connection, pids: Sequence[int]) -> list[Waiting]:
    """The sessions, other than `pids`, that wait for a lock behind one of the backends `pids` (REQ-LOCK-006)."""
    return [Waiting(*row) for row in connect.rows(connection, _WAITING_SQL, (list(pids), list(pids)))]


def strong_locks(connection: connect.Connection, pids: Sequence[int]) -> list[tuple[str, str]]:
    """(table, mode) of each lock of the backends `pids` on a whole table that readers or writers would feel (REQ-LOCK-009)."""
    return [(table, mode) for table, mode in connect.rows(connection, _STRONG_SQL, (list(pids),))]
