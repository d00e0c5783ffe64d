"""The holder's sessions: the locks K1 and K2, the pins, and what the server ends by itself."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import config
from audit_archiver.exits import ArchiverError, LockHeld, NetworkError, PermissionDenied, Retryable
from audit_archiver.holder import server as servers
from audit_archiver.holder.session import Standing
from audit_archiver.postgres import connect, locks
from tests.ground import tables
from tests.ground.held import WHOLE, Holder, NoServer, backends, lock_row, plan
from tests.ground.wait import until
from tests.pipes.conftest import rows_left

ROWS = 40


def token(control: connect.Connection) -> int:
    """The fencing token of the lock that is held on `control`."""
    return int(connect.scalar(control, "SELECT split_part(current_setting('application_name'), ' #', 2)"))


# -- K1 and K2

@pytest.mark.req("REQ-LOCK-011", "REQ-SCH-002", "REQ-REL-005")
def test_a_second_driver_is_refused_and_told_by_whom_and_since_when(holding, db):
    first, second = holding(), holding()
    first.begun(plan(first.settings, "audit_logs"))
    control = backends(db, "audit-archiver control%")[0][0]
    with pytest.raises(LockHeld) as caught:
        second.begun(plan(second.settings, "audit_logs"))
    assert caught.value.code == 4
    assert f"is locked by another run: backend {control} ('audit-archiver control 20251230T021545Z-4711', archiver from local socket, since 20" \
        in caught.value.msg
    assert second.select(plan(second.settings, "audit_logs")).rc == 4
    assert second.operations.failure.code == 4


@pytest.mark.req("REQ-LOCK-014")
def test_a_driver_that_has_ended_keeps_nobody_out_not_even_for_a_moment(holding, db):
    for _ in range(5):
        holder = holding()
        holder.copied(plan(holder.settings, "audit_logs"))
        holder.close()
    assert rows_left(db) == 40


def test_a_driver_that_was_refused_does_not_get_in_the_way_of_the_one_that_runs(holding, db, monkeypatch):
    first, second = holding(), holding()
    first.copied(plan(first.settings, "audit_logs"))
    asked: list[Any] = []
    monkeypatch.setattr(locks, "give_up", lambda *args: asked.append(args))
    with pytest.raises(LockHeld):
        second.begun(plan(second.settings, "audit_logs"))
    second.close()
    assert asked == [], "it asked for K2, which would refuse the other one's next batch"
    monkeypatch.undo()
    assert first.begun(plan(first.settings, "audit_logs"))["number"] == 2


def test_a_transaction_that_an_earlier_driver_left_keeps_the_next_one_out(holding, db):
    """Its control connection is gone, and K1 with it, but it may still commit: only K2 shows it (C2, C3)."""
    first = holding()
    first.copied(plan(first.settings, "audit_logs"))
    db.admin("SELECT pg_terminate_backend(%s)", (backends(db, "audit-archiver control%")[0][0],))
    until(lambda: not backends(db, "audit-archiver control%"), "the control session is gone")
    left = backends(db, "audit-archiver batch%")[0][0]
    with pytest.raises(LockHeld, match=f"a transaction of an earlier run is still open .*: backend {left} ") as caught:
        second = holding()
        second.begun(plan(second.settings, "audit_logs"))
    assert caught.value.code == 4


@pytest.mark.req("REQ-LOCK-016", "T42")
def test_a_driver_that_lost_its_lock_deletes_nothing(holding, db):
    holder = holding()
    lines = holder.verified(plan(holder.settings, "audit_logs"))
    db.admin("SELECT pg_terminate_backend(%s)", (backends(db, "audit-archiver control%")[0][0],))
    until(lambda: not backends(db, "audit-archiver control%"), "the control session is gone")
    refused = holder.delete(lines)
    assert refused.rc == 4 and "no longer holds the lock, so nothing is deleted" in refused.err
    assert holder.operations.open_batches() == []
    assert rows_left(db) == 40


def test_a_driver_whose_lock_another_one_has_taken_deletes_nothing(holding, db):
    holder = holding()
    lines = holder.verified(plan(holder.settings, "audit_logs"))
    control = next(iter(holder.operations.sessions.values())).control
    connect.scalar(control, "SELECT pg_advisory_unlock_all()")
    other = connect.connect(holder.settings.databases[0], purpose="control")
    assert connect.scalar(other, f"SELECT pg_try_advisory_lock({locks.K1_CLASS}, {locks.DATABASE})")
    assert holder.delete(lines).rc == 4
    assert rows_left(db) == 40
    other.close()


@pytest.mark.req("REQ-LOCK-015")
def test_a_lost_control_connection_is_noticed_without_any_batch(holding, db, monkeypatch):
    monkeypatch.setattr(servers, "WATCH_EVERY_S", 0.02)
    holder = holding()
    monkeypatch.setattr(holder.operations, "config", dataclasses.replace(holder.settings, locking=config.Locking(heartbeat_s=0.02)))
    holder.begun(plan(holder.settings, "audit_logs"))
    db.admin("SELECT pg_terminate_backend(%s)", (backends(db, "audit-archiver control%")[0][0],))
    assert until(lambda: holder.operations.failure, "the holder notices").code == 7


def test_two_databases_do_not_exclude_each_other(holding, pg, db):
    first = holding()
    first.begun(plan(first.settings, "audit_logs"))
    with pg.connect("postgres") as elsewhere, elsewhere.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", (locks.K1_CLASS, locks.DATABASE))
        assert cursor.fetchone() == (True,)
    elsewhere.close()


# -- the scope of a table

@pytest.fixture()
def per_table(db, config_file, path) -> Path:
    """The same with locking.scope: table, and a second table."""
    tables.create(db.connection, "public.other", rows=40, first="2024-01-01", last="2025-12-31")
    return config_file(db, NoServer, tables=[{"name": name, "timestamp_column": "created_at", "primary_key": "id"}
                                             for name in ("audit_logs", "other")], locking={"scope": "table"})


def test_runs_of_different_tables_go_side_by_side_and_those_of_one_do_not(holding, per_table, db):
    first, second = holding(per_table), holding(per_table)
    first.begun(plan(first.settings, "audit_logs"))
    lines = second.verified(plan(second.settings, "audit_logs"), plan(second.settings, "other"))
    assert [line["batch"]["table"] for line in lines] == ["other"], "the locked table fails alone"
    notes = {key[2]: each.error for key, each in second.operations.notes.items()}
    assert notes["audit_logs"].code == 4 and "is locked by another run: backend" in notes["audit_logs"].msg
    assert notes["other"] is None
    second.commit(second.delete(lines).lines[0])
    assert db.scalar("SELECT count(*) FROM other") == 20 and rows_left(db) == 40


def test_a_run_of_the_database_and_a_run_of_a_table_exclude_each_other(holding, per_table, path, db):
    with holding(per_table) as of_table:
        of_table.begun(plan(of_table.settings, "other"))
        of_database = holding()
        with pytest.raises(LockHeld):
            of_database.begun(plan(of_database.settings, "audit_logs"))
    with holding() as of_database:
        of_database.begun(plan(of_database.settings, "audit_logs"))
        of_table = holding(per_table)
        with pytest.raises(ArchiverError) as caught:
            of_table.begun(plan(of_table.settings, "other"))
        assert caught.value.code == 4


def test_a_transaction_that_a_run_of_the_database_left_keeps_a_run_of_a_table_out(holding, per_table, db):
    of_database = holding()
    of_database.copied(plan(of_database.settings, "audit_logs"))
    db.admin("SELECT pg_terminate_backend(%s)", (backends(db, "audit-archiver control%")[0][0],))
    until(lambda: not backends(db, "audit-archiver control%"), "the control session is gone")
    left = backends(db, "audit-archiver batch%")[0][0]
    of_table = holding(per_table)
    with pytest.raises(ArchiverError, match=f"run of the whole database is still open.*: backend {left} ") as caught:
        of_table.begun(plan(of_table.settings, "audit_logs"))
    assert caught.value.code == 4


def test_a_transaction_that_a_run_of_another_table_left_keeps_nobody_out(holding, per_table, db):
    of_other = holding(per_table)
    of_other.copied(plan(of_other.settings, "other"))
    db.admin("SELECT pg_terminate_backend(%s)", (backends(db, "audit-archiver control%")[0][0],))
    until(lambda: not backends(db, "audit-archiver control%"), "the control session is gone")
    of_ours = holding(per_table)
    assert of_ours.begun(plan(of_ours.settings, "audit_logs"))["number"] == 1
    with pytest.raises(ArchiverError, match="a transaction of an earlier run is still open"):
        of_ours.begun(plan(of_ours.settings, "other"))


def test_recovery_runs_after_the_lock_and_before_the_first_batch(holding, db):
    seen: list[Any] = []

    def recover(database: Any, control: Any, wanted: Any) -> Standing:
        seen.append((wanted, locks.still_held(control, control.info.backend_pid, token(control), None), backends(db, "audit-archiver batch%")))
        return Standing({})

    holder = holding(recover=recover)
    holder.begun(plan(holder.settings, "audit_logs"))
    holder.begun(plan(holder.settings, "audit_logs"))
    assert seen == [(None, True, [])]


def test_a_table_that_recovery_holds_back_is_refused_and_the_others_go_on(holding, db):
    tables.create(db.connection, "public.other", rows=40, first="2024-01-01", last="2025-12-31")
    holder = holding(recover=lambda *_: Standing({("public", "audit_logs"): "2 rows of batch_003 differ"}))
    lines = holder.verified(plan(holder.settings, "audit_logs"), plan(holder.settings, "other"))
    assert [line["batch"]["table"] for line in lines] == ["other"]
    note = next(each for key, each in holder.operations.notes.items() if key[2] == "audit_logs")
    assert "is held back: 2 rows of batch_003 differ" in note.error.msg


def test_a_recovery_that_fails_lets_nothing_begin_and_frees_the_lock(holding, db):
    def recover(*_: Any) -> Standing:
        raise NetworkError("the store cannot be reached")

    holder = holding(recover=recover)
    assert holder.select(plan(holder.settings, "audit_logs")).rc == 7
    until(lambda: backends(db) == [], "no session is left")


# -- what each session is

def test_each_session_says_what_it_does_and_for_which_run(holding, db):
    holder = holding()
    holder.begun(plan(holder.settings, "audit_logs"))
    control = next(iter(holder.operations.sessions.values())).control
    assert [name for _, name, _ in backends(db)] == [f"audit-archiver control 20251230T021545Z-4711 #{token(control)}",
                                                     "audit-archiver watch 20251230T021545Z-4711", "audit-archiver batch 20251230T021545Z-4711"]


SETTINGS = {
    "synchronous_commit": "off", "timezone": "Asia/Kathmandu", "datestyle": "German, DMY", "intervalstyle": "sql_standard",
    "extra_float_digits": "-15", "bytea_output": "escape", "default_transaction_read_only": "on", "xmloption": "document",
    "array_nulls": "off", "search_path": "nowhere", "row_security": "on", "default_transaction_isolation": "serializable",
    "standard_conforming_strings": "off", "statement_timeout": "5s", "lock_timeout": "5s", "idle_in_transaction_session_timeout": "5s",
    "transform_null_equals": "on", "quote_all_identifiers": "on", "default_transaction_deferrable": "on", "jit": "on",
}


@pytest.mark.req("T17")
def test_settings_of_the_role_and_the_database_change_neither_a_byte_nor_a_commit(holding, db):
    """GIVEN the same rows archived under the server's own settings and under settings made to do harm."""
    db.execute("ALTER TABLE audit_logs ADD spent interval DEFAULT '-1 mon +2 days', ADD ratio float8 DEFAULT 0.1::float8/3, "
               "ADD day date DEFAULT '2024-02-01', ADD at timestamp DEFAULT '2024-02-01 12:00', ADD words text[] DEFAULT ARRAY[NULL, 'NULL']")
    with Holder(Path(holding().env["AA_CONFIG"])) as plain:
        job = plan(plain.settings, "audit_logs")
        expected = plain.verified(job)[0]["serialized"]["rows_sha256"]
    for name, value in SETTINGS.items():
        db.admin(f"ALTER ROLE archiver IN DATABASE {db.name} SET {name} = '{value}'" if len(name) % 2 else
                 f"ALTER DATABASE {db.name} SET {name} = '{value}'")
    holder = holding()
    lines = holder.verified(job)
    assert lines[0]["serialized"]["rows_sha256"] == expected
    batch = holder.operations.open_batches()[0].transaction.connection
    shown = {name: connect.scalar(batch, f"SHOW {name}") for name in SETTINGS}
    assert shown["synchronous_commit"] == "on" and shown["row_security"] == "off" and shown["search_path"] == "pg_catalog"
    assert shown["statement_timeout"] == "30min" and shown["lock_timeout"] == "10s"
    assert [name for name, value in shown.items() if value == SETTINGS[name] and name not in ("default_transaction_deferrable",)] == []
    holder.commit(holder.delete(lines).lines[0])
    assert connect.scalar(next(iter(holder.operations.sessions.values())).control, "SELECT count(*) FROM public.audit_logs") == 20


def test_options_of_the_environment_do_not_win(holding, path, monkeypatch):
    monkeypatch.setenv("PGOPTIONS", "-c synchronous_commit=off -c timezone=Asia/Kathmandu -c statement_timeout=1 -c log_statement_stats=on")
    monkeypatch.setenv("PGAPPNAME", "something else")
    monkeypatch.setenv("PGTZ", "Asia/Kathmandu")
    monkeypatch.setenv("PGDATESTYLE", "German")
    connection = connect.connect(config.load(str(path), {}).databases[0], purpose="batch", run="r", transaction_timeout_s=7)
    shown = connect.row(connection, "SELECT current_setting('synchronous_commit'), current_setting('timezone'), current_setting('datestyle'), "
                        "current_setting('statement_timeout'), current_setting('application_name')")
    assert shown == ("on", "UTC", "ISO, MDY", "7s", "audit-archiver batch r")
    connection.close()


def test_a_stronger_synchronous_commit_of_the_server_is_kept(holding, path, db):
    db.admin(f"ALTER DATABASE {db.name} SET synchronous_commit = 'remote_apply'")
    connection = connect.connect(config.load(str(path), {}).databases[0], purpose="batch")
    assert connect.scalar(connection, "SHOW synchronous_commit") == "remote_apply"
    connection.close()


def test_a_session_that_would_fire_no_triggers_is_set_right_or_refused(holding, path, db):
    """Under session_replication_role = replica a DELETE fires no trigger and checks no foreign key."""
    db.admin(f"ALTER ROLE archiver IN DATABASE {db.name} SET session_replication_role = 'replica'")
    settings = config.load(str(path), {})
    with pytest.raises(PermissionDenied, match="session_replication_role"):
        connect.connect(settings.databases[0], purpose="batch")
    db.admin(f"ALTER ROLE archiver IN DATABASE {db.name} RESET session_replication_role")
    db.admin(f"ALTER DATABASE {db.name} SET session_replication_role = 'replica'")
    connection = connect.connect(dataclasses.replace(settings.databases[0], user="postgres"), purpose="batch")
    assert connect.scalar(connection, "SHOW session_replication_role") == "origin"
    connection.close()


@pytest.mark.req("REQ-TXN-007")
def test_the_server_itself_ends_a_transaction_whose_holder_is_frozen(holding, db):
    """The holder asks nothing after lock: as if it had been stopped. The server needs none of us to free the rows (S6)."""
    holder = holding(database={"transaction_timeout_s": 2})
    client = holder.client()
    begun = client.call("begin", job=plan(holder.settings, "audit_logs"))
    assert client.call("lock", handle=begun["handle"], cursor=None, limit=20)["rows"] == 20
    assert len(db.execute("SELECT id FROM audit_logs WHERE created_at < '2025-01-01' FOR UPDATE SKIP LOCKED")) == 0
    until(lambda: not backends(db, "audit-archiver batch%"), "the server ends the session")
    assert len(db.execute("SELECT id FROM audit_logs WHERE created_at < '2025-01-01' FOR UPDATE SKIP LOCKED")) == 20
    with pytest.raises(NetworkError):
        client.call("probe", handle=begun["handle"])
    assert holder.operations.failure.code == 7


@pytest.mark.req("REQ-TXN-007", "REQ-TXN-010")
def test_a_copy_whose_reader_is_frozen_ends_with_its_time(holding, db, monkeypatch):
    """No timeout of the server ends a COPY that waits for its client to read: the holder must do it, and end the reader."""
    tables.fill(db.connection, rows=5000, first="2023-01-01", last="2023-12-31", start=1000)
    monkeypatch.setattr(servers, "WATCH_EVERY_S", 0.05)
    holder = holding()

    def grow_old() -> None:
        batch = until(holder.operations.open_batches, "a batch is open")[0]  # the next one may be open and locked already
        until(lambda: "active" in [each[2] for each in backends(db, "audit-archiver batch%")] and batch.state == "locked", "its rows are copied")
        until(lambda: not _moves(db), "the server waits for the reader")
        batch.begun_at -= 1801

    threading.Thread(target=grow_old, daemon=True).start()
    frozen = WHOLE.replace("aa-serialize", "sh -c 'kill -STOP $$; exec aa-serialize'")
    failure, out = holder.command(frozen, plan(holder.settings, "audit_logs", batch_size=5000))
    assert isinstance(failure, Retryable) and failure.retry and out == []
    assert "its transaction is 180" in failure.msg and "the limit is 1800 s" in failure.msg
    assert holder.operations.failed_job == (db.name, "public", "audit_logs"), "so that it is tried again with fewer rows"
    holder.close()
    assert len(db.execute("SELECT id FROM audit_logs FOR UPDATE NOWAIT")) == 5040


def _moves(db) -> bool:
    """True unless a batch's session is seen waiting for its client."""
    waits = db.admin("SELECT wait_event FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'audit-archiver batch%%'", (db.name,))
    return ("ClientWrite",) not in waits


# -- giving way

@pytest.mark.req("T35")
def test_a_migration_that_waits_for_the_table_gets_it(holding, db, monkeypatch):
    monkeypatch.setattr(servers, "WATCH_EVERY_S", 0.05)
    holder = holding()
    monkeypatch.setattr(holder.operations, "config", dataclasses.replace(holder.settings, locking=config.Locking(others_wait_s=0.2)))
    lines = holder.verified(plan(holder.settings, "audit_logs"))
    migrating = db.connect()
    done = threading.Thread(target=lambda: migrating.cursor().execute("ALTER TABLE audit_logs ADD COLUMN verdict text"), daemon=True)
    done.start()
    failure = until(lambda: holder.operations.failure, "the holder gives way")
    assert isinstance(failure, Retryable) and "waits for an exclusive lock on the table" in failure.msg and failure.retry
    done.join(20)
    assert not done.is_alive()
    assert holder.delete(lines).rc == 2
    assert rows_left(db) == 40
    migrating.close()


def test_rows_are_not_kept_locked_for_a_pipeline_that_has_no_delete(holding, db, monkeypatch):
    monkeypatch.setattr(servers, "WATCH_EVERY_S", 0.02)
    monkeypatch.setattr(servers, "DELETE_HELLO_S", 0.1)
    with holding() as holder:
        delete = holder.client("aa-delete")
        holder.copied(plan(holder.settings, "audit_logs"))
        holder.server.wait_for_news(0.3)
        assert holder.operations.failure is None
        delete.bye(0, None)
    with holding() as holder:
        holder.copied(plan(holder.settings, "audit_logs"))
        assert "there is no aa-delete to wait for" in until(lambda: holder.operations.failure, "the holder gives up").msg
        until(lambda: len(db.execute("SELECT id FROM audit_logs FOR UPDATE SKIP LOCKED")) == 40, "the rows are free")


@pytest.mark.req("REQ-TXN-009")
def test_an_old_transaction_is_warned_of_at_half_its_time(holding, db, monkeypatch, capsys):
    from audit_archiver import log
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(log, "warning", lambda event, msg, **fields: said.append((event, msg)))
    monkeypatch.setattr(servers, "WATCH_EVERY_S", 0.02)
    holder = holding(database={"transaction_timeout_s": 5})
    begun = holder.begun(plan(holder.settings, "audit_logs"))
    holder.operations.batches[begun["handle"]].begun_at -= 3
    until(lambda: said, "a warning")
    assert said[0][0] == "transaction.old" and "audit_logs batch_001" in said[0][1] and "the limit is 5 s" in said[0][1]
    monkeypatch.setattr(servers, "WATCH_EVERY_S", 60)
    assert len(said) == 1


@pytest.mark.req("REQ-LOCK-004")
def test_a_table_locked_by_somebody_else_fails_alone_and_says_why(holding, db):
    somebody = db.connect()
    holder = holding(database={"lock_timeout_s": 0.2})
    job = plan(holder.settings, "audit_logs")
    lock_row(somebody, "LOCK TABLE audit_logs IN EXCLUSIVE MODE")
    with pytest.raises(ArchiverError, match="lock timeout") as caught:
        client = holder.client()
        client.call("lock", handle=client.call("begin", job=job)["handle"], cursor=None, limit=10)
    assert caught.value.sqlstate == "55P03" and caught.value.retry
    assert holder.operations.failure is None and holder.operations.open_batches() == []
    somebody.close()
