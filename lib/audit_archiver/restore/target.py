"""The table that rows are restored into: where it is, its columns, what keeps its rows apart, what fires on an insert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

from audit_archiver.config.model import Config, Database
from audit_archiver.exits import ArchiverError, ConfigError, PermissionDenied
from audit_archiver.postgres import catalog, connect
from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres.quoting import ident, literal

_TABLE_SQL = """
SELECT c.oid::bigint, c.relkind::text, row_security_active(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s
"""

_UNIQUE_SQL = """
SELECT ARRAY(SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
             JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.n <= i.indnkeyatts ORDER BY k.n)
FROM pg_index i WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
"""

_DEFAULTS_SQL = """
SELECT attname::text FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped AND (atthasdef OR attidentity <> '')
"""

_TRIGGERS_SQL = """
SELECT tgname::text, tgenabled::text FROM pg_trigger
WHERE tgrelid = %s AND NOT tgisinternal AND tgenabled <> 'D' AND tgtype & 4 = 4 ORDER BY tgname
"""

_ENABLE = {"O": "ENABLE TRIGGER", "R": "ENABLE REPLICA TRIGGER", "A": "ENABLE ALWAYS TRIGGER"}


@dataclass(frozen=True)
class Place:
    """A table by name, in a database that can be reached."""

    database: Database
    schema: str
    table: str

    @property
    def qualified(self) -> str:
        """The quoted name for SQL."""
        return f"{ident(self.schema)}.{ident(self.table)}"

    @property
    def title(self) -> str:
        """The name for messages."""
        return f"{self.schema}.{self.table} of database '{self.database.name}'"


@dataclass(frozen=True)
class Target:
    """The table as it is now. `triggers` are the user's triggers that an insert fires: (name, how it is enabled)."""

    place: Place
    oid: int
    columns: tuple[table_columns.Column, ...]
    defaults: frozenset[str]
    unique: tuple[frozenset[str], ...]
    triggers: tuple[tuple[str, str], ...]
    empty: bool
    system: str
    database_oid: int

    def column(self, name: str) -> Optional[table_columns.Column]:
        """The column called `name`, or None."""
        return next((column for column in self.columns if column.name == name), None)

    def silence(self) -> list[str]:
        """Statements that keep the triggers from firing until `wake`, in the same transaction."""
        return [f"ALTER TABLE {self.place.qualified} DISABLE TRIGGER {ident(name)}" for name, _ in self.triggers]

    def wake(self) -> list[str]:
        """Statements that enable the triggers again, each as it was."""
        return [f"ALTER TABLE {self.place.qualified} {_ENABLE[how]} {ident(name)}" for name, how in self.triggers]


def parse(text: Optional[str], config: Config, source: str, schema: str, table: str) -> Place:
    """Where [DB:][SCHEMA.]TABLE is; None is the table that the rows came from.

    DB is a database of the configuration, or else another database on the server of the source.
    """
    name, _, rest = text.rpartition(":") if text is not None else ("", "", f"{schema}.{table}")
    if text is not None and "." not in rest:
        rest = f"{schema}.{rest}"
    at_schema, _, at_table = rest.partition(".")
    if not at_schema or not at_table:
        raise ConfigError(f"'{text}' names no table", hint="write [DB:][SCHEMA.]TABLE")
    wanted = name or source
    database = config.database(wanted)
    if database is None:
        beside = config.database(source)
        if beside is None:
            raise ConfigError(f"there is no database '{wanted}' in '{config.path}'",
                              hint="name a configured one with --into DB:TABLE; its host and user are needed")
        database = replace(beside, name=wanted, dbname=wanted, at=None)
    return Place(database, at_schema, at_table)


def find(connection: connect.Connection, place: Place) -> Optional[int]:
    """The oid of the table, or None if there is none of that name. Raises ConfigError for what cannot take rows."""
    found = connect.rows(connection, _TABLE_SQL, (place.schema, place.table))
    if not found:
        return None
    oid, kind, secured = found[0]
    if kind not in ("r", "p"):
        raise ConfigError(f"{place.title} is no table")
    if secured:
        raise PermissionDenied(f"{place.title} has row-level security, which would hide rows from this role",
                               hint="give the role BYPASSRLS, or use a role that the policies do not bind")
    return int(oid)


def look(connection: connect.Connection, place: Place, oid: int) -> Target:
    """The table as it is now."""
    server = catalog.server(connection, oid)
    return Target(
        place, oid, tuple(table_columns.columns(connection, oid)),
        frozenset(row[0] for row in connect.rows(connection, _DEFAULTS_SQL, (oid,))),
        tuple(frozenset(row[0]) for row in connect.rows(connection, _UNIQUE_SQL, (oid,))),
        tuple((row[0], row[1]) for row in connect.rows(connection, _TRIGGERS_SQL, (oid,))),
        not connect.scalar(connection, f"SELECT EXISTS (SELECT FROM {place.qualified})"), server["system"], server["database_oid"])


def check_value(connection: connect.Connection, column: table_columns.Column, value: str) -> str:
    """A condition on a row `a` that its column equals `value`. Raises ConfigError if the type compares no such values."""
    if column.codec is None:
        raise ConfigError(f"--where: the column '{column.name}' cannot be read here", hint=column.refusal and column.refusal[0])
    wanted = f"{literal(value)}::{column.codec.sql}"
    try:
        connect.scalar(connection, f"SELECT NULL::{column.codec.sql} = {wanted}")
    except ArchiverError as error:
        if (error.sqlstate or "")[:2] == "22":
            raise ConfigError(f"--where: the value given is none of the type {column.type} of column '{column.name}'") from None
        if error.sqlstate == "42883":  # undefined_function
            raise ConfigError(f"--where: values of the type {column.type} of column '{column.name}' cannot be compared") from None
        raise
    return f"a.{ident(column.name)} = {wanted}"
