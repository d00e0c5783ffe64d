"""A small model of the protocol: two drivers, a server that crashes and forgets, a store that lies, an application, a person.

Hypothesis plays it in random orders. After every move the invariants of the design hold: 1 never nowhere, 2 never in two places, and
in exactly one after the next normal run, 3 exactly the verified keys are deleted, 4 eligibility is the predicate. What recovery finds
is judged by the product's own decision table. The class attributes are the rules of the protocol; a mutant breaks one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from audit_archiver.catalogue.decide import ABANDON, ABORTED, COMMITTED, DIFFERS, EQUAL, HOLD, IN_PROGRESS, RECORD, STOP, UNKNOWN, Evidence, decide

CUTOFF, BATCH_ROWS, APPLICATION = 8, 2, "application"
Rows = dict[int, int]  # key -> version; the key is the age too: below CUTOFF a row is due
KEYS, EITHER = st.integers(0, 9), st.integers(0, 1)


class Violated(AssertionError):
    """An invariant does not hold."""


@dataclass
class Batch:
    """A batch: what was selected, what lies in the bucket, and its transaction as it truly is (`said`: as the server tells it)."""
    rows: Rows
    stored: Optional[Rows] = None
    mark: str = ""  # RECORD: its commit record is there; ABANDON: the evidence
    state: str = IN_PROGRESS
    said: str = IN_PROGRESS
    sent: bool = False  # COMMIT has arrived, and waits for a standby
    doomed: set[int] = field(default_factory=set)


@dataclass
class Driver:
    """A process; the session that holds K1 and that of the batch can outlive it, or end before it."""
    alive: bool = False
    step: int = 0
    batch: Optional[Batch] = None


class Protocol(RuleBasedStateMachine):
    """The rules as they are, and everything that can happen to them."""
    order = ("select", "upload", "verify", "delete", "commit", "record")
    proves_that_nobody_is_alive = True  # K2, and what is in progress stops recovery
    asks_the_table = True  # the first witness of recovery
    removes_only_the_abandoned = True
    starts_from_the_oldest = True
    deletes_by_key = True

    @initialize(keys=st.sets(KEYS, min_size=3))
    def begin(self, keys: set[int]) -> None:
        self.table: Rows = dict.fromkeys(keys, 0)
        self.truth: dict[int, Optional[int]] = dict(self.table)  # every row as it was last written; None: erased
        self.locked, self.batches, self.watermark = {}, [], -1  # type: dict[int, object], list[Batch], int
        self.drivers, self.k1 = [Driver(), Driver()], None  # type: list[Driver], Optional[int]

    @rule(key=KEYS, does=st.sampled_from(["insert", "update", "erase", "lock", "unlock"]))
    def application(self, key: int, does: str) -> None:
        """An insert may come late, with an old timestamp; who writes a locked row waits, and here gives up."""
        free = key in self.table and key not in self.locked
        if does == "unlock" and self.locked.get(key) == APPLICATION:
            del self.locked[key]
        elif does == "lock" and free:
            self.locked[key] = APPLICATION
        elif does == "erase" and free:
            del self.table[key]
            self.truth[key] = None
        elif does == "insert" and key not in self.truth or does == "update" and free:
            self.table[key] = self.truth[key] = self.truth.get(key, 0) + 1  # a key that was erased never comes back

    @rule(who=EITHER, steps=st.integers(1, 7), lie=st.sampled_from(["", "", "", "drops", "alters", "is cut off"]),
          commit=st.sampled_from(["answers", "answers", "answers", "is not heard", "hangs"]), dies_after=st.sampled_from([9, 9, 9, 0, 1]))
    def drive(self, who: int, steps: int, lie: str = "", commit: str = "answers", dies_after: int = 9) -> None:
        """Start a driver that is not alive (K1, K2, recovery, which it may not survive), and let it do some steps, whatever befalls them."""
        driver = self.drivers[who]
        if not driver.alive and self.k1 is None and not (self.proves_that_nobody_is_alive and self._open()):
            self.k1, driver.step, driver.alive = who, 0, self._recover(dies_after)
        while driver.alive and steps:
            name, driver.step, steps = self.order[driver.step], (driver.step + 1) % len(self.order), steps - 1
            driver.alive = self._select(driver) if name == "select" else self._step(name, self.k1 == who, driver.batch, lie, commit)

    def _select(self, driver: Driver) -> bool:
        due = [key for key in sorted(self.table) if key < CUTOFF and key not in self.locked
               and (self.starts_from_the_oldest or key > self.watermark)]
        if due:
            driver.batch = Batch({key: self.table[key] for key in due[:BATCH_ROWS]})
            self.locked.update({key: driver.batch for key in driver.batch.rows})
            self.batches.append(driver.batch)
        return bool(due)  # nothing to do: it ends

    def _step(self, step: str, holds_k1: bool, batch: Batch, lie: str, commit: str) -> bool:
        """One step of a batch. True if it went well; else its driver ends."""
        if step == "upload":
            batch.stored = None if lie == "is cut off" else {key: version for key, version in batch.rows.items()
                                                             if lie != "drops" or key != max(batch.rows)}
            if lie == "alters":
                batch.stored[max(batch.rows)] += 1000
            return batch.stored is not None
        if step == "verify":
            return batch.stored == batch.rows
        if step == "delete":  # only under K1, and in the transaction that locked the rows
            keys = set(batch.rows) if self.deletes_by_key else {key for key in self.table if key < CUTOFF}
            batch.doomed = keys if holds_k1 and batch.state == IN_PROGRESS else set()
            return bool(batch.doomed)
        if step == "commit":
            batch.sent = batch.state == IN_PROGRESS
            self.k1 = None if commit == "hangs" else self.k1  # its client is dead, the server does not know it yet
            if batch.sent and commit != "hangs":
                self._end(batch)
            return batch.state == COMMITTED and commit == "answers"
        batch.mark = "both" if batch.mark == ABANDON else RECORD
        self.watermark = max(batch.rows)
        return True

    @rule(who=EITHER, what=st.sampled_from(["kill", "lock lost", "lock lost", "session ends", "session ends", "cleanup",
                                            "crash", "crash, ids again", "failover"]))
    def fault(self, who: int, what: str) -> None:
        """A process dies, or K1's session, or its batch's; the server crashes and hands ids out again, or another takes its place."""
        self.drivers[who].alive &= what != "kill"
        self.k1 = self.k1 if what in ("kill", "session ends", "cleanup") else None
        if what == "session ends" and self.drivers[who].batch in self._open():
            self._end(self.drivers[who].batch)
        for batch in self.batches:
            if what.startswith(("crash", "failover")) and batch.state == IN_PROGRESS:
                batch.sent = False
                self._end(batch)
                batch.said = COMMITTED if what == "crash, ids again" else ABORTED
            if what == "failover":
                batch.said = UNKNOWN
            if what == "cleanup" and (batch.mark == ABANDON or not self.removes_only_the_abandoned and not batch.mark):
                batch.stored = None

    def _open(self) -> list[Batch]:
        return [batch for batch in self.batches if batch.state == IN_PROGRESS]

    def _end(self, batch: Batch) -> None:
        """The end of a transaction: committed if COMMIT has arrived."""
        batch.state = batch.said = COMMITTED if batch.sent else ABORTED
        self.locked = {key: who for key, who in self.locked.items() if who is not batch}
        self.table = {key: version for key, version in self.table.items() if not batch.sent or key not in batch.doomed}

    def _recover(self, dies_after: int = 9, person: bool = False) -> bool:
        """Settle every batch; False if it stopped, died, or holds one. A `person` finds out the truth about what is held."""
        for count, batch in enumerate(batch for batch in self.batches if not batch.mark and batch.stored is not None):
            verdict = self._judge(batch)
            if verdict == HOLD and person:
                verdict = RECORD if batch.state == COMMITTED else ABANDON
            if verdict in (STOP, HOLD) or count >= dies_after:
                return False
            batch.mark = verdict
        return True

    def _judge(self, batch: Batch) -> str:
        said = batch.said if self.proves_that_nobody_is_alive or batch.said != IN_PROGRESS else ABORTED
        if not self.asks_the_table:
            return RECORD if said == COMMITTED else ABANDON
        there, archived = set(batch.rows).intersection(self.table), {row for rows in self._archived() for row in rows.items()}
        same = EQUAL if all(self.table[key] == batch.rows[key] for key in there) else DIFFERS
        elsewhere = sum(key not in there and (key, version) in archived for key, version in batch.rows.items())
        verdict = decide(Evidence(keys=len(batch.rows), present=len(there), content=same if len(there) == len(batch.rows) else UNKNOWN,
                                  transaction=said, accounted=elsewhere if said == ABORTED or not there else 0)).verdict
        return HOLD if verdict == RECORD and batch.stored != batch.rows else verdict  # read back before it is recorded

    def teardown(self) -> None:
        """The next normal run: the faults are over, nobody disturbs it, what it holds is settled: then each row is in one place."""
        self.locked = {key: who for key, who in self.locked.items() if who != APPLICATION}
        for batch in self._open():
            self._end(batch)
        self._recover(person=True)
        self.drivers, self.k1 = [Driver(), Driver()], None
        self.drive(0, 99)
        if wrong := [key for key, version in self.truth.items() if version is not None
                     and sum(key in place for place in (self.table, *self._archived())) != 1]:
            raise Violated(f"2: {wrong} are not in exactly one place")
        if due := [key for key in self.table if key < CUTOFF]:
            raise Violated(f"4: {due} are due and still in the table")

    def _archived(self) -> list[Rows]:
        return [batch.stored or {} for batch in self.batches if batch.mark == RECORD]

    @invariant()
    def hold(self) -> None:
        can_be_recorded = [batch.rows for batch in self.batches if not batch.mark and batch.state == COMMITTED and batch.stored == batch.rows]
        for key, version in self.truth.items():
            if version is not None and not any(rows.get(key) == version for rows in (self.table, *self._archived(), *can_be_recorded)):
                raise Violated(f"1: row {key} is nowhere")
        if twice := [key for rows in self._archived() for key in rows if key in self.table]:
            raise Violated(f"2: {twice} are archived and in the table")
        for batch in self.batches:
            if batch.doomed not in (set(), set(batch.rows)):
                raise Violated("3: other keys than those that were verified")
            if batch.mark == "both" or max(batch.rows) >= CUTOFF:
                raise Violated("2, 4: a batch is both recorded and abandoned, or has a row that is not due")
