"""aa-rollback: what was archived is in its table again, exactly, and archived no more; or nothing of a batch is done."""

from __future__ import annotations

from typing import Any

import pytest

from audit_archiver.catalogue import index
from audit_archiver.formats import schema
from audit_archiver.points import POINTS
from tests.ground import tables
from tests.ground.driven import Driven
from tests.ground.kill import kill, kill_family, stopped_at
from tests.ground.restored import Restored
from tests.ground.run import Result, finish, run_stage, spawn
from tests.ground.terminal import Terminal
from tests.ground.wait import until

TABLE = ("--table", "audit_logs")


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Any:
    """350 rows in four batches, archived in one run; the table is empty."""
    tables.create(db.connection, rows=350, first="2024-01-01", last="2024-03-01")
    made = Restored(db, bucket, config_file(db, bucket))
    db.execute("CREATE TABLE original AS SELECT * FROM audit_logs")
    made.driven = Driven(db, bucket, made.path)  # type: ignore[attr-defined]
    lines = made.archive()
    made.run_id = lines[0]["batch"]["run"]  # type: ignore[attr-defined]
    assert (len(lines), rows(made)) == (4, 0)
    return made


def rows(scene: Any, table: str = "audit_logs") -> int:
    return int(scene.db.scalar(f"SELECT count(*) FROM {table}"))


def whole(scene: Any) -> bool:
    return bool(tables.digest(scene.db.connection, "audit_logs") == tables.digest(scene.db.connection, "original"))


def run(scene: Any, *argv: Any) -> Result:
    return run_stage("aa-rollback", ["-c", scene.path, "--output", "json", *argv])


def rolled_back(scene: Any, *argv: Any, code: int = 0) -> dict[str, Any]:
    """aa-rollback of one table, which ends with `code`; its report."""
    result = run(scene, *argv)
    assert result.rc == code, f"{result.rc}: {result.err}"
    report, = result.lines
    schema.validate("restore", report, "the report")
    return dict(report)


def keys(scene: Any, ending: str) -> list[str]:
    return [key for key in scene.bucket.keys() if key.endswith(ending)]


def body(scene: Any, key: str) -> bytes:
    return bytes(scene.bucket.client.get_object(Bucket=scene.bucket.name, Key=key)["Body"].read())


def states(scene: Any) -> list[str]:
    return [line["state"] for line in scene.listed()]


def validated(scene: Any) -> list[str]:
    """The findings of aa-validate, by id, that are no notes."""
    result = run_stage("aa-validate", ["-c", scene.path, "--output", "json", "--depth", "full"])
    return [each["id"] for each in result.lines[0]["findings"]] if result.rc else []


@pytest.mark.req("REQ-RST-005", "REQ-RST-007", "REQ-RST-009", "REQ-DR-013", "T12")
def test_a_run_is_undone_and_archived_again_and_nothing_is_lost_or_doubled(scene: Any) -> None:
    records = {key: body(scene, key) for key in scene.bucket.keys()}
    scene.restore("--restore-all", *TABLE)
    scene.db.execute("DELETE FROM audit_logs")
    records.update({key: body(scene, key) for key in keys(scene, ".json") if ".restores/" in key})
    report = rolled_back(scene, "--run", scene.run_id)
    assert whole(scene)
    assert (report["rows"]["inserted"], report["batches"]["restored"], report["outcome"]) == (350, 4, "done")
    assert report["rows"]["sampled"] > 0
    assert {key: body(scene, key) for key in records} == records, "what was there stays as it is"
    assert len(keys(scene, "_rolled_back.json")) == 4 and states(scene) == ["rolled back"] * 4
    assert index.watermark(index.manifest(scene.hand.store, scene.db.name, "public", "audit_logs")) is None
    assert validated(scene) == []
    assert scene.restore("--restore-all", *TABLE)["outcome"] == "nothing to do"
    assert rolled_back(scene, "--run", scene.run_id)["outcome"] == "nothing to do"
    assert whole(scene)

    scene.archive()
    assert (rows(scene), sorted(states(scene))) == (0, ["archived"] * 4 + ["rolled back"] * 4)
    mark = index.watermark(index.manifest(scene.hand.store, scene.db.name, "public", "audit_logs"))
    assert mark is not None and (mark["rows"], mark["batches"]) == (350, 4)
    assert validated(scene) == []
    assert len({line["id"] for line in scene.listed()}) == 4, "the same batches, archived a second time"
    assert scene.restore("--restore-all", *TABLE)["rows"]["inserted"] == 350, "and no watermark says that they were restored"
    assert whole(scene)


@pytest.mark.req("REQ-RST-005")
def test_the_last_batches_of_a_table_are_undone_the_newest_first(scene: Any) -> None:
    would = rolled_back(scene, *TABLE, "--last", 2, "--dry-run")
    assert (would["rows"]["inserted"], rows(scene), keys(scene, "_rolled_back.json")) == (150, 0, [])
    report = rolled_back(scene, *TABLE, "--last", 2)
    assert [key.rpartition("_")[2] for key in report["objects"]] == ["004.jsonl.gz", "003.jsonl.gz"]
    assert scene.db.execute("SELECT min(id), max(id), count(*) FROM audit_logs") == [(201, 350, 150)]
    assert states(scene) == ["archived"] * 2 + ["rolled back"] * 2
    assert rolled_back(scene, *TABLE, "--last", 9)["batches"]["restored"] == 2
    assert whole(scene)


@pytest.mark.req("REQ-RST-008")
def test_a_row_that_is_there_with_another_content_leaves_its_batch_archived(scene: Any) -> None:
    scene.db.execute("INSERT INTO audit_logs SELECT * FROM original WHERE id IN (150, 250)")
    scene.db.execute("UPDATE audit_logs SET action = 'changed' WHERE id = 150")
    result = run(scene, "--run", scene.run_id)
    assert result.rc == 2 and "another content" in result.err and "audit_logs" in result.err
    assert scene.db.execute("SELECT count(*) FROM audit_logs WHERE id > 200") == [(150,)]
    assert scene.db.execute("SELECT id, action FROM audit_logs WHERE id <= 200") == [(150, "changed")]
    assert states(scene) == ["archived"] * 2 + ["rolled back"] * 2
    scene.db.execute("DELETE FROM audit_logs WHERE id = 150")
    report = rolled_back(scene, "--run", scene.run_id)
    assert whole(scene) and report["rows"]["inserted"] == 200


def test_a_row_that_is_there_byte_for_byte_is_no_conflict(scene: Any) -> None:
    scene.db.execute("INSERT INTO audit_logs SELECT * FROM original WHERE id = 250")
    report = rolled_back(scene, "--run", scene.run_id)
    assert (report["rows"]["same"], report["rows"]["inserted"]) == (1, 349)
    assert whole(scene)


@pytest.mark.req("REQ-RST-006")
def test_what_was_archived_before_the_window_is_refused_without_force(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit_archiver.restore.rolling_back.LATE_SQL",
                        "SELECT count(*) FROM unnest(%s::timestamptz[]) AS t (at) WHERE at < now() + interval '25 hours' - %s * interval '1 hour'")
    result = run(scene, "--run", scene.run_id)
    assert result.rc == 3 and "4 of 4 batches were archived more than 24 hours ago" in result.err
    assert (rows(scene), keys(scene, "-start.json") == [key for key in keys(scene, "-start.json") if ".runs/" in key]) == (0, True)
    assert rolled_back(scene, *TABLE, "--last", 1, "--window", 26)["rows"]["inserted"] == 50
    assert rolled_back(scene, "--run", scene.run_id, "--force")["rows"]["inserted"] == 300
    assert whole(scene)


@pytest.mark.parametrize("point", ["rollback.start.put", "restore.staged:2", "restore.committed:2", "rollback.record.put:2", "rollback.end.before"])
@pytest.mark.req("REQ-RST-005", "T12")
def test_a_rollback_that_is_killed_holds_the_table_until_it_is_run_again(scene: Any, point: str) -> None:
    assert {each for each in POINTS if each.startswith("rollback.")} == {"rollback.start.put", "rollback.record.put", "rollback.end.before"}
    child = spawn("aa-rollback", ["-c", scene.path, *TABLE, "--last", 3], env={"AA_TEST_POINT": point})
    stopped_at(point, child.token, ended=child.poll)
    kill(child.pid)
    finish(child)
    ours = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'audit-archiver%%' AND datname = %s"
    until(lambda: not scene.db.admin(ours, (scene.db.name,)), "the server has noticed")
    there = rows(scene)
    held = scene.driven.run()
    assert held.rc != 0 and "was interrupted" in held.err + held.out.decode()
    assert rows(scene) == there, "nothing of the table is archived meanwhile"
    recovered = scene.hand.recover()
    assert recovered.rc == 2 and len(recovered.lines[0]["databases"][0]["rollbacks"]) == 1
    report = rolled_back(scene, *TABLE)
    assert report["rows"]["conflicts"] == 0 and scene.db.execute("SELECT min(id), count(*) FROM audit_logs") == [(101, 250)]
    assert sorted(states(scene)) == ["archived"] + ["rolled back"] * 3
    scene.driven.ran()
    assert scene.restore("--restore-all", *TABLE)["rows"]["inserted"] == 350
    assert whole(scene)


@pytest.mark.req("REQ-RST-005")
def test_it_never_works_beside_a_run(scene: Any) -> None:
    tables.fill(scene.db.connection, "audit_logs", rows=10, first="2024-04-01", last="2024-04-02", start=1000)
    child = scene.driven.spawn(env={"AA_TEST_POINT": "select.locked"})
    stopped_at("select.locked", child.token, ended=child.poll)
    for more in ((), ("--dry-run",)):
        result = run(scene, "--run", scene.run_id, *more)
        assert result.rc == 4 and "run" in result.err
    assert keys(scene, "_rolled_back.json") == []
    kill_family(child.token)
    finish(child)


def test_a_person_is_asked_first(scene: Any) -> None:
    for answer, code, there in (("n\n", 2, 0), ("y\n", 0, 350)):
        with Terminal("aa-rollback", ["-c", scene.path, "--run", scene.run_id]) as terminal:
            terminal.expect("350 rows of 4 batches")
            terminal.expect("[y/N] ")
            terminal.type(answer)
            assert terminal.end() == code
        assert rows(scene) == there


@pytest.mark.parametrize(("argv", "words"), [
    ((), "nothing says what to undo"), (("--table", "audit_logs"), "how much"), (("--last", "2", "--run", "20240101T000000Z-1"), "of one table"),
    (("--run", "20240101T000000Z-1"), "nothing that run"), (("--table", "nowhere", "--last", "1"), "nothing is archived"),
    (("--database", "other", "--run", "20240101T000000Z-1"), "no database 'other'"), (("--table", "audit_logs", "--last", "0"), "no number")])
def test_what_cannot_be_meant_is_refused(scene: Any, argv: tuple[str, ...], words: str) -> None:
    result = run(scene, *argv)
    assert result.rc == 3 and words in result.err, result.err
    assert rows(scene) == 0


@pytest.mark.req("REQ-RST-005")
def test_with_a_lock_for_each_table_another_table_may_be_at_work(scene: Any, config_file: Any, db: Any, bucket: Any) -> None:
    tables.create(db.connection, "other_logs", rows=20, first="2024-01-01", last="2024-03-01")
    path = config_file(db, bucket, [{"name": each, "timestamp_column": "created_at", "primary_key": "id"} for each in ("audit_logs", "other_logs")],
                       locking={"scope": "table"})
    child = spawn("aa-archive", ["-c", path, "--table", "other_logs"], env={"AA_TEST_POINT": "select.locked"})
    stopped_at("select.locked", child.token, ended=child.poll)
    result = run_stage("aa-rollback", ["-c", path, "--run", scene.run_id])
    assert result.rc == 0, result.err
    kill_family(child.token)
    finish(child)
    assert whole(scene) and rows(scene, "other_logs") == 20


@pytest.mark.req("REQ-RST-005", "REQ-RST-008")
def test_one_that_was_killed_and_meets_a_conflict_holds_the_table_until_the_row_is_set_aside(scene: Any) -> None:
    child = spawn("aa-rollback", ["-c", scene.path, *TABLE, "--last", 3], env={"AA_TEST_POINT": "rollback.record.put"})
    stopped_at("rollback.record.put", child.token, ended=child.poll)
    kill(child.pid)
    finish(child)
    scene.db.execute("INSERT INTO audit_logs SELECT * FROM original WHERE id = 150")
    scene.db.execute("UPDATE audit_logs SET action = 'kept' WHERE id = 150")
    ours = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'audit-archiver%%' AND datname = %s"
    until(lambda: not scene.db.admin(ours, (scene.db.name,)), "the server has noticed")

    met = run(scene, *TABLE)
    assert met.rc == 2 and "another content" in met.err and any(record["event"] == "rollback.open" for record in met.log)
    assert scene.hand.recover().rc == 2, "the table is left alone"
    # the way out, as docs/restore.md has it
    scene.db.execute("CREATE TABLE set_aside AS SELECT * FROM audit_logs WHERE id = 150")
    scene.db.execute("DELETE FROM audit_logs WHERE id = 150")
    assert rolled_back(scene, *TABLE)["rows"]["conflicts"] == 0
    assert scene.hand.recover().rc == 0
    scene.db.execute("UPDATE audit_logs a SET action = s.action FROM set_aside s WHERE a.id = s.id")
    assert scene.db.execute("SELECT min(id), count(*), count(*) FILTER (WHERE action = 'kept') FROM audit_logs") == [(101, 250, 1)]
    assert sorted(states(scene)) == ["archived"] + ["rolled back"] * 3


@pytest.mark.req("REQ-RST-005", "REQ-RST-003")
def test_a_damaged_batch_stays_archived_and_is_named_and_the_others_go_back(scene: Any) -> None:
    key = next(key for key in keys(scene, ".jsonl.gz") if "_batch_002" in key)
    sound = body(scene, key)
    scene.bucket.client.put_object(Bucket=scene.bucket.name, Key=key, Body=sound[:-40] + bytes(40))
    report = rolled_back(scene, "--run", scene.run_id, code=2)
    assert [each["s3_key"] for each in report["failures"]] == [key]
    assert scene.db.scalar("SELECT count(*) FROM audit_logs WHERE id BETWEEN 101 AND 200") == 0 and rows(scene) == 250
    assert [line["number"] for line in scene.listed() if line["state"] == "archived"] == [2]
    scene.bucket.client.put_object(Bucket=scene.bucket.name, Key=key, Body=sound)
    assert rolled_back(scene, "--run", scene.run_id)["rows"]["inserted"] == 100
    assert whole(scene)


@pytest.mark.req("REQ-RST-005")
def test_rows_of_a_partition_go_back_into_it(db: Any, bucket: Any, config_file: Any) -> None:
    db.execute("CREATE TABLE events (id bigint, at timestamptz NOT NULL, PRIMARY KEY (id, at)) PARTITION BY RANGE (at)")
    for month in (1, 2):
        db.execute(f"CREATE TABLE events_{month} PARTITION OF events FOR VALUES FROM ('2024-0{month}-01Z') TO ('2024-0{month + 1}-01Z')")
    db.execute("INSERT INTO events SELECT g, timestamptz '2024-01-05Z' + g * interval '1 hour' FROM generate_series(1, 1000) g")
    made = Restored(db, bucket, config_file(db, bucket, [{"name": "events", "timestamp_column": "at", "primary_key": ["id", "at"]}]))
    db.execute("CREATE TABLE original AS SELECT * FROM events")
    in_first = db.scalar("SELECT count(*) FROM events_1")
    made.archive()
    assert rows(made, "events") == 0
    assert rolled_back(made, "--table", "events_1", "--last", 99)["rows"]["inserted"] == in_first
    assert (rows(made, "events_1"), rows(made, "events_2")) == (in_first, 0)
    assert rolled_back(made, "--table", "events_2", "--last", 99)["outcome"] == "done"
    assert tables.digest(db.connection, "events") == tables.digest(db.connection, "original")
