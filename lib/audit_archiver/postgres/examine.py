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


def bytes_per_row(connection: connect.Connection, shape: Shape) -> float:
    """The mean width of a row on disk, TOAST included, as far as the last vacuum or analyze knows; 0 if nobody knows."""
    return connect.scalar(connection, (
        "SELECT CASE WHEN c.reltuples > 0 THEN pg_table_size(c.oid) / c.reltuples::float8 ELSE 0 END FROM pg_class c WHERE c.oid = %s"),
        (shape.oid,))


def has_timestamps(connection: connect.Connection, shape: Shape) -> bool:
    """False if the table has rows and none of them has a timestamp."""
    table, column = f"ONLY {shape.qualified} t", f"t.{ident(shape.timestamp)}"
    return connect.scalar(connection, f"SELECT EXISTS (SELECT FROM {table} WHERE {column} IS NOT NULL) OR NOT EXISTS (SELECT FROM {table})")


def publications(connection: connect.Connection, shape: Shape) -> list[Publication]:
    """The publications whose subscribers will lose the archived rows too (S13)."""
    return [Publication(*row) for row in connect.rows(connection, _PUBLISHED_SQL, (shape.oid,))]
