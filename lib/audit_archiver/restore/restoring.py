"""Restore the chosen batches of one table into one target: look first, say what differs, load, finish, keep account."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, BinaryIO, Callable, Optional, Sequence

from audit_archiver import log
from audit_archiver.catalogue import archived, holds
from audit_archiver.catalogue.archived import Batch
from audit_archiver.config.model import S3_STORAGE
from audit_archiver.exits import ArchiverError, ConfigError, LockHeld, Mismatch
from audit_archiver.formats.hold import Hold
from audit_archiver.objectstore.client import Store
from audit_archiver.postgres import connect, lock_holders, partitions
from audit_archiver.restore import account, choose, create, crew, differences, rehearse, sequences, thaw
from audit_archiver.restore import target as targets
from audit_archiver.restore.account import Account
from audit_archiver.restore.functions import Functions
from audit_archiver.restore.load import FAIL, RESOLUTIONS, UPSERT, Conflict, Loader, Outcome
from audit_archiver.restore.statements import Statements, Window
from audit_archiver.restore.target import Place, Target
from audit_archiver.restore.thaw import Thaw
from audit_archiver.restore.verified import commit_record
from audit_archiver.restore.watermark import Watermark

PROGRESS_S = 5.0
WATERMARK_S = 30.0
END_S = 3.0
ROWS_PER_S = 40_000  # for the estimate before the first figures; measured on two cores with rows of 480 bytes
TABLE_SHARE = 0.9  # bytes in table and indexes for one byte of JSON, as a rule of thumb


@dataclass(frozen=True)
class Wanted:
    """What the flags ask for, besides which batches. `where` are (column, value)."""

    start: Optional[str] = None
    end: Optional[str] = None
    where: tuple[tuple[str, str], ...] = ()
    conflicts: str = FAIL
    schema: str = differences.STRICT
    functions: Functions = Functions()
    create_table: bool = False
    silent: bool = False
    ignore_watermark: bool = False
    watermark: Optional[str] = S3_STORAGE
    in_flight: int = 2
    rows: int = 50_000
    dry_run: bool = False
    hold_until: Optional[str] = None
    thaw: Optional[Thaw] = None

    @property
    def filtered(self) -> bool:
        """True if a batch may be restored in part."""
        return bool(self.start or self.end or self.where)


class Restoring:
    """One table's restore. `report` gets the lines of the conflict report, `settled` hears of each outcome that is committed, and
    `fence` is asked in each transaction whether it may."""

    def __init__(self, store: Store, place: Place, wanted: Wanted, made: Account, report: Optional[BinaryIO],
                 settled: Optional[Callable[[Outcome], None]] = None, fence: Optional[Callable[[connect.Connection], None]] = None) -> None:
        self._store, self._place, self._wanted, self.account, self._report = store, place, wanted, made, report
        self._settled, self._fence = settled, fence
        self._shapes: dict[str, Optional[Statements]] = {}
        self._asking = threading.Lock()
        self.target: Optional[Target] = None
        self._said = self._noted = time.monotonic()
        self._total = 0

    def run(self, chosen: Sequence[Batch], every: Sequence[Batch]) -> None:
        """Restore the batches `chosen` of `every` one that the table has; the account says what came of it.

        Raises what concerns the whole table: nothing more of it is restored then, and what was committed is in the account.
        """
        whole = [batch for batch in chosen if batch.state == archived.ARCHIVED]
        lost = [batch for batch in chosen if batch.state == archived.MISSING]
        if lost:
            raise Mismatch(f"{lost[0].name} has lost its commit record, though the index names it", detail=f"{len(lost)} such batches",
                           hint="get the objects back from a version or a replica of the bucket; a run that leaves them out is --start-date, "
                                "--end-date or --run of others")
        self.account.chosen, self.account.not_archived = len(whole), len(chosen) - len(whole)
        self._control = connect.connect(self._place.database, purpose="restore")
        try:
            self._restore(whole, every)
        finally:
            self._control.close()

    def _restore(self, batches: Sequence[Batch], every: Sequence[Batch]) -> None:
        wanted, control = self._wanted, self._control
        if wanted.dry_run:
            connect.execute(control, "SET default_transaction_read_only = on")
        oid = targets.find(control, self._place)
        if oid is not None:
            self.target = targets.look(control, self._place, oid)
        watermark, meant = self._watermark(), batches
        if watermark is not None and not wanted.ignore_watermark:
            batches = self._not_yet(batches, watermark)
        if batches:
            described = create.with_ddl(every)[:1] if wanted.create_table else []
            thaw.require(self._store, [*batches, *described], thaw.RESTORED, wanted.thaw, ask=not wanted.dry_run)
        ddl = None
        if wanted.create_table and batches:
            ddl = create.Ddl(create.archived_ddl(self._store, every), batches[0], self._place)
        if oid is None:
            oid = self._made(ddl)
            if oid is not None:
                self.target = targets.look(control, self._place, oid)
                watermark = self._watermark()
        if wanted.hold_until is not None and meant:
            self._hold(meant, wanted.hold_until)
        if not batches:
            return
        self._compare(batches)
        self._estimate(batches)
        if wanted.dry_run:
            rehearse.rehearse(self._store, control, batches, RESOLUTIONS[wanted.conflicts], self._statements, self._done)
            return
        assert self.target is not None
        if watermark is not None:
            watermark.prepare()
        self.account.put(self._store, account.START)
        try:
            self._load(batches, watermark)
        finally:
            if watermark is not None:
                watermark.put()
        sequences.set_behind_rows(control, self.target)
        if ddl is not None:
            for error in ddl.finish(control, self.target.oid):
                self.account.fail(error)

    def _hold(self, batches: Sequence[Batch], until: str) -> None:
        """Keep the rows that are meant in their table, before the first of them is there (T12): the range of their times.

        A run that is at work has planned without it, and one that begins from now on finds it.
        """
        place, by = self._place, {commit_record(self._store, batch)["batch"]["timestamp"] for batch in self._one_of_each_run(batches)}
        if len(by) > 1:
            raise ConfigError(f"the rows were archived by several timestamp columns: {', '.join(sorted(by))}",
                              hint="restore and hold what each --run archived by itself")
        configured = partitions.configured(self._control, place.database, place.schema, place.table)
        timestamp, = by
        if configured is not None and configured.timestamp != timestamp:
            raise ConfigError(f"--hold-until holds rows by '{timestamp}', and {place.title} is archived by '{configured.timestamp}'",
                              hint="restore --into another table", at=configured.at)
        first, last = choose.span(batches, self._wanted.start, self._wanted.end)
        hold = Hold(self.account.restore, place.database.name, place.schema, place.table, timestamp, first, last, until)
        words = f"rows of {place.title} from {first} to {last} {{}} held until {until}: runs leave them in the table"
        if self._wanted.dry_run:
            log.info("restore.held", words.format("would be"))
            return
        self._require_no_run()
        holds.put(self._store, hold, account.now(), account.by())
        self._require_no_run()
        log.info("restore.held", words.format("are"), until=until)

    def _require_no_run(self) -> None:
        found = lock_holders.holders(self._control)
        if found:
            raise LockHeld(f"a run is at work in database '{self._place.database.name}', and would not hold what is restored: {found[0].words}",
                           hint="restore again when it has ended; nothing was restored")

    def _made(self, ddl: Optional[create.Ddl]) -> Optional[int]:
        """The table, made from the archived DDL; None in a dry run."""
        if ddl is None:
            raise ConfigError(f"there is no table {self._place.title}", hint="--create-table makes it from the archived DDL")
        self.account.created = True
        if self._wanted.dry_run:
            log.info("restore.create", f"{self._place.title} would be made from the archived DDL")
            return None
        ddl.create(self._control)
        log.info("restore.create", f"{self._place.title} is made from the archived DDL")
        return targets.find(self._control, self._place)

    def _watermark(self) -> Optional[Watermark]:
        if self._wanted.watermark is None or self.target is None:
            return None
        return Watermark(self._store, self._control, self._wanted.watermark, self.account.source, self.target)

    def _not_yet(self, batches: Sequence[Batch], watermark: Watermark) -> list[Batch]:
        left = [batch for batch in batches if batch.id not in watermark.restored]
        self.account.restored_before = len(batches) - len(left)
        if self.account.restored_before:
            log.warning("restore.before", f"{self.account.restored_before} of {len(batches)} batches were restored into {self._place.title} "
                        "before, and are left out", hint="--ignore-watermark looks at them again, row by row")
        return left

    def _compare(self, batches: Sequence[Batch]) -> None:
        """Compare the shapes before the first row: of the first batch of each run, since a run keeps to one shape."""
        for batch in self._one_of_each_run(batches):
            try:
                line = commit_record(self._store, batch)
            except Mismatch:
                continue  # it is said when its turn comes
            self._statements(line)

    @staticmethod
    def _one_of_each_run(batches: Sequence[Batch]) -> list[Batch]:
        first: dict[Optional[str], Batch] = {}
        for batch in batches:
            first.setdefault(batch.run, batch)
        return list(first.values())

    def _statements(self, line: dict[str, Any]) -> Optional[Statements]:
        """The SQL for a batch. Raises ConfigError if its rows do not fit; each shape is compared, and said, once."""
        batch = line["batch"]
        shape = repr((batch["columns"], batch["key"], batch["timestamp"]))
        with self._asking:
            if shape not in self._shapes:
                self._shapes[shape] = self._of_shape(batch, line["serialized"]["stem"])
            return self._shapes[shape]

    def _of_shape(self, batch: dict[str, Any], stem: str) -> Optional[Statements]:
        wanted, target = self._wanted, self.target
        columns = [(name, kind) for name, kind in batch["columns"]]
        if target is None:
            if wanted.filtered:
                raise ConfigError(f"there is no table {self._place.title} to count with", hint="leave the filters out of the dry run, or make "
                                  "the table first")
            return None
        mapping = differences.compare(self._control, columns, self._nullable(stem), target, wanted.functions.transform)
        for each in mapping.differences:
            log.warning("restore.difference", f"column '{each.column}' of {self._place.title}: {each.words}", kind=each.kind)
            if each.as_json() not in self.account.differences:
                self.account.differences.append(each.as_json())
        differences.require(mapping, wanted.schema, self._place.title)
        written = {column.name for column, _ in mapping.written}
        key = [name for name in batch["key"] if name not in written]
        if key:
            raise ConfigError(f"{self._place.title} has no column '{key[0]}', which is part of the key, so rows could not be told apart")
        if wanted.conflicts == UPSERT and frozenset(batch["key"]) not in target.unique:
            raise ConfigError(f"{self._place.title} has no unique index on {', '.join(batch['key'])}, which upsert needs",
                              hint="make one, or use --conflict-strategy overwrite")
        if not any(unique <= frozenset(batch["key"]) for unique in target.unique):
            log.warning("restore.unindexed", f"{self._place.title} has no unique index on {', '.join(batch['key'])}: each transaction reads it whole")
        by_name = {column.name: column for column in mapping.archived}
        conditions = []
        for name, value in wanted.where:
            if name not in by_name:
                raise ConfigError(f"--where: the archived rows have no column '{name}'", hint=f"their columns are {', '.join(by_name)}")
            conditions.append(targets.check_value(self._control, by_name[name], value))
        made = Statements(target, mapping, batch["key"], Window(batch["timestamp"], wanted.start, wanted.end, tuple(conditions)), wanted.functions)
        mergeable = dict(made.mergeable())
        for name in wanted.functions.merge:
            if name not in mergeable:
                raise ConfigError(f"the functions merge a column '{name}', which {self._place.title} or the archive does not have, or which "
                                  "cannot be set")
            differences.check(self._control, mergeable[name], name)
        return made

    def _nullable(self, stem: str) -> Optional[dict[str, bool]]:
        """Which columns could be NULL when the batch was archived; None if nobody knows any more."""
        try:
            value = create.read_metadata(self._store, stem)
        except ArchiverError as error:
            log.debug("restore.metadata", f"nobody knows which columns could be NULL: {error.msg}")
            return None
        return {column["name"]: column["nullable"] for column in value["schema"]["columns"]}

    def _estimate(self, batches: Sequence[Batch]) -> None:
        rows, size = sum(batch.rows or 0 for batch in batches), sum(batch.bytes or 0 for batch in batches)
        packed = sum(batch.gz_bytes or 0 for batch in batches)
        self._total = rows
        log.info("restore.plan", f"{len(batches)} batches with {rows:,} rows into {self._place.title}: {packed / 1e6:,.1f} MB to read, about "
                 f"{size * TABLE_SHARE / 1e6:,.0f} MB in the database, about {rows / ROWS_PER_S:,.0f} s", batches=len(batches), rows=rows,
                 gz_bytes=packed, bytes=size)

    def _load(self, batches: Sequence[Batch], watermark: Optional[Watermark]) -> None:
        wanted, target = self._wanted, self.target
        assert target is not None
        # in order where one version of a row may go over another, and where ALTER TABLE would have them wait for each other
        ordered = wanted.conflicts != FAIL or wanted.silent
        many = 1 if ordered else wanted.in_flight
        together = min(wanted.rows, max(1, self._total // (2 * many)))
        single = wanted.filtered or wanted.conflicts != FAIL  # so that it is known which batch is whole, and whose key came twice
        groups = ([batch] for batch in batches) if single else crew.groups(batches, together)
        note = watermark.note if watermark is not None else None
        loaders = [Loader(self._store, self._place.database, target, wanted.conflicts, self.account.restore, silent=wanted.silent,
                          statements_of=self._statements, fence=self._fence, note=note) for _ in range(min(many, len(batches)))]

        def done(outcome: Outcome) -> None:
            self._done(outcome)
            if self._settled is not None and outcome.failure is None:
                self._settled(outcome)
            if watermark is not None and outcome.whole:
                watermark.add(outcome.batches)
                if time.monotonic() - self._noted > WATERMARK_S:
                    watermark.put()
                    self._noted = time.monotonic()

        try:
            crew.work(loaders, groups, done, self._tick)
        except Conflict as error:
            self._write(error.outcome)
            self.account.conflicts += error.outcome.conflicts
            raise
        except BaseException:
            self._end([loader.pid for loader in loaders if loader.pid is not None])
            raise

    def _end(self, backends: Sequence[int]) -> None:
        """End sessions whose connections are cut: one that waits for a lock would not notice before it has it."""
        sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ANY(%s) AND application_name = %s"
        ours = f"audit-archiver restore {self.account.restore}"  # the process id of one that has ended may be another's by now
        try:
            connect.within(self._control, END_S, lambda: connect.rows(self._control, sql, (list(backends), ours)))
        except ArchiverError as error:
            log.debug("restore.broken", f"a session is left to the server: {error.msg}")

    def _done(self, outcome: Outcome) -> None:
        self.account.add(outcome)
        if outcome.failure is not None:
            log.error("restore.failed", outcome.failure.msg, detail=outcome.failure.detail, hint=outcome.failure.hint, code=outcome.failure.code,
                      key=outcome.batches[0].key)
        self._write(outcome)
        self._tick()

    def _write(self, outcome: Outcome) -> None:
        if outcome.conflicts and self._report is not None:
            self._report.write(outcome.lines)
            self._report.flush()

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._said < PROGRESS_S or not self._total:
            return
        self._said = now
        done, spent = self.account.archived, now - self.account.began
        left = f", about {(self._total - done) * spent / done:,.0f} s left" if done else ""
        log.info("restore.progress", f"{done:,} of {self._total:,} rows, {100 * done / self._total:.0f} %{left}", rows=done, of=self._total)
