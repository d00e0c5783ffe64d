"""Locks under runs of aa-archive: frozen owners, backends that die, and those whom a run makes wait."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

from audit_archiver import exits
from audit_archiver.locking import lock as locks
from tests.ground import kill
from tests.ground.driven import Driven, logs
from tests.ground.redis_server import RedisServer
from tests.ground.run import Result, finish, run_forked
from tests.ground.wait import PATIENCE, until

TABLE = "public.audit_logs"
SHORT = {"lock_timeout_minutes": 0.05 * PATIENCE, "heartbeat_s": 0.5}  # stale after 6 s
STALE_S = 2 * 60 * SHORT["lock_timeout_minutes"]
QUICK = {"s3": {"retry_base_s": 0.01, "retry_max_s": 0.05}}
STOOD_STILL = "stood still for"


@pytest.fixture()
def redis() -> Iterator[RedisServer]:
    with RedisServer() as made:
        yield made


@pytest.fixture(autouse=True)
def nobody_stays_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test that failed left standing still is killed."""
    tokens: list[str] = []
    spawned = Driven.spawn

    def spawn(runs: Driven, *argv: Any, **more: Any) -> Any:
        child = spawned(runs, *argv, **more)
        tokens.append(child.token)
        return child

    monkeypatch.setattr(Driven, "spawn", spawn)
    yield
    for token in tokens:
        kill.kill_family(token)


@pytest.fixture()
def runs(db: Any, bucket: Any, config_file: Any, tmp_path: Path, request: Any) -> Callable[..., Driven]:
    """A function that gives the runs with a locking backend and more of the section `locking`."""
    def make(backend: str = "postgres", locking: Optional[dict[str, Any]] = None, **more: Any) -> Driven:
        own: dict[str, Any] = {"backend": backend, **(locking or {})}
        env: dict[str, str] = {}
        if backend == "redis":
            own["redis_url_env"] = "REDIS_URL"
            env["REDIS_URL"] = request.getfixturevalue("redis").url
        if backend == "file":
            own["lock_dir"] = str(tmp_path / "locks")
            (tmp_path / "locks").mkdir()
        return Driven(db, bucket, config_file(db, bucket, locking=own, **{**QUICK, **more}), env)
    return make


def records(runs: Driven) -> list[Any]:
    """The records in the backend."""
    kept = locks.backend(runs.settings)
    return [] if kept is None else kept.look(locks.name(runs.settings, runs.settings.databases[0]))


def shown(runs: Driven) -> dict[str, Any]:
    """What aa-lock --show says of the only database."""
    result = run_forked("aa-lock", ["-c", runs.path, "--show"], env=runs.env)
    assert result.rc == 0, result.err
    return dict(result.lines[0]["databases"][0])


def overtaken(runs: Driven, stopped: Callable[[], Any]) -> Result:
    """Runs, while another one stands still, until one gets the lock; the earlier ones exit 4. The last one's result."""
    stood_at = time.time()
    stopped()
    while (result := runs.run()).rc == exits.LOCKED:
        assert "is locked by another run" in result.err, result.err
        assert time.time() - stood_at < STALE_S + 60 * PATIENCE
    assert result.rc == 0, result.err
    broken = next(each["ts"] for each in result.log if each["event"] == "lock.stale")
    at = datetime.datetime.fromisoformat(broken.replace("Z", "+00:00")).timestamp()
    assert at - stood_at > STALE_S - 2 * PATIENCE, "it was taken over before it was stale; its last heartbeat was shortly before its stop"
    return result


@pytest.mark.req("T42", "REQ-LOCK-012", "REQ-LOCK-015", "REQ-LOCK-016", "REQ-REL-005")
@pytest.mark.parametrize(("backend", "mode", "point"), [
    ("postgres", "held", "holder.delete.before"), ("redis", "held", "holder.delete.done"), ("file", "late", "guarded.compared")])
def test_a_run_that_is_frozen_and_overtaken_deletes_nothing_when_it_wakes(db: Any, runs: Callable[..., Driven], backend: str, mode: str,
                                                                          point: str) -> None:
    """T42: SIGSTOP past 2x the timeout, a second run does the work, SIGCONT."""
    before = logs(db)
    made = runs(backend, {**SHORT, "mode": mode})
    # GIVEN a run that stands still with a batch before or after its DELETE
    first = made.spawn(env={"AA_TEST_POINT": point})
    frozen = kill.stopped_at(point, first.token, ended=first.poll)
    tokens = [each.token for each in records(made)]
    # WHEN its lock has become stale THEN a second run ends its sessions, and archives everything
    overtaken(made, lambda: None)
    assert made.archive.commits() and db.scalar("SELECT count(*) FROM audit_logs") == 50
    archived = made.archive.keys()
    # AND the first one deletes nothing any more: exit 4, with the reason
    kill.go_on(frozen)
    result = finish(first)
    assert result.rc == exits.LOCKED, result.err
    assert STOOD_STILL in result.err
    assert made.archive.keys() == archived
    made.whole(TABLE, before)
    assert records(made) == [] and (backend == "postgres" or tokens)


@pytest.mark.req("T42", "REQ-LOCK-016")
def test_a_run_whose_every_process_is_frozen_deletes_nothing_although_its_stage_wakes_first(db: Any, runs: Callable[..., Driven]) -> None:
    """The holder's client stands still with its request, then all the others do; it is the first to wake up."""
    before = logs(db)
    made = runs("postgres", SHORT)
    first = made.spawn(env={"AA_TEST_POINT": "delete.before"})
    client = kill.stopped_at("delete.before", first.token, ended=first.poll)
    others = [pid for pid in kill.family(first.token) if pid != client]
    overtaken(made, lambda: [os.kill(pid, signal.SIGSTOP) for pid in others])
    for pid in (client, *others):
        kill.go_on(pid)
    result = finish(first)
    assert (result.rc, STOOD_STILL in result.err) == (exits.LOCKED, True), result.err
    made.whole(TABLE, before)


@pytest.mark.req("REQ-LOCK-015", "REQ-LOCK-016", "T42")
def test_a_client_of_the_holder_that_stands_still_makes_no_lock_stale_and_the_lock_can_be_broken(db: Any, runs: Callable[..., Driven]) -> None:
    before = logs(db)
    made = runs("redis", SHORT)
    first = made.spawn(env={"AA_TEST_POINT": "delete.before"})
    stood_at = time.monotonic()
    kill.stopped_at("delete.before", first.token, ended=first.poll)
    # WHILE its driver beats, nobody takes over, however long it takes
    until(lambda: time.monotonic() - stood_at > STALE_S + 1, "the lock would be stale")
    assert made.run().rc == exits.LOCKED
    (holder, record), = [(holder, record) for found in [shown(made)] for holder in found["holders"] for record in found["records"]
                         if holder["kind"] == "run"]
    assert holder["heartbeat_age_s"] < STALE_S and record["heartbeat_age_s"] < STALE_S and not record["stale"]
    assert holder["token"] and record["token"] and "process" in record["owner"]
    assert record["since"] <= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # WHEN it is broken THEN what was open is rolled back, and the run, which lives, begins again under a new lock
    broken = run_forked("aa-lock", ["-c", made.path, "--break"], env=made.env)
    assert broken.rc == 0 and {each["ended"] for kind in ("holders", "records") for each in broken.lines[0]["databases"][0][kind]} == {True}
    assert db.scalar("SELECT count(*) FROM audit_logs") == 400
    new = until(lambda: [each for each in records(made) if each.token != record["token"]], "the lock is taken anew")
    assert new[0].token > record["token"]
    kill.wave_through("delete.before", first.token, first.poll)
    result = finish(first)
    assert result.rc == 0, result.err
    assert shown(made)["records"] == shown(made)["holders"] == []
    made.whole(TABLE, before)


@pytest.mark.req("REQ-LOCK-012", "T38")
@pytest.mark.parametrize(("scope", "redis_"), [("database", "dies"), ("table", "forgets")])
def test_redis_that_dies_or_forgets_in_mid_run_ends_it_before_the_next_delete(db: Any, runs: Callable[..., Driven], redis: RedisServer, scope: str,
                                                                              redis_: str) -> None:
    before = logs(db)
    made = runs("redis", {"scope": scope})
    # GIVEN a run with a batch that is done, and the next one about to be deleted
    first = made.spawn(env={"AA_TEST_POINT": "delete.before:2"})
    client = kill.stopped_at("delete.before:2", first.token, ended=first.poll)
    until(lambda: db.scalar("SELECT count(*) FROM audit_logs") == 300, "the first batch is committed")
    assert [each.name.endswith(TABLE) for each in records(made)] == [scope == "table"]
    # WHEN Redis is gone, or has lost what it knew THEN nothing more is deleted
    redis.down(signal.SIGKILL)
    if redis_ == "forgets":
        redis.up()
    kill.go_on(client)
    result = finish(first)
    code, says = (exits.NETWORK, "Redis cannot be reached") if redis_ == "dies" else (exits.LOCKED, "is not ours any more")
    assert result.rc == code and says in result.err, result.err
    assert db.scalar("SELECT count(*) FROM audit_logs") == 300, "a batch was deleted whose token nobody could check"
    # AND without Redis no run begins; with an empty one all goes on
    if redis_ == "dies":
        assert made.run().rc == exits.NETWORK
        redis.up()
    assert made.run().rc == 0
    made.whole(TABLE, before)


@pytest.mark.req("REQ-LOCK-012", "REQ-LOCK-014", "REQ-LOCK-016", "T38")
@pytest.mark.parametrize("backend", ["redis", "file"])
def test_what_a_killed_run_left_in_the_backend_keeps_no_next_run_out(db: Any, runs: Callable[..., Driven], backend: str) -> None:
    before = logs(db)
    made = runs(backend)
    first = made.spawn(env={"AA_TEST_POINT": "verify.done"})
    kill.stopped_at("verify.done", first.token, ended=first.poll)
    kill.kill_family(first.token)
    first.wait()
    first.communicate()
    (left,) = records(made)
    until(lambda: not shown(made)["holders"], "the server has noticed")
    result = made.run()
    assert result.rc == 0 and '"lock.stale"' in result.err and f"token {left.token}" in result.err, result.err
    assert records(made) == []
    made.whole(TABLE, before)


@pytest.mark.req("REQ-LOCK-011", "REQ-LOCK-012")
def test_a_record_of_another_server_keeps_a_run_out_until_it_is_broken(db: Any, runs: Callable[..., Driven]) -> None:
    """The old primary, say: PostgreSQL's own locks do not meet there."""
    logs(db, old=20, young=0)
    made = runs("file")
    kept, name = locks.backend(made.settings), locks.name(made.settings, made.settings.databases[0])
    assert kept is not None
    kept.take(name, "run 1 on the old primary", "another/1/2", 60)
    refused = made.run()
    assert refused.rc == exits.LOCKED and "run 1 on the old primary" in refused.err
    assert shown(made)["holders"] == [] and shown(made)["records"][0]["owner"] == "run 1 on the old primary"
    text = run_forked("aa-lock", ["-c", made.path, "--show", "--output", "text"], env=made.env).out.decode()
    assert f"{db.name}: record '{name}' in file: run 1 on the old primary, since " in text
    inside = run_forked("aa-lock", ["-c", made.path, "--", "true"], env=made.env)
    assert inside.rc == exits.LOCKED
    assert run_forked("aa-lock", ["-c", made.path, "--break"], env=made.env).rc == 0
    assert made.run().rc == 0 and records(made) == []


# -- those whom a run makes wait

@pytest.mark.req("T35", "REQ-LOCK-010", "REQ-LOCK-007")
def test_an_alter_table_waits_no_longer_than_configured_and_the_run_goes_on_after_it(db: Any, runs: Callable[..., Driven],
                                                                                     record_property: Any) -> None:
    logs(db)
    made = runs("postgres", {"others_wait_s": 1})
    # GIVEN a batch that holds its locks for as long as it likes
    first = made.spawn(env={"AA_TEST_POINT": "verify.done:2"})
    kill.stopped_at("verify.done:2", first.token, ended=first.poll)
    # WHEN somebody alters the table THEN the batch gives way in time
    began = time.monotonic()
    migration = db.connect(application_name="migration")
    with migration.cursor() as cursor:
        cursor.execute("ALTER TABLE audit_logs ADD COLUMN verdict text")
    waited = time.monotonic() - began
    migration.close()
    record_property("alter_table_waited_s", round(waited, 2))
    print(f"ALTER TABLE waited {waited:.2f} s behind a batch, with others_wait_s 1")
    assert 0.5 < waited < (1 + 3) * PATIENCE
    # AND the run does the rest with the new column
    kill.wave_through("verify.done:2", first.token, first.poll)
    result = finish(first)
    assert result.rc == 0 and "migration (backend" in result.err, [each for each in result.log if each["level"] != "INFO"]
    assert db.scalar("SELECT count(*) FROM audit_logs") == 50
    assert sum(made.sizes()) == 350


@pytest.mark.req("REQ-LOCK-006", "REQ-LOCK-007", "REQ-LOCK-008", "REQ-LOCK-010")
@pytest.mark.parametrize("how", ["warn", "pause", "abort"])
def test_who_waits_for_rows_is_seen_and_the_run_does_what_is_configured(db: Any, runs: Callable[..., Driven], how: str) -> None:
    before = logs(db)
    made = runs("postgres", {"when_others_wait": how, "others_wait_s": 0.5, "held_warning_s": 1}, in_flight_batches=1)
    first = made.spawn(env={"AA_TEST_POINT": "verify.done"}, stderr=(made.path.parent / "err").open("wb"))
    said = made.path.parent / "err"
    client = kill.stopped_at("verify.done", first.token, ended=first.poll)
    waiting = db.connect(application_name="billing")
    thread = threading.Thread(target=lambda: waiting.cursor().execute("SELECT 1 FROM audit_logs WHERE id = 1 FOR UPDATE"), daemon=True)
    thread.start()
    event = {"warn": '"lock.contention"', "pause": '"run.paused"', "abort": "the run gives way: billing (backend"}[how]
    until(lambda: event in said.read_text(), f"{event} is said")
    assert thread.is_alive() or how == "abort"
    if how != "abort":
        until(lambda: '"transaction.old"' in said.read_text(), "rows that are locked for long are worth a warning")
        kill.go_on(client)
    result = finish(first)
    thread.join(30)
    assert not thread.is_alive(), "it has its row"
    waiting.close()
    log = said.read_text()
    if how == "abort":
        assert result.rc == exits.FAILED and made.archive.commits() == []
        assert '"pipeline.retry"' not in log, "it was to end"
        assert made.run().rc == 0
    else:
        assert result.rc == 0 and "billing (backend" in log
        assert ('"run.resumed"' in log) == (how == "pause")
    made.whole(TABLE, before)


@pytest.mark.req("REQ-LOCK-009")
def test_a_lock_of_ours_on_a_whole_table_is_worth_a_warning(db: Any, runs: Callable[..., Driven]) -> None:
    """PostgreSQL escalates no locks; a trigger may take such a one in our name."""
    logs(db, old=20, young=0)
    db.execute("CREATE TABLE seen (id bigint)")
    db.execute("CREATE FUNCTION shut() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN LOCK TABLE public.seen IN SHARE MODE; RETURN OLD; END $$")
    db.execute("CREATE TRIGGER shut BEFORE DELETE ON audit_logs FOR EACH ROW EXECUTE FUNCTION shut()")
    made = runs()
    first = made.spawn(env={"AA_TEST_POINT": "delete.done"}, stderr=(made.path.parent / "err").open("wb"))
    client = kill.stopped_at("delete.done", first.token, ended=first.poll)
    until(lambda: '"lock.escalated"' in (made.path.parent / "err").read_text(), "it is said")
    kill.go_on(client)
    assert finish(first).rc == 0
    assert "ShareLock on the whole table public.seen" in (made.path.parent / "err").read_text()
