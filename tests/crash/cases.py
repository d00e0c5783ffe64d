"""Every fault that a campaign makes: what is broken, on which line, when, in which command. Needs no pytest."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple, Optional, Sequence

from audit_archiver.points import POINTS
from tests.crash import lies

DIRECT, POSTGRES, S3 = "direct", "PostgreSQL", "S3"
ARCHIVE, LATE, RESTORE = "aa-archive", "aa-archive, late", "aa-restore"
KILL, LINE, LIE = "kill", "line", "lie"
PROCESS, DRIVER, GROUP, BACKEND, SERVER = "the process", "the driver", "every process", "a PostgreSQL backend", "the PostgreSQL server"
CUT, STALL, TRUNCATE, DELAY = "cut", "stall", "truncate", "delay"
ONCE_A_RUN = ("upload.start.put", "record.index.put")
OURS = ("archive.", "holder.", "recover.", "restore.")  # points that the driver itself comes by
AFTER_KILL = {"recover.decided": "holder.commit.sent", "recover.record.put": "holder.commit.sent",
              "recover.abandon.put": "delete.before", "recover.end.put": "delete.before"}
SWEPT = [point for point in POINTS if not point.startswith("rollback.")]


class Case(NamedTuple):
    """One fault: what is broken (`kind`, `what`, on a `line`), when (`point`), in which command."""

    kind: str
    what: str
    point: str
    command: str = ARCHIVE
    line: str = DIRECT

    @property
    def fault(self) -> str:
        """What is broken, in words."""
        if self.kind == KILL:
            return "PostgreSQL stopped at once" if self.what == SERVER else f"SIGKILL of {self.what}"
        return f"{self.line}: {self.what}"

    @property
    def ends_the_run(self) -> bool:
        """Nobody is left who could go on."""
        return self.kind == KILL and (self.what in (DRIVER, GROUP) or self.what == PROCESS and self.point.startswith(OURS))


class Outcome(NamedTuple):
    """What became of a case: the exit code of the run that was broken (None: killed), and after how many further runs and
    seconds of running one ended with 0. `said` are the events that a lie of the store left in the log."""

    case: Case
    code: Optional[int]
    runs: int
    seconds: float
    said: str = ""


def _command(point: str) -> str:
    return LATE if point.startswith("guarded.") else RESTORE if point.startswith("restore.") else ARCHIVE


def kills(passages: Sequence[int] = (1, 2, 3)) -> list[Case]:
    """Every point x everybody who can be killed; where it comes by more than once, at each of these passages."""
    made = []
    for passage in passages:
        for point in SWEPT:
            if passage > 1 and point in ONCE_A_RUN + ("restore.watermark.put",):
                continue
            if passage > 1 and point.startswith(("archive.", "recover.")):
                continue
            who = [DRIVER, GROUP, BACKEND, SERVER] if not point.startswith(OURS) else [PROCESS, BACKEND, SERVER, GROUP]
            made += [Case(KILL, each, f"{point}:{passage}", _command(point))
                     for each in ([PROCESS] if not point.startswith(OURS) else []) + who]
    return made


def network() -> list[Case]:
    """Every point x each way to break each of the two lines."""
    return [Case(LINE, what, f"{point}:{1 + number % 2 * (point not in ONCE_A_RUN and not point.startswith(('archive.', 'recover.', 'restore.')))}",
                 _command(point), line)
            for number, (point, what, line) in enumerate(itertools.product(SWEPT, (CUT, STALL, TRUNCATE, DELAY), (POSTGRES, S3)))]


def lying() -> list[Case]:
    """Every lie of the store; the point is the object that it is about."""
    return [Case(LIE, lie.what, lie.object, ARCHIVE, S3) for lie in lies.lies()]


def everything(seed: int) -> list[Case]:
    """All cases, mixed."""
    return in_turn(kills() + network() + lying(), seed)


def in_turn(cases: Sequence[Case], seed: int) -> list[Case]:
    """Shuffled so that after a fault that ended a run comes one that a run can live through, as far as there are such."""
    dice = random.Random(seed)
    hard, soft = ([case for case in cases if case.ends_the_run is ends] for ends in (True, False))
    dice.shuffle(hard)
    dice.shuffle(soft)
    made = []
    step = max(1, len(soft) // max(1, len(hard)))
    while hard or soft:
        made += hard[:1] + soft[:step]
        del hard[:1], soft[:step]
    return made
