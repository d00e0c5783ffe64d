"""The columns of a table, each with the SQL that writes it as JSON and reads it back as the same value.

    columns(connection, oid)                                            what the table has, refusals included
    SELECT row_to_json(r.*) FROM (SELECT <select_list(columns, 't')> FROM ... t) r          one JSON line a row
    SELECT <line_sql(columns, 't')> FROM ... t                                              the same text, faster
    SELECT <values(columns, 'x')> FROM json_to_record(line::json) AS x(<record(columns)>)        and back
    SELECT ... FROM ... t WHERE NOT <roundtrip_sql(columns, 't')>       rows that would not come back as they are

Stored generated columns are archived, for readers, and left out of record, values and the round trip: the
server makes them again. Virtual ones (PostgreSQL 18) are left out everywhere, since computing them can raise.
The codecs are in codecs.py; all of it relies on the pinned session of connect.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Iterable, Optional, Sequence

from audit_archiver.postgres.quoting import ident
from audit_archiver.postgres.type_codecs import Codec, Codecs, Refused, Type

ARGUMENTS = 90  # of one function call; the server takes 100

_COLUMNS_SQL = """
SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), NOT a.attnotnull, a.attnum::int,
       {generated}, a.attidentity::text, a.atttypid::bigint
FROM pg_attribute a WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

_UNIFORM = re.compile(r"(numeric|character)\([-0-9,]+\)")  # a length and a scale are what makes them so

_HIDDEN_OIDS_SQL = "SELECT relhasoids FROM pg_class WHERE oid = %s"

_TYPES_SQL = """
WITH RECURSIVE need(oid) AS (
  SELECT unnest(%s::oid[])
  UNION
  SELECT c.oid FROM need n JOIN pg_type t ON t.oid = n.oid CROSS JOIN LATERAL (
    SELECT t.typbasetype WHERE t.typtype = 'd'
    UNION ALL SELECT t.typelem WHERE t.typelem <> 0
    UNION ALL SELECT a.atttypid FROM pg_attribute a
      WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE r.rngtypid = t.oid
    UNION ALL SELECT r.rngtypid FROM pg_range r WHERE {multirange} = t.oid) c(oid))
SELECT t.oid::bigint, format_type(t.oid, -1), s.nspname::text, t.typname::text, t.typtype::text, t.typbasetype::bigint,
       coalesce((SELECT e.oid::bigint FROM pg_type e WHERE e.typarray = t.oid), 0),
       ARRAY(SELECT a.attname::text FROM pg_attribute a
             WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
       ARRAY(SELECT a.atttypid::bigint FROM pg_attribute a
             WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
       coalesce(r.rngsubtype::bigint, 0),
       coalesce((SELECT m.rngtypid::bigint FROM pg_range m WHERE t.typtype = 'm' AND {multirange_m} = t.oid), 0),
       -- ALTER TYPE ... RENAME does not rename the constructor
       (SELECT quote_ident(f.nspname) || '.' || quote_ident(p.proname) FROM pg_proc p JOIN pg_namespace f ON f.oid = p.pronamespace
        WHERE t.typtype = 'r' AND p.prorettype = t.oid AND p.prosrc = 'range_constructor3' ORDER BY p.oid LIMIT 1),
       coalesce(r.rngcanonical::oid >= 16384, false),
       (SELECT x.extname::text FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid
        WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.refclassid = 'pg_extension'::regclass
          AND d.deptype = 'e' LIMIT 1),
       EXISTS (SELECT FROM pg_cast k WHERE k.castsource = t.oid AND k.casttarget = 'json'::regtype),
       EXISTS (SELECT FROM pg_constraint k WHERE k.contypid = t.oid AND NOT k.convalidated),
       t.typreceive::oid <> 0,
       EXISTS (SELECT FROM pg_cast k WHERE k.castsource = t.oid AND k.casttarget = 'text'::regtype AND k.castmethod = 'f'),
       (SELECT bool_and(f.provolatile = 'i') FROM pg_proc f WHERE f.oid IN (t.typinput, t.typoutput))
FROM need JOIN pg_type t ON t.oid = need.oid JOIN pg_namespace s ON s.oid = t.typnamespace
     LEFT JOIN pg_range r ON r.rngtypid = t.oid
"""


@dataclass(frozen=True)
class Column:
    """One column. `type` is what format_type says; `generated` is "", "s" (stored) or "v" (virtual); `identity` is
    "", "a" (always) or "d" (by default). `refusal` is (reason, remedy) for a type that is not archived."""

    name: str
    type: str
    nullable: bool
    attnum: int
    generated: str
    identity: str
    codec: Optional[Codec]
    refusal: Optional[tuple[str, str]] = None

    def encode(self, alias: str) -> str:
        """The value that row_to_json shall write, of a row called `alias`."""
        return self._codec().encode(f"{alias}.{ident(self.name)}")

    def fragments(self, alias: str, before: str) -> list[str]:
        """Expressions whose texts together are `before`, the column's name and its JSON, of a row called `alias`."""
        return self._codec().fragments(f"{alias}.{ident(self.name)}", f"{before}{json.dumps(self.name, ensure_ascii=False)}:")

    @property
    def record_type(self) -> str:
        """The type to declare in json_to_record(...) AS x(name type)."""
        return self._codec().record_type

    def decode(self, expression: str) -> str:
        """The column's value, of the column's type, out of the field of json_to_record."""
        return self._codec().decode(expression)

    def directly(self) -> Column:
        """The same column, read in a cheaper way that is exact where no line holds "$array"."""
        codec = self._codec()
        return self if codec.direct is None else replace(self, codec=replace(codec, record_type=codec.direct, decode=lambda x: x))

    def image(self, alias: str) -> str:
        """What must be identical after a round trip: the value, but for the line breaks of a json column."""
        return self._codec().image(f"{alias}.{ident(self.name)}")

    @property
    def roundtrip_always(self) -> bool:
        """True where one value may come back and another not, so that a sample proves nothing."""
        return self._codec().doubt is not None

    @property
    def roundtrip_why(self) -> Optional[str]:
        """Why every batch is checked; None where one batch proves the type."""
        return self._codec().doubt

    @property
    def scalar(self) -> bool:
        """True if the column's JSON is always one string, number or boolean, as a key's must be."""
        return self._codec().scalar

    @property
    def comparable(self) -> bool:
        """True if the server's own operators compare two values, as a key's must be."""
        return self._codec().comparable

    @property
    def ranked_as(self) -> Optional[str]:
        """The type to order and compare it as, or None for its own."""
        return self._codec().ranked_as

    @property
    def uniform(self) -> bool:
        """True if equal values have one JSON text: 1.0 and 1 are equal, so it takes a numeric with a scale to be uniform."""
        return self._codec().uniform or _UNIFORM.fullmatch(self.type) is not None

    @property
    def restored(self) -> bool:
        """True if a restore writes the column; the server computes generated ones."""
        return self.generated == ""

    def _codec(self) -> Codec:
        if self.codec is None:
            raise ValueError(f"column '{self.name}' is refused")
        return self.codec


def columns(connection: Any, table_oid: int) -> list[Column]:
    """The columns of a table in table order, dropped ones left out. Raises nothing for a type that is not
    archived: its column says so in `refusal`, and its other methods must not be used."""
    generated = "a.attgenerated::text" if connection.server_version >= 120000 else "''::text"
    with connection.cursor() as cursor:
        cursor.execute(_COLUMNS_SQL.format(generated=generated), (table_oid,))
        found = cursor.fetchall()
        hidden = False
        if connection.server_version < 120000:
            cursor.execute(_HIDDEN_OIDS_SQL, (table_oid,))
            hidden = any(row[0] for row in cursor.fetchall())
    codecs = _codecs(connection, [row[6] for row in found])
    made = [_column(codecs, *row) for row in found]
    if hidden:
        made.append(Column("oid", "oid", False, -2, "", "", None, (
            "the table was made WITH OIDS, and a hidden oid cannot be written back by INSERT",
            "ALTER TABLE ... SET WITHOUT OIDS, or leave the table out")))
    return made


def typed(connection: Any, wanted: Sequence[tuple[str, str]]) -> list[Column]:
    """Columns of these (name, type), the type as format_type wrote it, wherever that was: those of an archived row.

    A type that this database does not have is a `refusal` of its column.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regtype(t)::oid::bigint FROM unnest(%s::text[]) WITH ORDINALITY AS w(t, n) ORDER BY n",
                       ([kind for _, kind in wanted],))
        oids = [row[0] for row in cursor.fetchall()]
    codecs = _codecs(connection, [oid for oid in oids if oid is not None])
    return [_column(codecs, name, kind, True, number, "", "", oid) if oid is not None else
            Column(name, kind, True, number, "", "", None, (f"this database has no type '{kind}'", "make the type first"))
            for number, ((name, kind), oid) in enumerate(zip(wanted, oids), 1)]


def _codecs(connection: Any, oids: Sequence[int]) -> Codecs:
    """The codecs of these types and of what they are made of."""
    multirange = "{0}.rngmultitypid" if connection.server_version >= 140000 else "NULL::oid"
    with connection.cursor() as cursor:
        cursor.execute(_TYPES_SQL.format(multirange=multirange.format("r"), multirange_m=multirange.format("m")), (list(oids),))
        return Codecs({row[0]: Type(*row) for row in cursor.fetchall()})


def archived(columns: Iterable[Column]) -> list[Column]:
    """The columns that stand in a row line: all but virtual generated ones."""
    return [column for column in columns if column.generated != "v"]


def select_list(columns: Iterable[Column], alias: str) -> str:
    """What to select of a row `alias`, so that row_to_json of it is the row line."""
    return ", ".join(f"{column.encode(alias)} AS {ident(column.name)}" for column in archived(columns))


def line_sql(columns: Iterable[Column], alias: str, end: str = "'}'") -> str:
    """An expression for the row line of a row `alias`, byte for byte what row_to_json gives; `end` closes it.

    row_to_json asks the catalog for every column of every row what to do with its type; here it is known.
    """
    parts = []
    for column in archived(columns):
        parts += column.fragments(alias, "," if parts else "{")
    parts.append(end)
    while len(parts) > ARGUMENTS:
        parts = [f"concat({', '.join(parts[start:start + ARGUMENTS])})" for start in range(0, len(parts), ARGUMENTS)]
    return f"concat({', '.join(parts)})"


def record(columns: Iterable[Column]) -> str:
    """The column definitions for json_to_record(...) AS x(...)."""
    return ", ".join(f"{ident(column.name)} {column.record_type}" for column in columns if column.restored)


def values(columns: Iterable[Column], alias: str) -> str:
    """The decoded columns of a json_to_record called `alias`, under their names."""
    return ", ".join(f"{column.decode(f'{alias}.{ident(column.name)}')} AS {ident(column.name)}"
                     for column in columns if column.restored)


def roundtrip_sql(columns: Sequence[Column], alias: str, line: Optional[str] = None) -> str:
    """A boolean expression: does the row `alias` come back out of its JSON line as it is?

    `line` is an expression for that line, by default the line is made anew of these columns. Equal is what is
    identical byte for byte (record_image_eq); bytes that differ without meaning, as an array's empty null bitmap
    or a number stored by an old server, are let pass if texts and lines are equal. It can raise where a value
    cannot be read back at all (SQLSTATE class 22 or 23), naming no row: halve the batch to find it.
    """
    wanted = [column for column in columns if column.restored]
    if not wanted:
        return "true"
    old = ", ".join(column.image(alias) for column in wanted)
    new = ", ".join(column.image("_d") for column in wanted)
    made = line_sql(wanted, alias)
    again = line_sql(wanted, "_d")
    return (f"(SELECT CASE WHEN record_image_eq(ROW({new}), ROW({old})) THEN true "
            f"ELSE ROW({new})::text = ROW({old})::text AND {again} = {made} END "
            f"FROM (SELECT {values(wanted, '_x')} FROM json_to_record(({line or made})::json) "
            f"AS _x({record(wanted)})) _d)")


def _column(codecs: Codecs, name: str, type_: str, nullable: bool, attnum: int, generated: str, identity: str, oid: int) -> Column:
    try:
        return Column(name, type_, nullable, attnum, generated, identity, codecs.of(oid))
    except Refused as refused:
        refusal = None if generated == "v" else (refused.reason, refused.remedy)
        return Column(name, type_, nullable, attnum, generated, identity, None, refusal)
