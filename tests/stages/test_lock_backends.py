"""The records of locks in Redis and in files: taken, beaten, taken over, and what is said where they cannot be."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from audit_archiver import exits
from audit_archiver.config.credentials import Secret
from audit_archiver.exits import ConfigError, Failed, LockHeld, NetworkError, PermissionDenied
from audit_archiver.locking import file_locks, lock, redis_locks
from audit_archiver.locking.file_locks import FileLocks
from audit_archiver.locking.record import Backend
from audit_archiver.locking.redis_locks import RedisLocks
from audit_archiver.preflight import checks
from tests.ground.redis_server import RedisServer
from tests.unit import configs

A, B = "system/1/16384", "system/2/16384"
NAME = "bucket/archives/prod"
STALE_S = 0.2


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as made:
        yield made


@pytest.fixture(params=["file", "redis"])
def kept(request: Any, tmp_path: Path) -> Backend:
    """Each backend, with nothing in it."""
    if request.param == "file":
        return FileLocks(tmp_path)
    server = request.getfixturevalue("server")
    server.client().flushall()
    return RedisLocks(Secret(server.url))


def wait_until_stale(kept: Backend) -> None:
    deadline = time.monotonic() + 20
    while kept.look(NAME)[0].heartbeat_age_s <= STALE_S:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.req("REQ-LOCK-011", "REQ-LOCK-012")
def test_a_lock_is_one_owner_s_until_it_is_released(kept: Backend) -> None:
    token, left = kept.take(NAME, "run 1 on host", A, 60)
    assert left is None and kept.beat(NAME, token)
    with pytest.raises(LockHeld, match=r"'bucket/archives/prod' is locked in .*: run 1 on host, since 20.*, token .*, heartbeat \d+ s ago") as caught:
        kept.take(NAME, "run 2 on host", B, 60)
    assert caught.value.code == exits.LOCKED and "aa-lock --show" in str(caught.value.hint)
    found, = kept.look(NAME)
    assert (found.name, found.owner, found.server, found.token) == (NAME, "run 1 on host", A, token)
    assert not kept.release(NAME, token - 1), "somebody else's token"
    assert kept.release(NAME, token) and kept.look(NAME) == [] and not kept.beat(NAME, token)
    assert kept.take(NAME, "run 2 on host", B, 60)[0] > token


@pytest.mark.req("REQ-LOCK-012", "REQ-LOCK-015", "REQ-LOCK-016", "T42")
def test_a_stale_lock_is_taken_over_with_a_greater_token_and_its_owner_has_it_no_more(kept: Backend) -> None:
    token, _ = kept.take(NAME, "run 1 on host", A, STALE_S)
    wait_until_stale(kept)
    assert kept.beat(NAME, token), "nobody has taken it, so a heartbeat makes it fresh again"
    with pytest.raises(LockHeld):
        kept.take(NAME, "run 2 on host", B, STALE_S)
    wait_until_stale(kept)
    new, left = kept.take(NAME, "run 2 on host", B, STALE_S)
    assert new > token and left is not None and left.owner == "run 1 on host" and left.heartbeat_age_s > STALE_S
    assert not kept.beat(NAME, token) and not kept.release(NAME, token) and kept.beat(NAME, new)


@pytest.mark.req("REQ-LOCK-016", "T38")
def test_what_a_dead_run_left_is_taken_over_at_once_on_its_own_server_where_postgresql_has_proven_it(kept: Backend) -> None:
    token, _ = kept.take(NAME, "run 1 on host", A, 3600)
    new, left = kept.take(NAME, "run 2 on host", A, 3600)
    assert new > token and left is not None and left.token == token
    assert not kept.beat(NAME, token)


@pytest.mark.req("REQ-LOCK-012", "T42")
def test_the_token_grows_although_the_backend_has_forgotten_everything(kept: Backend, tmp_path: Path, request: Any) -> None:
    tokens = [kept.take(NAME, "run", A, 60)[0] for _ in range(20)]
    assert tokens == sorted(set(tokens))
    if isinstance(kept, FileLocks):
        for path in tmp_path.glob("*.lock"):
            path.unlink()
    else:
        request.getfixturevalue("server").client().flushall()
    until_next_ms = time.time() + 0.1
    while time.time() < until_next_ms:
        time.sleep(0.01)
    assert not kept.beat(NAME, tokens[-1]), "a lock that is forgotten is nobody's"
    assert kept.take(NAME, "run", A, 60)[0] > tokens[-1]


def test_a_look_at_a_database_shows_its_tables_too_and_no_other_s(kept: Backend) -> None:
    for name in (NAME, f"{NAME}/public.a*", f"{NAME}2", "other"):
        kept.take(name, "run", A, 60)
    assert [each.name for each in kept.look(NAME)] == [NAME, f"{NAME}/public.a*"]
    assert kept.release(f"{NAME}/public.a*", None), "by force: whatever its token"
    assert [each.name for each in kept.look(NAME)] == [NAME]


# -- files

def test_who_stands_still_in_the_middle_of_a_change_keeps_the_others_out_and_says_where(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(file_locks, "MUTEX_WITHIN_S", 0.05)
    kept = FileLocks(tmp_path)
    token, _ = kept.take(NAME, "run", A, 60)
    frozen = os.open(tmp_path / "mutex", os.O_RDWR)
    fcntl.flock(frozen, fcntl.LOCK_EX)
    with pytest.raises(LockHeld, match="mutex' has been held for 0.05 s"):
        kept.beat(NAME, token)
    os.close(frozen)
    assert kept.beat(NAME, token)


def test_a_directory_that_is_not_there_or_a_record_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory") as caught:
        FileLocks(tmp_path / "none").take(NAME, "run", A, 60)
    assert "'locking.lock_dir'" in str(caught.value.hint)
    kept = FileLocks(tmp_path)
    kept.take(NAME, "run", A, 60)
    path = next(tmp_path.glob("*.lock"))
    path.write_text("{")
    with pytest.raises(Failed, match="is no lock record"):
        kept.take(NAME, "run", A, 60)


# -- Redis

@pytest.mark.req("REQ-LOCK-012")
def test_redis_that_is_gone_is_a_network_error_and_one_that_refuses_us_a_denied_permission() -> None:
    with RedisServer("--requirepass", "secret-word") as server:
        with pytest.raises(PermissionDenied) as denied:
            RedisLocks(Secret(server.url)).look(NAME)
        url = server.url.replace("unix://", "unix://:secret-word@")
        kept = RedisLocks(Secret(url))
        token, _ = kept.take(NAME, "run", A, 60)
        server.down(signal.SIGKILL)
        with pytest.raises(NetworkError, match="Redis cannot be reached") as gone:
            kept.beat(NAME, token)
    for caught in (denied, gone):
        assert "secret-word" not in str(caught.value)
    with pytest.raises(ConfigError, match="holds no Redis URL") as wrong:
        RedisLocks(Secret("secret-word"))
    assert "secret-word" not in str(wrong.value)


def test_redis_that_hangs_is_given_up_in_time(server: RedisServer, monkeypatch: Any) -> None:
    monkeypatch.setattr(redis_locks, "TIMEOUT_S", 0.2)
    kept = RedisLocks(Secret(server.url))
    assert server._child is not None
    os.kill(server._child.pid, signal.SIGSTOP)
    try:
        with pytest.raises(NetworkError, match="Timeout"):
            kept.look(NAME)
    finally:
        os.kill(server._child.pid, signal.SIGCONT)


def test_without_its_package_the_backend_is_refused_with_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(ConfigError, match="needs the Python package 'redis'") as caught:
        RedisLocks(Secret("redis://localhost"))
    assert "audit-archiver[redis]" in str(caught.value.hint)


# -- the check before a run

@pytest.mark.req("REQ-LOCK-012")
def test_the_backend_is_tried_before_a_run(tmp_path: Path, monkeypatch: Any) -> None:
    directory = tmp_path / "locks"
    text = configs.SOUND + f"locking: {{backend: file, lock_dir: {directory}}}\n"
    settings = dataclasses.replace(configs.load(tmp_path, text), databases=())
    find: Callable[[], list[tuple[str, str]]] = lambda: [(each.status, each.text) for each in checks.run_checks(settings, [], None)  # noqa: E731
                                                         if each.check == "locking.backend"]
    (status, text), = find()
    assert status == "fail" and "No such file or directory" in text
    directory.mkdir()
    assert find() == [("ok", f"the directory '{directory}' keeps the lock's record")]
    assert FileLocks(directory).look("aa-check") == []
    assert lock.backend(dataclasses.replace(settings, locking=dataclasses.replace(settings.locking, backend="postgres"))) is None
