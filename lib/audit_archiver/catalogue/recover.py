"""Recovery: what an interrupted run left is recorded, abandoned, or held for a person (design, section 5).

Called while the caller holds K1 of the scope and K2 has proven that no transaction of an earlier run is alive: at the
start of every run, before every restart of a pipeline, and by aa-recover. Runs are found by a start without an end,
batches by their objects, also those of tables that are no longer configured; staging is not needed.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence

from audit_archiver import log
from audit_archiver.catalogue import carry_out, evidence, holds, leftovers, owner, rewound, rollbacks, runs, staged
from audit_archiver.catalogue.decide import ABANDON, COMMITTED, EQUAL, HOLD, RECORD, STOP, WAIT, Decision, decide
from audit_archiver.catalogue.evidence import Case
from audit_archiver.config.model import Config, Database
from audit_archiver.exits import ArchiverError, ConfigError, LockHeld
from audit_archiver.formats import names
from audit_archiver.holder.session import Standing
from audit_archiver.objectstore.client import Store
from audit_archiver.points import point
from audit_archiver.postgres import connect, partitions, witness

TableName = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """What recovery found and did about one batch."""

    batch: str
    name: str
    table: TableName
    day: str
    verdict: str
    why: str
    evidence: dict[str, Any]
    stem: str
    run: Optional[str]
    line: Optional[str] = None

    @property
    def words(self) -> str:
        """One line for a person."""
        return f"{self.batch} of {self.day}: {self.why}"


@dataclass
class Outcome:
    """Everything that one recovery of a database found and did. `held` says why a table must be left alone, and so does
    `rollbacks`, of tables whose rollback was interrupted."""

    verdicts: list[Verdict] = field(default_factory=list)
    held: dict[TableName, str] = field(default_factory=dict)
    rollbacks: dict[TableName, str] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def said(self) -> Optional[str]:
        """The summary of what was done, for a report; None if there was nothing to do."""
        parts = []
        for verdict, word in ((RECORD, "recorded"), (ABANDON, "abandoned"), (HOLD, "held")):
            found = [each for each in self.verdicts if each.verdict == verdict]
            if found:
                more = f", and {len(found) - 1} more" if len(found) > 1 else ""
                parts.append(f"{len(found)} {'batch' if len(found) == 1 else 'batches'} {word} ({found[0].words}{more})")
        return "; ".join(parts) or None


def recover_database(config: Config, store: Store, database: Database, control: connect.Connection, run: Optional[str] = None,
                     tables: Optional[Sequence[TableName]] = None, *, idle: bool = False, staging: Optional[Path] = None,
                     dry_run: bool = False, decisions: Optional[Mapping[str, str]] = None, adopt: bool = False,
                     in_hand: Optional[str] = None) -> Outcome:
    """Decide about everything that interrupted runs left of `database`, and carry it out.

    `control` holds K1. `run` is the caller's own run, which is not ended; `idle`: no stage of it is alive, so that what it
    exported without a holder is not waited for. `tables` limits it to these tables, where
    the lock's scope is a table; None is the whole database. `staging` is swept too, if given. `dry_run` only says what
    it would do. `decisions` are a person's, by the last part of the batch's stem: "record" or "abandon". `adopt`: this server
    has taken the place of the one that the bucket knows. `in_hand` is the stem of a batch that the caller is about to delete: it is
    not abandoned for being in the table unchanged. Raises ConfigError for another's prefix or run, LockHeld if
    somebody is at work after all, Rewound, and the errors of the store and the connection.
    """
    return Recovery(config, store, database, control, run, tables, idle, staging, dry_run, decisions or {}, adopt,
                    in_hand).all()


class Recoverer:
    """Recovery as the holder and the driver call it, between two pipelines; keeps every outcome for the report."""

    def __init__(self, config: Config, store: Store, run: Optional[str] = None, staging: Optional[Path] = None) -> None:
        self._config, self._store, self._run = config, store, run
        self._staging = staging or config.staging_dir
        self.outcomes: dict[str, list[Outcome]] = {}

    def __call__(self, database: Database, control: connect.Connection,
                 tables: Optional[Sequence[TableName]] = None) -> Standing:
        """Recover a database or some of its tables; says which tables are held back and why, and which rows are."""
        outcome = recover_database(self._config, self._store, database, control, self._run, tables, idle=self._run is not None,
                                   staging=self._staging)
        self.outcomes.setdefault(database.name, []).append(outcome)
        return Standing({**outcome.rollbacks, **outcome.held}, holds.current(self._store, database.name))

    def end(self, database: Database, by: str) -> bool:
        """End the caller's run in a database after its last pipeline; False, and nothing is written, while a batch of it
        is held or undecided: nobody looks at what an ended run left."""
        latest = {each.stem: each for outcome in self.outcomes.get(database.name, ()) for each in outcome.verdicts}
        open_batches = [each for each in latest.values() if each.verdict in (HOLD, WAIT) and each.run in (self._run, None)]
        if open_batches:
            log.warning("recover.run.open", f"run {self._run} is not ended: {open_batches[0].words}", run=self._run)
            return False
        assert self._run is not None
        wal = None
        try:
            control = connect.connect(database, purpose="end", run=self._run)
            try:
                wal = runs.wal_here(witness.place(control))
            finally:
                control.close()
        except ArchiverError as error:  # the batches are settled all the same; the next run looks closer instead
            log.warning("recover.run.wal", f"the end of run {self._run} does not say where the server's log is: {error.msg}")
        runs.put_end(self._store, database.name, self._run, by, wal)
        return True


recoverer = Recoverer


class Recovery:
    """One recovery of one database."""

    def __init__(self, config: Config, store: Store, database: Database, control: connect.Connection, run: Optional[str],
                 tables: Optional[Sequence[TableName]], idle: bool, staging: Optional[Path], dry_run: bool,
                 decisions: Mapping[str, str], adopt: bool, in_hand: Optional[str]) -> None:
        self._config, self._store, self._database, self._control = config, store, database, control
        self._run, self._tables, self._staging, self._dry = run, tables, staging, dry_run
        self._dead = run if idle else None
        self._decisions, self._adopt, self._in_hand = dict(decisions), adopt, in_hand
        self._here = witness.place(control)
        self._hands = carry_out.Hands(store, self._here, staging)
        self._outcome = Outcome()
        self._unsettled: set[Optional[str]] = set()

    def all(self) -> Outcome:
        """The whole of it: look whether the server was rewound, settle the batches, end the runs, look for rollbacks, sweep the staging."""
        known = runs.listed(self._store, self._database.name)
        self._check_owner(known)
        self._check_rewound(known)
        if known.open:
            try:
                self._settle_batches(min(each.since for each in known.open))
            finally:
                self._hands.close()
        if unknown := sorted(self._decisions):
            raise ConfigError(f"there is no undecided batch '{unknown[0]}' in database '{self._database.name}'",
                              hint="aa-recover --dry-run lists them")
        self._end_runs(known.open)
        self._outcome.rollbacks = {table: words for table, words in rollbacks.words(self._store, self._database.name).items()
                                   if self._tables is None or table in self._tables}
        self._sweep(self._staging, None)
        self._sweep(self._config.s3.local_fallback_dir, self._config.s3.local_fallback_retention_days)
        return self._outcome

    def _sweep(self, root: Optional[Path], kept_days: Optional[float]) -> None:
        if root is not None:
            self._outcome.forgotten += staged.sweep(
                self._store, root, self._database.name, self._here.now, tables=None if self._tables is None else set(self._tables),
                run=self._run, dead=self._dead, kept_days=kept_days, dry_run=self._dry)

    def _table_dirs(self) -> list[str]:
        if self._tables is None:
            return leftovers.table_dirs(self._store, self._database.name)
        return [names.table_dir(self._store.prefix, self._database.name, *table) for table in self._tables]

    def _check_owner(self, known: runs.Runs) -> None:
        """Nothing is decided about another server's runs, or everything is ours from now on."""
        if self._adopt and not self._dry:
            for table_dir in leftovers.table_dirs(self._store, self._database.name):
                owner.adopt(self._store, table_dir, self._here)
        if not self._adopt:
            for each in known.open:
                owner.require_run(each, self._database.name, self._here)

    def _check_rewound(self, known: runs.Runs) -> None:
        tables = self._tables or [(table.schema, table.name) for table in partitions.leaves(self._control, self._database.tables)]
        places = [names.table_dir(self._store.prefix, self._database.name, *table) for table in tables]
        accepted = [name for name, wish in self._decisions.items() if wish == "record"]
        met = rewound.check(self._store, self._control, self._here, known, places, accepted, adopt=self._adopt)
        if met and not self._dry:
            runs.put_end(self._store, self._database.name, self._run or names.run_id(self._here.now, os.getpid()), "aa-recover",
                         runs.wal_here(self._here))
        for name in met:
            log.warning("recover.rewound.accepted", f"'{name}' stays recorded although its rows are in the table again")
            self._decisions.pop(name, None)

    def _settle_batches(self, since: datetime.date) -> None:
        for table_dir in self._table_dirs():
            for leftover in leftovers.batches_since(self._store, table_dir, since):
                if not leftover.recorded and not leftover.abandoned:
                    if not self._adopt:
                        owner.require(self._store, table_dir, self._here)
                    self._settle(leftover, table_dir)

    def _settle(self, leftover: leftovers.Leftover, table_dir: str) -> None:
        case = evidence.gather(self._store, self._control, self._here, leftover, self._database.name, table_dir, self._staging,
                               dead=self._dead)
        decision = decide(case.evidence)
        if decision.verdict == STOP:
            raise LockHeld(f"{case.title} cannot be decided: its transaction {case.xid} is in progress: "
                           f"{witness.works_under(self._control, str(case.xid))}", hint="wait until it has ended, or end it")
        if leftover.stem == self._in_hand and case.evidence.content == EQUAL and case.evidence.transaction != COMMITTED:
            self._unsettled.add(case.run)
            return
        decision = self._wished(leftover, case, decision)
        if self._dry:
            log.info("recover.would", f"{decision.verdict} {case.title} of {leftover.day}: {decision.why}", **_fields(case, decision))
        else:
            decision = self._hands.carry_out(case, decision)
        point("recover.decided")
        self._note(leftover, case, decision)

    def _wished(self, leftover: leftovers.Leftover, case: Case, decision: Decision) -> Decision:
        """What a person decided instead, where recovery itself would hold or wait."""
        wish = self._decisions.pop(leftover.name, None) or self._decisions.pop(leftover.stem, None)
        if wish is None:
            return decision
        if decision.verdict not in (HOLD, WAIT):
            log.warning("recover.decided", f"{case.title} needs no decision by hand: {decision.why}")
            return decision
        if wish == "record" and case.line is None:
            raise ConfigError(f"{case.title} cannot be recorded: its metadata are missing", hint="abandon it, or restore the object")
        return Decision(RECORD if wish == "record" else ABANDON, f"decided by hand (found: {decision.why})")

    def _note(self, leftover: leftovers.Leftover, case: Case, decision: Decision) -> None:
        if decision.verdict in (HOLD, WAIT) or self._dry:
            self._unsettled.add(case.run)
        written = None
        if decision.verdict == HOLD:
            self._outcome.held[case.table] = f"{case.title} of {leftover.day}: {decision.why}"
            written = None if self._dry else self._hands.keep_line(case)
        self._outcome.verdicts.append(Verdict(case.title, leftover.name, case.table, leftover.day, decision.verdict, decision.why,
                                              case.said(), leftover.stem, case.run, written))

    def _end_runs(self, found: Iterable[runs.OpenRun]) -> None:
        """End the runs all of whose batches are settled. A table's lock proves nothing about a run's other tables."""
        if self._tables is not None or self._dry or None in self._unsettled:
            return
        for each in found:
            old = evidence.age(each.begun, self._here.now) >= evidence.PATIENCE
            if each.run == self._run or each.run in self._unsettled or not (each.held or old):
                continue
            runs.put_end(self._store, self._database.name, each.run, "aa-recover", runs.wal_here(self._here))
            point("recover.end.put")
            self._outcome.ended.append(each.run)
            log.info("recover.run.ended", f"run {each.run} is settled", run=each.run)


def _fields(case: Case, decision: Decision) -> dict[str, Any]:
    return {"batch": case.title, "verdict": decision.verdict, **case.said()}
