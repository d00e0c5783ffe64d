"""aa-ls: what is archived and what is not, by table, run and batch; as text and as JSON lines."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ground import tables
from tests.ground.restored import Restored
from tests.ground.run import run_stage


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Restored:
    """250 rows of two months in three batches of one run, archived."""
    tables.create(db.connection, rows=250, first="2024-01-01", last="2024-03-01")
    made = Restored(db, bucket, config_file(db, bucket, [
        {"name": "audit_logs", "timestamp_column": "created_at", "primary_key": "id"},
        {"name": "logins", "schema": "audit", "timestamp_column": "created_at", "primary_key": "id"}]))
    db.execute("CREATE SCHEMA audit")
    tables.create(db.connection, "audit.logins", rows=20, first="2024-02-01", last="2024-02-02")
    made.lines = made.archive()  # type: ignore[attr-defined]
    return made


def test_every_batch_is_a_line_with_its_rows_range_size_run_and_key(scene: Restored) -> None:
    found = {line["s3_key"]: line for line in scene.listed()}
    assert len(found) == len(scene.lines) == 4
    for line in scene.lines:
        batch, data = line["batch"], line["serialized"]["data"]
        said = found[line["serialized"]["stem"] + ".jsonl.gz"]
        assert {name: said[name] for name in ("run", "number", "id", "rows", "first", "last")} == {
            name: batch[name] for name in ("run", "number", "id", "rows", "first", "last")}
        assert (said["state"], said["schema"], said["table"], said["gz_bytes"], said["bytes"]) == (
            "archived", batch["schema"], batch["table"], data["gz_bytes"], data["bytes"])


def test_text_sums_up_tables_and_runs(scene: Restored) -> None:
    result = run_stage("aa-ls", ["-c", scene.path, "--output", "text", "--table", "public.audit_logs"])
    lines = result.out.decode().splitlines()
    assert lines[0].startswith(f"{scene.db.name} public.audit_logs: 3 batches of 1 run, 250 rows, 2024-01-01T") and "unpacked" in lines[0]
    assert lines[1].startswith(f"  run {scene.lines[0]['batch']['run']}: 3 batches") and len(lines) == 5
    assert run_stage("aa-ls", ["-c", scene.path, "--output", "text", "-q"]).out == b""


def test_the_flags_choose(scene: Restored) -> None:
    run, key = scene.lines[0]["batch"]["run"], next(line["serialized"]["stem"] for line in scene.lines if line["batch"]["rows"] == 100)
    for argv, rows in (
            (("--table", "logins"), [20]), (("--table", "audit.logins", "--table", "audit_logs"), [20, 50, 100, 100]),
            (("--end-date", "2024-01-10"), [100]), (("--start-date", "2024-02-25"), [50]), (("--start-date", "2024-06-01"), []),
            (("--start-date", "2024-02-01", "--end-date", "2024-02-01"), [20, 100]), (("--run", run), [20, 50, 100, 100]),
            (("--run", "20200101T000000Z-1"), []), (("--s3-key", key + ".jsonl.gz"), [100]), (("--database", "unknown"), [])):
        assert sorted(line["rows"] for line in scene.listed(*argv)) == rows, argv


def test_a_selection_that_means_nothing_is_refused(scene: Restored) -> None:
    for argv, says in (
            (("--table", "audit_log"), "did you mean public.audit_logs"), (("--s3-key", "x"), "not the key of a batch"),
            (("--start-date", "2024-02-02", "--end-date", "2024-02-01"), "not before"),
            (("--s3-key", "x_commit.json", "--table", "t"), "names one batch already")):
        result = run_stage("aa-ls", ["-c", scene.path, *argv])
        assert (result.rc, result.out, says in result.err) == (3, b"", True), argv


def test_what_is_not_archived_is_shown_as_what_it_is_and_not_counted(scene: Restored) -> None:
    tables.fill(scene.db.connection, "audit_logs", rows=10, first="2024-05-01", last="2024-05-02", start=1000)
    line, = scene.hand.export("--table", "audit_logs")
    key = line["serialized"]["stem"] + ".jsonl.gz"
    states = {each["s3_key"]: each["state"] for each in scene.listed("--table", "audit_logs")}
    assert (states[key], sorted(states.values())) == ("open", ["archived"] * 3 + ["open"])
    text = run_stage("aa-ls", ["-c", scene.path, "--output", "text", "--table", "audit_logs"]).out.decode()
    assert "3 batches of 1 run, 250 rows" in text and f"  {key}  not archived: no commit record" in text
    scene.bucket.client.put_object(Bucket=scene.bucket.name, Key=line["serialized"]["stem"] + "_abandoned.json", Body=b"{}")
    assert {each["s3_key"]: each["state"] for each in scene.listed("--table", "audit_logs")}[key] == "abandoned"


@pytest.mark.req("T52")
@pytest.mark.parametrize("gone", ["_commit.json", "everything"])
def test_a_batch_that_the_index_alone_remembers_is_missing_and_the_exit_code_says_so(scene: Restored, gone: str) -> None:
    stem = scene.lines[0]["serialized"]["stem"]
    for key in scene.bucket.keys(stem):
        if gone == "everything" or key.endswith(gone):
            scene.bucket.client.delete_object(Bucket=scene.bucket.name, Key=key)
    states = {each["s3_key"]: each["state"] for each in scene.listed(code=2)}
    assert (states[stem + ".jsonl.gz"], sorted(states.values())) == ("missing", ["archived"] * 3 + ["missing"])


def test_a_batch_without_an_index_segment_is_found_by_its_commit_record(scene: Restored) -> None:
    before = scene.listed()
    for key in scene.bucket.keys(f"archives/{scene.db.name}/"):
        if "/.index/" in key:
            scene.bucket.client.delete_object(Bucket=scene.bucket.name, Key=key)
    assert scene.listed() == before


def test_no_database_is_needed(scene: Restored, config_file: Any) -> None:
    scene.path = config_file(scene.db, scene.bucket, database={"port": 1})
    assert len(scene.listed()) == 4
