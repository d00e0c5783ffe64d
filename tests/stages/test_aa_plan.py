"""aa-plan: job lines, cutoffs by the server's clock, what is refused and with which code."""

from __future__ import annotations

import datetime
import signal
from pathlib import Path
from typing import Any, Iterator

import pytest

from audit_archiver import config
from audit_archiver.formats import job as jobs
from audit_archiver.postgres import connect
from audit_archiver.preflight import plan
from tests.ground import tables
from tests.ground.run import Result, finish, run_forked, run_stage, spawn
from tests.ground.wait import PATIENCE, until

LOGS: dict[str, Any] = {"name": "audit_logs", "timestamp_column": "created_at", "primary_key": "id"}


def table(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "timestamp_column": "at", "primary_key": "id", **more}


def make(db: Any, name: str, column: str = "timestamptz", values: str = "now() - interval '400 days'", rows: int = 1) -> None:
    db.execute(f"CREATE TABLE {name} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at {column})")
    db.execute(f"INSERT INTO {name} (at) SELECT {values} FROM generate_series(1, {rows})")


class Planner:
    """Runs aa-plan on one configuration."""

    def __init__(self, db: Any, bucket: Any, config_file: Any) -> None:
        self.db, self._bucket, self._config_file = db, bucket, config_file
        self.path = Path()

    def __call__(self, configured: list[dict[str, Any]], *flags: str, env: Any = None, **overrides: Any) -> Result:
        self.path = self._config_file(self.db, self._bucket, configured, **overrides)
        return run_stage("aa-plan", ["--config", self.path, *flags], env=env or {})


@pytest.fixture()
def planned(db: Any, bucket: Any, config_file: Any) -> Planner:
    return Planner(db, bucket, config_file)


def messages(result: Result, event: str) -> list[str]:
    return [record["msg"] for record in result.log if record["event"] == event]


# -- the job line


@pytest.mark.req("REQ-ARC-001", "REQ-ARC-004", "REQ-ARC-005")
def test_a_job_holds_all_that_a_batch_needs_and_the_servers_cutoff(planned: Planner, db: Any) -> None:
    tables.create(db.connection, rows=300, first="2024-01-01", last="2024-03-01")
    before = db.scalar("SELECT now() - interval '31 days'")
    result = planned([{**LOGS, "retention_days": 29}], "--limit", "7", "--batch-size", "50",
                     defaults={"safety_buffer_days": 2, "sleep_between_batches": 1.5})
    after = db.scalar("SELECT now() - interval '31 days'")
    assert result.rc == 0, result.err
    [job] = result.lines
    shape = job.pop("shape_sha256")
    run, cutoff = job.pop("run"), job.pop("cutoff")
    assert job == {"format": "aa-job", "version": 1, "database": db.name, "schema": "public", "table": "audit_logs",
                   "key": ["id"], "timestamp": "created_at", "start": None, "end": None, "batch_size": 50, "limit": 7,
                   "sleep_s": 1.5, "cursor": None, "estimate": 300}
    assert before <= datetime.datetime.fromisoformat(cutoff.replace("Z", "+00:00")) <= after
    assert len(shape) == 64 and run.count("-") == 1
    assert jobs.parse(result.out)["run"] == run


def test_every_line_is_a_job_in_the_order_of_the_configuration(planned: Planner, db: Any) -> None:
    for name in ("c", "a", "b"):
        make(db, name)
    result = planned([table("c"), table("a"), table("b")])
    assert [line["table"] for line in result.lines] == ["c", "a", "b"]
    assert len({line["run"] for line in result.lines}) == 1
    for line in result.out.splitlines(keepends=True):
        jobs.parse(line)


def test_the_run_is_the_one_that_aa_run_names(planned: Planner, db: Any) -> None:
    make(db, "a")
    result = planned([table("a")], env={"AA_RUN": "20251230T021545Z-4711"})
    assert result.lines[0]["run"] == "20251230T021545Z-4711"
    assert {record["run_id"] for record in result.log} == {"20251230T021545Z-4711"}
    refused = planned([table("a")], env={"AA_RUN": "yesterday"})
    assert (refused.rc, refused.out) == (3, b"")
    assert refused.log[-1]["msg"] == "AA_RUN is no run id"


def test_a_plan_says_how_many_rows_and_batches_and_how_long_it_will_sleep(planned: Planner, db: Any) -> None:
    make(db, "a", rows=250)
    result = planned([table("a")], defaults={"batch_size": 100, "sleep_between_batches": 2})
    [said] = messages(result, "plan.table")
    assert said.startswith("public.a: 250 rows older than ")
    assert said.endswith("Z, in up to 3 batches with 4 s of sleep between them")


def test_warnings_of_the_configuration_are_logged(planned: Planner, db: Any) -> None:
    make(db, "a")
    result = planned([table("a")], defaults={"connection_pool_size": 9})
    assert [text.partition(": ")[2] for text in messages(result, "config.warning") if "pool" in text] == [
        "'defaults.connection_pool_size' has no effect: a run opens one connection per batch in flight"]


def test_the_form_of_the_log_is_the_configured_one_unless_a_flag_says_otherwise(planned: Planner, db: Any) -> None:
    make(db, "a")
    text = planned([table("a")], observability={"log_format": "text", "log_level": "WARN"})
    assert text.err.startswith("aa-plan: warning: ") and "public.a: 1 rows" not in text.err
    forced = planned([table("a")], "--log-format", "json", observability={"log_format": "text"})
    assert messages(forced, "plan.table")


def test_a_quiet_plan_without_refusals_says_nothing(planned: Planner, db: Any) -> None:
    make(db, "a")
    result = planned([table("a")], "--quiet")
    assert (result.rc, result.err) == (0, "") and len(result.lines) == 1


# -- which rows are eligible


@pytest.mark.req("REQ-TIME-001", "REQ-TIME-003", "T6")
@pytest.mark.parametrize("column", ["timestamptz", "timestamp"])
@pytest.mark.parametrize("zone", ["Asia/Kathmandu", "America/St_Johns", "UTC"])
def test_the_cutoff_is_the_same_moment_whatever_the_time_zones_are(planned: Planner, db: Any, column: str, zone: str) -> None:
    utc = "" if column == "timestamptz" else " AT TIME ZONE 'UTC'"
    make(db, "a", column, f"(now() - interval '91 days' - interval '1 minute'){utc}", rows=3)
    db.execute(f"INSERT INTO a (at) SELECT (now() - interval '91 days' + interval '1 minute'){utc} FROM generate_series(1, 5)")
    db.admin(f"ALTER DATABASE {db.name} SET timezone = '{zone}'")
    db.admin(f"ALTER DATABASE {db.name} SET datestyle = 'German'")
    result = planned([table("a")], env={"TZ": zone, "PGTZ": zone})
    assert result.lines[0]["estimate"] == 3


@pytest.mark.req("REQ-TIME-003")
def test_a_date_is_eligible_when_its_whole_day_is_over(planned: Planner, db: Any) -> None:
    make(db, "a", "date", "(now() AT TIME ZONE 'UTC' - interval '91 days')::date", rows=5)
    db.execute("INSERT INTO a (at) SELECT (now() AT TIME ZONE 'UTC' - interval '92 days')::date FROM generate_series(1, 3)")
    assert planned([table("a")]).lines[0]["estimate"] == 3


@pytest.mark.req("T7")
@pytest.mark.parametrize("column", ["timestamptz", "timestamp", "date"])
def test_null_and_infinite_timestamps_are_counted_and_never_eligible(planned: Planner, db: Any, column: str) -> None:
    make(db, "a", column, "now() - interval '400 days'", rows=4)
    db.execute("INSERT INTO a (at) VALUES (NULL), (NULL), ('infinity'), ('-infinity'), ('-infinity')")
    db.execute("INSERT INTO a (at) VALUES ('0044-03-15 BC')")
    result = planned([table("a")])
    assert result.rc == 0 and result.lines[0]["estimate"] == 5
    assert messages(result, "plan.left") == [
        "public.a: rows that stay in the table for ever: 2 without a timestamp, 3 with an infinite one"]


def test_a_table_whose_rows_are_all_eligible_some_day_says_nothing_of_it(planned: Planner, db: Any) -> None:
    make(db, "a")
    assert messages(planned([table("a")]), "plan.left") == []


@pytest.mark.parametrize("flags, expected, bounds", [
    (("--start-date", "2024-01-03"), 3, ("2024-01-03T00:00:00.000000Z", None)),
    (("--end-date", "2024-01-02"), 2, (None, "2024-01-03T00:00:00.000000Z")),
    (("--start-date", "2024-01-02T00:00:00+00:00", "--end-date", "2024-01-04T00:00:00Z"), 2,
     ("2024-01-02T00:00:00.000000Z", "2024-01-04T00:00:00.000000Z")),
    (("--start-date", "2024-01-01", "--end-date", "2124-01-01"), 5,
     ("2024-01-01T00:00:00.000000Z", "2124-01-02T00:00:00.000000Z"))])
def test_dates_narrow_what_is_eligible_and_never_widen_it(planned: Planner, db: Any, flags: Any, expected: int,
                                                          bounds: Any) -> None:
    make(db, "a", values="timestamptz '2024-01-01 00:00:00Z' + interval '1 day' * (generate_series - 1)", rows=5)
    db.execute("INSERT INTO a (at) VALUES (now())")
    [job] = planned([table("a")], *flags).lines
    assert job["estimate"] == expected and (job["start"], job["end"]) == bounds


def test_the_planners_estimate_reads_no_rows(planned: Planner, db: Any) -> None:
    make(db, "a", rows=1000)
    db.execute("ANALYZE a")
    scans = "SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relname = 'a'"
    before = db.scalar(scans)
    result = planned([table("a")], "--count", "estimate")
    assert result.lines[0]["estimate"] == 1000
    assert messages(result, "plan.table")[0].startswith("public.a: about 1000 rows ")
    assert messages(result, "plan.left") == []
    db.execute("SELECT pg_stat_clear_snapshot()")
    assert db.scalar(scans) == before


@pytest.mark.req("REQ-TIME-002")
@pytest.mark.parametrize("seconds, says", [
    (301, "the clock of database 'prod' is 301 s ahead of this host's; cutoffs follow the database's"),
    (-4000, "the clock of database 'prod' is 4000 s behind this host's; cutoffs follow the database's"), (299, None)])
def test_a_clock_that_is_more_than_five_minutes_off_is_reported(seconds: float, says: Any) -> None:
    notes = plan._skew(config.Database(name="prod"), seconds)
    assert [(note.msg, note.warning) for note in notes] == ([(says, True)] if says else [])


def test_the_clocks_are_really_compared(planned: Planner, db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    make(db, "a")
    real = time.time
    monkeypatch.setattr("audit_archiver.postgres.eligible.time.time", lambda: real() - 1000)
    assert "1000 s ahead of this host's" in messages(planned([table("a")]), "plan.clock")[0]


# -- which tables


@pytest.mark.req("T8")
def test_equal_names_in_several_schemas_quoted_mixed_case_and_underscored_names_are_different_tables(planned: Planner,
                                                                                                    db: Any) -> None:
    db.execute('CREATE SCHEMA audit; CREATE SCHEMA "Odd Schema"')
    names = [("public", "t", 1), ("audit", "t", 2), ("public", "T", 3), ("public", "_t", 4), ("Odd Schema", 'a "b".c', 5)]
    for schema, name, rows in names:
        quoted = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, name))
        make(db, quoted, rows=rows)
    result = planned([table(name, schema=schema) for schema, name, _ in names])
    assert result.rc == 0, result.err
    assert [(line["schema"], line["table"], line["estimate"]) for line in result.lines] == names


def test_tables_and_databases_can_be_chosen(planned: Planner, db: Any) -> None:
    db.execute("CREATE SCHEMA audit")
    for name in ("a", "b", "audit.b", "c"):
        make(db, name)
    configured = [table("a"), table("b"), table("b", schema="audit"), table("c")]

    def chosen(*flags: str) -> list[str]:
        return [f"{line['schema']}.{line['table']}" for line in planned(configured, *flags).lines]

    assert chosen("--table", "c", "--table", "a") == ["public.a", "public.c"]
    assert chosen("--table", "audit.b") == ["audit.b"]
    assert chosen("--database", db.name, "--table", "public.b") == ["public.b"]
    assert len(chosen("--database", db.name)) == 4


@pytest.mark.parametrize("flags, says, hint", [
    (("--database", "other"), "there is no database 'other' in '{path}'", "known are: {name}"),
    (("--table", "audit_log"), "there is no table 'audit_log' in database '{name}'", "did you mean 'public.audit_logs'?"),
    (("--table", "zzz"), "there is no table 'zzz' in database '{name}'", "known are: public.audit_logs, public.b, audit.b"),
    (("--table", "b"), "'b' means 'public.b' and 'audit.b' in database '{name}'", "write SCHEMA.TABLE"),
    (("--start-date", "soon"), "--start-date 'soon' is neither a date nor a time", None),
    (("--start-date", "2025-01-02", "--end-date", "2025-01-01"), "--start-date is not before --end-date", None),
    (("--limit", "0"), "argument --limit: '0' is no number from 1 on", None),
    (("--batch-size", "50001"), "argument --batch-size: '50001' is more than 50000 rows", None),
    (("--count", "guess"), "argument --count: invalid choice: 'guess'", None),
    (("extra",), "unrecognized arguments: extra", None),
])
def test_a_flag_that_cannot_be_followed_is_refused_and_nothing_is_planned(planned: Planner, db: Any, flags: Any, says: str,
                                                                          hint: Any) -> None:
    result = planned([LOGS, table("b"), table("b", schema="audit")], *flags)
    assert (result.rc, result.out) == (3, b"")
    last = result.log[-1]
    assert last["msg"].startswith(says.format(name=db.name, path=planned.path))
    assert hint is None or last["hint"] == hint.format(name=db.name)


# -- refused tables


@pytest.mark.req("T31", "REQ-DB-005")
def test_a_table_that_cannot_be_archived_is_a_refused_line_and_the_others_are_planned(planned: Planner, db: Any) -> None:
    make(db, "good")
    db.execute("CREATE TABLE keyless (id bigint, at timestamptz)")
    result = planned([table("keyless"), table("good")])
    assert result.rc == 1
    bad, good = result.lines
    line = [number for number, text in enumerate(planned.path.read_text().split("\n"), 1) if "name: keyless" in text][0]
    assert bad == {"format": "aa-job", "version": 1, "run": good["run"], "database": db.name, "schema": "public",
                   "table": "keyless", "refused": {"code": 3, "at": f"{planned.path}:{line}", "msg": bad["refused"]["msg"]}}
    assert "'public.keyless'" in bad["refused"]["msg"] and bad["refused"]["msg"].count(";") >= 1
    assert "refused" not in good
    [record] = [record for record in result.log if record["event"] == "plan.refused"]
    assert (record["level"], record["code"], record["at"]) == ("ERROR", 3, f"{planned.path}:{line}")


@pytest.mark.parametrize("ddl, more, says", [
    ("", {}, "does not exist"), ("CREATE VIEW a AS SELECT 1 AS id, now() AS at", {}, "a view"),
    ("CREATE TABLE a (id int PRIMARY KEY, at timestamptz)", {"timestamp_column": "ts"}, "has no column 'ts'"),
    ("CREATE TABLE a (id int PRIMARY KEY, at text)", {}, "has the type text"),
    ("CREATE TABLE a (id int PRIMARY KEY, at timestamptz, other int)", {"primary_key": "other"}, "'other'"),
    ("CREATE TABLE a (id int PRIMARY KEY, at timestamptz)", {"primary_key": ["id; DROP TABLE a"]}, "has no column 'id; DROP TABLE a'"),
    ("CREATE TABLE a (id int, at timestamptz, UNIQUE (id))", {}, "can be NULL"),
])
def test_a_table_that_does_not_fit_is_refused_with_exit_3(planned: Planner, db: Any, ddl: str, more: Any, says: str) -> None:
    if ddl:
        db.execute(ddl)
    result = planned([table("a", **more)])
    assert result.rc == 3
    [line] = result.lines
    assert line["refused"]["code"] == 3 and says in line["refused"]["msg"]


def test_a_schema_written_into_the_name_is_explained(planned: Planner, db: Any) -> None:
    db.execute("CREATE SCHEMA audit")
    make(db, "audit.logins")
    [line] = planned([table("audit.logins")]).lines
    assert line["refused"]["msg"].endswith("if 'audit' is the schema, write 'schema: audit' and 'name: logins'")


def test_a_missing_privilege_is_exit_5(planned: Planner, db: Any) -> None:
    db.admin("CREATE TABLE a (id bigint PRIMARY KEY, at timestamptz)")
    result = planned([table("a")])
    assert (result.rc, result.lines[0]["refused"]["code"]) == (5, 5)
    assert result.lines[0]["refused"]["at"].startswith(f"{planned.path}:")


def test_different_reasons_for_all_tables_are_exit_2(planned: Planner, db: Any) -> None:
    db.admin("CREATE TABLE a (id bigint PRIMARY KEY, at timestamptz)")
    result = planned([table("a"), table("nowhere")])
    assert (result.rc, [line["refused"]["code"] for line in result.lines]) == (2, [5, 3])


def test_a_wrong_password_and_an_unknown_database_have_their_codes_and_no_secret_is_said(planned: Planner, db: Any) -> None:
    gone = planned([table("a")], database={"dbname": "no_such_database", "password": "hunter2"})
    assert (gone.rc, gone.lines[0]["refused"]["code"]) == (3, 3)
    nobody = planned([table("a")], database={"user": "nobody_of_that_name", "password": "hunter2"})
    assert (nobody.rc, nobody.lines[0]["refused"]["code"]) == (5, 5)
    assert "hunter2" not in gone.err + nobody.err + str(gone.lines) + str(nobody.lines)


# -- several databases


@pytest.mark.req("REQ-DB-005", "T58")
def test_a_database_that_cannot_be_reached_refuses_its_tables_and_stops_no_other(db: Any, bucket: Any, config_file: Any,
                                                                               tmp_path: Path) -> None:
    import yaml

    make(db, "a")
    path = config_file(db, bucket, [table("a")])
    whole = yaml.safe_load(path.read_text())
    away = {**whole["databases"][0], "name": "away", "host": str(tmp_path), "tables": [table("x"), table("y")]}
    whole["databases"].insert(0, away)
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    result = run_stage("aa-plan", ["-c", path])
    assert result.rc == 1
    assert [(line["database"], line["table"], line.get("refused", {}).get("code")) for line in result.lines] == [
        ("away", "x", 7), ("away", "y", 7), (db.name, "a", None)]
    alone = run_stage("aa-plan", ["-c", path, "--database", "away"])
    assert (alone.rc, len(alone.lines)) == (7, 2)


# -- order


def test_tables_that_reference_another_are_planned_before_it(planned: Planner, db: Any) -> None:
    make(db, "parent")
    make(db, "other")
    for child, of in (("child", "parent"), ("grandchild", "child")):
        db.execute(f"CREATE TABLE {child} (id bigint PRIMARY KEY REFERENCES {of}, at timestamptz)")
    result = planned([table("parent"), table("child"), table("other"), table("grandchild")])
    assert result.rc == 0, result.err
    assert [line["table"] for line in result.lines] == ["other", "grandchild", "child", "parent"]


def test_tables_that_reference_each_other_keep_their_order(planned: Planner, db: Any) -> None:
    make(db, "a")
    make(db, "b")
    db.execute("ALTER TABLE a ADD FOREIGN KEY (id) REFERENCES b; ")
    db.execute("TRUNCATE a CASCADE; TRUNCATE b CASCADE; ALTER TABLE b ADD FOREIGN KEY (id) REFERENCES a")
    assert [line["table"] for line in planned([table("b"), table("a")]).lines] == ["b", "a"]


# -- what it does to the server


@pytest.mark.req("T46")
def test_a_plan_writes_nothing_and_needs_no_right_to_write(planned: Planner, db: Any) -> None:
    db.admin("CREATE TABLE a (id bigint PRIMARY KEY, at timestamptz)")
    db.admin("INSERT INTO a VALUES (1, '2020-01-01')")
    db.admin("GRANT SELECT ON a TO archiver")
    before = db.admin("SELECT txid_snapshot_xmax(txid_current_snapshot())")
    result = planned([table("a")])
    assert result.rc == 0 and result.lines[0]["estimate"] == 1
    assert db.admin("SELECT txid_snapshot_xmax(txid_current_snapshot())") == before


def test_the_session_of_a_plan_is_read_only_and_says_what_it_is(db: Any, bucket: Any, config_file: Any,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    make(db, "a")
    settings = config.load(str(config_file(db, bucket, [table("a")])), {})
    seen: list[Any] = []
    real = plan.eligible.count

    def count(connection: Any, *rest: Any) -> int:
        seen.append(connect.row(connection, "SELECT current_setting('transaction_read_only'), "
                                            "current_setting('application_name')"))
        return real(connection, *rest)

    monkeypatch.setattr(plan.eligible, "count", count)
    found = plan.plan_database(settings.databases[0], settings, "20251230T021545Z-1", plan.Selection())
    assert [job["estimate"] for job in found.jobs] == [1]
    assert seen == [("on", "audit-archiver plan 20251230T021545Z-1")]


def test_a_given_connection_is_used_and_stays_open_and_writable(db: Any, bucket: Any, config_file: Any) -> None:
    make(db, "a")
    settings = config.load(str(config_file(db, bucket, [table("a")])), {})
    connection = connect.connect(settings.databases[0], purpose="control")
    try:
        found = plan.plan_database(settings.databases[0], settings, "20251230T021545Z-1", plan.Selection(),
                                   connection=connection)
        assert len(found.jobs) == 1 and not found.refused
        assert connect.scalar(connection, "SELECT current_setting('transaction_read_only')") == "off"
    finally:
        connection.close()


@pytest.fixture()
def waiting(planned: Planner, db: Any) -> Iterator[Any]:
    """A spawned plan that waits for a lock."""
    make(db, "a")
    planned([table("a")], defaults={"lock_timeout": 3600})
    blocker = db.connect()
    with blocker.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE a IN ACCESS EXCLUSIVE MODE")
    child = spawn("aa-plan", ["-c", planned.path])
    until(lambda: backends(db, "wait_event_type = 'Lock'"), "a plan that waits")
    yield child
    blocker.close()
    if child.poll() is None:
        child.kill()
    child.wait()


def backends(db: Any, condition: str = "true") -> int:
    return int(db.admin("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'audit-archiver plan%' "
                        f"AND datname = current_database() AND {condition}")[0][0])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_plan_that_waits_for_the_server(waiting: Any, db: Any, signum: int) -> None:
    waiting.send_signal(signum)
    result = finish(waiting, seconds=10)
    assert (result.rc, result.out) == (-signum, b"")
    assert result.log[-1]["msg"] == f"stopped by {signal.Signals(signum).name}"
    if db.connection.server_version >= 140000:
        until(lambda: backends(db) == 0, "the server to notice")


def test_a_plan_whose_reader_is_gone_ends_while_it_waits_for_the_server(waiting: Any) -> None:
    waiting.stdout.close()
    assert waiting.wait(timeout=10 * PATIENCE) == 141


def test_it_runs_as_cron_runs_it(planned: Planner, db: Any) -> None:
    db.execute('CREATE TABLE "Prüfung" (id bigint PRIMARY KEY, at timestamptz)')
    result = planned([table("Prüfung")])
    forked = run_forked("aa-plan", ["-c", planned.path, "--table", "Prüfung"],
                        env={"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"})
    assert forked.rc == 0, forked.err
    assert [line["table"] for line in forked.lines] == [line["table"] for line in result.lines] == ["Prüfung"]
