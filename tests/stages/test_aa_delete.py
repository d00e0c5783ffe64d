"""aa-delete as a filter, and inside a transaction holder; test_aa_delete_guarded.py has the path without one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from audit_archiver import exits, lines
from tests.ground import tables
from tests.ground.held import Holder, NoServer, plan

CUTOFF = "2025-01-01T00:00:00Z"


@pytest.fixture()
def holder(db: Any, config_file: Any) -> Any:
    tables.create(db.connection, rows=120, first="2024-01-01", last="2024-03-01")
    with Holder(config_file(db, NoServer())) as made:
        made.db = db
        yield made


def left(holder: Any) -> int:
    return int(holder.db.scalar("SELECT count(*) FROM audit_logs"))


@pytest.mark.req("REQ-INT-001", "REQ-TXN-002", "REQ-VER-012")
def test_inside_a_holder_the_rows_go_with_the_holders_commit_and_not_before(holder: Any) -> None:
    batch_lines = holder.verified(plan(holder.settings, "audit_logs", cutoff=CUTOFF))
    deleted = holder.delete(batch_lines)
    assert deleted.rc == 0, deleted.err
    assert [(line["deleted"]["verdict"], line["deleted"]["rows"], "committed" in line) for line in deleted.lines] == [
        ("FULL", 100, False), ("FULL", 20, False)]
    assert left(holder) == 120
    for line in deleted.lines:
        holder.commit(line)
    assert left(holder) == 0


@pytest.mark.req("REQ-INT-001", "REQ-S3-024")
def test_a_batch_that_was_not_verified_or_is_deleted_already_is_refused(holder: Any) -> None:
    line = holder.verified(plan(holder.settings, "audit_logs", cutoff=CUTOFF, limit=100))[0]
    unverified = holder.delete([{key: value for key, value in line.items() if key != "verified"}])
    assert unverified.rc == exits.FAILED and "was not verified" in unverified.err
    gone = holder.delete([{**line, "deleted": {"at": "2025-01-01T00:00:00Z", "verdict": "FULL", "rows": 100}}])
    assert gone.rc == exits.FAILED and "already deleted" in gone.err
    assert left(holder) == 120


@pytest.mark.req("T23")
def test_a_batch_of_another_holder_or_of_none_is_refused(holder: Any) -> None:
    line = holder.verified(plan(holder.settings, "audit_logs", cutoff=CUTOFF, limit=100))[0]
    for txn in (None, {**line["batch"]["txn"], "holder": "h-00000000"}):
        other = holder.delete([{**line, "batch": {**line["batch"], "txn": txn}}])
        assert other.rc == exits.FAILED and "was not selected in this holder's transaction" in other.err


@pytest.mark.parametrize("flag", ["--explain", "--allow-subset"])
def test_the_flags_of_the_guarded_path_are_refused_inside_a_holder(holder: Any, flag: str) -> None:
    refused = holder.stage("aa-delete", b"", flag)
    assert refused.rc == exits.CONFIG and "guarded path" in refused.err
    both = holder.stage("aa-delete", b"", "--explain", "--allow-subset")
    assert both.rc == exits.CONFIG


def test_whoever_is_fed_the_rows_themselves_says_what_it_wants(holder: Any) -> None:
    job = plan(holder.settings, "audit_logs", cutoff=CUTOFF)
    refused = holder.stage("aa-delete", lines.dump(job))
    assert refused.rc == exits.FAILED and "no batch line" in refused.err
    assert json.loads(refused.err.split("\n")[0])["level"] == "WARNING"  # the holder says it as its own error
