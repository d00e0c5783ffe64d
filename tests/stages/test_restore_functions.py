"""aa-restore with expressions of a person's own: columns that are made anew, rows that are made of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ground.restored import Restored

LOGS = [{"name": "users", "timestamp_column": "at", "primary_key": ["region", "id"]}]
ALL = ("--restore-all", "--table", "users")


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Restored:
    """12 rows with a composite key, archived."""
    db.execute("CREATE TABLE users (at timestamptz NOT NULL, id int, region text, first_name text, last_name text, seen int, "
               "PRIMARY KEY (region, id))")
    db.execute("INSERT INTO users SELECT '2024-01-01Z', i, CASE WHEN i % 2 = 0 THEN 'eu' ELSE 'us' END, 'f' || i, 'l' || i, i "
               "FROM generate_series(1, 12) i")
    db.execute("CREATE TABLE original AS SELECT * FROM users")
    made = Restored(db, bucket, config_file(db, bucket, LOGS))
    made.archive()
    return made


def functions(path: Path, **parts: Any) -> Path:
    """The file."""
    (path / "functions.json").write_text(json.dumps(parts))
    return path / "functions.json"


@pytest.mark.req("REQ-RESTORE-002", "REQ-RST-004")
def test_a_column_is_made_by_the_expression_for_it_and_a_column_that_has_none_is_mapped(scene: Restored, tmp_path: Path) -> None:
    scene.db.execute("CREATE FUNCTION loud(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT upper($1)'")
    scene.db.execute("ALTER TABLE users DROP last_name, ADD full_name varchar(20) NOT NULL")
    refused = scene.run(*ALL, "--schema-strategy", "lenient")
    assert (refused.rc, "demands a value" in refused.err) == (3, True)
    file = functions(tmp_path, transform={"full_name": "public.loud(a.first_name) || ' ' || a.last_name", "seen": "a.seen * 10"})
    report = scene.restore(*ALL, "--schema-strategy", "transform", "--functions", file)
    assert [each["column"] for each in report["differences"]] == ["last_name", "full_name"]
    assert scene.db.execute("SELECT region, id, first_name, full_name, seen FROM users ORDER BY 1, 2") == scene.db.execute(
        "SELECT region, id, first_name, upper(first_name) || ' ' || last_name, seen * 10 FROM original ORDER BY 1, 2")


@pytest.mark.req("REQ-RESTORE-008", "REQ-RESTORE-011")
def test_two_versions_of_a_row_are_merged_as_the_expressions_say_and_again_to_the_same(scene: Restored, tmp_path: Path) -> None:
    scene.db.execute("INSERT INTO users SELECT * FROM original WHERE id <= 6")
    scene.db.execute("UPDATE users SET seen = seen + (CASE WHEN id <= 2 THEN 100 ELSE -100 END), first_name = 'now' WHERE id <= 4")
    file = functions(tmp_path, merge={"seen": "greatest(t.seen, v.seen)"})
    for number, same in enumerate((2, 8)):
        report = scene.restore(*ALL, "--ignore-watermark", "--conflict-strategy", "merge", "--functions", file,
                               "--conflicts", tmp_path / f"conflicts-{number}.jsonl")
        assert (report["rows"]["same"], report["rows"]["conflicts"]) == (same, 4)
        lines = [json.loads(line) for line in (tmp_path / f"conflicts-{number}.jsonl").read_text().splitlines()]
        assert sorted((*line["key"], line["resolution"]) for line in lines) == [
            ("eu", 2, "merged"), ("eu", 4, "merged"), ("us", 1, "merged"), ("us", 3, "merged")]
        assert lines[0]["columns"] == ["region", "id"]
        assert scene.db.execute("SELECT id, seen, first_name FROM users WHERE id <= 5 ORDER BY id") == [
            (1, 101, "now"), (2, 102, "now"), (3, 3, "now"), (4, 4, "now"), (5, 5, "f5")]
        assert scene.db.scalar("SELECT count(*) FROM users") == 12


def test_a_merge_that_would_change_a_row_at_every_restore_is_refused_and_nothing_goes_in(scene: Restored, tmp_path: Path) -> None:
    scene.db.execute("INSERT INTO users SELECT at, id, region, 'other', last_name, seen FROM original WHERE id = 1")
    report = scene.restore(*ALL, "--conflict-strategy", "merge", "--functions", functions(tmp_path, merge={"seen": "t.seen + v.seen"}), code=2)
    assert "would change again" in report["failures"][0]["msg"]
    assert scene.db.execute("SELECT seen FROM users") == [(1,)]


def test_what_is_no_expression_or_goes_with_no_strategy_is_refused_before_anything_is_restored(scene: Restored, tmp_path: Path) -> None:
    transform, merge = ("--schema-strategy", "transform"), ("--conflict-strategy", "merge")
    for argv, parts, says in (
            (transform, {"transform": {"seen": "1; DROP TABLE users"}}, "no expression needs"),
            (transform, {"transform": {"seen": "a.nothing"}}, "column 'seen' is not taken"),
            (transform, {"transform": {"nothing": "1"}}, "does not have"), (transform, {"transform": {"seen": 1}}, "other things than expressions"),
            (transform, {"merge": {"seen": "1"}}, "go together"), ((), {"merge": {"seen": "1"}}, "go together"),
            (merge, {"merge": {"id": "1"}}, "cannot be set"), (merge, {"merge": {"seen": "z.seen"}}, "is not taken"),
            (merge, {"unknown": {}}, "other things than expressions")):
        result = scene.run(*ALL, *argv, "--functions", functions(tmp_path, **parts))
        assert (result.rc, says in result.err, scene.db.scalar("SELECT count(*) FROM users")) == (3, True, 0), f"{parts}: {result.err}"
    assert scene.run(*ALL, *merge).rc == scene.run(*ALL, *merge, "--functions", tmp_path / "none").rc == 3
    (tmp_path / "broken.json").write_text("{")
    assert "is not JSON" in scene.run(*ALL, *merge, "--functions", tmp_path / "broken.json").err


def test_a_restore_into_a_table_that_is_archived_warns_that_the_rows_go_again(scene: Restored) -> None:
    warned = [record for record in scene.run(*ALL).log if record["event"] == "restore.archivable"]
    assert len(warned) == 1 and "90 days" in warned[0]["msg"] and ".yaml:" in warned[0]["at"]
    assert not [record for record in scene.run(*ALL, "--into", "copy", "--create-table").log if record["event"] == "restore.archivable"]
