"""What aa-archive says and to whom: streams, terminal, question, signals, and the environments it is started in."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import exits
from audit_archiver.driver import figures
from tests.conftest import AUDIT_LOGS
from tests.ground import kill
from tests.ground.driven import Driven, logs, summary
from tests.ground.run import finish, run_forked
from tests.ground.terminal import CTRL_C, EOF, Terminal
from tests.ground.wait import until


@pytest.fixture()
def runs(db: Any, bucket: Any, config_file: Any) -> Driven:
    """250 rows that are due, in batches of 100, and 50 that are not."""
    logs(db, old=250)
    return Driven(db, bucket, config_file(db, bucket))


def left(runs: Driven) -> int:
    """Rows in the table."""
    return int(runs.db.scalar("SELECT count(*) FROM audit_logs"))


def recorded(runs: Driven) -> int:
    """Rows in batches with a commit record."""
    return sum(runs.sizes())


@pytest.mark.req("REQ-OBS-001", "REQ-OBS-004")
def test_without_a_terminal_stdout_is_one_summary_and_stderr_is_json_with_run_id_and_stage(runs: Driven) -> None:
    result = runs.run("-v")
    made = summary(result)
    assert result.rc == 0
    records = result.log
    assert {record["run_id"] for record in records if "run_id" in record} == {made["run"]}
    stages = {record["stage"] for record in records}
    assert {"aa-archive", "aa-upload", "aa-verify", "aa-record"} <= stages
    for record in records:
        assert {"ts", "level", "stage", "event", "msg"} <= set(record) and record["ts"].endswith("Z")
    work = [record for record in records if record["event"] == "batch.committed"]
    assert sum(record["rows"] for record in work) == 250 and all(record["run_id"] == made["run"] for record in work)


def test_the_configured_form_of_the_log_holds_for_every_stage_unless_a_flag_chose(db: Any, bucket: Any, config_file: Any) -> None:
    logs(db, old=250)
    runs = Driven(db, bucket, config_file(db, bucket, observability={"log_format": "text"}))
    said = runs.run("--limit", "100").err.splitlines()
    assert {line.partition(":")[0] for line in said} >= {"aa-archive", "aa-select", "aa-serialize", "aa-upload", "aa-verify", "aa-record"}
    assert all(record["level"] for record in runs.run("--log-format", "json").log), "every line is JSON"


def test_the_report_says_how_long_each_phase_worked(runs: Driven) -> None:
    phases = runs.ran()["databases"][0]["phases"]
    assert set(phases) == {"select", "serialize", "upload", "verify", "delete", "record", "vacuum"}
    assert all(phases[phase] > 0 for phase in ("select", "serialize", "upload", "verify", "delete", "record")), phases


@pytest.mark.req("REQ-OBS-013")
def test_quiet_writes_not_one_byte_when_all_is_well_and_one_line_otherwise(runs: Driven) -> None:
    well = runs.run("--quiet")
    assert (well.rc, well.out, well.err, left(runs)) == (0, b"", "", 50)
    # WHEN there is something wrong
    runs.db.execute("ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey")
    wrong = runs.run("-q")
    assert (wrong.rc, wrong.out) == (exits.CONFIG, b"")
    assert wrong.err.count("\n") == 1 and wrong.log[0]["event"] == "run.end"
    assert "key" in wrong.err


@pytest.mark.req("REQ-OBS-011", "REQ-OBS-012", "REQ-OBS-014", "REQ-USE-008", "REQ-USE-009")
@pytest.mark.parametrize("columns", [80, 150])
def test_a_person_sees_plan_question_progress_and_closing_table(db: Any, bucket: Any, config_file: Any, columns: int) -> None:
    # GIVEN a table with rows that are due, one without any, and one that is refused
    logs(db, old=3000)
    db.execute("CREATE TABLE empty (id int PRIMARY KEY, created_at timestamptz); CREATE TABLE keyless (id int NOT NULL, created_at date)")
    named = [{**AUDIT_LOGS, "name": name} for name in ("audit_logs", "empty", "keyless")]
    runs = Driven(db, bucket, config_file(db, bucket, named, defaults={"vacuum_strategy": "standard", "batch_size": 500}))
    with Terminal("aa-archive", ["-c", runs.path], columns=columns) as terminal:
        terminal.expect("archive and delete 3,000 rows of 1 table? [y/N] ")
        plan = terminal.seen.replace("\r\n", "\n")
        # THEN it shows what would be done with each, and does nothing before the answer
        assert re.search(r"^run \S+   \S+ at local socket -> s3://\S+/archives/$", plan, re.MULTILINE)
        assert re.search(r"^  public\.audit_logs  older than 20\d\d-\d\d-\d\d \d\d:\d\d:\d\dZ  3,000 rows  6 batches$", plan, re.MULTILINE)
        assert re.search(r"^  public\.empty       older than .* 0 rows  nothing to do$", plan, re.MULTILINE)
        assert re.search(rf"^  public\.keyless     refused: .* \({re.escape(str(runs.path))}:\d+\)$", plan, re.MULTILINE)
        assert (left(runs), runs.archive.keys()) == (3050, [])
        # AND WHEN it is yes
        terminal.type("y\n")
        assert terminal.end() == exits.SOME_FAILED
        seen = terminal.seen.replace("\r\n", "\n")
    # THEN one line is redrawn that never takes more than the terminal's width; no JSON and no colour for a person
    drawn = [part for part in re.split(r"[\r\n]", seen) if " rows/s" in part]
    assert drawn and all(figures.width(part.rstrip()) < columns for part in drawn)
    bar = r"\[#+\] " if columns == 150 else ""
    assert re.search(rf"^public\.audit_logs {bar}3,000/3,000  100%  [\d,]+ rows/s  ETA \d+:\d\d  batch (\d+)/\1\b", drawn[-1]), drawn[-1]
    assert "{" not in seen and "\x1b" not in seen
    closing = seen[seen.index("TABLE "):]
    objects, ratio = (r" +\d+", r" +0\.\d{3}") if columns == 150 else ("", "")  # what does not fit gives way
    assert re.search(rf"^public\.audit_logs +3,000 +0{objects} +\d+\.\d [kM]B{ratio} +[\d,]+ +\d+ [kM]B +\d+ [kM]?B$", closing, re.MULTILINE)
    assert all(figures.width(line) <= columns for line in closing.split("\n")[:2])
    assert re.search(r"^select .* record .* vacuum .* \(stages overlap\)$", closing, re.MULTILINE)
    assert re.search(r"^refused: public\.keyless: .*\(.*:\d+\)$", closing, re.MULTILINE)
    assert re.search(r"^done in [^:]*: 2 of 3 tables, 1 refused\. exit 1\n$", closing, re.MULTILINE)
    assert (left(runs), recorded(runs)) == (50, 3000)


@pytest.mark.req("REQ-USE-009")
@pytest.mark.parametrize("keys", ["n\n", "\n", "yeah\n", EOF], ids=["n", "nothing", "yeah", "end of input"])
def test_any_other_answer_than_yes_archives_nothing(runs: Driven, keys: str) -> None:
    with Terminal("aa-archive", ["-c", runs.path]) as terminal:
        terminal.expect("[y/N] ")
        terminal.type(keys)
        assert terminal.end() == exits.CONFIG
        assert "nothing was archived" in terminal.seen
    assert (left(runs), runs.archive.keys()) == (300, [])


def test_ctrl_c_at_the_question_ends_it_at_once(runs: Driven) -> None:
    with Terminal("aa-archive", ["-c", runs.path]) as terminal:
        terminal.expect("[y/N] ")
        terminal.type(CTRL_C)
        assert terminal.end() == -signal.SIGINT
        assert "stopped by SIGINT" in terminal.seen
    assert (left(runs), runs.archive.keys()) == (300, [])


@pytest.mark.req("REQ-USE-009", "REQ-EXE-005")
def test_force_asks_nothing_and_neither_does_a_run_without_rows(runs: Driven) -> None:
    for argv in (["--force"], []):
        with Terminal("aa-archive", ["-c", runs.path, *argv]) as terminal:
            assert terminal.end() == 0
            assert "[y/N]" not in terminal.seen
            assert ("250 rows  3 batches" in terminal.seen) is bool(argv)
    assert left(runs) == 50


@pytest.mark.req("REQ-OBS-013")
def test_quiet_says_nothing_on_a_terminal_either(runs: Driven) -> None:
    with Terminal("aa-archive", ["-c", runs.path, "--quiet", "--force"]) as terminal:
        assert (terminal.end(), terminal.seen) == (0, "")
    assert left(runs) == 50


def test_names_of_any_script_fit_a_terminal_that_can_only_write_ascii(db: Any, bucket: Any, config_file: Any) -> None:
    db.execute('CREATE TABLE "журнал_監査" (id int PRIMARY KEY, created_at timestamptz)')
    db.execute("INSERT INTO \"журнал_監査\" SELECT i, '2024-01-01Z' FROM generate_series(1, 50) i")
    path = config_file(db, bucket, [{**AUDIT_LOGS, "name": "журнал_監査"}])
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Kathmandu"}
    with Terminal("aa-archive", ["-c", path, "--force"], env, columns=80) as terminal:
        assert terminal.end() == 0, terminal.seen
        assert "done in" in terminal.seen


def test_a_summary_into_a_full_disk_is_an_error_and_the_rows_are_archived(runs: Driven) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        result = runs.run(stdout=full)
    assert result.rc == exits.RESOURCE, result.err
    assert "No space left" in result.err and "Traceback" not in result.err
    assert (left(runs), recorded(runs)) == (50, 250)


def test_a_reader_of_the_summary_that_is_gone_changes_nothing_about_the_archive(runs: Driven) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = runs.run(stdout=writer)
    finally:
        os.close(writer)
    assert result.rc == exits.READER_GONE, result.err
    assert (left(runs), recorded(runs)) == (50, 250)


@pytest.mark.parametrize("env", [{"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"}, {"LANG": "de_DE.UTF-8", "TZ": "America/St_Johns"}, None],
                         ids=["C in Kathmandu", "German in Newfoundland", "empty"])
def test_locale_time_zone_and_environment_change_nothing(db: Any, bucket: Any, config_file: Any, env: Any) -> None:
    before = logs(db, 'public."Grüße"', old=30)
    runs = Driven(db, bucket, config_file(db, bucket, [{"name": "Grüße", "timestamp_column": "created_at", "primary_key": "id"}]))
    more = {"env": env} if env is not None else {}
    result = runs.run("--table", "Grüße", **more)
    assert result.rc == 0, result.err
    assert summary(result)["databases"][0]["tables"][0]["table"] == "Grüße"
    assert runs.whole('public."Grüße"', before) == 30
    assert [line["batch"]["first"][0][-6:] for line in runs.archive.commits()] == ["+00:00"]


@pytest.mark.req("T45", "REQ-LOCK-014")
def test_the_first_sigterm_finishes_the_batches_in_flight_and_what_is_committed_is_recorded(runs: Driven) -> None:
    # GIVEN a run that stands still while its first batch is being uploaded
    point = "upload.data.before:1"
    child = runs.spawn("--batch-size", 30, env={"AA_TEST_POINT": point})
    victim = kill.stopped_at(point, child.token, ended=child.poll)
    # WHEN it is asked to stop, and then goes on
    child.send_signal(signal.SIGTERM)
    kill.go_on(victim)
    result = finish(child)
    # THEN it ends by its own account with 143: what was in flight is archived, nothing else began
    made = summary(result)
    assert (result.rc, made["exit"], made["stopped_by"]) == (143, 143, "SIGTERM"), result.err
    assert 30 <= recorded(runs) < 250 and left(runs) == 300 - recorded(runs) == 300 - made["totals"]["rows"]
    kill.all_gone(child.token)
    assert any(record["event"] == "run.end" and "stopped by SIGTERM" in record["msg"] for record in result.log)
    # AND the next run does the rest
    assert runs.ran()["totals"]["rows"] == 250 - made["totals"]["rows"]
    assert (left(runs), recorded(runs)) == (50, 250)


@pytest.mark.req("T45", "REQ-TXN-005")
def test_the_second_signal_rolls_back_what_is_in_flight(runs: Driven) -> None:
    """Of two kinds: a SIGTERM that comes while Python has not yet heard the first one would be none."""
    point = "upload.data.before:1"
    child = runs.spawn(env={"AA_TEST_POINT": point})
    kill.stopped_at(point, child.token, ended=child.poll)
    child.send_signal(signal.SIGTERM)
    until(lambda: _pending_gone(child.pid, signal.SIGTERM), "the first signal was taken")
    child.send_signal(signal.SIGHUP)
    result = finish(child)
    assert result.rc == 143, result.err
    kill.all_gone(child.token)
    assert (left(runs), recorded(runs)) == (300, 0)
    assert runs.ran()["totals"]["rows"] == 250
    assert (left(runs), recorded(runs)) == (50, 250)


def _pending_gone(pid: int, signum: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    pending = sum(int(line.split()[1], 16) for line in status.split("\n") if line.startswith(("SigPnd:", "ShdPnd:")))
    return not pending >> (signum - 1) & 1


@pytest.mark.req("REQ-SCH-002", "REQ-LOCK-011")
def test_a_second_run_exits_4_and_says_by_whom_and_since_when_the_lock_is_held(runs: Driven) -> None:
    child = runs.spawn(env={"AA_TEST_POINT": "archive.recovered"})
    victim = kill.stopped_at("archive.recovered", child.token, ended=child.poll)
    second = runs.run()
    assert second.rc == exits.LOCKED, second.err
    assert re.search(r"audit-archiver control 20\d{6}T\d{6}Z-\d+", second.err) and re.search(r"since 20\d\d-", second.err), second.err
    kill.go_on(victim)
    assert finish(child).rc == 0 and left(runs) == 50


@pytest.mark.req("REQ-USE-003", "REQ-EXE-006", "REQ-OBS-002")
def test_v_says_more_and_help_names_every_option(runs: Driven) -> None:
    plain, loud = runs.run("--limit", 10), runs.run("--limit", 10, "-v")
    assert plain.rc == loud.rc == 0
    assert "DEBUG" not in {record["level"] for record in plain.log} and "DEBUG" in {record["level"] for record in loud.log}
    page = run_forked("aa-archive", ["--help"]).out.decode()
    assert all(option in page for option in ("--dry-run", "--validate-only", "--limit", "--start-date", "--end-date", "--force"))


@pytest.mark.req("REQ-SEC-002")
def test_no_password_and_no_row_content_is_in_anything_it_writes(runs: Driven) -> None:
    runs.db.execute("UPDATE audit_logs SET action = 'needle-in-a-row' WHERE id = 7")
    result = runs.run("-vvv")
    said = result.out.decode() + result.err
    assert result.rc == 0
    for secret in (runs.db.password, runs.bucket.secret_key, "needle-in-a-row"):
        assert secret not in said
