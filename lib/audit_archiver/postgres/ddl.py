"""The DDL of a table as it is now: what an archive needs to be restored into an empty database (REQ-INT-006, 012).

    statements(connection, oid)     schemas, extensions, types, sequences, the table, its constraints, indexes and comments

A partition or an inheritance child is written as a table of its own, since that is how it is archived. Foreign keys come
last, and what belongs to the table's use rather than to its rows is left out: rights, policies, triggers, storage.
"""

from __future__ import annotations

from typing import Any, Optional

from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import ident, literal

_TABLE_SQL = """
SELECT n.nspname::text, c.relname::text, obj_description(c.oid, 'pg_class') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = %s
"""

_COLUMNS_SQL = """
SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text, {generated},
       pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum), a.atttypid::bigint,
       CASE WHEN a.attcollation NOT IN (0, t.typcollation) THEN quote_ident(k.nspname) || '.' || quote_ident(l.collname) END
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
     LEFT JOIN pg_collation l ON l.oid = a.attcollation LEFT JOIN pg_namespace k ON k.oid = l.collnamespace
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

_CONSTRAINTS_SQL = """
SELECT conname::text, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s AND contype IN ('p', 'u', 'x', 'c', 'f')
ORDER BY position(contype::text IN 'puxcf'), conname
"""

_INDEXES_SQL = """
SELECT pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
WHERE i.indrelid = %s AND i.indisvalid AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = i.indrelid)
ORDER BY x.relname
"""

# sequences that a default of the table names and that are not an identity's
_SEQUENCES_SQL = """
SELECT DISTINCT n.nspname::text, s.relname::text, format_type(q.seqtypid, NULL), q.seqincrement, q.seqmin, q.seqmax, q.seqstart, q.seqcycle
FROM pg_attrdef a JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid AND d.refclassid = 'pg_class'::regclass
     JOIN pg_class s ON s.oid = d.refobjid AND s.relkind = 'S' JOIN pg_sequence q ON q.seqrelid = s.oid
     JOIN pg_namespace n ON n.oid = s.relnamespace
WHERE a.adrelid = %s ORDER BY 1, 2
"""

_TYPE_SQL = """
SELECT t.typtype::text, n.nspname::text, t.typname::text, format_type(t.oid, NULL), t.typelem::bigint, t.typbasetype::bigint,
       format_type(t.typbasetype, t.typtypmod), t.typnotnull, t.typdefault, t.typrelid::bigint, r.rngsubtype::bigint,
       (SELECT x.extname::text FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid WHERE d.classid = 'pg_type'::regclass
        AND d.objid = t.oid AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'),
       {multirange}, t.oid < 16384
FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace LEFT JOIN pg_range r ON r.rngtypid = t.oid WHERE t.oid = %s
"""


def statements(connection: connect.Connection, oid: int) -> list[str]:
    """SQL statements that make the table again, in an order in which they can be run; nothing if it is gone."""
    return _Table(connection, oid).statements()


class _Table:
    """Gathers the statements; each type once, and after those that it is made of."""

    def __init__(self, connection: connect.Connection, oid: int) -> None:
        self._connection, self._oid = connection, oid
        self._before: list[str] = []
        self._seen: set[int] = set()

    def statements(self) -> list[str]:
        """All of them."""
        found = self._rows(_TABLE_SQL)
        if not found:
            return []
        schema, name, comment = found[0]
        table = f"{ident(schema)}.{ident(name)}"
        self._schema(schema)
        generated = "a.attgenerated::text" if self._connection.server_version >= 120000 else "''"
        columns = self._rows(_COLUMNS_SQL.format(generated=generated))
        for column in columns:
            self._type(column[7])
        for sequence in self._rows(_SEQUENCES_SQL):
            self._before.append(_sequence(*sequence))
        made = [*self._before, f"CREATE TABLE {table} ({', '.join(_column(*column) for column in columns)})"]
        constraints = [f"ALTER TABLE {table} ADD CONSTRAINT {ident(row[0])} {row[1]}" for row in self._rows(_CONSTRAINTS_SQL)]
        foreign = [each for each in constraints if " FOREIGN KEY (" in each.partition(" ADD CONSTRAINT ")[2]]
        made += [each for each in constraints if each not in foreign]
        made += [row[0] for row in self._rows(_INDEXES_SQL)]
        made += foreign
        if comment is not None:
            made.append(f"COMMENT ON TABLE {table} IS {literal(comment).strip()}")
        return made + [f"COMMENT ON COLUMN {table}.{ident(column[0])} IS {literal(column[6]).strip()}" for column in columns if column[6] is not None]

    def _rows(self, sql: str, oid: Optional[int] = None) -> list[tuple[Any, ...]]:
        return connect.rows(self._connection, sql, (self._oid if oid is None else oid,))

    def _schema(self, name: str) -> None:
        statement = f"CREATE SCHEMA IF NOT EXISTS {ident(name)}"
        if name != "public" and statement not in self._before:
            self._before.append(statement)

    def _type(self, oid: int) -> None:
        """A type that a user made, or its extension, and whatever it is made of."""
        if oid in self._seen:
            return
        self._seen.add(oid)
        multirange = "(SELECT m.rngtypid::bigint FROM pg_range m WHERE m.rngmultitypid = t.oid)" \
            if self._connection.server_version >= 140000 else "NULL::bigint"
        kind, schema, name, sql, element, base, base_sql, not_null, default, relation, subtype, extension, ranged, builtin = self._rows(
            _TYPE_SQL.format(multirange=multirange), oid)[0]
        if extension is not None:
            statement = f"CREATE EXTENSION IF NOT EXISTS {ident(extension)}"
            self._before += [statement] if statement not in self._before else []
            return
        for part in (element, base, subtype, ranged):
            if part:
                self._type(part)
        if builtin or element or ranged:
            return
        self._schema(schema)
        if kind == "e":
            labels = connect.rows(self._connection, "SELECT enumlabel::text FROM pg_enum WHERE enumtypid = %s ORDER BY enumsortorder", (oid,))
            self._before.append(f"CREATE TYPE {sql} AS ENUM ({', '.join(literal(row[0]).strip() for row in labels)})")
        elif kind == "d":
            checks = connect.rows(self._connection, "SELECT conname::text, pg_get_constraintdef(oid) FROM pg_constraint WHERE contypid = %s "
                                  "AND contype = 'c' ORDER BY conname", (oid,))
            parts = [f"CREATE DOMAIN {sql} AS {base_sql}", *([f"DEFAULT {default}"] if default is not None else []),
                     *(["NOT NULL"] if not_null else []), *(f"CONSTRAINT {ident(row[0])} {row[1]}" for row in checks)]
            self._before.append(" ".join(parts))
        elif kind == "c":
            fields = self._rows("SELECT attname::text, format_type(atttypid, atttypmod), atttypid::bigint FROM pg_attribute "
                                "WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum", relation)
            for field in fields:
                self._type(field[2])
            self._before.append(f"CREATE TYPE {sql} AS ({', '.join(f'{ident(field[0])} {field[1]}' for field in fields)})")
        elif kind == "r":
            of = connect.scalar(self._connection, "SELECT format_type(%s, NULL)", (subtype,))
            self._before.append(f"CREATE TYPE {sql} AS RANGE (SUBTYPE = {of})")


def _column(name: str, kind: str, not_null: bool, identity: str, generated: str, expression: Optional[str], _comment: Any, _oid: int,
            collation: Optional[str]) -> str:
    parts = [ident(name), kind]
    if collation is not None:
        parts.append(f"COLLATE {collation}")
    if generated:
        parts.append(f"GENERATED ALWAYS AS ({expression}) {'STORED' if generated == 's' else 'VIRTUAL'}")
    elif identity:
        parts.append(f"GENERATED {'ALWAYS' if identity == 'a' else 'BY DEFAULT'} AS IDENTITY")
    elif expression is not None:
        parts.append(f"DEFAULT {expression}")
    if not_null:
        parts.append("NOT NULL")
    return " ".join(parts)


def _sequence(schema: str, name: str, kind: str, increment: int, least: int, most: int, start: int, cycle: bool) -> str:
    return (f"CREATE SEQUENCE IF NOT EXISTS {ident(schema)}.{ident(name)} AS {kind} INCREMENT BY {increment} MINVALUE {least} MAXVALUE {most} "
            f"START WITH {start}{' CYCLE' if cycle else ''}")
