"""The named operations on batches. There is no operation that commits and none that takes SQL.

A batch goes begun -> locked -> copied -> deleted -> committed; an operation out of order is refused. Errors at
begin and lock belong to the job: they are noted, the batch is rolled back and the next job goes on. Any later
error, or a client that disappears, fails the whole pipeline: nothing commits any more.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from typing import Any, Iterator, Optional

from audit_archiver import exits, log
from audit_archiver.config.model import Config
from audit_archiver.exits import ArchiverError, ConfigError, Failed, Mismatch
from audit_archiver.formats import schema
from audit_archiver.holder.batch import Batch, describe, name_left
from audit_archiver.holder.notes import JobKey, JobNotes, key_of
from audit_archiver.holder.session import DatabaseSession, Plan, Recover, scope_error
from audit_archiver.points import point


class Operations:
    """All open batches of a run and what may be done with them; each client calls from a thread of its own."""

    def __init__(self, config: Config, run: Optional[str], in_flight: int, recover: Recover, *,
                 numbers: Optional[dict[JobKey, int]] = None, leave: Optional[dict[JobKey, list[str]]] = None,
                 notes: Optional[dict[JobKey, JobNotes]] = None) -> None:
        self.config, self.run, self.in_flight = config, run, in_flight
        self.name = "h-" + secrets.token_hex(4)
        self.notes = {} if notes is None else notes
        self.failure: Optional[ArchiverError] = None
        self.failed_job: Optional[JobKey] = None
        self.failed_keys: list[str] = []
        self.batches: dict[str, Batch] = {}
        self.sessions: dict[str, DatabaseSession] = {}
        self._recover = recover
        self._numbers = {} if numbers is None else numbers
        self._leave = leave or {}
        self.changed = threading.Condition(threading.RLock())
        self._opening = threading.Lock()
        self._taken = 0
        self._alone = False
        self.draining = self.paused = False
        self.seconds: dict[str, float] = {}

    # -- operations of the protocol

    def begin(self, job: dict[str, Any]) -> dict[str, Any]:
        """Open a transaction for the next batch of `job`; waits for a free place."""
        schema.validate("job", job, "the job")
        if self.run is not None and job["run"] != self.run:
            raise ConfigError(f"the job belongs to run '{job['run']}', this holder serves '{self.run}'",
                              hint="give one holder the jobs of one aa-plan")
        notes = self._note(job)
        try:
            session = self._session(job)
            plan = session.plan(job, self._leave.get(key_of(job), []))
            if not self._wait_for_place(plan):
                return {"stop": True}
        except ArchiverError as error:
            raise self._job_failed(notes, error) from None
        try:
            transaction = session.transaction(plan)
        except ArchiverError as error:
            self._places(-1, plan)
            raise self._job_failed(notes, error) from None
        with self.changed:
            number = self._numbers[key_of(job)] = self._numbers.get(key_of(job), 0) + 1
            batch = Batch(f"t{number}-{secrets.token_hex(8)}", number, job, notes, session, plan, transaction)
            self.batches[batch.handle] = batch
            notes.first_at = notes.first_at or batch.begun_at
        self._refuse_after_failure(batch)
        return {"handle": batch.handle, "xid": batch.xid, "now": transaction.now, "number": number,
                "archived_at": transaction.now, "server": plan.server, "rows": notes.batch_rows,
                "host": session.database.host or "local"}

    def lock(self, handle: str, cursor: Optional[list[str]], limit: int) -> dict[str, Any]:
        """Lock the next rows after `cursor` and describe them; rows that would not come back exactly are left out."""
        with self._at_work(handle, "begun") as batch:
            try:
                locked = batch.transaction.lock(cursor, limit, roundtrip=self._roundtrip(batch.plan), leave=batch.plan.leave,
                                                row_bytes=self.config.resources.max_row_bytes)
                if locked.rows and not batch.plan.cascade:
                    batch.transaction.refuse_children()
            except ArchiverError as error:
                self._drop(batch)
                raise self._job_failed(batch.notes, error) from None
            point("holder.lock.done")
            batch.plan.checked_once = True
            batch.locked, batch.passed, batch.state = locked, [locked], "locked"
            self._refuse_after_failure(batch)
        name_left(batch.plan.shape.title, locked, self.config.resources.max_row_mb)
        shape, described = batch.plan.shape, None if batch.plan.described else batch.plan.ddl
        batch.plan.described = batch.plan.described or bool(locked.rows)
        return {"rows": locked.rows, "skipped_locked": locked.skipped_locked,
                "first": locked.first, "last": locked.last,
                "keys_sha256": locked.keys_sha256, "shape_sha256": shape.sha256, "next": locked.next,
                "columns": [[column.name, column.type] for column in shape.ordered()],
                "table": describe(shape, batch.session.database.host, batch.plan.server["version"], locked.range,
                                  ddl=described)}

    def copy(self, handle: str, descriptor: int) -> dict[str, Any]:
        """Write the batch's rows into `descriptor`."""
        with self._at_work(handle, "locked") as batch, self._fatal(batch):
            assert batch.locked is not None
            rows, size, digest = batch.transaction.copy(descriptor)
            if rows != batch.locked.rows:
                raise Mismatch(f"{batch.title}: {batch.locked.rows} rows were locked and {rows} copied")
            batch.rows_sha256, batch.state = digest, "copied"
        return {"rows": rows, "bytes": size, "rows_sha256": digest}

    def delete(self, handle: str, line: dict[str, Any]) -> dict[str, Any]:
        """Delete the batch's rows, if `line` shows that just these rows were verified in the store."""
        with self._at_work(handle, "copied") as batch, self._fatal(batch):
            batch.require_verified(line, self.name)
            point("holder.delete.before")
            batch.session.lock.require(batch.transaction.connection, batch.plan.scope_oid, batch.title)
            assert batch.locked is not None
            deleted_at = batch.transaction.delete(batch.locked.rows, batch.locked.keys_sha256)
            batch.line, batch.deleted = line, {"at": deleted_at, "verdict": "FULL", "rows": batch.locked.rows}
            batch.state = "deleted"
            point("holder.delete.done")
        return {"rows": batch.locked.rows, "keys_sha256": batch.locked.keys_sha256, "at": deleted_at}

    def probe(self, handle: str) -> dict[str, Any]:
        """Say whether the batch's transaction is alive and ours."""
        batch = self.batches.get(handle)
        if batch is None:
            raise Failed(f"there is no open batch '{handle}'")
        with batch.busy, self._fatal(batch):
            batch.transaction.check()
        return {"state": batch.state, "age_s": round(batch.age_s, 1)}

    def abandon(self, handle: str) -> dict[str, Any]:
        """Roll a batch back and free its place: it was empty, or its stage gave it up."""
        batch = self.batches.get(handle)
        if batch is None or batch.state == "deleted":
            raise Failed(f"there is no batch '{handle}' that could be abandoned")
        with batch.busy:
            if batch.locked is not None and not batch.locked.rows:
                self._passed(batch)
            self._drop(batch)
        return {}

    def refuse(self, job: dict[str, Any]) -> dict[str, Any]:
        """Note a job that aa-plan refused, for the report and the exit code."""
        schema.validate("job", job, "the job")
        why = job.get("refused")
        if not why:
            raise Failed("a job without 'refused' cannot be refused")
        error = exits.ArchiverError(why["msg"], at=why.get("at"))
        error.code = why["code"]
        self._note(job).error = error
        return {}

    # -- used by the server and by the one who commits

    def fail(self, error: ArchiverError, batch: Optional[Batch] = None) -> ArchiverError:
        """The pipeline has failed: from here on nothing commits; open transactions are cancelled and rolled back.

        `batch` is the one to blame, if any; its job and, if it is one row, its key are kept for the next attempt. Returns
        why: where we have stood still for too long, that is the reason of everything that went wrong after it.
        """
        stood_still = next(filter(None, (session.lock.stood_still() for session in list(self.sessions.values()))), None)
        error, batch = (error, batch) if stood_still is None else (stood_still, None)
        with self.changed:
            if self.failure is None:
                self.failure = error
                if batch is not None:
                    self.failed_job = key_of(batch.notes.job)
                    if batch.locked is not None and batch.locked.rows == 1:
                        self.failed_keys = [json.dumps(batch.locked.first[1:], ensure_ascii=False, separators=(",", ":"))[1:-1]]
            open_batches = list(self.batches.values())
            self.changed.notify_all()
        for each in open_batches:
            if each.busy.acquire(blocking=False):
                try:
                    self._drop(each)
                finally:
                    each.busy.release()
            else:
                each.transaction.cancel()
        return error

    def drain(self) -> None:
        """Let batches in flight finish and begin no others."""
        with self.changed:
            self.draining = True
            self.changed.notify_all()

    def pause(self, wanted: bool) -> None:
        """Let batches in flight go on and begin no others, until it is taken back."""
        with self.changed:
            if wanted and not self.paused:
                log.info("run.paused", "no batch begins, since others wait for rows of ours")
            if self.paused and not wanted:
                log.info("run.resumed", "nobody waits for rows of ours any more, and batches begin again")
            self.paused = wanted
            self.changed.notify_all()

    @property
    def idle(self) -> bool:
        """True if no batch is open or about to be."""
        with self.changed:
            return self._taken == 0

    def committed(self, batch: Batch, line: dict[str, Any]) -> None:
        """Book a committed batch and free its place."""
        notes = batch.notes
        assert batch.locked is not None
        with self.changed:
            notes.rows += batch.locked.rows
            notes.batches += 1
            notes.bytes += line["serialized"]["data"]["bytes"]
            notes.gz_bytes += line["serialized"]["data"]["gz_bytes"]
            self._passed(batch)
            notes.last_at = time.monotonic()
            notes.adapt(notes.last_at - batch.begun_at)
            self.batches.pop(batch.handle, None)
        batch.session.give_back(batch.transaction)
        self._places(-1, batch.plan)

    def spent(self, phase: str, seconds: float) -> None:
        """Add to the time that a phase of the pipeline has taken (REQ-OBS-008); phases overlap."""
        with self.changed:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def open_batches(self) -> list[Batch]:
        """The batches that are neither committed nor rolled back."""
        with self.changed:
            return list(self.batches.values())

    def close(self) -> None:
        """Roll back what is open and end every connection."""
        for batch in self.open_batches():
            if not batch.busy.acquire(blocking=False):
                batch.transaction.cancel()
                batch.busy.acquire()
            try:
                self._drop(batch)
            finally:
                batch.busy.release()
        for session in self.sessions.values():
            session.close()

    # -- inside

    def _note(self, job: dict[str, Any]) -> JobNotes:
        with self.changed:
            return self.notes.setdefault(key_of(job), JobNotes(job, job.get("batch_size") or 1))

    def _session(self, job: dict[str, Any]) -> DatabaseSession:
        with self._opening:
            found = self.sessions.get(job["database"])
            if found is None:
                database = self.config.database(job["database"])
                if database is None:
                    raise ConfigError(f"the configuration has no database '{job['database']}'", at=str(self.config.path))
                self.run = self.run or job["run"]
                found = self.sessions[job["database"]] = DatabaseSession(self.config, database, self.run, self._recover)
            return found

    def _wait_for_place(self, plan: Plan) -> bool:
        """Wait until fewer than `in_flight` batches are open, and take a place; False when no batch shall begin any more.

        A table with foreign keys waits until it is alone (S3).
        """
        with self.changed:
            while self.failure is None and not self.draining and (self.paused or not self._place_is_free(plan)):
                self.changed.wait()
            if self.failure is not None:
                raise Failed(f"the run was stopped: {self.failure.msg}")
            if not self.draining:
                self._places(+1, plan)
            return not self.draining

    def _place_is_free(self, plan: Plan) -> bool:
        if self._taken == 0:
            return True
        return self._taken < self.in_flight and not plan.shape.alone and not self._alone

    def _places(self, change: int, plan: Plan) -> None:
        with self.changed:
            self._taken += change
            self._alone = change > 0 and plan.shape.alone
            self.changed.notify_all()

    @contextlib.contextmanager
    def _at_work(self, handle: str, state: str) -> Iterator[Batch]:
        """The open batch `handle`, nobody else's meanwhile; Failed unless it is in `state`."""
        batch = self._batch(handle)
        with batch.busy:
            self._batch(handle)  # it may have been dropped while we waited
            if batch.state != state:
                raise Failed(f"{batch.title} is {batch.state}, not {state}")
            yield batch

    def _batch(self, handle: str) -> Batch:
        with self.changed:
            if self.failure is not None:
                raise Failed(f"the run was stopped: {self.failure.msg}")
            batch = self.batches.get(handle)
        if batch is None:
            raise Failed(f"there is no open batch '{handle}' in this holder", hint="it was rolled back or belongs to another run")
        return batch

    def _passed(self, batch: Batch) -> None:
        """Note how far the sweep has come and what it left: to the end of `batch`, or once the batches before it have committed.

        What is swept again is not counted again: until here it was not counted. Not after a failure: those before it may
        just have been rolled back, and then the table would seem swept.
        """
        with self.changed:
            if self.failure is not None:
                return
            earlier = [each for each in self.batches.values() if each.notes is batch.notes and each.locked and each.number < batch.number]
            if earlier:  # `batch` is empty: else it would not come out before them
                earlier[-1].passed += batch.passed
                return
            notes, end = batch.notes, batch.passed[-1].next
            notes.cursor, notes.swept = end or notes.cursor, end is None
            for locked in batch.passed:
                notes.skipped_locked += locked.skipped_locked
                notes.inexact += locked.inexact
                notes.too_wide += locked.too_wide

    def _roundtrip(self, plan: Plan) -> Optional[str]:
        if self.config.roundtrip == "never":
            return None
        return "all" if self.config.roundtrip == "always" or not plan.checked_once else "some"

    def _refuse_after_failure(self, batch: Batch) -> None:
        with self.changed:
            failure = self.failure
        if failure is not None:
            with batch.busy:
                self._drop(batch)
            raise Failed(f"the run was stopped: {failure.msg}")

    def _drop(self, batch: Batch) -> None:
        """Roll back and free the place, once."""
        with self.changed:
            known = self.batches.pop(batch.handle, None) is not None
        if known:
            batch.transaction.rollback()
            batch.session.give_back(batch.transaction)
            self._places(-1, batch.plan)

    def _job_failed(self, notes: JobNotes, error: ArchiverError) -> ArchiverError:
        with self.changed:
            if self.failure is None and notes.error is None:
                notes.error = error
        of_job = scope_error(error, self.config.locking.scope == "table")
        error.scope = "job" if self.failure is None and of_job else None  # type: ignore[attr-defined]
        return error

    def _fatal(self, batch: Batch) -> _Fatal:
        return _Fatal(self, batch)


class _Fatal:
    """Any error inside fails the whole pipeline and names the batch's job."""

    def __init__(self, operations: Operations, batch: Batch) -> None:
        self._operations, self._batch = operations, batch

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: Optional[BaseException], _trace: Any) -> None:
        operations, batch = self._operations, self._batch
        if error is None:
            if operations.failure is not None:
                operations._drop(batch)
                raise Failed(f"the run was stopped: {operations.failure.msg}")
            return
        operations._drop(batch)
        if isinstance(error, ArchiverError):
            operations.fail(error, batch)
        elif isinstance(error, OSError):
            operations.fail(Failed(f"{batch.title}: the reader of the rows went away"))
