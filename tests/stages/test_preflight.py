"""The checks before a run: each one is tripped on a real server or store, and says what to do."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, Optional

import pytest

from audit_archiver import config
from audit_archiver.config.model import S3, Config, Database, Table
from audit_archiver.exits import NetworkError
from audit_archiver.formats import job as jobs
from audit_archiver.formats import schema
from audit_archiver.objectstore.client import Store
from audit_archiver.postgres import catalog, connect, eligible, examine
from audit_archiver.preflight import checks, findings, on_database, on_staging, on_table
from audit_archiver.preflight.findings import FAIL, OK, WARN, Finding
from tests.conftest import Bucket, ConfigFile, TestDatabase
from tests.ground import tables
from tests.ground.looks import LOGS, bad, database, look, only

RUN = "20251230T021545Z-4711"


@pytest.fixture()
def logs(db: TestDatabase) -> TestDatabase:
    """A database with a small audit_logs that is as it should be."""
    tables.create(db.connection, rows=50)
    return db


@pytest.fixture()
def reader(logs: TestDatabase) -> Iterator[str]:
    """A role that may only read audit_logs."""
    role = f"reader_{os.getpid()}"
    logs.admin(f"CREATE ROLE {role} LOGIN")
    logs.execute(f"GRANT SELECT ON audit_logs TO {role}")
    yield role
    logs.admin(f"DROP OWNED BY {role}")
    logs.admin(f"DROP ROLE {role}")


@pytest.mark.req("REQ-VAL-001", "REQ-VAL-008")
def test_what_is_as_it_should_be_is_one_ok_line_per_subject(logs: TestDatabase) -> None:
    found = look(database(logs))
    assert not bad(found)
    version = logs.scalar("SELECT current_setting('server_version')").split(" ")[0]
    lines = findings.lines([each for each in found if each.check != "server.fsync"])
    assert lines == [
        f"ok    {logs.name}: connection  local socket as archiver, PostgreSQL {version}, no pooler",
        f"ok    {'public.audit_logs':<{len(logs.name) + 12}}  key id; created_at timestamptz, may select, lock and delete, "
        "index audit_logs_created_at_id_idx"]


@pytest.mark.req("T32", "REQ-INT-013")
@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "SET DEFAULT"])
def test_children_that_would_go_or_change_with_a_row_refuse_the_table_unless_acknowledged(logs: TestDatabase, action: str) -> None:
    logs.execute(f"CREATE TABLE note (log bigint REFERENCES audit_logs ON DELETE {action})")
    assert not bad(look(database(logs)))  # GIVEN no rows in it
    logs.execute("INSERT INTO note VALUES (NULL)")
    assert not bad(look(database(logs)))

    logs.execute("INSERT INTO note VALUES (1)")
    failed = only(look(database(logs)), "table.cascade", FAIL)

    assert f"ON DELETE {action}" in failed.text and "public.note" in failed.text and (failed.code, failed.at) == (3, "prod.yaml:7")
    accepted = dataclasses.replace(LOGS, cascade="acknowledged")
    assert only(look(database(logs, accepted)), "table.cascade", WARN).code == 0


@pytest.mark.req("REQ-INT-014", "REQ-INT-015", "REQ-INT-016")
def test_plain_foreign_keys_are_listed_as_warnings_and_do_not_block(logs: TestDatabase) -> None:
    logs.execute("CREATE TABLE note (log bigint REFERENCES audit_logs); CREATE TABLE remark (log bigint REFERENCES audit_logs)")
    logs.execute("INSERT INTO note VALUES (1)")
    found = look(database(logs))
    assert bad(found) == [("table.references", WARN), ("table.references", WARN)]
    assert findings.exit_code(found) == 0
    assert [each.text.split("'")[1] for each in found if each.check == "table.references"] == ["public.note", "public.remark"]


@pytest.mark.req("REQ-VAL-002")
@pytest.mark.parametrize("grants, lacks", [
    ("SELECT", ["DELETE", "UPDATE on any column"]), ("SELECT, DELETE", ["UPDATE on any column"]), ("DELETE, UPDATE (id)", ["SELECT"]),
    ("SELECT (id), DELETE, UPDATE", ["SELECT"]), ("SELECT, DELETE, UPDATE (id)", [])])
def test_each_missing_right_is_named_with_the_grant_that_cures_it(logs: TestDatabase, reader: str, grants: str, lacks: list[str]) -> None:
    logs.execute(f"REVOKE ALL ON audit_logs FROM {reader}")
    logs.execute(f"GRANT {grants} ON audit_logs TO {reader}")
    table = dataclasses.replace(LOGS, vacuum="none")

    failed = [each for each in look(database(logs, table, user=reader)) if each.status == FAIL]

    assert [(each.check, each.code) for each in failed] == [("table.rights", 5)] * len(lacks)
    assert all(lack in each.text for lack, each in zip(lacks, failed))
    for each in failed:  # WHEN the remedy is carried out as it stands
        logs.execute(each.remedy or "")
    assert not bad(look(database(logs, table, user=reader)))


def test_a_schema_that_may_not_be_used_is_named_with_its_grant(logs: TestDatabase, reader: str) -> None:
    logs.execute("CREATE SCHEMA audit; ALTER TABLE audit_logs SET SCHEMA audit")
    logs.execute(f"GRANT DELETE, UPDATE ON audit.audit_logs TO {reader}")
    table = dataclasses.replace(LOGS, schema="audit", vacuum="none")
    failed = only(look(database(logs, table, user=reader)), "table.rights", FAIL)
    logs.execute(failed.remedy or "")
    assert not bad(look(database(logs, table, user=reader)))


def test_a_child_table_that_may_not_be_read_is_named_with_its_grant(logs: TestDatabase, reader: str) -> None:
    logs.execute(f"GRANT DELETE, UPDATE ON audit_logs TO {reader}; CREATE TABLE note (log bigint REFERENCES audit_logs ON DELETE CASCADE)")
    table = dataclasses.replace(LOGS, vacuum="none")
    failed = only(look(database(logs, table, user=reader)), "table.children", FAIL)
    assert failed.code == 5
    logs.execute(failed.remedy or "")
    assert not bad(look(database(logs, table, user=reader)))


@pytest.mark.req("REQ-VAL-002")
def test_a_role_that_may_not_vacuum_is_warned_of_unless_no_vacuum_is_asked_for(logs: TestDatabase, reader: str) -> None:
    logs.execute(f"GRANT DELETE, UPDATE ON audit_logs TO {reader}")
    only(look(database(logs, user=reader)), "table.vacuum", WARN)
    assert not bad(look(database(logs, dataclasses.replace(LOGS, vacuum="none"), user=reader)))


def test_a_role_that_may_not_make_temporary_tables_fails_for_want_of_permission(logs: TestDatabase, reader: str) -> None:
    logs.execute(f"GRANT DELETE, UPDATE ON audit_logs TO {reader}")
    logs.admin(f"REVOKE TEMPORARY ON DATABASE {logs.name} FROM PUBLIC")
    table = dataclasses.replace(LOGS, vacuum="none")
    failed = only(look(database(logs, table, user=reader)), "role.temporary", FAIL)
    assert failed.code == 5
    logs.execute(failed.remedy or "")
    assert not bad(look(database(logs, table, user=reader)))


@pytest.mark.req("T11")
def test_row_level_security_that_binds_the_role_is_a_failure_and_no_empty_table(logs: TestDatabase, reader: str) -> None:
    logs.execute(f"GRANT DELETE, UPDATE ON audit_logs TO {reader}; ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY")
    failed = only(look(database(logs, user=reader)), "table.shape", FAIL)
    assert failed.code == 5 and "row-level security" in failed.text and "BYPASSRLS" in (failed.remedy or "")


@pytest.mark.req("REQ-VAL-005")
@pytest.mark.parametrize("table, says", [
    (Table("nowhere", "created_at", ("id",)), "does not exist"), (Table("audit_logs", "created_at", ("user_id",)), "can be NULL"),
    (Table("audit_logs", "created_at", ("action",)), "no primary key or unique index"), (Table("audit_logs", "action", ("id",)), "has the type text"),
    (Table("v", "created_at", ("id",)), "a view")])
def test_a_table_that_is_not_what_the_configuration_says_is_a_failure(logs: TestDatabase, table: Table, says: str) -> None:
    logs.execute("CREATE VIEW v AS SELECT * FROM audit_logs")
    failed = only(look(database(logs, table)), "table.shape", FAIL)
    assert says in failed.text and failed.code == 3


@pytest.mark.req("REQ-VAL-004", "REQ-TBL-005")
def test_a_column_without_a_single_timestamp_is_a_warning_of_the_thorough_look(logs: TestDatabase) -> None:
    logs.execute("ALTER TABLE audit_logs ALTER created_at DROP NOT NULL; UPDATE audit_logs SET created_at = NULL")
    only(look(database(logs)), "table.timestamps", WARN)
    logs.execute("UPDATE audit_logs SET created_at = 'infinity' WHERE id % 2 = 0")
    only(look(database(logs)), "table.timestamps", WARN)
    assert not bad(look(database(logs), thorough=False))
    logs.execute("DELETE FROM audit_logs")
    assert not bad(look(database(logs)))


@pytest.mark.parametrize("prepare", ["DROP INDEX audit_logs_created_at_id_idx",
                                     "DROP INDEX audit_logs_created_at_id_idx; CREATE INDEX ON audit_logs (created_at) WHERE id > 5",
                                     "DROP INDEX audit_logs_created_at_id_idx; CREATE INDEX ON audit_logs USING brin (created_at)",
                                     "DROP INDEX audit_logs_created_at_id_idx; CREATE INDEX ON audit_logs (id, created_at)"])
def test_a_missing_index_is_a_warning_with_the_statement_that_makes_one(logs: TestDatabase, prepare: str,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    logs.execute(prepare)
    assert not bad(look(database(logs)))  # a small table needs none
    monkeypatch.setattr(on_table, "SMALL_BYTES", 1)
    warned = only(look(database(logs)), "table.index", WARN)
    assert warned.remedy == 'CREATE INDEX CONCURRENTLY ON "public"."audit_logs" ("created_at", "id")'
    logs.execute(warned.remedy)
    assert not bad(look(database(logs)))


@pytest.mark.req("T32")
def test_triggers_on_delete_are_warned_of_by_name(logs: TestDatabase) -> None:
    logs.execute("CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'")
    logs.execute("CREATE TRIGGER keeps_count BEFORE DELETE ON audit_logs FOR EACH ROW EXECUTE PROCEDURE f()")
    logs.execute("CREATE TRIGGER on_insert BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE PROCEDURE f()")
    assert "'keeps_count'" in only(look(database(logs)), "table.triggers", WARN).text


def test_a_published_table_without_replica_identity_fails_and_one_with_it_warns(logs: TestDatabase) -> None:
    logs.admin("CREATE PUBLICATION feed FOR TABLE audit_logs")
    assert "subscribers" in only(look(database(logs)), "table.published", WARN).text
    logs.execute("ALTER TABLE audit_logs REPLICA IDENTITY NOTHING")
    assert "DELETE would fail" in only(look(database(logs)), "table.published", FAIL).text
    logs.execute("ALTER TABLE audit_logs REPLICA IDENTITY FULL")
    only(look(database(logs)), "table.published", WARN)
    logs.admin("ALTER PUBLICATION feed SET (publish = 'insert')")
    logs.execute("ALTER TABLE audit_logs REPLICA IDENTITY NOTHING")
    only(look(database(logs)), "table.published", WARN)


def test_fsync_off_fails_unless_it_is_acknowledged(logs: TestDatabase) -> None:
    assert logs.scalar("SELECT current_setting('fsync')") == "off"  # as the servers of the test ground run
    refused = [each for each in look(database(logs, fsync_off="refuse")) if each.check == "server.fsync"]
    assert [(each.status, each.code) for each in refused] == [(FAIL, 3)] and "fsync_off: acknowledged" in (refused[0].remedy or "")
    accepted = [each for each in look(database(logs)) if each.check == "server.fsync"]
    assert [(each.status, each.code) for each in accepted] == [(WARN, 0)]


def test_a_database_in_sql_ascii_is_refused(logs: TestDatabase) -> None:
    name = f"{logs.name}_ascii"
    logs.admin(f"CREATE DATABASE {name} OWNER archiver TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'")
    try:
        found = look(database(logs, dbname=name))
        assert [each.code for each in found if each.check == "server.encoding" and each.status == FAIL] == [3]
    finally:
        logs.admin(f"DROP DATABASE {name}")


WELL = examine.Server(version=150018, user="archiver", encoding="UTF8", standby=False, fsync=True, full_page_writes=True,
                      synchronous_commit="on", may_temp=True, may_identify=True, backend_pid=4711, tls="TLSv1.3")


class Session:
    """A session whose client was told the process id 4711."""

    class info:  # noqa: N801
        backend_pid = 4711


@pytest.mark.req("REQ-PG-008")
@pytest.mark.parametrize("server, check, status, code", [
    ({}, None, None, 0), ({"version": 100023}, "server.version", FAIL, 3),
    ({"version": 180004}, None, None, 0), ({"version": 190000}, "server.tested", WARN, 0), ({"standby": True}, "server.primary", FAIL, 3),
    ({"fsync": False}, "server.fsync", FAIL, 3), ({"full_page_writes": False}, "server.full_page_writes", WARN, 0),
    ({"synchronous_commit": "local"}, "server.synchronous_commit", FAIL, 3), ({"synchronous_commit": "remote_apply"}, None, None, 0),
    ({"may_identify": False}, "role.identity", FAIL, 5), ({"backend_pid": 1}, "connection.session", FAIL, 3)])
def test_a_server_that_is_not_fit_is_told_from_one_that_is(server: dict[str, Any], check: Optional[str], status: Optional[str], code: int,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligible, "skew_s", lambda session: 0.0)
    monkeypatch.setattr(examine, "slots", lambda session: [])
    seen = on_database.Look(Session(), Database("prod", host="db1.example.com"), dataclasses.replace(WELL, **server))  # type: ignore[arg-type]
    found = [each for made in on_database.CHECKS for each in made.run(seen, database="prod")]
    assert [(each.check, each.status, each.code) for each in found if each.status != OK] == ([(check, status, code)] if check else [])


def test_a_connection_without_a_pooler_is_recognized_as_one(logs: TestDatabase) -> None:
    session = connect.connect(database(logs), purpose="test")
    assert not examine.pooled(session, examine.server(session))
    session.close()


@pytest.mark.req("REQ-VAL-003", "REQ-VAL-010", "REQ-S3-003", "REQ-S3-006")
def test_a_bucket_that_works_is_one_ok_line_and_nothing_stays_in_it(bucket: Bucket) -> None:
    warned = only(checks.of_store(_store(bucket)), "s3.versions", WARN)
    assert warned.remedy == f"aws s3api put-bucket-versioning --bucket {bucket.name} --versioning-configuration Status=Enabled"
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    found = checks.of_store(_store(bucket))
    assert [each.status for each in found] == [OK] * len(found)
    assert re.match(r"ok    s3  put, get, delete, list, If-None-Match honoured, clock \d\.\d s off, versioned$", findings.lines(found)[0])
    assert bucket.keys() == []


def test_a_store_that_overwrites_is_warned_of(poor_bucket: Bucket) -> None:
    assert bad(checks.of_store(_store(poor_bucket))) == [("s3.create_only", WARN), ("s3.versions", WARN)]


@pytest.mark.parametrize("values, code", [({"bucket": "nobody-has-this-one"}, 3), ({"secret_access_key": "wrong"}, 5)])
def test_a_bucket_that_does_not_work_fails_with_the_reason_s_own_code(poor_bucket: Bucket, values: dict[str, str], code: int) -> None:
    failed = checks.of_store(_store(poor_bucket, **values))
    assert [(each.check, each.status, each.code) for each in failed] == [("s3.bucket", FAIL, code)]


def _store(on: Bucket, **values: str) -> Store:
    secret = config.Secret(values.pop("secret_access_key", on.secret_key))
    return Store(S3(**{"bucket": on.name, "prefix": "archives/", "endpoint": on.endpoint, "region": on.region,  # type: ignore[arg-type]
                       "access_key_id": on.access_key, "secret_access_key": secret, "retries": 0, **values}))


@pytest.mark.req("REQ-DB-005")
def test_a_database_that_cannot_be_reached_does_not_hide_the_next_one(logs: TestDatabase) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        away = database(logs, name="away", host="127.0.0.1", port=taken.getsockname()[1])
        here = database(logs)
        made = Config("prod.yaml", S3("b"), (away, here), warnings=("prod.yaml:9: 'notifications' are not sent yet",))
        found = checks.run_checks(made, [(away, away.tables), (here, here.tables)], None)
    assert [(each.check, each.status, each.code, each.database) for each in found if each.status != OK and each.check != "server.fsync"] == [
        ("configuration", WARN, 0, None), ("connection.session", FAIL, 7, "away")]
    assert any(each.table and each.database == here.name for each in found)
    assert findings.exit_code(found) == 7


def test_the_whole_look_of_a_configuration_is_ok_and_satisfies_its_schema(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    settings = config.load(str(config_file(logs, bucket)), {})
    found = checks.run_checks(settings, [(each, each.tables) for each in settings.databases], Store(settings.s3), settings.staging_dir)
    assert findings.exit_code(found) == 0 and not [each for each in found if each.status == FAIL]
    made = findings.summary(found)
    schema.validate("findings", made, "the findings")
    assert {each["check"] for each in made["findings"] if each["check"] != "configuration"} == {
        each.id for each in checks.ALL} - {checks.BACKEND}, "there is no backend beside PostgreSQL"


@pytest.mark.req("REQ-VAL-007", "REQ-RES-006")
def test_a_staging_directory_without_room_for_two_batches_is_a_failure_of_resources(
        logs: TestDatabase, bucket: Bucket, config_file: ConfigFile, monkeypatch: pytest.MonkeyPatch) -> None:
    logs.execute("ANALYZE audit_logs")
    settings = config.load(str(config_file(logs, bucket)), {})
    session = connect.connect(settings.databases[0], purpose="test")
    row = examine.bytes_per_row(session, catalog.shape(session, "public", "audit_logs", ("id",), "created_at"))
    session.close()
    width = logs.scalar("SELECT avg(pg_column_size(t)) FROM audit_logs t")
    assert 0.8 * float(width) < row < 1.2 * float(width)
    wanted = [(each, each.tables) for each in settings.databases]
    for free, status in ((int(row * 50_000) * 2 - 1, FAIL), (int(row * 50_000) * 2, OK)):
        monkeypatch.setattr(on_staging.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        found = {each.check: each for each in checks.run_checks(settings, wanted, None, settings.staging_dir)}
        assert (found["staging.space"].status, found["staging.space"].code) == (status, 6 if status == FAIL else 0)
        assert found["staging.directory"].status == OK
    settings = config.load(str(config_file(logs, bucket, resources={"min_free_disk_gb": 3}, s3={"local_fallback_dir": "/away"})), {})
    for free, status in ((2.99e9, FAIL), (3e9, OK)):
        monkeypatch.setattr(on_staging.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        space = [each for each in checks.run_checks(settings, wanted, None, settings.staging_dir) if each.check == "staging.space"]
        assert [each.status for each in space] == [status, status] and "'/away'" in space[1].text


def test_a_staging_directory_that_cannot_be_made_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    look = on_staging.Look(tmp_path / "file" / "staging", 0)
    found = [each for made in on_staging.CHECKS for each in made.run(look)]
    assert [(each.check, each.code) for each in found if each.status == FAIL] == [("staging.directory", 3)]
    assert findings.lines(found)[0].startswith("fail  staging  ")


def test_failures_share_an_exit_code_only_if_they_have_one() -> None:
    def failing(*codes: int) -> list[Finding]:
        return [Finding("x.y", FAIL, "no", code=code) for code in codes]
    assert [findings.exit_code(failing(*codes)) for codes in ((), (5,), (5, 5), (5, 7), (3, 5), (7, 7))] == [0, 5, 5, 3, 3, 7]
    assert findings.exit_code([Finding("x.y", WARN, "hm")]) == 0


def _job(**values: Any) -> dict[str, Any]:
    return jobs.build(**{"run": RUN, "database": "prod", "schema": "public", "table": "audit_logs", "key": ["id"], "timestamp": "created_at",
                         "cutoff": "2025-09-30T00:00:00Z", "start": None, "end": None, "batch_size": 10, "limit": None, "sleep_s": 0,
                         "cursor": None, "estimate": 5, "shape_sha256": "0" * 64, **values})


def test_a_failure_of_a_table_refuses_its_job_and_no_other() -> None:
    found = [Finding("table.rights", FAIL, "role 'r' lacks DELETE", "GRANT DELETE", "prod.yaml:7", 5, "prod", "public", "audit_logs"),
             Finding("table.index", WARN, "slow", None, None, 0, "prod", "public", "other")]
    first, second, elsewhere = checks.refuse([_job(), _job(table="other"), _job(database="billing")], found)
    assert first["refused"] == {"code": 5, "msg": "role 'r' lacks DELETE; GRANT DELETE", "at": "prod.yaml:7"}
    assert "refused" not in second and "refused" not in elsewhere


def test_a_failure_of_a_server_refuses_every_job_of_its_database() -> None:
    found = [Finding("server.primary", FAIL, "'db1' is a standby", None, "prod.yaml:4", 3, "prod")]
    refused = checks.refuse([_job(), _job(table="other"), _job(database="billing")], found)
    assert ["refused" in job for job in refused] == [True, True, False]


def test_a_connection_that_broke_while_it_was_checked_is_no_refusal_of_tables() -> None:
    with pytest.raises(NetworkError):
        checks.refuse([_job()], [Finding("table.rights", FAIL, "broke", None, None, 7, "prod", "public", "audit_logs")])


def test_every_check_has_an_id_of_its_own_says_what_it_looks_at_and_where_it_comes_from() -> None:
    assert len({each.id for each in checks.ALL}) == len(checks.ALL)
    assert all(each.about and each.look.__doc__ and each.severity in (OK, WARN, FAIL) for each in checks.ALL)
