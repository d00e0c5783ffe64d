"""What the holder commits: only what it deleted itself, only with the command tag COMMIT, and never by guessing."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import psycopg2.extensions
import pytest

from audit_archiver.exits import ArchiverError, Failed, InputError, Mismatch, NetworkError
from audit_archiver.holder import commit
from audit_archiver.holder.batch import Batch
from audit_archiver.postgres import connect
from audit_archiver.postgres.transaction import Transaction
from tests.ground import tables
from tests.ground.held import Holder, NoServer, backends, lock_row, plan, vouched
from tests.ground.proxy import Proxy
from tests.ground.wait import PATIENCE, until
from tests.pipes.conftest import rows_left

ROWS = 40


@pytest.fixture()
def deleted(holding) -> tuple[Holder, dict[str, Any]]:
    """A holder and the line of its one batch, deleted and not yet committed."""
    holder = holding()
    return holder, holder.delete(holder.verified(plan(holder.settings, "audit_logs"))).lines[0]


# -- only what it deleted itself

@pytest.mark.req("REQ-TXN-001", "REQ-INT-002")
def test_a_deleted_batch_is_committed_once_and_the_line_says_by_what(deleted, db):
    holder, line = deleted
    assert rows_left(db) == 40, "it was committed before its line came out"
    committed = holder.commit(line)["committed"]
    assert rows_left(db) == 20
    assert committed["xid"] == line["batch"]["txn"]["xid"] and committed["by"] == "holder" and committed["sample_absent"] is True
    assert db.scalar("SELECT txid_status(%s)", (int(committed["xid"]),)) == "committed"
    with pytest.raises(Failed, match="was not deleted by this holder"):
        holder.commit(line)


def test_a_batch_that_was_not_deleted_is_not_committed(holding, db):
    holder = holding()
    line = holder.verified(plan(holder.settings, "audit_logs"))[0]
    line["deleted"] = {"at": line["verified"]["at"], "verdict": "FULL", "rows": 20}
    with pytest.raises(Failed, match="was not deleted by this holder"):
        holder.commit(line)
    assert rows_left(db) == 40


@pytest.mark.parametrize("place, value", [
    (("batch", "txn", "handle"), "t1-0123456789abcdef"), (("batch", "txn", "holder"), "h-00000000"), (("batch", "txn"), None),
])
def test_a_line_with_a_foreign_handle_or_holder_is_not_committed(deleted, db, place, value):
    holder, line = deleted
    with pytest.raises(Failed, match="was not deleted by this holder"):
        holder.commit(edited(line, place, value))
    assert rows_left(db) == 40


def test_a_line_that_was_edited_after_the_delete_is_not_committed(deleted, db):
    holder, line = deleted
    for place, value in (
            (("batch", "keys_sha256"), "0" * 64), (("batch", "rows"), 19), (("batch", "number"), 2), (("batch", "table"), "other"),
            (("serialized", "stem"), "archives/elsewhere"), (("serialized", "data", "gz_sha256"), "0" * 64),
            (("uploaded", "bucket"), "other"), (("uploaded", "etags"), ["x", "y", "z"]), (("verified", "sample"), []),
            (("verified", "at"), "2020-01-01T00:00:00Z"), (("deleted", "rows"), 19), (("deleted", "verdict"), "SUBSET"),
            (("deleted", "left_out"), [1])):
        with pytest.raises(Failed, match="was altered after its rows were deleted"):
            holder.commit(edited(line, place, value))
    assert rows_left(db) == 40
    holder.commit(line)
    assert rows_left(db) == 20, "the line as it was is committed all the same"


def edited(line: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(line)
    inner = made
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return made


def test_a_line_of_an_earlier_holder_is_refused_at_the_delete(holding, db):
    with holding() as earlier:
        line = earlier.verified(plan(earlier.settings, "audit_logs"))[0]
    later = holding()
    refused = later.delete([line])
    assert refused.rc == 2 and "not selected in this holder's transaction" in refused.err
    assert rows_left(db) == 40


@pytest.mark.req("REQ-INT-001", "REQ-TXN-005")
def test_a_line_that_was_not_verified_is_refused_at_the_delete(holding, db):
    holder = holding()
    line = holder.verified(plan(holder.settings, "audit_logs"))[0]
    unverified = {key: value for key, value in line.items() if key != "verified"}
    refused = holder.delete([unverified])
    assert refused.rc == 2 and "was not verified" in refused.err
    with pytest.raises(Failed, match="stopped"):
        holder.client().call("delete", handle=line["batch"]["txn"]["handle"], batch=unverified)
    assert rows_left(db) == 40


@pytest.mark.req("REQ-INT-005", "REQ-VER-004", "REQ-VER-005", "REQ-VER-008")
@pytest.mark.parametrize("verified", [{"rows": 19}, {"sha256": "0" * 64}, {"keys_sha256": "0" * 64}])
def test_the_holder_itself_refuses_a_batch_whose_verified_counts_or_digests_differ(holding, db, verified):
    holder = holding()
    line = holder.verified(plan(holder.settings, "audit_logs"))[0]
    with pytest.raises(ArchiverError, match="what was verified is not what was copied"):
        holder.client("aa-delete").call("delete", handle=line["batch"]["txn"]["handle"], batch=vouched(line, **verified))
    assert isinstance(holder.operations.failure, Mismatch)
    assert holder.operations.open_batches() == []
    assert rows_left(db) == 40


def test_the_holder_refuses_a_mark_that_is_older_than_an_hour(holding, db):
    holder = holding()
    lines = [vouched(line, at="2024-01-01T00:00:00Z") for line in holder.verified(plan(holder.settings, "audit_logs"))]
    refused = holder.delete(lines)
    assert refused.rc == 2 and "was verified at 2024-01-01T00:00:00Z, more than an hour ago" in refused.err
    assert rows_left(db) == 40


def test_the_holder_itself_refuses_a_batch_that_it_did_not_lock_and_copy_like_this(holding, db):
    for place, value in ((("batch", "rows"), 19), (("batch", "keys_sha256"), "0" * 64), (("batch", "schema"), "audit"),
                         (("batch", "table"), "audit_log"), (("batch", "number"), 2), (("batch", "archived_at"), "2020-01-01T00:00:00Z"),
                         (("batch", "columns"), [["id", "bigint"]]), (("batch", "txn", "xid"), "1"),
                         (("batch", "server", "system"), "1"), (("serialized", "rows_sha256"), "0" * 64)):
        with holding() as holder:
            line = holder.verified(plan(holder.settings, "audit_logs"))[0]
            with pytest.raises(ArchiverError, match="is not the batch that this transaction locked and copied"):
                holder.client("aa-delete").call("delete", handle=line["batch"]["txn"]["handle"], batch=edited(line, place, value))
            assert isinstance(holder.operations.failure, Mismatch), place
    assert rows_left(db) == 40


@pytest.mark.req("T8")
def test_a_table_with_the_same_rows_does_not_pass_for_another(holding, db):
    db.execute("CREATE SCHEMA audit")
    db.execute("CREATE TABLE audit.audit_logs (LIKE public.audit_logs INCLUDING ALL)")
    db.execute("INSERT INTO audit.audit_logs SELECT * FROM public.audit_logs")
    holder = holding()
    ours, other = holder.verified(plan(holder.settings, "audit_logs"), plan(holder.settings, "audit_logs", schema="audit"))
    assert ours["serialized"]["rows_sha256"] == other["serialized"]["rows_sha256"] and ours["batch"]["id"] != other["batch"]["id"]
    swapped = {**ours, "batch": {**ours["batch"], "txn": other["batch"]["txn"]}}
    with pytest.raises(ArchiverError, match="is not the batch"):
        holder.client("aa-delete").call("delete", handle=other["batch"]["txn"]["handle"], batch=swapped)
    assert rows_left(db) == 40


# -- COMMIT

def test_a_commit_that_is_answered_with_rollback_is_no_commit(deleted, db, monkeypatch):
    """PostgreSQL answers ROLLBACK to the COMMIT of a transaction with a swallowed error, and raises nothing (C4)."""
    holder, line = deleted
    really = Transaction.commit

    def commit_after_a_swallowed_error(self: Transaction) -> str:
        with contextlib.suppress(ArchiverError):
            connect.execute(self.connection, "SELECT 1/0")
        return really(self)

    monkeypatch.setattr(Transaction, "commit", commit_after_a_swallowed_error)
    with pytest.raises(Failed, match="COMMIT was answered with 'ROLLBACK', so nothing was deleted"):
        holder.commit(line)
    assert rows_left(db) == 40


def test_a_session_that_has_left_its_transaction_is_ended_at_the_next_step(holding, db):
    """After a COMMIT behind our back FOR UPDATE holds nothing any more, and a DELETE would be permanent (C4)."""
    for slip in ("COMMIT", "ROLLBACK", "COMMIT; BEGIN", "ROLLBACK; BEGIN; SELECT txid_current()"):
        with holding() as holder:
            line = holder.verified(plan(holder.settings, "audit_logs"))[0]
            batch = holder.operations.batches[line["batch"]["txn"]["handle"]]
            with batch.transaction.connection.cursor() as cursor:
                cursor.execute(slip)
            refused = holder.delete([line])
            assert refused.rc in (2, 7), slip
            assert batch.transaction.connection.closed, slip
            assert holder.operations.failure is not None
    assert rows_left(db) == 40


def test_sessions_run_in_autocommit_so_that_no_begin_is_ever_implied(deleted):
    holder, _ = deleted
    session = next(iter(holder.operations.sessions.values()))
    for each in (session.control, *(batch.transaction.connection for batch in holder.operations.open_batches())):
        assert each.autocommit and each.isolation_level is None


def test_a_deferred_constraint_fails_the_delete_and_not_the_commit(holding, db):
    db.execute("CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not this one'; END $$")
    db.execute("CREATE CONSTRAINT TRIGGER late AFTER DELETE ON audit_logs DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION no()")
    holder = holding()
    refused = holder.delete(holder.verified(plan(holder.settings, "audit_logs")))
    assert refused.rc == 2 and refused.out == b""
    assert holder.operations.open_batches() == []
    assert rows_left(db) == 40


def test_a_connection_that_breaks_before_the_commit_commits_nothing(deleted, db):
    holder, line = deleted
    db.admin("SELECT pg_terminate_backend(%s)", (backends(db, "audit-archiver batch%")[0][0],))
    with pytest.raises(NetworkError) as caught:
        holder.commit(line)
    assert "committed" not in line and caught.value.code == 7
    assert rows_left(db) == 40


def test_a_failure_that_comes_while_a_commit_waits_for_its_turn_stops_it(deleted, db):
    holder, line = deleted
    holder.operations.fail(Failed("aa-verify ended with code 2"))
    with pytest.raises(Failed, match="is not committed: aa-verify ended with code 2"):
        holder.commit(line)
    assert rows_left(db) == 40
    assert db.execute("SELECT id FROM audit_logs FOR UPDATE NOWAIT") != []


# -- COMMIT over a network that fails

@pytest.fixture()
def tcp(db, pg, config_file) -> Iterator[tuple[Proxy, Path]]:
    """The same table behind a TCP proxy, and a configuration that goes through it."""
    tables.create(db.connection, rows=40, first="2024-01-01", last="2025-12-31")
    with Proxy(f"{pg.host}/.s.PGSQL.{pg.port}") as proxy:
        yield proxy, config_file(db, NoServer, database={"host": "127.0.0.1", "port": proxy.port, "sslmode": "disable"})


def at_commit(monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None]) -> None:
    """Make the fault in the moment before COMMIT is sent."""
    really = Transaction.commit

    def commit_with_fault(self: Transaction) -> str:
        fault()
        return really(self)

    monkeypatch.setattr(Transaction, "commit", commit_with_fault)


def test_a_commit_whose_answer_never_comes_is_in_doubt_and_blocks_nobody(tcp, db, monkeypatch):
    proxy, path = tcp
    with Holder(path) as holder:
        line = holder.delete(holder.verified(plan(holder.settings, "audit_logs"))).lines[0]
        at_commit(monkeypatch, lambda: setattr(proxy, "stall_down", True))
        began = time.monotonic()
        with pytest.raises(commit.InDoubt, match="its answer is unknown") as caught:
            holder.commit(line, deadline_s=0.3)
        assert caught.value.code == 7 and "committed" not in line
        # THEN the truth is decided by the server: COMMIT had arrived
        until(lambda: rows_left(db) == 20, "the server has committed")
        holder.operations.fail(caught.value)
        proxy.stall_down = False
        proxy.cut()
    assert time.monotonic() - began < 20 * PATIENCE


def test_a_connection_cut_before_commit_arrives_is_in_doubt_and_the_rows_stay(tcp, db, monkeypatch):
    proxy, path = tcp
    with Holder(path) as holder:
        line = holder.delete(holder.verified(plan(holder.settings, "audit_logs"))).lines[0]
        at_commit(monkeypatch, proxy.cut)
        with pytest.raises(commit.InDoubt):
            holder.commit(line)
        assert "committed" not in line
        until(lambda: backends(db, "audit-archiver batch%") == [], "the server has noticed")
        assert rows_left(db) == 40


def test_a_committed_batch_whose_facts_cannot_be_asked_any_more_is_in_doubt_too(deleted, db):
    holder, line = deleted
    next(iter(holder.operations.sessions.values())).control.close()
    with pytest.raises(commit.InDoubt, match="is committed, but the control connection broke") as caught:
        holder.commit(line)
    assert caught.value.code == 7
    assert rows_left(db) == 20


def test_a_committed_batch_whose_rows_cannot_be_looked_for_is_in_doubt_and_no_connection_is_blamed(deleted, db):
    holder, line = deleted
    connect.execute(next(iter(holder.operations.sessions.values())).control, "SET lock_timeout = '100ms'")
    somebody = db.connect()
    waiting = threading.Thread(target=lock_row, args=(somebody, "LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE"))
    waiting.start()
    until(lambda: db.admin("SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'")[0][0], "somebody waits for the table")
    with pytest.raises(commit.InDoubt, match="is committed, but whether its rows are gone could not be asked: ") as caught:
        holder.commit(line)
    waiting.join()
    somebody.close()
    assert "connection" not in str(caught.value) and rows_left(db) == 20


def test_a_server_that_falls_silent_holds_up_neither_the_end_nor_the_other_threads(tcp, db, monkeypatch):
    """psycopg2's cancel() would keep every thread of the process from running as long as the network is silent (S1)."""
    from audit_archiver.holder import session
    from audit_archiver.postgres import locks, transaction
    for module, name in ((session, "CANCEL_WITHIN_S"), (locks, "SETTLE_S"), (transaction, "ROLLBACK_WITHIN_S")):
        monkeypatch.setattr(module, name, 0.3)
    proxy, path = tcp
    holder = Holder(path)
    line = holder.verified(plan(holder.settings, "audit_logs"))[0]
    proxy.stall = True
    client = holder.client("aa-delete")
    client._socket.sendall(json.dumps({"op": "delete", "handle": line["batch"]["txn"]["handle"], "batch": line}).encode() + b"\n")
    batch = holder.operations.open_batches()[0]
    until(lambda: not _free(batch), "the delete waits for the server")
    began = time.monotonic()
    holder.operations.fail(Failed("stopped by a second signal"))
    holder.close()
    assert time.monotonic() - began < 10 * PATIENCE
    proxy.stall = False
    proxy.cut()
    until(lambda: backends(db) == [], "every session is gone")
    assert rows_left(db) == 40


def _free(batch: Batch) -> bool:
    taken = batch.busy.acquire(blocking=False)
    if taken:
        batch.busy.release()
    return taken


# -- after COMMIT

@pytest.mark.req("REQ-VER-017", "REQ-VER-018", "REQ-VER-019", "REQ-VER-020")
def test_sampled_keys_that_are_back_after_the_commit_are_noticed_and_do_not_fail(deleted, db, monkeypatch):
    holder, line = deleted
    db.execute("CREATE TABLE kept AS SELECT * FROM audit_logs WHERE id = 1")
    really = commit._send

    def somebody_restores_a_row(*args: Any) -> None:
        really(*args)
        db.execute("INSERT INTO audit_logs SELECT * FROM kept")

    monkeypatch.setattr(commit, "_send", somebody_restores_a_row)
    assert holder.commit(line)["committed"]["sample_absent"] is False
    assert rows_left(db) == 21


def test_the_sample_is_asked_for_by_names_and_keys_full_of_percent_signs_and_quotes(holding, db):
    db.execute('''CREATE TABLE "100%s '%(t)s" ("k%s" text, "%" int, created_at timestamptz, PRIMARY KEY ("k%s", "%"))''')
    db.execute('''INSERT INTO "100%s '%(t)s" SELECT '%s ''"\\é%' || i, i, '2024-01-01'::timestamptz FROM generate_series(1, 30) i''')
    holder = holding()
    (line,) = holder.archive(plan(holder.settings, "100%s '%(t)s", key=("k%s", "%")))
    assert line["committed"]["sample_absent"] is True and line["deleted"]["rows"] == 30


def test_a_batch_that_was_verified_by_head_only_has_no_sample_and_commits(holding, db):
    holder = holding()
    lines = [vouched(line, how="head", sample=[]) for line in holder.verified(plan(holder.settings, "audit_logs"))]
    assert holder.commit(holder.delete(lines).lines[0])["committed"]["sample_absent"] is True
    assert rows_left(db) == 20


def test_a_batch_connection_is_used_again_and_stays_pinned(holding, db):
    holder = holding()
    for cutoff in ("2024-06-01T00:00:00Z", "2025-01-01T00:00:00Z"):
        holder.archive(plan(holder.settings, "audit_logs", cutoff=cutoff))
    assert len(backends(db, "audit-archiver batch%")) == 1
    assert rows_left(db) == 20


def test_a_surplus_section_or_a_line_that_is_none_is_refused_by_the_reader_of_the_pipe(deleted, db):
    from audit_archiver.formats import batch as batches
    _, line = deleted
    for text in (b"{}\n", b"row\n", json.dumps({**line, "extra": 1}).encode() + b"\n"):
        with pytest.raises(InputError):
            batches.parse(text, needs=("verified", "deleted"), lacks=("committed",))
    assert rows_left(db) == 40


@pytest.mark.req("REQ-TXN-006")
def test_transactions_are_read_committed_and_their_status_is_open_between_the_steps(deleted):
    holder, _ = deleted
    connection = holder.operations.open_batches()[0].transaction.connection
    assert connection.get_transaction_status() == psycopg2.extensions.TRANSACTION_STATUS_INTRANS
    assert connect.scalar(connection, "SHOW transaction_isolation") == "read committed"
