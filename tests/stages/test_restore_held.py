"""aa-restore --hold-until: what was brought back stays in its table until then, whoever plans, selects or deletes (T12)."""

from __future__ import annotations

import datetime
import json
import os
from typing import Any

import pytest

from audit_archiver.formats import names, schema
from audit_archiver.postgres import connect, locks
from tests.ground import tables
from tests.ground.driven import Driven
from tests.ground.restored import Restored
from tests.ground.run import BIN, Result, run_forked, run_stage

LATE = "2999-12-31"
UNTIL = "3000-01-01T00:00:00.000000Z"


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Restored:
    """250 rows of two months in three batches, archived; the table is empty."""
    tables.create(db.connection, rows=250, first="2024-01-01", last="2024-03-01")
    made = Restored(db, bucket, config_file(db, bucket))
    made.lines = made.archive()  # type: ignore[attr-defined]
    return made


def rows(scene: Restored) -> int:
    return int(scene.db.scalar("SELECT count(*) FROM audit_logs"))


def planned(scene: Restored, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """The job of aa-plan, and what it said of holds."""
    result = scene.hand.must("aa-plan", flags)
    job, = result.lines
    return job, [record["msg"] for record in result.log if record["event"] in ("plan.held", "plan.forced")]


def holds(scene: Restored) -> list[str]:
    return [key for key in scene.bucket.keys() if "/.holds/" in key]


def through_the_holder(scene: Restored, jobs: bytes) -> Result:
    """aa-txn over the pipe of a person."""
    pipe = "aa-select | aa-serialize | aa-upload | aa-verify | aa-delete"
    return run_forked("aa-txn", ["--config", scene.path, "--", "sh", "-c", pipe], jobs, env={"PATH": f"{BIN}:{os.defpath}"})


def moved(summary: dict[str, Any]) -> int:
    """Rows that a run archived, by its report."""
    return sum(table["rows"] for database in summary["databases"] for table in database["tables"])


def older(scene: Restored, count: int = 20) -> None:
    """Rows from before all that was archived: they are due, and nobody holds them."""
    tables.fill(scene.db.connection, "audit_logs", rows=count, first="2023-01-01", last="2023-02-01", start=1001)


@pytest.mark.req("T12")
def test_what_is_restored_with_a_hold_is_not_archived_the_next_night_and_is_afterwards(scene: Restored) -> None:
    older(scene)
    report = scene.restore("--restore-all", "--table", "audit_logs", "--hold-until", LATE)
    assert (report["rows"]["inserted"], report["asked"]["hold_until"]) == (250, UNTIL)
    key, = holds(scene)
    record = json.loads(scene.bucket.read(key))
    schema.validate("hold", record, "the hold")
    first, last = scene.lines[0]["batch"]["first"][0], scene.lines[2]["batch"]["last"][0]
    assert (record["first"], record["last"], record["timestamp"], record["hold"]) == (first, last, "created_at", report["restore"])
    driven = Driven(scene.db, scene.bucket, scene.path)
    summary = driven.ran("--force")
    assert (rows(scene), moved(summary)) == (250, 20), "the rows that nobody holds were archived, the others were not"
    said, = [each["msg"] for each in summary["warnings"] if "held until" in each["msg"]]
    assert f"250 eligible rows from {first} to {last} are held until {UNTIL}" in said

    an_hour_ago = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=1)
    over = {**record, "until": f"{an_hour_ago:%Y-%m-%dT%H:%M:%SZ}"}
    scene.bucket.client.put_object(Bucket=scene.bucket.name, Body=json.dumps(over),
                                   Key=names.hold_key("archives/", scene.db.name, over["until"], over["hold"]))
    scene.bucket.client.delete_object(Bucket=scene.bucket.name, Key=key)
    driven.ran("--force")
    assert rows(scene) == 0


@pytest.mark.req("T12")
def test_a_plan_says_what_is_held_and_leaves_it_out_also_where_rows_lie_between(scene: Restored) -> None:
    older(scene)
    scene.restore("--table", "audit_logs", "--start-date", "2024-01-20", "--end-date", "2024-02-10", "--hold-until", LATE)
    inside = rows(scene) - 20
    tables.fill(scene.db.connection, "audit_logs", rows=5, first="2024-01-25", last="2024-01-26", start=2001)  # late, in the range: held with it
    tables.fill(scene.db.connection, "audit_logs", rows=7, first="2024-03-25", last="2024-03-26", start=3001)
    job, said = planned(scene)
    assert (job["estimate"], len(said)) == (27, 1)
    assert f"{inside + 5} eligible rows from 2024-01-20T00:00:00.000000Z to 2024-02-11T00:00:00.000000Z are held until {UNTIL}" in said[0]
    assert job["held"] == [["2024-01-20T00:00:00.000000Z", "2024-02-11T00:00:00.000000Z"]]
    assert sum(line["batch"]["rows"] for line in scene.hand.export()) == 27
    dry = run_stage("aa-archive", ["-c", scene.path, "--dry-run", "--output", "text"])
    assert "27 rows of 1 table would be archived" in dry.out.decode() and "are held until" in dry.err
    listed = run_stage("aa-ls", ["-c", scene.path, "--output", "text"])
    assert listed.rc == 0 and "public.audit_logs: rows from 2024-01-20T00:00:00.000000Z to" in listed.err and UNTIL in listed.err


@pytest.mark.req("T12")
def test_a_plan_that_is_older_than_the_hold_takes_nothing_through_the_holder(scene: Restored) -> None:
    jobs = scene.hand.must("aa-plan").out
    scene.restore("--restore-all", "--table", "audit_logs", "--hold-until", LATE)
    result = through_the_holder(scene, jobs)
    assert (result.rc, result.out, rows(scene)) == (0, b"", 250), result.err


@pytest.mark.req("T12")
def test_aa_delete_by_hand_refuses_rows_that_were_held_since_they_were_selected(scene: Restored) -> None:
    tables.fill(scene.db.connection, "audit_logs", rows=30, first="2024-01-25", last="2024-01-26", start=2001)
    lines = scene.hand.export()
    scene.restore("--restore-all", "--table", "audit_logs", "--hold-until", LATE)
    refused = scene.hand.delete(lines)
    assert (refused.rc, rows(scene)) == (3, 280)
    assert "30 rows of" in refused.err and "are held; nothing was deleted" in refused.err and UNTIL in refused.err
    forced = scene.hand.delete(lines, "--force-rearchive")
    assert (forced.rc, rows(scene)) == (0, 250), forced.err


@pytest.mark.req("T12", "REQ-IDEM-011", "REQ-IDEM-012", "REQ-IDEM-013")
@pytest.mark.parametrize("mode", ["held", "late"])
def test_force_rearchive_takes_them_all_the_same_says_so_and_wants_a_confirmation(
        scene: Restored, config_file: Any, mode: str) -> None:
    scene.restore("--restore-all", "--table", "audit_logs", "--hold-until", LATE)
    driven = Driven(scene.db, scene.bucket, config_file(scene.db, scene.bucket, locking={"mode": mode, "enabled": True, "backend": "postgres"}))
    assert moved(driven.ran("--force")) == 0
    refused = driven.run("--force-rearchive")
    assert (refused.rc, rows(scene)) == (3, 250) and "--force-rearchive wants a confirmation" in refused.err
    summary = driven.ran("--force-rearchive", "--force")
    assert (moved(summary), rows(scene)) == (250, 0)
    assert any("--force-rearchive archives them all the same" in each["msg"] for each in summary["warnings"])


@pytest.mark.req("T12")
def test_a_hold_is_longer_when_it_is_asked_for_again_though_every_row_is_there(scene: Restored) -> None:
    scene.restore("--restore-all", "--table", "audit_logs", "--hold-until", "2998-12-31")
    report = scene.restore("--restore-all", "--table", "audit_logs", "--hold-until", LATE)
    assert (report["outcome"], len(holds(scene))) == ("nothing to do", 2)
    assert len(planned(scene)[1]) == 2


@pytest.mark.req("T12", "T46")
def test_a_dry_run_holds_nothing_and_says_what_would_be(scene: Restored) -> None:
    result = scene.run("--restore-all", "--table", "audit_logs", "--hold-until", LATE, "--dry-run")
    assert (result.rc, holds(scene)) == (0, [])
    assert any(record["event"] == "restore.held" and "would be held" in record["msg"] for record in result.log)


@pytest.mark.req("T12")
def test_a_run_at_work_would_not_know_the_hold_so_nothing_is_restored(scene: Restored) -> None:
    control = connect.connect(scene.hand.settings.databases[0], purpose="control")
    try:
        locks.take(control, None, "the database")
        result = scene.run("--restore-all", "--table", "audit_logs", "--hold-until", LATE)
        assert (result.rc, rows(scene), holds(scene)) == (4, 0, []) and "a run is at work" in result.err
    finally:
        locks.release(control, None)


@pytest.mark.req("T12")
def test_a_partition_obeys_the_hold_of_the_table_that_it_is_a_part_of(db: Any, bucket: Any, config_file: Any) -> None:
    db.execute("CREATE TABLE events (id bigint, at timestamptz NOT NULL, PRIMARY KEY (id, at)) PARTITION BY RANGE (at)")
    db.execute("CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM ('2024-01-01') TO ('2024-02-01')")
    db.execute("INSERT INTO events SELECT g, timestamptz '2024-01-05Z' + g * interval '1 hour' FROM generate_series(1, 50) g")
    path = config_file(db, bucket, [{"name": "events", "timestamp_column": "at", "primary_key": ["id", "at"]}])
    made = Restored(db, bucket, path)
    made.archive()
    made.restore("--restore-all", "--table", "events_1", "--into", "events", "--hold-until", LATE)
    job, said = planned(made)
    assert (job["table"], job["estimate"], len(said)) == ("events_1", 0, 1)


@pytest.mark.req("T12")
def test_a_day_that_is_over_and_a_table_archived_by_another_column_are_refused(scene: Restored, config_file: Any) -> None:
    yesterday = str(datetime.datetime.now(datetime.timezone.utc).date() - datetime.timedelta(days=1))
    over = scene.run("--restore-all", "--table", "audit_logs", "--hold-until", yesterday)
    assert (over.rc, rows(scene)) == (3, 0) and f"--hold-until '{yesterday}' is over" in over.err
    scene.db.execute("ALTER TABLE audit_logs ADD noted_at timestamptz")
    other = config_file(scene.db, scene.bucket, [{"name": "audit_logs", "timestamp_column": "noted_at", "primary_key": "id"}])
    asked = ["--restore-all", "--table", "audit_logs", "--schema-strategy", "lenient", "--hold-until", LATE]
    refused = run_stage("aa-restore", ["-c", other, *asked])
    assert (refused.rc, rows(scene), holds(scene)) == (3, 0, []) and "is archived by 'noted_at'" in refused.err
    scene.restore(*asked)
    plan = run_stage("aa-plan", ["-c", other])
    assert plan.rc == 3 and "is archived by 'noted_at', and by its 'created_at' rows from" in plan.err


@pytest.mark.req("T12")
def test_a_bucket_that_does_not_answer_is_a_warning_of_the_plan_and_no_run_begins_without_it(
        scene: Restored, config_file: Any) -> None:
    scene.restore("--restore-all", "--table", "audit_logs", "--hold-until", LATE)
    away = config_file(scene.db, scene.bucket, s3={"bucket": "there-is-none", "retries": 0})
    plan = run_stage("aa-plan", ["-c", away])
    assert plan.rc == 0 and any(record["event"] == "plan.holds" for record in plan.log) and "held" not in plan.lines[0]
    lines = [json.loads(line) for line in plan.out.splitlines()]
    assert lines[0]["estimate"] == 250
    result = through_the_holder(scene, plan.out)
    assert (result.rc, rows(scene)) == (0, 250), result.err
