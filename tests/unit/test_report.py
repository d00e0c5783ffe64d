"""What a run came to: results, exit code, the text for people and the JSON for machines."""

from __future__ import annotations

import io
from typing import Any, Optional

import pytest

from audit_archiver import exits
from audit_archiver.config.model import S3, Database
from audit_archiver.driver import ask, report, results, summary
from audit_archiver.driver.results import DatabaseResult, Run, TableResult, Warned, table_results
from audit_archiver.driver.vacuum import Reclaimed
from audit_archiver.exits import ArchiverError, ConfigError, LockHeld, Mismatch, NetworkError, PermissionDenied, combined
from audit_archiver.formats import schema
from audit_archiver.holder.notes import JobNotes, key_of
from audit_archiver.postgres.space import Space

NO_KEY = "no primary key or unique index; add one or remove the table"


def job(table: str = "audit_logs", schema_name: str = "public", **values: Any) -> dict[str, Any]:
    return {"run": "20251230T021545Z-4711", "database": "prod", "schema": schema_name, "table": table, "key": ["id"],
            "timestamp": "created_at", "cutoff": "2025-09-30T02:15:45.123456Z", "start": None, "end": None, "batch_size": 10_000,
            "limit": None, "sleep_s": 0, "cursor": None, "estimate": 1_204_331, **values}


def refused(table: str = "logins", schema_name: str = "audit", code: int = 3) -> dict[str, Any]:
    return {"run": "20251230T021545Z-4711", "database": "prod", "schema": schema_name, "table": table,
            "refused": {"code": code, "msg": NO_KEY, "at": "prod.yaml:31"}}


def one(made: dict[str, Any], failing: int = 0, failure: Optional[ArchiverError] = None, stopped: bool = False,
        noted: bool = True, **values: Any) -> TableResult:
    notes = {key_of(made): JobNotes(made, 10_000, **values)} if noted else {}
    found = table_results([made], notes, failing=[key_of(made)] * failing, failure=failure, stopped=stopped)
    assert len(found) == 1
    return found[0]


def reclaimed(**values: Any) -> Reclaimed:
    size = Space(979_000_000, 820_000_000, 90_000_000, 69_000_000, 2)
    return Reclaimed(**{"strategy": "standard", "done": True, "seconds": 14.2, "before": size, "after": size,
                        "reusable": 602_000_000, **values})


def run_of(*tables: TableResult, **values: Any) -> Run:
    made = Run("20251230T021545Z-4711", "2025-12-30T02:15:45Z", "audit-archives", "archives/", **values)
    phases = {"select": 12.1, "serialize": 9.2, "upload": 18.2, "verify": 11.3, "delete": 8.4, "record": 4.1, "vacuum": 14.2}
    made.databases = [DatabaseResult("prod", "db1.example.com", list(tables), "15.18", [], phases)]
    made.exit = combined(table.code for table in made.tables)
    return made


def a_run() -> Run:
    done = one(job(), rows=1_204_329, batches=121, bytes=579_600_000, gz_bytes=150_700_000, skipped_locked=2, swept=True,
               first_at=100.0, last_at=142.4)
    done.reclaimed = reclaimed()
    return run_of(done, one(job("user_activity", estimate=0), noted=False), one(refused(), noted=False), seconds=57.2)


def test_a_table_that_was_swept_is_done_or_had_nothing_to_do() -> None:
    assert one(job(), rows=5, swept=True).outcome == "done"
    assert one(job(), swept=True).outcome == "nothing"
    assert one(job(estimate=0), noted=False).outcome == "nothing"


@pytest.mark.req("REQ-EXE-002")
def test_a_table_that_reached_its_limit_is_done() -> None:
    assert one(job(limit=100), rows=100).outcome == "done"
    assert one(job(limit=100), rows=99).outcome == "failed"


def test_a_refused_table_keeps_reason_code_and_place() -> None:
    found = one(refused(code=5), noted=False)
    assert (found.outcome, found.code, found.error and found.error.msg, found.error and found.error.at) == (
        "refused", 5, NO_KEY, "prod.yaml:31")


def test_a_table_that_was_not_finished_failed_for_the_reason_that_ended_the_run() -> None:
    failure = NetworkError("the store is away")
    for found in (one(job(), rows=10, failure=failure), one(job(), noted=False, failure=failure)):
        assert (found.outcome, found.error) == ("failed", failure)
    swept, cut_short = job("first"), job("second")
    notes = {key_of(swept): JobNotes(swept, 10_000, rows=10, batches=1, swept=True),
             key_of(cut_short): JobNotes(cut_short, 10_000, rows=10, batches=1)}
    assert [found.outcome for found in table_results([swept, cut_short], notes, failure=failure)] == ["done", "failed"]


def test_a_failure_after_the_last_table_was_swept_is_no_success() -> None:
    failure = NetworkError("the record could not be written")
    nothing = job("nothing")
    notes = {key_of(nothing): JobNotes(nothing, 10_000, swept=True), key_of(job()): JobNotes(job(), 10_000, rows=10, batches=1, swept=True)}
    found = table_results([nothing, job()], notes, failure=failure)
    assert [(each.outcome, each.error) for each in found] == [("nothing", None), ("failed", failure)]
    assert one(nothing, swept=True, failure=failure).code == exits.NETWORK


def test_a_table_of_its_own_error_keeps_it_though_the_run_failed_for_another() -> None:
    own = ConfigError("column 'x' is gone")
    assert one(job(), error=own, failure=NetworkError("away")).error is own


def test_a_table_that_nobody_finished_and_nothing_explains_is_no_success() -> None:
    assert one(job(), rows=10).code == exits.FAILED
    assert one(job(), noted=False).code == exits.FAILED


def test_a_signal_leaves_unfinished_tables_stopped() -> None:
    assert one(job(), rows=10, stopped=True).outcome == "stopped"
    assert one(job(), noted=False, stopped=True).outcome == "stopped"


OK, SOME, NET = TableResult("d", "s", "t", "done"), TableResult("d", "s", "t", "done", inexact=1), NetworkError("away")


def failed(error: ArchiverError) -> TableResult:
    return TableResult("d", "s", "t", "failed", error=error)


@pytest.mark.req("REQ-USE-010", "T58")
@pytest.mark.parametrize("tables, code", [
    ([], 0), ([OK], 0), ([OK, TableResult("d", "s", "t", "nothing")], 0),
    ([OK, failed(NET)], 1), ([OK, failed(NET), failed(ConfigError("x"))], 1),
    ([failed(NET)], 7), ([failed(NET), failed(NetworkError("other words"))], 7), ([failed(ConfigError("x"))], 3),
    ([failed(LockHeld("x"))], 4), ([failed(PermissionDenied("x"))], 5), ([failed(Mismatch("x"))], 2),
    ([failed(NET), failed(ConfigError("x"))], 2),
    ([SOME], 1), ([OK, SOME], 1), ([SOME, failed(NET)], 1),
    ([TableResult("d", "s", "t", "done", failing=1)], 1), ([TableResult("d", "s", "t", "done", locked=5)], 0),
])
def test_the_exit_code_says_all_some_or_the_one_reason_for_none(tables: list[TableResult], code: int) -> None:
    assert combined(table.code for table in tables) == code


@pytest.mark.req("REQ-OBS-012", "REQ-VAC-006")
def test_the_closing_text_is_the_table_the_phases_what_stayed_and_how_it_ended() -> None:
    assert report.closing(a_run()) == [
        "TABLE                   ROWS  LEFT LOCKED  OBJECTS  UPLOADED  RATIO  ROWS/S  REUSABLE  RETURNED",
        "public.audit_logs  1,204,329            2      121  150.7 MB  0.260  28,404    602 MB      0 MB",
        "left in public.audit_logs: 2 locked by others (the next run takes them)",
        "select 12 s  serialize 9.2 s  upload 18 s  verify 11 s  delete 8.4 s  record 4.1 s  vacuum 14 s (stages overlap)",
        "602 MB can be used again inside the tables: new rows go there. pg_repack or VACUUM FULL returns it to the operating "
        "system (VACUUM FULL locks the table exclusively), REINDEX TABLE CONCURRENTLY what its indexes no longer need",
        f"refused: audit.logins: {NO_KEY} (prod.yaml:31)",
        "done in 57 s: 2 of 3 tables, 1 refused. exit 1"]


def test_tables_that_failed_for_one_reason_share_a_line() -> None:
    error = NetworkError("cannot connect to database 'prod'", hint="check host and port", at="prod.yaml:20")
    made = run_of(*(TableResult("prod", "public", f"t{n}", "failed", error=error) for n in range(5)), seconds=10.0)
    assert report.closing(made) == [
        "failed: public.t0, public.t1, public.t2 and 2 more: cannot connect to database 'prod'; check host and port (prod.yaml:20)",
        "done in 10 s: 0 of 5 tables, 5 failed. exit 7"]


def test_every_reason_to_stay_in_the_table_is_named() -> None:
    made = TableResult("prod", "public", "t", "done", locked=1, referenced=2, null_timestamps=3, infinite_timestamps=4, inexact=5, failing=6)
    assert report.left_in_place(run_of(made)) == [
        "left in public.t: 1 locked by others (the next run takes them), 2 still referenced by other rows, 3 without a timestamp, "
        "4 with an infinite timestamp, 5 that would not come back exactly (their keys are in the log), "
        "6 that fail alone (their keys are in the log)"]


def test_a_run_without_rows_says_so_in_one_line() -> None:
    assert report.closing(run_of(TableResult("prod", "public", "t", "nothing"), seconds=1.2)) == ["done in 1.2 s: nothing to do. exit 0"]


def test_a_stopped_run_says_by_which_signal() -> None:
    made = run_of(TableResult("prod", "public", "t", "stopped"), seconds=3.4, stopped_by="SIGTERM")
    made.exit = 143
    assert report.closing(made)[-1] == "stopped by SIGTERM after 3.4 s: 0 of 1 table, 1 stopped. exit 143"


@pytest.mark.parametrize("made, cells", [
    (None, ("-", "-")), (reclaimed(strategy="none", reusable=None), ("-", "-")),
    (reclaimed(strategy="analyze", reusable=None), ("-", "0 MB")), (reclaimed(done=False, reusable=None), ("-", "0 MB")),
    (reclaimed(after=None, reusable=None, problem="lock timeout"), ("-", "-")),
    (reclaimed(after=Space(200_000_000, 0, 0, 0, 0), reusable=0, strategy="full"), ("0 MB", "779 MB"))])
def test_room_that_no_vacuum_freed_is_not_claimed(made: Optional[Reclaimed], cells: tuple[str, str]) -> None:
    assert report._room(made) == cells


def test_what_would_return_the_room_is_named_only_where_there_is_some() -> None:
    done = TableResult("prod", "public", "t", "done", rows=10, reclaimed=reclaimed(reusable=None))
    assert report.room(run_of(done)) == []
    done.reclaimed = reclaimed(reusable=0)
    assert report.room(run_of(done)) == []
    done.reclaimed = reclaimed()
    assert "pg_repack" in report.room(run_of(done))[0]


@pytest.mark.req("REQ-ARC-010", "REQ-USE-004")
def test_the_plan_shows_age_rows_batches_pauses_and_refusals() -> None:
    jobs = [job(sleep_s=2), job("user_activity", estimate=0, cutoff="2025-07-02T02:15:45Z"), refused()]
    assert report.plan(jobs) == [
        "  public.audit_logs     older than 2025-09-30 02:15:45Z  1,204,331 rows  121 batches, 4 min 00 s of pauses between them",
        "  public.user_activity  older than 2025-07-02 02:15:45Z          0 rows  nothing to do",
        f"  audit.logins          refused: {NO_KEY} (prod.yaml:31)"]
    assert report.plan([job(limit=5)], exact=False)[0].endswith(" ~5 rows  1 batch")
    assert report.planned_rows([*jobs, job("limited", limit=5)]) == (1_204_336, 2)


def test_the_head_says_from_where_to_where() -> None:
    database = Database("prod", host="db1.example.com")
    assert report.head("20251230T021545Z-4711", database, "15.18", S3("audit-archives", "archives/")) == (
        "run 20251230T021545Z-4711   prod at db1.example.com (PostgreSQL 15.18) -> s3://audit-archives/archives/")
    assert report.host(Database("prod", host="/run/postgresql")) == "local socket"


def test_several_databases_are_named_in_every_line() -> None:
    made = run_of(TableResult("prod", "public", "t", "done", rows=1, locked=1))
    made.databases.append(DatabaseResult("billing", "db2", [TableResult("billing", "public", "t", "failed", error=NET)]))
    text = "\n".join(report.closing(made))
    assert "prod public.t" in text and "failed: billing public.t: away" in text


@pytest.mark.req("REQ-OBS-001", "REQ-VAC-007")
def test_the_summary_is_what_its_schema_says_and_holds_the_figures() -> None:
    made = a_run()
    made.warnings.append(Warned("'notifications' are not sent yet"))
    found = summary.build(made)
    schema.validate("report", found, "the report")
    table = found["databases"][0]["tables"][0]
    assert (found["exit"], found["seconds"], found["ended_at"]) == (1, 57.2, "2025-12-30T02:16:42Z")
    assert (table["rows"], table["left"]["locked"], table["ratio"], table["rows_per_s"]) == (1_204_329, 2, 0.26, 28_404)
    assert table["space"]["before"]["total"] == 979_000_000 and table["space"]["reusable"] == 602_000_000
    assert found["totals"]["tables"] == {"done": 1, "nothing": 1, "refused": 1, "failed": 0, "stopped": 0}
    assert found["errors"] == [{"code": 3, "msg": NO_KEY, "detail": None, "hint": None, "at": "prod.yaml:31", "database": "prod",
                                "schema": "audit", "table": "logins"}]
    assert found["databases"][0]["phases"]["vacuum"] == 14.2


@pytest.mark.parametrize("outcome", ["done", "nothing", "refused", "failed", "stopped"])
@pytest.mark.parametrize("space", [None, reclaimed(), reclaimed(before=None, after=None, reusable=None, problem="x", done=False)])
def test_the_summary_of_any_outcome_satisfies_its_schema(outcome: str, space: Optional[Reclaimed]) -> None:
    made = run_of(TableResult("prod", "public", "t", outcome, error=NET if outcome in ("failed", "refused") else None, reclaimed=space))
    schema.validate("report", summary.build(made), "the report")
    assert report.closing(made)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.req("REQ-USE-009")
@pytest.mark.parametrize("answer, yes", [("y\n", True), ("yes\n", True), ("Y\n", True), ("\n", False), ("n\n", False),
                                         ("yep\n", False), ("", False)])
def test_a_person_at_a_terminal_is_asked_once_and_only_yes_is_yes(answer: str, yes: bool) -> None:
    screen = Terminal()
    assert ask.confirm(1_204_331, 1, force=False, stdin=Terminal(answer), stderr=screen) is yes
    assert screen.getvalue() == "archive and delete 1,204,331 rows of 1 table? [y/N] "


@pytest.mark.req("REQ-EXE-005", "REQ-OBS-013")
@pytest.mark.parametrize("rows, force, stdin, stderr", [
    (5, True, Terminal("n\n"), Terminal()), (5, False, io.StringIO("n\n"), Terminal()), (5, False, Terminal("n\n"), io.StringIO()),
    (0, False, Terminal("n\n"), Terminal())])
def test_nobody_is_asked_with_force_without_a_terminal_or_without_rows(rows: int, force: bool, stdin: io.StringIO,
                                                                       stderr: io.StringIO) -> None:
    assert ask.confirm(rows, 1, force=force, stdin=stdin, stderr=stderr) is True
    assert stderr.getvalue() == ""


def test_the_phases_of_all_databases_are_added_up() -> None:
    made = a_run()
    made.databases.append(DatabaseResult("billing", "db2", [], phases={"select": 1.0}))
    assert made.phases["select"] == pytest.approx(13.1) and set(made.phases) == set(results.PHASES)


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_closing_table_fits_the_terminal_and_keeps_names_rows_and_what_is_left(columns: int) -> None:
    long = TableResult("prod", "public", "audit_logs_of_the_" + "very_" * 12 + "long_year", "done", rows=9_876_543_210, batches=98_765,
                       bytes=5 * 10**12, gz_bytes=10**12, seconds=86_400.0, locked=1_234_567)
    lines = report.closing_table(run_of(long), columns)
    assert all(len(line) <= columns for line in lines), lines
    assert lines[0].startswith("TABLE") and "ROWS  LEFT LOCKED" in lines[0] and "UPLOADED" in lines[0]
    assert "9,876,543,210" in lines[1] and "1,234,567" in lines[1] and lines[1].startswith("public.") and "year  " in lines[1]
    assert ("RATIO" in lines[0]) == (columns >= 100)
