"""aa-archive as a person at a terminal sees it, on a pseudo-terminal of 80 columns; and what cron gets instead."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence, Union

import pytest

from audit_archiver.driver import figures
from audit_archiver.formats import schema
from tests.conftest import AUDIT_LOGS, Bucket, ConfigFile, TestDatabase
from tests.ground import tables
from tests.ground.driven import OLD
from tests.ground.run import BIN, run_forked
from tests.ground.wait import PATIENCE

COLUMNS = 80


class Terminal:
    """A command on a terminal of its own: what it wrote, and keys to press."""

    def __init__(self, argv: Sequence[Union[str, Path]], env: Optional[dict[str, str]] = None) -> None:
        self.text = ""
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            given = {"PATH": os.defpath, "HOME": "/", **(env or {})}
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
            os.execve(argv[0], [str(each) for each in argv], given)

    def read_until(self, pattern: Optional[str], seconds: float = 60.0) -> str:
        """Read until `pattern` was written (None: until the command ended); what was written so far."""
        deadline = time.monotonic() + seconds * PATIENCE
        while pattern is None or not re.search(pattern, self.text):
            left = deadline - time.monotonic()
            assert left > 0, f"waited in vain for {pattern!r}: {self.text[-2000:]}"
            if not select.select([self._screen], [], [], left)[0]:
                continue
            try:
                data = os.read(self._screen, 1 << 16)
            except OSError:  # Linux says EIO when the other side has closed
                data = b""
            if not data:
                assert pattern is None, f"it ended without {pattern!r}: {self.text[-2000:]}"
                break
            self.text += data.decode(errors="replace").replace("\r\n", "\n")
        return self.text

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._screen, keys.encode())

    def end(self) -> int:
        """Read to the end; the exit code, negative for a signal."""
        self.read_until(None)
        os.close(self._screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture()
def path(db: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> Iterator[Path]:
    """A configuration with three tables: rows to archive, none, and one that is refused."""
    tables.create(db.connection, rows=3000, first=OLD[0], last=OLD[1])
    db.execute("CREATE TABLE empty (id int PRIMARY KEY, created_at timestamptz); CREATE TABLE keyless (id int NOT NULL, created_at date)")
    yield config_file(db, bucket, [AUDIT_LOGS, {**AUDIT_LOGS, "name": "empty"}, {**AUDIT_LOGS, "name": "keyless"}],
                      defaults={"vacuum_strategy": "standard", "batch_size": 500})


def archive(path: Path, *flags: str, **env: str) -> Terminal:
    return Terminal([BIN / "aa-archive", "-c", path, *flags], env)


def left(db: TestDatabase) -> int:
    return int(db.scalar("SELECT count(*) FROM audit_logs"))


@pytest.mark.req("REQ-USE-009", "REQ-OBS-011", "REQ-OBS-014", "REQ-USE-008")
def test_a_person_sees_plan_question_progress_and_closing_table(db: TestDatabase, path: Path) -> None:
    screen = archive(path)
    plan = screen.read_until(r"\[y/N\] ")
    # GIVEN the plan of every table, and nothing done before the answer
    assert re.search(r"^run \S+   \S+ at local socket -> s3://\S+/archives/$", plan, re.MULTILINE)
    assert re.search(r"^  public\.audit_logs  older than [-0-9]+ [:0-9]+Z  3,000 rows  6 batches$", plan, re.MULTILINE)
    assert re.search(r"^  public\.empty       older than .* 0 rows  nothing to do$", plan, re.MULTILINE)
    assert re.search(rf"^  public\.keyless     refused: .* \({re.escape(str(path))}:\d+\)$", plan, re.MULTILINE)
    assert plan.endswith("archive and delete 3,000 rows of 1 table? [y/N] ")
    assert left(db) == 3000
    # WHEN it is yes
    screen.press("y\n")
    assert screen.end() == 1
    # THEN one line was redrawn that never took more than the terminal's width, and no colour
    drawn = [part for part in re.split(r"[\r\n]", screen.text) if " rows/s" in part]
    assert drawn and all(figures.width(part.rstrip()) < COLUMNS for part in drawn)
    assert "3,000/3,000  100%" in drawn[-1] and "\x1b" not in screen.text
    closing = screen.text[screen.text.index("TABLE "):]
    assert re.search(r"^public\.audit_logs +3,000 +0 +\d+ +\d+\.\d [kM]B +0\.\d{3} +[\d,]+ +\d+ [kM]B +\d+ [kM]B$", closing, re.MULTILINE)
    assert re.search(r"^select .* record .* vacuum .* \(stages overlap\)$", closing, re.MULTILINE)
    assert re.search(r"^refused: public\.keyless: .*\(.*:\d+\)$", closing, re.MULTILINE)
    assert re.search(r"^done in [^:]*: 2 of 3 tables, 1 refused\. exit 1\n$", closing, re.MULTILINE)
    assert left(db) == 0


@pytest.mark.req("REQ-USE-009")
@pytest.mark.parametrize("keys", ["n\n", "\n", "\x04"])
def test_anything_but_yes_deletes_nothing_and_says_so(db: TestDatabase, path: Path, bucket: Bucket, keys: str) -> None:
    screen = archive(path)
    screen.read_until(r"\[y/N\] ")
    screen.press(keys)
    assert screen.end() == 3
    assert "nothing was archived" in screen.text
    assert left(db) == 3000 and bucket.keys() == []


def test_ctrl_c_at_the_question_ends_it_at_once(db: TestDatabase, path: Path) -> None:
    screen = archive(path)
    screen.read_until(r"\[y/N\] ")
    screen.press("\x03")
    assert screen.end() == -2
    assert "stopped by SIGINT" in screen.text
    assert left(db) == 3000


@pytest.mark.req("REQ-EXE-005")
def test_with_force_nobody_is_asked(db: TestDatabase, path: Path) -> None:
    screen = archive(path, "--force", "--table", "audit_logs")
    assert screen.end() == 0
    assert "[y/N]" not in screen.text and "3,000 rows  6 batches" in screen.text
    assert left(db) == 0


@pytest.mark.req("REQ-OBS-013")
def test_quiet_on_a_terminal_says_nothing_but_the_question(db: TestDatabase, path: Path) -> None:
    screen = archive(path, "--quiet", "--force", "--table", "audit_logs")
    assert (screen.end(), screen.text) == (0, "")
    assert left(db) == 0


def test_names_of_any_script_fit_a_terminal_that_can_only_write_ascii(db: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    db.execute('CREATE TABLE "журнал_监査" (id int PRIMARY KEY, created_at timestamptz)')
    db.execute("INSERT INTO \"журнал_监査\" SELECT i, '2024-01-01Z' FROM generate_series(1, 50) i")
    path = config_file(db, bucket, [{**AUDIT_LOGS, "name": "журнал_监査"}])
    screen = archive(path, "--force", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", TZ="Asia/Kathmandu")
    assert screen.end() == 0, screen.text
    assert "done in" in screen.text


@pytest.mark.req("REQ-OBS-001", "REQ-OBS-004", "REQ-OBS-015")
def test_without_a_terminal_the_log_is_json_with_the_run_in_each_line_and_the_report_one_object(path: Path) -> None:
    result = run_forked("aa-archive", ["-c", path])
    assert result.rc == 1
    report, = result.lines
    schema.validate("report", report, "the report")
    assert {record["run_id"] for record in result.log if record["stage"] != "aa-archive" or record["event"] == "run.end"} == {report["run"]}
    assert all({"ts", "level", "stage", "event", "msg"} <= set(record) for record in result.log)
    assert report["totals"]["tables"] == {"done": 1, "nothing": 1, "refused": 1, "failed": 0, "stopped": 0}
    phases: dict[str, Any] = report["databases"][0]["phases"]
    assert all(phases[phase] > 0 for phase in ("select", "serialize", "upload", "verify", "delete", "record", "vacuum")), phases


@pytest.mark.req("REQ-EXE-006", "REQ-OBS-002")
def test_v_adds_debug_records_and_quiet_leaves_errors_only(path: Path) -> None:
    plain = run_forked("aa-archive", ["-c", path, "--dry-run"])
    verbose = run_forked("aa-archive", ["-c", path, "-v", "--table", "audit_logs"])
    quiet = run_forked("aa-archive", ["-c", path, "--quiet"])
    assert {record["level"] for record in plain.log} <= {"INFO", "WARNING", "ERROR"}
    assert "DEBUG" in {record["level"] for record in verbose.log}
    assert {record["level"] for record in quiet.log} == {"ERROR"} and len(quiet.log) == 1
