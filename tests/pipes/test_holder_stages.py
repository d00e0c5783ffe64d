"""The stages as the holder sees them: who disappears, who says a code, who waits, and which job fails alone."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from audit_archiver import lines
from audit_archiver.exits import ConfigError, Failed, Mismatch
from audit_archiver.holder.callers import Caller
from audit_archiver.holder.client import Client, JobFailed
from tests.ground import tables
from tests.ground.held import RUN, WHOLE, backends, plan, stuck_copy
from tests.ground.run import BIN, run_stage
from tests.ground.wait import until
from tests.pipes.conftest import rows_left

ROWS = 200


# -- who disappears

@pytest.mark.req("REQ-TXN-003", "REQ-TXN-004", "REQ-INT-003")
def test_a_stage_that_ends_without_a_word_fails_everything(holding, db):
    holder = holding()
    deleted = holder.delete(holder.verified(plan(holder.settings, "audit_logs"))).lines
    verifier = holder.client("aa-verify")
    verifier._socket.shutdown(socket.SHUT_RDWR)
    failure = until(lambda: holder.operations.failure, "the holder notices")
    assert failure.msg == "aa-verify disappeared without a word" and failure.retry
    with pytest.raises(Failed, match="is not committed: aa-verify disappeared"):
        holder.commit(deleted[0])
    assert rows_left(db) == 200


def test_a_stage_that_dies_in_the_middle_of_a_copy_is_noticed_and_the_copy_cancelled(holding, db, pipe):
    tables.fill(db.connection, rows=3000, first="2023-01-01", last="2023-12-31", start=1000)
    holder = holding()
    client = stuck_copy(holder, *pipe)
    client._socket.shutdown(socket.SHUT_RDWR)
    failure = until(lambda: holder.operations.failure, "the holder notices")
    assert failure.msg == "aa-select disappeared without a word"
    for each in pipe:
        os.close(each)  # whoever tore the pipeline down ended the reader
    until(lambda: db.execute("SELECT id FROM audit_logs FOR UPDATE SKIP LOCKED") and not holder.operations.open_batches(), "all is rolled back")


def test_the_last_words_of_a_stage_that_was_interrupted_in_a_copy_are_heard_at_once(holding, db, pipe):
    tables.fill(db.connection, rows=3000, first="2023-01-01", last="2023-12-31", start=1000)
    holder = holding()
    client = stuck_copy(holder, *pipe)
    client._socket.sendall(b'{"op":"bye","code":143,"msg":"stopped by SIGTERM"}\n')
    client._socket.shutdown(socket.SHUT_RDWR)
    failure = until(lambda: holder.operations.failure, "the holder hears the bye though the copy still runs")
    assert failure.msg == "aa-select ended with code 143: stopped by SIGTERM"
    for each in pipe:
        os.close(each)
    until(lambda: not holder.operations.open_batches(), "all is rolled back")


@pytest.mark.parametrize("code", [1, 7, 143])
def test_a_code_other_than_0_fails_everything(holding, db, code):
    holder = holding()
    deleted = holder.delete(holder.verified(plan(holder.settings, "audit_logs"))).lines
    Client(holder.server.path, "aa-upload").bye(code, Failed("the store said no"))
    assert holder.operations.failure.msg == f"aa-upload ended with code {code}: the store said no"
    assert holder.operations.failure.code == (code if code < 10 else 2)
    with pytest.raises(Failed, match="is not committed"):
        holder.commit(deleted[0])
    assert rows_left(db) == 200
    assert holder.operations.open_batches() == []


def test_the_verdict_asks_for_a_hello_and_a_bye_0_of_both_ends_of_the_pipeline(holding):
    holder = holding()
    assert "aa-select and aa-delete never took part" in holder.server.verdict().msg
    Client(holder.server.path, "aa-select").bye(0, None)
    assert holder.server.verdict().msg.startswith("aa-delete never took part")
    delete = Client(holder.server.path, "aa-delete")
    assert "aa-delete did not say how it ended" in holder.server.verdict().msg
    delete.bye(0, None)
    assert holder.server.verdict() is None


def test_the_verdict_counts_a_batch_that_is_still_open(holding):
    holder = holding()
    holder.verified(plan(holder.settings, "audit_logs"))
    Client(holder.server.path, "aa-delete").bye(0, None)
    assert "audit_logs batch_001 was still open" in holder.server.verdict().msg


def test_a_stage_that_waits_for_a_place_is_told_when_the_run_is_stopped(holding):
    holder = holding(in_flight=1)
    job = plan(holder.settings, "audit_logs")
    holder.begun(job)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            holder.begun(job)
        except Failed as error:
            errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    until(lambda: len(holder.server.present()) == 2, "the second stage has said hello")
    holder.operations.fail(Mismatch("something differs"))
    waiting.join(10)
    assert "something differs" in str(errors[0])


# -- the socket

def test_the_socket_lies_in_a_directory_of_its_own_that_nobody_else_may_enter(holding):
    holder = holding()
    place = Path(holder.server.path).parent
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert [each.name for each in place.iterdir()] == ["s"]
    holder.close()
    assert not place.exists()


def test_the_socket_goes_where_the_environment_wants_it(holding, tmp_path):
    for variable in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        assert holding(env={variable: str(tmp_path)}).server.path.startswith(f"{tmp_path}/aa-")


def test_a_socket_path_that_is_too_long_is_refused_and_leaves_nothing(holding, tmp_path):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        holding(env={"XDG_RUNTIME_DIR": str(deep)})
    assert list(deep.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_users_process_is_refused_even_if_it_gets_at_the_socket(holding):
    holder = holding()
    os.chmod(Path(holder.server.path).parent, 0o755)
    os.chmod(holder.server.path, 0o777)
    ask = ("import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
           "s.sendall(b'{\"op\":\"hello\",\"stage\":\"aa-select\",\"pid\":1}\\n'); print(s.recv(100))")
    asked = subprocess.run(["/usr/bin/env", "python3", "-c", ask, holder.server.path], user=65534, group=65534, extra_groups=[],
                           cwd="/", capture_output=True, text=True, check=False)
    assert asked.stdout.strip() == "b''" or "Broken pipe" in asked.stderr or "reset" in asked.stderr, asked
    assert holder.server.present() == []


def test_a_stage_whose_holder_cannot_be_reached_exits_3_and_does_not_change_its_mode(path, db, tmp_path):
    for stage in ("aa-select", "aa-serialize", "aa-upload", "aa-verify", "aa-delete", "aa-record"):
        result = run_stage(stage, [], b"", {"AA_TXN": str(tmp_path / "gone"), "AA_CONFIG": path})
        assert result.rc == 3 and result.out == b"", stage
        assert "no transaction holder answers there" in result.err
    assert rows_left(db) == 200


# -- jobs

@pytest.mark.req("T58")
def test_a_job_that_fails_alone_is_noted_and_the_next_one_goes_on(holding, db):
    holder = holding()
    db.execute("CREATE TABLE closed (LIKE audit_logs INCLUDING ALL)")
    job = plan(holder.settings, "closed")
    db.admin("ALTER TABLE closed OWNER TO postgres")
    db.admin("GRANT SELECT ON closed TO archiver")
    missing = {**job, "table": "missing"}
    lines = holder.verified(job, missing, plan(holder.settings, "audit_logs"))
    assert [line["batch"]["table"] for line in lines] == ["audit_logs"]
    notes = {key[2]: each.error for key, each in holder.operations.notes.items()}
    assert notes["closed"].code == 5 and "permission denied" in notes["closed"].msg
    assert notes["missing"].code == 3 and "does not exist" in notes["missing"].msg
    assert notes["audit_logs"] is None
    assert holder.operations.failure is None
    holder.commit(holder.delete(lines).lines[0])
    assert rows_left(db) == 100


def test_a_job_that_fails_alone_says_so_in_the_protocol(holding):
    holder = holding()
    with pytest.raises(JobFailed, match="does not exist"):
        holder.begun({**plan(holder.settings, "audit_logs"), "table": "missing"})


def test_a_refused_job_is_noted_for_the_report(holding):
    holder = holding()
    refused = {"format": "aa-job", "version": 1, "run": RUN, "database": holder.settings.databases[0].name, "schema": "audit",
               "table": "logins", "refused": {"code": 3, "msg": "no primary key", "at": "prod.yaml:31"}}
    assert holder.select(refused).rc == 0
    (note,) = holder.operations.notes.values()
    assert (note.error.code, note.error.msg, note.error.at) == (3, "no primary key", "prod.yaml:31")
    with pytest.raises(Failed, match="without 'refused'"):
        holder.client().call("refuse", job=plan(holder.settings, "audit_logs"))


def test_many_jobs_go_through_one_select(holding, db):
    for number in range(40):
        db.execute(f"CREATE TABLE small_{number} AS SELECT i AS id, '2024-05-05'::timestamptz + i * interval '1 s' AS created_at "
                   f"FROM generate_series(1, {number}) i")
        db.execute(f"ALTER TABLE small_{number} ADD PRIMARY KEY (id)")
    holder = holding()
    lines = holder.verified(*(plan(holder.settings, f"small_{number}") for number in range(40)))
    assert [line["batch"]["rows"] for line in lines] == list(range(1, 40)), "a table without rows gives no batch"
    for line in holder.delete(lines).lines:
        holder.commit(line)
    assert db.scalar(" UNION ALL ".join(f"SELECT count(*) FROM small_{n}" for n in range(40)).join(["SELECT sum(count) FROM (", ") t"])) == 0
    assert len(backends(db, "audit-archiver batch%")) <= 40


@pytest.mark.req("T13")
def test_a_limit_deletes_exactly_as_many_rows_as_it_says_the_oldest_first(holding, db):
    holder = holding()
    committed = holder.archive(plan(holder.settings, "audit_logs", batch_size=20, limit=50))
    assert [line["deleted"]["rows"] for line in committed] == [20, 20, 10]
    assert [row[0] for row in db.execute("SELECT id FROM audit_logs ORDER BY id LIMIT 1")] == [51]
    assert rows_left(db) == 150


def test_two_jobs_of_a_table_each_keep_to_their_own_window(holding, db):
    holder = holding()
    early = plan(holder.settings, "audit_logs", cutoff="2024-03-01T00:00:00Z")
    late = plan(holder.settings, "audit_logs", start="2024-06-01T00:00:00Z", cutoff="2024-07-01T00:00:00Z")
    expected = db.execute("SELECT count(*) FILTER (WHERE created_at < '2024-03-01Z'), count(*) FILTER (WHERE created_at >= '2024-06-01Z' "
                          "AND created_at < '2024-07-01Z') FROM audit_logs")[0]
    assert tuple(line["deleted"]["rows"] for line in holder.archive(early, late)) == expected
    assert min(expected) > 5


def test_the_next_batch_is_locked_while_the_rows_of_the_one_before_flow(holding, db):
    tables.fill(db.connection, rows=3000, first="2023-01-01", last="2023-12-31", start=1000)
    holder = holding(in_flight=2)
    job = plan(holder.settings, "audit_logs", batch_size=2000)
    with selecting(holder, job) as child:  # whose rows are more than a pipe holds, and nobody reads them
        until(lambda: [batch.state for batch in holder.operations.open_batches()] == ["locked", "locked"], "two batches are locked")
        out, _ = child.communicate(timeout=60)
    frames = [line for line in out.splitlines() if line.startswith(b"[")]
    assert [frame[:6] for frame in frames] == [b'["aa-r', b'["end"', b'["aa-r', b'["end"']
    assert child.returncode == 0 and out.count(b"\n") == 3100 + len(frames)


def test_no_batch_is_locked_ahead_where_a_pause_is_wished(holding, db):
    tables.fill(db.connection, rows=3000, first="2023-01-01", last="2023-12-31", start=1000)
    holder = holding(in_flight=2)
    with selecting(holder, plan(holder.settings, "audit_logs", batch_size=2000, sleep_s=1)) as child:
        assert child.stdout.read(1), "the rows flow"
        assert len(holder.operations.open_batches()) == 1
        child.communicate(timeout=60)
    assert child.returncode == 0


def test_one_batch_at_a_time_goes_through_too(holding, db):
    holder = holding(in_flight=1)
    failure, committed = holder.command(WHOLE, plan(holder.settings, "audit_logs", batch_size=30))
    assert failure is None and [line["batch"]["rows"] for line in committed] == [30, 45, 25]
    assert rows_left(db) == 100


def selecting(holder, job):
    """A real aa-select in a process of its own, with its output in a pipe."""
    child = subprocess.Popen([str(BIN / "aa-select")], env={"PATH": os.defpath, **holder.env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(lines.dump(job))
    child.stdin.close()
    child.stdin = None
    return child


def test_a_sweep_that_ends_with_an_empty_batch_is_not_over_before_the_batch_before_it(holding, db):
    holder = holding()
    job = plan(holder.settings, "audit_logs", batch_size=100, limit=None)
    lines = holder.verified(job)  # 100 rows, and a second, empty batch that was abandoned
    assert len(lines) == 1
    (notes,) = holder.operations.notes.values()
    assert (notes.swept, notes.cursor) == (False, None), "a restart would leave the rows of batch 1 behind"
    holder.commit(holder.delete(lines).lines[0])
    assert notes.swept and notes.rows == 100


def test_the_watcher_does_not_turn_in_circles_while_nothing_happens(holding, monkeypatch):
    holder = holding()
    asked = []
    monkeypatch.setattr(Caller, "last_words", lambda self: asked.append(1))
    holder.client()
    until(lambda: holder.server.present(), "hello")
    holder.server.wait_for_news(0.3)
    assert asked == []
