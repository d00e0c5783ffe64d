"""The SQL that takes archived rows apart on the server and puts them into the table, set by set.

Rows are staged as JSON arrays of some 8 kB in a temporary table; the reverse expressions of the codecs make them values
again. `rows` is that relation: the table's columns in the table's types, already filtered. Literals come from
`quoting.literal`, identifiers from `quoting.ident`.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Optional, Sequence

from audit_archiver.catalogue.archived import Batch
from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres.columns import Column
from audit_archiver.postgres.quoting import ident, literal
from audit_archiver.restore.differences import Mapping
from audit_archiver.restore.functions import Functions
from audit_archiver.restore.target import Target

STAGE = "pg_temp.aa_restore"
STAGED = f"{STAGE} s"
CLASH = "pg_temp.aa_clash"
COPY_IN = f"COPY {STAGE} FROM STDIN WITH (FORMAT binary)"  # measured: a third less than text, which has to be searched for ends
COPY_OUT = r"WITH (FORMAT csv, QUOTE E'\x01', DELIMITER E'\x02')"
SAMPLE_ROWS = 10  # at least; 1 % otherwise (RESTORE-018)
SAMPLED_ARRAYS = 0.05  # this share of the arrays is unpacked for the sample, and of their rows enough to make up 1 %

CREATE = (
    # json, so that COPY has it checked while it flows; an array fits into a page, and one that does not is not packed
    "CREATE TEMPORARY TABLE aa_restore (rows json) WITH (toast_tuple_target = 8160) ON COMMIT DELETE ROWS",
    f"ALTER TABLE {STAGE} ALTER COLUMN rows SET STORAGE EXTERNAL",
)


@dataclass(frozen=True)
class Window:
    """Which rows are meant: [start, end) of the timestamp column, RFC 3339 UTC, and conditions on a row `a`."""

    timestamp: str
    start: Optional[str] = None
    end: Optional[str] = None
    conditions: tuple[str, ...] = ()

    @property
    def condition(self) -> str:
        """Everything as one condition on a row `a`; "" if every row is meant. The session's time zone is UTC."""
        moment = f"(a.{ident(self.timestamp)})::timestamptz"
        parts = [f"{moment} {sign} {literal(limit)}::timestamptz" for sign, limit in ((">=", self.start), ("<", self.end)) if limit is not None]
        return " AND ".join([*parts, *self.conditions])


def conflict_fields(batch: Batch, title: str, resolution: str) -> str:
    """What each line of the conflict report begins with, as a list of SQL constants."""
    fields = {"database": batch.database, "schema": batch.schema, "table": batch.table, "target": title, "resolution": resolution}
    return "'aa-conflict' AS format, 1 AS version, " + ", ".join(f"{literal(value)} AS {ident(name)}" for name, value in fields.items())


class Statements:
    """Every statement for the batches of one shape. `direct` are those for batches that hold no "$array", which are cheaper."""

    def __init__(self, target: Target, mapping: Mapping, key: Sequence[str], window: Window, functions: Functions) -> None:
        self.table, self.title = target.place.qualified, target.place.title
        self._mapping, self._condition = mapping, window.condition
        self._key = [ident(name) for name in key]
        self._names = [ident(column.name) for column, _ in mapping.written]
        self._columns = [column for column, _ in mapping.written]
        needed = {column.name for column in self._columns} | {window.timestamp}
        self._read: list[Column] = [column for column in mapping.archived
                                    if column.codec is not None and (column.name in needed or ident(column.name) in self._condition
                                                                     or functions.transform)]
        self._merge = [(column, f"({functions.merge[column.name]})::{column.type}") for column in self._columns if column.name in functions.merge]
        self._same = next(name for name in ("same", "same_", "same__") if ident(name) not in self._names)
        self.filtered = bool(self._condition)
        self._indexed = any(unique <= frozenset(key) for unique in target.unique)
        self.direct = copy.copy(self)
        self.direct._read = [column.directly() for column in self._read]

    @property
    def casts(self) -> bool:
        """True if a type has changed, so that `losing` must be asked."""
        return any(cast.kept for _, cast in self._mapping.written)

    def losing(self) -> str:
        """Counts the staged rows that would not come back equal from the table's types."""
        kept = " AND ".join(cast.kept for _, cast in self._mapping.written if cast.kept)
        return f"SELECT count(*) FROM {self._archived(STAGED)} WHERE {' AND '.join(filter(None, (self._condition, f'({kept}) IS NOT TRUE')))}"

    def count(self) -> str:
        """Counts the staged rows that are meant."""
        return f"SELECT count(*) FROM {self.rows()}"

    def insert(self) -> str:
        """Puts every row that is meant into the table."""
        return f"{self._insert()} SELECT {', '.join(self._named('v'))} FROM {self.rows()}"

    def clash(self) -> str:
        """Keeps the rows whose key is in the table, and whether what is there is the same, byte for byte."""
        return (f"CREATE TEMPORARY TABLE aa_clash ON COMMIT DROP AS SELECT v.*, {self._equal('t', 'v')} AS {ident(self._same)} "
                f"FROM {self.rows()} {self._beside('JOIN')}")

    def clashes(self) -> str:
        """(rows that are there already, rows of which another version is there)."""
        same = f"c.{ident(self._same)}"
        return f"SELECT count(*) FILTER (WHERE {same}), count(*) FILTER (WHERE NOT {same}) FROM {CLASH} c"

    def insert_missing(self, on_conflict: str = "") -> str:
        """Puts the rows into the table whose key is not there."""
        return (f"{self.insert()} WHERE NOT EXISTS (SELECT FROM {CLASH} c WHERE {self._keyed('c', 'v')})"
                + (f" ON CONFLICT {on_conflict}" if on_conflict else ""))

    def overwrite(self) -> str:
        """Gives the rows that are there the archived values."""
        return (f"UPDATE {self.table} AS t SET {self._set('c')} FROM {CLASH} c "
                f"WHERE {self._keyed('t', 'c')} AND NOT c.{ident(self._same)}")

    def merge(self) -> str:
        """Gives the rows that are there what the user's expressions make of them and of the archived ones."""
        made = ", ".join(f"{ident(column.name)} = {expression}" for column, expression in self._merge)
        return f"UPDATE {self.table} AS t SET {made} FROM {CLASH} v WHERE {self._keyed('t', 'v')} AND NOT v.{ident(self._same)}"

    def unmerged(self) -> str:
        """Counts the rows that a second merge would change again: then a restore could not be run again."""
        images = [", ".join(made) for made in zip(*(
            (column.image("t"), column.image("m")) for column, _ in self._merge))]
        again = ", ".join(f"{expression} AS {ident(column.name)}" for column, expression in self._merge)
        return (f"SELECT count(*) FROM {CLASH} v JOIN {self.table} t ON {self._keyed('t', 'v')} CROSS JOIN LATERAL (SELECT {again}) m "
                f"WHERE NOT v.{ident(self._same)} AND NOT record_image_eq(ROW({images[0]}), ROW({images[1]}))")

    def mergeable(self) -> list[tuple[str, str]]:
        """(column, a query that tries its merge on no row) of each expression; a column that cannot be set is left out."""
        return [(column.name, f"SELECT {expression} FROM {self.table} t, {self.table} v WHERE false") for column, expression in self._merge
                if ident(column.name) in self._settable()]

    def upsert(self) -> str:
        """Puts every row into the table that is not there as it is, over what has its key."""
        return (f"{self.insert()} WHERE NOT EXISTS (SELECT FROM {CLASH} c WHERE {self._keyed('c', 'v')} AND c.{ident(self._same)}) "
                f"ON CONFLICT ({', '.join(self._key)}) DO UPDATE SET {self._set('EXCLUDED')}")

    @property
    def changeable(self) -> bool:
        """True if there is a column beside the key that an update could set."""
        return bool(self._settable())

    def clash_lines(self, fields: str) -> str:
        """COPY of one JSON line for each row of which another version is in the table; `fields` are its first ones, SQL."""
        return (f"COPY (SELECT row_to_json(r.*) FROM (SELECT {fields}, {self._key_json('c')} "
                f"FROM {CLASH} c WHERE NOT c.{ident(self._same)}) r) TO STDOUT {COPY_OUT}")

    def clash_here(self, source: str) -> str:
        """For a dry run, which writes no table, of the JSON array in the text `json`: (rows meant, there already, another version there)."""
        there = f"t.{self._key[0]} IS NOT NULL"
        return (f"SELECT count(*), count(*) FILTER (WHERE {there} AND {self._equal('t', 'v')}), count(*) FILTER "
                f"(WHERE {there} AND NOT {self._equal('t', 'v')}) FROM {self.rows(source)} {self._beside('LEFT JOIN')}")

    def clash_lines_here(self, source: str, fields: str) -> str:
        """The same for the lines of the conflict report: one text a row."""
        return (f"SELECT row_to_json(r.*)::text FROM (SELECT {fields}, {self._key_json('v')} "
                f"FROM {self.rows(source)} {self._beside('JOIN')} WHERE NOT {self._equal('t', 'v')}) r")

    def sample(self, rows: int, careful: bool, skipping: bool) -> str:
        """(rows looked at, rows that are not in the table as they were archived) of a random 1 %, at least SAMPLE_ROWS.

        `skipping` leaves out the rows of which another version was left in the table.
        """
        share = min(1.0, max(0.01, SAMPLE_ROWS / max(1, rows)))
        arrays = 1.0 if share > SAMPLED_ARRAYS or rows < 5000 else SAMPLED_ARRAYS
        left = (f" AND NOT EXISTS (SELECT FROM {CLASH} c WHERE {self._keyed('c', 'v')} AND NOT c.{ident(self._same)})"
                if careful and skipping else "")
        sampled = (f"(SELECT v.* FROM {self.rows(f'{STAGED} TABLESAMPLE BERNOULLI ({100 * arrays})')} "
                   f"WHERE random() < {share / arrays:.6f}{left}) v")
        found = f"{self._keyed('t', 'v')} AND {self._equal('t', 'v')}"
        if self._indexed:
            return f"SELECT count(*), count(*) FILTER (WHERE NOT EXISTS (SELECT FROM {self.table} t WHERE {found})) FROM {sampled}"
        return f"SELECT count(*), count(*) FILTER (WHERE t.tableoid IS NULL) FROM {sampled} LEFT JOIN {self.table} t ON {found}"

    def rows(self, source: str = STAGED) -> str:
        """The rows that are meant, in the table's types, as a relation called v."""
        chosen = ", ".join(f"{cast.value} AS {ident(column.name)}" for column, cast in self._mapping.written)
        where = f" WHERE {self._condition}" if self._condition else ""
        return f"(SELECT {chosen} FROM {self._archived(source)}{where}) v"

    def _archived(self, source: str) -> str:
        """The rows as they were archived, as a relation called a."""
        return (f"(SELECT {table_columns.values(self._read, 'x')} FROM {source}, "
                f"json_to_recordset(s.rows) AS x({table_columns.record(self._read)})) a")

    def _beside(self, join: str) -> str:
        """The table's rows of the same key. A fresh table has no statistics, and the planner would read it whole each time:
        where there is an index on the key, OFFSET keeps it from that."""
        if not self._indexed:
            return f"{join} {self.table} t ON {self._keyed('t', 'v')}"
        return f"{join} LATERAL (SELECT t.* FROM {self.table} t WHERE {self._keyed('t', 'v')} OFFSET 0) t ON true"

    def _insert(self) -> str:
        return f"INSERT INTO {self.table} ({', '.join(self._names)}) OVERRIDING SYSTEM VALUE"

    def _named(self, alias: str) -> list[str]:
        return [f"{alias}.{name}" for name in self._names]

    def _keyed(self, one: str, other: str) -> str:
        return " AND ".join(f"{one}.{name} = {other}.{name}" for name in self._key)

    def _equal(self, one: str, other: str) -> str:
        images = [", ".join(column.image(alias) for column in self._columns) for alias in (one, other)]
        return f"record_image_eq(ROW({images[0]}), ROW({images[1]}))"

    def _key_json(self, alias: str) -> str:
        """The columns and values of a row's key, each a JSON array."""
        by_name = {ident(column.name): column for column in self._columns}
        listed = ", ".join(by_name[name].encode(alias) for name in self._key)
        names = json.dumps([by_name[name].name for name in self._key], ensure_ascii=False)
        return f"{literal(names)}::json AS columns, json_build_array({listed}) AS key"

    def _settable(self) -> list[str]:
        return [ident(column.name) for column in self._columns if column.identity != "a" and ident(column.name) not in self._key]

    def _set(self, alias: str) -> str:
        return ", ".join(f"{name} = {alias}.{name}" for name in self._settable())
