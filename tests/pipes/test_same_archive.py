"""The same archive comes out of aa-archive, of the one-line pipe under aa-txn, and of the stages run by hand on files (T44)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ground import tables
from tests.ground.archive import Archive
from tests.ground.driven import Driven
from tests.ground.run import BIN

TABLES = [{"name": name, "timestamp_column": "created_at", "primary_key": "id", "batch_size": size,
           "find_columns": ["user_id", "client"]}
          for name, size in (("audit_logs", 1000), ("small", 7))]

WAYS = {
    "aa-archive": "aa-archive --force > report.json",
    "the pipe": "aa-plan | aa-txn -- sh -c 'aa-select | aa-serialize | aa-upload | aa-verify | aa-delete' | aa-record > recorded",
    "files": """
        aa-plan > jobs
        aa-select jobs > rows
        aa-serialize rows > serialized
        aa-upload serialized > uploaded
        aa-verify uploaded > verified
        aa-delete verified > deleted
        aa-record deleted > recorded""",
}


@pytest.mark.req("T44", "REQ-IDEM-001", "REQ-INT-001")
def test_every_way_through_the_stages_makes_the_same_archive(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> None:
    # GIVEN two tables, and each way its own prefix on the same rows
    tables.create(db.connection, "public.audit_logs", rows=300, first="2024-01-01", last="2024-12-31")
    tables.create(db.connection, "public.small", rows=40, first="2024-01-01", last="2024-12-31")
    for name in ("audit_logs", "small"):
        tables.fill(db.connection, f"public.{name}", rows=10, first="2100-01-01", last="2100-12-31", start=1000)
        db.execute(f"CREATE TABLE kept_{name} AS SELECT * FROM {name}")
    before = {name: tables.digest(db.connection, f"public.{name}") for name in ("audit_logs", "small")}
    made: dict[str, Any] = {}
    for number, (way, script) in enumerate(WAYS.items()):
        place = tmp_path / str(number)
        place.mkdir()
        path = config_file(db, bucket, TABLES, s3={"prefix": f"way-{number}/"}, staging_dir=str(place / "staging"))
        # WHEN the tables are archived this way
        done = subprocess.run(["sh", "-ec", script], cwd=place, capture_output=True, check=False, timeout=120,
                              env={"PATH": f"{BIN}:{os.defpath}", "AA_CONFIG": str(path)})
        assert done.returncode == 0, (way, done.stderr.decode())
        # THEN nothing is lost: what is left and what is in the archive are the rows that were there
        driven = Driven(db, bucket, path)
        driven.archive = _Under(bucket.client, bucket.name, f"way-{number}/")
        for name in ("audit_logs", "small"):
            assert db.scalar(f"SELECT count(*) FROM {name}") == 10, way
            into = f"restored_{number}_{name}"
            driven.archive.restore(driven.settings.databases[0], f"public.{name}", f"public.{into}", table=name)
            assert tables.digest(db.connection, f"public.{name}", f"public.{into}") == before[name], way
        assert staged(place) == [], f"{way} leaves nothing in staging"
        made[way] = {name: _contents(driven.archive, name) for name in ("audit_logs", "small")}
        for name in ("audit_logs", "small"):
            db.execute(f"TRUNCATE {name}")
            db.execute(f"INSERT INTO {name} SELECT * FROM kept_{name}")
    # AND it is the same archive: the batch that needs no division is the same to the byte, the others hold the same rows
    first = made["aa-archive"]
    assert first["audit_logs"][0].keys() >= {"id", "rows_sha256", "keys_sha256"} and len(first["audit_logs"][0]["lines"]) == 300
    assert [name for name, _ in first["audit_logs"][0]["columns"]][:4] == ["id", "user_id", "client", "created_at"], "find_columns"
    for way in WAYS:
        assert made[way]["audit_logs"] == first["audit_logs"], way
        assert _rows(made[way]["small"]) == _rows(first["small"]), way
        assert made[way]["small"][0]["id"] == first["small"][0]["id"], "the first batch of 7 rows has the same identity"


class _Under(Archive):
    """An archive of which only what lies under a prefix is seen."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        super().__init__(client, bucket)
        self._prefix = prefix

    def keys(self, prefix: str = "") -> list[str]:
        return super().keys(prefix or self._prefix)


def staged(place: Path) -> list[Path]:
    """The files that are left in a staging directory."""
    return [each for each in (place / "staging").rglob("*") if each.is_file()]


def _contents(archive: Archive, table: str) -> list[dict[str, Any]]:
    """Each batch's identity, digests and object without the time of archiving."""
    return [{**{name: commit["batch"][name] for name in ("id", "number", "rows", "first", "last", "keys_sha256", "key", "columns", "shape_sha256")},
             "rows_sha256": commit["serialized"]["rows_sha256"], "bytes": commit["serialized"]["data"]["bytes"],
             "member_rows": commit["serialized"]["data"]["member_rows"],
             "lines": [re.sub(rb'"_archived_at":"[^"]+"', b"", line) for line in archive.rows(commit)]} for commit in archive.commits(table)]


def _rows(batches: list[dict[str, Any]]) -> list[bytes]:
    """The rows of all batches, without what names their batch."""
    return [re.sub(rb',,"_batch_id":"[^"]+"', b"", line) for batch in batches for line in batch["lines"]]
