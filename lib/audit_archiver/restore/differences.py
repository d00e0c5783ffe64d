"""Where the archived rows and the table have different columns, and what each strategy makes of it (RESTORE-001..007).

Columns are mapped by name; their order is no difference. `strict` refuses any difference. `lenient` leaves out what the
table has no column for, leaves to its default what the archive has no column for, and casts a changed type, where each
value must come back equal when it is cast back: nothing is rounded, cut off or overflows unseen. `transform` does the same,
but for columns whose value the user's own expression makes.
"""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple, Optional, Sequence

from audit_archiver.exits import ArchiverError, ConfigError
from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres import connect
from audit_archiver.postgres.columns import Column
from audit_archiver.postgres.quoting import ident
from audit_archiver.restore.target import Target

STRICT, LENIENT, TRANSFORM = "strict", "lenient", "transform"
DROPPED, ADDED, RETYPED, NOT_NULL = "dropped", "added", "retyped", "not_null"


ByColumn = collections.abc.Mapping[str, str]


class Difference(NamedTuple):
    """One difference: `archived` and `table` are the two types (None: no such column), `blocks` why lenient cannot go on either."""

    column: str
    kind: str
    archived: Optional[str]
    table: Optional[str]
    words: str
    blocks: Optional[str] = None

    def as_json(self) -> dict[str, Any]:
        """As the report has it."""
        return {"column": self.column, "kind": self.kind, "archived": self.archived, "table": self.table, "words": self.words}


@dataclass(frozen=True)
class Cast:
    """How an archived value becomes one of the table's type, and the condition that it lost nothing; of a row `a`."""

    value: str
    kept: Optional[str]


@dataclass(frozen=True)
class Mapping:
    """Which columns are written, from what: (column of the table, its cast), the archived columns that are read for it."""

    written: tuple[tuple[Column, Cast], ...]
    archived: tuple[Column, ...]
    differences: tuple[Difference, ...]


def compare(connection: connect.Connection, archived: Sequence[tuple[str, str]], nullable: Optional[dict[str, bool]],
            target: Target, transform: ByColumn) -> Mapping:
    """How rows of these (name, type) columns fit into the table; what blocks stands in the differences.

    Raises ConfigError for an expression of `transform` that the server does not take.
    """
    read = table_columns.typed(connection, archived)
    by_name = {column.name: column for column in read}
    found = [each._replace(blocks=None) if each.column in transform else each for each in _differences(by_name, nullable or {}, target)]
    written = [_transformed(connection, read, target, name, expression) for name, expression in transform.items()]
    for column in target.columns:
        source = None if column.name in transform else by_name.get(column.name)
        if source is None or not column.restored:
            continue
        if source.codec is None:
            assert source.refusal is not None
            found.append(Difference(column.name, RETYPED, source.type, column.type, f"its archived type is {source.type}", source.refusal[0]))
            continue
        cast = _cast(connection, source, column)
        if cast is None:
            found.append(Difference(column.name, RETYPED, source.type, column.type, f"{source.type} in the archive, {column.type} in the table",
                                    f"there is no cast from {source.type} to {column.type}"))
            continue
        written.append((column, cast))
    return Mapping(tuple(written), tuple(read), tuple(dict((each.column + each.kind, each) for each in found).values()))


def require(mapping: Mapping, strategy: str, title: str) -> None:
    """Raise ConfigError unless the strategy lets rows of that mapping in."""
    blocking = [each for each in mapping.differences if each.blocks or strategy == STRICT]
    if not blocking:
        return
    reasons = "; ".join(f"column '{each.column}': {each.blocks or each.words}" for each in blocking)
    lenient = strategy == STRICT and not any(each.blocks for each in blocking)
    raise ConfigError(f"the archived rows do not fit into {title}", detail=reasons,
                      hint="--schema-strategy lenient maps the columns by name and casts what can be cast without loss" if lenient
                      else "--into another table with --create-table restores them as they were")


def _differences(archived: dict[str, Column], nullable: dict[str, bool], target: Target) -> Iterator[Difference]:
    for name, source in archived.items():
        column = target.column(name)
        if column is None:
            yield Difference(name, DROPPED, source.type, None, "the table has no such column; its values would be left out")
        elif column.restored and column.type != source.type:
            yield Difference(name, RETYPED, source.type, column.type, f"{source.type} in the archive, {column.type} in the table")
        if column is not None and not column.nullable and nullable.get(name, False):
            yield Difference(name, NOT_NULL, source.type, column.type, "it may be NULL in the archive, and not in the table")
    for column in target.columns:
        if column.name not in archived and column.restored:
            needed = not column.nullable and column.name not in target.defaults
            yield Difference(column.name, ADDED, None, column.type, "the archive has no such column; it gets its default, or NULL",
                             "the table demands a value, and the archive has none" if needed else None)


def _transformed(connection: connect.Connection, archived: Sequence[Column], target: Target, name: str, expression: str) -> tuple[Column, Cast]:
    """A column with the user's expression for it, which the server must take."""
    column = target.column(name)
    if column is None or not column.restored:
        raise ConfigError(f"the functions make a column '{name}', which {target.place.title} does not have, or computes itself")
    value = f"({expression})::{column.type}"
    nulls = ", ".join(f"NULL::{each.codec.sql} AS {ident(each.name)}" for each in archived if each.codec is not None)
    check(connection, f"SELECT {value} FROM (SELECT {nulls}) a WHERE false", name)
    return column, Cast(value, None)


def check(connection: connect.Connection, sql: str, name: str) -> None:
    """Raise ConfigError, naming the column, if the server does not take a user's expression. Nothing is evaluated."""
    try:
        connect.rows(connection, sql)
    except ArchiverError as error:
        if (error.sqlstate or "")[:2] != "42":
            raise
        raise ConfigError(f"the expression for column '{name}' is not taken: {error.msg}", sqlstate=error.sqlstate) from None


def _cast(connection: connect.Connection, source: Column, column: Column) -> Optional[Cast]:
    value = f"a.{ident(source.name)}"
    if source.type == column.type:
        return Cast(value, None)
    codec = source.codec
    assert codec is not None
    for there, back in ((f"({value})::{column.type}", "{0}::" + codec.sql), (f"({value})::text::{column.type}", "({0})::text::" + codec.sql)):
        again = back.format(f"({there})")
        if not _runs(connection, f"SELECT {there}, {again} FROM (SELECT NULL::{codec.sql} AS {ident(source.name)}) a"):
            continue
        kept = f"{value} IS NOT DISTINCT FROM {again}"
        if not _runs(connection, f"SELECT {kept} FROM (SELECT NULL::{codec.sql} AS {ident(source.name)}) a"):
            kept = f"({value})::text IS NOT DISTINCT FROM ({again})::text"
        return Cast(there, kept)
    return None


def _runs(connection: connect.Connection, sql: str) -> bool:
    """Whether the server knows such casts and operators; asked outside a transaction."""
    try:
        connect.rows(connection, sql)
    except ArchiverError as error:
        if (error.sqlstate or "")[:2] not in ("42", "22", "23"):
            raise
        return False
    return True
