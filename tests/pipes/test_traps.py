"""Traps of selection, time and counting, each tried on aa-archive as a whole: what runs beside it must cost no row.

The T numbers are in the markers; C and S entries of the notes on PostgreSQL stand in the docstrings.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any, Callable

import pytest

from audit_archiver import exits
from audit_archiver.postgres import connect, locks
from tests.ground import kill, tables
from tests.ground.by_hand import ByHand, dump
from tests.ground.driven import Driven, logs, summary
from tests.ground.held import lock_row
from tests.ground.pooler import Pooler
from tests.ground.run import BIN, finish, run_forked

KEYED = {"timestamp_column": "created_at", "primary_key": "id"}


@pytest.fixture()
def driven(db: Any, bucket: Any, config_file: Any) -> Callable[..., Driven]:
    """A function that writes a configuration and gives its runs."""
    return lambda *args, **more: Driven(db, bucket, config_file(db, bucket, *args, **more))


@pytest.mark.req("T2", "T5", "REQ-LOCK-001", "REQ-LOCK-002", "REQ-LOCK-005", "REQ-VER-001", "REQ-VER-004")
def test_rows_that_others_have_locked_are_counted_apart_and_taken_by_the_next_run(db: Any, driven: Callable[..., Driven]) -> None:
    # GIVEN somebody who holds three rows in the middle of what is due
    before = logs(db, old=120, young=0)
    runs, other = driven(defaults={"batch_size": 50}), db.connect()
    lock_row(other, "SELECT * FROM audit_logs WHERE id IN (3, 60, 61) FOR UPDATE")
    # WHEN the table is archived THEN every other row goes, the counts agree, and those three are said
    made = runs.ran()
    table = made["databases"][0]["tables"][0]
    assert (table["rows"], table["left"]["locked"], table["outcome"]) == (117, 3, "done")
    for commit in runs.archive.commits():
        counts = {commit["batch"]["rows"], commit["serialized"]["rows"], commit["verified"]["rows"], commit["deleted"]["rows"]}
        assert len(counts) == 1
    assert [row[0] for row in db.execute("SELECT id FROM audit_logs ORDER BY id")] == [3, 60, 61]
    # AND WHEN they are free THEN the next run takes them, though they lie before everything that is archived
    other.close()
    assert runs.ran()["totals"]["rows"] == 3
    assert runs.whole("public.audit_logs", before) == 120


@pytest.mark.req("T3", "REQ-ARC-018")
def test_a_row_that_commits_late_with_an_old_time_is_taken_by_the_next_run(db: Any, driven: Callable[..., Driven]) -> None:
    logs(db, old=60, young=0)
    runs, other = driven(), db.connect()
    lock_row(other, "INSERT INTO audit_logs (id, created_at, action) VALUES (9001, '2024-02-02 02:02:02+00', 'late')")
    assert runs.ran()["totals"]["rows"] == 60
    assert runs.archive.commits()[-1]["batch"]["last"][0] > "2024-02-02"
    with other.cursor() as cursor:
        cursor.execute("COMMIT")
    other.close()
    assert runs.ran()["totals"]["rows"] == 1
    assert b'"action":"late"' in runs.archive.rows(runs.archive.commits()[-1])[0]


@pytest.mark.req("T4", "REQ-ARC-007", "REQ-ARC-008", "REQ-ARC-009")
def test_thousands_of_rows_with_one_timestamp_are_neither_lost_nor_doubled_at_batch_boundaries(db: Any, driven: Callable[..., Driven]) -> None:
    """The columns n and tid bear the names that the batch table would use."""
    db.execute("CREATE TABLE public.ties (id uuid PRIMARY KEY, created_at timestamp NOT NULL, n int, tid text)")
    db.execute("INSERT INTO ties SELECT md5(i::text)::uuid, '2024-01-01 00:00:00', i FROM generate_series(1, 10000) i")
    db.execute("CREATE INDEX ON ties (created_at, id)")
    before = tables.digest(db.connection, "public.ties")
    runs = driven([{"name": "ties", **KEYED}], defaults={"batch_size": 7})
    runs.ran()
    commits = runs.archive.commits()
    assert len(commits) > 15 and commits[0]["batch"]["rows"] == 7
    for one, later in zip(commits, commits[1:]):
        assert one["batch"]["last"][1] < later["batch"]["first"][1], "batches follow one another by key within one timestamp"
    assert runs.whole("public.ties", before) == 10_000


@pytest.mark.req("T6", "REQ-TIME-001", "REQ-TIME-003", "REQ-TIME-004", "REQ-TIME-007", "REQ-TIME-008", "REQ-ARC-002")
@pytest.mark.parametrize("zone", ["Europe/Berlin", "Pacific/Kiritimati"])
def test_the_cutoff_is_the_same_in_every_time_zone_and_across_changes_of_the_clock(db: Any, driven: Callable[..., Driven], zone: str) -> None:
    """Both ends of both changes of 2024 in Berlin, as instants and as naive times, and rows a minute around the cutoff.

    A time without a zone is UTC whatever the session, the role, the database or the host says. S16: every time travels
    as text of the server, so years that Python cannot hold pass too.
    """
    db.admin(f"ALTER DATABASE {db.name} SET timezone = '{zone}'")
    db.admin(f"ALTER ROLE archiver IN DATABASE {db.name} SET timezone = '{zone}'")
    instants = ["2024-03-31 00:59:59+00", "2024-03-31 01:00:00+00", "2024-10-27 00:30:00+00", "2024-10-27 01:30:00+00", "12024-01-01 00:00:00+00",
                "0044-03-15 00:00:00+00 BC"]
    kept: dict[str, set[int]] = {}
    for kind in ("timestamptz", "timestamp", "date"):
        db.execute(f"CREATE TABLE public.in_{kind} (id int PRIMARY KEY, created_at {kind} NOT NULL)")
        for number, text in enumerate(instants):
            moment = f"'{text}'::timestamptz" if kind == "timestamptz" else f"('{text}'::timestamptz AT TIME ZONE 'UTC')::{kind}"
            db.execute(f"INSERT INTO in_{kind} VALUES ({number}, {moment})")
        for number, minutes in enumerate((-2, 2), 10):
            edge = f"now() - interval '2184 hours' + interval '{minutes} minutes'"
            db.execute(f"INSERT INTO in_{kind} VALUES ({number}, " + (edge if kind == "timestamptz" else f"({edge}) AT TIME ZONE 'UTC'") + ")")
        cutoff = "now() - interval '2184 hours'"
        if kind != "timestamptz":  # a date is due once the whole day lies before the cutoff
            cutoff = f"(({cutoff}) AT TIME ZONE 'UTC')::{kind}"
        kept[kind] = {row[0] for row in db.execute(f"SELECT id FROM in_{kind} WHERE created_at >= {cutoff}")}
    before = {kind: tables.digest(db.connection, f"public.in_{kind}") for kind in ("timestamptz", "timestamp", "date")}
    runs = driven([{"name": f"in_{kind}", **KEYED} for kind in before])

    runs.ran(env={"TZ": zone, "PGTZ": zone})

    for kind, digest in before.items():
        left = {row[0] for row in db.execute(f"SELECT id FROM in_{kind}")}
        assert left == kept[kind] and 4 in left and not {0, 1, 2, 3, 5} & left, kind
        assert runs.whole(f"public.in_{kind}", digest) == 8 - len(left)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", runs.archive.commits()[0]["batch"]["cutoff"])


@pytest.mark.req("T10", "REQ-IDEM-007")
def test_two_runs_within_a_second_overwrite_nothing(db: Any, driven: Callable[..., Driven]) -> None:
    """Their objects would bear one name: it has a resolution of seconds, and both begin at batch 1."""
    before = logs(db, old=60, young=0)
    runs = driven()
    point = "archive.pipeline.ended"
    one = runs.spawn("--limit", 20, env={"AA_TEST_POINT": point})
    kill.go_on(kill.stopped_at(point, one.token, ended=one.poll))
    assert finish(one).rc == 0
    runs.ran("--limit", 20)
    runs.ran()
    stems = [line["serialized"]["stem"] for line in runs.archive.commits()]
    assert len(set(stems)) == len(stems) and sum(runs.sizes()) == 60
    assert runs.whole("public.audit_logs", before) == 60


@pytest.mark.req("REQ-LOCK-003", "REQ-LOCK-004", "T34", "T58")
def test_a_table_that_somebody_has_locked_is_tried_again_and_taken_when_it_is_free(db: Any, driven: Callable[..., Driven]) -> None:
    """Nothing waits for ever: lock_timeout ends the try, the other tables go on, and after a pause it is tried again."""
    logs(db, old=30, young=0)
    logs(db, "public.other", old=20, young=0)
    runs = driven([{"name": name, **KEYED} for name in ("audit_logs", "other")], defaults={"lock_timeout": 1},
                  s3={"retry_base_s": 1, "retry_max_s": 1})
    child, migration = runs.spawn(env={"AA_TEST_POINT": "select.begun"}), db.connect()
    kill.stopped_at("select.begun", child.token, ended=child.poll)
    lock_row(migration, "LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE")
    kill.wave_through("select.begun", child.token, lambda: db.scalar("SELECT count(*) FROM other") == 0 or child.poll() or None)
    migration.close()
    kill.wave_through("select.begun", child.token, child.poll)
    result = finish(child)
    assert result.rc == 0, result.err
    assert ["lock timeout" in record["msg"] for record in result.log if record["event"] == "job.retry"] in ([True], [True, True])
    assert summary(result)["totals"]["rows"] == 50 and db.scalar("SELECT count(*) FROM audit_logs") == 0


@pytest.mark.req("T31")
def test_a_table_whose_rows_cannot_be_told_apart_is_refused_by_name(db: Any, driven: Callable[..., Driven]) -> None:
    db.execute("CREATE TABLE public.twins (id int, created_at timestamptz)")
    db.execute("INSERT INTO twins VALUES (1, '2024-01-01'), (1, '2024-01-01')")
    db.execute("CREATE UNIQUE INDEX ON twins (id) WHERE created_at > '2024-06-01'")
    runs = driven([{"name": "twins", **KEYED}])
    result = runs.run()
    assert result.rc == exits.CONFIG and "'public.twins'" in summary(result)["errors"][0]["msg"], result.err
    assert (db.scalar("SELECT count(*) FROM twins"), runs.archive.keys()) == (2, [])


def test_c6_a_parent_stands_for_its_leaves_each_with_its_own_rows_and_columns(db: Any, driven: Callable[..., Driven]) -> None:
    """C6: a ctid is not an address on a parent; a child's own column is not in the parent's rows."""
    db.execute("CREATE TABLE public.parted (id int, created_at timestamptz NOT NULL, PRIMARY KEY (id, created_at)) PARTITION BY RANGE (created_at)")
    for month in (1, 2):
        db.execute(f"CREATE TABLE public.parted_{month} PARTITION OF parted FOR VALUES FROM ('2024-0{month}-01+00') TO ('2024-0{month + 1}-01+00')")
        db.execute(f"INSERT INTO parted SELECT i, '2024-0{month}-05' FROM generate_series(1, 30) i")
    db.execute("CREATE TABLE public.mother (id int PRIMARY KEY, created_at timestamptz)")
    db.execute("CREATE TABLE public.child (extra text, PRIMARY KEY (id)) INHERITS (mother)")
    db.execute("CREATE TABLE public.stray () INHERITS (mother)")
    db.execute("INSERT INTO mother VALUES (1, '2024-01-01')")
    db.execute("INSERT INTO child VALUES (1, '2024-01-01', 'only here')")
    db.execute("INSERT INTO stray VALUES (1, '2024-01-01')")
    runs = driven([{"name": "parted", "timestamp_column": "created_at", "primary_key": ["id", "created_at"]}, {"name": "mother", **KEYED}])

    result = runs.run()

    made = {table["table"]: (table["outcome"], table["rows"]) for table in summary(result)["databases"][0]["tables"]}
    assert result.rc == exits.SOME_FAILED, result.err
    assert made == {"parted_1": ("done", 30), "parted_2": ("done", 30), "mother": ("done", 1), "child": ("done", 1), "stray": ("refused", 0)}
    assert [db.scalar(f"SELECT count(*) FROM {name}") for name in ("parted", "ONLY mother", "child", "stray")] == [0, 0, 0, 1]
    rows = {commit["batch"]["table"]: runs.archive.rows(commit) for commit in runs.archive.commits()}
    assert [b'"extra":"only here"' in rows[name][0] for name in ("mother", "child")] == [False, True]


def test_c7_a_column_added_after_planning_is_archived_with_its_values(db: Any, driven: Callable[..., Driven]) -> None:
    """C7: the plan's column list does not know it; the shape is read again under the lock, and the table planned anew."""
    logs(db, old=40, young=0)
    runs = driven()
    child = runs.spawn(env={"AA_TEST_POINT": "select.begun"})
    kill.stopped_at("select.begun", child.token, ended=child.poll)
    db.execute("ALTER TABLE audit_logs ADD COLUMN verdict text DEFAULT 'guilty'")
    kill.wave_through("select.begun", child.token, child.poll)
    result = finish(child)
    assert result.rc == 0, result.err
    rows = [row for commit in runs.archive.commits() for row in runs.archive.rows(commit)]
    assert len(rows) == 40 and all(b'"verdict":"guilty"' in row for row in rows)
    assert db.scalar("SELECT count(*) FROM audit_logs") == 0


def test_s3_rows_that_reference_each_other_go_in_order_and_referenced_ones_stay(db: Any, driven: Callable[..., Driven]) -> None:
    """S3: batches in flight would wait for one another's rows without PostgreSQL seeing a deadlock."""
    db.execute("CREATE TABLE public.node (id int PRIMARY KEY, created_at timestamptz NOT NULL, parent int REFERENCES node)")
    db.execute("INSERT INTO node SELECT i, timestamptz '2024-01-01' + i * interval '1 hour', NULLIF(i / 2, 0) FROM generate_series(1, 60) i")
    db.execute("CREATE TABLE public.leaf (id int PRIMARY KEY, created_at timestamptz NOT NULL, node int REFERENCES node)")
    db.execute("INSERT INTO leaf VALUES (1, now(), 60), (2, '2024-01-01', 59)")
    before = {name: tables.digest(db.connection, f"public.{name}") for name in ("node", "leaf")}
    runs = driven([{"name": name, **KEYED} for name in ("node", "leaf")], defaults={"batch_size": 10})
    runs.run(seconds=90)
    again = runs.run(seconds=90)
    assert again.rc in (0, 1), again.err
    assert db.scalar("SELECT count(*) FROM leaf") == 1
    assert db.scalar("SELECT count(*) FROM node WHERE id = 60") == 1, "a young row still refers to it"
    assert db.scalar("SELECT count(*) FROM node c WHERE parent IS NOT NULL AND NOT EXISTS (SELECT FROM node p WHERE p.id = c.parent)") == 0
    for name, digest in before.items():
        runs.whole(f"public.{name}", digest)


QUICK = {"retry_base_s": 0.01, "retry_max_s": 0.05}
TOO_SLOW = """
CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF (SELECT count(*) FROM gone) > {rows} THEN RAISE EXCEPTION USING ERRCODE = 'query_canceled', MESSAGE = 'statement timeout'; END IF;
  RETURN NULL; END $$;
CREATE TRIGGER slow AFTER DELETE ON public.audit_logs REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE PROCEDURE public.slow();
"""


@pytest.mark.req("T36")
def test_deletes_that_run_into_a_timeout_make_the_batches_smaller_until_they_fit(db: Any, driven: Callable[..., Driven]) -> None:
    before = logs(db, old=60, young=5)
    db.execute(TOO_SLOW.format(rows=20))
    runs = driven(s3=QUICK)
    result = runs.run()
    assert result.rc == 0 and "again with batches of" in result.err, result.err
    assert max(runs.sizes()) <= 20 and runs.whole("public.audit_logs", before) == 60


@pytest.mark.req("T36")
def test_a_timeout_that_no_batch_fits_into_is_an_error_and_no_silence(db: Any, driven: Callable[..., Driven]) -> None:
    before = logs(db, old=2, young=5)
    db.execute(TOO_SLOW.format(rows=0))
    runs = driven(s3=QUICK)
    result = runs.run()
    assert result.rc == exits.SOME_FAILED and "row.left.failed" in result.err, result.err
    assert summary(result)["databases"][0]["tables"][0]["left"]["failing"] == 2
    assert (runs.sizes(), tables.digest(db.connection, "public.audit_logs")) == ([], before)


TABLES = ("SELECT array_agg((oid, relfilenode, relispartition)::text ORDER BY oid) FROM pg_class "
          "WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace")


@pytest.mark.req("T33")
@pytest.mark.parametrize("mode", ["held", "late"])
def test_a_partition_is_never_dropped_and_a_late_row_in_it_stays_until_it_is_archived_itself(db: Any, driven: Callable[..., Driven],
                                                                                             mode: str) -> None:
    # GIVEN partitions of which one overlaps the cutoff, and one is all old
    db.execute("CREATE TABLE events (id int, created_at timestamptz NOT NULL, PRIMARY KEY (id, created_at)) PARTITION BY RANGE (created_at)")
    db.execute("CREATE TABLE old PARTITION OF events FOR VALUES FROM ('2024-01-01Z') TO ('2024-02-01Z')")
    db.execute("CREATE TABLE mixed PARTITION OF events FOR VALUES FROM ('2024-02-01Z') TO ('2999-01-01Z')")
    db.execute("INSERT INTO events SELECT i, timestamptz '2024-01-10Z' + i * interval '1 hour' FROM generate_series(1, 40) i")
    db.execute("INSERT INTO events VALUES (41, '2024-02-10Z'), (42, now())")
    before = db.scalar(TABLES)
    runs = driven([{"name": "events", "timestamp_column": "created_at", "primary_key": ["id", "created_at"]}],
                  locking={"mode": mode}, defaults={"vacuum_strategy": "standard"})
    # WHEN a row comes into the old partition while its rows are verified and about to be deleted
    child = runs.spawn(env={"AA_TEST_POINT": "verify.done"})
    stopped = kill.stopped_at("verify.done", child.token, ended=child.poll)
    db.execute("INSERT INTO events VALUES (43, '2024-01-05Z')")
    kill.go_on(stopped)
    result = finish(child)
    # THEN exactly the verified rows go, the late one and the young one stay, and every partition is where it was
    assert result.rc == 0, result.err
    assert [row[0] for row in db.execute("SELECT id FROM events ORDER BY id")] == [42, 43]
    assert db.scalar(TABLES) == before
    # WHEN the next run has taken the late row THEN the partition is empty, and there still
    assert runs.ran()["totals"]["rows"] == 1
    assert (db.scalar("SELECT count(*) FROM old"), db.scalar(TABLES)) == (0, before)
    assert sum(runs.sizes("old")) == 41 and sum(runs.sizes("mixed")) == 1


@pytest.mark.req("T41", "REQ-DB-009")
def test_a_pooler_that_lends_its_sessions_is_refused_before_a_lock_is_left_in_one(db: Any, bucket: Any, config_file: Any) -> None:
    logs(db, old=60, young=5)
    hand = ByHand(db, config_file(db, bucket))
    verified = hand.export("--limit", "10")
    keys = [found["Key"] for found in bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]]
    with Pooler(db.host, db.port, backends=2) as pooler:
        # GIVEN a pooler in transaction mode WHEN a client locks something THEN another one has the lock at its second try, and
        # nobody gives it back
        there = {"host": "127.0.0.1", "port": pooler.port}
        one, two = (connect.connect(replace(hand.settings.databases[0], **there), purpose="trap") for _ in range(2))
        assert [connect.scalar(each, "SELECT pg_try_advisory_lock(6, 7)") for each in (one, two, two)] == [True, False, True]
        one.close()
        two.close()
        assert db.scalar("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 6 AND objid = 7") == 1
        # WHEN our commands come through it THEN each refuses, and locks nothing
        path = config_file(db, bucket, database=there)
        held = ["--", "sh", "-c", "aa-select | aa-delete"]
        for name, argv, stdin in (("aa-archive", [], b""), ("aa-check", [], b""), ("aa-recover", [], b""), ("aa-lock", ["--", "true"], b""),
                                  ("aa-delete", [], dump(verified)), ("aa-txn", held, hand.must("aa-plan").out)):
            env = {"PATH": f"{BIN}:{os.defpath}", "AA_CONFIG": str(path)}
            result = run_forked(name, argv, stdin, env)
            assert result.rc == exits.CONFIG and "a connection pooler sits between" in result.err + result.out.decode(), f"{name}: {result}"
        assert db.scalar(f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid IN ({locks.K1_CLASS}, {locks.K2_CLASS})") == 0
    assert db.scalar("SELECT count(*) FROM audit_logs") == 65
    assert [found["Key"] for found in bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]] == keys
