"""What the table and the server can say about a batch whose run was interrupted: the two witnesses of recovery.

Everything is asked in one read-only snapshot and without a temporary table, so that a dry run can ask it too.
The status of a transaction id alone proves nothing: after a crash, a failover or a restore the same id can belong
to somebody else's committed transaction (postgres.md C1).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from dataclasses import dataclass
from typing import Any, Iterator, Optional, Sequence

from audit_archiver.exits import ArchiverError
from audit_archiver.postgres import catalog, connect
from audit_archiver.postgres.rows_sql import Statements, Window

KEYS_AT_ONCE = 2000
FUTURE_XID = "22023"  # invalid_parameter_value: what txid_status raises for an id that was never handed out

COMMITTED, ABORTED, IN_PROGRESS, UNKNOWN = "committed", "aborted", "in progress", "unknown"

_PLACE_SQL = f"""
SELECT s.system_identifier::text, {catalog.TIMELINE}, d.oid::bigint,
       (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END)::text,
       to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
FROM pg_control_system() s, pg_control_checkpoint() c, pg_database d WHERE d.datname = current_database()
"""

_WORKS_UNDER_SQL = """
SELECT 'backend ' || pid || ' (''' || application_name || ''', ' || coalesce(usename, '?') || ', since ' ||
       to_char(xact_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') || ')'
FROM pg_stat_activity WHERE backend_xid::text = %s
UNION ALL SELECT 'the prepared transaction ''' || gid || '''' FROM pg_prepared_xacts WHERE transaction::text = %s
"""


@dataclass(frozen=True)
class Place:
    """Which server, timeline and database this is, how far its log has come, and its time (RFC 3339, whole seconds)."""

    system: str
    timeline: int
    database_oid: int
    lsn: str
    now: str


def place(connection: connect.Connection) -> Place:
    """Where we are."""
    return Place(*connect.row(connection, _PLACE_SQL))


@contextlib.contextmanager
def snapshot(connection: connect.Connection) -> Iterator[None]:
    """Everything asked inside sees one state of the database and changes nothing."""
    connect.execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    try:
        yield
    finally:
        if connection.closed == 0:
            connect.execute(connection, "ROLLBACK")


def status(connection: connect.Connection, xid: str) -> str:
    """What the server says of a transaction id: COMMITTED, ABORTED, IN_PROGRESS, or UNKNOWN (too old, or never handed
    out here). Asked in a savepoint, since an id of the future raises."""
    connect.execute(connection, "SAVEPOINT aa_status")
    try:
        said = connect.scalar(connection, "SELECT txid_status(%s::bigint)", (xid,))
    except ArchiverError as error:
        if error.sqlstate != FUTURE_XID:
            raise
        connect.execute(connection, "ROLLBACK TO SAVEPOINT aa_status")
        return UNKNOWN
    return said or UNKNOWN


def works_under(connection: connect.Connection, xid: str) -> str:
    """Who works under a transaction id, in words."""
    short = str(int(xid) & 0xFFFFFFFF)
    found = connect.rows(connection, _WORKS_UNDER_SQL, (short, short))
    return found[0][0] if found else "a transaction that ended just now"


def is_here(server: dict[str, Any], here: Place, table_oid: int) -> bool:
    """True if a transaction id that was published with `server` means anything on this server, for this table."""
    return (server["system"], server["timeline"], server["database_oid"], server["table_oid"]) == (
        here.system, here.timeline, here.database_oid, table_oid)


class Table:
    """The table of a batch as it is now, with the columns that it had then.

    Raises ConfigError (gone, or no longer a table that can be archived) and PermissionDenied.
    """

    def __init__(self, connection: connect.Connection, batch: dict[str, Any]) -> None:
        self._connection = connection
        shape = catalog.shape(connection, batch["schema"], batch["table"], tuple(batch["key"]),
                              batch["timestamp"]).as_exported(batch["columns"])
        self.comparable = [[column.name, column.type] for column in shape.columns] == batch["columns"]
        self.oid = shape.oid
        self._statements = Statements(shape, Window(batch["cutoff"]))

    def present(self, key_texts: Sequence[bytes]) -> list[int]:
        """The numbers (from 1) of the keys that are in the table, in order."""
        return [row[0] for start in range(0, len(key_texts), KEYS_AT_ONCE)
                for row in connect.rows(self._connection, self._statements.numbers(
                    self._statements.key_list(key_texts[start:start + KEYS_AT_ONCE], start)))]

    def rows_sha256(self, key_texts: Sequence[bytes]) -> Optional[str]:
        """The digest of the rows with these keys, serialized again in this order; None if a column of the batch is
        gone or has another type."""
        if not self.comparable:
            return None
        digest = _Digest()
        for start in range(0, len(key_texts), KEYS_AT_ONCE):
            keys = self._statements.key_list(key_texts[start:start + KEYS_AT_ONCE], start)
            with connect.errors(), self._connection.cursor() as cursor:
                cursor.copy_expert(self._statements.copy_by_key(keys), digest)
        return digest.sha256.hexdigest()

    def digests(self, key_texts: Sequence[bytes]) -> Iterator[tuple[int, str]]:
        """(number from 1, SHA-256 of the row's JSON line) of each key that is in the table, in order."""
        return digests(self._connection, self._statements, key_texts)


def digests(connection: connect.Connection, statements: Statements, key_texts: Sequence[bytes]) -> Iterator[tuple[int, str]]:
    """(number from 1, SHA-256 of the row's JSON line) of each key that is in the table, in order."""
    for start in range(0, len(key_texts), KEYS_AT_ONCE):
        listed = statements.key_list(key_texts[start:start + KEYS_AT_ONCE], start)
        yield from connect.rows(connection, statements.digests_by_key(listed))


class _Digest(io.RawIOBase):
    """Hashes what COPY writes."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """Hash it."""
        self.sha256.update(data)
        return len(data)
