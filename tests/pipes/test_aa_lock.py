"""aa-lock: a foreign command under the lock, who holds it, and ending who holds it."""

from __future__ import annotations

import dataclasses
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

from audit_archiver import exits
from audit_archiver.commands import aa_lock
from audit_archiver.postgres import connect, locks
from tests.ground import processes, tables
from tests.ground.by_hand import ByHand, dump
from tests.ground.kill import go_on, stopped_at
from tests.ground.run import BIN, Child, finish, run_forked, spawn
from tests.ground.wait import until

RUN = "20251230T021545Z-4711"


@pytest.fixture()
def hand(db: Any, bucket: Any, config_file: Any) -> ByHand:
    tables.create(db.connection, rows=100, first="2024-01-01", last="2024-03-01")
    return ByHand(db, config_file(db, bucket))


@pytest.fixture()
def driver(hand: ByHand) -> Iterator[connect.Connection]:
    """Another run's control connection, with the lock."""
    made = connect.connect(hand.settings.databases[0], purpose="control", run=RUN)
    locks.take(made, None, "the database")
    yield made
    made.close()


def script(tmp_path: Path, text: str) -> list[str]:
    """A foreign command that runs Python code."""
    path = tmp_path / "foreign.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def held(hand: ByHand) -> list[dict[str, Any]]:
    """What aa-lock --show says of the only database."""
    return list(hand.must("aa-lock", ["--show"]).lines[0]["databases"][0]["holders"])


def waiting(hand: ByHand, tmp_path: Path, *argv: str) -> tuple[Child, Path]:
    """aa-lock with a command that runs until the file `go` exists."""
    go = tmp_path / "go"
    text = f"import os, time\nopen({str(tmp_path / 'here')!r}, 'w').close()\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    child = spawn("aa-lock", [*argv, "--", *script(tmp_path, text)], hand.env)
    until(lambda: (tmp_path / "here").exists(), "the foreign command runs")
    return child, go


@pytest.mark.req("REQ-LOCK-011", "REQ-LOCK-014")
def test_the_command_runs_under_the_lock_and_its_exit_code_passes_through(hand: ByHand, tmp_path: Path) -> None:
    child, go = waiting(hand, tmp_path)
    holder = held(hand)
    assert [(each["kind"], each["table"], each["application"]) for each in holder] == [("run", None, "audit-archiver aa-lock")]
    go.touch()
    assert finish(child).rc == 0
    until(lambda: held(hand) == [], "the server has freed the lock")
    seven = run_forked("aa-lock", ["--", sys.executable, "-c", "import sys; print('data'); sys.exit(7)"], env=hand.env)
    assert (seven.rc, seven.out) == (7, b"data\n")


@pytest.mark.req("REQ-LOCK-011", "REQ-SCH-002")
def test_the_lock_held_elsewhere_is_4_and_a_command_that_ends_with_4_says_that_it_is_its_own(hand: ByHand, driver: Any) -> None:
    four = [sys.executable, "-c", "import sys; sys.exit(4)"]
    refused = run_forked("aa-lock", ["--", *four], env=hand.env)
    assert refused.rc == exits.LOCKED and "is locked by another run" in refused.err and RUN in refused.err
    driver.close()
    own = run_forked("aa-lock", ["--", *four], env=hand.env)
    assert own.rc == 4 and "its own exit code" in own.err and "is locked by" not in own.err
    quiet = run_forked("aa-lock", ["--quiet", "--", *four], env=hand.env)
    assert quiet.rc == 4 and quiet.err.count("\n") == 1


def test_our_own_commands_inside_exit_4_and_say_why(hand: ByHand) -> None:
    line = hand.export()[0]
    inside = run_forked("aa-lock", ["--", str(BIN / "aa-delete")], dump([line]), env=hand.env)
    assert inside.rc == exits.LOCKED
    assert "aa-lock is for foreign commands" in inside.err
    assert hand.db.scalar("SELECT count(*) FROM audit_logs") == 100


@pytest.mark.req("REQ-LOCK-014")
def test_a_guarded_delete_that_has_ended_keeps_nobody_out_not_even_for_a_moment(hand: ByHand) -> None:
    for _ in range(3):
        line = hand.export("--limit", "10")[0]
        assert hand.delete([line]).rc == 0
        assert hand.db.admin("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
                             "(SELECT oid FROM pg_database WHERE datname = current_database())") == [(0,)]


def test_a_command_that_cannot_be_started_is_a_usage_error(hand: ByHand) -> None:
    missing = run_forked("aa-lock", ["--", "/nonexistent/command"], env=hand.env)
    assert missing.rc == exits.CONFIG and "/nonexistent/command" in missing.err
    assert hand.run("aa-lock").rc == exits.CONFIG
    assert hand.run("aa-lock", ["--show", "--", "true"]).rc == exits.CONFIG
    until(lambda: held(hand) == [], "the server has freed the lock")


@pytest.mark.req("REQ-LOCK-014")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_command_and_the_lock_ends_with_it(hand: ByHand, tmp_path: Path, signum: int) -> None:
    child, _ = waiting(hand, tmp_path)
    os.kill(child.pid, signum)
    result = finish(child)
    assert result.rc in (128 + signum, 1)  # Python answers an interrupt with a traceback and code 1 or by the signal
    until(lambda: held(hand) == [], "the server has freed the lock")


@pytest.mark.req("REQ-LOCK-015", "T42")
def test_when_the_lock_is_lost_the_command_is_ended(hand: ByHand, tmp_path: Path) -> None:
    child, _ = waiting(hand, tmp_path)
    hand.db.admin("SELECT pg_terminate_backend(%s)", (held(hand)[0]["pid"],))
    result = finish(child)
    assert result.rc == exits.NETWORK and "the lock was lost" in result.err
    assert not [pid for pid in processes.pids() if processes.environment(pid).get("AA_TEST_RUN") == child.token and processes.alive(pid)]


@pytest.mark.req("REQ-LOCK-016")
def test_a_killed_aa_lock_leaves_no_stale_lock(hand: ByHand, tmp_path: Path) -> None:
    child, go = waiting(hand, tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: held(hand) == [], "the server has freed the lock")
    go.touch()
    finish(child)


def test_a_tables_lock_leaves_the_other_tables_alone(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> None:
    for table in ("audit_logs", "other"):
        tables.create(db.connection, table, rows=10, first="2024-01-01", last="2024-03-01")
    both = [{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in ("audit_logs", "other")]
    hand = ByHand(db, config_file(db, bucket, both, locking={"scope": "table"}))
    lines = hand.export()
    child, go = waiting(hand, tmp_path, "--table", "other")
    assert [(each["table"], each["shared"]) for each in held(hand)] == [(None, True), ("public.other", False)]
    by_table = {line["batch"]["table"]: line for line in lines}
    assert hand.delete([by_table["other"]]).rc == exits.LOCKED
    assert hand.delete([by_table["audit_logs"]]).rc == 0
    go.touch()
    assert finish(child).rc == 0


@pytest.mark.req("REQ-SCH-002", "REQ-LOCK-013")
def test_show_names_the_session_since_when_and_whether_that_is_too_long(db: Any, bucket: Any, config_file: Any) -> None:
    hand = ByHand(db, config_file(db, bucket, locking={"lock_timeout_minutes": 120}))
    text = hand.must("aa-lock", ["--show", "--output", "text"])
    assert text.out.decode() == f"{db.name}: not locked\n"
    made = connect.connect(hand.settings.databases[0], purpose="control", run=RUN)
    locks.take(made, None, "the database")
    pid = made.info.backend_pid
    text = hand.must("aa-lock", ["--show", "--output", "text"])
    assert text.out.decode().startswith(f"{db.name}: locked by backend {pid} ('audit-archiver control {RUN}', archiver from local socket, since 20")
    found = held(hand)[0]
    assert (found["pid"], found["overdue"], found["age_s"] < 600) == (pid, False, True)
    impatient = dataclasses.replace(hand.settings, locking=dataclasses.replace(hand.settings.locking, lock_timeout_minutes=0))
    looked = aa_lock.look(impatient, impatient.databases[0], None)["holders"][0]
    assert looked["overdue"] is looked["stale"] is True and looked["token"] > 0
    assert re.search(rf", token {looked['token']}, heartbeat \d+ s ago\) - stale: ", aa_lock.shown(db.name, looked))
    assert aa_lock.shown(db.name, {**looked, "stale": False}).endswith(" - longer than locking.lock_timeout_minutes")
    made.close()


@pytest.mark.req("REQ-LOCK-016", "T42")
def test_break_ends_who_holds_the_lock_and_says_so(hand: ByHand, driver: Any) -> None:
    batch = connect.connect(hand.settings.databases[0], purpose="batch", run=RUN)
    pid, other = driver.info.backend_pid, batch.info.backend_pid
    connect.execute(batch, "BEGIN")
    locks.enter(batch, None, "the database")

    result = hand.run("aa-lock", ["--break"])

    assert result.rc == 0, result.err
    assert {(each["pid"], each["ended"]) for each in result.lines[0]["databases"][0]["holders"]} == {
        (pid, True), (other, True)}
    assert f"backend {pid}" in result.err and "rolled back" in result.err
    assert held(hand) == []
    assert hand.run("aa-lock", ["--break"]).rc == 0
    batch.close()


@pytest.mark.req("REQ-LOCK-012", "REQ-LOCK-016", "T42")
@pytest.mark.parametrize("point", ["guarded.compared", "guarded.deleted"])
def test_a_frozen_owner_whose_lock_was_broken_deletes_nothing_when_it_wakes(hand: ByHand, point: str) -> None:
    """T42: SIGSTOP the owner, break its lock, let a second one work, SIGCONT the first."""
    lines = hand.export()
    child = spawn("aa-delete", env={**hand.env, "AA_TEST_POINT": point}, stdin=subprocess.PIPE)
    child.stdin.write(dump(lines))
    child.stdin.close()
    child.stdin = None
    frozen = stopped_at(point, child.token, ended=child.poll)
    assert hand.delete(lines).rc == exits.LOCKED

    assert hand.run("aa-lock", ["--break"]).rc == 0
    second = hand.must("aa-lock", ["--show"]).lines[0]["databases"][0]["holders"]
    go_on(frozen)
    first = finish(child)

    assert second == []
    assert (first.rc, first.out) == (exits.NETWORK, b""), first.err
    assert hand.db.scalar("SELECT count(*) FROM audit_logs") == 100


@pytest.mark.req("T42")
def test_a_delete_whose_control_session_alone_was_ended_does_not_delete(hand: ByHand) -> None:
    """C3: its transaction is alive and well, only the fence is gone."""
    lines = hand.export()
    child = spawn("aa-delete", env={**hand.env, "AA_TEST_POINT": "guarded.compared"}, stdin=subprocess.PIPE)
    child.stdin.write(dump(lines))
    child.stdin.close()
    child.stdin = None
    frozen = stopped_at("guarded.compared", child.token, ended=child.poll)
    control = next(each["pid"] for each in held(hand) if each["kind"] == "run")
    hand.db.admin("SELECT pg_terminate_backend(%s)", (control,))
    until(lambda: control not in [each["pid"] for each in held(hand)], "the control session is gone")
    go_on(frozen)
    result = finish(child)
    assert (result.rc, result.out) == (exits.LOCKED, b""), result.err
    assert "no longer holds the lock" in result.err
    assert hand.db.scalar("SELECT count(*) FROM audit_logs") == 100
    assert hand.states(lines[0]) == []


@pytest.mark.parametrize(("answer", "ended"), [("y\n", True), ("\n", False)])
def test_break_asks_on_a_terminal(hand: ByHand, driver: Any, answer: str, ended: bool) -> None:
    master, slave = pty.openpty()
    child = subprocess.Popen([str(BIN / "aa-lock"), "--break"], stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={"PATH": os.defpath, **hand.env})
    os.close(slave)
    os.write(master, answer.encode())
    out, err = child.communicate(timeout=60)
    os.close(master)
    assert b"end 1 session? [y/N]" in err
    assert child.returncode == (0 if ended else exits.FAILED)
    assert (held(hand) == []) is ended
    assert (b'"ended":true' in out) is ended
