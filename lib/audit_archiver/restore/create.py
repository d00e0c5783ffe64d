"""The table made again from the archived DDL (`--create-table`), under its own name or another.

What keeps rows apart comes before the rows: the table, its keys, unique and check constraints. Other indexes, foreign keys
and comments come after them, and a rerun makes what is missing of them.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Iterable, Optional, Sequence

from audit_archiver import lines, log
from audit_archiver.catalogue import index
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import ArchiverError, ConfigError, Mismatch
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import ident
from audit_archiver.restore.target import Place

DUPLICATE_OBJECT = "42710"
METADATA_BYTES_MOST = 64 << 20

_NAME = r'(?:"(?:[^"]|"")+"|[^\s".]+)'
_INDEX = re.compile(rf"CREATE (UNIQUE )?INDEX {_NAME} ON (?:ONLY )?{_NAME}(?:\.{_NAME})? (USING .*)", re.DOTALL)
_CONSTRAINT = re.compile(rf"ADD CONSTRAINT ({_NAME}) (.*)", re.DOTALL)

_INDEXES_SQL = "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = %s"
_CONSTRAINTS_SQL = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s"


def read_metadata(store: Store, stem: str) -> dict[str, Any]:
    """A batch's metadata. Raises Mismatch unless they are those that its commit record names, NotFound if there are none."""
    line = index.read_commit(store, stem)
    key = stem + names.METADATA
    content = store.get_bytes(key, METADATA_BYTES_MOST)
    if hashlib.sha256(content).hexdigest() != line["serialized"]["metadata_sha256"]:
        raise Mismatch(f"'{store.url(key)}' are not the metadata that were verified")
    value = lines.parse(content, f"'{store.url(key)}'")
    schema.validate("metadata", value, f"'{store.url(key)}'")
    return dict(value)


def with_ddl(batches: Sequence[Batch]) -> list[Batch]:
    """The first batch of each run, of the newest run first: in their metadata the DDL stands."""
    first: dict[str, Batch] = {}
    for batch in sorted((batch for batch in batches if batch.run is not None), key=lambda batch: (str(batch.run), -(batch.number or 0))):
        first[str(batch.run)] = batch
    return list(reversed(first.values()))


def archived_ddl(store: Store, batches: Sequence[Batch]) -> list[str]:
    """The newest DDL that was archived with a table's batches; it stands in the first batch of each run.

    Raises ConfigError if there is none.
    """
    for batch in with_ddl(batches):
        found = read_metadata(store, batch.stem)["schema"].get("ddl")
        if found:
            return list(found)
    raise ConfigError("no DDL is archived with the batches of this table", hint="make the table by hand, and leave out --create-table")


class Ddl:
    """Archived statements on their way to another place."""

    def __init__(self, statements: Iterable[str], batch: Batch, place: Place) -> None:
        self._was = f"{ident(batch.schema)}.{ident(batch.table)}"
        self._place = place
        self._named = (place.schema, place.table) == (batch.schema, batch.table)
        self.before: list[str] = []
        self.indexes: list[tuple[str, str]] = []
        self.foreign: list[tuple[str, str]] = []
        self.comments: list[str] = []
        for statement in statements:
            self._sort(statement)

    def create(self, connection: connect.Connection) -> None:
        """Make the table, and what it needs, in one transaction. Types that are there already are taken as they are."""
        place = self._place
        connect.execute(connection, "BEGIN")
        try:
            if connect.scalar(connection, "SELECT to_regnamespace(%s) IS NULL", (ident(place.schema),)):
                connect.execute(connection, f"CREATE SCHEMA {ident(place.schema)}")
            for statement in self.before:
                connect.execute(connection, "SAVEPOINT aa_ddl")
                try:
                    connect.execute(connection, statement)
                except ArchiverError as error:
                    if error.sqlstate != DUPLICATE_OBJECT or not statement.startswith(("CREATE TYPE ", "CREATE DOMAIN ")):
                        raise
                    connect.execute(connection, "ROLLBACK TO SAVEPOINT aa_ddl")
                    log.debug("restore.type", "a type of the table is there already, and is taken as it is")
            if connect.execute(connection, "COMMIT") != "COMMIT":
                raise Mismatch(f"{place.title} could not be made")
        except BaseException:
            if not connection.closed:
                connect.execute(connection, "ROLLBACK")
            raise

    def finish(self, connection: connect.Connection, oid: int) -> list[ArchiverError]:
        """Make the indexes, foreign keys and comments that are missing; what could not be made."""
        there = {_tail(row[0]) for row in connect.rows(connection, _INDEXES_SQL, (oid,))}
        bound = {row[0] for row in connect.rows(connection, _CONSTRAINTS_SQL, (oid,))}
        wanted = [sql for tail, sql in self.indexes if tail not in there] + [sql for tail, sql in self.foreign if tail not in bound]
        failed: list[ArchiverError] = []
        for statement in wanted + self.comments:
            try:
                connect.execute(connection, statement)
            except ArchiverError as error:
                if error.sqlstate is None:
                    raise
                log.error("restore.finish", f"an index or a foreign key of {self._place.title} could not be made: {error.msg}",
                          detail=statement, hint="the rows are there; make it by hand, or run again", code=error.code)
                failed.append(error)
        return failed

    def _sort(self, statement: str) -> None:
        """One statement to where it belongs, with the table's new name in it."""
        table = self._place.qualified
        found = _INDEX.fullmatch(statement)
        if found:
            unique, tail = found.groups()
            name = self._index_name(statement)
            made = f"CREATE {unique or ''}INDEX {name}ON {table} {tail}"
            if unique:
                self.before.append(made)
            else:
                self.indexes.append((tail, made))
            return
        for start in (f"CREATE TABLE {self._was} (", f"COMMENT ON TABLE {self._was} ", f"COMMENT ON COLUMN {self._was}.",
                      f"ALTER TABLE {self._was} "):
            if statement.startswith(start):
                statement = start.replace(self._was, table) + statement[len(start):]
                break
        if statement.startswith("COMMENT ON "):
            self.comments.append(statement)
            return
        constraint = _CONSTRAINT.search(statement) if statement.startswith(f"ALTER TABLE {table} ADD CONSTRAINT ") else None
        if constraint is None:
            self.before.append(statement)
            return
        name, definition = constraint.groups()
        made = f"ALTER TABLE {table} ADD {f'CONSTRAINT {name} ' if self._named else ''}{definition}"
        if definition.startswith("FOREIGN KEY "):
            self.foreign.append((definition, made))
        else:
            self.before.append(made)

    def _index_name(self, statement: str) -> str:
        """Its own name where the table bears its own; elsewhere the server finds one that is free."""
        found = re.match(rf"CREATE (?:UNIQUE )?INDEX ({_NAME}) ", statement)
        return f"{found.group(1)} " if found and self._named else ""


def _tail(statement: str) -> Optional[str]:
    found = _INDEX.fullmatch(statement)
    return found.group(2) if found else None
