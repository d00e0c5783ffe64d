"""How much room a table takes, and what a vacuum really did about it.

VACUUM keeps the freed room inside the table; only empty pages at the very end go back to the operating system
(measured: after deleting the oldest 80 % of a table, 0 of 88,896 kB). So there are two figures, always both:
*reusable* inside the table and *returned*. A VACUUM by somebody who may not do it is a WARNING and ends well, and
one that an old snapshot holds up removes nothing: what it did is read from the statistics (postgres.md S13).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Optional

from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import ident

STRATEGIES = {"analyze": "ANALYZE", "standard": "VACUUM (ANALYZE)", "full": "VACUUM (FULL, ANALYZE)"}
STATISTICS_S = 5.0  # before PostgreSQL 15 the statistics arrive by a collector, half a second late
LOOK_AGAIN_S = 0.05
UNREMOVED_SHARE = 0.01

_SIZE_SQL = """
SELECT pg_total_relation_size(c.oid), pg_table_size(c.oid) - coalesce(pg_total_relation_size(nullif(c.reltoastrelid, 0)), 0),
       coalesce(pg_total_relation_size(nullif(c.reltoastrelid, 0)), 0), pg_indexes_size(c.oid), c.reltuples::bigint
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s AND c.relkind = 'r'
"""

_MARKS_SQL = """
SELECT s.vacuum_count, s.analyze_count, pg_relation_filenode(c.oid)::bigint, s.n_dead_tup, current_setting('track_counts')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_stat_all_tables s ON s.relid = c.oid
WHERE n.nspname = %s AND c.relname = %s
"""

_OLD_SNAPSHOT_SQL = """
SELECT who FROM (
  SELECT greatest(age(backend_xmin), age(backend_xid)) AS xmin_age, format('backend %s (''%s'', transaction since %s)', pid, application_name,
         to_char(xact_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS"Z"')) AS who
    FROM pg_stat_activity WHERE coalesce(backend_xmin, backend_xid) IS NOT NULL AND pid <> pg_backend_pid()
  UNION ALL SELECT age(coalesce(xmin, catalog_xmin)), format('replication slot ''%s''', slot_name)
    FROM pg_replication_slots WHERE coalesce(xmin, catalog_xmin) IS NOT NULL
  UNION ALL SELECT age(transaction), format('prepared transaction ''%s''', gid) FROM pg_prepared_xacts
    WHERE database = current_database()) AS holders
ORDER BY xmin_age DESC LIMIT 1
"""


@dataclass(frozen=True)
class Space:
    """Bytes of a table on disk; `heap` and `toast` with their maps and TOAST's index, `rows` as the server estimates them."""

    total: int
    heap: int
    toast: int
    indexes: int
    rows: int


@dataclass(frozen=True)
class Effect:
    """What a vacuum or analyze did: `done` by the statistics, `unremoved` dead rows that somebody may still see."""

    done: bool
    seconds: float
    unremoved: int = 0
    said: tuple[str, ...] = ()
    held_by: Optional[str] = None


def measure(connection: connect.Connection, schema: str, name: str) -> Optional[Space]:
    """The sizes of a plain table (REQ-VAC-004, 005), or None if there is none of that name."""
    found = connect.rows(connection, _SIZE_SQL, (schema, name))
    return Space(*found[0]) if found else None


def vacuum(connection: connect.Connection, schema: str, name: str, strategy: str, *, verbose: bool = False) -> Effect:
    """Run `strategy` (analyze, standard, full) on one table and find out whether it happened (REQ-VAC-001, 003, 013).

    The connection must be in autocommit and nothing of ours may be open: VACUUM removes no row that an open
    transaction can still see. `full` takes an ACCESS EXCLUSIVE lock for as long as it rewrites the table; it waits
    for it no longer than the session's lock_timeout. Raises Retryable when that time is up.
    """
    sql = f"{_with_verbose(STRATEGIES[strategy]) if verbose else STRATEGIES[strategy]} {ident(schema)}.{ident(name)}"
    before = _marks(connection, schema, name)
    del connection.notices[:]
    began = time.monotonic()
    connect.execute(connection, sql)
    seconds = time.monotonic() - began
    said = tuple(" ".join(text.split()) for text in connection.notices)
    after, done = _after(connection, schema, name, strategy, before, warned=any(text.startswith("WARNING") for text in said))
    unremoved = after[3] if done and strategy == "standard" else 0
    held_by = _old_snapshot(connection) if unremoved else None
    return Effect(done, seconds, unremoved, said, held_by)


def reusable(before: Space, after: Space, deleted: int, unremoved: int) -> int:
    """Bytes that the `deleted` rows left free inside the table: their share of heap and TOAST, less what was returned.

    An estimate without extensions: rows count as equally wide, and room that was free before the run stays out of
    it, so it says rather too little. Indexes are not counted: a page of an index is free only when all of it is.
    """
    all_rows = max(after.rows, 0) + deleted
    if not all_rows:
        return 0
    share = max(0, deleted - unremoved) / all_rows
    parts = ((before.heap, after.heap), (before.toast, after.toast))
    return sum(max(0, int(max(was, now) * share) - max(0, was - now)) for was, now in parts)


def _with_verbose(command: str) -> str:
    return command.replace("ANALYZE)", "ANALYZE, VERBOSE)") if "(" in command else f"{command} VERBOSE"


def _marks(connection: connect.Connection, schema: str, name: str) -> tuple[Any, ...]:
    found = connect.rows(connection, _MARKS_SQL, (schema, name))
    return found[0] if found else (0, 0, None, 0, "off")


def _after(connection: connect.Connection, schema: str, name: str, strategy: str, before: tuple[Any, ...], *,
           warned: bool) -> tuple[tuple[Any, ...], bool]:
    """The marks once they show what happened, and whether it did; VACUUM FULL shows in the file, not in a counter."""
    place = {"analyze": 1, "standard": 0, "full": 2}[strategy]
    deadline = time.monotonic() + (0.0 if warned else STATISTICS_S)
    while True:
        now = _marks(connection, schema, name)
        if now[place] != before[place]:
            return now, True
        if now[4] != "on" and strategy != "full":
            return now, not warned
        if time.monotonic() >= deadline:
            return now, False
        time.sleep(LOOK_AGAIN_S)


def _old_snapshot(connection: connect.Connection) -> Optional[str]:
    """Who keeps dead rows from being removed, as far as this role may see."""
    found = connect.rows(connection, _OLD_SNAPSHOT_SQL)
    return found[0][0] if found else None
