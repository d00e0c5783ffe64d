"""aa-archive as cron starts it: a forked process on a database and a bucket, and what it left there.

    driven = Driven(db, bucket, config_file(db, bucket))
    result = driven.run("--limit", 100)                    # Result; driven.summary(result) is the checked JSON report
    driven.whole("public.audit_logs", before)              # rows left + rows archived = the rows before, by digest
"""

from __future__ import annotations

import datetime
import json
import secrets
from pathlib import Path
from typing import Any, Mapping, Optional

from audit_archiver import config
from audit_archiver.formats import schema
from audit_archiver.postgres.quoting import ident
from tests.ground import tables
from tests.ground.archive import Archive
from tests.ground.run import Child, Result, run_forked, spawn

OLD = ("2024-01-01", "2024-12-31")


def recently(days: int = 5) -> tuple[str, str]:
    """A span of dates that no retention of a test reaches."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return str(today - datetime.timedelta(days=days)), str(today)


def logs(db: Any, table: str = "public.audit_logs", *, old: int = 350, young: int = 50) -> tables.Digest:
    """An audit table with so many rows that are due and that are not; its digest."""
    tables.create(db.connection, table, rows=old, first=OLD[0], last=OLD[1])
    if young:
        tables.fill(db.connection, table, rows=young, first=recently()[0], last=recently()[1], start=old + 1)
    return tables.digest(db.connection, table)


class Driven:
    """Runs of aa-archive with one configuration; `env` is what it takes from the environment."""

    def __init__(self, db: Any, bucket: Any, path: Path, env: Optional[Mapping[str, str]] = None) -> None:
        self.db, self.bucket, self.path, self.env = db, bucket, path, dict(env or {})
        self.settings = config.load(str(path), self.env)
        self.archive = Archive(bucket.client, bucket.name)

    def run(self, *argv: Any, **more: Any) -> Result:
        """One run, forked, without a terminal."""
        return run_forked("aa-archive", ["-c", self.path, *argv], **{**more, "env": {**self.env, **more.get("env", {})}})

    def spawn(self, *argv: Any, **more: Any) -> Child:
        """One run that is looked at while it works."""
        return spawn("aa-archive", ["-c", self.path, *argv], **{**more, "env": {**self.env, **more.get("env", {})}})

    def ran(self, *argv: Any, **more: Any) -> dict[str, Any]:
        """One run that must end well; its report."""
        result = self.run(*argv, **more)
        assert result.rc == 0, result.err
        return summary(result)

    def whole(self, table: str, before: tables.Digest, *, name: Optional[str] = None, schema: Optional[str] = None) -> int:
        """Load the archive back beside the table and compare digests; how many rows came out of the archive.

        `table` is the SQL name; `name` and `schema` are the plain ones (default: what stands in the SQL name).
        """
        plain_schema, _, plain = table.partition(".")
        name, schema = name or plain.strip('"'), schema or plain_schema.strip('"')
        into = f"public.{ident('restored ' + secrets.token_hex(4))}"
        rows = self.archive.restore(self.settings.databases[0], table, into, table=name, schema=schema)
        if not rows and not self.db.scalar("SELECT to_regclass(%s) IS NOT NULL", (into,)):
            into = table
        self.archive.check(name)
        assert tables.digest(self.db.connection, table, into) == before, "rows were lost, doubled or altered"
        return rows

    def sizes(self, table: Optional[str] = None) -> list[int]:
        """Rows per archived batch, in order."""
        return [line["batch"]["rows"] for line in self.archive.commits(table)]


def summary(result: Result) -> dict[str, Any]:
    """The JSON report on stdout, checked against its schema."""
    lines = [line for line in result.out.split(b"\n") if line]
    assert len(lines) == 1, result.out
    made: dict[str, Any] = json.loads(lines[0])
    schema.validate("report", made, "the report")
    return made
