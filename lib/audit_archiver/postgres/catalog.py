"""The shape of a table: what must be true of it before rows are deleted, and its fingerprint.

The fingerprint is read again inside each batch's transaction, after the locks and after the DELETE: FOR
UPDATE keeps ADD COLUMN out, but not CREATE TRIGGER or a new ON DELETE CASCADE key (postgres.md C7).
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, replace
from typing import Any, Optional, Sequence

from audit_archiver.exits import ConfigError, PermissionDenied
from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import ident

TIMESTAMP_TYPES = {1184: "timestamptz", 1114: "timestamp", 1082: "date"}
RESERVED_COLUMNS = ("_archived_at", "_batch_id", "_source_database", "_source_table")

_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "p": "a partitioned table",
          "S": "a sequence", "i": "an index", "I": "an index", "c": "a composite type", "t": "a TOAST table"}
_ACTIONS = {"a": "NO ACTION", "r": "RESTRICT", "c": "CASCADE", "n": "SET NULL", "d": "SET DEFAULT"}

_TABLE_SQL = """
SELECT c.oid, c.relkind, c.relpersistence, a.amname, row_security_active(c.oid),
       c.reltoastrelid <> 0 AND pg_relation_size(c.reltoastrelid) > 0
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam
WHERE n.nspname = %s AND c.relname = %s
"""

_INDEXES_SQL = """
SELECT x.relname, i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL,
       ARRAY(SELECT coalesce(a.attname::text, '(expression)') FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
             LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
             WHERE k.n <= i.indnkeyatts ORDER BY k.n)
FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = %s AND i.indislive ORDER BY x.relname
"""

_REFERENCING_SQL = """
SELECT c.conname, n.nspname, r.relname, c.confdeltype, c.conrelid = c.confrelid,
       ARRAY(SELECT a.attname::text FROM unnest(c.conkey) WITH ORDINALITY AS k(attnum, n)
             JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.attnum ORDER BY k.n),
       ARRAY(SELECT a.attname::text FROM unnest(c.confkey) WITH ORDINALITY AS k(attnum, n)
             JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.attnum ORDER BY k.n)
FROM pg_constraint c JOIN pg_class r ON r.oid = c.conrelid JOIN pg_namespace n ON n.oid = r.relnamespace
WHERE c.contype = 'f' AND c.confrelid = %s ORDER BY c.conname, c.oid
"""

# A constant of a type brings the type's own collation along, which then is not the column's; 100 is the default one
_OTHER_COLLATION_SQL = """
SELECT a.attname::text FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = %s AND a.attname = ANY(%s) AND t.typcollation NOT IN (0, 100) AND a.attcollation <> t.typcollation
"""

# The log that is written now names the timeline; the control file's (c) is the old one until the first checkpoint
# after a promotion.
TIMELINE = ("CASE WHEN pg_is_in_recovery() THEN c.timeline_id "
            "ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END")

_FINGERPRINT_SQL = """
SELECT concat_ws(E'\\n', c.oid, c.relname, c.relnamespace, c.relkind, c.relrowsecurity, c.relforcerowsecurity,
  (SELECT string_agg(concat_ws(',', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attisdropped, a.attnotnull, a.attcollation),
                     ';' ORDER BY a.attnum)
     FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0),
  (SELECT string_agg(concat_ws(',', t.tgname, t.tgtype, t.tgenabled, t.tgfoid), ';' ORDER BY t.oid)
     FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgtype & 8 = 8),
  (SELECT string_agg(concat_ws(',', r.rulename, r.ev_type, r.is_instead, r.ev_enabled), ';' ORDER BY r.oid)
     FROM pg_rewrite r WHERE r.ev_class = c.oid),
  (SELECT string_agg(concat_ws(',', f.conname, f.conrelid, f.confdeltype), ';' ORDER BY f.oid)
     FROM pg_constraint f WHERE f.contype = 'f' AND f.confrelid = c.oid),
  (SELECT string_agg(concat_ws(',', p.polname, p.polcmd), ';' ORDER BY p.oid) FROM pg_policy p WHERE p.polrelid = c.oid))
FROM pg_class c WHERE c.oid = %s
"""


@dataclass(frozen=True)
class Reference:
    """A foreign key that points at the table: `child`'s `columns` reference our `targets`."""

    name: str
    schema: str
    child: str
    action: str
    itself: bool
    columns: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def destroys(self) -> bool:
        """True where deleting our row changes or deletes rows that nobody archived."""
        return self.action in ("CASCADE", "SET NULL", "SET DEFAULT")


@dataclass(frozen=True)
class Shape:
    """A physical table as it may be archived; of a parent the rows that are its own."""

    oid: int
    schema: str
    name: str
    columns: tuple[table_columns.Column, ...]
    key: tuple[str, ...]
    timestamp: str
    timestamp_type: str
    indexes: tuple[tuple[str, tuple[str, ...]], ...]
    references: tuple[Reference, ...]
    delete_triggers: tuple[str, ...]
    points_elsewhere: bool
    toasted: bool
    sha256: str
    find: tuple[str, ...] = ()

    @property
    def qualified(self) -> str:
        """The quoted name for SQL."""
        return f"{ident(self.schema)}.{ident(self.name)}"

    @property
    def title(self) -> str:
        """The name for messages."""
        return f"{self.schema}.{self.name}"

    @property
    def alone(self) -> bool:
        """True if its batches must not overlap others: deletes would wait for each other's row locks (S3)."""
        return self.points_elsewhere or bool(self.references)

    def ordered(self) -> list[table_columns.Column]:
        """The columns as they stand in a row line: the key, in its order, what rows are found by, the rest in table order.

        Where the first ones end is plain to see in any row, so nothing in a later value can be taken for one of them.
        """
        by_name = {column.name: column for column in self.columns}
        return [by_name[name] for name in dict.fromkeys([*self.key, *self.find, *by_name])]

    def as_exported(self, columns: Sequence[Sequence[str]]) -> Shape:
        """The same table with the columns (name, type) of a batch line, as they stand in its rows; without those that are gone."""
        by_name = {column.name: column for column in self.columns}
        return replace(self, columns=tuple(by_name[name] for name, _ in columns if name in by_name))

    def column(self, name: str) -> table_columns.Column:
        """The column called `name`."""
        return next(column for column in self.columns if column.name == name)


def shape(connection: connect.Connection, schema: str, name: str, key: tuple[str, ...], timestamp: str,
          at: Optional[str] = None, find: Sequence[str] = ()) -> Shape:
    """Read the shape of a table and refuse, by name and with the remedy, what cannot be archived exactly.

    Raises ConfigError (`at` is the table's place in the configuration) or PermissionDenied.
    """
    title = f"{schema}.{name}"
    found = connect.rows(connection, _TABLE_SQL, (schema, name))
    if not found:
        raise ConfigError(f"table '{title}' does not exist", at=at, hint=_nearest(connection, schema, name))
    oid, kind, persistence, method, secured, toasted = found[0]
    _refuse_kind(title, kind, persistence, method, at)
    if secured:
        raise PermissionDenied(f"table '{title}' has row-level security, which would hide rows from this role", at=at,
                               hint="give the role BYPASSRLS, or use a role that the policies do not bind")
    fingerprint = read_fingerprint(connection, oid)
    columns = tuple(table_columns.columns(connection, oid))
    _check_columns(title, columns, key, timestamp, at)
    timestamp_type = _timestamp_type(connection, oid, title, timestamp, at)
    indexes = connect.rows(connection, _INDEXES_SQL, (oid,))
    _check_find(title, columns, find, at)
    collated = [row[0] for row in connect.rows(connection, _OTHER_COLLATION_SQL, (oid, list(key)))]
    _check_key(title, columns, key, indexes, collated, at)
    rules = [row[0] for row in connect.rows(connection, "SELECT rulename FROM pg_rewrite WHERE ev_class = %s AND ev_type = '4'", (oid,))]
    if rules:
        raise ConfigError(f"table '{title}' has the rule '{rules[0]}' on DELETE, so a delete might not delete", at=at,
                          hint="drop the rule, or leave the table out")
    return Shape(
        oid=oid, schema=schema, name=name, columns=columns, key=tuple(key), timestamp=timestamp,
        timestamp_type=timestamp_type, indexes=tuple((row[0], tuple(row[2])) for row in indexes),
        references=tuple(Reference(r[0], r[1], r[2], _ACTIONS[r[3]], r[4], tuple(r[5]), tuple(r[6]))
                         for r in connect.rows(connection, _REFERENCING_SQL, (oid,))),
        delete_triggers=tuple(row[0] for row in connect.rows(connection, (
            "SELECT tgname FROM pg_trigger WHERE tgrelid = %s AND NOT tgisinternal AND tgtype & 8 = 8 AND tgenabled <> 'D'"), (oid,))),
        points_elsewhere=connect.scalar(connection, "SELECT EXISTS (SELECT FROM pg_constraint WHERE contype = 'f' AND conrelid = %s)", (oid,)),
        toasted=toasted, sha256=fingerprint, find=tuple(find))


def read_fingerprint(connection: connect.Connection, oid: int) -> str:
    """The digest of everything about the table that a batch relies on; "gone" if there is no such table."""
    found = connect.rows(connection, _FINGERPRINT_SQL, (oid,))
    return hashlib.sha256(found[0][0].encode()).hexdigest() if found else "gone"


def version(number: int) -> str:
    """server_version_num as people write it: 150018 is 15.18."""
    return f"{number // 10000}.{number % 10000}"


def server(connection: connect.Connection, table_oid: int) -> dict[str, Any]:
    """Which server, timeline, database and table this is: what makes a transaction id mean anything (C1)."""
    version, system, timeline, database_oid = connect.row(connection, (
        f"SELECT current_setting('server_version_num')::int, s.system_identifier::text, {TIMELINE}, d.oid::bigint "
        "FROM pg_control_system() s, pg_control_checkpoint() c, pg_database d WHERE d.datname = current_database()"))
    return {"version": version, "system": system, "timeline": timeline, "database_oid": database_oid, "table_oid": table_oid}


def _refuse_kind(title: str, kind: str, persistence: str, method: Optional[str], at: Optional[str]) -> None:
    if kind == "p":
        raise ConfigError(f"'{title}' is a partitioned table and holds no rows itself", at=at,
                          hint="aa-plan names its partitions, if it has any")
    if kind != "r":
        raise ConfigError(f"'{title}' is {_KINDS.get(kind, 'no table')}, not a table", at=at,
                          hint="name the table that holds the rows")
    if persistence != "p":
        raise ConfigError(f"table '{title}' is {'unlogged' if persistence == 'u' else 'temporary'}", at=at,
                          hint="its rows do not survive a crash; ALTER TABLE ... SET LOGGED first")
    if method not in (None, "heap"):
        raise ConfigError(f"table '{title}' uses the access method '{method}'; only heap is supported", at=at)


def _check_columns(title: str, columns: tuple[table_columns.Column, ...], key: tuple[str, ...], timestamp: str, at: Optional[str]) -> None:
    known = [column.name for column in columns]
    for wanted in (*key, timestamp):
        if wanted not in known:
            raise ConfigError(f"table '{title}' has no column '{wanted}'", at=at,
                              hint=f"its columns are {', '.join(known)}")
    for column in columns:
        if column.name in RESERVED_COLUMNS:
            raise ConfigError(f"table '{title}' has a column '{column.name}', a name that archived rows use for themselves", at=at,
                              hint="rename the column")
        if column.refusal:
            reason, remedy = column.refusal
            raise ConfigError(f"column '{column.name}' of table '{title}' cannot be archived exactly: {reason}", at=at, hint=remedy)


def _timestamp_type(connection: connect.Connection, oid: int, title: str, timestamp: str, at: Optional[str]) -> str:
    """timestamptz, timestamp or date, also beneath a domain."""
    base, shown = connect.row(connection, (
        "WITH RECURSIVE t(oid) AS (SELECT atttypid FROM pg_attribute WHERE attrelid = %s AND attname = %s UNION ALL "
        "SELECT p.typbasetype FROM pg_type p JOIN t ON p.oid = t.oid WHERE p.typtype = 'd') "
        "SELECT t.oid::bigint, format_type(t.oid, NULL) FROM t JOIN pg_type p ON p.oid = t.oid WHERE p.typtype <> 'd'"), (oid, timestamp))
    if base not in TIMESTAMP_TYPES:
        raise ConfigError(f"the timestamp column '{timestamp}' of table '{title}' has the type {shown}", at=at,
                          hint="it must be timestamp, timestamptz or date; its age cannot be trusted otherwise")
    return TIMESTAMP_TYPES[base]


def _check_key(title: str, columns: tuple[table_columns.Column, ...], key: tuple[str, ...],
               indexes: list[tuple[Any, ...]], collated: list[str], at: Optional[str]) -> None:
    """The key must identify a row for ever: unique now, checked at once, complete, never NULL, compared one way only."""
    nullable = [column.name for column in columns if column.name in key and column.nullable]
    if nullable:
        raise ConfigError(f"key column '{nullable[0]}' of table '{title}' can be NULL", at=at,
                          hint="set it NOT NULL, or name the primary key")
    nested = [column for column in columns if column.name in key and not column.scalar]
    if nested:
        raise ConfigError(f"key column '{nested[0].name}' of table '{title}' has the type {nested[0].type}, whose JSON is no single value",
                          at=at, hint="name a key of numbers, texts, dates or uuids")
    strange = [column for column in columns if column.name in key and not column.comparable]
    if strange:
        raise ConfigError(f"key column '{strange[0].name}' of table '{title}' has the type {strange[0].type}, which the server's own "
                          "operators do not compare", at=at, hint="name a key of numbers, texts, dates or uuids")
    if collated:
        raise ConfigError(f"key column '{collated[0]}' of table '{title}' has another collation than its type", at=at,
                          hint="name another key, or give the column its type's collation (ALTER TABLE ... ALTER COLUMN ... TYPE ... COLLATE ...)")
    fitting = [index for index in indexes if index[1] and set(index[2]) <= set(key)]
    if not fitting:
        unique = [", ".join(index[2]) for index in indexes if index[1]]
        raise ConfigError(f"table '{title}' has no primary key or unique index on '{', '.join(key)}', so rows could not be told apart",
                          at=at, hint=f"unique are: {' | '.join(unique)}" if unique else "add one, or remove the table")


def _check_find(title: str, columns: tuple[table_columns.Column, ...], find: Sequence[str], at: Optional[str]) -> None:
    """What rows are found by must have one text for each value, or a reader would look for another text than the row's."""
    by_name = {column.name: column for column in columns}
    for name in find:
        column = by_name.get(name)
        if column is None:
            near = difflib.get_close_matches(name, by_name, 1, 0.6)
            raise ConfigError(f"table '{title}' has no column '{name}' (find_columns)", at=at,
                              hint=f"did you mean '{near[0]}'?" if near else f"its columns are {', '.join(by_name)}")
        if column.generated == "v":
            raise ConfigError(f"column '{name}' of table '{title}' is computed when it is read and not archived, so no row is found by it",
                              at=at, hint="name another one in find_columns")
        if not column.uniform:
            raise ConfigError(f"column '{name}' of table '{title}' has the type {column.type}, whose equal values may be written differently, "
                              "so no row is found by it", at=at,
                              hint="name in find_columns integers, texts, enums, uuids, dates, times, addresses, booleans, bytea, "
                                   "numeric(p,s) or character(n)")


def _nearest(connection: connect.Connection, schema: str, name: str) -> str:
    """Tables that the person may have meant."""
    found = connect.rows(connection, (
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind IN ('r', 'p') AND (lower(c.relname) = lower(%s) OR n.nspname = %s) "
        "ORDER BY lower(c.relname) <> lower(%s), 1 LIMIT 5"), (name, schema, name))
    return "did you mean " + ", ".join(row[0] for row in found) if found else f"schema '{schema}' holds no tables"
