"""The report of a real run: what left, what stayed and why, how the time was spent, what a person is warned of."""

from __future__ import annotations

import pytest

from tests.conftest import AUDIT_LOGS, Bucket, ConfigFile, TestDatabase
from tests.ground import tables
from tests.ground.driven import OLD, Driven, logs, summary


@pytest.mark.req("T7", "REQ-VER-013", "REQ-VAC-007", "REQ-INT-014")
def test_every_row_that_stays_is_counted_by_its_reason(db: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    # GIVEN 500 rows that are due; of them 3 are locked by somebody, 4 are referenced; and 5 whose time is no time
    tables.create(db.connection, rows=500, first=OLD[0], last=OLD[1])
    db.execute("ALTER TABLE audit_logs ALTER created_at DROP NOT NULL")
    db.execute("INSERT INTO audit_logs (id, created_at, action) VALUES (901, NULL, ''), (902, NULL, ''), (903, 'infinity', ''), "
               "(904, '-infinity', ''), (905, '-infinity', '')")
    db.execute("CREATE TABLE note (log bigint REFERENCES audit_logs); INSERT INTO note VALUES (7), (8), (9), (9), (10)")
    other = db.connect()
    with other.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT FROM audit_logs WHERE id IN (100, 200, 300) FOR UPDATE")
        # WHEN it is archived meanwhile
        result = Driven(db, bucket, config_file(db, bucket, defaults={"vacuum_strategy": "standard"})).run("--force")
    other.close()
    # THEN each is in the report, the exit code is 0, and just these rows are left
    assert result.rc == 0, result.err
    made = summary(result)
    table = made["databases"][0]["tables"][0]
    assert table["left"] == {"locked": 3, "referenced": 4, "null_timestamps": 2, "infinite_timestamps": 3, "inexact": 0, "too_wide": 0, "failing": 0}
    assert (table["outcome"], table["rows"], table["code"]) == ("done", 493, 0)
    assert db.scalar("SELECT count(*) FROM audit_logs") == 12
    # AND the person is warned of what will not go away by itself, in the report and in the log
    warned = " ".join(warning["msg"] for warning in made["warnings"])
    assert "public.note" in warned and "2 without a timestamp, 3 with an infinite one" in warned
    assert {"check.warning", "plan.left"} <= {record["event"] for record in result.log if record["level"] == "WARNING"}


@pytest.mark.req("REQ-VAC-001", "REQ-VAC-006", "REQ-DB-001")
def test_the_time_of_each_phase_and_the_room_of_each_table_are_in_the_report(db: TestDatabase, bucket: Bucket, config_file: ConfigFile) -> None:
    logs(db, old=1500, young=500)
    path = config_file(db, bucket, [AUDIT_LOGS], defaults={"vacuum_strategy": "standard", "batch_size": 300})
    made = Driven(db, bucket, path).ran("--force")
    database = made["databases"][0]
    assert all(seconds > 0 for seconds in database["phases"].values()), database["phases"]
    assert database["phases"]["select"] < made["seconds"] and database["phases"]["record"] < made["seconds"]
    table, = database["tables"]
    assert 0 < table["seconds"] < made["seconds"] and table["rows_per_s"] == pytest.approx(table["rows"] / table["seconds"], rel=0.01)
    space = table["space"]
    assert (space["strategy"], space["done"], space["problem"], space["returned"]) == ("standard", True, None, 0)
    assert space["reusable"] == pytest.approx(0.75 * (space["before"]["heap"] + space["before"]["toast"]), rel=0.1)
    assert made["totals"]["reusable"] == space["reusable"]
