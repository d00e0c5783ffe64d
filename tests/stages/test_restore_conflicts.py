"""aa-restore beside rows that are there: what each strategy makes of a row with the same key and another content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from audit_archiver.formats import schema
from tests.ground import tables
from tests.ground.restored import Restored

ALL = ("--restore-all", "--table", "audit_logs")


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Restored:
    """150 rows in two batches, archived; then rows 1 to 20 are there again, 5 of them with another content."""
    tables.create(db.connection, rows=150, first="2024-01-01", last="2024-03-01")
    made = Restored(db, bucket, config_file(db, bucket))
    db.execute("CREATE TABLE original AS SELECT * FROM audit_logs")
    made.archive()
    db.execute("INSERT INTO audit_logs SELECT * FROM original WHERE id <= 20")
    db.execute("UPDATE audit_logs SET action = 'changed' WHERE id <= 5")
    return made


def changed(scene: Restored) -> int:
    return int(scene.db.scalar("SELECT count(*) FROM audit_logs WHERE action = 'changed'"))


def conflicts(path: Path) -> list[tuple[int, str]]:
    """(key, resolution) of each line of the report."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for line in found:
        schema.validate("conflict", line, "the line")
    return sorted((line["key"][0], line["resolution"]) for line in found)


@pytest.mark.req("REQ-RESTORE-008", "REQ-RESTORE-011")
@pytest.mark.parametrize(("strategy", "word", "left"), [("skip", "skipped", 5), ("overwrite", "overwritten", 0), ("upsert", "updated", 0)])
def test_a_row_with_another_content_is_settled_and_reported(scene: Restored, tmp_path: Path, strategy: str, word: str, left: int) -> None:
    path = tmp_path / "conflicts.jsonl"
    report = scene.restore(*ALL, "--conflict-strategy", strategy, "--conflicts", path)
    assert report["rows"] == {"archived": 150, "meant": 150, "inserted": 130, "same": 15, "conflicts": 5, "sampled": report["rows"]["sampled"]}
    assert (changed(scene), conflicts(path)) == (left, [(n, word) for n in range(1, 6)])
    assert tables.digest(scene.db.connection, "audit_logs", where="action <> 'changed'") == tables.digest(
        scene.db.connection, "original", where="id > 5" if left else None)
    assert tables.digest(scene.db.connection, "audit_logs").rows == 150


@pytest.mark.req("REQ-RESTORE-008", "REQ-RESTORE-009", "REQ-RESTORE-011", "T50")
def test_without_a_strategy_the_first_conflict_stops_before_a_row_of_the_batch_goes_in(scene: Restored, tmp_path: Path) -> None:
    report = scene.restore(*ALL, "--batch-size", 100, "--in-flight", 1, "--conflicts", tmp_path / "conflicts.jsonl", code=2)
    assert (changed(scene), report["outcome"], report["rows"]["conflicts"]) == (5, "failed", 5)
    assert scene.db.scalar("SELECT count(*) FROM audit_logs WHERE id <= 100") == 20
    assert conflicts(tmp_path / "conflicts.jsonl") == [(n, "failed") for n in range(1, 6)]


@pytest.mark.req("REQ-RESTORE-008")
def test_rows_that_are_there_as_they_were_archived_are_no_conflict(scene: Restored) -> None:
    scene.db.execute("DELETE FROM audit_logs WHERE id <= 5")
    report = scene.restore(*ALL)
    assert (report["rows"]["same"], report["rows"]["conflicts"]) == (15, 0)
    assert tables.digest(scene.db.connection, "audit_logs") == tables.digest(scene.db.connection, "original")


def test_the_report_goes_into_a_new_file_only(scene: Restored, tmp_path: Path) -> None:
    path = tmp_path / "conflicts.jsonl"
    path.write_text("mine\n")
    result = scene.run(*ALL, "--conflict-strategy", "skip", "--conflicts", path)
    assert (result.rc, path.read_text(), changed(scene)) == (3, "mine\n", 5)


@pytest.mark.parametrize("strategy", ["overwrite", "skip", "fail"])
def test_a_table_without_a_unique_index_is_compared_by_the_archived_key(scene: Restored, strategy: str) -> None:
    scene.db.execute("CREATE TABLE plain AS SELECT * FROM audit_logs WHERE id > 5 OR %s", (strategy != "fail",))
    report = scene.restore(*ALL, "--into", "plain", "--conflict-strategy", strategy, "--schema-strategy", "lenient")
    assert report["rows"]["inserted"] == (130 if strategy != "fail" else 135)
    assert scene.db.execute("SELECT count(*), count(DISTINCT id), count(*) FILTER (WHERE action = 'changed') FROM plain") == [
        (150, 150, 5 if strategy == "skip" else 0)]


def test_upsert_needs_a_unique_index_on_the_key_and_says_so(scene: Restored) -> None:
    scene.db.execute("CREATE TABLE plain (LIKE audit_logs)")
    result = scene.run(*ALL, "--into", "plain", "--conflict-strategy", "upsert")
    assert (result.rc, "unique index on id" in result.err) == (3, True)


def test_a_key_that_was_archived_twice_stops_in_an_empty_table_too_and_the_newer_row_goes_over_the_older(scene: Restored) -> None:
    scene.db.execute("DELETE FROM audit_logs WHERE action <> 'changed'")
    scene.archive()
    report = scene.restore(*ALL, code=2)
    assert report["rows"]["conflicts"] == 5
    scene.db.execute("TRUNCATE audit_logs")
    scene.restore(*ALL, "--conflict-strategy", "overwrite", "--ignore-watermark")
    assert (scene.db.scalar("SELECT count(*) FROM audit_logs"), changed(scene)) == (150, 5)


def test_another_unique_constraint_fails_its_batch_by_name_and_the_others_go_in(scene: Restored) -> None:
    scene.db.execute("CREATE TABLE other (LIKE audit_logs INCLUDING ALL)")
    scene.db.execute("ALTER TABLE other ADD CONSTRAINT one_session UNIQUE (session)")
    scene.db.execute("INSERT INTO other SELECT id + 100000, created_at, user_id, action, session FROM original WHERE id = 7")
    report = scene.restore(*ALL, "--into", "other", code=2)
    assert (report["outcome"], len(report["failures"])) == ("partly", 1) and "one_session" in report["failures"][0]["msg"]
    assert scene.db.scalar("SELECT count(*) FROM other") == 51


@pytest.mark.req("REQ-RESTORE-014")
def test_triggers_fire_unless_they_are_kept_from_it_and_are_enabled_again_as_they_were(scene: Restored) -> None:
    scene.db.execute("CREATE TABLE other (LIKE audit_logs INCLUDING ALL)")
    scene.db.execute("CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.action = upper(NEW.action); RETURN NEW; END'")
    for name in ("one", "two", "off"):
        scene.db.execute(f"CREATE TRIGGER {name} BEFORE INSERT ON other FOR EACH ROW EXECUTE PROCEDURE shout()")
    scene.db.execute("ALTER TABLE other ENABLE ALWAYS TRIGGER two, DISABLE TRIGGER off")
    report = scene.restore(*ALL, "--into", "other", code=2)
    assert "sampled rows" in report["failures"][0]["msg"] and scene.db.scalar("SELECT count(*) FROM other") == 0
    scene.restore(*ALL, "--into", "other", "--disable-triggers")
    assert tables.digest(scene.db.connection, "other") == tables.digest(scene.db.connection, "original")
    assert scene.db.execute("SELECT tgname::text, tgenabled::text FROM pg_trigger WHERE tgrelid = 'other'::regclass ORDER BY 1") == [
        ("off", "D"), ("one", "O"), ("two", "A")]


def test_rows_that_were_gone_before_a_delete_by_hand_do_not_come_back(db: Any, bucket: Any, config_file: Any) -> None:
    tables.create(db.connection, rows=50, first="2024-01-01", last="2024-03-01")
    scene = Restored(db, bucket, config_file(db, bucket))
    line, = scene.hand.export()
    db.execute("DELETE FROM audit_logs WHERE id IN (1, 25, 50)")
    before = tables.digest(db.connection, "audit_logs")
    deleted = scene.hand.delete([line], "--allow-subset")
    assert deleted.rc == 0, deleted.err
    scene.hand.must("aa-record", stdin=deleted.out)
    report = scene.restore(*ALL)
    assert (report["rows"]["archived"], tables.digest(db.connection, "audit_logs")) == (47, before)
