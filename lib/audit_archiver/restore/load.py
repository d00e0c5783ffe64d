"""Load batches into the table, a transaction for one or some: stage, verify, insert, compare, commit.

A batch is in the table whole or not at all. What was committed and not noted, because somebody pulled the plug between
the two, is met again as rows that are there already, byte for byte, and changes nothing: every strategy takes them so.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional, Sequence

from audit_archiver import log, points
from audit_archiver.catalogue.archived import Batch
from audit_archiver.config.model import Database
from audit_archiver.exits import ArchiverError, Failed, InputError, Mismatch, NetworkError, Retryable
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.postgres import connect
from audit_archiver.restore import statements, verified
from audit_archiver.restore.statements import Statements
from audit_archiver.restore.target import Target

SKIP, OVERWRITE, FAIL, UPSERT, MERGE = "skip", "overwrite", "fail", "upsert", "merge"
STRATEGIES = (SKIP, OVERWRITE, FAIL, UPSERT, MERGE)
RESOLUTIONS = {SKIP: "skipped", OVERWRITE: "overwritten", FAIL: "failed", UPSERT: "updated", MERGE: "merged"}
UNIQUE_VIOLATION, NOT_NULL_VIOLATION = "23505", "23502"
TRIES = 4
COPY_BYTES = 1 << 17
TEMP_BUFFERS = "32MB"  # a transaction's staged rows stay in memory


@dataclass(frozen=True)
class Outcome:
    """What became of some batches: rows in them, rows that were meant, inserted, there already, in conflict, sampled."""

    batches: tuple[Batch, ...]
    rows: int = 0
    meant: int = 0
    inserted: int = 0
    same: int = 0
    conflicts: int = 0
    sampled: int = 0
    lines: bytes = b""
    failure: Optional[ArchiverError] = None

    @property
    def whole(self) -> bool:
        """True if no row of the batches was left out by a filter."""
        return self.failure is None and self.meant == self.rows


class Conflict(Failed):
    """Another version of a row is in the table, and the strategy is to fail; `outcome` says how many."""

    def __init__(self, outcome: Outcome, title: str) -> None:
        super().__init__(f"{outcome.conflicts} rows of {outcome.batches[0].name} are in {title} with another content",
                         hint="nothing of this batch was restored; --conflict-strategy skip, overwrite, upsert or merge settles such rows, "
                              "--conflicts FILE names them")
        self.outcome = outcome


class Loader:
    """One connection that loads batch after batch. `statements_of` gives the SQL for a batch line, or refuses its shape;
    `fence` is called in each transaction before its first row goes in, and raises if it must not; `note` gets to know, in the
    transaction, batches that are in the table whole once it commits."""

    def __init__(self, store: Store, database: Database, target: Target, strategy: str, run: str, *, silent: bool,
                 statements_of: Callable[[dict[str, Any]], Statements], fence: Optional[Callable[[connect.Connection], None]] = None,
                 note: Optional[Callable[[connect.Connection, Sequence[Batch]], None]] = None) -> None:
        self._store, self._database, self._target, self._strategy, self._run = store, database, target, strategy, run
        self._silent, self._statements_of, self._fence, self._note = silent, statements_of, fence, note
        self._connection: Optional[connect.Connection] = None
        self._ended = False
        self.pid: Optional[int] = None
        self.careful = not target.empty

    def load(self, batches: Sequence[Batch]) -> Iterator[Outcome]:
        """Load batches in one transaction for each shape; where that fails, one by one. A batch that is damaged, or whose
        rows the table does not take, is an Outcome with its failure; the rest is raised, with nothing of the batch done."""
        try:
            groups = list(self._of_one_shape(batches))
        except ArchiverError as error:  # a commit record cannot be read: one by one it will be said which
            if not _of_the_batch(error):
                raise
            groups = []
            yield from map(self._alone, batches)
        for group in groups:
            try:
                outcome = self._again(group, self.careful)
            except ArchiverError as error:
                if isinstance(error, Conflict) and len(group) == 1 or not isinstance(error, Conflict) and not _of_the_batch(error):
                    raise
                log.debug("restore.alone", f"{len(group)} batches are loaded one by one: {error.msg}", sqlstate=error.sqlstate)
            else:
                yield outcome
                continue
            for batch, _ in group:
                yield self._alone(batch)

    def cut(self) -> None:
        """End the wait for the server from another thread, for good; what is not committed is rolled back."""
        self._ended = True
        if self._connection is not None:
            connect.cut(self._connection)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def _of_one_shape(self, batches: Sequence[Batch]) -> Iterator[list[tuple[Batch, dict[str, Any]]]]:
        """The batches with their commit records; those whose rows have the same columns together."""
        lines = [(batch, verified.commit_record(self._store, batch)) for batch in batches]
        for _, pairs in itertools.groupby(lines, key=lambda pair: (pair[1]["batch"]["columns"], pair[1]["batch"]["key"])):
            yield list(pairs)

    def _alone(self, batch: Batch) -> Outcome:
        try:
            return self._again([(batch, verified.commit_record(self._store, batch))], True)
        except ArchiverError as error:
            if isinstance(error, Conflict) or not _of_the_batch(error):
                raise
            return Outcome((batch,), rows=batch.rows or 0, failure=_explained(error, batch))

    def _again(self, lines: list[tuple[Batch, dict[str, Any]]], careful: bool) -> Outcome:
        """One transaction, tried again while network or locks are to blame."""
        for tried in range(1, TRIES + 1):
            try:
                return self._transaction(lines, careful)
            except (NetworkError, Retryable) as error:
                if tried == TRIES or self._ended:
                    raise
                log.warning("restore.retry", error.msg, detail=error.detail, tried=tried)
                self._store.connection.pause(tried)
                careful = True  # a COMMIT whose answer was lost may have been one
        raise AssertionError("unreachable")

    def _transaction(self, lines: list[tuple[Batch, dict[str, Any]]], careful: bool) -> Outcome:
        connection = self._open()
        made = self._statements_of(lines[0][1])
        try:
            connect.execute(connection, "BEGIN")
            staged, wrapped = 0, False
            for _, line in lines:
                rows, odd = self._stage(connection, line)
                staged, wrapped = staged + rows, wrapped or odd
            made = made if wrapped else made.direct
            points.point("restore.staged")
            if self._fence is not None:
                self._fence(connection)
            for statement in self._target.silence() if self._silent else ():
                connect.execute(connection, statement)
            outcome = self._insert(connection, made, tuple(batch for batch, _ in lines), staged, careful)
            for statement in self._target.wake() if self._silent else ():
                connect.execute(connection, statement)
            if self._note is not None and outcome.whole:
                self._note(connection, outcome.batches)
            points.point("restore.inserted")
            if connect.execute(connection, "COMMIT") != "COMMIT":
                raise Failed("the server answered COMMIT with a rollback", hint="nothing of the batch was restored")
            points.point("restore.committed")
            return outcome
        except BaseException:
            self._roll_back(connection)
            raise

    def _stage(self, connection: connect.Connection, line: dict[str, Any]) -> tuple[int, bool]:
        """Copy a batch into the temporary table; its rows, once they are proven, and whether arrays in it may be wrapped."""
        stream = verified.Stream(verified.chunks(self._store, line))
        try:
            with connect.errors(), connection.cursor() as cursor:
                cursor.copy_expert(statements.COPY_IN, stream, COPY_BYTES)
        except ArchiverError:
            if stream.error is not None:
                raise stream.error from None
            raise
        return int(line.get("deleted", line["batch"])["rows"]), stream.wrapped

    def _insert(self, connection: connect.Connection, made: Statements, batches: tuple[Batch, ...], staged: int, careful: bool) -> Outcome:
        if made.casts and (losing := connect.scalar(connection, made.losing())):
            raise Mismatch(f"{losing} rows of {batches[0].name} would lose something in the types of {self._target.place.title}",
                           hint="nothing of this batch was restored; widen the columns that the differences name, or restore --into "
                                "another table with --create-table")
        if careful:
            outcome = self._settle(connection, made, batches, staged)
        else:
            meant = connect.scalar(connection, made.count()) if made.filtered else staged
            inserted = _rows(connect.execute(connection, made.insert()))
            outcome = Outcome(batches, staged, meant, inserted)
        put = outcome.inserted + outcome.same + outcome.conflicts
        if put != outcome.meant:
            raise Mismatch(f"{outcome.meant} rows of {batches[0].name} were meant, and the table took {put}",
                           hint="a trigger or a rule of the table drops rows; --disable-triggers keeps triggers from firing")
        looked, wrong = connect.row(connection, made.sample(outcome.meant, careful, self._strategy in (SKIP, MERGE)))
        if wrong:
            raise Mismatch(f"{wrong} of {looked} sampled rows of {batches[0].name} are not in the table as they were archived",
                           hint="nothing of this batch was restored; a trigger of the table changes rows, or a column is always generated")
        return Outcome(batches, outcome.rows, outcome.meant, outcome.inserted, outcome.same, outcome.conflicts, looked, outcome.lines)

    def _settle(self, connection: connect.Connection, made: Statements, batches: tuple[Batch, ...], staged: int) -> Outcome:
        """Insert beside rows that are there: the same ones stay as they are, others are settled as the strategy says."""
        connect.execute(connection, made.clash())
        same, conflicts = connect.row(connection, made.clashes())
        meant = connect.scalar(connection, made.count()) if made.filtered else staged
        lines = io.BytesIO()
        if conflicts:
            fields = statements.conflict_fields(batches[0], self._target.place.title, RESOLUTIONS[self._strategy])
            with connect.errors(), connection.cursor() as cursor:
                cursor.copy_expert(made.clash_lines(fields), lines)
            if self._strategy == FAIL:
                raise Conflict(Outcome(batches, staged, meant, 0, same, conflicts, 0, lines.getvalue()), self._target.place.title)
        if self._strategy == UPSERT:
            inserted = _rows(connect.execute(connection, made.upsert())) - conflicts
        else:
            inserted = _rows(connect.execute(connection, made.insert_missing()))
        if conflicts and (self._strategy == MERGE or self._strategy == OVERWRITE and made.changeable):
            changed = _rows(connect.execute(connection, made.merge() if self._strategy == MERGE else made.overwrite()))
            if changed != conflicts:
                raise Mismatch(f"{conflicts} rows of {batches[0].name} were to be {RESOLUTIONS[self._strategy]}, and {changed} were",
                               hint="the key is not unique in the table, or a trigger keeps rows as they are; nothing was changed")
            if self._strategy == MERGE and (again := connect.scalar(connection, made.unmerged())):
                raise Mismatch(f"{again} rows of {batches[0].name} would change again if they were merged again",
                               hint="a restore may have to be run again: let merging twice come to the same as once, as greatest() and "
                                    "coalesce() do; nothing was changed")
        return Outcome(batches, staged, meant, inserted, same, conflicts, 0, lines.getvalue())

    def _open(self) -> connect.Connection:
        if self._connection is None or self._connection.closed:
            made = connect.connect(self._database, purpose="restore", run=self._run,
                                   transaction_timeout_s=self._database.transaction_timeout_s)
            connect.execute(made, f"SET temp_buffers = '{TEMP_BUFFERS}'")
            for statement in statements.CREATE:
                connect.execute(made, statement)
            self._connection, self.pid = made, made.get_backend_pid()
        return self._connection

    def _roll_back(self, connection: connect.Connection) -> None:
        """Back to no transaction, or to no connection: the next batch opens another."""
        try:
            if not connection.closed:
                connect.execute(connection, "ROLLBACK")
                return
        except ArchiverError as error:
            log.debug("restore.broken", f"the connection is given up: {error.msg}")
        connection.close()


def _rows(tag: str) -> int:
    """The rows of a command tag, as in INSERT 0 100."""
    return int(tag.rpartition(" ")[2])


def _of_the_batch(error: ArchiverError) -> bool:
    """True if this batch is to blame, and another may well go in: damaged objects, values that the table does not take."""
    return (isinstance(error, (Mismatch, InputError)) or isinstance(error, NotFound)
            or isinstance(error, Failed) and (error.sqlstate or "")[:2] in ("22", "23", "P0"))


def _explained(error: ArchiverError, batch: Batch) -> ArchiverError:
    """The error with the batch in it, and what its SQLSTATE means here."""
    if error.sqlstate is None:
        return error
    means = {NOT_NULL_VIOLATION: "a column of the table is NOT NULL, and archived rows hold NULL there",
             UNIQUE_VIOLATION: "a unique constraint beside the key"}.get(error.sqlstate)
    return Failed(f"{batch.name} does not go into the table: {error.msg}", detail=means, sqlstate=error.sqlstate,
                  hint="nothing of this batch was restored")
