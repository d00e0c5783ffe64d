"""An archive as a stranger reads it: list the commit records, fetch, check and unpack the objects, load the rows.

Unpacking is the standard library's gzip and json, so that what the product wrote is not judged by what it wrote
with. Loading back uses the codec's reverse expressions, evaluated by the server.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from typing import Any, Iterator, NamedTuple, Optional

from audit_archiver.config.model import Database
from audit_archiver.formats import names
from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import ident

_CSV = r"(FORMAT csv, QUOTE E'\x01', DELIMITER E'\x02')"


class Checked(NamedTuple):
    """What reading a whole archive back has found equal."""

    batches: int
    rows: int
    gz_bytes: int


class Archive:
    """What lies in a bucket; `client` is a boto3 client."""

    def __init__(self, client: Any, bucket: str) -> None:
        self.client, self.bucket = client, bucket

    def keys(self, prefix: str = "") -> list[str]:
        """Every key under `prefix`, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def read(self, key: str) -> bytes:
        """An object's bytes."""
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def commits(self, table: Optional[str] = None, database: Optional[str] = None, schema: Optional[str] = None) -> list[dict[str, Any]]:
        """The commit records, by run and number: without one a batch is not archived, whatever else lies there."""
        found = [json.loads(self.read(key)) for key in self.keys() if key.endswith(names.COMMIT)]
        wanted = [line for line in found if (table is None or line["batch"]["table"] == table)
                  and (database is None or line["batch"]["database"] == database)
                  and (schema is None or line["batch"]["schema"] == schema)]
        return sorted(wanted, key=lambda line: (line["batch"]["archived_at"], line["batch"]["number"]))

    def rows(self, commit: dict[str, Any]) -> list[bytes]:
        """The row lines of one archived batch, each with its LF. AssertionError if any of its objects is not as it says."""
        stem, said = commit["serialized"]["stem"], commit["serialized"]["data"]
        packed = self.read(stem + names.DATA)
        plain = gzip.decompress(packed)
        assert hashlib.sha256(packed).hexdigest() == said["gz_sha256"], f"{stem}: other bytes than were written"
        assert hashlib.sha256(plain).hexdigest() == said["sha256"], f"{stem}: other content than was written"
        lines = plain.split(b"\n")
        assert lines.pop() == b"", f"{stem}: the last line is cut"
        assert len(lines) == commit["batch"]["rows"] == commit["serialized"]["rows"], f"{stem}: {len(lines)} rows"
        manifest = json.loads(self.read(stem + names.KEYS))
        key = commit["batch"]["key"]
        kept = [[json.loads(line)[name] for name in key] for line in lines]
        assert [value if len(key) > 1 else value[0] for value in kept] == manifest["primary_keys"], f"{stem}: other keys"
        metadata = json.loads(self.read(stem + names.METADATA))
        assert (metadata["record_count"], metadata["batch"]["id"]) == (len(lines), commit["batch"]["id"]), f"{stem}: metadata"
        return [line + b"\n" for line in lines]

    def check(self, table: Optional[str] = None, database: Optional[str] = None) -> Checked:
        """Read every archived batch back; AssertionError at the first thing that differs."""
        batches = rows = packed = 0
        for commit in self.commits(table, database):
            batches, rows = batches + 1, rows + len(self.rows(commit))
            packed += commit["serialized"]["data"]["gz_bytes"]
        return Checked(batches, rows, packed)

    def restore(self, database: Database, source: str, into: str, *, table: Optional[str] = None, schema: Optional[str] = None) -> int:
        """Make `into` like `source` (SQL names) and load every archived row of `table` (by default of all) into it.

        Returns the number of rows. The columns and their codecs are those of `source`, which must still have them.
        """
        connection = connect.connect(database, purpose="restore")
        try:
            oid = connect.scalar(connection, "SELECT %s::regclass::oid::bigint", (source,))
            columns = table_columns.columns(connection, oid)
            connect.execute(connection, f"CREATE TABLE IF NOT EXISTS {into} (LIKE {source} INCLUDING GENERATED)"
                            if connection.server_version >= 120000 else f"CREATE TABLE IF NOT EXISTS {into} (LIKE {source})")
            connect.execute(connection, "CREATE TEMPORARY TABLE aa_lines (line text)")
            total = 0
            for lines in self._lines(table, database.name, schema):
                with connection.cursor() as cursor:
                    cursor.copy_expert(f"COPY pg_temp.aa_lines FROM STDIN {_CSV}", io.BytesIO(b"".join(lines)))
                named = ", ".join(ident(column.name) for column in columns if column.restored)
                connect.execute(connection, f"INSERT INTO {into} ({named}) OVERRIDING SYSTEM VALUE "
                                f"SELECT {table_columns.values(columns, 'x')} FROM pg_temp.aa_lines, "
                                f"json_to_record(line::json) AS x({table_columns.record(columns)})")
                connect.execute(connection, "TRUNCATE pg_temp.aa_lines")
                total += len(lines)
            return total
        finally:
            connection.close()

    def _lines(self, table: Optional[str], database: str, schema: Optional[str]) -> Iterator[list[bytes]]:
        for commit in self.commits(table, database, schema):
            yield self.rows(commit)
