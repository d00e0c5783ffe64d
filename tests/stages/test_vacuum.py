"""Vacuum after a database's pipeline: per table and strategy, and never a failure of what was archived."""

from __future__ import annotations

import io
import json
import os
from typing import Any, Optional

import pytest

from audit_archiver import log
from audit_archiver.config.model import Database, Table
from audit_archiver.driver import vacuum
from audit_archiver.driver.vacuum import Reclaimed
from audit_archiver.exits import NetworkError
from audit_archiver.holder.notes import JobKey, JobNotes
from audit_archiver.postgres import connect
from tests.conftest import TestDatabase
from tests.ground import tables
from tests.ground.wait import until

RUN = "20251230T021545Z-4711"


def _database(db: TestDatabase, user: str = "archiver", **strategies: str) -> Database:
    configured = tuple(Table(name, "created_at", ("id",), vacuum=strategy) for name, strategy in strategies.items())
    return Database(name=db.name, host=db.host, port=db.port, user=user, lock_timeout_s=0.2, tables=configured)


def _notes(db: TestDatabase, name: str, rows: int) -> JobNotes:
    return JobNotes({"database": db.name, "schema": "public", "table": name, "batch_size": 100, "limit": None}, 100, rows=rows)


def _after(db: TestDatabase, database: Database, deleted: dict[str, int], **options: Any) -> dict[JobKey, Reclaimed]:
    """Measure, delete the oldest rows, and vacuum as the driver does."""
    session = connect.connect(database, purpose="test")
    before = vacuum.sizes(session, database.tables)
    session.close()
    for name, rows in deleted.items():
        db.execute(f"DELETE FROM {name} WHERE id <= {rows}")
    return vacuum.after(database, [_notes(db, name, rows) for name, rows in deleted.items()], before, run=RUN, **options)


def _of(found: dict[JobKey, Reclaimed], name: str) -> Reclaimed:
    return next(made for (_, _, table), made in found.items() if table == name)


@pytest.fixture()
def records() -> io.StringIO:
    """The log of this process as JSON lines."""
    stream = io.StringIO()
    log.setup("aa-archive", style="json", verbose=1, stream=stream)
    return stream


def _events(records: io.StringIO, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in records.getvalue().split("\n") if line]
    return [each for each in found if each["event"] == event]


def _vacuumed(db: TestDatabase, name: str) -> tuple[bool, bool]:
    """(vacuumed, analyzed) by hand, ever."""
    found: Any = db.execute("SELECT last_vacuum IS NOT NULL, last_analyze IS NOT NULL FROM pg_stat_all_tables "
                            f"WHERE relid = '{name}'::regclass")[0]
    return found


@pytest.mark.req("REQ-VAC-001", "REQ-VAC-006", "REQ-VAC-007", "REQ-VAC-013")
def test_each_table_that_rows_have_left_gets_its_own_strategy(db: TestDatabase, records: io.StringIO) -> None:
    names = ("t_none", "t_analyze", "t_standard", "t_full", "t_untouched")
    for name in names:
        db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, created_at timestamptz, filling text)")
        db.execute(f"INSERT INTO {name} SELECT i, now(), repeat('x', 500) FROM generate_series(1, 1000) i")
    database = _database(db, t_none="none", t_analyze="analyze", t_standard="standard", t_full="full", t_untouched="standard")

    found = _after(db, database, {"t_none": 500, "t_analyze": 500, "t_standard": 500, "t_full": 500, "t_untouched": 0})

    assert {table for _, _, table in found} == {"t_none", "t_analyze", "t_standard", "t_full"}
    expected = [(False, False), (False, True), (True, True), (False, True), (False, False)]
    until(lambda: [_vacuumed(db, name) for name in names] == expected, "the statistics show which tables were vacuumed and analyzed")
    none, analyze, standard, full = (_of(found, name) for name in names[:4])
    # THEN nothing is claimed that no vacuum freed, and the two figures are apart
    assert (none.done, none.reusable, none.returned, none.problem) == (False, None, 0, None)
    assert (analyze.done, analyze.reusable, analyze.returned) == (True, None, 0)
    assert standard.done and standard.returned == 0 and 250_000 < (standard.reusable or 0) < 330_000
    assert full.done and full.reusable == 0 and full.returned > 200_000
    assert {each["table"]: each["returned"] for each in _events(records, "vacuum.done")} == {
        "public.t_analyze": 0, "public.t_standard": 0, "public.t_full": full.returned}


@pytest.mark.req("REQ-VAC-002")
def test_vacuum_full_of_a_run_wins_over_every_strategy(db: TestDatabase) -> None:
    tables.create(db.connection, rows=2000)
    found = _after(db, _database(db, audit_logs="none"), {"audit_logs": 1500}, full=True)
    made = _of(found, "audit_logs")
    assert (made.strategy, made.done, made.reusable) == ("full", True, 0)
    assert made.returned > 0


def test_a_full_vacuum_that_does_not_get_its_lock_is_a_problem_and_no_error(db: TestDatabase, records: io.StringIO) -> None:
    tables.create(db.connection, rows=100)
    reader = db.connect()
    with reader.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT count(*) FROM audit_logs")
        made = _of(_after(db, _database(db, audit_logs="full"), {"audit_logs": 50}), "audit_logs")
    reader.close()
    assert not made.done and made.reusable is None and made.returned == 0
    assert "lock timeout" in (made.problem or "")
    assert [each["level"] for each in _events(records, "vacuum.problem")] == ["WARNING"]


@pytest.mark.req("T35")
def test_rows_that_could_not_be_removed_yet_are_a_problem_that_names_who_holds_them(db: TestDatabase) -> None:
    tables.create(db.connection, rows=1000)
    old = db.connect(application_name="nightly report")
    with old.cursor() as cursor:
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        cursor.execute("SELECT count(*) FROM audit_logs")
        made = _of(_after(db, _database(db, audit_logs="standard"), {"audit_logs": 800}), "audit_logs")
    old.close()
    assert made.done and made.reusable == 0
    assert "800 dead rows" in (made.problem or "") and "nightly report" in (made.problem or "")


def test_a_vacuum_that_a_role_may_not_do_is_a_problem_with_a_remedy(db: TestDatabase) -> None:
    tables.create(db.connection, rows=100)
    role = f"deleter_{os.getpid()}"
    db.admin(f"CREATE ROLE {role} LOGIN")
    try:
        db.execute(f"GRANT SELECT, DELETE, UPDATE ON audit_logs TO {role}")
        made = _of(_after(db, _database(db, role, audit_logs="standard"), {"audit_logs": 50}), "audit_logs")
    finally:
        db.admin(f"DROP OWNED BY {role}")
        db.admin(f"DROP ROLE {role}")
    assert not made.done and made.reusable is None
    assert (made.problem or "").startswith("VACUUM (ANALYZE) did nothing: ")
    assert "owner" in (made.hint or "")


def test_a_table_that_is_gone_by_then_does_not_keep_the_next_one_from_its_vacuum(db: TestDatabase) -> None:
    tables.create(db.connection, rows=100)
    db.execute("CREATE TABLE gone (id int)")
    database = _database(db, gone="standard", audit_logs="standard")
    session = connect.connect(database, purpose="test")
    before = vacuum.sizes(session, database.tables)
    session.close()
    db.execute("DROP TABLE gone")
    db.execute("DELETE FROM audit_logs WHERE id <= 50")

    found = vacuum.after(database, [_notes(db, "gone", 10), _notes(db, "audit_logs", 50)], before, run=RUN)

    assert _of(found, "gone").problem and not _of(found, "gone").done
    assert _of(found, "audit_logs").done


def test_a_database_that_cannot_be_reached_any_more_is_a_warning(db: TestDatabase, records: io.StringIO,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise NetworkError("cannot connect")

    monkeypatch.setattr(connect, "connect", away)
    assert vacuum.after(_database(db, audit_logs="standard"), [_notes(db, "audit_logs", 5)], {}, run=RUN) == {}
    assert [each["level"] for each in _events(records, "vacuum.skipped")] == ["WARNING"]


@pytest.mark.req("REQ-VAC-003")
@pytest.mark.parametrize("verbose", [True, False])
def test_with_v_the_log_has_what_vacuum_says_in_detail(db: TestDatabase, records: io.StringIO, verbose: bool) -> None:
    tables.create(db.connection, rows=100)
    _after(db, _database(db, audit_logs="standard"), {"audit_logs": 50}, verbose=verbose)
    assert bool(_events(records, "vacuum.detail")) == verbose


def test_nothing_is_connected_where_no_row_has_left(db: TestDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Optional[str]] = []
    monkeypatch.setattr(connect, "connect", lambda *_, **__: asked.append(None))
    refused = _notes(db, "audit_logs", 0)
    refused.job["refused"] = {"code": 3, "msg": "no key"}
    assert vacuum.after(_database(db, audit_logs="standard"), [_notes(db, "audit_logs", 0), refused], {}, run=RUN) == {}
    assert not asked
