"""Undo the archiving of batches of one table: their rows go back where they came from, the newest batch first.

A restore into the table itself, under the lock of a run, which says of each batch what became of it: `_rolled_back.json`
beside the commit record, written when its rows are committed. From then on the batch is not archived any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional, Sequence

from audit_archiver import log
from audit_archiver.catalogue import archived, rollbacks
from audit_archiver.catalogue.archived import Batch
from audit_archiver.catalogue.rollbacks import Open
from audit_archiver.config.model import BOTH
from audit_archiver.exits import ArchiverError, Failed, NetworkError, Retryable
from audit_archiver.locking.lock import Lock
from audit_archiver.objectstore.client import Store
from audit_archiver.points import point
from audit_archiver.postgres import connect
from audit_archiver.restore import account
from audit_archiver.restore.account import Account
from audit_archiver.restore.load import Conflict, Outcome
from audit_archiver.restore.restoring import Restoring, Wanted
from audit_archiver.restore.target import Place
from audit_archiver.restore.watermark import Watermark

LATE_SQL = "SELECT count(*) FROM unnest(%s::timestamptz[]) AS t (at) WHERE at < now() - %s * interval '1 hour'"


@dataclass(frozen=True)
class Fence:
    """What keeps two at work on one table apart: `lock`, in which `table_oid` None is the whole database; `title` is the table's."""

    lock: Lock
    table_oid: Optional[int]
    title: str

    def enter(self, connection: connect.Connection) -> None:
        """Mark a transaction as one under this lock, as a run does; raises LockHeld if the lock is lost."""
        self.lock.enter(connection, self.table_oid)
        self.lock.require(connection, self.table_oid, self.title)


@dataclass(frozen=True)
class Part:
    """What is to be undone of one table: `batches`, the newest first, of `every` one that it has.

    `begun` is the interrupted rollback that is gone on with, if it is one.
    """

    schema: str
    table: str
    batches: tuple[Batch, ...]
    every: tuple[Batch, ...]
    begun: Optional[Open] = None

    @property
    def rows(self) -> int:
        """How many rows that is."""
        return sum(batch.rows or 0 for batch in self.batches)


def part(every: Sequence[Batch], meant: Callable[[Batch], bool], last: Optional[int], begun: Optional[Open]) -> Part:
    """What is meant of a table that has `every` batch: those that are archived, or the `last` so many of them.

    A rollback that was interrupted is ended first, and nothing else is begun.
    """
    newest = sorted(every, key=lambda batch: (batch.committed_at or "", batch.number or 0), reverse=True)
    there = [batch for batch in newest if batch.state in (archived.ARCHIVED, archived.MISSING)]
    if begun is not None:
        return Part(begun.schema, begun.table, tuple(batch for batch in there if batch.stem in begun.stems), tuple(every), begun)
    return Part(every[0].schema, every[0].table, tuple(filter(meant, there))[:last], tuple(every))


def late(control: connect.Connection, batches: Sequence[Batch], hours: int) -> int:
    """How many of the batches were archived more than so many hours ago, by the server's clock."""
    return int(connect.scalar(control, LATE_SQL, ([batch.committed_at for batch in batches], hours)))


def roll_back(store: Store, place: Place, wanted: Part, made: Account, fence: Fence, *, silent: bool) -> None:
    """Put the rows back; the account says what came of it. Without dry run the caller holds the lock."""
    dry, database = made.dry_run, made.source[0]
    begun = wanted.begun or Open(made.restore, wanted.schema, wanted.table, tuple(batch.stem for batch in wanted.batches))
    if not dry and wanted.begun is None:
        rollbacks.start(store, begun, database, account.by())
        point("rollback.start.put")
    back: list[Batch] = []
    unsaid = False

    def settled(outcome: Outcome) -> None:
        nonlocal unsaid
        unsaid = True
        assert restoring.target is not None
        batch, target = outcome.batches[0], restoring.target
        rollbacks.put(store, batch.stem, {
            "id": batch.id, "run": batch.run, "rollback": begun.rollback, "by": account.by(), "system": target.system,
            "database_oid": target.database_oid, "table_oid": target.oid, "rows": outcome.rows, "inserted": outcome.inserted,
            "same": outcome.same, "sampled": outcome.sampled})
        unsaid = False
        back.append(batch)
        log.info("rollback.batch", f"{batch.name} is rolled back: {outcome.rows} rows are in {place.title} again", key=batch.stem,
                 rows=outcome.rows)
        point("rollback.record.put")

    # one batch a transaction and one transaction at a time, so that the newest are undone whatever stops it
    restoring = Restoring(store, place, Wanted(silent=silent, watermark=None, in_flight=1, rows=1, dry_run=dry), made, None, settled, fence.enter)
    doubtful = False
    try:
        restoring.run(wanted.batches, wanted.every)
    except ArchiverError as error:
        doubtful = isinstance(error, (NetworkError, Retryable)) or unsaid
        _failed(made, error)
    except BaseException:
        doubtful = True
        raise
    finally:
        if not dry and not doubtful:
            _end(store, place, wanted, made, begun, restoring, back, fence.lock.control)


def _failed(made: Account, error: ArchiverError) -> None:
    if isinstance(error, Conflict):
        error = Failed(error.msg, hint="nothing of this batch and of older ones was rolled back, newer ones were; settle these rows "
                       "('aa-restore --dry-run --conflicts FILE' names them) and run it again")
    made.fail(error)
    log.error("rollback.stopped", error.msg, detail=error.detail, hint=error.hint, at=error.at, sqlstate=error.sqlstate, code=error.code)


def _end(store: Store, place: Place, wanted: Part, made: Account, begun: Open, restoring: Restoring, back: list[Batch],
         control: connect.Connection) -> None:
    """Say that it is over, if it is known of each batch where its rows are; what a killed one did is known only of what met no failure."""
    if wanted.begun is not None and made.failures:
        log.error("rollback.open", f"rollback {begun.rollback} of {place.title} is not over, and runs leave the table alone until it is",
                  hint="settle what was said, and run it again")
        return
    try:
        if restoring.target is not None:
            before = [batch for batch in wanted.every if batch.stem in begun.stems and batch.state == archived.ROLLED_BACK]
            Watermark(store, control, BOTH, made.source, restoring.target).forget([*before, *back], wanted.every)
        point("rollback.end.before")
        rollbacks.end(store, begun, made.source[0], account.by())
    except ArchiverError as error:
        _failed(made, error)
