"""Forked workers: how many at once, which never together, what is heard of them, and that they die with nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from audit_archiver.driver import pipeline, workers
from tests.ground.wait import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


Work = Callable[[Any, workers.Tell, pipeline.Signals], None]


def heard(parts: list[Any], most: int, work: Work, *, apart: Callable[[Any], Any] = lambda part: part) -> list[tuple[Any, str, Any]]:
    told: list[tuple[Any, str, Any]] = []
    workers.run(parts, most, pipeline.Signals(install=False), work=work, tick=lambda: None, apart=apart,
                hear=lambda part, kind, value: told.append((part, kind, value)))
    return told


def side_by_side(told: list[tuple[Any, str, Any]]) -> list[set[Any]]:
    """Who was at work whenever somebody had begun."""
    seen: list[set[Any]] = []
    working: set[Any] = set()
    for part, kind, _ in told:
        working = working | {part} if kind == "begun" else working - {part} if kind == "ended" else working
        seen.append(working)
    return seen


def test_so_many_work_at_the_same_time_and_no_more(tmp_path: Path) -> None:
    def work(part: int, tell: workers.Tell, _signals: pipeline.Signals) -> None:
        tell("begun", None)
        (tmp_path / str(part)).touch()
        until(lambda: len(list(tmp_path.iterdir())) >= 2, "another one works at the same time")

    told = heard(list(range(5)), 2, work)
    assert max(map(len, side_by_side(told))) == 2
    assert sorted((part, value) for part, kind, value in told if kind == "ended") == [(part, 0) for part in range(5)]


def test_parts_of_one_place_wait_for_each_other_and_hold_up_no_other(tmp_path: Path) -> None:
    def work(part: str, tell: workers.Tell, _signals: pipeline.Signals) -> None:
        tell("begun", None)
        (tmp_path / part).touch()
        until(lambda: {"a1", "b1"} <= {each.name for each in tmp_path.iterdir()}, "the next place's part works beside the first")

    told = heard(["a1", "a2", "b1"], 3, work, apart=lambda part: part[0])
    assert not any({"a1", "a2"} <= working for working in side_by_side(told))
    assert sum(kind == "ended" for _, kind, _ in told) == 3


def test_what_is_told_comes_in_order_and_how_each_ended_comes_last() -> None:
    def work(part: str, tell: workers.Tell, _signals: pipeline.Signals) -> None:
        for number in range(100):
            tell("line", (part, number, "x" * 10_000))
        if part == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

    told = heard(["whole", "killed"], 2, work)
    for part, code in (("whole", 0), ("killed", -9)):
        assert [(kind, value[1] if kind == "line" else value) for name, kind, value in told if name == part] == [
            *(("line", number) for number in range(100)), ("ended", code)]


@pytest.mark.req("T45")
def test_both_signals_reach_every_worker_and_no_other_begins() -> None:
    signals = pipeline.Signals(install=False)
    begun: list[Any] = []

    def work(part: int, tell: workers.Tell, mine: pipeline.Signals) -> None:
        tell("begun", os.getsid(0) == os.getpid())
        until(lambda: mine.count == 2, "two signals arrive")

    def hear(part: int, kind: str, value: Any) -> None:
        begun.append((part, kind, value))
        if kind == "begun" and sum(each[1] == "begun" for each in begun) == 2:
            signals.arrived(signal.SIGTERM)
            signals.arrived(signal.SIGTERM)

    workers.run([1, 2, 3], 2, signals, work=work, hear=hear, tick=lambda: None, apart=lambda part: part)
    assert sorted(begun) == [(1, "begun", True), (1, "ended", 0), (2, "begun", True), (2, "ended", 0)]


def test_an_error_of_the_parent_drains_its_workers_first(tmp_path: Path) -> None:
    def work(part: int, tell: workers.Tell, mine: pipeline.Signals) -> None:
        tell("begun", None)
        until(lambda: bool(mine.count), "a signal arrives")
        (tmp_path / "drained").touch()

    def hear(part: int, kind: str, value: Any) -> None:
        raise BrokenPipeError("the reader of the output is gone")

    with pytest.raises(BrokenPipeError):
        workers.run([1], 2, pipeline.Signals(install=False), work=work, hear=hear, tick=lambda: None, apart=lambda part: part)
    assert (tmp_path / "drained").exists()


def test_a_worker_knows_when_it_is_alone_and_is_not_stopped_by_it(tmp_path: Path) -> None:
    """A parent between us and the worker is killed."""
    def work(part: int, tell: workers.Tell, _signals: pipeline.Signals) -> None:
        if part == 1:
            tell("pid", os.getpid())
            until(lambda: tell.alone and not tell("nobody", "hears"), "the parent is gone")
            (tmp_path / "alone").touch()

    def hear(_part: int, kind: str, _value: Any) -> None:
        if kind == "pid":
            os.kill(os.getpid(), signal.SIGKILL)

    middle = os.fork()
    if middle == 0:
        try:
            workers.run([1, 2], 2, pipeline.Signals(install=False), work=work, hear=hear, tick=lambda: None, apart=lambda part: part)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(middle, 0)[1]) == -signal.SIGKILL
    until(lambda: (tmp_path / "alone").exists(), "the worker has gone on to its end")
