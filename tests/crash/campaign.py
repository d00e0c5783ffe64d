"""One fault after another under a running application: each run heals what the last fault left, and is then broken itself.

    with Ground(place) as ground:
        campaign = Campaign(ground, note=print)
        for case in everything(seed=1):
            campaign.meet(case)                # raises Wrong where a row is not where it has to be
        campaign.end()

After each fault every row that the application's ledger knows must be in the table or in the archive, once, as it was last
written; or, while the batch of a dead run is undecided, in that batch's objects. aa-balance is asked, too. Needs no pytest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import secrets
import signal
import time
from collections import Counter
from typing import Callable, Optional

from tests.crash import lies
from tests.crash.cases import (
    AFTER_KILL,
    BACKEND,
    CUT,
    DRIVER,
    GROUP,
    KILL,
    LATE,
    LIE,
    LINE,
    PROCESS,
    RESTORE,
    STALL,
    TRUNCATE,
    Case,
    Outcome,
)
from tests.crash.epoch import BATCH_ROWS, TABLE, Epoch, Ground, Run, Wrong
from tests.ground.kill import family, go_on, kill, kill_family
from tests.ground.run import run_stage
from tests.ground.wait import until

EPOCH_FAULTS = 8  # then a new database and a new bucket, so that judging stays cheap
STALL_S, DELAY_S = 2.5, 0.03  # a stall is longer than the time that is waited for an answer of S3


class Campaign:
    """Case after case on one ground. `note` gets the outcome of each."""

    def __init__(self, ground: Ground, note: Callable[[Outcome], None], seed: int = 0) -> None:
        self.ground, self._note = ground, note
        self._numbers = itertools.count(1)
        self._epoch: Optional[Epoch] = None
        self._dice = random.Random(seed)
        self._pending: list[tuple[Case, Optional[int], int, float]] = []
        self.totals: Counter[str] = Counter()
        self.last_log = self._said = ""

    @property
    def epoch(self) -> Epoch:
        """The present one; a new one after so many faults."""
        if self._epoch is not None and self._epoch.faults >= EPOCH_FAULTS:
            self.end()
        if self._epoch is None:
            self._epoch = Epoch(self.ground, next(self._numbers))
            self._epoch.application.start()
        return self._epoch

    def meet(self, case: Case) -> None:
        """Break one run, and judge. Raises Wrong."""
        epoch = self.epoch
        if case.kind == LIE and not self.ground.can_lie:
            self.end()
            epoch = self.epoch
        epoch.faults += 1
        if case.kind == LIE:
            self._lie(epoch, case)
            return
        if case.command == RESTORE:
            if not epoch.seen:
                self._undisturbed()
            self._restore(epoch, case)
            return
        if case.point.partition(":")[0] in AFTER_KILL:
            epoch.top_up()
            self._archive(epoch, Case(KILL, DRIVER, AFTER_KILL[case.point.partition(":")[0]] + ":1"))
            epoch.judge(settled=False)
        epoch.top_up()
        epoch.judge(settled=self._archive(epoch, case) == 0)

    def end(self) -> None:
        """A last run that nothing disturbs, everything read back once more, and the digest of all rows."""
        epoch = self._epoch
        if epoch is None:
            return
        self._undisturbed()
        validated = run_stage("aa-validate", ["-c", epoch.config(), "--output", "json"])
        findings = [each for each in validated.lines[0]["findings"] if each["status"] != "warn"]
        if findings:
            raise Wrong(f"aa-validate: {findings[:5]}")
        ledger = epoch.application.ledger
        self.totals.update(acknowledged=ledger.acknowledged, open=ledger.open, deadlocks=epoch.application.deadlocks,
                           rows=sum(len(rows) for rows in epoch.seen.values()))
        epoch.close()
        self._epoch = None

    def take_totals(self) -> dict[str, int]:
        """What the epochs that have ended since the last call came to: writes acknowledged and open, deadlocks, rows archived."""
        taken, self.totals = self.totals, Counter()
        return dict(taken)

    def forget(self) -> None:
        """Something is wrong: leave the database and the bucket as they are, and go on with new ones."""
        if self._epoch is not None:
            self._epoch.application.stop()
        self._epoch = None
        self._pending.clear()
        self.ground.heal()

    # -- inside

    def _undisturbed(self) -> None:
        """A run that must end with 0."""
        assert self._epoch is not None
        self._epoch.top_up()
        run = Run(self._epoch, ["aa-archive", "--force", "-c", self._epoch.config()])
        code = run.wait()
        seconds = time.monotonic() - run.began
        self.last_log = run.end()
        self._ended(code, seconds)
        self._epoch.judge(settled=True)

    def _archive(self, epoch: Epoch, case: Case) -> Optional[int]:
        """Break a run; its exit code, None if it was killed."""
        mode = "late" if case.command == LATE else "held"
        epoch.application.spares_due = mode == "late"
        run = Run(epoch, ["aa-archive", "--force", "-c", epoch.config(case.line, mode)], case.point)
        try:
            victim = run.stopped()
            reached = victim is not None
            healed_at = self._break(epoch, run, victim, case) if reached else run.began
            code = None if case.ends_the_run and reached else run.wait()
            ended = time.monotonic()
        finally:
            self.last_log = run.end()
            self.ground.heal()
        if not reached:
            self._ended(code, ended - run.began)
        elif code == 0:
            self._ended(0, ended - run.began)
            self._note(Outcome(case, 0, 0, ended - healed_at))
        elif code is None:
            self._pending.append((case, None, 0, 0.0))
        else:
            self._lived_through(case, code)
            self._pending.append((case, code, 0, 0.0))
        return code

    def _lie(self, epoch: Epoch, case: Case) -> None:
        """A whole run with a store that lies, and an honest one."""
        epoch.top_up()
        self.ground.liar.fault = lies.fault(lies.Lie(case.what, case.point))
        run = Run(epoch, ["aa-archive", "--force", "-c", epoch.config(store=self.ground.liar.endpoint)])
        try:
            code = run.wait()
        finally:
            self.last_log = run.end()
            self.ground.heal()
        said = sorted({record["event"] for record in map(json.loads, filter(None, self.last_log.split("\n")))
                       if record["level"] in ("WARNING", "ERROR") and "s3://" in json.dumps(record)})
        epoch.judge(settled=code == 0)
        self._pending.append((case, code, 0, 0.0))
        self._said = ", ".join(said)
        self._undisturbed()
        if code != lies.CODES.get((case.what, case.point), 0):
            raise Wrong(f"{case} ended with {code}")

    def _ended(self, code: Optional[int], seconds: float) -> None:
        """An undisturbed run, or one that lived through its fault, has ended: what was pending is healed."""
        if code != 0:
            raise Wrong(f"a run that nothing disturbed ended with {code}")
        for case, first, runs, spent in self._pending:
            self._note(Outcome(case, first, runs + 1, spent + seconds, self._said if case.kind == LIE else ""))
        self._pending.clear()

    def _lived_through(self, case: Case, code: int) -> None:
        """A run that its fault has ended: the network's code, or that of a stage that died."""
        if code not in (2, 7, 1):
            raise Wrong(f"{case} ended with {code}")

    def _break(self, epoch: Epoch, run: Run, victim: int, case: Case) -> float:
        """Do it; when its cause was gone."""
        if case.kind == LINE:
            return self._break_line(victim, case)
        if case.what == PROCESS:
            kill(victim)
        elif case.what == DRIVER:
            kill(run.child.pid)
            until(lambda: not [pid for pid in family(run.child.token) if pid != victim], "the others end without their driver", 60)
            kill_family(run.child.token)
        elif case.what == GROUP:
            kill_family(run.child.token)
        elif case.what == BACKEND:
            sessions = epoch.sessions()
            batch = [pid for pid, name in sessions if " batch" in name] or [pid for pid, _ in sessions]
            if batch:
                kill(batch[0])
            go_on(victim)
            until(self.ground.cluster._answers, "PostgreSQL has recovered", 60)
        else:
            self.ground.cluster.down(signal.SIGQUIT)
            go_on(victim)
            self.ground.cluster.up()
        return time.monotonic()

    def _break_line(self, victim: int, case: Case) -> float:
        line = self.ground.line(case.line)
        if case.what == CUT:
            line.cut()
            go_on(victim)
        elif case.what == TRUNCATE:
            if self._dice.random() < 0.5:
                line.cut_after = self._dice.randint(1, 300)
            else:
                line.cut_after_up = self._dice.randint(1, 300)
            go_on(victim)
            began = time.monotonic()
            with contextlib.suppress(AssertionError):
                until(lambda: 0 in (line.cut_after, line.cut_after_up) or time.monotonic() - began > 1, "it is cut", 2)
            line.cut_after = line.cut_after_up = None
        elif case.what == STALL:
            line.stall = True
            go_on(victim)
            time.sleep(STALL_S)
            line.stall = False
        else:
            line.latency_s = DELAY_S
            go_on(victim)
        return time.monotonic()

    def _restore(self, epoch: Epoch, case: Case) -> None:
        """A restore into a new table that is broken, and run again."""
        into = f"public.again_{secrets.token_hex(4)}"
        argv = ["aa-restore", "--restore-all", "--table", TABLE, "--into", into, "--create-table", "--batch-size", 2 * BATCH_ROWS]
        run = Run(epoch, [*argv, "-c", epoch.config(case.line)], case.point)
        code: Optional[int] = None
        try:
            victim = run.stopped()
            healed_at = self._break(epoch, run, victim, case) if victim is not None else run.began
            if not case.ends_the_run or victim is None:
                code = run.wait()
        finally:
            self.last_log = run.end()
            self.ground.heal()
        runs = 0
        if code != 0:
            until(lambda: not epoch.sessions(), "the sessions of the dead restore end", 30)
            healed_at, runs = time.monotonic(), 1
            again = Run(epoch, [*argv, "-c", epoch.config()])
            second = again.wait()
            self.last_log = again.end()
            if second != 0:
                raise Wrong(f"aa-restore ended with {second} after {case}")
        seconds = time.monotonic() - healed_at
        archived = epoch.archived()[0]
        wanted = {row for rows in archived.values() for row in rows}
        found = {row for row, in epoch.query(f"SELECT id FROM {into}")}
        [[altered]] = epoch.query(f"SELECT count(*) FROM {into} WHERE detail->>'hash' <> md5(id || ':' || version)")
        if found != wanted or altered:
            raise Wrong(f"{case}: {len(wanted - found)} rows not restored, {len(found - wanted)} too many, {altered} altered")
        epoch.query(f"DROP TABLE {into}")
        if victim is not None:
            self._note(Outcome(case, code, runs, seconds))
