"""aa-archive from its first lock to its report: what it moves, what it leaves, and how a rerun goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml

from audit_archiver import exits
from audit_archiver.formats import names
from audit_archiver.postgres import locks
from tests.ground import kill, tables
from tests.ground.driven import Driven, logs, summary
from tests.ground.held import backends, lock_row, staged_files
from tests.ground.run import finish
from tests.ground.wait import until

T8_NAMES = ["t", "T", "_t", "audit_t", "audit", "t t"]


@pytest.fixture()
def driven(db: Any, bucket: Any, config_file: Any) -> Callable[..., Driven]:
    """A function that writes a configuration and gives its runs."""
    return lambda *args, **more: Driven(db, bucket, config_file(db, bucket, *args, **more))


@pytest.mark.req("REQ-DB-001", "REQ-TXN-001", "REQ-ARC-002", "REQ-ARC-006", "REQ-ARC-011", "REQ-VER-018", "REQ-VER-019", "T26")
def test_old_rows_move_and_are_the_same_and_a_second_run_has_nothing_to_do(db: Any, driven: Callable[..., Driven]) -> None:
    # GIVEN 350 rows that are due, and 50 that are not
    before = logs(db)
    runs = driven(defaults={"batch_size": 100})
    # WHEN they are archived
    made = runs.ran()
    # THEN the young ones are left, the old ones are in the bucket, and together they are what was there
    assert db.scalar("SELECT count(*) FROM audit_logs") == 50
    assert runs.whole("public.audit_logs", before) == 350
    assert (made["exit"], made["totals"]["rows"], made["totals"]["objects"]) == (0, 350, len(runs.sizes()))
    assert all(line["committed"]["sample_absent"] for line in runs.archive.commits())
    assert staged_files(runs.settings.staging_dir) == []
    # AND WHEN it runs again THEN nothing is done, and nothing is written
    keys = runs.archive.keys()
    again = runs.ran()
    assert (again["totals"]["tables"]["nothing"], again["totals"]["rows"], runs.archive.keys()) == (1, 0, keys)


@pytest.mark.req("T1", "REQ-IDEM-003")
def test_rows_that_appear_in_a_range_that_was_archived_are_taken_by_the_next_run(db: Any, driven: Callable[..., Driven]) -> None:
    # GIVEN a table that was archived, and the same range filled again: with new rows, and with one that was put back
    logs(db, old=100, young=0)
    db.execute("CREATE TABLE public.kept AS SELECT * FROM audit_logs WHERE id = 50")
    runs = driven()
    runs.ran()
    tables.fill(db.connection, rows=70, first="2024-03-01", last="2024-06-01", start=1000)
    db.execute("INSERT INTO audit_logs SELECT * FROM kept")
    # WHEN it runs again THEN each of them is archived; none is skipped because its range was known
    assert runs.ran()["totals"]["rows"] == 71
    assert (db.scalar("SELECT count(*) FROM audit_logs"), sum(runs.sizes())) == (0, 171)


@pytest.mark.req("REQ-EXE-002", "T13")
def test_limit_takes_the_oldest_rows_and_leaves_every_other(db: Any, driven: Callable[..., Driven]) -> None:
    before = logs(db, old=250)
    runs = driven(defaults={"batch_size": 60})
    wanted = {row[0] for row in db.execute("SELECT id FROM audit_logs ORDER BY created_at, id LIMIT 130")}
    assert runs.ran("--limit", 130)["totals"]["rows"] == 130
    assert wanted.isdisjoint(row[0] for row in db.execute("SELECT id FROM audit_logs"))
    assert runs.whole("public.audit_logs", before) == 130


@pytest.mark.req("REQ-EXE-003")
def test_start_and_end_dates_bound_what_is_taken_and_an_end_date_is_included(db: Any, driven: Callable[..., Driven]) -> None:
    before = logs(db, old=366, young=10)
    inside = "created_at >= '2024-03-01+00' AND created_at < '2024-04-01+00'"
    wanted = db.scalar(f"SELECT count(*) FROM audit_logs WHERE {inside}")
    runs = driven()
    assert runs.ran("--start-date", "2024-03-01", "--end-date", "2024-03-31")["totals"]["rows"] == wanted == 31
    assert db.scalar(f"SELECT count(*) FROM audit_logs WHERE {inside}") == 0
    assert runs.whole("public.audit_logs", before) == 31


@pytest.mark.req("REQ-EXE-003", "REQ-ARC-001")
def test_an_end_date_in_the_future_takes_no_row_that_must_be_kept(db: Any, driven: Callable[..., Driven]) -> None:
    logs(db, old=40, young=30)
    driven().ran("--end-date", "2099-12-31")
    assert db.scalar("SELECT count(*) FROM audit_logs") == 30


@pytest.mark.req("REQ-ARC-013", "REQ-ARC-014")
def test_batches_grow_by_half_from_batch_size_while_they_are_quick(db: Any, driven: Callable[..., Driven]) -> None:
    before = logs(db, old=600, young=0)
    runs = driven(defaults={"batch_size": 7})
    runs.ran("--batch-size", 40)
    sizes = runs.sizes()
    assert sizes[0] == 40 and max(sizes[:-1]) > 60, sizes
    for size, later in zip(sizes, sizes[1:-1]):
        assert later in (size, size * 3 // 2, size * 3 // 2 * 3 // 2), f"{sizes}: a batch in flight may be one step behind"
    assert runs.whole("public.audit_logs", before) == 600


@pytest.mark.req("T8", "T58")
def test_look_alike_names_in_two_schemas_are_archived_apart(db: Any, driven: Callable[..., Driven]) -> None:
    db.execute("CREATE SCHEMA audit")
    db.execute('CREATE SCHEMA "Ä b"')
    places = [("public", name) for name in T8_NAMES] + [("audit", "t"), ("Ä b", "t")]
    before = {}
    for number, (schema, name) in enumerate(places):
        before[schema, name] = logs(db, f'"{schema}"."{name}"', old=10 + number, young=3)
    runs = driven([{"schema": schema, "name": name, "timestamp_column": "created_at", "primary_key": "id"} for schema, name in places])
    assert runs.ran()["totals"]["tables"]["done"] == len(places)
    for number, (schema, name) in enumerate(places):
        assert runs.whole(f'"{schema}"."{name}"', before[schema, name], name=name, schema=schema) == 10 + number
    directories = {names.table_dir("archives/", db.name, schema, name) for schema, name in places}
    assert len(directories) == len(places)
    assert {key.partition("year=")[0] for key in runs.archive.keys() if "/year=" in key} == directories


def test_a_composite_key_and_a_date_column_are_archived_in_order(db: Any, driven: Callable[..., Driven]) -> None:
    db.execute("""CREATE TABLE public.visits (day date NOT NULL, "Who" text NOT NULL, n int NOT NULL, note text, PRIMARY KEY ("Who", n))""")
    db.execute("""INSERT INTO public.visits SELECT date '2024-01-01' + i / 7, 'user ' || i % 5 || '"''\\', i, NULLIF('x' || i, 'x3')
                  FROM generate_series(1, 200) i""")
    db.execute("INSERT INTO public.visits SELECT current_date, 'now', i FROM generate_series(1, 4) i")
    before = tables.digest(db.connection, "public.visits")
    runs = driven([{"name": "visits", "timestamp_column": "day", "primary_key": ["Who", "n"]}], defaults={"batch_size": 50})
    runs.ran()
    assert runs.whole("public.visits", before) == 200
    days = [line["batch"]["first"][0] for line in runs.archive.commits()]
    assert days == sorted(days) and db.scalar("SELECT count(*) FROM visits") == 4


@pytest.mark.req("T58", "REQ-DB-005")
def test_one_refused_table_leaves_the_others_archived_and_exits_1(db: Any, driven: Callable[..., Driven]) -> None:
    for name in ("first", "last"):
        logs(db, f"public.{name}", old=30)
    db.execute("CREATE TABLE public.keyless AS SELECT * FROM public.first")
    named = [{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in ("first", "keyless", "gone", "last")]
    runs = driven(named)
    result = runs.run()
    made = summary(result)
    assert (result.rc, made["exit"]) == (exits.SOME_FAILED, exits.SOME_FAILED)
    outcomes = {table["table"]: table["outcome"] for table in made["databases"][0]["tables"]}
    assert outcomes == {"first": "done", "keyless": "refused", "gone": "refused", "last": "done"}
    assert [(error["table"], error["code"]) for error in made["errors"]] == [("keyless", 3), ("gone", 3)]
    assert db.scalar("SELECT count(*) FROM keyless") == 80
    assert [db.scalar(f"SELECT count(*) FROM {name}") for name in ("first", "last")] == [50, 50]


@pytest.mark.req("T58", "REQ-DB-005", "REQ-DB-003")
def test_an_unreachable_database_does_not_stop_the_next_one(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> None:
    logs(db, old=30)
    path = config_file(db, bucket)
    settings = yaml.safe_load(path.read_text())
    nobody = {**settings["databases"][0], "name": "elsewhere", "host": str(tmp_path)}
    settings["databases"].insert(0, nobody)
    path.write_text(yaml.safe_dump(settings))
    runs = Driven(db, bucket, path)
    result = runs.run()
    made = summary(result)
    assert result.rc == exits.SOME_FAILED, result.err
    assert [(each["name"], each["tables"][0]["outcome"]) for each in made["databases"]] == [("elsewhere", "refused"), (db.name, "done")]
    assert made["errors"][0]["code"] == exits.NETWORK and db.scalar("SELECT count(*) FROM audit_logs") == 50


def test_when_every_table_failed_for_one_reason_its_code_is_the_exit_code(db: Any, driven: Callable[..., Driven]) -> None:
    logs(db)
    result = driven(database={"user": "nobody_of_that_name"}).run()
    assert (result.rc, summary(result)["exit"]) == (exits.PERMISSION, exits.PERMISSION), result.err
    assert db.scalar("SELECT count(*) FROM audit_logs") == 400


def test_database_and_table_choose_what_is_archived(db: Any, driven: Callable[..., Driven]) -> None:
    for name in ("one", "two"):
        logs(db, f"public.{name}", old=20)
    runs = driven([{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in ("one", "two")])
    assert runs.ran("--database", db.name, "--table", "public.two")["totals"]["rows"] == 20
    assert [db.scalar(f"SELECT count(*) FROM {name}") for name in ("one", "two")] == [70, 50]
    result = runs.run("--table", "tow")
    assert (result.rc, result.out) == (exits.CONFIG, b"") and "did you mean" in result.err


@pytest.mark.parametrize("scope", ["database", "table"])
@pytest.mark.parametrize("mode", ["held", "late"])
def test_each_locking_mode_and_scope_makes_the_same_archive(db: Any, driven: Callable[..., Driven], mode: str, scope: str) -> None:
    before = logs(db, old=230)
    expected = {(row[0], row[1]) for row in db.execute("SELECT id, created_at FROM audit_logs WHERE created_at < '2025-01-01'")}
    runs = driven(locking={"mode": mode, "scope": scope})
    made = runs.ran()
    assert (made["totals"]["rows"], db.scalar("SELECT count(*) FROM audit_logs")) == (230, 50)
    assert runs.whole("public.audit_logs", before) == 230
    assert len(expected) == 230
    commits = runs.archive.commits()
    assert {line["committed"]["by"] for line in commits} == {"holder" if mode == "held" else "aa-delete"}
    assert {line["deleted"]["verdict"] for line in commits} == {"FULL"}


@pytest.mark.parametrize("mode", ["held", "late"])
def test_a_table_that_another_run_holds_is_left_out_by_name_and_the_others_are_done(db: Any, driven: Callable[..., Driven], mode: str) -> None:
    for name in ("one", "taken", "three"):
        logs(db, f"public.{name}", old=40, young=5)
    db.execute("SELECT pg_advisory_lock(%s, 'taken'::regclass::oid::int)", (locks.K1_CLASS,))
    tables_ = [{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in ("one", "taken", "three")]

    result = driven(tables_, locking={"mode": mode, "scope": "table"}).run()

    made = summary(result)
    assert (result.rc, [table["outcome"] for table in made["databases"][0]["tables"]]) == (exits.SOME_FAILED, ["done", "failed", "done"]), result.err
    assert [(error["table"], error["code"]) for error in made["errors"]] == [("taken", exits.LOCKED)]
    assert "is locked by another run" in made["errors"][0]["msg"]
    assert [db.scalar(f"SELECT count(*) FROM {name}") for name in ("one", "taken", "three")] == [5, 45, 5]


@pytest.mark.req("REQ-VAC-001", "REQ-VAC-002")
@pytest.mark.parametrize("strategy", ["none", "analyze", "standard", "full"])
def test_the_table_is_vacuumed_as_configured_after_its_batches(db: Any, driven: Callable[..., Driven], strategy: str) -> None:
    logs(db, old=600, young=20)
    space = driven(defaults={"vacuum_strategy": strategy, "batch_size": 300}).ran()["databases"][0]["tables"][0]["space"]
    assert (space["strategy"], space["problem"]) == (strategy, None)
    assert space["done"] is (strategy != "none")
    assert (space["returned"] > 0) is (strategy == "full")
    if strategy == "standard":
        assert space["reusable"] > 0 and space["returned"] == 0


@pytest.mark.req("T35")
@pytest.mark.parametrize("mode", ["held", "late"])
def test_a_vacuum_meets_no_open_transaction_of_the_run_and_removes_every_dead_row(db: Any, driven: Callable[..., Driven], mode: str) -> None:
    """VACUUM removes no row that an open transaction may still see, so each VACUUM is stopped where it begins and looked around from."""
    # GIVEN two tables, and for each somebody whose lock lets rows be locked and deleted, but no VACUUM begin
    names = ("one", "two")
    others = [db.connect() for _ in names]
    for name, other in zip(names, others):
        logs(db, f"public.{name}", old=120, young=20)
        lock_row(other, f"LOCK TABLE {name} IN SHARE UPDATE EXCLUSIVE MODE")
    runs = driven([{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in names], locking={"mode": mode},
                  defaults={"vacuum_strategy": "standard", "batch_size": 50, "lock_timeout": 60})
    child = runs.spawn()

    def waits_for(name: str) -> bool:
        assert child.poll() is None, f"it ended without a VACUUM of '{name}'"
        return db.admin("SELECT query FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'audit-archiver vacuum %%' "
                        "AND wait_event_type = 'Lock'", (db.name,)) == [(f'VACUUM (ANALYZE) "public"."{name}"',)]

    for name, other in zip(names, others):
        # WHEN its VACUUM waits THEN every row has left, and no transaction is open but the waiting one and those of this test
        until(lambda name=name: waits_for(name), f"the VACUUM of '{name}' waits")  # type: ignore[misc]
        assert db.execute("SELECT (SELECT count(*) FROM one), (SELECT count(*) FROM two)") == [(20, 20)]
        assert db.admin("SELECT application_name, state, query FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend' "
                        "AND coalesce(xact_start::text, backend_xid::text, backend_xmin::text) IS NOT NULL AND pid <> ALL (%s) "
                        "AND pid <> pg_backend_pid() AND application_name NOT LIKE 'audit-archiver vacuum %%'",
                        (db.name, [each.info.backend_pid for each in others if not each.closed])) == []
        other.close()
    # AND nothing but these VACUUMs has removed the dead rows, all of them
    result = finish(child)
    assert result.rc == 0, result.err
    for table in summary(result)["databases"][0]["tables"]:
        assert (table["rows"], table["space"]["done"], table["space"]["problem"]) == (120, True, None)
    until(lambda: db.execute("SELECT n_dead_tup, vacuum_count, autovacuum_count FROM pg_stat_user_tables ORDER BY relname") == [(0, 1, 0)] * 2,
          "the statistics show that no dead row is left")


@pytest.mark.req("T7", "T58")
def test_rows_without_a_usable_time_stay_and_are_reported_and_later_tables_go_on(db: Any, driven: Callable[..., Driven]) -> None:
    db.execute("CREATE TABLE public.odd (id int PRIMARY KEY, created_at timestamptz)")
    db.execute("""INSERT INTO public.odd VALUES (1, NULL), (2, 'infinity'), (3, '-infinity'), (4, '0044-03-15 12:00:00+00 BC'),
                  (5, '2024-01-01 00:00:00+05:45'), (6, '294276-12-31 23:59:59+00'), (7, '0001-01-01 00:00:00+00')""")
    logs(db, "public.later", old=20)
    before = tables.digest(db.connection, "public.odd")
    runs = driven([{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in ("odd", "later")])
    made = runs.ran()
    odd, later = made["databases"][0]["tables"]
    assert (odd["rows"], odd["left"]["null_timestamps"], odd["left"]["infinite_timestamps"], later["rows"]) == (3, 1, 2, 20)
    assert [row[0] for row in db.execute("SELECT id FROM odd ORDER BY id")] == [1, 2, 3, 6]
    assert runs.whole("public.odd", before) == 3


def test_a_run_leaves_no_session_and_no_process_behind(db: Any, driven: Callable[..., Driven]) -> None:
    logs(db, old=120)
    child = driven().spawn()
    child.communicate(timeout=60)
    assert child.returncode == 0
    kill.all_gone(child.token)
    until(lambda: backends(db, "audit-archiver%") == [], "the server has noticed that every session was closed")


@pytest.mark.req("REQ-RES-017", "REQ-RES-018", "REQ-EXE-005")
def test_more_than_fits_into_max_run_hours_is_refused_unless_it_is_limited_or_forced(db: Any, driven: Callable[..., Driven]) -> None:
    def said(made: dict[str, Any]) -> list[str]:
        return [warning["msg"] for warning in made["warnings"] if "max_run_hours" in warning["msg"]]

    logs(db, old=301, young=0)
    runs = driven(defaults={"batch_size": 1, "sleep_between_batches": 0.1}, resources={"max_run_hours": 0.005})  # 18 s; 300 pauses are 30 s

    result = runs.run()

    [error] = summary(result)["errors"]
    assert (result.rc, error["code"], db.scalar("SELECT count(*) FROM audit_logs"), runs.archive.keys()) == (exits.CONFIG, exits.CONFIG, 301, [])
    for part in ("about 301 rows in 301 batches: 0:01 h", "max_run_hours is 0.005", "--limit", "--force"):
        assert part in error["msg"]
    assert runs.ran("--limit", 20)["totals"]["rows"] == 20
    forced = runs.ran("--force", "--batch-size", 100)
    assert forced["totals"]["rows"] == 281 and not said(forced), "so few batches fit"
    tables.fill(db.connection, "public.audit_logs", rows=201, first="2024-01-01", last="2024-02-01", start=1000)
    forced = runs.ran("--force")
    assert forced["totals"]["rows"] == 201
    assert said(forced) == ["about 201 rows in 201 batches: 0:01 h, of which 0:01 h asleep between batches; max_run_hours is 0.005"]


@pytest.mark.req("REQ-RES-007", "REQ-RES-008")
@pytest.mark.parametrize("mode", ["held", "late"])
def test_a_disk_that_fills_up_during_a_run_ends_it_after_the_batches_in_flight(db: Any, driven: Callable[..., Driven], tmp_path: Path,
                                                                            mode: str) -> None:
    # GIVEN a run that is stopped in its first batch, with 1 GB more on the disk than it wants
    free = shutil.disk_usage(tmp_path).free / 1e9
    if free < 3:
        pytest.skip("there are no 3 GB free to take away")
    for name in ("one", "two"):
        logs(db, f"public.{name}", old=400, young=0)
    tables_ = [{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in ("one", "two")]
    runs = driven(tables_, resources={"min_free_disk_gb": free - 1}, locking={"mode": mode},
                  defaults={"batch_size": 10, "sleep_between_batches": 0.5})
    child = runs.spawn(env={"AA_TEST_POINT": "upload.data.put"})
    stopped = kill.stopped_at("upload.data.put", child.token, ended=child.poll)
    # WHEN something takes these, and it goes on
    with open(tmp_path / "large", "wb") as large:
        os.posix_fallocate(large.fileno(), 0, 2_000_000_000)
    kill.go_on(stopped)
    result = finish(child)
    (tmp_path / "large").unlink()
    # THEN what was in flight is archived, nothing else, and the run says why
    said = summary(result)
    assert result.rc == exits.RESOURCE, result.err
    assert {error["code"] for error in said["errors"]} == {exits.RESOURCE} and "min_free_disk_gb is" in said["errors"][0]["msg"]
    assert "disk.short" in [record["event"] for record in result.log]
    left = [db.scalar(f"SELECT count(*) FROM {name}") for name in ("one", "two")]
    assert 10 <= said["totals"]["rows"] == 800 - sum(left) <= 100 and left[1] == 400, (said["totals"], left)
    assert staged_files(runs.settings.staging_dir) == []
    runs.ran("--batch-size", 1000)
    assert [db.scalar(f"SELECT count(*) FROM {name}") for name in ("one", "two")] == [0, 0]
    assert sum(runs.sizes()) == 800


@pytest.mark.req("REQ-RES-008")
def test_a_disk_that_is_short_from_the_beginning_lets_no_run_begin(db: Any, driven: Callable[..., Driven]) -> None:
    logs(db, old=20, young=0)
    runs = driven(resources={"min_free_disk_gb": 1_000_000})
    result = runs.run()
    [error] = summary(result)["errors"]
    assert (result.rc, db.scalar("SELECT count(*) FROM audit_logs"), runs.archive.keys()) == (exits.RESOURCE, 20, [])
    assert "GB free and min_free_disk_gb is 1e+06" in error["msg"]


@pytest.mark.req("REQ-OBS-013")
def test_what_is_done_again_after_a_failure_is_counted_once_and_no_error_when_it_goes_well(db: Any, driven: Callable[..., Driven]) -> None:
    logs(db, old=30, young=0)
    somebody = db.connect()
    lock_row(somebody, "SELECT FROM audit_logs WHERE id = 7 FOR UPDATE")
    runs = driven(s3={"retry_base_s": 0.1, "retry_max_s": 0.1})
    child = runs.spawn(env={"AA_TEST_POINT": "upload.data.put"})
    kill.kill(kill.stopped_at("upload.data.put", child.token, ended=child.poll))
    kill.wave_through("upload.data.put", child.token, child.poll)
    result = finish(child)
    somebody.close()

    made = summary(result)
    assert (result.rc, made["totals"]["rows"], made["databases"][0]["tables"][0]["left"]["locked"]) == (0, 29, 1), result.err
    assert "pipeline.retry" in [record["event"] for record in result.log]
    assert [record for record in result.log if record["level"] == "ERROR"] == [], "with --quiet not a byte would be written"
