"""Questions of the preflight about a server, a role and a table. Nothing here writes or locks rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from audit_archiver.postgres import connect
from audit_archiver.postgres.catalog import Reference, Shape
from audit_archiver.postgres.quoting import ident

_SERVER_SQL = """
SELECT current_setting('server_version_num')::int, current_user::text, current_setting('server_encoding'), pg_is_in_recovery(),
       current_setting('fsync') = 'on', current_setting('full_page_writes') = 'on', current_setting('synchronous_commit'),
       has_database_privilege(current_database(), 'TEMP'), has_function_privilege('pg_control_system()', 'EXECUTE')
         AND has_function_privilege('pg_control_checkpoint()', 'EXECUTE'),
       pg_backend_pid(), (SELECT s.version FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid() AND s.ssl)
"""

_RIGHTS_SQL = """
SELECT has_schema_privilege(c.relnamespace, 'USAGE'), has_table_privilege(c.oid, 'SELECT'), has_table_privilege(c.oid, 'DELETE'),
       has_any_column_privilege(c.oid, 'UPDATE'), pg_has_role(c.relowner, 'USAGE') OR pg_has_role(d.datdba, 'USAGE')
FROM pg_class c, pg_database d WHERE d.datname = current_database() AND c.oid = %s
"""

_TIMESTAMP_INDEX_SQL = """
SELECT x.relname FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = (i.indkey::int2[])[0]
WHERE i.indrelid = %s AND a.attname = %s AND i.indisvalid AND i.indpred IS NULL AND m.amname = 'btree'
ORDER BY i.indnkeyatts DESC, x.relname LIMIT 1
"""

_PUBLISHED_SQL = """
WITH RECURSIVE above(oid) AS (
  SELECT %s::oid UNION SELECT i.inhparent FROM above a JOIN pg_class c ON c.oid = a.oid AND c.relispartition
  JOIN pg_inherits i ON i.inhrelid = a.oid)
SELECT p.pubname, p.pubdelete AND NOT CASE c.relreplident WHEN 'f' THEN true WHEN 'n' THEN false
         WHEN 'i' THEN EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident)
         ELSE EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary) END
FROM pg_publication_tables t JOIN pg_publication p ON p.pubname = t.pubname
JOIN pg_namespace n ON n.nspname = t.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename
WHERE c.oid IN (SELECT oid FROM above) ORDER BY p.pubname
"""

# By the column widths that ANALYZE found, which bloat does not touch, and the chunks of TOAST, which they leave out.
_WIDTH_SQL = """
SELECT CASE WHEN c.reltuples > 0 THEN (
  least(pg_relation_size(c.oid) / c.reltuples, (
    SELECT sum(s.avg_width * (1 - s.null_frac)) + 28 FROM pg_stats s JOIN pg_namespace n ON n.nspname = s.schemaname
    WHERE n.oid = c.relnamespace AND s.tablename = c.relname AND NOT s.inherited))
  + coalesce(least(pg_relation_size(t.oid), CASE WHEN t.reltuples > 0 THEN t.reltuples * 2032 END), 0) / c.reltuples)::float8
  ELSE 0 END
FROM pg_class c LEFT JOIN pg_class t ON t.oid = c.reltoastrelid WHERE c.oid = %s
"""

_LOCKS_SQL = """
SELECT l.mode, CASE WHEN l.pid IS NULL THEN 'a prepared transaction' ELSE format('backend %%s of role ''%%s''', l.pid, a.usename)
         || coalesce(' (''' || a.application_name || ''', transaction since '
                     || to_char(a.xact_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS"Z"') || ')', '') END
FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.granted AND l.relation = %s AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND coalesce(a.application_name, '') NOT LIKE 'audit-archiver %%' ORDER BY a.xact_start, l.pid
"""

_SLOTS_SQL = """
SELECT slot_name::text, active FROM pg_replication_slots WHERE slot_type = 'logical' AND database = current_database() ORDER BY 1
"""

# AT TIME ZONE takes the session's own default: what a connection has that sets nothing.
_CLOCK_CHANGES_SQL = """
SELECT z.reset_val, count(DISTINCT (g AT TIME ZONE z.reset_val) - (g AT TIME ZONE 'UTC')) > 1
FROM pg_settings z, generate_series(now() - interval '1 year', now(), interval '1 week') g WHERE z.name = 'TimeZone' GROUP BY 1
"""

_KEPT_BY_SQL = """
SELECT rn.nspname || '.' || r.relname, fn.nspname || '.' || f.relname
FROM pg_constraint c JOIN pg_class r ON r.oid = c.conrelid JOIN pg_namespace rn ON rn.oid = r.relnamespace
JOIN pg_class f ON f.oid = c.confrelid JOIN pg_namespace fn ON fn.oid = f.relnamespace
WHERE c.contype = 'f' AND c.confdeltype IN ('a', 'r') AND r.oid <> f.oid ORDER BY 1, 2
"""


@dataclass(frozen=True)
class Server:
    """What matters about a server and our role on it. `tls` is the protocol's name, None without TLS."""

    version: int
    user: str
    encoding: str
    standby: bool
    fsync: bool
    full_page_writes: bool
    synchronous_commit: str
    may_temp: bool
    may_identify: bool
    backend_pid: int
    tls: Optional[str]


@dataclass(frozen=True)
class Rights:
    """What our role may do with a table; `lock` is SELECT ... FOR UPDATE, which needs UPDATE on one column (S13)."""

    schema: bool
    select: bool
    delete: bool
    lock: bool
    vacuum: bool


@dataclass(frozen=True)
class Locked:
    """A lock that another session holds on the table: its mode, and who that is."""

    mode: str
    who: str

    @property
    def blocks(self) -> bool:
        """Whether it keeps rows from being locked or deleted."""
        return self.shuts or self.mode in ("ShareLock", "ShareRowExclusiveLock", "ExclusiveLock")

    @property
    def shuts(self) -> bool:
        """Whether it keeps rows even from being read."""
        return self.mode == "AccessExclusiveLock"


@dataclass(frozen=True)
class Slot:
    """A logical replication slot of the database; nobody reads from it unless it is `active`."""

    name: str
    active: bool


@dataclass(frozen=True)
class Publication:
    """A publication that the table is part of; with `blocks` set a DELETE fails for want of a replica identity."""

    name: str
    blocks: bool


def server(connection: connect.Connection) -> Server:
    """The server behind `connection`."""
    return Server(*connect.row(connection, _SERVER_SQL))


def pooled(connection: connect.Connection, found: Server) -> bool:
    """True if a pooler sits between: it makes up the process id that the client was told."""
    return connection.info.backend_pid != found.backend_pid


def rights(connection: connect.Connection, oid: int) -> Rights:
    """Our rights on a table; MAINTAIN (PostgreSQL 17) allows a vacuum too."""
    found = Rights(*connect.row(connection, _RIGHTS_SQL, (oid,)))
    if not found.vacuum and connection.server_version >= 170000:
        maintain = connect.scalar(connection, "SELECT has_table_privilege(%s::oid, 'MAINTAIN')", (oid,))
        return Rights(found.schema, found.select, found.delete, found.lock, maintain)
    return found


def may_read(connection: connect.Connection, schema: str, name: str) -> bool:
    """Whether our role may read a table that references ours."""
    return connect.scalar(connection, (
        "SELECT coalesce(bool_and(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')), false) "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s"), (schema, name))


def references_something(connection: connect.Connection, reference: Reference) -> bool:
    """Whether any row of the child table references ours."""
    used = " AND ".join(f"c.{ident(column)} IS NOT NULL" for column in reference.columns)
    return connect.scalar(connection, f"SELECT EXISTS (SELECT FROM {ident(reference.schema)}.{ident(reference.child)} c WHERE {used})")


def timestamp_index(connection: connect.Connection, shape: Shape) -> Optional[str]:
    """A usable index whose first column is the timestamp, or None."""
    found = connect.rows(connection, _TIMESTAMP_INDEX_SQL, (shape.oid, shape.timestamp))
    return found[0][0] if found else None


def heap_bytes(connection: connect.Connection, shape: Shape) -> int:
    """What a scan of the whole table reads."""
    return connect.scalar(connection, "SELECT pg_relation_size(%s::oid)", (shape.oid,))


def table_bytes(connection: connect.Connection, shape: Shape) -> int:
    """What a table takes with its TOAST and without its indexes."""
    return connect.scalar(connection, "SELECT pg_table_size(%s::oid)", (shape.oid,))


def bytes_per_row(connection: connect.Connection, shape: Shape) -> float:
    """The mean width of a row as it is stored, TOAST included, as far as the last vacuum or analyze knows; 0 if nobody knows."""
    return connect.scalar(connection, _WIDTH_SQL, (shape.oid,))


def has_timestamps(connection: connect.Connection, shape: Shape) -> bool:
    """False if the table has rows and none of them has a timestamp that can be older than another."""
    table, column = f"ONLY {shape.qualified} t", f"t.{ident(shape.timestamp)}"
    return connect.scalar(connection, f"SELECT EXISTS (SELECT FROM {table} WHERE isfinite({column})) OR NOT EXISTS (SELECT FROM {table})")


def publications(connection: connect.Connection, shape: Shape) -> list[Publication]:
    """The publications whose subscribers will lose the archived rows too (S13); the view is slow, and mostly empty."""
    if not connect.scalar(connection, "SELECT EXISTS (SELECT FROM pg_publication)"):
        return []
    return [Publication(*row) for row in connect.rows(connection, _PUBLISHED_SQL, (shape.oid,))]


def locks(connection: connect.Connection, shape: Shape) -> list[Locked]:
    """The locks that others hold on the table now, the oldest transaction first; our own sessions are none of them."""
    return [Locked(*row) for row in connect.rows(connection, _LOCKS_SQL, (shape.oid,))]


def slots(connection: connect.Connection) -> list[Slot]:
    """The logical replication slots of this database: each of them gets every delete."""
    return [Slot(*row) for row in connect.rows(connection, _SLOTS_SQL)]


def changing_clock(connection: connect.Connection) -> Optional[str]:
    """The database's time zone if its offset from UTC changed within a year (summer time), else None."""
    zone, changes = connect.row(connection, _CLOCK_CHANGES_SQL)
    return zone if changes else None


def kept_by(connection: connect.Connection) -> list[tuple[str, str]]:
    """(table, other table) wherever rows of the first keep rows of the second by a plain foreign key, as schema.name."""
    return [(child, parent) for child, parent in connect.rows(connection, _KEPT_BY_SQL)]
