"""What a machine, a DBA, a failover and a backup do to a run: the next one makes it good, or stops and says what to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import psycopg2
import pytest

from audit_archiver import config, exits
from tests.conftest import ARCHIVER, TestDatabase
from tests.crash.scene import ARCHIVE, OLD, QUICK, TABLE, YOUNG, Scene, trouble
from tests.ground.postgres import QUICK as QUICK_SERVER
from tests.ground.postgres import Cluster, standby
from tests.ground.run import run_forked
from tests.ground.wait import until

Make = Callable[..., Scene]
JUMPING = """
import pathlib, time
true_time, true_gmtime, looks = time.time, time.gmtime, []
def wrong_time():
    looks.append(1)
    if len(looks) == 2:
        pathlib.Path(__file__).with_name("jumped").touch()
    return true_time() + ({seconds} if len(looks) > 1 else 0)
time.time = wrong_time
time.gmtime = lambda seconds=None: true_gmtime(wrong_time() if seconds is None else seconds)
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@pytest.fixture()
def make(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> Make:
    """A function that builds the scene; it takes what config_file takes, and another server's database."""
    def made(on_server: Any = db, **more: Any) -> Scene:
        return Scene(on_server, bucket, config_file(on_server, bucket, **{**QUICK, **more}), tmp_path)
    return made


@pytest.fixture()
def own() -> Iterator[TestDatabase]:
    """The archiver's database on a server that the test may lose."""
    with Cluster.start(settings={**QUICK_SERVER, "wal_level": "replica", "max_wal_senders": "5", "hot_standby": "on"}) as cluster:
        admin = cluster.connect()
        with admin.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {ARCHIVER} LOGIN")
            cursor.execute(f"CREATE DATABASE prod OWNER {ARCHIVER}")
        admin.close()
        made = TestDatabase(cluster, "prod")
        yield made
        made.close()


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# -- disks

@as_root
@pytest.mark.req("T45", "T57", "REQ-ERR-004")
def test_a_staging_disk_that_is_full_ends_the_run_with_6_and_leaves_nothing_on_it(make: Make, small_disk: Path) -> None:
    scene = make(staging_dir=str(small_disk), defaults={"batch_size": OLD})
    (small_disk / "theirs").write_bytes(b"x" * (370 << 10))
    result = scene.go()
    assert result.rc == exits.RESOURCE and "No space left" in result.err, trouble(result.err)
    assert scene.left() == OLD + YOUNG
    scene.must_be_in_balance()
    # WHEN there is room again THEN the next run needs no hand, and what the first one staged does not stay
    (small_disk / "theirs").unlink()
    assert scene.go().rc == 0
    scene.must_be_whole()
    assert not [path for path in small_disk.rglob("*") if path.is_file() and path.suffix != ".lock"], list(small_disk.rglob("*"))


@pytest.mark.req("T45", "REQ-ERR-004")
def test_a_run_that_cannot_write_its_log_from_the_start_moves_no_row(make: Make) -> None:
    """/dev/full is a disk that is full at every byte. Nobody can be told why; the exit code still says that it was no success."""
    scene = make()
    result = scene.go(f"{ARCHIVE} 2>/dev/full")
    assert (result.rc, scene.left()) == (exits.RESOURCE, OLD + YOUNG), result
    assert scene.go().rc == 0
    scene.must_be_whole()


@as_root
@pytest.mark.req("T45", "REQ-ERR-004")
def test_a_log_disk_that_becomes_full_in_the_middle_costs_no_row_and_is_no_false_success(make: Make, small_disk: Path) -> None:
    scene = make()
    (small_disk / "theirs").write_bytes(b"x" * (396 << 10))
    result = scene.go(f"{ARCHIVE} 2>{small_disk}/log")
    assert 1000 < (small_disk / "log").stat().st_size <= 4096, "it began to write, and could not go on"
    assert result.rc == exits.RESOURCE or (result.rc, scene.left()) == (exits.OK, YOUNG), result
    (small_disk / "theirs").unlink()
    assert scene.go(f"{ARCHIVE} 2>>{small_disk}/log").rc == 0
    scene.must_be_whole()


@as_root
@pytest.mark.req("T45", "REQ-ERR-004")
def test_a_staging_disk_that_cannot_be_written_is_said_and_nothing_is_begun(make: Make, small_disk: Path) -> None:
    """Mounted read-only, as a file system is after an error of its disk."""
    scene = make(staging_dir=str(small_disk / "staging"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = scene.go()
    assert result.rc == exits.CONFIG and "Read-only file system" in result.err, trouble(result.err)
    assert (scene.left(), scene.archive.commits()) == (OLD + YOUNG, [])
    scene.must_be_in_balance()
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert scene.go().rc == 0
    scene.must_be_whole()


# -- clocks

@pytest.mark.req("REQ-ARC-002", "T6")
@pytest.mark.parametrize("days", [40, -40])
def test_a_clock_of_this_machine_that_is_wrong_by_weeks_moves_no_row_over_the_cutoff(make: Make, tmp_path: Path, days: int) -> None:
    """The machine's own clock cannot be set here: Python's is, in every process of the run, from its second look at it on, so that it jumps.
    What asks the C library itself (botocore's signature) keeps the true time."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING.format(seconds=days * 86400))
    scene = make()
    scene.db.execute(f"UPDATE {TABLE} SET created_at = now() - interval '80 days' WHERE id = 7")
    scene.db.execute(f"UPDATE {TABLE} SET created_at = now() - interval '100 days' WHERE id = 8")
    wrong, place = scene.spawn_command(ARCHIVE, {"PYTHONPATH": str(tmp_path / "clock")})
    assert wrong.wait(120) == 0, trouble((place / "err").read_text())
    assert (tmp_path / "clock" / "jumped").exists()
    assert scene.db.execute(f"SELECT id FROM {TABLE} WHERE id <= %s", (OLD,)) == [(7,)]
    # AND the next run, whose clock is right, finds nothing left of it to settle
    assert scene.go().rc == 0
    assert scene.left() == YOUNG + 1
    assert run_forked("aa-balance", ["-c", scene.path, "--database", scene.db.name, "--table", TABLE]).rc == 0
    assert run_forked("aa-validate", ["-c", scene.path, "--depth", "full"]).rc == 0


# -- what a DBA sets, and what an application does

@pytest.mark.req("REQ-TXN-007", "T17")
def test_timeouts_and_asynchronous_commit_that_a_dba_has_set_for_the_role_and_the_database_do_not_reach_a_run(make: Make) -> None:
    """S2, S6: each of them would end every statement, or make a commit that was answered untrue."""
    scene = make()
    for name, value in (("statement_timeout", "1ms"), ("lock_timeout", "1ms"), ("idle_in_transaction_session_timeout", "1ms"),
                        ("synchronous_commit", "off")):
        scene.db.admin(f"ALTER DATABASE {scene.db.name} SET {name} = '{value}'")
        scene.db.admin(f"ALTER ROLE {ARCHIVER} IN DATABASE {scene.db.name} SET {name} = '{value}'")
    result = scene.go()
    scene.db.admin(f"ALTER ROLE {ARCHIVER} IN DATABASE {scene.db.name} RESET ALL")
    scene.db.admin(f"ALTER DATABASE {scene.db.name} RESET ALL")
    assert result.rc == 0, trouble(result.err)
    scene.must_be_whole()


@pytest.mark.req("T2", "T3", "T5", "REQ-LOCK-005", "REQ-ERR-008")
def test_an_application_that_updates_the_same_rows_in_the_opposite_order_all_the_time_costs_no_row(make: Make) -> None:
    """It deadlocks with itself, with a batch never: SKIP LOCKED waits for nobody. Rows that it adds late, with an old time, go too."""
    scene = make()
    stop, failed, deadlocks = threading.Event(), [], []  # type: threading.Event, list[BaseException], list[str]

    def application(order: str) -> None:
        connection = scene.db.connect("postgres", options="-c deadlock_timeout=20ms")
        try:
            with connection.cursor() as cursor:
                while not stop.is_set():
                    try:
                        cursor.execute(f"WITH locked AS (SELECT id FROM {TABLE} ORDER BY id {order} FOR UPDATE) "
                                       f"UPDATE {TABLE} SET action = action WHERE id IN (SELECT id FROM locked)")
                    except psycopg2.errors.DeadlockDetected:
                        deadlocks.append(order)
        except BaseException as error:
            failed.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=application, args=(order,)) for order in ("ASC", "DESC")]
    for thread in threads:
        thread.start()
    try:
        until(lambda: deadlocks or failed, "the application deadlocks with itself")
        result = scene.go(seconds=120)
        scene.db.execute(f"INSERT INTO {TABLE} (id, created_at, action) VALUES (9001, '2024-01-02', 'late')")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed and result.rc in (exits.OK, exits.SOME_FAILED), (failed, trouble(result.err))
    assert scene.go().rc == 0
    assert scene.left() == YOUNG
    rows = [row for commit in scene.archive.commits() for row in scene.archive.rows(commit)]
    assert len(rows) == OLD + 1 and sum(b'"action":"late"' in row for row in rows) == 1
    assert run_forked("aa-balance", ["-c", scene.path, "--database", scene.db.name, "--table", TABLE]).rc == 0


# -- another server, an older server

def doubled(scene: Scene) -> int:
    """How many rows aa-balance finds in the table and in the archive."""
    weighed = run_forked("aa-balance", ["-c", scene.path, "--database", scene.db.name, "--table", TABLE, "--output", "json"])
    return int(weighed.lines[-1]["wrong"]["doubled"])


def must_stop_and_say_so(scene: Scene) -> None:
    """The rows of the last batch are back: every command that asks says it, nothing is archived a second time, and the remedy works."""
    back, before = doubled(scene), len(scene.archive.commits())
    assert back == 100
    for command in ("aa-archive --force", "aa-recover"):
        result = scene.go(f"exec {command}")
        assert result.rc == exits.FAILED and "the server was rewound: 100 of 100 rows" in result.err, trouble(result.err)
    assert run_forked("aa-validate", ["-c", scene.path, "--depth", "full"]).rc == exits.FAILED
    assert len(scene.archive.commits()) == before
    # WHEN they are deleted again, as the message says THEN the next run goes on and every row is in one place
    batch = scene.archive.commits()[-1]["batch"]
    scene.db.execute(f"DELETE FROM {TABLE} WHERE id BETWEEN %s AND %s", (batch["first"][1], batch["last"][1]))
    assert scene.go().rc == 0
    scene.must_be_whole()


def archive_but(scene: Scene, lose: Callable[[], None]) -> None:
    """Two batches: one before, one after `lose` has seen to it that what is committed from now on will be lost."""
    assert scene.go("exec aa-archive --force --limit 100").rc == 0
    lose()
    assert scene.go("exec aa-archive --force --limit 100").rc == 0
    assert scene.left() == OLD + YOUNG - 200


@pytest.mark.req("T38", "REQ-REL-006", "REQ-REL-003")
def test_a_failover_to_a_replica_that_lost_the_last_transactions_is_noticed_and_archives_nothing_twice(own: TestDatabase, make: Make) -> None:
    """S11: a streaming replica stops receiving, the primary archives one more batch and dies, the replica becomes the primary."""
    scene = make(own)
    replica = standby(own.cluster)
    new = TestDatabase(replica, "prod")

    def cut_off() -> None:
        until(lambda: new.scalar(f"SELECT count(*) FROM {TABLE}") == OLD + YOUNG - 100, "the replica has the first batch")
        new.admin("ALTER SYSTEM SET primary_conninfo = ''")
        new.close()
        replica.down()  # 11 and 12 read it at the start only
        replica.up()
        until(lambda: own.admin("SELECT count(*) FROM pg_stat_replication")[0][0] == 0, "the replica is cut off")

    try:
        archive_but(scene, cut_off)
        own.close()
        own.cluster.down(signal.SIGQUIT)
        replica.run("pg_ctl", "promote", "-D", str(replica.data))
        until(lambda: not new.admin("SELECT pg_is_in_recovery()")[0][0], "the replica is the primary")
        _moves_to(scene, own, new)
        must_stop_and_say_so(scene)
    finally:
        new.close()
        replica.stop()


@pytest.mark.req("T38", "REQ-REL-006")
def test_a_database_that_was_restored_from_an_older_backup_is_noticed_and_archives_nothing_twice(own: TestDatabase, make: Make) -> None:
    scene = make(own)
    copy = own.cluster.base / "backup"

    def back_up() -> None:
        own.cluster.run("pg_basebackup", "-D", str(copy), "-d", own.cluster.dsn(), "-X", "stream", "-c", "fast")

    archive_but(scene, back_up)
    own.close()
    own.cluster.down(signal.SIGQUIT)
    shutil.rmtree(own.cluster.data)
    copy.rename(own.cluster.data)
    own.cluster.up()
    must_stop_and_say_so(scene)


def _moves_to(scene: Scene, old: TestDatabase, new: TestDatabase) -> None:
    """The configuration names the new primary."""
    scene.path.write_text(scene.path.read_text().replace(str(old.host), str(new.host)))
    scene.db, scene.settings = new, config.load(str(scene.path), {})
