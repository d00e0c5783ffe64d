"""The transaction holder's protocol: what may be asked, in which order, by whom, and what happens to who disappears."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any, Callable

import pytest

from audit_archiver.exits import ConfigError, Failed
from tests.ground import tables
from tests.ground.held import RUN, backends, plan, stuck_copy
from tests.ground.wait import until
from tests.pipes.conftest import rows_left

ROWS = 200


# -- what may be asked

def test_there_is_no_operation_that_takes_sql_or_commits(holding, db):
    holder = holding()
    begun = holder.copied(job := plan(holder.settings, "audit_logs"), client := holder.client())
    for op in ("execute", "query", "commit", "rollback", "sql", "__init__", "drain", "close", None, 7, ["begin"]):
        with pytest.raises(Failed, match="no operation"):
            client.call(op, handle=begun["handle"], sql="DELETE FROM audit_logs; COMMIT", job=job)
    assert client.call("probe", handle=begun["handle"])["state"] == "copied", "the batch is as it was"
    assert rows_left(db) == 200


def test_an_operation_before_hello_is_refused(holding):
    holder = holding()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(holder.server.path)
        raw.sendall(json.dumps({"op": "begin", "job": plan(holder.settings, "audit_logs")}).encode() + b"\n")
        answer = json.loads(raw.makefile("rb").readline())
    assert answer["ok"] is False and "hello" in answer["msg"]
    assert holder.operations.open_batches() == []


def test_operations_out_of_order_are_refused_and_delete_nothing(holding, db):
    holder = holding()
    client, job = holder.client(), plan(holder.settings, "audit_logs", batch_size=10)
    line = holder.verified({**job, "limit": 10})[0]
    begun = client.call("begin", job=job)

    def refused(op: str, state: str, **fields: Any) -> None:
        with open(os.devnull, "wb") as out, pytest.raises(Failed, match=f"is {state}, not "):
            client.call(op, out.fileno() if op == "copy" else None, handle=begun["handle"], **fields)

    refused("copy", "begun")
    refused("delete", "begun", batch=line)
    client.call("lock", handle=begun["handle"], cursor=None, limit=10)
    refused("lock", "locked", cursor=None, limit=10)
    refused("delete", "locked", batch=line)
    with open(os.devnull, "wb") as out:
        client.call("copy", out.fileno(), handle=begun["handle"])
    refused("lock", "copied", cursor=None, limit=10)
    refused("copy", "copied")
    deleted = holder.delete([line]).lines[0]
    with pytest.raises(Failed, match="is deleted, not copied"):
        client.call("delete", handle=line["batch"]["txn"]["handle"], batch=line)
    with pytest.raises(Failed, match="could be abandoned"):
        client.call("abandon", handle=line["batch"]["txn"]["handle"])
    assert rows_left(db) == 200, "nothing is committed yet"
    holder.commit(deleted)
    assert rows_left(db) == 190


def test_a_handle_cannot_be_guessed_and_is_never_used_again(holding):
    holder = holding()
    client, job = holder.client(), plan(holder.settings, "audit_logs")
    handles = []
    for _ in range(3):
        handles.append(client.call("begin", job=job)["handle"])
        client.call("abandon", handle=handles[-1])
    assert len(set(handles)) == 3 and all(len(handle.partition("-")[2]) >= 16 for handle in handles)
    for handle in (*handles, "t1-0000000000000000", ""):
        with pytest.raises(Failed, match="no open batch"):
            client.call("lock", handle=handle, cursor=None, limit=1)


def test_a_request_that_breaks_the_protocol_is_answered_and_begins_nothing(holding):
    holder = holding()
    client = holder.client()
    for request in (b"not json", b"[]", b"{}", b'{"op":"lock"}', b'{"op":"bye"}', b'{"op":"begin","job":{}}', b'{"op":"begin","job":[]}', b"\xff"):
        client._socket.sendall(request + b"\n")
        assert json.loads(client._replies.readline())["ok"] is False, request
    assert holder.operations.open_batches() == []


def test_a_job_of_another_run_is_refused(holding):
    holder = holding()
    holder.begun(plan(holder.settings, "audit_logs"))
    with pytest.raises(ConfigError, match=f"this holder serves '{RUN}'"):
        holder.begun(plan(holder.settings, "audit_logs", run="20260101T000000Z-1"))


# -- places

def test_at_most_the_given_number_of_batches_is_open(holding, db):
    holder = holding(in_flight=2)
    job = plan(holder.settings, "audit_logs", batch_size=10)
    first = holder.begun(job, one := holder.client())
    holder.begun(job, holder.client())
    third: list[Any] = []
    waiting = threading.Thread(target=lambda: third.append(holder.begun(job)), daemon=True)
    waiting.start()
    until(lambda: len(holder.server.present()) == 3, "the third stage has said hello")
    waiting.join(0.2)
    assert waiting.is_alive(), "the third batch began though two were open"
    assert len(backends(db, "audit-archiver batch%")) == 2
    one.call("abandon", handle=first["handle"])
    waiting.join(10)
    assert third[0]["number"] == 3
    assert len(holder.operations.open_batches()) == 2


def test_a_client_that_reads_slowly_does_not_hold_up_another(holding, db, pipe):
    tables.fill(db.connection, rows=2000, first="2023-01-01", last="2023-12-31", start=1000)
    holder = holding(in_flight=2)
    job = plan(holder.settings, "audit_logs", batch_size=1000)
    slow = holder.client()
    begun = slow.call("begin", job=job)
    locked = slow.call("lock", handle=begun["handle"], cursor=None, limit=1000)
    read_end, write_end = pipe
    answer: list[Any] = []
    copying = threading.Thread(target=lambda: answer.append(slow.call("copy", write_end, handle=begun["handle"])), daemon=True)
    copying.start()
    os.read(read_end, 1)  # the rows have begun to come, and are more than a pipe holds

    quick = holder.client()
    other = quick.call("begin", job=job)
    assert quick.call("lock", handle=other["handle"], cursor=locked["next"], limit=1000)["rows"] == 1000
    with open(os.devnull, "wb") as out:
        assert quick.call("copy", out.fileno(), handle=other["handle"])["rows"] == 1000

    assert copying.is_alive(), "the slow copy ended by itself: it proves nothing"
    rest = drain(read_end, lambda: not copying.is_alive(), write_end)
    assert answer[0]["rows"] == 1000 and answer[0]["bytes"] == 1 + rest


def drain(read_end: int, ended: Callable[[], bool], write_end: int) -> int:
    """Read all that comes until the copy has been answered; the bytes."""
    os.set_blocking(read_end, False)
    total = 0

    def read() -> bool:
        nonlocal total
        last = ended()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(read_end, 1 << 16):
                total += len(data)
        return last

    until(read, "the copy ends")
    os.close(read_end)
    os.close(write_end)
    return total


# -- descriptors

def test_a_descriptor_that_does_not_block_gets_every_row(holding, pipe):
    holder = holding()
    client = holder.client()
    begun = client.call("begin", job=plan(holder.settings, "audit_logs"))
    client.call("lock", handle=begun["handle"], cursor=None, limit=100)
    read_end, write_end = pipe
    os.set_blocking(write_end, False)
    answer: list[Any] = []
    copying = threading.Thread(target=lambda: answer.append(client.call("copy", write_end, handle=begun["handle"])), daemon=True)
    copying.start()
    total = drain(read_end, lambda: not copying.is_alive(), write_end)
    assert answer[0]["rows"] == 100
    assert total == answer[0]["bytes"] > 1 << 15


def test_a_passed_descriptor_is_inherited_by_no_child_of_the_holder(holding, db, pipe):
    tables.fill(db.connection, rows=1000, first="2023-01-01", last="2023-12-31", start=1000)
    holder = holding()
    client = holder.client()
    begun = client.call("begin", job=plan(holder.settings, "audit_logs"))
    client.call("lock", handle=begun["handle"], cursor=None, limit=1000)
    read_end, write_end = pipe
    copying = threading.Thread(target=lambda: client.call("copy", write_end, handle=begun["handle"]), daemon=True)
    copying.start()
    os.read(read_end, 1)
    pipe = os.readlink(f"/proc/self/fd/{write_end}")
    held = [name for name in os.listdir("/proc/self/fd") if _link(f"/proc/self/fd/{name}") == pipe]
    assert len(held) >= 2, "the holder has no descriptor of its own: this test proves nothing"
    listed = "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}')])"
    child = subprocess.run([sys.executable, "-c", listed], stdout=subprocess.PIPE, close_fds=False, check=True)
    assert pipe not in child.stdout.decode()
    drain(read_end, lambda: not copying.is_alive(), write_end)


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def test_a_gone_reader_of_rows_rolls_back_and_leaves_no_lock(holding, db, pipe):
    tables.fill(db.connection, rows=3000, first="2023-01-01", last="2023-12-31", start=1000)
    holder = holding()
    client = holder.client()
    begun = client.call("begin", job=plan(holder.settings, "audit_logs"))
    client.call("lock", handle=begun["handle"], cursor=None, limit=3000)
    read_end, write_end = pipe
    os.close(read_end)
    with pytest.raises(Failed):
        client.call("copy", write_end, handle=begun["handle"])
    assert "reader of the rows went away" in holder.operations.failure.msg
    assert len(db.execute("SELECT id FROM audit_logs FOR UPDATE NOWAIT")) == 3200, "a lock was left"


def test_rows_of_a_copy_that_failed_reach_no_file_that_is_opened_later(holding, db, pipe, tmp_path):
    # GIVEN a copy that the server ends half way, so that rows are left in the holder's buffer
    tables.fill(db.connection, rows=3000, first="2023-01-01", last="2023-12-31", start=1000)
    holder = holding()
    stuck_copy(holder, *pipe)
    db.admin("SELECT pg_cancel_backend(%s)", (backends(db, "audit-archiver batch%")[0][0],))
    drain(pipe[0], lambda: holder.operations.failure is not None, pipe[1])
    until(lambda: not holder.operations.open_batches(), "it is rolled back")
    # WHEN other files get the descriptors' numbers, and what is left of the copy is forgotten
    others = [os.open(tmp_path / f"other-{n}", os.O_CREAT | os.O_RDWR) for n in range(8)]
    holder.operations.failure = None
    gc.collect()
    # THEN the buffer was not written into one of them
    assert [os.fstat(each).st_size for each in others] == [0] * 8
    for each in others:
        os.close(each)


def test_an_empty_batch_at_the_end_of_a_failed_pipeline_does_not_make_the_table_swept(holding, db):
    """Found by a kill of aa-serialize: the run went on with nothing to do, and ended with 0 and 150 rows in the table."""
    # GIVEN a batch with rows, and the empty one after the last row, whose stage is about to give it up
    holder = holding()
    operations, job = holder.operations, plan(holder.settings, "audit_logs", batch_size=500)
    first, second = holder.client(), holder.client()
    handle = first.call("begin", job=job)["handle"]
    found = first.call("lock", handle=handle, cursor=None, limit=found_rows(db))
    empty = second.call("begin", job=job)["handle"]
    assert second.call("lock", handle=empty, cursor=found["next"], limit=500)["rows"] == 0
    last = operations.batches[empty]
    # WHEN the pipeline fails at that moment, so that the first one is rolled back
    with last.busy:
        failing = threading.Thread(target=operations.fail, args=(Failed("a stage was killed"),))
        failing.start()
        failing.join()
        assert handle not in operations.batches
        operations.abandon(empty)
    # THEN the next attempt has everything to do
    assert not last.notes.swept and last.notes.unfinished()["cursor"] is None


def found_rows(db: Any) -> int:
    """The rows of the table that are due: exactly so many fill a batch."""
    return int(db.scalar("SELECT count(*) FROM audit_logs WHERE created_at < '2025-01-01'"))
