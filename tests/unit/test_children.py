"""A stage as a fork of the driver: it has the standard streams it was given, its own name, and nothing else of ours."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import pytest

from audit_archiver.driver import children
from tests.ground.wait import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stage is started by its launcher")

Starter = Callable[..., children.Fork]


@pytest.fixture()
def fork(monkeypatch: pytest.MonkeyPatch) -> Starter:
    """Start a function of the flags as a stage."""
    def start(main: Callable[[list[str]], int], *flags: str, **env: str) -> children.Fork:
        monkeypatch.setattr(children, "stage_main", lambda stage: main)
        return children.Fork("aa-select", flags, env, subprocess.PIPE, subprocess.PIPE)

    return start


def test_it_gets_flags_input_environment_and_a_name_and_its_exit_code_comes_back(fork: Starter) -> None:
    def main(flags: list[str]) -> int:
        said = {"flags": flags, "in": os.read(0, 100).decode(), "env": dict(os.environ), "session": os.getsid(0) == os.getpid(),
                "name": Path("/proc/self/comm").read_text().strip()}
        os.write(1, json.dumps(said).encode())
        return 5

    child = fork(main, "-q", AA_RUN="a")
    assert child.stdin is not None and child.stdout is not None
    with child.stdin, child.stdout:
        child.stdin.write(b"jobs")
        child.stdin.close()
        said = json.loads(child.stdout.read())
    assert said == {"flags": ["-q"], "in": "jobs", "env": {"AA_RUN": "a"}, "session": True, "name": "aa-select"}
    assert child.wait(10) == 5 and child.poll() == 5 and child.returncode == 5


def test_it_has_no_descriptor_of_ours_so_a_pipe_ends_when_we_close_it(fork: Starter) -> None:
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()

    def main(_flags: list[str]) -> int:
        os.write(1, json.dumps(sorted(int(name) for name in os.listdir("/proc/self/fd"))).encode() + b"\n")
        return len(os.read(0, 1))

    with ours, theirs:
        child = fork(main)
        assert child.stdin is not None and child.stdout is not None
        with child.stdin, child.stdout:
            assert json.loads(child.stdout.readline())[:3] == [0, 1, 2]
            os.close(write_end)
            assert os.read(read_end, 1) == b"", "the child holds no end of it"
            theirs.close()
            assert ours.recv(1) == b""
            child.stdin.close()
            assert child.wait(10) == 0
    os.close(read_end)


def test_what_we_leave_uncollected_is_not_collected_there(fork: Starter) -> None:
    """A connection to PostgreSQL that is collected says goodbye on its socket, which is also ours."""
    us = os.getpid()

    class Connection:
        """Says goodbye when it is collected, and refers to itself, so that this takes a collector."""

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            if os.getpid() != us:
                os.write(1, b"goodbye")

    def main(_flags: list[str]) -> int:
        gc.collect()
        return 0

    gc.disable()
    try:
        Connection()
        child = fork(main)
    finally:
        gc.enable()
    assert child.stdin is not None and child.stdout is not None
    with child.stdin, child.stdout:
        assert child.stdout.read() == b""
    assert child.wait(10) == 0


def test_an_end_by_a_signal_is_told_as_subprocess_tells_it_and_a_signal_does_not_meet_our_handler(fork: Starter) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _frame: heard.append(signum))
    try:
        child = fork(lambda _flags: len(os.read(0, 1)))
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.01)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM and heard == []
    finally:
        signal.signal(signal.SIGTERM, before)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()


def test_an_error_that_nobody_expects_is_shown_and_ends_it_with_2(fork: Starter, capfd: pytest.CaptureFixture[str]) -> None:
    def main(_flags: list[str]) -> int:
        raise RuntimeError("out of order")

    child = fork(main)
    assert child.wait(10) == 2
    assert child.stdin is not None and child.stdout is not None
    child.stdin.close()
    child.stdout.close()
    assert "RuntimeError: out of order" in capfd.readouterr().err


def test_while_another_thread_runs_a_stage_is_started_by_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(children, "start", lambda argv, *_: started.append(argv))
    monkeypatch.setattr(sys, "argv", ["/opt/bin/aa-archive"])
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    children.start_stage("aa-select", ["-q"], {}, None)
    done.set()
    thread.join()
    assert started == [[sys.executable, "/opt/bin/aa-select", "-q"]]


def test_end_kills_whoever_does_not_go(fork: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "END_GRACE_S", 0.2)

    def main(_flags: list[str]) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(1, b"deaf\n")
        return len(os.read(0, 1))

    child = fork(main)
    assert child.stdin is not None and child.stdout is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"deaf\n"
        children.end([child])
    assert child.returncode == -signal.SIGKILL
    until(lambda: not os.path.exists(f"/proc/{child.pid}"), "it is reaped")
