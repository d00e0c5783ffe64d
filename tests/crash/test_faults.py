"""Faults that are no kills: a wiped disk, a server or a store that goes away, expired credentials, a full disk."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from audit_archiver import exits
from tests.conftest import ARCHIVER, Bucket, TestDatabase
from tests.crash.scene import ARCHIVE, OLD, QUICK, TABLE, YOUNG, Crash, Scene, trouble
from tests.ground.faulty_s3 import Answer, FaultyS3, Forward, Request, answers, error, flip_bit, lists_late, on, once, stores
from tests.ground.kill import go_on, kill, kill_family
from tests.ground.postgres import Cluster
from tests.ground.proxy import Proxy
from tests.ground.run import finish, spawn
from tests.ground.wait import until

LONG = os.environ.get("AA_CRASH") == "long"
Make = Callable[..., Scene]


@pytest.fixture()
def make(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> Make:
    """A function that builds the scene; it takes what config_file takes, and another server's database or bucket."""
    def made(on_server: Any = db, in_store: Any = bucket, **more: Any) -> Scene:
        return Scene(on_server, in_store, config_file(on_server, in_store, **{**QUICK, **more}), tmp_path)
    return made


@pytest.fixture()
def own() -> Iterator[TestDatabase]:
    """The archiver's database on a server that the test may crash."""
    with Cluster.start() as cluster:
        admin = cluster.connect()
        with admin.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {ARCHIVER} LOGIN")
            cursor.execute(f"CREATE DATABASE prod OWNER {ARCHIVER}")
        admin.close()
        made = TestDatabase(cluster, "prod")
        yield made
        made.close()


@pytest.fixture()
def faulty(s3: Any, bucket: Bucket) -> Iterator[FaultyS3]:
    """A store in front of the session's that can misbehave."""
    with FaultyS3(s3.endpoint) as store:
        yield store


def through(store: FaultyS3) -> dict[str, Any]:
    """The configuration's s3 section for the way through `store`."""
    return {"s3": {**QUICK["s3"], "endpoint": store.endpoint}}


# -- staging

@pytest.mark.req("T40", "REQ-REL-004")
@pytest.mark.parametrize("point", ["holder.commit.sent"] + ["delete.before", "serialize.staged"] * LONG)
def test_staging_may_be_wiped_between_a_crash_and_the_next_run(make: Make, point: str) -> None:
    scene = make()
    crash = scene.start(ARCHIVE, point)
    crash.kill_driver()
    if crash.living():
        kill(crash.victim)
    shutil.rmtree(scene.path.parent / "staging")
    scene.must_be_free()
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("T45", "REQ-ERR-004")
def test_a_full_disk_ends_the_run_with_6_and_deletes_nothing(make: Make) -> None:
    """The limit on a file's size is met as a full disk is: in the middle of the write of a batch's rows."""
    scene = make(defaults={"batch_size": OLD})
    result = scene.go("{ (ulimit -f 30; PYTHONDONTWRITEBYTECODE=1 aa-archive --force 2>&1); echo rc $?; } | cat")
    assert result.out.endswith(b"rc 6\n"), result.out[-3000:]
    assert b"File too large" in result.out
    assert scene.left() == OLD + YOUNG
    assert scene.go().rc == 0
    scene.must_be_whole()


# -- PostgreSQL

@pytest.mark.req("T38", "T45", "REQ-NET-001")
def test_a_server_that_crashes_while_a_batch_is_open_rolls_it_back(own: TestDatabase, make: Make) -> None:
    scene = make(own)
    crash = scene.start(ARCHIVE, "verify.done")
    own.cluster.down(signal.SIGQUIT)
    go_on(crash.victim)
    assert crash.wait().rc == exits.NETWORK, trouble(crash.said())
    _up_again(scene)
    assert scene.left() == OLD + YOUNG
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("T38")
def test_a_run_gets_over_a_server_that_was_only_restarted(own: TestDatabase, make: Make) -> None:
    scene = make(own)
    crash = scene.start(ARCHIVE, "verify.done")
    own.cluster.down(signal.SIGQUIT)
    _up_again(scene)
    go_on(crash.victim)
    assert crash.wait().rc == exits.OK, trouble(crash.said())
    scene.must_be_whole()


@pytest.mark.req("T38", "REQ-TXN-012", "REQ-ERR-011")
@pytest.mark.parametrize("server", ["dies", "lives"])
def test_a_commit_whose_answer_is_lost_is_found_out(own: TestDatabase, make: Make, server: str) -> None:
    """GIVEN COMMIT arrived and its answer did not WHEN the server dies, or only the line does THEN the batch is recorded once."""
    with Proxy(f"{own.cluster.host}/.s.PGSQL.{own.cluster.port}") as proxy:
        scene = make(own, database={"host": "127.0.0.1", "port": proxy.port, "sslmode": "disable"})
        crash = scene.start(ARCHIVE, "holder.commit.before")
        proxy.stall_down = True
        go_on(crash.victim)
        until(lambda: scene.left() < OLD + YOUNG, "COMMIT has arrived")
        if server == "dies":
            own.cluster.down(signal.SIGQUIT)
        proxy.cut()
        proxy.stall_down = False
        assert crash.wait().rc == (exits.NETWORK if server == "dies" else exits.OK), trouble(crash.said())
        if server == "dies":
            _up_again(scene)
            assert scene.left() == OLD + YOUNG - 100
            assert scene.go().rc == 0
        assert sorted(line["committed"]["by"] for line in scene.archive.commits())[:2] == ["aa-recover", "holder"]
        scene.must_be_whole()


@pytest.mark.req("REQ-ERR-003", "REQ-REL-002", "REQ-REL-007")
def test_a_server_that_has_no_connection_free_for_a_moment_is_asked_again(make: Make) -> None:
    scene = make(s3={"retry_base_s": 4})
    scene.db.admin(f"ALTER DATABASE {scene.db.name} CONNECTION LIMIT 0")
    child, place = scene.spawn_command(ARCHIVE)
    try:
        until(lambda: "pipeline.retry" in (place / "err").read_text(), "the first attempt has failed")
    finally:
        scene.db.admin(f"ALTER DATABASE {scene.db.name} CONNECTION LIMIT -1")
    assert child.wait(60) == exits.OK, trouble((place / "err").read_text())
    scene.must_be_whole()


def _up_again(scene: Scene) -> None:
    scene.db.close()
    scene.db.cluster.up()


# -- the object store

@pytest.mark.req("T45", "REQ-NET-002", "REQ-ERR-004")
@pytest.mark.parametrize("point", ["upload.data.put", "verify.data.read"])
def test_a_store_that_goes_away_ends_the_run_with_7_and_is_no_loss(make: Make, rclone: Any, poor_bucket: Bucket, point: str) -> None:
    """A real store, without conditional writes: its process ends in the middle of a batch, and starts again later."""
    with FaultyS3(rclone.endpoint) as line:
        scene = make(in_store=poor_bucket, **through(line))
        crash = scene.start(ARCHIVE, point)
        rclone.stop()
        go_on(crash.victim)
        assert crash.wait().rc == exits.NETWORK, trouble(crash.said())
        assert scene.left() in (OLD + YOUNG, OLD + YOUNG - 100), "at most the batch that had been read back whole is gone"
        _store_again(scene, rclone, line)
        assert scene.go().rc == 0
        scene.must_be_whole()


@pytest.mark.req("REQ-NET-002")
def test_a_store_that_goes_away_after_the_commit_leaves_the_record_to_the_next_run(make: Make, rclone: Any, poor_bucket: Bucket) -> None:
    with FaultyS3(rclone.endpoint) as line:
        scene = make(in_store=poor_bucket, **through(line))
        crash = scene.start(ARCHIVE, "record.before")
        rclone.stop()
        go_on(crash.victim)
        assert crash.wait().rc == exits.NETWORK, trouble(crash.said())
        committed = OLD + YOUNG - scene.left()
        assert committed >= 100
        _store_again(scene, rclone, line)
        assert scene.archive.commits() == []
        assert scene.go().rc == 0
        assert sum(each["batch"]["rows"] for each in scene.archive.commits() if each["committed"]["by"] == "aa-recover") == committed
        scene.must_be_whole()


def _store_again(scene: Scene, rclone: Any, line: FaultyS3) -> None:
    rclone.up()
    line.target = rclone.endpoint.partition("://")[2]
    scene.bucket.client = scene.archive.client = rclone.client()


@pytest.mark.req("T25", "T45")
def test_a_token_that_expires_in_the_middle_of_a_run_deletes_nothing_more(make: Make, faulty: FaultyS3) -> None:
    scene = make(**through(faulty))
    expired: list[bool] = []

    def after_the_first_record(request: Request, forward: Forward) -> Answer:
        if expired:
            return error(400, "ExpiredToken", "The provided token has expired.")
        answer = forward(request)
        if request.method == "PUT" and request.key.endswith("_commit.json"):
            expired.append(True)
        return answer

    faulty.fault = after_the_first_record
    result = scene.go()
    assert result.rc == exits.PERMISSION, trouble(result.err)
    assert "ExpiredToken" in result.err or "expired" in result.err
    recorded = sum(line["batch"]["rows"] for line in scene.archive.commits())
    assert 100 <= recorded <= OLD
    faulty.fault = None
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("T25", "REQ-REL-002", "REQ-REL-007")
def test_a_token_that_is_renewed_in_its_file_in_the_middle_of_a_run_is_no_failure(make: Make, faulty: FaultyS3, tmp_path: Path) -> None:
    scene = make(**through(faulty))
    renewed = tmp_path / "renewed.yaml"
    renewed.touch(mode=0o600)
    renewed.write_text(re.sub(r"  access_key_id: .*\n  secret_access_key: .*", "  profile: archive", scene.path.read_text()))
    tokens = [f"token-{number}" for number in range(3)]  # each good until a batch is recorded

    def write(token: str) -> None:
        keys = f"aws_access_key_id = AKIA\naws_secret_access_key = s\naws_session_token = {token}\n"
        (tmp_path / "credentials.new").write_text(f"[archive]\n{keys}")
        os.replace(tmp_path / "credentials.new", tmp_path / "credentials")

    def demands_the_newest(request: Request, forward: Forward) -> Answer:
        if request.headers.get("x-amz-security-token") != tokens[0]:
            return error(400, "ExpiredToken", "The provided token has expired.")
        answer = forward(request)
        if request.method == "PUT" and request.key.endswith("_commit.json") and len(tokens) > 1:
            write(tokens[1])
            tokens.pop(0)
        return answer

    write(tokens[0])
    faulty.fault = demands_the_newest
    result = scene.go(f"export AWS_SHARED_CREDENTIALS_FILE={tmp_path}/credentials; {ARCHIVE} -c {renewed}")
    assert result.rc == exits.OK, trouble(result.err)
    assert len(tokens) == 1 and '"s3.credentials"' in result.err
    faulty.fault = None
    scene.must_be_whole()


@pytest.mark.req("T45", "T25", "REQ-EXE-006")
@pytest.mark.parametrize(("answer", "code"), [(error(400, "ExpiredToken"), exits.PERMISSION), (error(503, "SlowDown"), exits.NETWORK)],
                         ids=["expired", "slow"])
def test_a_batch_that_is_committed_and_cannot_be_recorded_is_no_success(make: Make, faulty: FaultyS3, answer: Answer, code: int) -> None:
    scene = make(**through(faulty), defaults={"batch_size": OLD})
    faulty.fault = answers(on("PUT", "_commit.json"), answer)
    result = scene.go()
    assert (result.rc, scene.left()) == (code, YOUNG), trouble(result.err)
    assert scene.archive.commits() == []
    faulty.fault = None
    assert scene.go().rc == 0
    assert [line["committed"]["by"] for line in scene.archive.commits()] == ["aa-recover"]
    scene.must_be_whole()


@pytest.mark.req("REQ-NET-003", "REQ-NET-002")
def test_a_store_that_wants_it_slower_gets_it_slower(make: Make, faulty: FaultyS3) -> None:
    scene = make(**through(faulty))
    slowly = [once(on(method, suffix), times=2) for method, suffix in
              (("PUT", ".jsonl.gz"), ("PUT", "_manifest.json"), ("GET", ".jsonl.gz"), ("PUT", "_commit.json"))]
    faulty.fault = answers(lambda request: any([which(request) for which in slowly]), error(503, "SlowDown", "Please reduce your request rate."))
    assert scene.go().rc == 0
    scene.must_be_whole()
    assert scene.sizes()[0] == 100


@pytest.mark.req("T45")
def test_a_store_that_never_gets_faster_ends_the_run_with_7(make: Make, faulty: FaultyS3) -> None:
    scene = make(**through(faulty))
    faulty.fault = answers(on("PUT", "_manifest.json"), error(503, "SlowDown", "Please reduce your request rate."))
    result = scene.go()
    assert (result.rc, scene.left()) == (exits.NETWORK, OLD + YOUNG), trouble(result.err)
    faulty.fault = None
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("T20", "REQ-ERR-012")
@pytest.mark.parametrize(("suffix", "change", "left"), [
    ("_commit.json", None, OLD + YOUNG), ("_commit.json", flip_bit, OLD + YOUNG), ("-start.json", None, OLD + YOUNG),
    ("-end.json", flip_bit, YOUNG)], ids=["commit dropped", "commit flipped", "start dropped", "end flipped"])
def test_a_record_that_the_store_does_not_keep_is_no_success(make: Make, faulty: FaultyS3, suffix: str, change: Any, left: int) -> None:
    """Recovery decides by these records, so each is read back: a run that trusted the answer would have rows in neither place."""
    scene = make(**through(faulty))
    faulty.fault = stores(on("PUT", suffix), change or (lambda body: None))
    result = scene.go()
    assert result.rc == exits.FAILED, trouble(result.err)
    assert f"{suffix}' was written, and " in result.err
    assert scene.left() <= left
    assert not [key for key in scene.archive.keys() if key.endswith(suffix)]
    faulty.fault = None
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("T20", "REQ-REL-003")
@pytest.mark.parametrize("suffix", ["_metadata.json", "_manifest.json"])
def test_what_a_batch_left_damaged_needs_no_hand_while_another_copy_says_what_it_was(make: Make, faulty: FaultyS3, suffix: str) -> None:
    """Damaged metadata are known from the staging directory, the keys of a damaged list from the data; nothing was deleted."""
    scene = make(**through(faulty))
    faulty.fault = stores(on("PUT", suffix), lambda body: body[:len(body) // 2])
    result = scene.go()
    assert (result.rc, scene.left()) == (exits.FAILED, OLD + YOUNG), trouble(result.err)
    assert f"{suffix}'" in result.err
    faulty.fault = None
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("T20", "REQ-S3-003")
def test_a_store_that_lists_late_is_refused_before_anything_moves(make: Make, faulty: FaultyS3) -> None:
    """Recovery finds what a dead run left by listing; where that is behind, it would end the run and leave rows in neither place."""
    scene = make(**through(faulty))
    faulty.fault = lists_late(60)
    result = scene.go()
    assert (result.rc, scene.left()) == (exits.FAILED, OLD + YOUNG), trouble(result.err)
    assert "was written and is not listed" in result.err
    assert scene.archive.keys() == []
    faulty.fault = None
    assert scene.go().rc == 0
    scene.must_be_whole()


# -- two drivers

@pytest.mark.req("REQ-LOCK-011", "REQ-LOCK-013")
def test_of_two_drivers_one_works_and_the_other_says_who(make: Make) -> None:
    scene = make()
    first = scene.start(ARCHIVE, "archive.pipeline.started")
    second = scene.go()
    assert second.rc == exits.LOCKED
    assert "is locked by another run" in second.err and "audit-archiver control" in second.err
    go_on(first.victim)
    assert first.wait().rc == exits.OK
    scene.must_be_whole()


@pytest.mark.req("REQ-LOCK-011", "T23")
def test_two_drivers_that_start_at_once_move_each_row_once(make: Make) -> None:
    scene = make()
    results = [finish(child) for child in [spawn("aa-archive", ["-c", scene.path, "--force"]) for _ in range(2)]]
    codes = sorted(result.rc for result in results)
    assert codes in ([exits.OK, exits.LOCKED], [exits.OK, exits.OK]), results
    scene.must_be_whole()


@pytest.mark.req("T42", "REQ-TXN-007", "REQ-LOCK-016")
@pytest.mark.parametrize("point", ["holder.commit.before"] + ["holder.delete.before", "holder.delete.done"] * LONG)
def test_a_frozen_driver_that_wakes_up_behind_another_one_deletes_nothing(make: Make, point: str) -> None:
    """GIVEN a driver that froze WHEN the server has ended its transactions, its lock was broken and another run has passed
    THEN it finds its sessions gone when it wakes up."""
    scene = make(database={"transaction_timeout": 10})
    frozen = scene.start(ARCHIVE, point)
    try:
        until(lambda: [each for _, each, _ in scene.sessions() if " batch" in each] == [], "the server ends the frozen transactions", 30)
        assert scene.go().rc == exits.LOCKED, "its control session still holds the lock"
        assert finish(spawn("aa-lock", ["-c", scene.path, "--break"])).rc == 0
        second = scene.go()
        assert second.rc == 0, second
        archived = scene.archive.commits()
        assert scene.left() == YOUNG
        tables_before = scene.db.scalar(f"SELECT md5(string_agg(t::text, '' ORDER BY id)) FROM {TABLE} t")
        go_on(frozen.victim)
        frozen.wait()
        assert scene.archive.commits() == archived
        assert scene.db.scalar(f"SELECT md5(string_agg(t::text, '' ORDER BY id)) FROM {TABLE} t") == tables_before
        scene.must_be_whole()
    finally:
        kill_family(frozen.child.token)


# -- exit codes

@pytest.mark.req("T45", "REQ-EXE-006")
@pytest.mark.parametrize("point", ["upload.data.before", "delete.before"])
def test_a_stage_that_dies_in_every_attempt_is_never_a_success(make: Make, point: str) -> None:
    scene = make()
    crash = scene.start(ARCHIVE, point)
    deaths = crash.kill_whoever_stops()
    assert (crash.child.returncode, deaths) == (exits.FAILED, 3), trouble(crash.said())
    scene.must_be_free()
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("REQ-REL-004")
def test_recovery_records_for_a_recorder_that_dies_every_time(make: Make, faulty: FaultyS3) -> None:
    """Each attempt gets some batches further, and the next one finds them committed."""
    scene = make(**through(faulty))
    crashes: list[Crash] = []

    def no_second_batch_before_the_first_death(request: Request, forward: Forward) -> Answer:
        if on("PUT", "_batch_002.jsonl.gz")(request):  # else every batch may be committed by then, and nobody would die again
            until(lambda: crashes and crashes[0].deaths, "the first recorder is dead")
        return forward(request)

    faulty.fault = no_second_batch_before_the_first_death
    crashes.append(crash := scene.start(ARCHIVE, "record.before"))
    deaths = crash.kill_whoever_stops()
    assert crash.child.returncode == exits.OK and deaths >= 2, trouble(crash.said())
    assert {line["committed"]["by"] for line in scene.archive.commits()} == {"aa-recover"}
    scene.must_be_whole()


@pytest.mark.req("T45", "REQ-EXE-006")
def test_a_run_without_any_row_to_archive_is_no_success_either_when_its_stages_die(make: Make) -> None:
    scene = make()
    assert scene.go().rc == 0
    crash = scene.start(ARCHIVE, "select.begun")
    crash.kill_whoever_stops()
    assert crash.child.returncode == exits.FAILED, trouble(crash.said())
    scene.must_be_whole()
