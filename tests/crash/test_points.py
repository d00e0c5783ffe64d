"""SIGKILL at every named point, of the stage and of the driver: the next run leaves nothing lost, doubled or altered.

The short form kills at each point once; AA_CRASH=long adds the later passages, every stage under aa-txn and in late
mode, and processes that wake up after the run that cleaned up behind them. AA_CRASH_TABLE=FILE gets the outcomes, a JSON line each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

from audit_archiver.points import POINTS
from tests.crash.scene import ARCHIVE, QUICK, RECOVER, TXN, Crash, Scene, trouble
from tests.ground.kill import go_on, kill, kill_family
from tests.ground.wait import until

SWEPT = [point for point in POINTS if not point.startswith(("restore.", "rollback."))]  # those: test_restore_killed.py, test_aa_rollback.py
LONG, TABLE = os.environ.get("AA_CRASH") == "long", os.environ.get("AA_CRASH_TABLE")
HELD, LATE = "held", "late"
STAGE, DRIVER, SLEEPER = "stage", "driver", "sleeper"
PER_RUN = ("upload.start.put", "record.index.put")
BEFORE_RECOVERY = {  # what a run has to be killed at, so that the next one comes by
    "recover.decided": "holder.commit.sent", "recover.record.put": "holder.commit.sent",
    "recover.abandon.put": "delete.before", "recover.end.put": "delete.before"}


class Case(NamedTuple):
    """Kill `victim` (the process that stopped, its driver, or the driver while the other sleeps on) at a point."""

    point: str
    victim: str
    command: str = "aa-archive"
    mode: str = HELD

    def __str__(self) -> str:
        return "-".join((self.point, self.victim, self.command, self.mode))


def family_of(point: str) -> str:
    """What the name of a point starts with: the stage, or who else comes by."""
    return point.partition(".")[0]


def short() -> list[Case]:
    """Every point once for the process that comes by, and once for the driver where that is another."""
    made = []
    for point in SWEPT:
        if family_of(point) in ("holder", "archive"):
            made.append(Case(point, DRIVER))
        elif family_of(point) == "guarded":
            made += [Case(point, victim, mode=LATE) for victim in (STAGE, DRIVER)]
        elif family_of(point) == "recover":
            made += [Case(point, DRIVER, command) for command in ("aa-recover", "aa-archive")]
        else:
            made += [Case(point, victim) for victim in (STAGE, DRIVER)]
    made += [Case("upload.manifest.put", STAGE, "aa-txn"), Case("delete.done", DRIVER, "aa-txn"),
             Case("holder.commit.sent", DRIVER, "aa-txn"), Case("record.before", STAGE, "aa-txn")]
    return made


def more() -> list[Case]:
    """What the long form adds."""
    made = []
    for point in SWEPT:
        kind = family_of(point)
        if kind in ("archive", "recover"):
            continue
        often = [] if point in PER_RUN else [f"{point}:2", f"{point}:3"]
        if kind == "guarded":
            made += [Case(each, victim, mode=LATE) for each in often for victim in (STAGE, DRIVER)]
        elif kind == "holder":
            made += [Case(each, DRIVER, command) for each in often for command in ("aa-archive", "aa-txn")]
            made.append(Case(point, DRIVER, "aa-txn"))
        else:
            made += [Case(each, victim) for each in often for victim in (STAGE, DRIVER)]
            made.append(Case(point, SLEEPER))
            made += [Case(point, victim, "aa-txn") for victim in (STAGE, DRIVER)]
            if kind not in ("delete", "holder"):
                made += [Case(point, victim, mode=LATE) for victim in (STAGE, DRIVER)]
    return [case for case in made if case not in short()]


CASES = short() + (more() if LONG else [])
SCRIPT = {"aa-archive": ARCHIVE, "aa-recover": RECOVER, "aa-txn": TXN}


@pytest.fixture()
def make(db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> Callable[..., Scene]:
    """A function that builds the scene in a locking mode."""
    return lambda mode=HELD: Scene(db, bucket, config_file(db, bucket, locking={"mode": mode}, **QUICK), tmp_path)


def test_every_point_is_swept() -> None:
    assert {case.point for case in short()} == set(SWEPT)
    assert len(set(POINTS)) == len(POINTS)


@pytest.mark.req("T37", "T38", "T39", "REQ-REL-001", "REQ-REL-002", "REQ-REL-003", "REQ-TXN-005", "REQ-ERR-011")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kill_loses_doubles_and_alters_nothing(case: Case, make: Callable[..., Scene]) -> None:
    scene = make(case.mode)
    if family_of(case.point) == "recover":
        before = scene.start(ARCHIVE, BEFORE_RECOVERY[case.point])
        before.kill_driver()
        if before.victim != before.child.pid:
            kill(before.victim)
        scene.must_be_free()
    crash = scene.start(SCRIPT[case.command], case.point)
    try:
        left = scene.left()
        KILLS[case.victim](scene, crash, case)
        scene.must_be_free()
        wild = _next_run(scene, crash, case)
        scene.must_be_whole(wild=wild, late=case.victim == SLEEPER)
    except BaseException:
        print(trouble(crash.said()))
        raise
    finally:
        kill_family(crash.child.token)
    _write_down(case, scene.outcome(left))


def _write_down(case: Case, outcome: str) -> None:
    if TABLE:
        with open(TABLE, "a", encoding="utf-8") as table:
            table.write(json.dumps({**case._asdict(), "outcome": outcome}) + "\n")


def _kill_stage(scene: Scene, crash: Crash, case: Case) -> None:
    """The process that stopped dies. aa-archive starts its pipeline again and gets through; aa-txn says that it failed."""
    kill(crash.victim)
    result = crash.wait()
    if case.command == "aa-archive":
        assert result.rc == 0, trouble(result.err)
        assert scene.left() == scene.young


def _kill_driver(scene: Scene, crash: Crash, case: Case) -> None:
    """The driver dies; the process that stopped stays where it is until everybody else has ended by himself."""
    crash.kill_driver()
    if crash.victim in crash.living():
        kill(crash.victim)
    crash.must_be_gone()


def _leave_asleep(scene: Scene, crash: Crash, case: Case) -> None:
    """The driver dies, and the process that stopped sleeps on."""
    crash.kill_driver()


KILLS = {STAGE: _kill_stage, DRIVER: _kill_driver, SLEEPER: _leave_asleep}


def _next_run(scene: Scene, crash: Crash, case: Case) -> list[str]:
    """The run after the crash. A sleeper wakes up behind it; the stems of what it still wrote then."""
    result = scene.go()
    assert result.rc == 0, trouble(result.err)
    if case.victim != SLEEPER:
        return []
    settled = scene.batches()
    go_on(crash.victim)
    until(lambda: not crash.living(), "the sleeper wakes up, finds its holder gone, and ends", 30)
    return [stem for stem, has in scene.batches().items() if stem not in settled]
