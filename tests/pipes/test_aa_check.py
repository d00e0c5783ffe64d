"""aa-check: every fault is a line with what to do about it, none hides the next, and nothing is changed by looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from audit_archiver.formats import schema
from tests.conftest import AUDIT_LOGS, Bucket, ConfigFile, TestDatabase
from tests.ground import tables
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
