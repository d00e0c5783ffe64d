"""Bad input to aa-archive, as cron starts it: the exit code of the table, one clear message, nothing deleted.

Each case is run for real, plain and with --quiet, and as a dry run where that asks the same question.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional

import pytest
import yaml

from audit_archiver import config
from audit_archiver.formats import schema
from audit_archiver.preflight.plan import Selection, plan_database
from tests.conftest import AUDIT_LOGS, Bucket, ConfigFile, TestDatabase
from tests.ground import faulty_s3 as faulty
from tests.ground import tables
from tests.ground.driven import OLD
from tests.ground.run import Result, run_forked


class Ground(NamedTuple):
    """A database with old rows, an empty bucket, and a function that writes a configuration for both."""

    db: TestDatabase
    bucket: Bucket
    write: Callable[..., Path]


@pytest.fixture()
def ground(db: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> Ground:
    """40 rows, all of them due."""
    tables.create(db.connection, rows=40, first=OLD[0], last=OLD[1])
    return Ground(db, bucket, lambda *args, **more: config_file(db, bucket, *args, **more))


def edited(path: Path, **sections: Any) -> Path:
    """The configuration with keys of its sections replaced: edited(path, s3={"bucket": "other"})."""
    found = yaml.safe_load(path.read_text())
    for name, values in sections.items():
        where = found["databases"][0] if name == "database" else found["databases"][0]["tables"][0] if name == "table" else found[name]
        where.update(values)
    path.write_text(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def refused(ground: Ground, path: Path, code: int, says: str, *, hint: Optional[str] = None, dry: bool = False,
            secret: Optional[str] = None, env: Optional[dict[str, str]] = None) -> Result:
    """Run, run quietly, dry-run; each gives `code` and one message; the table, the bucket and the secret stay as they were."""
    before = tables.digest(ground.db.connection, "public.audit_logs")
    runs = [run_forked("aa-archive", ["-c", path, *flags], env=env)
            for flags in (["--force"], ["--quiet", "--log-format", "json"], *([["--dry-run"]] if dry else []))]
    for result in runs:
        assert result.rc == code, result.err
        told = [record for record in result.log if record["level"] == "ERROR"]
        assert len(told) == 1, result.err
        words = " ".join(str(told[0].get(part) or "") for part in ("at", "msg", "detail", "hint"))
        assert says in words and (hint or "") in words, words
        assert told[0]["code"] == code
        assert "Traceback" not in result.err
        assert secret is None or secret not in result.err + result.out.decode()
    assert [record["level"] for record in runs[1].log] == ["ERROR"], "quiet says the one message and nothing else"
    assert runs[1].out == b""
    for result in runs[:1]:
        for line in result.lines:
            schema.validate("report", line, "the report")
            assert (line["exit"], line["totals"]["rows"]) == (code, 0)
    assert tables.digest(ground.db.connection, "public.audit_logs") == before, "rows were deleted"
    assert [key for key in ground.bucket.keys() if "/.runs/" not in key] == [], "objects were written"
    return runs[0]


def test_the_ground_itself_is_sound(ground: Ground) -> None:
    """Without the fault of each case below, the same run archives: else they could pass for another reason."""
    result = run_forked("aa-archive", ["-c", ground.write(), "--force"])
    assert result.rc == 0, result.err
    assert ground.db.scalar("SELECT count(*) FROM audit_logs") == 0


# The configuration

@pytest.mark.req("REQ-CFG-008", "REQ-USE-005")
def test_broken_yaml_names_file_and_line(ground: Ground) -> None:
    path = ground.write()
    path.write_text("s3:\n  bucket: b\n databases: [\n")
    refused(ground, path, 3, f"{path}:3")


@pytest.mark.req("REQ-CFG-007")
def test_an_unknown_key_is_named_with_its_line_and_the_key_that_was_meant(ground: Ground) -> None:
    path = edited(ground.write(), table={"retension_days": 30})
    line = 1 + next(n for n, text in enumerate(path.read_text().split("\n")) if "retension_days" in text)
    refused(ground, path, 3, f"{path}:{line}", hint="retention_days")


@pytest.mark.req("REQ-CFG-011")
def test_a_missing_variable_is_named(ground: Ground) -> None:
    path = edited(ground.write(), database={"user": "${ARCHIVER_USER}"})
    refused(ground, path, 3, "ARCHIVER_USER", dry=True)


def test_a_configuration_that_is_not_there_is_named(ground: Ground, tmp_path: Path) -> None:
    refused(ground, tmp_path / "nowhere.yaml", 3, "nowhere.yaml")


@pytest.mark.req("REQ-USE-005")
def test_a_flag_that_does_not_exist_is_a_usage_error(ground: Ground) -> None:
    result = run_forked("aa-archive", ["-c", ground.write(), "--frobnicate"])
    assert (result.rc, result.out) == (3, b"")
    assert [record["level"] for record in result.log] == ["ERROR"] and "--frobnicate" in result.log[0]["msg"]
    assert ground.db.scalar("SELECT count(*) FROM audit_logs") == 40


@pytest.mark.parametrize("flags, says", [(["--table", "audit_log"], "did you mean 'public.audit_logs'"), (["--database", "prodd"], "prodd"),
                                         (["--end-date", "yesterday"], "yesterday"), (["--limit", "0"], "0")])
def test_a_flag_that_asks_for_nothing_known_is_refused(ground: Ground, flags: list[str], says: str) -> None:
    result = run_forked("aa-archive", ["-c", ground.write(), "--force", *flags])
    told = [record for record in result.log if record["level"] == "ERROR"]
    assert (result.rc, len(told)) == (3, 1) and says in f"{told[0]['msg']} {told[0].get('hint')}"
    assert ground.db.scalar("SELECT count(*) FROM audit_logs") == 40


# The table

@pytest.mark.req("T58")
@pytest.mark.parametrize("table, says, hint", [
    ({"name": "audit_log"}, "does not exist", "public.audit_logs"), ({"name": "a_view"}, "is a view, not a table", "holds the rows"),
    ({"schema": "nowhere"}, "does not exist", "nowhere"), ({"primary_key": "nr"}, "has no column 'nr'", "created_at"),
    ({"primary_key": "action"}, "no primary key or unique index on 'action'", "unique are: id"),
    ({"primary_key": ["action", "session"]}, "can be NULL", "NOT NULL"),
    ({"timestamp_column": "action"}, "has the type text", "timestamp, timestamptz or date"),
    ({"timestamp_column": "at"}, "has no column 'at'", "created_at")], ids=lambda value: "" if isinstance(value, str) else str(value))
def test_a_table_that_is_not_what_the_configuration_says_is_refused_where_it_is_configured(
        ground: Ground, table: dict[str, Any], says: str, hint: str) -> None:
    ground.db.execute("CREATE VIEW a_view AS SELECT * FROM audit_logs")
    path = edited(ground.write(), table=table)
    line = 1 + next(n for n, text in enumerate(path.read_text().split("\n")) if "- name: " in text and "databases" not in text
                    and table.get("name", "audit_logs") in text)
    result = refused(ground, path, 3, says, hint=hint, dry=table == {"name": "a_view"})
    assert f"{path}:{line}" in result.err


EVIL = ("audit_logs; DROP TABLE audit_logs; --", 'audit_logs" WHERE true; DELETE FROM audit_logs; --', "audit_logs' OR '1'='1",
        "$$audit_logs$$", "audit_logs\\'; --", "%s", "%(x)s", "../audit_logs")


@pytest.mark.req("REQ-SEC-010")
@pytest.mark.parametrize("place, says", [("name", "does not exist"), ("schema", "does not exist"), ("primary_key", "has no column"),
                                         ("timestamp_column", "has no column")])
def test_sql_in_a_name_is_a_name_that_does_not_exist(ground: Ground, place: str, says: str) -> None:
    result = run_forked("aa-archive", ["-c", ground.write([{**AUDIT_LOGS, place: evil} for evil in EVIL[:8 if place in ("name", "schema") else 1]]),
                                       "--force"])
    assert result.rc == 3, result.err
    errors = result.lines[0]["errors"]
    assert errors and all(says in error["msg"] for error in errors)
    assert ground.db.scalar("SELECT count(*) FROM audit_logs") == 40


@pytest.mark.req("REQ-SEC-010")
@pytest.mark.parametrize("place", ["primary_key", "timestamp_column"])
@pytest.mark.parametrize("evil", EVIL[1:])
def test_sql_in_a_column_s_name_is_a_column_that_does_not_exist(ground: Ground, place: str, evil: str) -> None:
    settings = config.load(str(ground.write([{**AUDIT_LOGS, place: evil}])), {})
    job, = plan_database(settings.databases[0], settings, "20251230T021545Z-4711", Selection()).jobs
    assert job["refused"]["code"] == 3 and "has no column" in job["refused"]["msg"]
    assert ground.db.scalar("SELECT count(*) FROM audit_logs") == 40


# The servers

@pytest.fixture()
def closed_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses connections: bound, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.req("REQ-NET-001", "REQ-USE-005")
def test_a_server_that_cannot_be_reached_is_a_network_error(ground: Ground, closed_port: int) -> None:
    path = edited(ground.write(), database={"host": "127.0.0.1", "port": closed_port})
    refused(ground, path, 7, f"127.0.0.1:{closed_port}", hint="check host, port", dry=True)


def test_a_database_that_does_not_exist_is_a_configuration_error(ground: Ground) -> None:
    path = edited(ground.write(), database={"dbname": "nobody_s_database"})
    refused(ground, path, 3, "nobody_s_database")


def test_a_role_that_may_not_log_in_is_a_permission_error(ground: Ground) -> None:
    path = edited(ground.write(), database={"user": "nobody_s_role"})
    refused(ground, path, 5, "nobody_s_role")


def test_a_store_that_cannot_be_reached_is_a_network_error(ground: Ground, closed_port: int) -> None:
    path = edited(ground.write(), s3={"endpoint": f"http://127.0.0.1:{closed_port}", "retries": 1, "retry_base_s": 0.1})
    refused(ground, path, 7, f"http://127.0.0.1:{closed_port}", hint="check s3.endpoint")


@pytest.mark.req("REQ-VAL-003")
def test_a_bucket_that_does_not_exist_is_a_configuration_error(ground: Ground) -> None:
    path = edited(ground.write(), s3={"bucket": "nobody-has-this-bucket"})
    refused(ground, path, 3, "the bucket does not exist", hint="correct s3.bucket")


@pytest.mark.req("REQ-VAL-010")
@pytest.mark.parametrize("code, says", [("SignatureDoesNotMatch", "the secret key does not belong to the access key"),
                                        ("InvalidAccessKeyId", "the access key is unknown to the store"), ("AccessDenied", "permission denied")])
def test_a_wrong_secret_is_a_permission_error_that_never_shows_it(ground: Ground, code: str, says: str) -> None:
    with faulty.FaultyS3(ground.bucket.endpoint) as store:
        store.fault = faulty.answers(lambda request: True, faulty.error(403, code))
        path = edited(ground.write(), s3={"endpoint": store.endpoint, "secret_access_key": "wrong-secret-4711"})
        refused(ground, path, 5, says, secret="wrong-secret-4711")


@pytest.mark.req("REQ-VAL-002")
@pytest.mark.parametrize("grants, lacks", [("SELECT", "DELETE"), ("SELECT, DELETE", "UPDATE on any column"), ("DELETE, UPDATE", "SELECT")])
def test_a_missing_privilege_is_a_permission_error_that_names_the_grant(ground: Ground, grants: str, lacks: str) -> None:
    role = f"limited_{os.getpid()}"
    ground.db.admin(f"CREATE ROLE {role} LOGIN")
    try:
        ground.db.execute(f"GRANT {grants} ON audit_logs TO {role}")
        refused(ground, edited(ground.write(), database={"user": role}), 5, lacks, hint="GRANT ")
    finally:
        ground.db.admin(f"DROP OWNED BY {role}")
        ground.db.admin(f"DROP ROLE {role}")


@pytest.mark.req("T32", "REQ-INT-016")
def test_children_that_would_be_deleted_along_refuse_the_table(ground: Ground) -> None:
    ground.db.execute("CREATE TABLE note (log bigint REFERENCES audit_logs ON DELETE CASCADE)")
    ground.db.execute("INSERT INTO note VALUES (1)")
    refused(ground, ground.write(), 3, "public.note", hint="cascade: acknowledged")
    assert ground.db.scalar("SELECT count(*) FROM note") == 1


@pytest.mark.req("T58")
def test_one_bad_table_is_named_and_does_not_stop_the_others(ground: Ground) -> None:
    path = ground.write([{**AUDIT_LOGS, "name": "nowhere"}, AUDIT_LOGS])
    result = run_forked("aa-archive", ["-c", path, "--force", "-q", "--log-format", "json"])
    assert result.rc == 1
    assert len(result.log) == 1 and "'public.nowhere' does not exist" in str(result.log[0].get("detail"))
    assert ground.db.scalar("SELECT count(*) FROM audit_logs") == 0


@pytest.mark.req("T58", "REQ-DB-005")
def test_one_database_that_is_away_is_named_and_does_not_stop_the_others(ground: Ground, closed_port: int) -> None:
    path = ground.write()
    found = yaml.safe_load(path.read_text())
    away = {**found["databases"][0], "name": "away", "dbname": "away", "host": "127.0.0.1", "port": closed_port}
    found["databases"].insert(0, away)
    path.write_text(yaml.safe_dump(found, sort_keys=False))
    result = run_forked("aa-archive", ["-c", path, "--force", "-q", "--log-format", "json"])
    assert result.rc == 1
    assert len(result.log) == 1 and f"127.0.0.1:{closed_port}" in str(result.log[0].get("detail"))
    assert ground.db.scalar("SELECT count(*) FROM audit_logs") == 0
