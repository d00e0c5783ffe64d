"""Several batches in flight: while the server unpacks one, the next is fetched, unzipped and proven."""

from __future__ import annotations

import queue
import threading
from typing import Callable, Iterable, Iterator, Optional, Sequence

from audit_archiver import log
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import ArchiverError
from audit_archiver.restore.load import Loader, Outcome

STEP_S = 1.0
JOIN_S = 30.0


def groups(batches: Sequence[Batch], rows: int) -> Iterator[list[Batch]]:
    """The batches in order, as many together as have `rows` rows; at least one."""
    held: list[Batch] = []
    for batch in batches:
        if held and sum(each.rows or 0 for each in held) + (batch.rows or 0) > rows:
            yield held
            held = []
        held.append(batch)
    if held:
        yield held


def work(loaders: Sequence[Loader], chosen: Iterable[list[Batch]], done: Callable[[Outcome], None], tick: Callable[[], None]) -> None:
    """Have each loader take group after group; `done` hears of each outcome and `tick` comes by every second, both in this thread.

    The first error that is not one batch's own ends the work: what the others have begun they finish, then it is raised.
    Any other end (a signal) cuts the connections: the server rolls back what was not committed.
    """
    crew = _Crew(loaders, chosen)
    try:
        crew.listen(done, tick)
    except BaseException:
        crew.stop.set()
        for loader in loaders:
            loader.cut()
        raise
    finally:
        crew.join()
    if crew.error is not None:
        raise crew.error


class _Crew:
    """The threads, and what they say."""

    def __init__(self, loaders: Sequence[Loader], chosen: Iterable[list[Batch]]) -> None:
        self.stop = threading.Event()
        self.error: Optional[BaseException] = None
        self._chosen, self._next = iter(chosen), threading.Lock()
        self._said: queue.Queue[object] = queue.Queue()
        self._threads = [threading.Thread(target=self._run, args=(loader,), name="restore", daemon=True) for loader in loaders]
        for thread in self._threads:
            thread.start()

    def listen(self, done: Callable[[Outcome], None], tick: Callable[[], None]) -> None:
        """Until every thread has ended."""
        left = len(self._threads)
        while left:
            try:
                said = self._said.get(timeout=STEP_S)
            except queue.Empty:
                tick()
                continue
            if isinstance(said, Outcome):
                done(said)
            elif isinstance(said, BaseException):
                self.error = self.error or said
                self.stop.set()
            else:
                left -= 1

    def join(self) -> None:
        """Wait for the threads, which have been told to end or have ended."""
        for thread in self._threads:
            thread.join(JOIN_S)
            if thread.is_alive():
                log.debug("restore.stuck", "a batch did not end in time; the server rolls it back")

    def _run(self, loader: Loader) -> None:
        try:
            while not self.stop.is_set():
                with self._next:
                    group = next(self._chosen, None)
                if group is None:
                    return
                for outcome in loader.load(group):
                    self._said.put(outcome)
        except BaseException as error:
            if not (self.stop.is_set() and isinstance(error, ArchiverError)):
                self._said.put(error)
        finally:
            loader.close()
            self._said.put(None)
