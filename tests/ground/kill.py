"""Kill points: wait until a process has stopped itself at a named test point, then kill or continue it.

    child = spawn("aa-archive", [...], env={"AA_TEST_POINT": "upload.data.put:2"})
    victim = stopped_at("upload.data.put:2", child.token)
    os.kill(victim, signal.SIGKILL)

Every descendant inherits AA_TEST_POINT, but only the one that passes the point stops (state T in /proc).
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Callable, Optional

from tests.ground import processes
from tests.ground.wait import until


def family(token: str) -> list[int]:
    """The living processes that `spawn` started under `token`, with all their descendants."""
    return [pid for pid in processes.pids()
            if processes.environment(pid).get("AA_TEST_RUN") == token and processes.alive(pid)]


def find_stopped(point: str, token: str) -> Optional[int]:
    """The process of this family that has stopped at `point`, or None."""
    for pid in processes.pids():
        if processes.state(pid) != "T":  # the cheapest question first: this is asked a hundred times a second
            continue
        environment = processes.environment(pid)
        if (environment.get("AA_TEST_RUN"), environment.get("AA_TEST_POINT")) == (token, point):
            return pid
    return None


def stopped_at(point: str, token: str, seconds: float = 60.0, ended: Optional[Callable[[], object]] = None) -> int:
    """Wait until a process of the family has stopped at `point`; returns its id.

    `ended` (for instance child.poll) tells when the command is over without having come by: an error at once.
    """
    def look() -> Optional[int]:
        found = find_stopped(point, token)
        if found is None and ended is not None and ended() is not None:
            raise AssertionError(f"the command ended and nobody stopped at '{point}'")
        return found

    found = until(look, f"a process stops at '{point}'", seconds)
    assert found is not None
    return found


def kill(pid: int) -> None:
    """SIGKILL, and wait until it has taken effect."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not processes.alive(pid), f"process {pid} is dead")


def go_on(pid: int) -> None:
    """SIGCONT."""
    os.kill(pid, signal.SIGCONT)


def wave_through(point: str, token: str, ended: Callable[[], object], seconds: float = 60.0) -> None:
    """Continue whoever stops at `point`, again and again, until the command has `ended`: a restarted stage stops anew."""
    def over() -> bool:
        found = find_stopped(point, token)
        if found is not None:
            go_on(found)
        return ended() is not None

    until(over, "the command ends", seconds)


def kill_family(token: str) -> None:
    """SIGKILL to everything of this family that is left, for the cleanup of a test that failed."""
    for pid in family(token):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def all_gone(token: str, seconds: float = 30.0) -> None:
    """Wait until no process of the family lives any more."""
    until(lambda: not family(token), "every process of the command has ended", seconds)
