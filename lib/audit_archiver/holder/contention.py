"""What a run does about those whom it makes wait: says so, pauses, ends, and always gives way to who alters a table.

Looked at once a second, by the watchdog, whatever the batches are doing meanwhile.
"""

from __future__ import annotations

import time
from typing import Optional, Sequence

from audit_archiver import log
from audit_archiver.config.model import Locking
from audit_archiver.exits import Failed, Retryable
from audit_archiver.holder.batch import Batch
from audit_archiver.holder.session import DatabaseSession
from audit_archiver.postgres import waiting
from audit_archiver.postgres.waiting import Waiting

WARN, PAUSE, ABORT = "warn", "pause", "abort"


class GaveWay(Failed):
    """Others wait for us, and the configuration says to end then."""


class Contention:
    """The sessions that wait for a run's batches, and since when."""

    def __init__(self, locking: Locking) -> None:
        self._locking = locking
        self._since: dict[int, float] = {}
        self._said: set[object] = set()

    def look(self, session: DatabaseSession, batches: Sequence[Batch]) -> bool:
        """True if batches are to pause. Raises Retryable if somebody waits for a table, GaveWay if the run is to end for who waits for rows."""
        pids = [batch.transaction.connection.info.backend_pid for batch in batches if batch.transaction.connection.closed == 0]
        found = waiting.behind(session.watch, pids) if pids else []
        now = time.monotonic()
        self._since = {each.pid: self._since.get(each.pid, now) for each in found}
        long = [each for each in found if now - self._since[each.pid] >= self._locking.others_wait_s]
        table = next((each for each in long if each.for_table), None)
        if table is not None:
            raise Retryable(f"the open batches are rolled back because {table.words} waits for an exclusive lock on the table {table.table}")
        self._tell_of_strong_locks(session, pids)
        return self._answer(long, now)

    def _answer(self, long: Sequence[Waiting], now: float) -> bool:
        how: Optional[str] = self._locking.when_others_wait if long else None
        for each in long:
            text = f"{each.words} waits for rows of ours, for {now - self._since[each.pid]:.0f} s until now"
            if how == ABORT:
                raise GaveWay(f"the run gives way: {text}", hint="run again when it is quieter, or with a smaller batch_size; "
                              "'locking: {when_others_wait: warn}' only says so, 'mode: late' locks no rows during the upload")
            if each.pid not in self._said:
                self._said.add(each.pid)
                log.warning("lock.contention", text, hint="no batch begins before it goes on" if how == PAUSE else
                            "a smaller batch_size locks rows for a shorter time; 'locking.mode: late' not during the upload")
        return how == PAUSE

    def _tell_of_strong_locks(self, session: DatabaseSession, pids: Sequence[int]) -> None:
        for table, mode in waiting.strong_locks(session.watch, pids) if pids else ():
            if (table, mode) not in self._said:
                self._said.add((table, mode))
                log.warning("lock.escalated", f"a batch holds {mode} on the whole table {table}: others may have to wait for it",
                            hint="a trigger or a rule of the table takes it; this program locks rows only")
