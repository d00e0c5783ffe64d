"""Sequences after a restore: the next insert must not meet a restored number (T48)."""

from __future__ import annotations

from audit_archiver import log
from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import ident, literal
from audit_archiver.restore.target import Target

# identity columns and serials own their sequence; a default may name one that nobody owns
_SEQUENCES_SQL = """
SELECT DISTINCT n.nspname::text, s.relname::text, a.attname::text, q.seqincrement
FROM pg_class s JOIN pg_namespace n ON n.oid = s.relnamespace JOIN pg_sequence q ON q.seqrelid = s.oid
     JOIN pg_attribute a ON a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
     LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
WHERE s.relkind = 'S' AND a.atttypid IN (20, 21, 23, 1700) AND EXISTS (
  SELECT FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass AND (
    d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum
    OR d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refobjid = s.oid))
"""


def set_behind_rows(connection: connect.Connection, target: Target) -> None:
    """Move each sequence of the table on behind the greatest number in its column, never back (descending ones: the least)."""
    for schema, name, column, step in connect.rows(connection, _SEQUENCES_SQL, (target.oid,)):
        sequence = f"{ident(schema)}.{ident(name)}"
        outermost, further = ("max", ">") if step > 0 else ("min", "<")
        moved = connect.rows(connection, (
            f"SELECT setval({literal(sequence)}, m) FROM (SELECT {outermost}({ident(column)})::bigint AS m FROM {target.place.qualified}) t, "
            f"{sequence} s, pg_sequence q WHERE q.seqrelid = {literal(sequence)}::regclass AND m BETWEEN q.seqmin AND q.seqmax "
            f"AND (m {further} s.last_value OR m = s.last_value AND NOT s.is_called)"))
        if moved:
            log.info("restore.sequence", f"sequence {schema}.{name} goes on behind the restored rows of column '{column}'")
