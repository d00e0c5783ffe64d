"""Traps between upload and commit: other writers, stores that lie, triggers, and the ways of composing the stages.

The T numbers are in the markers; C and S entries of the notes on PostgreSQL stand in the docstrings.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Callable, Iterator

import psycopg2.errors
import pytest

from audit_archiver import exits
from audit_archiver.formats import names
from tests.conftest import ARCHIVER, TestDatabase
from tests.ground import kill, tables
from tests.ground.by_hand import ByHand, dump
from tests.ground.driven import Driven, logs, summary
from tests.ground.faulty_s3 import FaultyS3, answers, error, flip_bit, on, returns
from tests.ground.postgres import Cluster
from tests.ground.run import BIN, Result, finish, run_forked

KEYED = {"timestamp_column": "created_at", "primary_key": "id"}
MODES = pytest.mark.parametrize("mode", ["held", "late"])


@pytest.fixture()
def driven(db: Any, bucket: Any, config_file: Any) -> Callable[..., Driven]:
    """A function that writes a configuration and gives its runs."""
    return lambda *args, **more: Driven(db, bucket, config_file(db, bucket, *args, **more))


@pytest.fixture()
def store(s3: Any) -> Iterator[FaultyS3]:
    """A store that misbehaves as a test says."""
    with FaultyS3(s3.endpoint) as made:
        yield made


def stopped_run(runs: Driven, point: str, meanwhile: Callable[[], Any]) -> Result:
    """A run that stands still at `point` while `meanwhile` happens, and then goes on to its end."""
    child = runs.spawn(env={"AA_TEST_POINT": point})
    kill.stopped_at(point, child.token, ended=child.poll)
    try:
        meanwhile()
    finally:
        kill.wave_through(point, child.token, child.poll)
    return finish(child)


@MODES
@pytest.mark.req("T28", "T29", "REQ-LOCK-001")
def test_rows_updated_or_inserted_during_the_upload_are_not_lost(db: Any, driven: Callable[..., Driven], mode: str) -> None:
    logs(db, old=60, young=0)
    runs = driven(locking={"mode": mode}, defaults={"batch_size": 60})
    refused = []

    def meanwhile() -> None:
        with contextlib.closing(db.connect()) as other, other.cursor() as cursor:
            cursor.execute("SET lock_timeout = '200ms'")
            cursor.execute("INSERT INTO audit_logs (id, created_at, action) VALUES (9001, '2024-02-02', 'late insert')")
            try:
                cursor.execute("UPDATE audit_logs SET action = 'new value' WHERE id = 30")
            except psycopg2.errors.LockNotAvailable:
                refused.append(30)

    result = stopped_run(runs, "upload.data.before", meanwhile)

    # WHEN all is done, by this run and the next one
    again = runs.run()
    # THEN the update waited for the lock, or its new value is what was archived; the late row was never deleted unread
    assert (result.rc, again.rc, refused) == (0, 0, [30] if mode == "held" else []), result.err
    assert db.scalar("SELECT count(*) FROM audit_logs") == 0
    archived = [row for commit in runs.archive.commits() for row in runs.archive.rows(commit)]
    assert len(archived) == 61 == len({json.loads(row)["id"] for row in archived})
    assert sum(b"late insert" in row for row in archived) == 1
    assert sum(b"new value" in row for row in archived) == (0 if mode == "held" else 1)


@pytest.mark.req("T30", "REQ-VER-005", "REQ-TXN-014", "REQ-INT-003")
def test_a_row_whose_delete_a_trigger_suppresses_is_named_and_left_and_the_others_go(db: Any, driven: Callable[..., Driven]) -> None:
    """S4, S5: the count would lie; the batch is cut until the row that fails alone is known, and does not stop its table."""
    before = logs(db, old=24, young=0)
    db.execute("""CREATE FUNCTION public.keep() RETURNS trigger LANGUAGE plpgsql AS
                  $$ BEGIN IF OLD.id = 9 THEN RETURN NULL; END IF; RETURN OLD; END $$""")
    db.execute("CREATE TRIGGER keep BEFORE DELETE ON audit_logs FOR EACH ROW EXECUTE PROCEDURE public.keep()")
    runs = driven(defaults={"batch_size": 24}, s3={"retry_base_s": 1, "retry_max_s": 1})
    result = runs.run(seconds=120)
    table = summary(result)["databases"][0]["tables"][0]
    assert result.rc == exits.SOME_FAILED, result.err
    assert (table["rows"], table["left"]["failing"]) == (23, 1)
    assert [record["key"] for record in result.log if record["event"] == "row.left.failed"] == ["9"]
    assert runs.whole("public.audit_logs", before) == 23


@pytest.mark.req("T30")
def test_s4_a_rule_that_deletes_something_else_refuses_the_table(db: Any, driven: Callable[..., Driven]) -> None:
    """S4: DO INSTEAD answers with the right count, and nothing is deleted from the table."""
    logs(db, old=10, young=0)
    db.execute("CREATE TABLE public.other AS SELECT * FROM audit_logs")
    db.execute("CREATE RULE elsewhere AS ON DELETE TO audit_logs DO INSTEAD DELETE FROM other WHERE id = OLD.id")
    runs = driven()
    result = runs.run()
    assert result.rc not in (0, exits.SOME_FAILED) and "rule" in result.err.lower()
    assert [db.scalar(f"SELECT count(*) FROM {name}") for name in ("audit_logs", "other")] == [10, 10]
    assert runs.archive.commits() == []


@pytest.mark.req("T20", "T21", "REQ-TXN-003", "REQ-TXN-004", "REQ-INT-003", "REQ-VER-005")
@pytest.mark.parametrize(("fault", "code"), [
    (returns(on("GET", names.DATA), flip_bit), 2), (returns(on("GET", names.KEYS), lambda body: body[:-20]), 2),
    (answers(on("PUT", names.METADATA), error(403, "AccessDenied")), 5)], ids=["altered data", "short key list", "refused upload"])
def test_nothing_is_deleted_when_the_store_lies_or_refuses(db: Any, bucket: Any, config_file: Any, store: FaultyS3, fault: Any, code: int) -> None:
    before = logs(db, old=30, young=0)
    runs = Driven(db, bucket, config_file(db, bucket, s3={"endpoint": store.endpoint, "retries": 1, "retry_base_s": 1, "retry_max_s": 1}))
    store.fault = fault
    result = runs.run("--batch-size", 30, seconds=120)
    assert result.rc == code, result.err
    assert (tables.digest(db.connection, "public.audit_logs"), runs.archive.commits()) == (before, [])
    # AND once the store is well the same rows are archived, each once
    store.fault = None
    runs.ran()
    assert runs.whole("public.audit_logs", before) == 30


@MODES
def test_s12_a_second_server_that_writes_to_the_same_prefix_is_refused_and_keeps_its_rows(db: Any, bucket: Any, driven: Callable[..., Driven],
                                                                                        config_file: Any, tmp_path: Path, mode: str) -> None:
    """S12: the names of database and table are the same, only the system identifiers differ."""
    # GIVEN a server whose table is archived, and another one that was given the same configuration
    before = logs(db, old=60, young=5)
    runs = driven(locking={"mode": mode})
    runs.ran()
    with Cluster.start() as cluster:
        with contextlib.closing(cluster.connect()) as admin, admin.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {ARCHIVER} LOGIN")
            cursor.execute(f"CREATE DATABASE {db.name} OWNER {ARCHIVER}")
        with contextlib.closing(TestDatabase(cluster, db.name)) as second:
            tables.create(second.connection, rows=40, first="2024-01-01", last="2024-12-31", start=5001)
            theirs = tables.digest(second.connection, "public.audit_logs")
            intruder = Driven(second, bucket, config_file(second, bucket, locking={"mode": mode}, staging_dir=str(tmp_path / "second")))
            objects = settled(runs)
            # WHEN that one is archived THEN it is a configuration error that names the owner
            result = intruder.run()
            assert result.rc == exits.CONFIG == summary(result)["exit"], result.err
            system = db.admin("SELECT system_identifier::text FROM pg_control_system()")[0][0]
            said = summary(result)["errors"][0]
            assert f"/{db.name}/audit_logs/' belongs to another table, database or server" in said["msg"]
            assert f"system {system}, database oid " in said["msg"] and f", {db.name} public.audit_logs" in said["msg"]
            # AND nothing is uploaded, nothing deleted
            assert (settled(runs), tables.digest(second.connection, "public.audit_logs")) == (objects, theirs)
    # AND the owner goes on as before
    assert runs.whole("public.audit_logs", before) == 60
    tables.fill(db.connection, rows=7, first="2024-01-01", last="2024-12-31", start=101)
    assert runs.ran()["totals"]["rows"] == 7


@pytest.mark.parametrize("point", ["upload.start.put", "upload.manifest.put", "holder.commit.sent"])
def test_s12_a_second_server_decides_nothing_about_the_first_one_s_batches_in_flight(db: Any, bucket: Any, driven: Callable[..., Driven],
                                                                                      config_file: Any, tmp_path: Path, point: str) -> None:
    """S12: it has the same keys, from a dump; abandoned by it, a batch that commits a moment later would be in neither place."""
    # GIVEN a run that stands still, and another server with the same rows and the same configuration
    before = logs(db, old=60, young=5)
    runs = driven()
    child = runs.spawn(env={"AA_TEST_POINT": point})
    kill.stopped_at(point, child.token, ended=child.poll)
    with Cluster.start() as cluster:
        with contextlib.closing(cluster.connect()) as admin, admin.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {ARCHIVER} LOGIN")
            cursor.execute(f"CREATE DATABASE {db.name} OWNER {ARCHIVER}")
        with contextlib.closing(TestDatabase(cluster, db.name)) as second:
            theirs = logs(second, old=60, young=5)
            twin = Driven(second, bucket, config_file(second, bucket, staging_dir=str(tmp_path / "second")))
            objects = runs.archive.keys()
            # WHEN that one runs THEN it is told to keep away, and has neither written nor deleted a thing
            result = twin.run()
            assert result.rc == exits.CONFIG and "aa-recover --adopt" in result.err, result.err
            assert (runs.archive.keys(), tables.digest(second.connection, "public.audit_logs")) == (objects, theirs)
    # AND what the first one's death leaves is recovered by its own next run
    kill.kill_family(child.token)
    child.wait()
    kill.all_gone(child.token)
    runs.ran()
    assert runs.whole("public.audit_logs", before) == 60


def settled(runs: Driven) -> dict[str, bytes]:
    """Every object in the bucket apart from the records of runs."""
    return {key: runs.archive.read(key) for key in runs.archive.keys() if "/.runs/" not in key}


@pytest.mark.req("T44", "T19", "REQ-TXN-002", "REQ-INT-001")
def test_the_driver_the_pipe_and_the_stages_on_files_make_the_same_archive(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> None:
    """C5: more batches than places; under aa-txn they commit as they come out, and aa-record sees committed lines only."""
    made: dict[str, list[bytes]] = {}
    for way in ("driver", "pipe", "files"):
        db.execute("DROP TABLE IF EXISTS audit_logs")
        before = logs(db, old=130, young=7)
        runs = Driven(db, bucket, config_file(db, bucket, defaults={"batch_size": 20}, s3={"prefix": f"{way}/"}, staging_dir=str(tmp_path / way)))
        hand = ByHand(db, runs.path)
        if way == "driver":
            runs.ran()
        elif way == "pipe":
            stages = " | ".join(str(BIN / name) for name in ("aa-select", "aa-serialize", "aa-upload", "aa-verify", "aa-delete"))
            plan = hand.must("aa-plan").out
            held = run_forked("aa-txn", ["-c", runs.path, "--in-flight", "2", "--", "sh", "-c", stages], plan)
            assert held.rc == 0, held.err
            assert [line["batch"]["number"] for line in held.lines] == list(range(1, len(held.lines) + 1)) and len(held.lines) > 3
            hand.must("aa-record", stdin=held.out)
        else:
            deleted = hand.delete(hand.export())
            assert deleted.rc == 0, deleted.err
            hand.record(deleted.lines)
        runs.archive.commits = lambda *_, way=way, find=runs.archive.commits: [  # type: ignore[method-assign]
            line for line in find() if line["serialized"]["stem"].startswith(f"{way}/")]
        assert runs.whole("public.audit_logs", before) == 130
        rows = [row for commit in runs.archive.commits() for row in runs.archive.rows(commit)]
        made[way] = [row.rpartition(b',"_archived_at"')[0] for row in rows]
    assert made["driver"] == made["pipe"] == made["files"] and len(made["driver"]) == 130


@pytest.mark.req("T13", "REQ-VER-007", "REQ-VER-008")
def test_s7_lines_stay_short_and_keys_stand_in_the_key_list_only(db: Any, bucket: Any, config_file: Any) -> None:
    """S7, S9: a line that outgrows the pipe would make holder and stage wait for each other; before COMMIT nobody knows what was deleted."""
    db.execute("CREATE TABLE public.wide (id uuid, part text, created_at timestamptz NOT NULL, PRIMARY KEY (id, part))")
    db.execute("INSERT INTO wide SELECT md5(i::text)::uuid, repeat('k', 200), '2024-01-01' FROM generate_series(1, 3000) i")
    key = {"name": "wide", "timestamp_column": "created_at", "primary_key": ["id", "part"]}
    hand = ByHand(db, config_file(db, bucket, [key], defaults={"batch_size": 3000}))
    line, = hand.export()
    assert line["batch"]["rows"] == 3000 and len(line["verified"]["sample"]) == 30
    assert len(dump([{**line, "verified": {**line["verified"], "sample": []}}])) < 4000
    listed = hand.read(line, names.KEYS)
    assert len(listed["primary_keys"]) == 3000 and "deleted_at" not in listed and "rows_deleted" not in listed
    deleted = hand.delete([line]).lines
    hand.record(deleted)
    record = hand.read(line, names.COMMIT)
    assert record["deleted"]["rows"] == 3000 and record["deleted"]["at"] and record["committed"]["xid"]


@pytest.mark.req("REQ-VER-017", "REQ-VER-018", "REQ-VER-011")
def test_the_sample_is_taken_out_of_what_was_read_back_and_must_be_gone_after_the_commit(db: Any, driven: Callable[..., Driven]) -> None:
    logs(db, old=1500, young=0)
    runs = driven(defaults={"batch_size": 1500})
    result = runs.run("-v")
    assert result.rc == 0
    commit, = runs.archive.commits()
    ids = {json.loads(row)["id"] for row in runs.archive.rows(commit)}
    sample = [key[0] for key in commit["verified"]["sample"]]
    assert len(set(sample)) == 15 and set(sample) <= ids and commit["committed"]["sample_absent"] is True
    assert [record["sample"] for record in result.log if record["event"] == "sample.absent"] == [15]
