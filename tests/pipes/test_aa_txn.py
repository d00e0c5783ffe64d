"""aa-txn: what comes out of its command is committed line by line, and nothing once anything went wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import lines
from audit_archiver.driver import pipeline
from audit_archiver.exits import InputError
from tests.ground import kill, tables
from tests.ground.archive import Archive
from tests.ground.held import WHOLE, backends, lock_row, plan
from tests.ground.proxy import Proxy
from tests.ground.run import BIN, Child, Result, finish, run_forked, run_stage, spawn
from tests.ground.wait import until
from tests.pipes.conftest import rows_left

REAL = "aa-select | aa-serialize | aa-upload | aa-verify | aa-delete"
ROWS = 60


@pytest.fixture()
def txn(db, bucket, config_file) -> Txn:
    """aa-txn on the same table and a real store."""
    tables.create(db.connection, rows=60, first="2024-01-01", last="2025-12-31")
    return Txn(db, bucket, config_file(db, bucket))


class Txn:
    """Runs of aa-txn as a process of its own."""

    def __init__(self, db: Any, bucket: Any, path: Path) -> None:
        self.db, self.bucket, self.path = db, bucket, path
        self.archive = Archive(bucket.client, bucket.name)
        self.before = tables.digest(db.connection, "public.audit_logs")

    def jobs(self, **more: Any) -> bytes:
        """The job of the table."""
        from audit_archiver import config
        return lines.dump(plan(config.load(str(self.path), {}), "audit_logs", **{"batch_size": 10, **more}))

    def spawn(self, shell: str = REAL, *argv: str, **more: Any) -> Child:
        """Start it; its input is a pipe."""
        env = {"PATH": f"{BIN}:{os.defpath}", **more.pop("env", {})}
        return spawn("aa-txn", ["-c", self.path, *argv, "--", "sh", "-c", shell], env, **{"stdin": subprocess.PIPE, **more})

    def run(self, shell: str = REAL, *argv: str, stdin: bytes = b"", **more: Any) -> Result:
        """Run it to its end."""
        return finish(self.spawn(shell, *argv, **more), stdin or self.jobs())

    def rows(self) -> int:
        return self.db.scalar("SELECT count(*) FROM audit_logs")


# -- the one-line pipe

@pytest.mark.req("REQ-TXN-002", "REQ-INT-001", "REQ-INT-005", "REQ-VER-001", "REQ-VER-002", "REQ-VER-003", "REQ-S3-012", "REQ-S3-014")
def test_the_one_line_pipe_archives_a_table_and_nothing_is_lost(txn, db):
    script = f"aa-plan | aa-txn -- sh -c '{REAL}' | aa-record"
    done = subprocess.run(["sh", "-c", script], env={"PATH": f"{BIN}:{os.defpath}", "AA_CONFIG": str(txn.path)},
                          capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    recorded = [json.loads(line) for line in done.stdout.split(b"\n") if line]
    assert all(line["recorded"] and line["committed"]["by"] == "holder" for line in recorded)
    assert [line["batch"]["number"] for line in recorded] == list(range(1, len(recorded) + 1))
    young = db.scalar("SELECT count(*) FROM audit_logs WHERE created_at >= now() - interval '91 days'")
    assert rows_left(db) == young and young < 60
    from audit_archiver import config
    assert txn.archive.restore(config.load(str(txn.path), {}).databases[0], "public.audit_logs", "public.restored") == 60 - young
    assert tables.digest(db.connection, "public.audit_logs", "public.restored") == txn.before


@pytest.mark.req("REQ-ARC-011")
def test_batches_are_committed_as_they_come_out_and_the_last_may_be_smaller(holding, db):
    holder = holding(in_flight=2)
    failure, out = holder.command(WHOLE, plan(holder.settings, "audit_logs", batch_size=7))
    assert failure is None, failure
    assert [line["batch"]["number"] for line in out] == list(range(1, len(out) + 1)) and len(out) > 2
    sizes = [line["deleted"]["rows"] for line in out]
    assert sum(sizes) == 30 and sizes[0] == 7 and sizes[1] in (7, 10), f"{sizes}: a batch grows where the one before is committed already"
    assert sizes[-1] not in (7, 10, 15), f"{sizes}: the last has what was left"
    assert rows_left(db) == 30


# -- the holder judges, not the shell

def test_a_surplus_line_before_the_batches_lets_nothing_commit(holding, db):
    for surplus in ("echo hello", "echo '{}'", "echo '[\"end\",1,{}]'", "printf '\\n'"):
        with holding() as holder:
            failure, out = holder.command(f"{surplus}; {WHOLE}", plan(holder.settings, "audit_logs"))
            assert isinstance(failure, InputError) and failure.code == 2 and out == [], surplus
    assert rows_left(db) == 60


def test_output_that_ends_inside_a_line_fails(holding, db):
    holder = holding()
    failure, out = holder.command("printf '{\"format\"'", plan(holder.settings, "audit_logs"))
    assert isinstance(failure, InputError) and "ends inside a line" in failure.msg and out == []


def test_a_line_that_comes_out_twice_is_committed_once(holding, db, tmp_path):
    kept = tmp_path / "kept"
    holder = holding()
    failure, out = holder.command(f"{WHOLE} > {kept}; cat {kept} {kept}", plan(holder.settings, "audit_logs"))
    assert "was not deleted by this holder" in failure.msg and len(out) == 1
    assert rows_left(db) == 30


@pytest.mark.parametrize("words, ending", [("aa-upload 7", "aa-upload ended with code 7"), ("aa-verify nothing", "disappeared without a word")])
def test_lines_that_stay_in_the_pipe_after_a_stage_failed_are_not_committed(holding, db, tmp_path, words, ending):
    """They outlive their writer: the deleted lines come out after the failure, and the shell ends with 0."""
    kept = tmp_path / "kept"
    holder = holding()
    failure, out = holder.command(f"{WHOLE} > {kept}; SAY {words}; cat {kept}; exit 0", plan(holder.settings, "audit_logs"))
    assert ending in failure.msg and out == []
    assert kept.stat().st_size > 1000, "no line was in the pipe: this test proves nothing"
    assert rows_left(db) == 60


def test_a_batch_that_is_still_open_when_the_command_ends_is_rolled_back(holding, db):
    holder = holding()
    failure, out = holder.command("aa-select | aa-serialize > /dev/null; SAY aa-delete 0", plan(holder.settings, "audit_logs"))
    assert "audit_logs batch_001 was still open when the command ended" in failure.msg and out == []
    assert db.execute("SELECT id FROM audit_logs FOR UPDATE NOWAIT") != [] and rows_left(db) == 60


def test_a_command_without_select_and_delete_is_no_pipeline(txn, db):
    for shell, missing in (("true", "aa-select and aa-delete never took part"), ("aa-select > /dev/null", "aa-delete never took part")):
        result = txn.run(shell, stdin=txn.jobs(limit=10))
        assert result.rc == 2 and missing in result.err and result.out == b"", shell
    assert txn.rows() == 60


def test_a_command_that_ends_with_another_code_than_0_fails_though_its_stages_did_well(holding, db):
    holder = holding()
    failure, out = holder.command(f"{WHOLE}; exit 5", plan(holder.settings, "audit_logs"))
    assert failure.msg == "'sh' ended with code 5" and len(out) == 1


@pytest.mark.req("T45", "T37")
@pytest.mark.parametrize("point", ["select.copied", "serialize.staged", "upload.data.put", "verify.done", "delete.done"])
def test_a_stage_that_is_killed_commits_nothing_though_the_shell_says_0(txn, point):
    child = txn.spawn(f"{REAL}; exit 0", env={"AA_TEST_POINT": point})
    child.stdin.write(txn.jobs())
    child.stdin.flush()
    kill.kill(kill.stopped_at(point, child.token, ended=child.poll))
    result = finish(child)
    assert result.rc == 2, result.err
    # the holder hears first either of the death itself or from the stage before, whose reader is gone
    assert "disappeared without a word" in result.err or "the reader of the output is gone" in result.err
    assert result.out == b"" and txn.rows() == 60
    kill.all_gone(child.token)
    assert txn.archive.commits() == []
    until(lambda: backends(txn.db) == [], "the server has noticed")


def test_a_stage_that_fails_gives_its_code_to_the_whole(txn):
    txn.bucket.client.delete_bucket(Bucket=txn.bucket.name)
    result = txn.run()
    assert result.rc == 3 and result.out == b"" and txn.rows() == 60
    txn.bucket.client.create_bucket(Bucket=txn.bucket.name)


# -- signals

@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_the_first_signal_finishes_the_batch_in_flight_and_begins_no_other(txn, signum, code):
    """The signal goes to the whole process group, as Ctrl-C does: the stages are in a session of their own."""
    point = "verify.done"
    child = txn.spawn(REAL, "--in-flight", "1", env={"AA_TEST_POINT": point}, start_new_session=True)
    child.stdin.write(txn.jobs())
    child.stdin.flush()  # and it stays open: nobody says that there are no more jobs
    stopped = kill.stopped_at(point, child.token, ended=child.poll)
    os.killpg(child.pid, signum)
    until(lambda: _handled(child.pid, signum), "the signal has arrived")
    kill.go_on(stopped)
    child.stdin.close()
    child.stdin = None
    result = finish(child)
    assert result.rc == code, result.err
    assert "the batches in flight were finished" in result.err
    assert [line["deleted"]["rows"] for line in result.lines] == [10] and txn.rows() == 50
    kill.all_gone(child.token)


def _handled(pid: int, signum: int) -> bool:
    """True once the signal is no longer pending."""
    pending = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return not any(int(mask, 16) >> (signum - 1) & 1 for mask in pending)


def test_the_first_signal_ends_a_run_that_only_waits_for_jobs(txn):
    child = txn.spawn()
    child.stdin.write(txn.jobs(limit=10))
    child.stdin.flush()
    until(lambda: txn.rows() == 50 and not [each for each in backends(txn.db) if each[2] != "idle"], "the job is done, the next is waited for")
    child.send_signal(signal.SIGTERM)
    result = Result(child.wait(60), child.stdout.read(), child.stderr.read().decode())
    assert result.rc == 143 and len(result.lines) == 1
    kill.all_gone(child.token)


def test_the_second_signal_rolls_back_even_if_a_stage_is_frozen(txn):
    """aa-serialize stands still with the rows in its hands; it is woken to hear that it is over.

    Two kinds, since one that comes twice at once is heard once; and of two at once Python hears SIGINT before SIGTERM.
    """
    child = txn.spawn(env={"AA_TEST_POINT": "serialize.data.written"})
    child.stdin.write(txn.jobs())
    child.stdin.close()
    child.stdin = None
    kill.stopped_at("serialize.data.written", child.token, ended=child.poll)
    child.send_signal(signal.SIGINT)
    until(lambda: _handled(child.pid, signal.SIGINT), "the first signal has arrived")
    child.send_signal(signal.SIGTERM)
    result = finish(child)
    assert result.rc == 130, "the first signal's code"
    assert "open batches were rolled back" in result.err and result.out == b""
    assert txn.rows() == 60
    until(lambda: backends(txn.db) == [], "the server has noticed")
    kill.all_gone(child.token)


def test_draining_lets_the_batches_in_flight_commit_and_leaves_the_rest(holding, db, tmp_path):
    holder, go = holding(in_flight=2), tmp_path / "go"
    signals = pipeline.Signals(install=False)

    def interrupt() -> None:
        until(lambda: len(holder.operations.open_batches()) == 2, "two batches are in flight")
        signals.first, signals.count = signal.SIGTERM, 1
        until(lambda: holder.operations.draining, "it drains")
        go.touch()

    threading.Thread(target=interrupt, daemon=True).start()
    failure, out = holder.command(WHOLE.replace("VOUCH", f"VOUCH | WAIT {go}"), plan(holder.settings, "audit_logs", batch_size=5), signals=signals)
    assert failure is None and [line["deleted"]["rows"] for line in out] == [5, 5]
    assert rows_left(db) == 50 and signals.exit_code == 143


# -- around it

def test_a_gone_reader_of_the_output_ends_everything_with_141(txn):
    child = txn.spawn(env={"AA_TEST_POINT": "delete.before"})
    child.stdin.write(txn.jobs())
    child.stdin.close()
    child.stdin = None
    stopped = kill.stopped_at("delete.before", child.token, ended=child.poll)
    child.stdout.close()
    code = child.wait(60)
    assert code == 141 and b"the reader of the output is gone" in child.stderr.read()
    until(lambda: not kill.processes.alive(stopped), "the stage that stood still has ended: it is the shell's child, nobody waited for it")
    assert txn.rows() == 60
    kill.all_gone(child.token)


def test_a_connection_that_is_cut_during_commit_ends_with_7_and_says_nothing_of_the_batch(db, pg, bucket, config_file):
    tables.create(db.connection, rows=60, first="2024-01-01", last="2025-12-31")
    with Proxy(f"{pg.host}/.s.PGSQL.{pg.port}") as proxy:
        txn = Txn(db, bucket, config_file(db, bucket, database={"host": "127.0.0.1", "port": proxy.port, "sslmode": "disable"}))
        child = txn.spawn(env={"AA_TEST_POINT": "holder.commit.before"})
        child.stdin.write(txn.jobs())
        child.stdin.close()
        child.stdin = None
        stopped = kill.stopped_at("holder.commit.before", child.token, ended=child.poll)
        proxy.refuse = True
        proxy.cut()
        kill.go_on(stopped)
        result = finish(child)
    assert result.rc == 7 and result.out == b"", result.err
    assert "COMMIT was sent and its answer is unknown" in result.err
    until(lambda: backends(db) == [], "the server has noticed")
    assert txn.rows() == 60, "it went into a connection that was cut"
    assert txn.archive.commits() == []


@pytest.mark.req("REQ-SCH-002")
def test_a_second_aa_txn_ends_with_4_and_names_the_first(txn):
    child = txn.spawn(env={"AA_TEST_POINT": "delete.before"})
    child.stdin.write(txn.jobs())
    child.stdin.close()
    child.stdin = None
    stopped = kill.stopped_at("delete.before", child.token, ended=child.poll)
    second = txn.run()
    assert second.rc == 4 and second.out == b""
    assert f"backend {backends(txn.db, 'audit-archiver control%')[0][0]} ('audit-archiver control " in second.err
    kill.go_on(stopped)
    assert finish(child).rc == 0 and txn.rows() == 30


@pytest.mark.req("T58")
def test_one_job_that_fails_alone_makes_the_end_a_1_and_all_make_it_their_code(txn, db):
    good, missing = txn.jobs(), json.loads(txn.jobs())
    missing["table"] = "missing"
    some = txn.run(stdin=lines.dump(missing) + good)
    assert some.rc == 1 and txn.rows() == 30, some.err
    assert "public.missing: table 'public.missing' does not exist" in some.err
    assert txn.run(stdin=lines.dump(missing)).rc == 3


def test_no_jobs_are_no_failure(txn):
    quiet = " | ".join(f"{stage} --quiet" for stage in REAL.split(" | "))
    result = run_forked("aa-txn", ["-c", txn.path, "--quiet", "--", "sh", "-c", quiet], env={"PATH": f"{BIN}:{os.defpath}"})
    assert result == Result(0, b"", "")


def test_what_cannot_work_is_said_before_anything_starts(txn, tmp_path):
    for argv, env, code, words in (([], {}, 3, "a command is missing"), (["--"], {}, 3, "a command is missing"),
                                   (["--", "true"], {"AA_TXN": "/nowhere"}, 3, "AA_TXN is set already"),
                                   (["--in-flight", "x", "--", "true"], {}, 3, "--in-flight"),
                                   (["--in-flight", "0", "--", "true"], {}, 3, "--in-flight"),
                                   (["--", str(tmp_path / "nosuch")], {}, 2, "cannot start")):
        result = run_stage("aa-txn", ["-c", txn.path, *argv], env={**os.environ, **env})
        assert result.rc == code and words in result.err, (argv, result)
    assert txn.rows() == 60


@pytest.mark.req("T2", "T5", "REQ-LOCK-001", "REQ-LOCK-005", "REQ-VER-001")
def test_rows_that_somebody_holds_are_counted_left_and_taken_next_time(holding, db):
    somebody = db.connect()
    lock_row(somebody, "SELECT id FROM audit_logs WHERE id IN (3, 7, 30) FOR UPDATE")
    with holding() as holder:
        failure, out = holder.command(WHOLE, plan(holder.settings, "audit_logs", batch_size=10))
        assert failure is None
        assert sum(line["batch"]["rows"] for line in out) == 27
        assert sum(line["batch"]["skipped_locked"] for line in out) == 3 == next(iter(holder.operations.notes.values())).skipped_locked
    assert [row[0] for row in db.execute("SELECT id FROM audit_logs WHERE created_at < '2025-01-01' ORDER BY id")] == [3, 7, 30]
    somebody.close()
    with holding() as holder:
        failure, out = holder.command(WHOLE, plan(holder.settings, "audit_logs", batch_size=10))
    assert failure is None and rows_left(db) == 30
