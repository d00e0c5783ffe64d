"""Rows and tables that make trouble in the middle of a run: one poisonous row, one that is referenced, a new column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest

from audit_archiver import exits
from tests.crash.scene import ARCHIVE, OLD, QUICK, TABLE, YOUNG, Scene, trouble
from tests.ground import tables
from tests.ground.driven import summary
from tests.ground.kill import go_on
from tests.ground.wait import until

POISON = """
CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.id = 137 THEN RAISE EXCEPTION 'this row must not go'; END IF;
    RETURN OLD;
END $$;
CREATE TRIGGER poison BEFORE DELETE ON audit_logs FOR EACH ROW EXECUTE PROCEDURE poison();
"""
DEFERRED = """
CREATE TABLE notes (id int PRIMARY KEY, log bigint REFERENCES audit_logs DEFERRABLE INITIALLY DEFERRED);
INSERT INTO notes VALUES (1, 137);
"""


@pytest.fixture()
def make(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> Callable[..., Scene]:
    """A function that builds the scene."""
    return lambda **more: Scene(db, bucket, config_file(db, bucket, **{**QUICK, **more}), tmp_path)


def left_behind(err: str) -> list[str]:
    """The keys of the rows that the log says were left in place since they fail alone."""
    records = [json.loads(line) for line in err.split("\n") if line.startswith("{")]
    return [record["key"] for record in records if record["event"] == "row.left.failed"]


@pytest.mark.req("REQ-ERR-007", "REQ-TXN-014", "T45", "REQ-ERR-008")
def test_one_poisonous_row_is_found_named_and_left_and_all_others_are_archived(make: Callable[..., Scene]) -> None:
    scene = make()
    scene.db.execute(POISON)
    result = scene.go(seconds=180)
    assert result.rc == exits.SOME_FAILED, trouble(result.err)
    assert left_behind(result.err) == ["137"]
    assert scene.db.execute(f"SELECT id FROM {TABLE} WHERE id <= {OLD}") == [(137,)]
    made = summary(result)
    assert (made["totals"]["rows"], made["exit"]) == (OLD - 1, 1)
    scene.must_be_whole(left=YOUNG + 1)
    # AND WHEN the trigger is gone THEN the next run takes the row too
    scene.db.execute("DROP TRIGGER poison ON audit_logs")
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("REQ-VAL-006")
def test_a_row_that_another_one_references_stays_and_is_counted(make: Callable[..., Scene]) -> None:
    scene = make()
    scene.db.execute(DEFERRED)
    result = scene.go(seconds=180)
    assert scene.db.execute(f"SELECT id FROM {TABLE} WHERE id <= {OLD}") == [(137,)], trouble(result.err)
    assert result.rc == exits.OK, trouble(result.err)
    assert "137" not in left_behind(result.err)
    assert summary(result)["totals"]["rows"] == OLD - 1
    scene.must_be_whole(left=YOUNG + 1)


@pytest.mark.req("REQ-SCH-002", "REQ-ERR-007")
def test_a_column_that_is_added_between_two_batches_is_archived_with_the_rows_that_have_it(make: Callable[..., Scene]) -> None:
    """C7. The first batch has the shape that was planned, the others have the new one; no value is left out."""
    scene = make()
    columns = ", ".join(name for name, in scene.db.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum", (TABLE,)))
    crash = scene.start(ARCHIVE, "select.begun:2")
    until(lambda: scene.left() == OLD + YOUNG - 100, "the first batch is committed")
    scene.db.execute(f"ALTER TABLE {TABLE} ADD COLUMN colour text DEFAULT 'blue' NOT NULL")
    go_on(crash.victim)
    result = crash.wait()
    assert result.rc == exits.OK, trouble(result.err)
    assert "changed" in result.err
    # THEN every old column of every row is as it was, and the rows that were archived with the new column have its value
    assert scene.left() == YOUNG
    archived = [json.loads(line) for commit in scene.archive.commits() for line in scene.archive.rows(commit)]
    assert [row.get("colour") for row in archived] == [None] * 100 + ["blue"] * (OLD - 100)
    scene.db.execute(f"ALTER TABLE {TABLE} ALTER colour DROP NOT NULL")
    scene.archive.restore(scene.settings.databases[0], TABLE, "public.again", table="audit_logs")
    assert tables.digest(scene.db.connection, f"(SELECT {columns} FROM {TABLE})", f"(SELECT {columns} FROM public.again)") == scene.before
