"""The SQL that locks, copies and deletes one batch of one physical table.

Measured on 11 to 18 (postgres.md, section 3): a temporary table holds number, key and ctid of the batch; copy
and delete read `ctid = ANY(...)`, which is a TID scan on every version and costs the same for the first batch and
the last. A ctid is used only inside the transaction that locked it, and never believed alone: delete compares the
full key too or, as copy, the digest over the keys of what it met.

COPY and DDL take no parameters, so literals come from `quoting.literal`, identifiers from `quoting.ident`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres.catalog import Reference, Shape
from audit_archiver.postgres.quoting import ident, literal

BATCH = "pg_temp.aa_batch"

ROWS_AT_ONCE = 64  # 8 kB each at most, and even packed without end and escaped far from the 1 GB of a text
BYTES_AT_ONCE = 1 << 16

EXPANSION = 1530  # bytes of a line to a stored one, at most: lz4 packs 255 to 1, and \\u0001 is six

_LINE_END = r"E'}\n'"

_INTEGERS = ("smallint", "integer", "bigint")  # their text is their JSON, without a way through to_json

_CSV = r"WITH (FORMAT csv, QUOTE E'\x01', DELIMITER E'\x02')"


@dataclass(frozen=True)
class Window:
    """Which rows are eligible: older than `cutoff`, and within [start, end) where given; RFC 3339 UTC texts. Not those in
    one of the ranges [first, last] in `held`, texts of the timestamp's own type."""

    cutoff: str
    start: Optional[str] = None
    end: Optional[str] = None
    held: tuple[tuple[str, str], ...] = ()


def window(job: Mapping[str, Any]) -> Window:
    """What a job line asks for."""
    return Window(job["cutoff"], job["start"], job["end"], tuple((first, last) for first, last in job.get("held", ())))


def predicate(shape: Shape, window: Window, alias: str = "t") -> str:
    """The condition of eligibility (REQ-ARC-001, 002, 005; REQ-TIME-001, 003).

    Strictly older than the cutoff; NULL and infinite timestamps are never eligible. A `timestamp` is taken as
    UTC. A `date` covers a whole day, so it is eligible only when that day is over: it is compared with the
    cutoff's date. Rows that other rows still reference by a plain foreign key stay (S3).
    """
    column = f"{alias}.{ident(shape.timestamp)}"
    parts = [f"{column} > {_time(shape, '-infinity')}", f"{column} < {_time(shape, window.cutoff)}"]
    if window.start is not None:
        parts.append(f"{column} >= {_time(shape, window.start)}")
    if window.end is not None:
        parts.append(f"{column} < {_time(shape, window.end)}")
    parts += [f"NOT {_within(shape, held, alias)}" for held in window.held]
    parts += [f"NOT {_referenced(reference, alias)}" for reference in shape.references if not reference.destroys]
    return " AND ".join(parts)


def count(shape: Shape, window: Window) -> str:
    """Counts the eligible rows."""
    return f"SELECT count(*) FROM ONLY {shape.qualified} t WHERE {predicate(shape, window)}"


def _within(shape: Shape, held: tuple[str, str], alias: str) -> str:
    column, (first, last) = f"{alias}.{ident(shape.timestamp)}", held
    return f"({column} >= {_time(shape, first)} AND {column} <= {_time(shape, last)})"


def never_eligible(shape: Shape) -> str:
    """Counts rows with a NULL and with an infinite timestamp, which are left in place (T7)."""
    column = f"t.{ident(shape.timestamp)}"
    return (f"SELECT count(*) FILTER (WHERE {column} IS NULL), count(*) FILTER (WHERE {column} IS NOT NULL) "
            f"FROM ONLY {shape.qualified} t WHERE {column} IS NULL OR {column} = {_time(shape, 'infinity')} "
            f"OR {column} = {_time(shape, '-infinity')}")


class Statements:
    """Every statement of a batch of `shape` within `window`."""

    def __init__(self, shape: Shape, window: Window) -> None:
        self.shape, self.window = shape, window
        self._columns = shape.ordered()
        kept = list(dict.fromkeys([*shape.key, shape.timestamp]))
        taken = [column.name for column in self._columns]
        self._n, self._tid = _unused("n", taken), _unused("tid", taken)
        self._kept = [ident(name) for name in kept]
        # the sweep's order: timestamp first, then the key (REQ-ARC-007)
        self._order = [shape.timestamp] + [name for name in shape.key if name != shape.timestamp]
        self._on = " AND ".join(f"b.{ident(name)} = t.{ident(name)}" for name in shape.key)
        self._tids = f"t.ctid = ANY(ARRAY(SELECT {self._tid} FROM {BATCH}))"

    @property
    def number_column(self) -> str:
        """The batch table's column with the row's number, quoted; not `n` where a key column is called so."""
        return self._n

    def create(self) -> list[str]:
        """Make the batch table anew; run outside a transaction, so that a rollback does not undo it."""
        kept = ", ".join(f"t.{name}" for name in self._kept)
        return [f"DROP TABLE IF EXISTS {BATCH}",
                f"CREATE TEMPORARY TABLE aa_batch ON COMMIT DELETE ROWS AS SELECT 0::bigint AS {self._n}, {kept}, "
                f"t.ctid AS {self._tid} FROM ONLY {self.shape.qualified} t WITH NO DATA"]

    def fill(self, cursor: Optional[Sequence[str]], limit: int, *, lock: bool) -> str:
        """Take the next `limit` eligible rows after `cursor`, locking them (SKIP LOCKED) or only reading them."""
        kept = ", ".join(f"t.{name}" for name in self._kept)
        order = ", ".join(self._ranked("t", name) for name in self._order)
        locking = " FOR UPDATE OF t SKIP LOCKED" if lock else ""
        return (f"INSERT INTO {BATCH} SELECT row_number() OVER (), s.* FROM (SELECT {kept}, t.ctid "
                f"FROM ONLY {self.shape.qualified} t WHERE {predicate(self.shape, self.window)}{self._after(cursor)} "
                f"ORDER BY {order} LIMIT {int(limit)}{locking}) s")

    def fitting(self, cursor: Optional[Sequence[str]], limit: int, size: int) -> str:
        """Of the next `limit` rows: how many have `size` bytes together as they are stored, how many there are, and the
        largest one's bytes.

        Nothing is locked and nothing detoasted: rows cannot be unlocked again, so the cap comes first (S15).
        """
        order = ", ".join(self._ranked("t", name) for name in self._order)
        return (f"SELECT count(*) FILTER (WHERE total <= {int(size)}), count(*), coalesce(max(size), 0) FROM "
                f"(SELECT size, sum(size) OVER (ROWS UNBOUNDED PRECEDING) AS total FROM (SELECT {self._sizes()} AS size "
                f"FROM ONLY {self.shape.qualified} t WHERE {predicate(self.shape, self.window)}"
                f"{self._after(cursor)} ORDER BY {order} LIMIT {int(limit)}) s) w")

    def find(self, key_rows: str) -> str:
        """Lock the rows whose keys are given as a FROM item `k(n, key columns)`, in the order of n, waiting for locks."""
        kept = ", ".join(f"t.{name}" for name in self._kept)
        return (f"INSERT INTO {BATCH} SELECT s.* FROM (SELECT k.{self._n}, {kept}, t.ctid FROM {self._by_key(key_rows)} "
                f"ORDER BY k.{self._n} FOR UPDATE OF t) s")

    def facts(self) -> str:
        """One row about the batch: rows, key digest, first, last (JSON texts), cursor (text[]), least and greatest timestamp."""
        outer = f"json_build_array({', '.join([self._timestamp_json('b')] + [self.shape.column(n).encode('b') for n in self.shape.key])})"
        cursor = ", ".join(f"b.{ident(name)}::text" for name in self._order)
        stamp = ident(self.shape.timestamp)
        edge = f"SELECT {outer}::text AS bound, ARRAY[{cursor}] AS cursor FROM {BATCH} b WHERE b.{self._n} ="
        return (f"SELECT a.rows, a.digest, f.bound, l.bound, l.cursor, a.least, a.greatest FROM "
                f"(SELECT count(*) AS rows, {self._digest()} AS digest, to_json(min(b.{stamp})) #>> '{{}}' AS least, "
                f"to_json(max(b.{stamp})) #>> '{{}}' AS greatest, min(b.{self._n}) AS low, max(b.{self._n}) AS high "
                f"FROM {BATCH} b) a, LATERAL ({edge} a.low) f, LATERAL ({edge} a.high) l")

    def others(self) -> str:
        """Whether another session, or a prepared transaction, may have locked rows of the table. Only then is it worth
        counting what was skipped: that reads every row of the batch once more."""
        return ("SELECT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'relation' AND l.mode IN ('RowShareLock', 'RowExclusiveLock') "
                f"AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND l.relation = {self.shape.oid} "
                "AND (l.pid IS NULL OR l.pid NOT IN (SELECT a.pid FROM pg_stat_activity a "
                "WHERE a.application_name = current_setting('application_name'))))")

    def skipped(self, cursor: Optional[Sequence[str]], last: Optional[Sequence[str]]) -> str:
        """Counts what is eligible after `cursor` up to and with `last` (None: up to the cutoff), locked by others or not."""
        upto = f" AND {self._row('t')} <= {self._literals(last)}" if last is not None else ""
        return (f"SELECT count(*) FROM ONLY {self.shape.qualified} t WHERE "
                f"{predicate(self.shape, self.window)}{self._after(cursor)}{upto}")

    def copy(self) -> str:
        """Writes the batch as JSON lines, key columns first, in batch order, in COPY's binary format: (rows, their lines).

        Many rows in one message, which nobody has to look at by itself or to search for what CSV would quote: all that
        row_to_json and CSV cost more than this is a third of the statement. The rows are fetched by the places where they
        were locked; the key digest over what was written must still be that of the locked keys. A table is rarely written
        quite in the order of its times: rows that lie in another order than the batch's are sorted, by the message.
        """
        def lines(alias: str, order: str = "") -> str:
            return f"string_agg({table_columns.line_sql(self._columns, alias, end=_LINE_END)}, ''{order})"

        table = f"FROM ONLY {self.shape.qualified}"
        return (f"COPY (SELECT g.* FROM ({self._places()}) p, LATERAL (SELECT count(*)::int4, "
                f"CASE WHEN array_agg(t.ctid) = p.tids THEN {lines('t')} ELSE "
                f"(SELECT {lines('u', ' ORDER BY array_position(p.tids, u.ctid)')} {table} u WHERE u.ctid = ANY(p.tids)) END "
                f"{table} t WHERE t.ctid = ANY(p.tids)) g) TO STDOUT WITH (FORMAT binary)")

    def _places(self) -> str:
        """The batch's places in arrays, in batch order: so many rows each that their lines make a good message.

        Where values may lie out of line, by the size of the rows as they are stored.
        """
        if not self.shape.toasted:
            return (f"SELECT array_agg(b.{self._tid} ORDER BY b.{self._n}) AS tids FROM {BATCH} b "
                    f"GROUP BY (b.{self._n} - 1) / {ROWS_AT_ONCE} ORDER BY min(b.{self._n})")
        return (f"SELECT array_agg(s.tid ORDER BY s.n) AS tids FROM (SELECT b.{self._n} AS n, b.{self._tid} AS tid, "
                f"sum({self._sizes()}) OVER (ORDER BY b.{self._n}) / {BYTES_AT_ONCE} AS part FROM ONLY {self.shape.qualified} t "
                f"JOIN {BATCH} b ON {self._on} WHERE {self._tids}) s GROUP BY s.part ORDER BY min(s.n)")

    def _sizes(self) -> str:
        """The bytes of a row `t` as it is stored, nothing detoasted."""
        return " + ".join(f"coalesce(pg_column_size(t.{ident(column.name)}), 0)" for column in self._columns)

    def delete(self) -> str:
        """Deletes what lies where the batch was locked, and says how many rows went and how many of them bear a key of the
        batch, by what the server returned of the very rows (S4)."""
        keys = ", ".join(f"t.{ident(name)}" for name in self.shape.key)
        on = " AND ".join(f"b.{ident(name)} = d.{ident(name)}" for name in self.shape.key)
        return (f"WITH d AS (DELETE FROM ONLY {self.shape.qualified} t WHERE {self._tids} RETURNING {keys}) "
                f"SELECT count(*), count(b.{self._n}) FROM d LEFT JOIN {BATCH} b ON {on}")

    def recount(self) -> str:
        """Counts rows that bear a key of the batch: must be 0 after the delete (a trigger may put them back, S4)."""
        return f"SELECT count(*) FROM ONLY {self.shape.qualified} t JOIN {BATCH} b ON {self._on}"

    def present(self, key_rows: str) -> str:
        """Counts keys of a FROM item `k(n, key columns)` that are in the table."""
        return f"SELECT count(*) FROM {self._by_key(key_rows)}"

    def numbers(self, key_rows: str) -> str:
        """The numbers n of the keys that are in the table, in order; reads only."""
        return f"SELECT k.{self._n} FROM {self._by_key(key_rows)} ORDER BY k.{self._n}"

    def copy_by_key(self, key_rows: str) -> str:
        """Writes the rows with these keys as JSON lines in the order of n; needs no batch table and reads only."""
        return (f"COPY (SELECT row_to_json(r.*) FROM (SELECT {self._encoded('t')} FROM (SELECT t.* FROM {self._by_key(key_rows)} "
                f"ORDER BY k.{self._n}) t) r) TO STDOUT {_CSV}")

    def sample(self, rows: int) -> str:
        """The JSON lines of the first eligible rows, as text; needs no batch table, locks nothing and reads only."""
        order = ", ".join(self._ranked("t", name) for name in self._order)
        return (f"SELECT (SELECT row_to_json(r.*) FROM (SELECT {self._encoded('t')}) r)::text FROM (SELECT t.* FROM ONLY "
                f"{self.shape.qualified} t WHERE {predicate(self.shape, self.window)} ORDER BY {order} LIMIT {int(rows)}) t")

    def held(self, ranges: Sequence[tuple[str, str]]) -> str:
        """Counts the batch's rows that lie in one of the ranges [first, last]."""
        return f"SELECT count(*) FROM {BATCH} b WHERE {' OR '.join(_within(self.shape, each, 'b') for each in ranges)}"

    def children(self, reference: Reference) -> str:
        """Counts rows of a child table that the delete would change or destroy."""
        on = " AND ".join(f"c.{ident(own)} = t.{ident(target)}" for own, target in zip(reference.columns, reference.targets))
        return (f"SELECT count(*) FROM ONLY {self.shape.qualified} t JOIN {BATCH} b ON {self._on} "
                f"JOIN {ident(reference.schema)}.{ident(reference.child)} c ON {on} WHERE {self._tids}")

    def inexact(self, *, all_columns: bool, numbers: Optional[tuple[int, int]] = None) -> Optional[str]:
        """The numbers and keys of rows that would not come back as they are, or None if no column needs the check.

        `numbers` (first, last) asks about some of the rows only.
        """
        some = "" if numbers is None else f" AND b.{self._n} BETWEEN {numbers[0]} AND {numbers[1]}"
        columns = [c for c in self._columns if not c.generated and (all_columns or c.roundtrip_always)]
        if not columns:
            return None
        return (f"SELECT t.{self._n}, {self._key_text('t')} FROM (SELECT b.{self._n}, t.* FROM ONLY {self.shape.qualified} t "
                f"JOIN {BATCH} b ON {self._on} WHERE {self._tids}{some}) t WHERE NOT ({table_columns.roundtrip_sql(columns, 't')})")

    def too_wide(self, size: int) -> str:
        """The numbers and keys of rows whose line has more than `size` bytes. Only those are made whose row could: what is
        stored can be packed, and escapes make it longer still."""
        stored, line = self._sizes(), table_columns.line_sql(self._columns, "t")
        return (f"SELECT b.{self._n}, {self._key_text('b')} FROM ONLY {self.shape.qualified} t JOIN {BATCH} b ON {self._on} "
                f"WHERE {self._tids} AND CASE WHEN {stored} > {int(size)} THEN true "
                f"WHEN {stored} > {int(size) // EXPANSION} THEN octet_length({line}) > {int(size)} ELSE false END")

    def key_of(self, number: int) -> str:
        """The number and the key text of one row of the batch."""
        return f"SELECT b.{self._n}, {self._key_text('b')} FROM {BATCH} b WHERE b.{self._n} = {int(number)}"

    def leave_numbers(self, numbers: Sequence[int]) -> str:
        """Takes rows out of the batch again; they stay locked until the transaction ends, and in the table after it."""
        return f"DELETE FROM {BATCH} WHERE {self._n} IN ({', '.join(str(int(n)) for n in numbers)})"

    def leave_keys(self, key_texts: Sequence[str]) -> str:
        """Takes rows with these key texts out of the batch."""
        return f"DELETE FROM {BATCH} b WHERE {self._key_text('b')} IN ({', '.join(map(literal, key_texts))})"

    def key_rows(self, key_texts: str, after: int = 0) -> str:
        """A FROM item `k(n, key columns)` out of a text[] expression of JSON arrays of one row's key values each.

        n counts from `after` + 1, so that a long list can be given in parts.
        """
        wanted = [self.shape.column(name) for name in self.shape.key]
        values = ", ".join(f"{column.decode('x.' + ident(column.name))} AS {ident(column.name)}" for column in wanted)
        record = ", ".join(f"{ident(column.name)} {column.record_type}" for column in wanted)
        objects = " || ',' || ".join(literal(_json_name(column.name) + ":") + f" || (u.key -> {n})::text"
                                     for n, column in enumerate(wanted))
        return (f"(SELECT u.n + {int(after)} AS {self._n}, {values} FROM (SELECT key::json, n FROM unnest({key_texts}) "
                f"WITH ORDINALITY AS u(key, n)) u, LATERAL json_to_record(('{{' || {objects} || '}}')::json) AS x({record})) k")

    def key_list(self, key_texts: Sequence[bytes], after: int = 0) -> str:
        """`key_rows` of key texts as formats.keys has them, written out: COPY takes no parameters."""
        listed = ", ".join(literal(f"[{text.decode()}]") for text in key_texts)
        return self.key_rows(f"ARRAY[{listed}]::text[]", after)

    def digests_by_key(self, key_rows: str) -> str:
        """The number n and the SHA-256 (hex) of the JSON line of each row with these keys, in the order of n."""
        line = f"(SELECT row_to_json(r.*) FROM (SELECT {self._encoded('t')}) r)::text"
        return (f"SELECT k.{self._n}, encode(sha256(convert_to({line}, 'UTF8')), 'hex') "
                f"FROM {self._by_key(key_rows)} ORDER BY k.{self._n}")

    def every_digest(self) -> str:
        """Writes of each row of the table the SHA-256 (hex) of its JSON line, a space and its key text; reads only."""
        line = table_columns.line_sql(self._columns, "t")
        return (f"COPY (SELECT encode(sha256(convert_to({line}, 'UTF8')), 'hex') || ' ' || {self._key_text('t')} "
                f"FROM ONLY {self.shape.qualified} t) TO STDOUT {_CSV}")

    def _by_key(self, key_rows: str) -> str:
        on = " AND ".join(f"k.{ident(name)} = t.{ident(name)}" for name in self.shape.key)
        return f"{key_rows} JOIN ONLY {self.shape.qualified} t ON {on}"

    def _encoded(self, alias: str) -> str:
        return ", ".join(f"{column.encode(alias)} AS {ident(column.name)}" for column in self._columns if column.generated != "v")

    def _key_text(self, alias: str) -> str:
        """The bytes of the key's JSON values as they stand in the row line, joined by ","."""
        wanted = map(self.shape.column, self.shape.key)
        return " || ',' || ".join(f"{alias}.{ident(column.name)}::text" if column.type in _INTEGERS else
                                  f"to_json({column.encode(alias)})::text" for column in wanted)

    def _digest(self) -> str:
        return _sha256(self._key_text('b'), f"b.{self._n}")

    def _timestamp_json(self, alias: str) -> str:
        return self.shape.column(self.shape.timestamp).encode(alias)

    def _row(self, alias: str) -> str:
        return "(" + ", ".join(self._ranked(alias, name) for name in self._order) + ")"

    def _ranked(self, alias: str, name: str) -> str:
        """A column as it is ordered, and compared with a cursor: by one operator in both places."""
        rank = self.shape.column(name).ranked_as
        return f"{alias}.{ident(name)}" + (f"::{rank}" if rank else "")

    def _literals(self, cursor: Sequence[str]) -> str:
        if len(cursor) != len(self._order):
            raise ValueError("the cursor belongs to another table")
        return "(" + ", ".join(f"{literal(value)}::{column.ranked_as or column.type}"
                               for value, column in zip(cursor, map(self.shape.column, self._order))) + ")"

    def _after(self, cursor: Optional[Sequence[str]]) -> str:
        return "" if cursor is None else f" AND {self._row('t')} > {self._literals(cursor)}"


def _time(shape: Shape, text: str) -> str:
    """A time literal of the timestamp column's own type, so that its index serves."""
    if text in ("infinity", "-infinity"):
        return f"{literal(text)}::{shape.timestamp_type}"
    if shape.timestamp_type == "timestamptz":
        return f"{literal(text)}::timestamptz"
    return f"({literal(text)}::timestamptz AT TIME ZONE 'UTC')::{shape.timestamp_type}"


def _sha256(text: str, order: str) -> str:
    return f"encode(sha256(convert_to(string_agg({text}, E'\\n' ORDER BY {order}) || E'\\n', 'UTF8')), 'hex')"


def _referenced(reference: Reference, alias: str) -> str:
    on = " AND ".join(f"c.{ident(own)} = {alias}.{ident(target)}" for own, target in zip(reference.columns, reference.targets))
    return f"EXISTS (SELECT FROM {ident(reference.schema)}.{ident(reference.child)} c WHERE {on})"


def _unused(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return ident(name)


def _json_name(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
