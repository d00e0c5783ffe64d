"""The scratch database and bucket: found empty, filled with tables of every type, weighed, and emptied again.

Everything in the database lies in one schema, and in the bucket under the prefix, where a marker object says whose it is:
so a self-test that was killed is recognized, and nothing of anybody else's can be removed.
"""

from __future__ import annotations

import time
from typing import Sequence

from audit_archiver import lines
from audit_archiver.exits import ConfigError
from audit_archiver.objectstore.client import Store
from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import ident, literal
from audit_archiver.selftest import values

SCHEMA = "aa_selftest"
ORIGIN = "origin"
MARKER = ".aa-selftest.json"
SHOWN = 5

_RELATIONS_SQL = """
SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
  AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 1, 2"""
_SCHEMA_SQL = "SELECT count(*) FROM pg_namespace WHERE nspname = %s"


class Scratch:
    """A database, by a connection, and the place in a bucket."""

    def __init__(self, connection: connect.Connection, store: Store) -> None:
        self._connection, self._store = connection, store
        self.types: list[str] = []
        self.lacking: list[str] = []

    def require_empty(self) -> None:
        """Raise ConfigError unless there is nothing of anybody's in the database and under the prefix."""
        ours, others = self._tables()
        marked, objects = self._objects()
        if others or objects and not marked:
            named = ", ".join([*others, *objects][:SHOWN])
            where = "the database" if others else f"'{self._store.url(self._store.prefix)}'"
            raise ConfigError(f"{where} is not empty: {named}" + (" and more" if len(others) + len(objects) > SHOWN else ""),
                              hint="a self-test deletes rows and objects: give it a database and a bucket (or prefix) that hold nothing")
        if ours or objects:
            raise ConfigError(f"an earlier self-test was killed: {self.left()} are left of it", hint="--clean removes them")

    def remove(self) -> str:
        """Remove the schema and, where the marker lies, what is under the prefix, the marker last; what is left, in words, or ''."""
        connect.execute(self._connection, f"DROP SCHEMA IF EXISTS {ident(SCHEMA)} CASCADE")
        marked, objects = self._objects()
        if marked:
            for key in objects:
                if not key.endswith(MARKER):
                    self._store.delete(key)
            for key, upload, _ in list(self._store.unfinished_uploads(self._store.prefix)):
                self._store.abort_upload(key, upload)
            self._store.delete(self._store.prefix + MARKER)
        return self.left()

    def left(self) -> str:
        """What there is of a self-test, in words, or ''."""
        ours, _ = self._tables()
        _, objects = self._objects()
        found = [f"schema '{SCHEMA}' with {len(ours)} tables"] if ours else []
        found += [f"{len(objects)} objects under '{self._store.url(self._store.prefix)}'"] if objects else []
        return " and ".join(found)

    def claim(self) -> None:
        """Say in both places that they are ours, the bucket first."""
        made = {"format": "aa-selftest-marker", "version": 1, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self._store.put_new(self._store.prefix + MARKER, lines.dump(made))
        connect.execute(self._connection, f"CREATE SCHEMA {ident(SCHEMA)}")

    def fill(self, rows: int, row_bytes: int) -> None:
        """Make the table that all others are copies of: a column of each type the server has, nine rows of ten old, `row_bytes` more in each."""
        there, self.lacking = values.known(self._connection)
        self.types = list(there)
        columns = {f"a {name}": (name, texts) for name, texts in there.items()}
        made = ", ".join(f"{ident(column)} {name}" for column, (name, _) in columns.items())
        table = f"{ident(SCHEMA)}.{ident(ORIGIN)}"
        connect.execute(self._connection, f"CREATE TABLE {table} (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, {made}, payload text)")
        picked = ", ".join(f"(ARRAY[{', '.join(map(literal, texts))}, NULL])[1 + i %% {len(texts) + 1}]::{name}" for name, texts in columns.values())
        connect.execute(self._connection, f"INSERT INTO {table} SELECT i, CASE WHEN i %% 10 = 0 THEN now() ELSE '2020-01-01'::timestamptz + i * "
                        f"interval '1 minute' END, {picked}, substr(repeat(md5(i::text), %s), 1, %s) FROM generate_series(1, %s) AS i",
                        (row_bytes // 32 + 1, row_bytes, rows))

    def copy(self, table: str) -> tuple[int, str]:
        """A new table with the rows of the first one; its digest."""
        name, origin = f"{ident(SCHEMA)}.{ident(table)}", f"{ident(SCHEMA)}.{ident(ORIGIN)}"
        connect.execute(self._connection, f"CREATE TABLE {name} (LIKE {origin} INCLUDING ALL)")
        connect.execute(self._connection, f"INSERT INTO {name} SELECT * FROM {origin}")
        connect.execute(self._connection, f"CREATE INDEX ON {name} (created_at, id)")
        connect.execute(self._connection, f"ANALYZE {name}")
        return self.digest(table)

    def digest(self, *tables: str) -> tuple[int, str]:
        """(rows, SHA-256 over all rows of the tables together, whatever their order)."""
        parts = " UNION ALL ".join(f"SELECT encode(sha256(convert_to(ROW(t.*)::text, 'UTF8')), 'hex') AS h FROM {ident(SCHEMA)}.{ident(table)} t"
                                   for table in tables)
        found = connect.row(self._connection, "SELECT count(*), coalesce(encode(sha256(convert_to(string_agg(h, '' ORDER BY h), 'UTF8')), "
                            f"'hex'), '') FROM ({parts}) AS hashes")
        return int(found[0]), str(found[1])

    def due(self, table: str) -> int:
        """How many old rows are still in a table."""
        return int(connect.scalar(self._connection, f"SELECT count(*) FROM {ident(SCHEMA)}.{ident(table)} "
                                  "WHERE created_at < now() - interval '120 days'"))

    def _tables(self) -> tuple[list[str], list[str]]:
        """(our tables, those of others)."""
        found: Sequence[tuple[str, str]] = connect.rows(self._connection, _RELATIONS_SQL)  # type: ignore[assignment]
        ours = [name for schema, name in found if schema == SCHEMA]
        if not ours and connect.scalar(self._connection, _SCHEMA_SQL, (SCHEMA,)):
            ours = [SCHEMA]
        return ours, [f"{schema}.{name}" for schema, name in found if schema != SCHEMA]

    def _objects(self) -> tuple[bool, list[str]]:
        """(whether our marker is among them, every key under the prefix)."""
        keys = [entry.key for entry in self._store.list(self._store.prefix)]
        return self._store.prefix + MARKER in keys, keys
