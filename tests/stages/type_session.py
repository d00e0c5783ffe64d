"""A pinned session on a test's database that sends tables out as JSON lines and in again, and lets the server judge."""

from __future__ import annotations

import io
import json
from typing import Any

import psycopg2
import psycopg2.errors

from audit_archiver.config.model import Database
from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import ident, literal
from tests.conftest import TestDatabase

CSV = r"WITH (FORMAT csv, QUOTE E'\x01', DELIMITER E'\x02')"


class Session:
    """A pinned session of the product on a test's database, as the superuser: some types need one."""

    def __init__(self, db: TestDatabase) -> None:
        self.db = db
        self.connection = connect.connect(Database(db.name, host=db.host, port=db.port, user="postgres"), purpose="test")
        self.major = self.connection.server_version // 10000
        self.has_xml = self._has_xml()

    def _has_xml(self) -> bool:
        """Whether the server was built with libxml; without, a column can be xml but no value can."""
        try:
            return bool(self.rows("SELECT '<a/>'::xml"))
        except psycopg2.errors.FeatureNotSupported:
            return False

    def rows(self, sql: str, args: Any = None) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, args)
            return cursor.fetchall() if cursor.description else []

    def columns(self, table: str) -> list[table_columns.Column]:
        return table_columns.columns(self.connection, self.rows("SELECT %s::regclass::oid", (table,))[0][0])

    def lines(self, table: str) -> list[bytes]:
        """The row lines of a table in the order of its column n, as the holder copies them: what row_to_json gives."""
        columns = self.columns(table)
        out, plain = io.BytesIO(), io.BytesIO()
        with self.connection.cursor() as cursor:
            cursor.copy_expert(f"COPY (SELECT {table_columns.line_sql(columns, 't')} FROM {table} t ORDER BY t.n) TO STDOUT {CSV}", out)
            cursor.copy_expert(f"COPY (SELECT row_to_json(r.*) FROM (SELECT {table_columns.select_list(columns, 't')} FROM {table} t "
                               f"ORDER BY t.n) r) TO STDOUT {CSV}", plain)
        assert out.getvalue() == plain.getvalue()
        return out.getvalue().split(b"\n")[:-1]

    def load(self, table: str, lines: list[bytes]) -> None:
        """Write lines into a table with the reverse expressions."""
        columns = [column for column in self.columns(table) if column.restored]
        names = ", ".join(ident(column.name) for column in columns)
        with self.connection.cursor() as cursor:
            for line in lines:
                cursor.execute(f"INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE SELECT {table_columns.values(columns, 'x')} "
                               f"FROM json_to_record({literal(line.decode())}::json) AS x({table_columns.record(columns)})")

    def digest(self, table: str) -> str:
        """SHA-256 over the images of all rows, by the server."""
        image = ", ".join(column.image("t") for column in self.columns(table) if column.restored)
        return self.rows(f"SELECT encode(sha256(string_agg(textsend(ROW({image})::text), '\\x0a'::bytea ORDER BY t.n)), 'hex') "
                         f"FROM {table} t")[0][0]

    def differing(self, one: str, other: str) -> list[tuple[int, str]]:
        """(n, column) of every value that is not byte for byte the same in two tables."""
        found = []
        for column in table_columns.archived(self.columns(one)):
            same = f"record_image_eq(ROW({column.image('a')}), ROW({column.image('b')}))"
            found += [(n, column.name) for n, in self.rows(
                f"SELECT coalesce(a.n, b.n) FROM {one} a FULL JOIN {other} b ON a.n = b.n WHERE NOT {same} OR a.n IS NULL OR b.n IS NULL")]
        return found

    def survives(self, table: str) -> list[bytes]:
        """Take a table out and in again, check that nothing changed, and return its lines."""
        columns = self.columns(table)
        assert [column.refusal for column in columns if column.refusal] == []
        lines = self.lines(table)
        assert len(lines) == self.rows(f"SELECT count(*) FROM {table}")[0][0]
        names = [column.name for column in table_columns.archived(columns)]
        for line in lines:
            assert list(json.loads(line)) == names, "one JSON object a line, one field a column"
        back = table + "_back"
        self.rows(f"CREATE TABLE {back} (LIKE {table} INCLUDING ALL)")
        self.load(back, lines)
        assert self.differing(table, back) == []
        assert self.digest(back) == self.digest(table)
        assert self.lines(back) == lines, "the same value gives the same line"
        assert self.rows(f"SELECT t.n FROM {table} t WHERE ({table_columns.roundtrip_sql(columns, 't')}) IS NOT TRUE") == []
        return lines

    def values(self, table: str, definition: str, *rows: str) -> list[dict[str, Any]]:
        """Make a table with the column n and `definition`, fill it, send it there and back; its lines as Python sees them."""
        self.rows(f"CREATE TABLE {table} (n int, {definition})")
        for n, row in enumerate(rows):
            self.rows(f"INSERT INTO {table} VALUES ({n}, {row})")
        return [json.loads(line) for line in self.survives(table)]
