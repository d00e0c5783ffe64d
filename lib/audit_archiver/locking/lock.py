"""The lock that a run holds on a database, or on tables of it, from `take` until `release`.

    lock = Lock(settings, database, control, run)
    lock.take(None)                                  the database; {oid: "schema.table"} for tables
    lock.require(connection, table_oid, title)       in the transaction that deletes, right before it does
    lock.release()

PostgreSQL's keys come first, and have the last word: while they are held no other run of this database is at work. The
record of the configured backend (Redis, a file) comes on top. It keeps runs apart that do not meet on one server: the old
primary and the new one after a failover, a copy with the same configuration.

Who has stood still for so long that its lock counts as stale must take it for lost, whether or not somebody has taken it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import Iterator, Mapping, Optional

from audit_archiver import log
from audit_archiver.config.model import Config, Database
from audit_archiver.exits import ArchiverError, LockHeld
from audit_archiver.formats import names
from audit_archiver.locking.file_locks import FileLocks
from audit_archiver.locking.record import Backend
from audit_archiver.locking.redis_locks import RedisLocks
from audit_archiver.postgres import connect, locks, witness

ABORTED_BY_ANOTHER = "25P02"  # in_failed_sql_transaction: of the statement before, which is not ours to judge
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # one that goes on while the machine sleeps


def backend(settings: Config) -> Optional[Backend]:
    """The configured backend beside PostgreSQL, or None."""
    locking = settings.locking
    if locking.backend == "redis":
        assert locking.redis_url is not None
        return RedisLocks(locking.redis_url)
    if locking.backend == "file":
        assert locking.lock_dir is not None
        return FileLocks(locking.lock_dir)
    return None


def name(settings: Config, database: Database, table: Optional[str] = None) -> str:
    """What a lock is called outside PostgreSQL: the place of the archive that runs under it write to."""
    place = f"{settings.s3.bucket}/{names.database_dir(settings.s3.prefix, database.name)}".rstrip("/")
    return place if table is None else f"{place}/{table}"


class Lock:
    """The lock of one run on one database; `control` is its connection, on which PostgreSQL's keys live. Any thread may call."""

    def __init__(self, settings: Config, database: Database, control: connect.Connection, run: Optional[str] = None) -> None:
        self.control, self.title = control, f"database '{database.name}'"
        self.stale_s, self.heartbeat_s = settings.locking.stale_s, settings.locking.heartbeat_s
        self._settings, self._database = settings, database
        self._owner = f"{f'run {run}' if run else 'a command'} on {socket.gethostname()}, process {os.getpid()}"
        self._backend = backend(settings)
        self._pid = control.info.backend_pid
        self._token = 0
        self._tables: Optional[list[int]] = []
        self._records: dict[Optional[int], tuple[str, int]] = {}
        self._beaten_at: Optional[float] = None

    def take(self, tables: Optional[Mapping[int, str]], what: Optional[str] = None) -> None:
        """Take the whole database with None, else the tables {oid: schema.table} too; `what` names it. Raises LockHeld, naming who has it."""
        began = time.clock_gettime(_CLOCK)
        self._token = locks.take(self.control, None if tables is None else [*tables], what or self.title, self.stale_s)
        self._beaten_at = began if self._beaten_at is None else self._beaten_at
        taken: list[Optional[int]] = [None] if tables is None else [*tables]
        try:
            for oid in taken if self._backend is not None else ():
                self._record(oid, None if tables is None or oid is None else tables[oid])
        except ArchiverError:
            for oid in taken:
                locks.untake(self.control, oid)
            raise
        self._tables = None if tables is None else [*(self._tables or ()), *tables]

    def enter(self, batch: connect.Connection, table_oid: Optional[int]) -> None:
        """Mark the transaction of `batch` as one under this lock, until it ends."""
        locks.enter(batch, table_oid, self.title)

    def require(self, batch: connect.Connection, table_oid: Optional[int], title: str) -> None:
        """Raise LockHeld unless the lock is ours, by PostgreSQL and by the backend: to be asked in the transaction that deletes.

        Raises NetworkError if the backend cannot be asked: nothing is deleted whose token was not checked.
        """
        self.require_awake()
        if not locks.still_held(batch, self._pid, self._token, table_oid):
            raise LockHeld(f"{title}: our control session no longer holds the lock, so nothing is deleted",
                           hint="it was ended by somebody, or another run has taken the lock; run again")
        if table_oid in self._records:
            self._beat_record(*self._records[table_oid])

    def beat(self) -> None:
        """A sign of life, at least every heartbeat_s. Raises LockHeld if the lock is lost, NetworkError if nobody answers."""
        self.require_awake()
        began = time.clock_gettime(_CLOCK)
        connect.scalar(self.control, "SELECT 1")
        for record in list(self._records.values()):
            self._beat_record(*record)
        self._beaten_at = began

    def stood_still(self) -> Optional[LockHeld]:
        """Why the lock must be taken for lost although nobody said so: it was not beaten for as long as makes it stale."""
        silent = 0.0 if self._beaten_at is None else time.clock_gettime(_CLOCK) - self._beaten_at
        if silent <= self.stale_s:
            return None
        return LockHeld(f"this run stood still for {silent:.0f} s, so another may have taken the lock of {self.title}: nothing more is deleted",
                        detail=f"a lock is stale after {self.stale_s:g} s without a heartbeat", hint="run again")

    def require_awake(self) -> None:
        """Raise what `stood_still` says. Once it has been said, no heartbeat is sent any more."""
        error = self.stood_still()
        if error is not None:
            raise error

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beat from a thread meanwhile. No stage may be forked inside."""
        end = threading.Event()
        thread = threading.Thread(target=self._beat_until, args=(end,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def release(self) -> None:
        """Give everything up and close the connection; who comes next is not refused (REQ-LOCK-014)."""
        for record in self._records.values():
            try:
                assert self._backend is not None
                self._backend.release(*record)
            except ArchiverError as error:
                log.warning("lock.left", f"the lock record '{record[0]}' could not be removed: {error.msg}",
                            hint="the next run on this server takes it over")
        self._records.clear()
        locks.release(self.control, self._tables)

    def _record(self, oid: Optional[int], table: Optional[str]) -> None:
        assert self._backend is not None
        place = witness.place(self.control)
        called = name(self._settings, self._database, table)
        token, left = self._backend.take(called, self._owner, f"{place.system}/{place.timeline}/{place.database_oid}", self.stale_s)
        self._records[oid] = called, token
        if left is not None:
            log.warning("lock.stale", f"the lock record '{called}' in {self._backend.title} was left behind and is replaced: {left.words}",
                        hint="its owner deletes nothing any more, if it lives")

    def _beat_record(self, called: str, token: int) -> None:
        assert self._backend is not None
        if not self._backend.beat(called, token):
            raise LockHeld(f"the lock '{called}' in {self._backend.title} is not ours any more, so nothing is deleted",
                           detail=f"its token was {token}", hint="somebody has taken it over or removed it; run again")

    def _beat_until(self, end: threading.Event) -> None:
        while not end.wait(self.heartbeat_s):
            try:
                self.beat()
            except LockHeld as error:
                log.error("lock.lost", error.msg, detail=error.detail, hint=error.hint)
                return
            except ArchiverError as error:  # whoever needs the connection finds out, and `require` asks again
                if error.sqlstate != ABORTED_BY_ANOTHER:
                    log.debug("lock.beat", f"a heartbeat of {self.title} failed: {error.msg}")
