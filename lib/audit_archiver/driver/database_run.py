"""One database's part of a run: lock, recover, plan, pipeline, and the attempts that follow a failure.

A failed pipeline is torn down, recovery runs, and it is started again from the last committed batch, never
patched up (crash-only). A failure that follows one table's rows makes its batches smaller until the row that
fails alone is known; that row is named and left in place (postgres.md S5). Other failures are tried again
after a pause while they can pass, and end the database's part otherwise.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from datetime import datetime
from types import MappingProxyType
from typing import Any, Callable, Mapping, Optional, Sequence

from audit_archiver import lines, log
from audit_archiver.config import staging_root
from audit_archiver.config.model import Config, Database
from audit_archiver.driver import children, late, pipeline
from audit_archiver.driver.aa_txn import holder_environment, places
from audit_archiver.driver.children import Child
from audit_archiver.driver.room import Room
from audit_archiver.exits import CONFIG, LOCKED, PERMISSION, RESOURCE, ArchiverError, Failed
from audit_archiver.holder.contention import GaveWay
from audit_archiver.holder.notes import JobKey, JobNotes, key_of
from audit_archiver.holder.operations import Operations
from audit_archiver.holder.server import Server
from audit_archiver.holder.session import DatabaseSession, Recover, scope_error
from audit_archiver.points import point

STAGES = ("aa-select", "aa-serialize", "aa-upload", "aa-verify", "aa-delete")
RECORD = "aa-record"
ATTEMPTS = 3
BISECT_BY = 10
LEAVE_MOST = 10  # rows of one table that may fail alone; each costs some restarts, and a table where all fail has another trouble
RECORD_GRACE_S = 600.0
PIPE_BYTES = 1 << 20

# plan(jobs already known or None) -> job lines; called between recovery and the first batch
Plan = Callable[[DatabaseSession], list[dict[str, Any]]]


class DatabaseRun:
    """The state of a database's part that outlives its attempts: notes, batch numbers, keys to leave in place."""

    def __init__(self, settings: Config, database: Database, run: str, env: Mapping[str, str], flags: Sequence[str],
                 recover: Recover, plan: Plan, signals: pipeline.Signals, tick: Callable[[DatabaseRun], None]) -> None:
        self.settings, self.database, self.run = settings, database, run
        self.notes: dict[JobKey, JobNotes] = {}
        self.jobs: list[dict[str, Any]] = []
        self.failure: Optional[ArchiverError] = None
        self.left: list[tuple[JobKey, str]] = []
        self.timings: dict[str, float] = {}
        self._env, self._flags, self._signals = env, list(flags), signals
        self._recover, self._plan, self._tick = recover, plan, tick
        self._numbers: dict[JobKey, int] = {}
        self._leave: dict[JobKey, list[str]] = {}
        self._misses: dict[Optional[JobKey], int] = {}
        self._attempts = 0
        self._short = False
        directories = [staging_root(settings, None, env), *filter(None, [settings.s3.local_fallback_dir])]
        self._room = Room(directories, settings.resources.min_free_disk_gb)

    def archive(self) -> None:
        """Archive everything that was planned; what could not be done stands in `failure` and in the notes' errors."""
        while (short := self._room.short()) is None:
            before = self._committed()
            self._attempts += 1
            late_mode = self.settings.locking.mode == "late"
            failure, blamed, key_texts = (self._attempt_late(), None, []) if late_mode else self._attempt()
            self.failure = failure
            if self._signals.count:
                return
            if failure is None and self._room.short() is None and not self._retry_jobs():
                return
            if self._committed() > before:
                self._misses.clear()
            if failure is not None and not self._again(failure, blamed, key_texts):
                return
        if self._attempts == 0 or self.failure is not None or self._unfinished():
            self.failure = short

    @property
    def wrote(self) -> bool:
        """True if this run may have put anything about the database into the bucket."""
        return self._attempts > 1 or any(notes.batches for notes in self.notes.values())

    def _committed(self) -> int:
        return sum(notes.rows for notes in self.notes.values())

    def _unfinished(self) -> bool:
        """True if a job has neither come to its end nor failed."""
        planned = [self.notes.get(key_of(job)) for job in self.jobs if "refused" not in job]
        return any(notes is None or not (notes.finished or notes.error) for notes in planned)

    def _look_around(self) -> bool:
        """Several times a second: show how far we are; True once no more batches shall begin."""
        self._tick(self)
        known, short = self._short, self._room.short()
        if short is not None and not known:
            self._short = True
            log.warning("disk.short", f"{self.database.name}: {short.msg}; those in flight are finished", hint=short.hint)
        return short is not None

    def _attempt(self) -> tuple[Optional[ArchiverError], Optional[JobKey], list[str]]:
        """One pipeline from lock to record: (why it failed, the job to blame, the key of its only row)."""
        operations = Operations(self.settings, self.run, self.settings.in_flight_batches, self._recover,
                                numbers=self._numbers, leave=self._leave, notes=self.notes)
        server = Server(operations, self._env)
        processes: list[Child] = []
        record: Optional[Record] = None
        try:
            session = DatabaseSession(self.settings, self.database, self.run, self._recover)
            operations.sessions[self.database.name] = session
            point("archive.recovered")
            with session.lock.beating():
                todo = self._todo(session)
            env = {**holder_environment(self._env, self.settings, server), "AA_RUN": self.run}
            feed = self._start(processes, env)
            record = Record(env, self._flags)
            server.serve()  # only now: where other threads run no stage can be forked
            self._feed(feed, todo)
            point("archive.pipeline.started")
            failure = pipeline.run(processes, operations, server, self._signals, record.write, self._look_around)
            record_failure = record.finish()
            point("archive.pipeline.ended")
            for stage, seconds in {**server.timings(), "record": record.seconds}.items():
                self.timings[stage] = self.timings.get(stage, 0.0) + seconds
            return failure or record_failure, operations.failed_job, operations.failed_keys
        except ArchiverError as error:
            return operations.fail(error), None, []
        finally:
            children.end(processes)
            if record is not None:
                record.finish()
            server.close()
            operations.close()

    def _attempt_late(self) -> Optional[ArchiverError]:
        """One pipeline without a holder: lock, recover and plan first, then let go, since aa-delete takes the lock itself."""
        processes: list[Child] = []
        try:
            session = DatabaseSession(self.settings, self.database, self.run, self._recover)
            try:
                with session.lock.beating():
                    todo = [job for job in self._todo(session) if "refused" not in job and self._may_begin(session, job)]
            finally:
                session.close()
            if not todo:
                return None
            env = {**self._env, "AA_RUN": self.run, **places(self.settings, self._env)}
            with tempfile.NamedTemporaryFile(prefix="aa-outcomes-") as outcomes:
                flags = {"aa-select": ["--outcomes", outcomes.name]}
                if any(job.get("force_rearchive") for job in todo):
                    flags["aa-delete"] = ["--force-rearchive"]
                self._feed(self._start(processes, env, (*STAGES, RECORD), flags), todo)
                return late.run(processes, self.notes, len(todo), outcomes.name, self._signals, self._look_around)
        except ArchiverError as error:
            return error
        finally:
            children.end(processes)

    def _may_begin(self, session: DatabaseSession, job: dict[str, Any]) -> bool:
        """True unless something forbids this one job, which is noted: what the holder finds when a job begins."""
        notes = self.notes.setdefault(key_of(job), JobNotes(job, job["batch_size"]))
        try:
            session.plan(job, [])
        except ArchiverError as error:
            if not scope_error(error, session.per_table):
                raise
            notes.error = error
        return notes.error is None

    def _start(self, processes: list[Child], env: Mapping[str, str], stages: Sequence[str] = STAGES,
               flags_of: Mapping[str, Sequence[str]] = MappingProxyType({})) -> int:
        """Start the stages in a pipe, some with flags of their own; returns the descriptor that feeds the first one."""
        read_end, feed = os.pipe()
        lines.widen(feed, PIPE_BYTES)
        stdin: Any = os.fdopen(read_end, "rb")
        for stage in stages:
            with stdin:
                flags = [*self._flags, *flags_of.get(stage, ())]
                processes.append(children.start_stage(stage, flags, env, stdin))
            stdin = processes[-1].stdout
            lines.widen(stdin.fileno(), PIPE_BYTES)
        return feed

    def _feed(self, descriptor: int, jobs: list[dict[str, Any]]) -> None:
        """Write the job lines from a thread: a thousand of them do not fit into a pipe."""
        data = b"".join(map(lines.dump, jobs))

        def write() -> None:
            try:
                with open(descriptor, "wb") as out:
                    out.write(data)
            except BrokenPipeError:
                log.debug("jobs.unread", "aa-select ended before it had read every job")

        threading.Thread(target=write, name="jobs", daemon=True).start()

    def _todo(self, session: DatabaseSession) -> list[dict[str, Any]]:
        """The jobs of this attempt: all at first, later what is unfinished, planned anew where the table changed."""
        planned = self._plan(session)
        if not self.jobs:
            self.jobs = planned
            return planned
        todo = []
        for job in planned:
            notes = self.notes.get(key_of(job))
            if notes is None:
                todo.append(job)
            elif not notes.swept and notes.error is None and "refused" not in job:
                todo.append({**notes.unfinished(), "shape_sha256": job["shape_sha256"], "cutoff": notes.job["cutoff"]})
        return todo

    def _retry_jobs(self) -> bool:
        """Clear the errors of jobs that may go better next time; True if there are any."""
        again = False
        for key, notes in self.notes.items():
            if notes.error is not None and notes.error.retry and self._misses.setdefault(key, 0) < ATTEMPTS - 1:
                self._misses[key] += 1
                log.warning("job.retry", f"{key[1]}.{key[2]}: {notes.error.msg}; trying again", code=notes.error.code)
                notes.error, again = None, True
        if again:
            self._pause(max(self._misses.values()))
        return again

    def _again(self, failure: ArchiverError, blamed: Optional[JobKey], key_texts: list[str]) -> bool:
        """Decide what follows a failed pipeline; True to start it again."""
        if isinstance(failure, GaveWay) or failure.code in (CONFIG, LOCKED, PERMISSION) or failure.code == RESOURCE and not failure.retry:
            return False
        notes = self.notes.get(blamed) if blamed else None
        misses = self._misses[blamed] = self._misses.get(blamed, 0) + 1
        if notes is None:
            if misses >= ATTEMPTS:
                return False
            log.warning("pipeline.retry", f"{self.database.name}: {failure.msg}; attempt {misses + 1} of {ATTEMPTS}", code=failure.code)
            self._pause(misses)
            return True
        if key_texts and misses >= ATTEMPTS:
            if len(self._leave.get(key_of(notes.job), ())) >= LEAVE_MOST:
                failure.hint = f"{LEAVE_MOST} rows of this table were left in place already, so it is given up for this run"
                failure.retry = False
                notes.error = failure
            else:
                self._leave_in_place(blamed, notes, key_texts, failure)
            return True
        # smaller batches: gently while the failure can pass, then quickly down to the row that fails alone
        notes.batch_rows = max(1, notes.batch_rows // (2 if failure.retry and misses < ATTEMPTS else BISECT_BY))
        log.warning("pipeline.retry", f"{notes.job['schema']}.{notes.job['table']}: {failure.msg}; again with batches of {notes.batch_rows} rows",
                    code=failure.code)
        if failure.retry:
            self._pause(misses)
        return True

    def _leave_in_place(self, key: Optional[JobKey], notes: JobNotes, key_texts: list[str], failure: ArchiverError) -> None:
        assert key is not None
        for text in key_texts:
            title = f"{notes.job['schema']}.{notes.job['table']}"
            log.error("row.left.failed", f"the row of '{title}' with this key fails alone and stays in the table: {failure.msg}",
                      key=text)
            self.left.append((key, text))
        self._leave.setdefault(key, []).extend(key_texts)
        notes.batch_rows = notes.job["batch_size"]
        self._misses.clear()

    def _pause(self, misses: int) -> None:
        """Exponential backoff, ended early by a signal (REQ-ERR-005)."""
        deadline = time.monotonic() + self.settings.s3.pause_s(misses)
        while time.monotonic() < deadline and not self._signals.count:
            time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))


class Record:
    """aa-record beside the pipeline: gets each line after its COMMIT, outlives a failed pipeline to finish them."""

    def __init__(self, env: Mapping[str, str], flags: Sequence[str]) -> None:
        self._recorded = tempfile.TemporaryFile()
        outside = {key: value for key, value in env.items() if key != "AA_TXN"}
        self._process = children.start_stage(RECORD, flags, outside, subprocess.PIPE, self._recorded)
        self._given = 0
        self._sent: list[float] = []
        self.seconds = 0.0
        self._finished: Optional[ArchiverError] = None
        self._done = False

    def write(self, line: bytes) -> None:
        """Hand on a committed line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed("aa-record ended early; the next recovery records what is committed") from None
        self._given += 1
        self._sent.append(time.time())

    def finish(self) -> Optional[ArchiverError]:
        """End its input, wait until every line is recorded; why not, or None."""
        if self._done:
            return self._finished
        self._done = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            log.debug("record.gone", "aa-record had ended already")
        try:
            code = self._process.wait(RECORD_GRACE_S)
        except subprocess.TimeoutExpired:
            children.end([self._process])
            code = None
        self._recorded.seek(0)
        recorded = self._read_times()
        self._recorded.close()
        if code != 0 or recorded != self._given:
            self._finished = Failed(f"aa-record recorded {recorded} of {self._given} committed batches and ended with code {code}",
                                    hint="recovery records the others")
            self._finished.retry = True
            self._finished.code = code if code in (3, 5, 6, 7) else self._finished.code
        return self._finished

    def _read_times(self) -> int:
        """How many lines were recorded; adds up in `seconds` how long each took since it was sent and the one before was done."""
        count, free_at = 0, 0.0
        for sent, line in zip(self._sent, self._recorded):
            if not line.endswith(b"\n"):
                break  # it was killed while it wrote this one
            at = lines.parse(line, "aa-record's output")["recorded"]["at"]
            done_at = datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()
            self.seconds += max(0.0, done_at - max(sent, free_at))
            count, free_at = count + 1, done_at
        return count
