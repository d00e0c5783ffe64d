"""aa-restore: what comes back is what was archived, whole, exactly once, and nothing else is touched."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from audit_archiver.formats import schema
from tests.ground import tables
from tests.ground.restored import Restored
from tests.ground.run import run_stage


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Restored:
    """250 rows of two months in three batches, archived; the table is empty."""
    tables.create(db.connection, rows=250, first="2024-01-01", last="2024-03-01")
    made = Restored(db, bucket, config_file(db, bucket))
    made.before = tables.digest(db.connection, "audit_logs")  # type: ignore[attr-defined]
    db.execute("CREATE TABLE original AS SELECT * FROM audit_logs")
    made.lines = made.archive()  # type: ignore[attr-defined]
    assert (len(made.lines), db.scalar("SELECT count(*) FROM audit_logs")) == (3, 0)  # type: ignore[attr-defined]
    return made


def rows(scene: Restored, table: str = "audit_logs") -> int:
    return int(scene.db.scalar(f"SELECT count(*) FROM {table}"))


@pytest.mark.req("REQ-RST-001", "REQ-RST-002", "REQ-RESTORE-012", "REQ-RESTORE-017", "REQ-RESTORE-018", "REQ-RESTORE-022")
def test_a_whole_table_comes_back_into_itself_value_for_value(scene: Restored) -> None:
    result = scene.run("--restore-all", "--table", "audit_logs")
    assert result.rc == 0, result.err
    report = result.lines[0]
    assert tables.digest(scene.db.connection, "audit_logs") == scene.before
    assert (report["outcome"], report["rows"]["inserted"], report["batches"]["restored"]) == ("done", 250, 3)
    assert report["rows"]["sampled"] > 0
    plan = next(record for record in result.log if record["event"] == "restore.plan")
    assert (plan["rows"], plan["batches"]) == (250, 3) and "in the database" in plan["msg"]
    assert scene.db.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'audit_logs' AND column_name LIKE '\\_%%'") == []


@pytest.mark.req("REQ-RST-002")
def test_one_batch_is_restored_by_the_key_of_its_object(scene: Restored) -> None:
    stem = scene.lines[1]["serialized"]["stem"]
    report = scene.restore("--s3-key", f"s3://{scene.bucket.name}/{stem}.jsonl.gz")
    assert (report["rows"]["inserted"], rows(scene)) == (100, 100)
    first, last = scene.lines[1]["batch"]["first"][1], scene.lines[1]["batch"]["last"][1]
    assert scene.db.execute("SELECT min(id), max(id) FROM audit_logs") == [(first, last)]


@pytest.mark.req("REQ-RST-002")
def test_with_a_key_database_and_table_name_the_target_as_people_write_it(scene: Restored) -> None:
    scene.db.execute("CREATE TABLE elsewhere (LIKE original)")
    report = scene.restore("--s3-key", scene.lines[0]["serialized"]["stem"] + ".jsonl.gz", "--database", scene.db.name, "--table", "elsewhere")
    assert (report["target"]["table"], rows(scene, "elsewhere"), rows(scene)) == ("elsewhere", 100, 0)


@pytest.mark.req("REQ-RST-002")
def test_only_what_one_run_archived_is_restored(scene: Restored, config_file: Any) -> None:
    tables.fill(scene.db.connection, "audit_logs", rows=30, first="2024-04-01", last="2024-04-02", start=1000)
    other = scene.archive()[0]["batch"]["run"]
    report = scene.restore("--run", other)
    assert (report["rows"]["inserted"], rows(scene)) == (30, 30)


@pytest.mark.req("REQ-RESTORE-023", "REQ-RST-002", "T47")
def test_a_date_range_restores_exactly_the_rows_in_it(scene: Restored) -> None:
    edge = scene.db.scalar("SELECT to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') FROM original WHERE id = 101")
    for flags, where in (
            (("--start-date", "2024-01-20", "--end-date", "2024-02-10"), "created_at >= '2024-01-20Z' AND created_at < '2024-02-11Z'"),
            (("--start-date", "2024-01-20T12:00:00Z"), "created_at >= '2024-01-20 12:00Z'"),
            (("--end-date", "2024-01-20T12:00:00+02:00"), "created_at < '2024-01-20 10:00Z'"),
            (("--start-date", edge), "id >= 101"), (("--end-date", edge), "id < 101"), (("--start-date", "2025-01-01"), "false")):
        report = scene.restore("--table", "audit_logs", *flags)
        assert tables.digest(scene.db.connection, "audit_logs") == tables.digest(scene.db.connection, "original", where=where), flags
        assert report["rows"]["inserted"] == report["rows"]["meant"] == rows(scene)
        scene.db.execute("DELETE FROM audit_logs")
        scene.bucket.client.delete_object(Bucket=scene.bucket.name, Key=f"archives/{scene.db.name}/audit_logs/.restore_watermark.json")


@pytest.mark.req("REQ-RESTORE-021", "REQ-RST-002")
def test_rows_are_filtered_by_the_values_of_columns(scene: Restored) -> None:
    scene.restore("--table", "audit_logs", "--restore-all", "--where", "action=update", "--where", "client=10.1.2.3/32", "--ignore-watermark")
    assert tables.digest(scene.db.connection, "audit_logs") == tables.digest(
        scene.db.connection, "original", where="action = 'update' AND client = '10.1.2.3'")
    scene.restore("--table", "audit_logs", "--restore-all", "--where", "action=update")
    assert tables.digest(scene.db.connection, "audit_logs") == tables.digest(scene.db.connection, "original", where="action = 'update'")


@pytest.mark.req("REQ-RESTORE-020")
def test_a_second_restore_leaves_out_what_the_first_one_restored_and_a_filtered_one_counts_for_nothing(scene: Restored) -> None:
    scene.restore("--table", "audit_logs", "--start-date", "2024-01-20", "--end-date", "2024-01-25")
    report = scene.restore("--table", "audit_logs", "--restore-all")
    assert (report["batches"]["restored_before"], rows(scene)) == (0, 250)
    scene.db.execute("DELETE FROM audit_logs WHERE id <= 10")
    report = scene.restore("--table", "audit_logs", "--restore-all")
    assert (report["outcome"], report["batches"]["restored_before"], rows(scene)) == ("nothing to do", 3, 240)
    report = scene.restore("--table", "audit_logs", "--restore-all", "--ignore-watermark")
    assert (report["rows"]["inserted"], report["rows"]["same"]) == (10, 240)
    assert tables.digest(scene.db.connection, "audit_logs") == scene.before
    value = json.loads(scene.bucket.read(f"archives/{scene.db.name}/audit_logs/.restore_watermark.json"))
    schema.validate("restore-watermark", value, "the watermark")
    assert sorted(value["targets"][0]["batches"]) == sorted(line["batch"]["id"] for line in scene.lines)
    assert value["targets"][0]["date"] == scene.lines[2]["batch"]["last"][0]


@pytest.mark.req("REQ-RESTORE-020")
def test_the_watermark_of_one_table_says_nothing_of_another_nor_of_one_that_was_made_again(scene: Restored) -> None:
    scene.restore("--table", "audit_logs", "--restore-all")
    scene.restore("--table", "audit_logs", "--restore-all", "--into", "other", "--create-table")
    assert rows(scene, "other") == 250
    scene.db.execute("DROP TABLE other")
    scene.restore("--table", "audit_logs", "--restore-all", "--into", "other", "--create-table")
    assert rows(scene, "other") == 250


def test_a_watermark_that_is_switched_off_is_neither_read_nor_written(scene: Restored, config_file: Any) -> None:
    scene.path = config_file(scene.db, scene.bucket, restore_watermark={"enabled": False})
    for same in (0, 250):
        report = scene.restore("--table", "audit_logs", "--restore-all")
        assert (report["batches"]["restored_before"], report["rows"]["same"]) == (0, same)
    assert not [key for key in scene.bucket.keys() if "watermark" in key]


@pytest.mark.req("REQ-RESTORE-019")
def test_a_restore_leaves_a_record_of_what_when_and_by_whom(scene: Restored) -> None:
    report = scene.restore("--table", "audit_logs", "--restore-all", "--where", "action=login")
    base = f"archives/{scene.db.name}/audit_logs/.restores/{report['restore']}"
    start, end = (json.loads(scene.bucket.read(f"{base}-{event}.json")) for event in ("start", "end"))
    for value in (start, end):
        schema.validate("restore", value, "the record")
        assert value["by"]["user"] and value["asked"]["where"] == ["action"]
    assert (start["outcome"], end["outcome"], end["rows"]) == ("begun", "done", report["rows"])
    assert sorted(end["objects"]) == [line["serialized"]["stem"] + ".jsonl.gz" for line in scene.lines]


@pytest.mark.req("REQ-RESTORE-013")
def test_as_many_batches_go_into_one_transaction_as_have_so_many_rows(db: Any, bucket: Any, config_file: Any) -> None:
    tables.create(db.connection, rows=100, first="2024-01-01", last="2024-03-01")
    made = Restored(db, bucket, config_file(db, bucket))
    assert len(made.archive("--batch-size", "10")) == 10
    for flags, transactions in (((), 2), (("--batch-size", 20), 5), (("--batch-size", 1), 10)):
        made.restore("--restore-all", "--table", "audit_logs", "--in-flight", 1, "--ignore-watermark", *flags)
        assert db.scalar("SELECT count(DISTINCT xmin::text) FROM audit_logs") == transactions, flags
        db.execute("DELETE FROM audit_logs")


@pytest.mark.req("REQ-RST-003", "REQ-VER-014")
def test_a_damaged_batch_is_named_and_not_restored_and_the_others_are(scene: Restored) -> None:
    key, client, bucket = scene.lines[1]["serialized"]["stem"] + ".jsonl.gz", scene.bucket.client, scene.bucket.name
    packed = scene.bucket.read(key)
    damages = {"bit": packed[:5000] + bytes([packed[5000] ^ 1]) + packed[5001:], "cut": packed[:-100], "empty": b"",
               "row": gzip.compress(b"".join(gzip.decompress(packed).splitlines(True)[:-1])), "gone": None,
               "repacked": gzip.compress(gzip.decompress(packed)), "swapped": scene.bucket.read(scene.lines[0]["serialized"]["stem"] + ".jsonl.gz")}
    first, last = scene.lines[1]["batch"]["first"][1], scene.lines[1]["batch"]["last"][1]
    for name, spoilt in damages.items():
        if spoilt is None:
            client.delete_object(Bucket=bucket, Key=key)
        else:
            client.put_object(Bucket=bucket, Key=key, Body=spoilt)
        report = scene.restore("--table", "audit_logs", "--restore-all", "--into", f"t_{name}", "--create-table", code=2)
        assert (report["outcome"], [each["s3_key"] for each in report["failures"]], rows(scene, f"t_{name}")) == ("partly", [key], 150), name
        assert scene.db.scalar(f"SELECT count(*) FROM t_{name} WHERE id BETWEEN {first} AND {last}") == 0


def test_the_metadata_of_a_batch_are_not_needed(scene: Restored) -> None:
    for line in scene.lines:
        scene.bucket.client.delete_object(Bucket=scene.bucket.name, Key=line["serialized"]["stem"] + "_metadata.json")
    scene.restore("--table", "audit_logs", "--restore-all")
    assert tables.digest(scene.db.connection, "audit_logs") == scene.before


def test_a_batch_whose_commit_record_is_gone_stops_the_restore_by_name(scene: Restored) -> None:
    stem = scene.lines[1]["serialized"]["stem"]
    scene.bucket.client.delete_object(Bucket=scene.bucket.name, Key=stem + "_commit.json")
    result = scene.run("--table", "audit_logs", "--restore-all")
    assert (result.rc, rows(scene), "has lost its commit record" in result.err) == (2, 0, True)
    assert scene.run("--s3-key", stem + ".jsonl.gz").rc == 3


@pytest.mark.req("T46", "REQ-RESTORE-010", "REQ-RESTORE-011")
def test_a_dry_run_shows_conflicts_under_a_read_only_role_and_writes_nothing(scene: Restored, config_file: Any, tmp_path: Path) -> None:
    scene.db.execute("INSERT INTO audit_logs SELECT * FROM original WHERE id <= 20")
    scene.db.execute("UPDATE audit_logs SET action = 'changed' WHERE id <= 5")
    before, keys = tables.digest(scene.db.connection, "audit_logs"), scene.bucket.keys()
    scene.db.admin(f"CREATE ROLE r_{scene.db.name} LOGIN PASSWORD 'x'")
    scene.db.admin(f"GRANT SELECT ON audit_logs TO r_{scene.db.name}")
    scene.db.admin(f"REVOKE TEMP ON DATABASE {scene.db.name} FROM PUBLIC")
    scene.path = config_file(scene.db, scene.bucket, database={"user": f"r_{scene.db.name}", "password": "x"})
    try:
        report = scene.restore("--table", "audit_logs", "--restore-all", "--dry-run", "--conflicts", tmp_path / "conflicts.jsonl")
    finally:
        scene.db.admin(f"REVOKE ALL ON audit_logs FROM r_{scene.db.name}")
        scene.db.admin(f"DROP ROLE r_{scene.db.name}")
    assert report["rows"] == {"archived": 250, "meant": 250, "inserted": 230, "same": 15, "conflicts": 5, "sampled": 0}
    found = [json.loads(line) for line in (tmp_path / "conflicts.jsonl").read_text().splitlines()]
    assert sorted(line["key"][0] for line in found) == [1, 2, 3, 4, 5]
    assert (tables.digest(scene.db.connection, "audit_logs"), scene.bucket.keys()) == (before, keys)


def test_a_dry_run_of_a_table_that_is_not_there_proves_the_objects_and_makes_nothing(scene: Restored) -> None:
    report = scene.restore("--table", "audit_logs", "--restore-all", "--into", "fresh", "--create-table", "--dry-run")
    assert (report["rows"]["inserted"], report["target"]["created"]) == (250, True)
    assert scene.db.scalar("SELECT to_regclass('public.fresh')") is None


def test_usage_that_says_nothing_sensible_is_refused_with_a_remedy(scene: Restored) -> None:
    for argv, says in ((("--table", "audit_logs"), "nothing says what to restore"),
                       (("--restore-all", "--table", "logs"), "did you mean public.audit_logs"),
                       (("--restore-all", "--table", "audit_logs", "--into", "nowhere"), "--create-table"),
                       (("--s3-key", "x"), "is not the key of a batch"), (("--restore-all", "--s3-key", "x.jsonl.gz"), "names one batch already"),
                       (("--restore-all", "--batch-size", "0"), "from 1 on"), (("--restore-all", "--where", "x"), "is no equation"),
                       (("--restore-all", "--table", "audit_logs", "--where", "nothing=1"), "no column 'nothing'"),
                       (("--restore-all", "--table", "audit_logs", "--where", "user_id=seven"), "none of the type integer"),
                       (("--run", "20200101T000000Z-1"), "20200101T000000Z-1"),
                       (("--s3-key", "archives/x_batch_001.jsonl.gz"), "does not exist")):
        result = scene.run(*argv)
        assert (result.rc, rows(scene), says in result.err, "seven" in result.err) == (3, 0, True, False), f"{argv}: {result.err}"


def test_quiet_success_says_nothing(scene: Restored) -> None:
    result = run_stage("aa-restore", ["-c", scene.path, "-q", "--restore-all", "--table", "audit_logs"])
    assert (result.rc, result.out, result.err, rows(scene)) == (0, b"", "", 250)
