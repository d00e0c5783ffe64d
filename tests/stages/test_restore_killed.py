"""aa-restore killed at every one of its points, or stopped: run again it ends in the same table."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from audit_archiver.points import POINTS
from tests.ground import tables
from tests.ground.kill import kill, stopped_at
from tests.ground.restored import Restored
from tests.ground.run import finish, spawn
from tests.ground.wait import until

MINE = [point for point in POINTS if point.startswith("restore.")]


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Restored:
    """350 rows in four batches, archived."""
    tables.create(db.connection, rows=350, first="2024-01-01", last="2024-03-01")
    made = Restored(db, bucket, config_file(db, bucket))
    db.execute("CREATE TABLE original AS SELECT * FROM audit_logs")
    made.archive()
    return made


@pytest.mark.req("REQ-RESTORE-016", "T46")
@pytest.mark.parametrize(("point", "strategy"), [(MINE[0], "fail"), (MINE[1] + ":2", "fail"), (MINE[2] + ":2", "fail"), (MINE[3], "fail"),
                                                 (MINE[2] + ":2", "skip"), (MINE[2], "upsert")])
def test_a_restore_that_is_killed_and_run_again_ends_in_the_same_table(scene: Restored, point: str, strategy: str) -> None:
    argv = ["-c", scene.path, "--restore-all", "--table", "audit_logs", "--batch-size", 100, "--conflict-strategy", strategy]
    child = spawn("aa-restore", argv, env={"AA_TEST_POINT": point})
    stopped_at(point, child.token, ended=child.poll)
    assert scene.db.scalar("SELECT count(*) FROM audit_logs") % 50 == 0, "a batch is in the table whole or not at all"
    kill(child.pid)
    finish(child)
    until(lambda: not scene.db.admin("SELECT pid FROM pg_stat_activity WHERE application_name LIKE '%%restore%%' AND datname = %s", (scene.db.name,)),
          "the server has noticed")
    report = scene.restore(*argv[2:])
    assert report["rows"]["conflicts"] == 0
    assert tables.digest(scene.db.connection, "audit_logs") == tables.digest(scene.db.connection, "original")


def test_every_point_of_a_restore_is_swept() -> None:
    assert MINE == ["restore.staged", "restore.inserted", "restore.committed", "restore.watermark.put"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_rolls_back_what_is_open_and_is_said(scene: Restored, signum: int) -> None:
    other = scene.db.connect()
    with other.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE audit_logs IN SHARE MODE")
        child = spawn("aa-restore", ["-c", scene.path, "--restore-all", "--table", "audit_logs"])
        until(lambda: scene.db.admin("SELECT pid FROM pg_stat_activity WHERE application_name LIKE '%%restore%%' AND wait_event_type = 'Lock'"),
              "it waits for the table")
        child.send_signal(signum)
        result = finish(child)
        cursor.execute("COMMIT")
    other.close()
    assert (result.rc, f"stopped by {signal.Signals(signum).name}" in result.err) == (-signum, True), result.err
    until(lambda: not scene.db.admin("SELECT pid FROM pg_stat_activity WHERE application_name LIKE '%%restore%%' AND datname = %s", (scene.db.name,)),
          "the server has noticed")
    assert scene.db.scalar("SELECT count(*) FROM audit_logs") == 0
