"""--dry-run: the exact SQL, figures and object names, and nothing that could change a thing."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any, Iterator

import psycopg2
import pytest

from audit_archiver import config
from audit_archiver.driver import dry_run
from audit_archiver.exits import ConfigError
from audit_archiver.formats import schema
from audit_archiver.postgres import connect, eligible
from audit_archiver.preflight.plan import Selection, plan_database
from tests.conftest import Bucket, ConfigFile, TestDatabase
from tests.ground import tables
from tests.ground.run import run_forked, run_stage
from tests.ground.tables import Digest

RUN = "20251230T021545Z-4711"
LOGS = {"name": "audit_logs", "timestamp_column": "created_at", "primary_key": "id"}


@pytest.fixture()
def logs(db: TestDatabase) -> TestDatabase:
    """2,000 rows, all of them old enough."""
    tables.create(db.connection, rows=2000, last="2025-06-30")
    return db


@pytest.fixture()
def reader(logs: TestDatabase) -> Iterator[str]:
    """A role that may only read audit_logs and make no temporary table."""
    role = f"reader_{os.getpid()}"
    logs.admin(f"CREATE ROLE {role} LOGIN; REVOKE TEMPORARY ON DATABASE {logs.name} FROM PUBLIC")
    logs.execute(f"GRANT SELECT ON audit_logs TO {role}")
    yield role
    logs.admin(f"DROP OWNED BY {role}")
    logs.admin(f"DROP ROLE {role}")


def _state(db: TestDatabase) -> Digest:
    """What the table holds."""
    return tables.digest(db.connection, "public.audit_logs")


@pytest.mark.req("T46", "REQ-EXE-001", "REQ-USE-004")
def test_a_dry_run_works_for_a_role_that_may_only_read_and_changes_nothing(
        logs: TestDatabase, reader: str, bucket: Bucket, config_file: ConfigFile, tmp_path: Path) -> None:
    path = config_file(logs, bucket, [LOGS], database={"user": reader})
    before = _state(logs)

    result = run_forked("aa-archive", ["-c", path, "--dry-run", "--output", "json"])

    assert result.rc == 0, result.err
    assert [table["rows"] for table in result.lines[0]["tables"]] == [2000]
    assert _state(logs) == before
    assert bucket.keys() == [] and not (tmp_path / "staging").exists()


@pytest.mark.req("T46")
def test_the_session_of_a_dry_run_is_read_only_by_construction(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.load(str(config_file(logs, bucket)), {})
    refused: list[str] = []

    def looks_and_tries_to_write(connection: connect.Connection, *_: Any) -> None:
        for sql in ("DELETE FROM public.audit_logs", "CREATE TEMPORARY TABLE x (i int)", "SELECT FROM public.audit_logs FOR UPDATE",
                    "INSERT INTO public.audit_logs (id, created_at, action) VALUES (0, now(), '')"):
            with pytest.raises(psycopg2.Error) as caught:
                connection.cursor().execute(sql)
            refused.append(caught.value.pgcode or "")
        raise ConfigError("enough seen")

    monkeypatch.setattr(dry_run, "look", looks_and_tries_to_write)
    dry_run.run(settings, [(each, list(each.tables)) for each in settings.databases], Selection(), RUN, write=lambda data: None,
                text=True, show_row=False)

    assert refused == ["25006"] * 4  # read_only_sql_transaction


@pytest.mark.req("REQ-USE-004", "REQ-ARC-010")
def test_the_text_has_the_very_statements_of_a_run_and_the_figures(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    path = config_file(logs, bucket, [LOGS], defaults={"sleep_between_batches": 2})
    result = run_forked("aa-archive", ["-c", path, "--dry-run", "--output", "text"])
    assert result.rc == 0, result.err
    text = result.out.decode()
    assert re.search(r"public\.audit_logs  older than \S+ \S+Z  2,000 rows  20 batches, 38 s of pauses between them", text)
    assert f"s3://{bucket.name}/archives/{logs.name}/audit_logs/year=" in text
    for suffix in ("_batch_001.jsonl.gz", "_batch_001_metadata.json", "_batch_001_manifest.json"):
        assert suffix in text
    assert text.endswith("dry run: 2,000 rows of 1 table would be archived and deleted; nothing was changed. exit 0\n")
    # WHEN its statements are carried out by hand, in its order THEN they do what a run would do
    statements = [line[:-1] for line in text.split("\n") if line.endswith(";") and not line.startswith("--")]
    prepare, select, copy, delete = statements
    session = connect.connect(config.load(str(path), {}).databases[0], purpose="test")
    cursor = session.cursor()
    cursor.execute(prepare)
    cursor.execute("BEGIN")
    cursor.execute(select)
    assert cursor.rowcount == 100 and "FOR UPDATE OF t SKIP LOCKED" in select and "LIMIT 100" in select
    out = io.BytesIO()
    cursor.copy_expert(copy, out)
    assert out.getvalue().count(b"}\n") == 100
    cursor.execute(delete)
    assert cursor.fetchone()[0] == 100
    cursor.execute("ROLLBACK")
    session.close()


def test_a_row_is_shown_with_v_only_and_never_in_the_log(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    path = config_file(logs, bucket)
    plain = run_forked("aa-archive", ["-c", path, "--dry-run", "--output", "text"])
    told = run_forked("aa-archive", ["-c", path, "--dry-run", "--output", "text", "-v"])
    machine = run_forked("aa-archive", ["-c", path, "--dry-run", "--output", "json", "-v"])
    rows = [line for line in told.out.decode().split("\n") if line.startswith("{")]
    assert [json.loads(row)["id"] for row in rows] == [1]
    assert '"id":1,' not in plain.out.decode() + plain.err + told.err + machine.out.decode() + machine.err


@pytest.mark.req("REQ-EXE-002", "REQ-EXE-003")
def test_limit_and_dates_are_in_figures_and_sql(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    path = config_file(logs, bucket)
    result = run_forked("aa-archive", ["-c", path, "--dry-run", "--output", "json", "--limit", "150", "--start-date", "2024-03-01",
                                       "--end-date", "2024-03-31"])
    found = result.lines[0]["tables"][0]
    inside = logs.scalar("SELECT count(*) FROM audit_logs WHERE created_at >= '2024-03-01Z' AND created_at < '2024-04-01Z'")
    assert (found["rows"], found["batches"]) == (min(inside, 150), -(-min(inside, 150) // 100))
    assert "'2024-03-01T00:00:00.000000Z'" in found["sql"]["eligible"] and "'2024-04-01T00:00:00.000000Z'" in found["sql"]["select"]


def test_the_json_satisfies_its_schema_also_with_a_refused_table(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    path = config_file(logs, bucket, [LOGS, {**LOGS, "name": "nowhere"}])
    result = run_forked("aa-archive", ["-c", path, "--dry-run", "--output", "json"])
    assert result.rc == 1
    found = result.lines[0]
    schema.validate("dry-run", found, "the dry run")
    assert [table["table"] for table in found["tables"]] == ["audit_logs"]
    assert [(table["table"], table["code"]) for table in found["refused"]] == [("nowhere", 3)]
    assert [record["event"] for record in result.log if record["level"] == "ERROR"] == ["dry_run.refused"]
    assert found["tables"][0]["bytes"] > 100 * 2000


def test_a_table_without_eligible_rows_is_shown_with_its_sql(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    logs.execute("DELETE FROM audit_logs")
    path = config_file(logs, bucket)
    found = run_forked("aa-archive", ["-c", path, "--dry-run", "--output", "json"]).lines[0]["tables"][0]
    assert (found["rows"], found["batches"], found["pauses_s"], found["bytes"]) == (0, 0, 0, 0)
    assert found["sql"]["delete"].startswith("WITH d AS (DELETE FROM ONLY")


@pytest.mark.req("REQ-OBS-013")
def test_quiet_and_well_is_silent(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    result = run_forked("aa-archive", ["-c", config_file(logs, bucket), "--dry-run", "-q"])
    assert (result.rc, result.out, result.err) == (0, b"", "")


def test_a_dry_run_takes_no_lock_that_a_run_would_meet(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    settings = config.load(str(config_file(logs, bucket)), {})
    database = settings.databases[0]
    job = plan_database(database, settings, RUN, Selection()).jobs[0]
    session = connect.connect(database, purpose="test")
    eligible.only_read(session)
    dry_run.look(session, settings, job)
    held = logs.execute("SELECT locktype, mode FROM pg_locks WHERE pid = %s AND locktype IN ('advisory', 'relation', 'tuple')",
                        (session.info.backend_pid,))
    session.close()
    assert held == []


@pytest.mark.req("REQ-EXE-001")
def test_validate_only_says_what_it_found_and_archives_nothing(logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    path = config_file(logs, bucket)
    before = _state(logs)
    text = run_forked("aa-archive", ["-c", path, "--validate-only", "--output", "text"])
    machine = run_forked("aa-archive", ["-c", path, "--validate-only", "--output", "json"])
    assert text.rc == machine.rc == 0, text.err
    assert re.search(rf"^ok    {logs.name}: connection +local socket as archiver", text.out.decode(), re.MULTILINE)
    assert re.search(r"^ok    s3 +put, get, delete, list, If-None-Match honoured", text.out.decode(), re.MULTILINE)
    schema.validate("findings", machine.lines[0], "the findings")
    assert _state(logs) == before and bucket.keys() == []


def test_dry_run_and_validate_only_exclude_each_other() -> None:
    assert run_stage("aa-archive", ["--dry-run", "--validate-only"]).rc == 3
