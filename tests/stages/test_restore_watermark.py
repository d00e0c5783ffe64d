"""The watermark of restores in the database, beside the rows, or in both places (FAQ, RESTORE-020 as ruled)."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from tests.ground import kill, tables
from tests.ground.restored import Restored
from tests.ground.run import finish, run_stage, spawn

Scene = Callable[[str], Restored]


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Scene:
    """250 rows in three batches, archived; the watermark is kept where the test says."""
    def make(storage: str) -> Restored:
        tables.create(db.connection, rows=250, first="2024-01-01", last="2024-03-01")
        made = Restored(db, bucket, config_file(db, bucket, restore_watermark={"storage_type": storage}))
        made.lines = made.archive()  # type: ignore[attr-defined]
        return made
    return make


def in_bucket(scene: Restored) -> bool:
    return any(key.endswith(".restore_watermark.json") for key in scene.bucket.keys())


def in_database(scene: Restored) -> list[str]:
    if scene.db.scalar("SELECT to_regclass('public.restore_watermarks')") is None:
        return []
    return [row[0] for row in scene.db.execute("SELECT batch_id FROM public.restore_watermarks ORDER BY restored_at, batch_id")]


def ids(scene: Restored) -> list[str]:
    return sorted(line["batch"]["id"] for line in scene.lines)  # type: ignore[attr-defined]


def before(scene: Restored, *argv: str) -> int:
    return int(scene.restore("--restore-all", "--table", "audit_logs", *argv)["batches"]["restored_before"])


@pytest.mark.req("REQ-RESTORE-020")
@pytest.mark.parametrize("storage", ["s3", "database", "both"])
def test_it_lies_where_the_configuration_says_and_is_read_there(scene: Scene, storage: str) -> None:
    made = scene(storage)
    assert before(made, "--dry-run") == 0
    assert in_database(made) == [] and made.db.scalar("SELECT to_regclass('public.restore_watermarks')") is None, "a dry run makes no table"
    assert before(made) == 0
    assert (in_bucket(made), sorted(in_database(made))) == (storage != "database", ids(made) if storage != "s3" else [])
    assert (before(made), before(made, "--dry-run")) == (3, 3)
    assert before(made, "--ignore-watermark") == 0
    assert sorted(in_database(made)) == (ids(made) if storage != "s3" else []), "it is kept up to date, and nothing is there twice"


@pytest.mark.req("REQ-RESTORE-020")
def test_kept_in_both_places_one_is_enough(scene: Scene) -> None:
    made = scene("both")
    before(made)
    made.db.execute("DROP TABLE public.restore_watermarks")
    assert before(made) == 3
    before(made, "--ignore-watermark")
    made.bucket.client.delete_object(Bucket=made.bucket.name, Key=f"archives/{made.db.name}/audit_logs/.restore_watermark.json")
    assert before(made) == 3


@pytest.mark.req("REQ-RESTORE-020")
def test_dates_choose_first_and_the_watermark_then_and_a_batch_restored_in_part_is_not_in_it(scene: Scene) -> None:
    made = scene("database")
    edge = str(made.lines[1]["batch"]["first"][0])[:10]  # type: ignore[attr-defined]
    first = made.restore("--table", "audit_logs", "--end-date", edge)
    assert first["rows"]["meant"] < first["rows"]["archived"]
    assert in_database(made) == [made.lines[0]["batch"]["id"]]  # type: ignore[attr-defined]
    again = made.restore("--table", "audit_logs", "--end-date", edge)
    assert (again["batches"]["chosen"], again["batches"]["restored_before"]) == (2, 1)


@pytest.mark.req("REQ-RESTORE-020")
def test_a_table_that_was_made_again_begins_anew(scene: Scene) -> None:
    made = scene("database")
    into = ("--into", "other", "--create-table")
    assert (before(made, *into), before(made, *into)) == (0, 3)
    made.db.execute("DROP TABLE other")
    assert before(made, *into) == 0


@pytest.mark.req("REQ-RESTORE-020")
def test_it_is_committed_with_the_rows_or_not_at_all(scene: Scene) -> None:
    made = scene("database")
    asked = ["-c", made.path, "--restore-all", "--table", "audit_logs", "--batch-size", "1", "--in-flight", "1"]
    child = spawn("aa-restore", asked, env={"AA_TEST_POINT": "restore.committed:2"})
    kill.kill(kill.stopped_at("restore.committed:2", child.token, ended=child.poll))
    finish(child)
    noted = made.db.scalar("SELECT count(*) FROM public.restore_watermarks")
    assert (made.db.scalar("SELECT count(*) FROM audit_logs"), noted) == (200, 2)


@pytest.mark.req("REQ-RESTORE-020")
def test_a_rollback_takes_its_batches_out(scene: Scene) -> None:
    made = scene("both")
    before(made)
    made.db.execute("DELETE FROM audit_logs")
    run = made.lines[0]["batch"]["run"]  # type: ignore[attr-defined]
    result = run_stage("aa-rollback", ["-c", made.path, "--run", run, "--force", "--output", "json"])
    assert (result.rc, in_database(made)) == (0, []), result.err


@pytest.mark.req("REQ-RESTORE-020")
def test_a_table_that_cannot_be_made_is_said_before_a_row_is_in(scene: Scene) -> None:
    made = scene("database")
    made.db.execute("CREATE DOMAIN public.restore_watermarks AS integer")  # the name is taken
    result = made.run("--restore-all", "--table", "audit_logs")
    assert (result.rc, made.db.scalar("SELECT count(*) FROM audit_logs")) == (3, 0), result.err
    assert "public.restore_watermarks cannot be made" in result.err and "storage_type: s3" in result.err
