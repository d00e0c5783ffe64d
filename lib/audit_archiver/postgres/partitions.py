"""Configured tables as the physical tables that hold their rows: partitions and inheritance children.

Every statement names one physical table with ONLY: a ctid is no address on a parent, and a child may have columns that
its parent lacks (postgres.md C6). So a parent in the configuration stands for its leaves, each of which is planned,
archived and recorded under its own name with the parent's settings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional, Sequence

from audit_archiver.config.model import Database, Table
from audit_archiver.postgres import connect

# Below each table, itself included; a partitioned table holds no rows, a parent by inheritance may. In the order of their
# bounds as they are written, the default partition last: the oldest first where a partition is a month or a day.
_BELOW_SQL = """
WITH RECURSIVE below(place, oid, path) AS (
  SELECT w.place, c.oid, ARRAY['' COLLATE "C"] FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS w(schema, name, place)
  JOIN pg_namespace n ON n.nspname = w.schema JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
  WHERE c.relkind IN ('r', 'p')
  UNION ALL
  SELECT b.place, c.oid, b.path || (CASE WHEN pg_get_expr(c.relpartbound, c.oid) = 'DEFAULT' THEN '2' ELSE '1' END
                                    || coalesce(pg_get_expr(c.relpartbound, c.oid), '') || c.relname) COLLATE "C"
  FROM below b JOIN pg_inherits i ON i.inhparent = b.oid JOIN pg_class c ON c.oid = i.inhrelid)
SELECT b.place::int, n.nspname::text, c.relname::text FROM below b JOIN pg_class c ON c.oid = b.oid
JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind <> 'p' ORDER BY b.place, b.path
"""

_ABOVE_SQL = """
WITH RECURSIVE above(oid, height) AS (
  SELECT c.oid, 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s
  UNION ALL SELECT i.inhparent, a.height + 1 FROM above a JOIN pg_inherits i ON i.inhrelid = a.oid)
SELECT n.nspname::text, c.relname::text FROM above a JOIN pg_class c ON c.oid = a.oid JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY a.height, 1, 2
"""


def leaves(connection: connect.Connection, tables: Sequence[Table]) -> list[Table]:
    """The physical tables that `tables` stand for, in their order. One that does not exist, or has no partition yet, stays
    as it is: whoever reads its shape says what is wrong. A leaf that is configured by itself keeps its own settings."""
    own = {(table.schema, table.name) for table in tables}
    found: dict[int, list[tuple[str, str]]] = {}
    for place, schema, name in connect.rows(connection, _BELOW_SQL, ([table.schema for table in tables], [table.name for table in tables])):
        found.setdefault(place, []).append((schema, name))
    physical: list[Table] = []
    for place, table in enumerate(tables, 1):
        for schema, name in found.get(place, [(table.schema, table.name)]):
            if (schema, name) == (table.schema, table.name) or (schema, name) not in own:
                physical.append(replace(table, schema=schema, name=name))
                own.add((schema, name))
    return physical


def configured(connection: connect.Connection, database: Database, schema: str, name: str) -> Optional[Table]:
    """The configured table that stands for a physical one: itself, or the nearest parent that is configured; None if none is."""
    found = database.table(schema, name)
    if found is not None:
        return found
    above = (database.table(*parent) for parent in lineage(connection, schema, name))
    return next((table for table in above if table is not None), None)


def lineage(connection: connect.Connection, schema: str, name: str) -> list[tuple[str, str]]:
    """(schema, name) of a table and of everything above it, the nearest first; nothing if it does not exist."""
    return [(row[0], row[1]) for row in connect.rows(connection, _ABOVE_SQL, (schema, name))]
