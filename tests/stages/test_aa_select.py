"""aa-select: which rows, in which order, exactly as they stand in the table; in a holder and by itself."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

from audit_archiver import lines
from audit_archiver.postgres import connect, rows_sql
from audit_archiver.postgres.transaction import Transaction
from tests.ground.held import WHOLE, Holder, NoServer, lock_row, plan
from tests.ground.run import Result, run_stage

Make = Callable[..., Holder]


@pytest.fixture()
def path(db, config_file) -> Path:
    """A configuration; the tests' tables need not stand in it."""
    return config_file(db, NoServer)


@pytest.fixture()
def holding(path) -> Iterator[Make]:
    """Holders for this test, closed at its end."""
    with contextlib.ExitStack() as stack:
        yield lambda **more: stack.enter_context(Holder(path, **more))


class Stream:
    """A rows stream taken apart."""

    def __init__(self, out: bytes) -> None:
        self.batches: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []
        self.rows: list[list[dict[str, Any]]] = []
        for line in out.split(b"\n")[:-1]:
            value = json.loads(line)
            if isinstance(value, dict):
                self.rows[-1].append(value)
            elif value[0] == "aa-rows":
                self.batches.append(value[2]["batch"])
                self.rows.append([])
            else:
                self.ends.append(value[2])

    def column(self, name: str) -> list[Any]:
        """A column's values over all batches."""
        return [row[name] for batch in self.rows for row in batch]


def exported(path: Path, *jobs: dict[str, Any], argv: tuple[str, ...] = ()) -> Result:
    """aa-select without a holder: nothing is locked."""
    return run_stage("aa-select", argv, b"".join(map(lines.dump, jobs)), {"AA_CONFIG": str(path)})


def selected(path: Path, *jobs: dict[str, Any]) -> Stream:
    """The stream of an export that goes well."""
    result = exported(path, *jobs)
    assert result.rc == 0, result.err
    return Stream(result.out)


def job(path: Path, table: str, **more: Any) -> dict[str, Any]:
    from audit_archiver import config
    return plan(config.load(str(path), {}), table, **more)


def table(db, definition: str, name: str = "t") -> None:
    db.execute(f"CREATE TABLE {name} ({definition})")


# -- time

@pytest.mark.req("REQ-ARC-001", "REQ-ARC-002", "REQ-TIME-003")
@pytest.mark.parametrize("kind, cutoff, expected", [
    ("timestamptz", "2024-03-01T00:00:00Z", ["2024-02-29 23:59:59.999999+00"]),
    ("timestamp", "2024-03-01T00:00:00Z", ["2024-02-29 23:59:59.999999"]),
    ("timestamptz(0)", "2024-03-01T00:00:00.5Z", ["2024-02-29 23:59:59+00", "2024-03-01 00:00:00+00"]),
    ("date", "2024-03-01T00:00:00Z", ["2024-02-28", "2024-02-29"]),
    ("date", "2024-03-01T23:59:59Z", ["2024-02-28", "2024-02-29"]),
])
def test_only_what_is_older_than_the_cutoff_is_taken_and_a_day_when_it_is_over(db, path, kind, cutoff, expected):
    table(db, f"id int PRIMARY KEY, at {kind}")
    values = ["2024-02-28", "2024-02-29", "2024-03-01", "2024-03-02"] if kind == "date" else [
        "2024-02-29 23:59:59.999999", "2024-03-01 00:00:00", "2024-03-01 00:00:00.000001"] if "(0)" not in kind else [
        "2024-02-29 23:59:59", "2024-03-01 00:00:00", "2024-03-01 00:00:01"]
    for number, value in enumerate(values):
        db.execute("INSERT INTO t VALUES (%s, (%s || CASE WHEN %s THEN 'Z' ELSE '' END)::text::" + kind + ")", (number, value, "tz" in kind))
    taken = selected(path, job(path, "t", timestamp="at", cutoff=cutoff)).column("id")
    db.execute("SET timezone = 'UTC'")
    assert [row[0] for row in db.execute("SELECT at::text FROM t WHERE id = ANY(%s) ORDER BY id", (taken,))] == expected


ZONES = ("UTC", "Asia/Kathmandu", "America/New_York", "Europe/Berlin")


@pytest.mark.req("T6", "REQ-TIME-001", "REQ-TIME-005", "REQ-TIME-007", "REQ-TIME-008")
def test_the_zone_of_server_role_and_process_moves_no_row_over_the_cutoff(db, path, monkeypatch):
    """Hourly rows over both changes of the clock in New York and Berlin, cut in the middle of each."""
    table(db, "id int PRIMARY KEY, at timestamptz, naive timestamp")
    db.execute("INSERT INTO t SELECT i, at, at AT TIME ZONE 'UTC' FROM (SELECT i, "
               "'2024-03-09 00:00Z'::timestamptz + i * interval '30 min' AS at "
               "FROM generate_series(0, 1200) i) s")
    db.execute("INSERT INTO t SELECT i, at, at AT TIME ZONE 'UTC' FROM (SELECT i, "
               "'2024-10-26 00:00Z'::timestamptz + (i - 2000) * interval '30 min' AS at "
               "FROM generate_series(2000, 2400) i) s")
    for cutoff in ("2024-03-10T07:00:00Z", "2024-03-31T01:00:00Z", "2024-10-27T01:00:00Z", "2024-11-03T06:30:00Z"):
        expected = db.scalar("SELECT count(*) FROM t WHERE at < %s", (cutoff,))
        for zone in ZONES:
            monkeypatch.setenv("TZ", zone)
            db.admin(f"ALTER DATABASE {db.name} SET timezone = '{zone}'")
            for column in ("at", "naive"):
                stream = selected(path, job(path, "t", timestamp=column, cutoff=cutoff, batch_size=2000))
                assert len(stream.column("id")) == expected, (zone, column, cutoff)
                assert stream.batches[0]["cutoff"] == cutoff
            assert stream.column("at")[0] == "2024-03-09T00:00:00+00:00"


@pytest.mark.req("T7")
def test_null_infinite_and_ancient_times_are_left_or_taken_and_never_stop_the_next_table(db, holding):
    table(db, "id int PRIMARY KEY, at timestamptz")
    table(db, "id int PRIMARY KEY, at date", "days")
    table(db, "id int PRIMARY KEY, at timestamp", "naive")
    for name in ("t", "days", "naive"):
        db.execute(f"INSERT INTO {name} VALUES (1, NULL), (2, 'infinity'), (3, '-infinity'), (4, '0044-03-15 BC'), "
                   "(5, '0001-01-01'), (6, '2024-01-01'), (7, '2030-01-01'), (8, '294000-01-01')")
    holder = holding()
    failure, out = holder.command(WHOLE, *(plan(holder.settings, name, timestamp="at") for name in ("t", "days", "naive")))
    assert failure is None
    assert [line["deleted"]["rows"] for line in out] == [3, 3, 3]
    assert [line["batch"]["first"] for line in out] == [["0044-03-15T00:00:00+00:00 BC", 4], ["0044-03-15 BC", 4], ["0044-03-15T00:00:00 BC", 4]]
    for name in ("t", "days", "naive"):
        assert [row[0] for row in db.execute(f"SELECT id FROM {name} ORDER BY id")] == [1, 2, 3, 7, 8], name
        shape = next(plan.shape for session in holder.operations.sessions.values() for plan in session._plans.values() if plan.shape.name == name)
        control = next(iter(holder.operations.sessions.values())).control
        assert connect.row(control, rows_sql.never_eligible(shape)) == (1, 2), "they are counted for the report"


@pytest.mark.req("T7")
def test_the_outermost_years_and_fractions_come_through_as_cursors(db, path):
    """A cursor is text made by the server: psycopg2's datetime knows neither BC nor the year 12345 (S16)."""
    table(db, "id int PRIMARY KEY, at timestamp")
    values = ["4713-01-01 00:00:00 BC", "0044-03-15 12:00:00.000001 BC", "0001-01-01 00:00:00", "9999-12-31 23:59:59.999999", "12345-06-07 08:09:10"]
    for number, value in enumerate(values):
        db.execute("INSERT INTO t VALUES (%s, %s)", (number, value))
    stream = selected(path, job(path, "t", timestamp="at", cutoff="9999-12-31T23:59:59Z", batch_size=1))
    assert stream.column("id") == [0, 1, 2]
    with_all = {**job(path, "t", timestamp="at", batch_size=2), "cutoff": "9999-12-31T23:59:59.999999Z"}
    assert selected(path, with_all).column("at")[:3] == ["4713-01-01T00:00:00 BC", "0044-03-15T12:00:00.000001 BC", "0001-01-01T00:00:00"]


# -- order, ties, cursors

@pytest.mark.req("T4", "REQ-ARC-007", "REQ-ARC-009")
def test_ties_on_the_timestamp_at_every_batch_border_lose_and_double_nothing(db, holding):
    """10,000 rows of one timestamp in batches of 7: the cursor is timestamp and key."""
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("CREATE INDEX ON t (created_at, id)")
    db.execute("INSERT INTO t SELECT (i * 7919) % 10007, '2024-02-02 02:02:02.020202Z' FROM generate_series(1, 10000) i")
    db.execute("ANALYZE t")
    before = [row[0] for row in db.execute("SELECT id FROM t ORDER BY id")]
    holder = holding()
    transaction, statements = _transaction(holder, plan(holder.settings, "t"))
    seen: list[int] = []
    cursor: Optional[list[str]] = None
    batches = 0
    while True:
        transaction.begin(lambda _connection: None)
        connect.execute(transaction.connection, statements.fill(cursor, 7, lock=True))
        taken = [row[0] for row in connect.rows(transaction.connection, "SELECT id FROM pg_temp.aa_batch ORDER BY n")]
        if not taken:
            break
        cursor = connect.row(transaction.connection, statements.facts())[4]
        connect.execute(transaction.connection, statements.delete())
        transaction.commit()
        seen, batches = seen + taken, batches + 1
    transaction.rollback()
    assert seen == before and batches == 10000 // 7 + 1
    assert db.scalar("SELECT count(*) FROM t") == 0
    transaction.connection.close()


def _transaction(holder: Holder, todo: dict[str, Any]) -> tuple[Transaction, rows_sql.Statements]:
    """A transaction of the product's own, prepared for a job's table."""
    from audit_archiver.postgres import catalog
    connection = connect.connect(holder.settings.databases[0], purpose="batch", transaction_timeout_s=60)
    shape = catalog.shape(connection, todo["schema"], todo["table"], tuple(todo["key"]), todo["timestamp"])
    statements = rows_sql.Statements(shape, rows_sql.Window(todo["cutoff"], todo["start"], todo["end"]))
    transaction = Transaction(connection)
    transaction.prepare(statements)
    return transaction, statements


KEYS = {
    "uuid": "md5(i::text)::uuid",
    "text": "chr(8232 + i % 3) || repeat('\"\\/''', i % 4) || E'\\t\\n' || chr(128512 + i % 20) || 'é' || i",
    "varchar(40) COLLATE \"C\"": "CASE WHEN i % 2 = 0 THEN 'a' ELSE 'B' END || i",
    "numeric": "(i - 15)::numeric * 1e20 + 0.10",
    "bigint": "9007199254740993 + i * (CASE WHEN i % 2 = 0 THEN 1 ELSE -1 END)",
    "boolean": "i = 1",
    "inet": "('10.0.' || i || '.0/24')::inet",
    "bytea": "decode(lpad(to_hex(i), 4, '0'), 'hex')",
    "char(12)": "'x' || i",
    "interval": "make_interval(months => i, secs => i * 0.5)",
    "real": "i * 0.1::real",
    "date": "'2024-01-01'::date + i",
}


@pytest.mark.req("REQ-ARC-007", "REQ-TYPE-007", "REQ-TYPE-008")
def test_keys_of_every_kind_page_lock_delete_and_digest_the_same(db, holding):
    holder = holding()
    jobs = []
    for number, (kind, expression) in enumerate(KEYS.items()):
        rows = 2 if kind == "boolean" else 30
        table(db, f"k {kind} PRIMARY KEY, at timestamptz DEFAULT '2024-01-01Z'", f"k{number}")
        db.execute(f"INSERT INTO k{number} (k) SELECT {expression} FROM generate_series(1, {rows}) i")
        jobs.append(plan(holder.settings, f"k{number}", key=("k",), timestamp="at", batch_size=7))
    failure, out = holder.command(WHOLE, *jobs)
    assert failure is None, failure
    for number, kind in enumerate(KEYS):
        deleted = [line["deleted"]["rows"] for line in out if line["batch"]["table"] == f"k{number}"]
        assert sum(deleted) == (2 if kind == "boolean" else 30), kind
        assert db.scalar(f"SELECT count(*) FROM k{number}") == 0
        assert all(line["committed"]["sample_absent"] for line in out)


def test_composite_keys_and_keys_that_hold_the_timestamp_come_first_in_each_row(db, path):
    table(db, "note text, region text, at timestamptz, no int, PRIMARY KEY (region, no, at)")
    db.execute("INSERT INTO t SELECT 'n', chr(65 + i % 3), '2024-01-01Z'::timestamptz + i % 5 * interval '1 day', i FROM generate_series(1, 40) i")
    stream = selected(path, job(path, "t", key=("region", "no", "at"), timestamp="at", batch_size=7))
    assert {tuple(row) for rows in stream.rows for row in rows} == {("region", "no", "at", "note")}
    assert stream.batches[0]["first"] == ["2024-01-01T00:00:00+00:00", "A", 15, "2024-01-01T00:00:00+00:00"]
    seen = [(row["at"], row["region"], row["no"]) for rows in stream.rows for row in rows]
    assert seen == sorted(seen) and len(set(seen)) == 40
    assert [batch["rows"] for batch in stream.batches] == [7, 7, 7, 7, 7, 5]


@pytest.mark.req("T8", "REQ-SEC-010")
def test_names_of_all_kinds_select_and_delete_their_own_table(db, holding):
    names = ['"T"', "t", "_t", "audit.t", '"select"', '"drop table t; --"', '"quo""te"', '"back\\slash"', '"Ünï cödé"', '"a.b"', '"%s"', "\"it's\""]
    db.execute("CREATE SCHEMA audit")
    holder = holding()
    jobs = []
    for number, name in enumerate(names):
        db.execute(f'CREATE TABLE {name} ("Id""%s" int PRIMARY KEY, "AT time" timestamptz, "n" int, "tid" int, "b" int, "t" int, "r" text, "x" int)')
        db.execute(f"INSERT INTO {name} SELECT i, '2024-01-01Z', i, i, i, i, 'r', i FROM generate_series(1, {number + 1}) i")
        plain = name.rpartition("audit.")[2].strip('"').replace('""', '"')
        jobs.append(plan(holder.settings, plain, schema="audit" if "audit." in name else "public", key=('Id"%s',), timestamp="AT time"))
    failure, out = holder.command(WHOLE, *jobs)
    assert failure is None, failure
    assert [line["deleted"]["rows"] for line in out] == list(range(1, len(names) + 1))
    assert len({line["serialized"]["stem"] for line in out}) == len({line["serialized"]["dir"] for line in out}) == len(names)
    assert all(db.scalar(f"SELECT count(*) FROM {name}") == 0 for name in names)


def test_columns_named_like_the_statements_own_are_told_apart(db, path):
    """n, tid, b, t, r, k, s, x are aliases inside; as key and timestamp columns they must not be taken for these."""
    for number, (key, timestamp) in enumerate((("n", "tid"), ("tid", "n"), ("b", "t"), ("t", "b"), ("k", "s"), ("r", "x"), ("ctid_", "row_number"))):
        table(db, f"{key} int PRIMARY KEY, {timestamp} timestamptz, note text", f"own{number}")
        db.execute(f"INSERT INTO own{number} SELECT i, '2024-01-01Z', 'x' FROM generate_series(1, 9) i")
        stream = selected(path, job(path, f"own{number}", key=(key,), timestamp=timestamp, batch_size=4))
        assert stream.column(key) == list(range(1, 10)), (key, timestamp)


# -- windows and limits

@pytest.mark.req("REQ-ARC-006", "REQ-ARC-011")
def test_start_end_limit_cursor_and_batch_size_each_bound_what_is_taken(db, path):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z'::timestamptz + i * interval '1 day' FROM generate_series(0, 39) i")

    def ids(**more: Any) -> list[int]:
        return selected(path, job(path, "t", **more)).column("id")

    assert ids() == list(range(40))
    assert ids(start="2024-01-11T00:00:00Z") == list(range(10, 40))
    assert ids(end="2024-01-11T00:00:00Z") == list(range(10)), "a time given as the end is not included"
    assert ids(start="2024-01-06T00:00:00Z", end="2024-01-11T00:00:00Z") == list(range(5, 10))
    assert ids(start="2024-02-01T00:00:00Z", end="2024-01-01T00:00:00Z") == []
    assert ids(limit=0) == [] and ids(limit=13, batch_size=5) == list(range(13))
    assert ids(cursor=["2024-01-11 00:00:00+00", "10"]) == list(range(11, 40))
    sizes = [batch["rows"] for batch in selected(path, job(path, "t", batch_size=12)).batches]
    assert sizes == [12, 12, 12, 4]
    assert ids(batch_size=40) == list(range(40)) and ids(batch_size=41) == list(range(40))


def test_a_cursor_of_another_table_is_refused(db, path):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("INSERT INTO t VALUES (1, '2024-01-01Z')")
    for cursor in (["2024-01-01", "x'; DROP TABLE t; --"], ["not a time", "1"], ["2024-01-01", "1", "2"]):
        result = exported(path, job(path, "t", cursor=cursor))
        assert result.rc == 2 and result.out == b"", cursor
    assert db.scalar("SELECT count(*) FROM t") == 1


@pytest.mark.req("T3", "REQ-ARC-018")
def test_a_row_that_commits_late_with_an_old_time_is_taken_by_the_next_run(db, holding):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("INSERT INTO t SELECT i, '2024-06-01Z' FROM generate_series(1, 5) i")
    late = db.connect()
    lock_row(late, "INSERT INTO t VALUES (0, '2024-01-01Z')")
    with holding() as holder:
        assert sum(line["deleted"]["rows"] for line in holder.archive(plan(holder.settings, "t"))) == 5
    late.cursor().execute("COMMIT")
    late.close()
    with holding() as holder:
        (line,) = holder.archive(plan(holder.settings, "t", run="20251231T021545Z-1"))
        assert line["batch"]["first"] == ["2024-01-01T00:00:00+00:00", 0] == line["batch"]["last"]


@pytest.mark.req("T1")
def test_rows_that_become_eligible_in_a_range_that_was_archived_are_taken_by_the_next_run(db, holding):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    taken = []
    for start in (0, 10, 20):
        db.execute(f"INSERT INTO t SELECT i, '2024-06-01Z' FROM generate_series({start}, {start + 9}) i")
        with holding() as holder:
            (line,) = holder.archive(plan(holder.settings, "t"))
            taken.append((line["batch"]["id"], line["deleted"]["rows"]))
    assert [rows for _, rows in taken] == [10, 10, 10] and len({each for each, _ in taken}) == 3


# -- one snapshot, constant cost

def test_an_export_reads_keys_and_rows_of_one_snapshot(db, path, monkeypatch):
    """READ COMMITTED would count rows that are gone when they are copied (C9 e)."""
    table(db, "id int PRIMARY KEY, created_at timestamptz, note text")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z', 'before' FROM generate_series(1, 20) i")
    really = Transaction.copy

    def others_write_first(self: Transaction, descriptor: int) -> Any:
        db.execute("UPDATE t SET note = 'after'; DELETE FROM t WHERE id > 10; INSERT INTO t VALUES (0, '2024-01-01Z', 'new')")
        return really(self, descriptor)

    monkeypatch.setattr(Transaction, "copy", others_write_first)
    stream = selected(path, job(path, "t"))
    assert stream.column("id") == list(range(1, 21)) and set(stream.column("note")) == {"before"}
    assert stream.batches[0]["txn"] is None and stream.ends[0]["rows"] == 20


def test_the_first_batch_of_every_table_is_checked_to_come_back_as_it_is(db, path, monkeypatch):
    for name in ("t", "u"):
        table(db, "id int PRIMARY KEY, created_at timestamptz", name)
        db.execute(f"INSERT INTO {name} SELECT i, '2024-01-01Z' FROM generate_series(1, 20) i")
    really, asked = Transaction.lock, []

    def lock(self: Transaction, *args: Any, **fields: Any) -> Any:
        asked.append(fields["roundtrip"])
        return really(self, *args, **fields)

    monkeypatch.setattr(Transaction, "lock", lock)
    selected(path, job(path, "t", batch_size=10), job(path, "u", batch_size=10))
    assert asked == ["all", "some", "some", "all", "some", "some"]


def test_rows_that_would_not_come_back_are_left_out_named_and_make_the_end_a_1(db, path):
    db.execute("CREATE DOMAIN code AS text")
    table(db, "id int PRIMARY KEY, created_at timestamptz, code code")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z', CASE i WHEN 3 THEN 'bad' ELSE 'good' END FROM generate_series(1, 5) i")
    db.execute("ALTER DOMAIN code ADD CONSTRAINT known CHECK (VALUE <> 'bad') NOT VALID")
    result = exported(path, job(path, "t"))
    assert result.rc == 1 and Stream(result.out).column("id") == [1, 2, 4, 5]
    (left,) = [record for record in result.log if record["event"] == "row.left.inexact"]
    assert left["key"] == "3" and "bad" not in result.err


def test_two_jobs_of_a_table_each_keep_to_their_own_window(db, path):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z'::timestamptz + i * interval '1 day' FROM generate_series(0, 39) i")
    stream = selected(path, job(path, "t", end="2024-01-03T00:00:00Z"), job(path, "t", start="2024-02-08T00:00:00Z"))
    assert stream.rows and [[row["id"] for row in rows] for rows in stream.rows] == [[0, 1], [38, 39]]


def test_an_export_locks_nothing_and_writes_nothing(db, path):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z' FROM generate_series(1, 20) i")
    somebody = db.connect()
    lock_row(somebody, "UPDATE t SET created_at = created_at")
    assert len(selected(path, job(path, "t")).column("id")) == 20, "rows that others have locked are read all the same"
    somebody.close()
    db.admin(f"ALTER ROLE archiver IN DATABASE {db.name} SET default_transaction_read_only = on")
    assert len(selected(path, job(path, "t")).column("id")) == 20


def test_a_table_that_fails_by_itself_leaves_the_others_and_makes_the_end_a_1(db, path):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("INSERT INTO t VALUES (1, '2024-01-01Z')")
    good = job(path, "t")
    result = exported(path, {**good, "table": "missing"}, good)
    assert result.rc == 1 and Stream(result.out).column("id") == [1]
    assert exported(path, {**good, "table": "missing"}).rc == 3
    refused = {key: good[key] for key in ("format", "version", "run", "database", "schema", "table")}
    assert exported(path, {**refused, "refused": {"code": 5, "msg": "no privilege"}}).rc == 5


def test_outcomes_say_of_each_job_how_it_ended_and_what_was_left(db, path, tmp_path):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z' FROM generate_series(1, 3) i")
    good = job(path, "t")
    plain = {key: good[key] for key in ("format", "version", "run", "database", "schema")}
    refused = {**plain, "table": "no", "refused": {"code": 5, "msg": "no privilege"}}
    said = tmp_path / "outcomes"
    assert exported(path, {**good, "limit": 2}, {**good, "table": "missing"}, refused, good, argv=("--outcomes", str(said))).rc == 1
    found = [json.loads(line) for line in said.read_text().splitlines()]
    assert [(each["table"], each["swept"], (each["error"] or {}).get("code")) for each in found] == [
        ("t", False, None), ("missing", False, 3), ("no", False, 5), ("t", True, None)]
    assert "does not exist" in found[1]["error"]["msg"] and not any(each["inexact"] + each["too_wide"] for each in found)
    away = exported(path, good, argv=("--outcomes", str(tmp_path / "no" / "where")))
    assert (away.rc, away.out) == (3, b"") and "cannot write" in away.err


@pytest.mark.req("T13")
def test_bare_rows_are_for_people_and_never_inside_a_holder(db, path, holding):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z' FROM generate_series(1, 3) i")
    result = exported(path, job(path, "t"), argv=("--rows",))
    assert result.out == b"".join(b'{"id":%d,"created_at":"2024-01-01T00:00:00+00:00"}\n' % n for n in (1, 2, 3))
    holder = holding()
    refused = holder.stage("aa-select", lines.dump(plan(holder.settings, "t")), "--rows")
    assert refused.rc == 3 and "--rows cannot be used inside a transaction holder" in refused.err
    refused = holder.stage("aa-select", lines.dump(plan(holder.settings, "t")), "--outcomes", "there")
    assert refused.rc == 3 and "--outcomes cannot be used inside a transaction holder" in refused.err


def test_the_last_batch_reads_as_few_pages_as_the_first(db, holding):
    """No time is measured: the server counts the buffers of the statement that locks, for batch 1 and batch 50."""
    table(db, "id int PRIMARY KEY, created_at timestamptz, note text")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z'::timestamptz + i * interval '1 s', repeat('x', 100) FROM generate_series(1, 6000) i")
    db.execute("CREATE INDEX ON t (created_at, id)")
    db.execute("ANALYZE t")
    holder = holding()
    transaction, statements = _transaction(holder, plan(holder.settings, "t"))
    buffers, cursor = [], None
    for _ in range(50):
        transaction.begin(lambda _connection: None)
        plan_rows = connect.rows(transaction.connection, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statements.fill(cursor, 100, lock=True)}")
        shown = json.dumps(plan_rows[0][0])
        assert '"Sort"' not in shown and '"Seq Scan"' not in shown and '"Index Scan"' in shown, shown
        top = plan_rows[0][0][0]["Plan"]
        buffers.append(top["Shared Hit Blocks"] + top["Shared Read Blocks"])
        cursor = connect.row(transaction.connection, statements.facts())[4]
        connect.execute(transaction.connection, statements.delete())
        transaction.commit()
    assert buffers[49] <= buffers[0] * 1.2 + 10, buffers
    transaction.connection.close()


def test_copy_and_delete_go_by_the_places_of_the_locked_rows(db, holding):
    table(db, "id int PRIMARY KEY, created_at timestamptz, note text")
    db.execute("INSERT INTO t SELECT i, '2024-01-01Z'::timestamptz + (i * 7919 % 3001) * interval '1 s', "
               "repeat('x', 100) FROM generate_series(1, 3000) i")
    db.execute("CREATE INDEX ON t (created_at, id)")
    db.execute("ANALYZE t")
    holder = holding()
    transaction, statements = _transaction(holder, plan(holder.settings, "t"))
    transaction.begin(lambda _connection: None)
    transaction.lock(None, 100, roundtrip=None)
    shown = json.dumps(connect.rows(transaction.connection, f"EXPLAIN (FORMAT JSON) {statements.delete()}")[0][0])
    assert '"Tid Scan"' in shown and '"Seq Scan", "Parent Relationship": "Outer", "Parallel Aware": false, "Relation Name": "t"' not in shown
    transaction.rollback()
    transaction.connection.close()


def test_a_failing_line_of_input_is_refused_before_anything_is_read(db, path):
    table(db, "id int PRIMARY KEY, created_at timestamptz")
    good = lines.dump(job(path, "t"))
    for data in (b"{}\n", b"nonsense\n", good[:-1], good.replace(b'"version":1', b'"version":2'), good.replace(b'"sleep_s"', b'"sleep"')):
        result = run_stage("aa-select", [], data, {"AA_CONFIG": str(path)})
        assert result.rc == 2 and result.out == b"", data
