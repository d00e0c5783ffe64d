"""More checks before a run: locks, indexes, wide rows, clocks, slots, circles and the time that a run may take."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from typing import Any, Iterator

import psycopg2
import psycopg2.extras
import pytest

from audit_archiver import config
from audit_archiver.config.model import Table
from audit_archiver.postgres import eligible
from audit_archiver.preflight import checks, findings, on_table
from audit_archiver.preflight.findings import FAIL, OK, WARN
from tests.conftest import Bucket, ConfigFile, TestDatabase
from tests.ground import tables
from tests.ground.looks import bad, database, look, only
from tests.ground.pooler import Pooler
from tests.ground.postgres import QUICK, Cluster
from tests.ground.proxy import Proxy
from tests.ground.wait import until


@pytest.fixture()
def logs(db: TestDatabase) -> TestDatabase:
    """A database with a small audit_logs that is as it should be."""
    tables.create(db.connection, rows=50)
    return db


@contextlib.contextmanager
def transactions(db: TestDatabase, number: int, sql: str, **words: Any) -> Iterator[None]:
    """So many sessions with an open transaction in which `sql` was run."""
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            session = db.connect(**words)
            stack.callback(session.close)
            with session.cursor() as cursor:
                cursor.execute(f"BEGIN; {sql}")
        yield


@pytest.mark.req("REQ-VAL-011")
@pytest.mark.parametrize("mode", ["SHARE", "SHARE ROW EXCLUSIVE", "EXCLUSIVE"])
def test_a_lock_that_would_keep_a_batch_waiting_is_named_with_who_holds_it(logs: TestDatabase, mode: str) -> None:
    with transactions(logs, 1, f"LOCK TABLE audit_logs IN {mode} MODE", application_name="migration"):
        warned = only(look(database(logs)), "table.locks", WARN)
    assert re.search(r"Lock is held by backend \d+ of role 'archiver' \('migration', transaction since 20.*Z\)", warned.text)
    assert "a batch waits 10 s" in (warned.remedy or "")
    assert not bad(look(database(logs)))


@pytest.mark.req("REQ-VAL-011")
def test_a_table_that_nobody_can_read_is_a_failure_and_nothing_waits_for_it(logs: TestDatabase) -> None:
    with transactions(logs, 1, "LOCK TABLE audit_logs"):
        failed = only(look(database(logs, lock_timeout_s=3600)), "table.locks", FAIL)
    assert "AccessExclusiveLock is held by backend" in failed.text and (failed.code, failed.remedy) == (2, "look again when it is over")


@pytest.mark.req("REQ-VAL-011")
def test_a_table_that_many_use_at_once_is_warned_of_and_our_own_sessions_are_none_of_them(logs: TestDatabase) -> None:
    use = "INSERT INTO audit_logs SELECT * FROM audit_logs WHERE false"
    with transactions(logs, on_table.BUSY_SESSIONS - 1, use), transactions(logs, 1, use, application_name="audit-archiver batch 1"):
        assert not bad(look(database(logs)))
        with transactions(logs, 1, use):
            warned = only(look(database(logs)), "table.locks", WARN)
    assert warned.text == f"{on_table.BUSY_SESSIONS} sessions use it now" and "mode: late" in (warned.remedy or "")


@pytest.mark.req("REQ-TBL-007", "REQ-TBL-008")
def test_a_table_of_a_gigabyte_without_an_index_fails_unless_it_is_forced(logs: TestDatabase) -> None:
    logs.execute("DROP INDEX audit_logs_created_at_id_idx")
    grow(logs, "audit_logs", on_table.LARGE_BYTES - 8192)
    assert ("table.index", WARN) in bad(look(database(logs)))
    grow(logs, "audit_logs", on_table.LARGE_BYTES)

    failed = next(each for each in look(database(logs)) if each.check == "table.index")
    assert (failed.status, failed.code) == (FAIL, 3) and "each batch reads 1.07 GB" in failed.text
    assert failed.remedy == 'CREATE INDEX CONCURRENTLY ON "public"."audit_logs" ("created_at", "id")'

    assert only(look(database(logs), force=True, thorough=False), "table.index", WARN).code == 0
    logs.execute(failed.remedy)
    assert not bad(look(database(logs), thorough=False))


def grow(db: TestDatabase, table: str, size: int) -> None:
    """Make a table's file so large with pages of zeros, which take no room on disk and hold no rows."""
    path = db.cluster.data / db.admin("SELECT pg_relation_filepath(%s::regclass)", (table,))[0][0]
    os.truncate(path, size)


@pytest.mark.req("REQ-RES-016")
def test_a_table_that_is_larger_than_max_table_tb_is_refused(logs: TestDatabase) -> None:
    grow(logs, "audit_logs", 2 << 20)
    assert not bad(look(database(logs, max_table_tb=3e-6)))
    failed = only(look(database(logs, max_table_tb=2e-6), thorough=False), "table.size", FAIL)  # a run looks too
    assert re.match(r"it takes 2\.\d+e-06 TB, more than max_table_tb \(2e-06\)", failed.text) and failed.code == 3
    assert "raise resources.max_table_tb" in (failed.remedy or "")


def test_rows_too_wide_for_a_full_batch_are_warned_of_with_a_batch_size_that_fits(logs: TestDatabase) -> None:
    logs.execute("CREATE TABLE wide (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, body text)")
    logs.execute("ALTER TABLE wide ALTER body SET STORAGE EXTERNAL; CREATE INDEX ON wide (created_at)")
    logs.execute("INSERT INTO wide SELECT i, now() - interval '1 year', repeat('x', 100000) FROM generate_series(1, 20) i; ANALYZE wide")
    wide = Table("wide", "created_at", ("id",), batch_size=10_000)
    warned = only(look(database(logs, wide)), "table.width", WARN)
    assert re.match(r"rows take 10\d kB each, so batches end at 268 MB and not at 10,000 rows$", warned.text)
    size = int(re.findall(r"'batch_size: (\d+)'", warned.remedy or "")[0])
    assert 2400 < size < 2700
    assert not bad(look(database(logs, dataclasses.replace(wide, batch_size=size))))
    assert not bad(look(database(logs, wide), thorough=False))


def test_dead_rows_make_no_row_wider(logs: TestDatabase) -> None:
    logs.execute("CREATE TABLE bloated (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, body text)")
    logs.execute("INSERT INTO bloated SELECT i, now(), repeat('x', 100) FROM generate_series(1, 20000) i; DELETE FROM bloated WHERE id > 100")
    logs.execute("VACUUM ANALYZE bloated")
    grow(logs, "bloated", 64 << 20)
    settings = database(logs, Table("bloated", "created_at", ("id",)))
    amount = [each for each in checks.run_checks(config.Config("c", config.S3("b"), (settings,)), [(settings, settings.tables)], None)
              if each.check == "run.duration"]
    assert amount[0].status == OK and "0:0" in amount[0].text


@pytest.mark.req("REQ-TIME-006")
def test_timestamps_without_zone_are_warned_of_where_the_database_s_clock_changes(logs: TestDatabase) -> None:
    logs.execute("ALTER TABLE audit_logs ALTER created_at TYPE timestamp")
    assert not bad(look(database(logs)))
    logs.admin(f"ALTER DATABASE {logs.name} SET timezone = 'Asia/Tokyo'")  # which knows no summer time
    assert not bad(look(database(logs)))
    logs.admin(f"ALTER DATABASE {logs.name} SET timezone = 'Europe/Berlin'")
    warned = only(look(database(logs)), "table.dst", WARN)
    assert "Europe/Berlin, whose clock changes" in warned.text and "timestamptz" in (warned.remedy or "")
    logs.execute("ALTER TABLE audit_logs ALTER created_at TYPE timestamptz")
    assert not bad(look(database(logs)))


@pytest.mark.req("REQ-TIME-002")
@pytest.mark.parametrize("seconds, says", [(-301, "ahead of"), (301, "behind"), (299, None)])
def test_a_host_whose_clock_is_more_than_five_minutes_off_is_warned_of(logs: TestDatabase, seconds: float, says: Any,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(eligible.time, "time", lambda: real() + seconds)
    found = look(database(logs))
    if says is None:
        assert not bad(found)
    else:
        warned = only(found, "server.clock", WARN)
        assert says in warned.text and "NTP" in (warned.remedy or "")
    monkeypatch.undo()


@pytest.mark.req("REQ-VAL-009")
def test_tables_that_keep_each_other_s_rows_in_a_circle_are_named(logs: TestDatabase) -> None:
    columns = "id bigint PRIMARY KEY, created_at timestamptz NOT NULL, other bigint"
    for name in "abcd":
        logs.execute(f"CREATE TABLE {name} ({columns})")
    for name, other in ("ab", "bc", "cd"):
        logs.execute(f"ALTER TABLE {name} ADD CONSTRAINT {name}_key FOREIGN KEY (other) REFERENCES {other}")
    made = database(logs, *(Table(name, "created_at", ("id",)) for name in "abcd"))
    assert ("tables.circle", WARN) not in bad(look(made))  # a chain is no circle

    logs.execute("ALTER TABLE c ADD CONSTRAINT back FOREIGN KEY (other) REFERENCES a")
    warned = [each for each in look(made) if each.check == "tables.circle"]
    assert [(each.status, each.text) for each in warned] == [(WARN, "public.a -> public.b -> public.c -> public.a reference each other in a circle")]
    assert "NULL" in (warned[0].remedy or "")
    assert findings.lines(warned) == [f"warn  {logs.name}: circle  {warned[0].text}. {warned[0].remedy}"]
    only_two = database(logs, *(Table(name, "created_at", ("id",)) for name in "ab"))
    assert ("tables.circle", WARN) not in bad(look(only_two))  # c is not archived, so its rows just stay


@pytest.mark.req("T41")
def test_a_pooler_in_between_is_recognized_on_the_wire(logs: TestDatabase) -> None:
    with Pooler(logs.host, logs.port) as pooler:
        failed = only(look(database(logs, host="127.0.0.1", port=pooler.port)), "connection.session", FAIL)
    assert failed.text == "a connection pooler sits between this host and the server" and "name the server itself" in (failed.remedy or "")
    with Proxy(f"{logs.host}/.s.PGSQL.{logs.port}") as proxy:  # one that only passes on is none
        found = look(database(logs, host="127.0.0.1", port=proxy.port))
    assert not bad(found) and "no TLS" in found[0].text and found[0].text.endswith("no pooler")


def test_logical_replication_slots_will_carry_the_deletes_and_one_that_nobody_reads_keeps_them() -> None:
    with Cluster.start(settings={**QUICK, "wal_level": "logical"}) as cluster:
        admin = cluster.connect()
        with admin.cursor() as cursor:
            cursor.execute("CREATE ROLE archiver LOGIN")
            cursor.execute("CREATE DATABASE prod OWNER archiver")
        admin.close()
        db = TestDatabase(cluster, "prod")
        tables.create(db.connection, rows=50)
        assert not bad(look(database(db)))
        db.admin("SELECT pg_create_logical_replication_slot('to_warehouse', 'pgoutput')")
        warned = only(look(database(db)), "server.slots", WARN)
        assert "nobody reads from the replication slot 'to_warehouse'" in warned.text
        db.admin("CREATE PUBLICATION nothing")
        reader = psycopg2.connect(db.admin_dsn, connection_factory=psycopg2.extras.LogicalReplicationConnection)
        reader.cursor().start_replication("to_warehouse", options={"proto_version": "1", "publication_names": "nothing"})
        read = only(look(database(db)), "server.slots", WARN)
        assert "'to_warehouse' will carry every delete" in read.text and "may lose the archived rows" in (read.remedy or "")
        reader.close()
        until(lambda: not db.admin("SELECT active FROM pg_replication_slots")[0][0], "nobody reads from the slot")
        db.admin((warned.remedy or "").partition(", or ")[2])
        assert not bad(look(database(db)))
        db.close()


@pytest.mark.req("REQ-VAL-012", "REQ-RES-017", "REQ-RES-018")
def test_the_time_a_run_may_take_is_estimated_and_more_than_eight_hours_are_refused(
        logs: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    path = config_file(logs, bucket, defaults={"retention_days": 90, "batch_size": 2, "sleep_between_batches": 60})
    settings = config.load(str(path), {})

    def duration() -> Any:
        found = checks.run_checks(settings, [(each, each.tables) for each in settings.databases], None)
        return next(each for each in found if each.check == "run.duration")

    said = duration()
    assert said.status == OK and re.match(r"about [2-5]\d rows in [12]\d batches: 0:[12]\d h, of which 0:[12]\d h asleep", said.text)
    tables.fill(logs.connection, rows=1200, first="2024-01-01", last="2024-12-31", start=1000)
    logs.execute("ANALYZE audit_logs")
    failed = duration()
    assert (failed.status, failed.code) == (FAIL, 3) and re.match(r"about 1,2\d\d rows in 6\d\d batches: 1\d:\d\d h", failed.text)
    assert "max_run_hours is 8" in failed.text and "batch_size" in (failed.remedy or "")
    settings = dataclasses.replace(settings, resources=dataclasses.replace(settings.resources, max_run_hours=20))
    assert duration().status == OK


@pytest.mark.req("REQ-DB-009", "REQ-VAL-001")
def test_credentials_that_the_server_refuses_are_a_failure_before_anything_moves(logs: TestDatabase) -> None:
    made = database(logs, user="nobody_of_that_name")
    found = checks.run_checks(config.Config("prod.yaml", config.S3("b"), (made,)), [(made, made.tables)], None)
    assert [(each.check, each.status, each.at) for each in found if each.status != OK] == [("connection.session", FAIL, "prod.yaml:4")]
    assert found[0].code == 5


def test_a_standby_is_refused_with_the_primary_as_the_remedy() -> None:
    with Cluster.start() as server:
        admin = server.connect()
        with admin.cursor() as cursor:
            cursor.execute("CREATE ROLE archiver LOGIN")
            cursor.execute("CREATE DATABASE prod OWNER archiver")
        admin.close()
        db = TestDatabase(server, "prod")
        tables.create(db.connection, rows=50)
        db.close()
        server.down()
        old = int(server.version.split(".")[0]) < 12
        note = server.data / ("recovery.conf" if old else "standby.signal")
        note.write_text("standby_mode = 'on'\n" if old else "")
        os.chown(note, server.data.stat().st_uid, server.data.stat().st_gid)
        server.up()
        failed = only(look(database(db)), "server.primary", FAIL)
        assert "is a standby, which cannot delete" in failed.text and failed.remedy == "name the primary as host"
