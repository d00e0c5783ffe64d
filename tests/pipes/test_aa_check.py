"""aa-check: every fault is a line with what to do about it, none hides the next, and nothing is changed by looking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

from audit_archiver.formats import schema
from tests.conftest import ARCHIVER, AUDIT_LOGS, Bucket, ConfigFile, TestDatabase
from tests.ground import tables
from tests.ground.postgres import QUICK, Cluster
from tests.ground.run import Result, run_forked
from tests.ground.terminal import Terminal


def check(path: Path, *argv: str) -> Result:
    """One look, forked, without a terminal."""
    return run_forked("aa-check", ["-c", path, *argv])


def report(result: Result) -> dict[str, Any]:
    """The findings as JSON, checked against their schema."""
    assert len(result.lines) == 1, result.err
    schema.validate("findings", result.lines[0], "the findings")
    return result.lines[0]


@pytest.fixture()
def logs(db: TestDatabase) -> TestDatabase:
    """A small audit_logs, and events that have no key."""
    tables.create(db.connection, rows=50)
    db.execute("CREATE TABLE events (id bigint NOT NULL, created_at timestamptz NOT NULL)")
    return db


@pytest.fixture()
def path(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> Path:
    """A configuration for both tables."""
    return config_file(logs, bucket, [AUDIT_LOGS, {**AUDIT_LOGS, "name": "events"}])


def state(db: TestDatabase, bucket: Bucket) -> tuple[Any, ...]:
    """Everything that a look could have changed."""
    return tables.digest(db.connection, "public.audit_logs"), db.scalar("SELECT count(*) FROM pg_class"), bucket.keys()


@pytest.mark.req("REQ-EXE-001")
def test_a_look_says_what_it_found_and_changes_nothing(logs: TestDatabase, bucket: Bucket, path: Path) -> None:
    before = state(logs, bucket)
    text, machine = check(path, "--output", "text"), check(path)
    assert text.rc == machine.rc == 3
    lines = text.out.decode().splitlines()
    assert any(line.startswith(f"ok    {logs.name}: connection  local socket as archiver, PostgreSQL ") for line in lines)
    assert [line.split()[:2] for line in lines if line.startswith("fail")] == [["fail", "public.events"]]
    assert "no primary key or unique index on 'id'" in text.out.decode() and f"({path}:" in text.out.decode()
    assert [(each["check"], each["code"]) for each in report(machine)["findings"] if each["status"] == "fail"] == [("table.shape", 3)]
    assert report(machine)["exit"] == 3
    assert [record["event"] for record in machine.log if record["level"] == "ERROR"] == ["check.failed"]
    assert state(logs, bucket) == before


@pytest.mark.req("REQ-EXE-001")
def test_validate_only_and_aa_check_find_the_same(path: Path) -> None:
    one, other = check(path), run_forked("aa-archive", ["-c", path, "--validate-only"])
    assert one.rc == other.rc
    found = [[{**each, "text": None if each["check"] in ("s3.clock", "staging.space") else each["text"]} for each in report(result)["findings"]]
             for result in (one, other)]
    assert found[0] == found[1]


def test_a_database_and_a_table_can_be_chosen_and_an_unknown_one_is_refused(logs: TestDatabase, path: Path) -> None:
    assert {each["table"] for each in report(check(path, "--table", "audit_logs"))["findings"]} == {None, "audit_logs"}
    assert check(path, "--database", logs.name, "--table", "public.audit_logs").rc == 0
    unknown = check(path, "--table", "audit_log")
    assert (unknown.rc, unknown.out) == (3, b"") and "did you mean 'public.audit_logs'?" in unknown.err


def test_quiet_is_silent_when_nothing_fails_and_names_each_failure_otherwise(path: Path) -> None:
    well = check(path, "--quiet", "--table", "audit_logs")
    assert (well.rc, well.out, well.err) == (0, b"", "")
    failed = check(path, "--quiet")
    assert (failed.rc, failed.out) == (3, b"")
    assert [record["check"] for record in failed.log] == ["table.shape"]


def test_on_a_terminal_each_failure_is_said_once(path: Path) -> None:
    with Terminal("aa-check", ["-c", path]) as terminal:
        assert terminal.end() == 3
        seen = terminal.seen
    assert seen.count("no primary key or unique index") == 1 and "1 failed: table.shape" in seen


@pytest.mark.req("REQ-DB-005")
def test_a_server_and_a_bucket_that_are_away_hide_nothing(logs: TestDatabase, path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    settings["databases"].insert(0, {**settings["databases"][0], "name": "away", "host": str(path.parent / "nowhere")})
    settings["s3"]["bucket"] = "nobody-has-this-one"
    path.write_text(yaml.safe_dump(settings))
    found = report(check(path))
    failed = [(each["check"], each["database"], each["code"]) for each in found["findings"] if each["status"] == "fail"]
    assert failed == [("connection.session", "away", 7), ("table.shape", logs.name, 3), ("s3.bucket", None, 3)]


PLANTED = {
    # check and table: what the finding says, and what its remedy
    ("configuration", None): ("warn", "stands in the file in clear", "write 'password_env: NAME' and set NAME"),
    ("server.fsync", None): ("fail", "fsync is off", "fsync_off: acknowledged"),
    ("server.slots", None): ("warn", "'to_warehouse'", "pg_drop_replication_slot('to_warehouse')"),
    ("tables.circle", None): ("warn", "public.egg -> public.hen -> public.egg", "NULL in old rows"),
    ("role.temporary", None): ("fail", "temporary tables", 'GRANT TEMPORARY ON DATABASE "prod" TO "checker"'),
    ("table.shape", "nowhere"): ("fail", "does not exist", "did you mean"),
    ("table.shape", "no_key"): ("fail", "no primary key or unique index on 'id'", "add one, or remove the table"),
    ("table.shape", "text_time"): ("fail", "has the type text", "timestamp, timestamptz or date"),
    ("table.shape", "secured"): ("fail", "row-level security", "BYPASSRLS"),
    ("table.shape", "ruled"): ("fail", "the rule 'kept' on DELETE", "drop the rule"),
    ("table.rights", "read_only"): ("fail", "lacks DELETE", 'GRANT DELETE ON "public"."read_only" TO "checker"'),
    ("table.vacuum", "vacuumed"): ("warn", "may not vacuum", "vacuum_strategy: none"),
    ("table.cascade", "parent"): ("fail", "'public.child' hang on it", "cascade: acknowledged"),
    ("table.references", "hen"): ("warn", "'public.egg' references it", "archive the referencing table too"),
    ("table.references", "egg"): ("warn", "'public.hen' references it", "archive the referencing table too"),
    ("table.triggers", "triggered"): ("warn", "'counts' fires on DELETE", "make sure"),
    ("table.published", "published"): ("fail", "DELETE would fail", 'ALTER TABLE "public"."published" REPLICA IDENTITY'),
    ("table.locks", "locked"): ("warn", "ShareLock is held by backend", "archive when it is over"),
    ("table.index", "large"): ("fail", "no index starts with created_at", 'CREATE INDEX CONCURRENTLY ON "public"."large" ("created_at", "id")'),
    ("table.index", "middling"): ("warn", "no index starts with created_at", 'CREATE INDEX CONCURRENTLY ON "public"."middling" ("created_at", "id")'),
    ("table.width", "wide"): ("warn", "kB each", "'batch_size: "),
    ("table.dst", "local_time"): ("warn", "Europe/Berlin, whose clock changes", "make it timestamptz"),
    ("table.timestamps", "timeless"): ("warn", "every row has a NULL or an infinite time", "fill the column"),
    ("run.duration", None): ("fail", "asleep between batches", "raise batch_size"),
    ("staging.directory", None): ("fail", "cannot be written", "AA_STAGING"),
    ("s3.create_only", None): ("warn", "does not honour If-None-Match", "give no other program this prefix"),
    ("s3.versions", None): ("warn", "keeps no versions", "aws s3api put-bucket-versioning"),
}
MADE = """
CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
ALTER TABLE no_key DROP CONSTRAINT no_key_pkey;
ALTER TABLE text_time ALTER created_at TYPE text;
ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
CREATE RULE kept AS ON DELETE TO ruled DO INSTEAD NOTHING;
CREATE TABLE child (parent bigint REFERENCES parent ON DELETE CASCADE); INSERT INTO child VALUES (1);
ALTER TABLE hen ADD FOREIGN KEY (other) REFERENCES egg; ALTER TABLE egg ADD FOREIGN KEY (other) REFERENCES hen;
CREATE TRIGGER counts BEFORE DELETE ON triggered FOR EACH ROW EXECUTE PROCEDURE f();
ALTER TABLE published REPLICA IDENTITY NOTHING;
ALTER TABLE wide ALTER body SET STORAGE EXTERNAL; INSERT INTO wide SELECT i, '2024-01-01', NULL, repeat('x', 50000) FROM generate_series(11, 30) i;
ALTER TABLE local_time ALTER created_at TYPE timestamp;
ALTER TABLE timeless ALTER created_at DROP NOT NULL; UPDATE timeless SET created_at = NULL;
INSERT INTO many SELECT i, '2024-01-01' FROM generate_series(11, 1200) i;
"""
TABLES = sorted({table for _, table in PLANTED if table and table != "nowhere"} | {"many"})


@pytest.fixture()
def ruined() -> Iterator[TestDatabase]:
    """A server of its own and a database where next to nothing is as it should be, for a role that owns none of it."""
    with Cluster.start(settings={**QUICK, "wal_level": "logical"}) as cluster:
        admin = cluster.connect()
        with admin.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {ARCHIVER} LOGIN")
            cursor.execute(f"CREATE DATABASE prod OWNER {ARCHIVER}")
        admin.close()
        db = TestDatabase(cluster, "prod")
        for name in TABLES:
            db.execute(f"CREATE TABLE {name} (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, other bigint, body text)")
            db.execute(f"INSERT INTO {name} SELECT i, '2024-01-01' FROM generate_series(1, 10) i")
            if name not in ("large", "middling"):
                db.execute(f"CREATE INDEX ON {name} (created_at)")
        db.execute(MADE + "ANALYZE")
        for name, size in (("large", 1 << 30), ("middling", 1 << 29)):  # pages of zeros, which take no room
            os.truncate(cluster.data / db.admin("SELECT pg_relation_filepath(%s::regclass)", (name,))[0][0], size)
        db.admin("CREATE ROLE checker LOGIN; REVOKE TEMPORARY ON DATABASE prod FROM PUBLIC")
        db.admin("GRANT SELECT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO checker; REVOKE DELETE ON read_only FROM checker")
        db.admin("CREATE PUBLICATION feed FOR TABLE published; ALTER DATABASE prod SET timezone = 'Europe/Berlin'")
        db.admin("SELECT pg_create_logical_replication_slot('to_warehouse', 'pgoutput')")
        locking = db.connect()
        with locking.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE locked IN SHARE MODE")
        yield db
        locking.close()
        db.close()


@pytest.mark.req("REQ-VAL-002", "REQ-VAL-004", "REQ-VAL-005", "REQ-VAL-009", "REQ-VAL-011", "REQ-VAL-012", "REQ-TBL-003", "REQ-TBL-004",
                 "REQ-TBL-005", "REQ-TBL-006", "REQ-TBL-007", "REQ-TBL-008", "REQ-TIME-006", "T11", "T32")
def test_every_one_of_many_faults_at_once_is_named_with_its_remedy(ruined: TestDatabase, poor_bucket: Bucket, config_file: ConfigFile,
                                                                 tmp_path: Path) -> None:
    configured = [{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in [*TABLES, "nowhere"]]
    for each in configured:
        each.update({"vacuumed": {"vacuum_strategy": "standard"}, "many": {"batch_size": 1, "sleep_between_batches": 60},
                     "wide": {"batch_size": 20_000}}.get(str(each["name"]), {}))
    (tmp_path / "file").touch()
    path = config_file(ruined, poor_bucket, configured, staging_dir=str(tmp_path / "file" / "staging"),
                       database={"user": "checker", "fsync_off": "refuse"})

    result = check(path)

    found = {(each["check"], each["table"]): each for each in report(result)["findings"] if each["status"] != "ok"}
    assert set(found) == set(PLANTED)
    for key, (status, text, remedy) in PLANTED.items():
        said = found[key]
        assert (said["status"], text in said["text"], remedy in (said["remedy"] or said["text"])) == (status, True, True), said
    assert result.rc == 3 and len(PLANTED) > 12
    failed = {name for (name, _), what in PLANTED.items() if what[0] == "fail"}
    assert {record["check"] for record in result.log if record["level"] == "ERROR"} == failed

    lines = check(path, "--output", "text").out.decode().splitlines()
    for (_, table), (status, text, remedy) in PLANTED.items():
        told = [line for line in lines if line.startswith(status) and text in line and remedy in line]
        assert told and all(f"public.{table} " in line for line in told[:1] if table), (text, remedy)


@pytest.mark.req("REQ-RES-016")
def test_what_aa_check_fails_a_run_refuses_and_the_rest_is_archived(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    logs.execute("ALTER TABLE events ADD PRIMARY KEY (id); INSERT INTO events VALUES (1, '2024-01-01')")
    os.truncate(logs.cluster.data / logs.admin("SELECT pg_relation_filepath('audit_logs'::regclass)")[0][0], 4 << 20)
    path = config_file(logs, bucket, [AUDIT_LOGS, {**AUDIT_LOGS, "name": "events"}], resources={"max_table_tb": 0.000002})
    found = [(each["check"], each["table"]) for each in report(check(path))["findings"] if each["status"] == "fail"]
    assert found == [("table.size", "audit_logs")]
    result = run_forked("aa-archive", ["-c", path, "--force"])
    assert result.rc == 1 and "more than max_table_tb" in result.err
    assert (logs.scalar("SELECT count(*) FROM audit_logs"), logs.scalar("SELECT count(*) FROM events")) == (50, 0)


@pytest.mark.req("REQ-TBL-007", "REQ-TBL-008")
def test_a_run_refuses_a_large_table_without_an_index_unless_it_is_forced(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    logs.execute("DROP INDEX audit_logs_created_at_id_idx")
    os.truncate(logs.cluster.data / logs.admin("SELECT pg_relation_filepath('audit_logs'::regclass)")[0][0], 1 << 30)
    path = config_file(logs, bucket)
    refused = run_forked("aa-archive", ["-c", path])
    assert refused.rc == 3 and "no index starts with created_at" in refused.err and b"CREATE INDEX CONCURRENTLY" in refused.out
    assert logs.scalar("SELECT count(*) FROM audit_logs") == 50
    forced = run_forked("aa-archive", ["-c", path, "--force"])
    assert forced.rc == 0 and "no index starts with created_at" in forced.err
    assert logs.scalar("SELECT count(*) FROM audit_logs WHERE created_at < '2025-01-01'") == 0
