"""aa-balance: no row is lost, none is in two places, none has changed; each that is not so is named. And keys in the table."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, Iterator

import pytest

from audit_archiver import exits
from audit_archiver.formats import names, schema
from audit_archiver.postgres import connect, locks
from tests.ground import tables
from tests.ground.by_hand import ByHand
from tests.ground.run import Result

ROWS, OLD = 120, 100


class Weighed:
    """A table of which a hundred rows are archived, in two batches, and its baseline from before."""

    def __init__(self, hand: ByHand, path: Path) -> None:
        self.hand, self.db, self.file = hand, hand.db, path / "baseline"
        made = self.balance("--make-baseline", self.file)
        assert made.rc == exits.OK, made.err
        self.lines = hand.delete(hand.export()).lines
        hand.record(self.lines)

    def balance(self, *argv: Any, output: str = "json") -> Result:
        """aa-balance of the table."""
        return self.hand.run("aa-balance", ["--database", self.db.name, "--table", "audit_logs", "--output", output, *map(str, argv)])

    def against(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(rows named, the sum) against the baseline; the exit code is the sum's."""
        return self.said(self.balance("--baseline", self.file))

    def said(self, result: Result) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(rows named, the sum), valid."""
        assert result.out, result.err
        *rows, total = result.lines
        schema.validate("balance", total, "the sum")
        assert total["exit"] == result.rc
        return rows, total


@pytest.fixture()
def hand(db: Any, bucket: Any, config_file: Any) -> ByHand:
    tables.create(db.connection, rows=OLD, first="2024-01-01", last="2024-03-01")
    tables.fill(db.connection, rows=ROWS - OLD, first="2099-01-01", last="2099-02-01", start=OLD + 1)
    return ByHand(db, config_file(db, bucket, defaults={"batch_size": 50}))


@pytest.fixture()
def weighed(hand: ByHand, tmp_path: Path) -> Weighed:
    return Weighed(hand, tmp_path)


def named(*wrong: tuple[int, str]) -> list[dict[str, Any]]:
    """What is said of rows."""
    return [{"table": "public.audit_logs", "key": [key], "row": what} for key, what in wrong]


def test_rows_that_were_archived_are_as_many_and_the_same_as_before(weighed: Weighed) -> None:
    rows, total = weighed.against()
    assert (rows, total["exit"], total["in_table"], total["archived"]) == ([], exits.OK, ROWS - OLD, OLD)
    assert total["baseline"]["sha256"] == total["baseline"]["now_sha256"] is not None
    assert (total["baseline"]["rows"], total["baseline"]["new"]) == (ROWS, 0)
    rows, total = weighed.said(weighed.balance())
    assert (rows, total["exit"], total["baseline"]) == ([], exits.OK, None)
    assert b"120\n" in weighed.balance(output="text").out and b"EQUAL" in weighed.balance("--baseline", weighed.file, output="text").out


@pytest.mark.req("T52")
def test_a_row_that_is_nowhere_is_named(weighed: Weighed) -> None:
    weighed.db.execute("DELETE FROM audit_logs WHERE id = 110")
    stem = weighed.lines[1]["serialized"]["stem"]
    for suffix in (names.DATA, names.METADATA, names.KEYS, names.COMMIT):
        weighed.hand.store.delete(stem + suffix)
    rows, total = weighed.against()
    assert sorted(row["key"][0] for row in rows) == [*range(51, 101), 110] and {row["row"] for row in rows} == {"lost"}
    assert (total["exit"], total["wrong"]["lost"]) == (exits.FAILED, 51)
    assert total["baseline"]["sha256"] != total["baseline"]["now_sha256"]


def test_a_row_that_is_in_both_places_or_changed_is_named_and_a_new_one_is_counted(weighed: Weighed) -> None:
    tables.fill(weighed.db.connection, rows=1, first="2024-01-01", last="2024-01-02", start=17)
    weighed.db.execute("UPDATE audit_logs SET action = 'other' WHERE id = 105")
    tables.fill(weighed.db.connection, rows=3, first="2099-01-01", last="2099-02-01", start=500)
    rows, total = weighed.against()
    assert rows == sorted(named((17, "doubled"), (105, "changed")), key=lambda row: str(row["key"]))
    assert (total["exit"], total["baseline"]["new"]) == (exits.FAILED, 3)
    rows, total = weighed.said(weighed.balance())
    assert (rows, total["exit"]) == (named((17, "doubled")), exits.FAILED)
    refused = weighed.balance("--make-baseline", weighed.file.with_name("another"))
    assert refused.rc == exits.FAILED and not weighed.file.with_name("another").exists()


@pytest.mark.req("REQ-VER-011")
def test_archived_keys_that_are_in_the_table_are_found_by_a_validation(weighed: Weighed) -> None:
    env_free = ["--output", "json", "--against-table", "yes"]
    well = weighed.hand.run("aa-validate", env_free)
    [report] = well.lines
    assert (well.rc, report["findings"], report["looked_at"]["keys_in_tables"]) == (exits.OK, [], OLD)
    sampled = weighed.hand.run("aa-validate", [*env_free, "--depth", "sample"]).lines[0]
    assert sampled["looked_at"]["keys_in_tables"] == 20, "ten of each batch"
    tables.fill(weighed.db.connection, rows=2, first="2024-01-01", last="2024-01-02", start=50)
    result = weighed.hand.run("aa-validate", env_free)
    [report] = result.lines
    told = {each["batch"][-3:]: each["keys"] for each in report["findings"] if each["check"] == "rows.in_table"}
    assert (result.rc, told) == (exits.FAILED, {"001": [[50]], "002": [[51]]})
    assert "[50]" not in result.err, "a key is told and not logged"
    restore = ["--database", weighed.db.name, "--table", "audit_logs", "--restore-all"]
    weighed.hand.must("aa-restore", [*restore, "--into", "public.elsewhere", "--create-table"])
    assert weighed.hand.run("aa-validate", env_free).rc == exits.FAILED, "those rows are elsewhere"
    weighed.hand.must("aa-restore", [*restore, "--conflict-strategy", "overwrite"])
    result = weighed.hand.run("aa-validate", env_free)
    assert (result.rc, {each["status"] for each in result.lines[0]["findings"]}) == (exits.OK, {"warn"})
    rows, total = weighed.said(weighed.balance())
    assert (len(rows), total["wrong"]["doubled"], total["exit"]) == (OLD, OLD, exits.FAILED)


def test_keys_of_a_table_that_is_not_there_any_more_are_in_no_table(weighed: Weighed) -> None:
    weighed.db.execute("DROP TABLE audit_logs")
    result = weighed.hand.run("aa-validate", ["--output", "json", "--against-table", "yes"])
    assert (result.rc, result.lines[0]["findings"]) == (exits.OK, [])


def test_an_archived_row_that_is_damaged_is_no_balance(weighed: Weighed) -> None:
    key = weighed.lines[0]["serialized"]["stem"] + names.DATA
    rows = gzip.decompress(weighed.hand.store.get_bytes(key)).splitlines(keepends=True)
    weighed.hand.store.delete(key)
    weighed.hand.store.put_new(key, gzip.compress(b"".join(rows[:-1])))
    result = weighed.balance("--baseline", weighed.file)
    assert (result.rc, result.out) == (exits.FAILED, b"") and "not the object that was verified" in result.err


def test_a_column_that_was_added_is_left_out_of_the_comparison_and_a_retyped_one_leaves_the_keys(weighed: Weighed) -> None:
    weighed.db.execute("ALTER TABLE audit_logs ADD COLUMN extra text DEFAULT 'x'")
    rows, total = weighed.against()
    assert (rows, total["exit"]) == ([], exits.OK) and total["baseline"]["sha256"] == total["baseline"]["now_sha256"]
    weighed.db.execute("ALTER TABLE audit_logs ALTER COLUMN action TYPE varchar(20)")
    result = weighed.balance("--baseline", weighed.file)
    assert "balance.by_key" in [each["event"] for each in result.log]
    rows, total = weighed.said(result)
    assert (rows, total["exit"], total["baseline"]["now_sha256"]) == ([], exits.OK, None)


@pytest.mark.parametrize("lines", [slice(0, -1), slice(0, 40)], ids=["the last line gone", "half of it"])
def test_a_baseline_that_is_cut_off_is_refused(lines: slice, weighed: Weighed) -> None:
    assert os.stat(weighed.file).st_mode & 0o777 == 0o600
    weighed.file.write_bytes(b"".join(weighed.file.read_bytes().splitlines(keepends=True)[lines]))
    result = weighed.balance("--baseline", weighed.file)
    assert (result.rc, result.out) == (exits.FAILED, b"") and "cut off" in result.err


def test_what_is_no_baseline_and_a_file_that_exists_are_refused(weighed: Weighed, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text('{"format":"aa-job"}\n')
    assert weighed.balance("--baseline", other).rc == exits.FAILED
    assert weighed.balance("--baseline", tmp_path / "nowhere").rc == exits.CONFIG
    before = weighed.file.read_bytes()
    assert weighed.balance("--make-baseline", weighed.file).rc == exits.CONFIG
    assert weighed.file.read_bytes() == before and sorted(path.name for path in tmp_path.glob("*.tmp")) == []
    header = json.loads(before.split(b"\n")[0])
    weighed.file.write_bytes(before.replace(header["database"].encode(), b"elsewhere"))
    assert weighed.balance("--baseline", weighed.file).rc == exits.CONFIG


@pytest.fixture()
def busy(hand: ByHand) -> Iterator[None]:
    """A run at work."""
    connection = connect.connect(hand.settings.databases[0], purpose="control")
    locks.take(connection, None, "the database")
    yield
    connection.close()


def test_nothing_is_weighed_while_a_run_is_at_work(hand: ByHand, busy: None) -> None:
    result = hand.run("aa-balance", ["--database", hand.db.name, "--table", "audit_logs"])
    assert (result.rc, result.out) == (exits.LOCKED, b"") and "at work" in result.err


def test_a_database_that_cannot_be_reached_is_not_an_unbalanced_one(weighed: Weighed, bucket: Any, config_file: Any) -> None:
    away = config_file(weighed.db, bucket, database={"host": "127.0.0.1", "port": 9})
    result = weighed.hand.run("aa-balance", ["--database", weighed.db.name, "--table", "audit_logs"], env={"AA_CONFIG": str(away)})
    assert (result.rc, result.out) == (exits.NETWORK, b"")


def test_the_partitions_of_a_table_are_weighed_together(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> None:
    db.execute("CREATE TABLE audit_logs (id bigint, created_at timestamptz NOT NULL, note text, PRIMARY KEY (id, created_at)) "
               "PARTITION BY RANGE (created_at)")
    for name, first, last in (("old", "2024-01-01", "2024-02-01"), ("young", "2099-01-01", "2099-02-01")):
        db.execute(f"CREATE TABLE {name} PARTITION OF audit_logs FOR VALUES FROM ('{first}') TO ('{last}')")
        db.execute(f"INSERT INTO audit_logs SELECT i, '{first}'::timestamptz + i * interval '1 minute', 'x' FROM generate_series(1, 10) i")
    table = {"name": "audit_logs", "timestamp_column": "created_at", "primary_key": ["id", "created_at"]}
    weighed = Weighed(ByHand(db, config_file(db, bucket, tables=[table])), tmp_path)
    rows, total = weighed.against()
    assert (rows, total["in_table"], total["archived"], total["exit"]) == ([], 10, 10, exits.OK)
    db.execute("DROP TABLE old")
    rows, total = weighed.against()
    assert (rows, total["archived"], total["exit"]) == ([], 10, exits.OK)
    db.execute("DELETE FROM young WHERE id = 3")
    rows, total = weighed.against()
    assert [(row["table"], row["key"][0], row["row"]) for row in rows] == [("public.young", 3, "lost")]
