"""Several databases at once: one forked process for each, single-threaded, so that it can fork stages of its own.

    run(parts, most, signals, work=..., hear=..., tick=..., apart=...)

A worker does everything of its part, as a run of one database would, and tells this process what it has to say; only this
process writes. The first signal goes on to every worker and drains it, the second rolls back. A worker whose parent is gone
drains by itself; one that dies takes its transactions with it, and the next run settles them.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Callable, Deque, Generic, Hashable, NoReturn, Sequence, TypeVar

from audit_archiver import exits
from audit_archiver.cli import STOP_SIGNALS, leave
from audit_archiver.driver.pipeline import POLL_S, Signals

Part = TypeVar("Part")
SAME_SIGNAL_TWICE_IS_ONE = (signal.SIGTERM, signal.SIGINT)  # so that a worker counts both, they are not the same


class Tell:
    """A worker's line to its parent."""

    def __init__(self, line: Connection, parent: int) -> None:
        self._line, self._parent = line, parent

    def __call__(self, kind: str, value: Any) -> bool:
        """Say something; False if nobody hears it."""
        try:
            self._line.send((kind, value))
        except OSError:
            return False
        return True

    @property
    def alone(self) -> bool:
        """True if the parent is gone."""
        return os.getppid() != self._parent


@dataclass
class Worker(Generic[Part]):
    """A living worker as its parent sees it."""

    pid: int
    part: Part
    signals: int = 0


def run(parts: Sequence[Part], most: int, signals: Signals, *, work: Callable[[Part, Tell, Signals], None],
        hear: Callable[[Part, str, Any], None], tick: Callable[[], None], apart: Callable[[Part], Hashable]) -> None:
    """Work through `parts`, at most `most` at a time, until all are done or, after a signal, those that have begun.

    `work` runs in the worker, with signals of its own; `hear` gets each thing it tells, in this process, and ("ended", exit code) at last, negative
    for the signal that killed it. Parts that are equal in `apart` never run side by side. `tick` is called several times a second.
    """
    waiting: Deque[Part] = deque(parts)
    living: dict[Connection, Worker[Part]] = {}
    try:
        while living or (waiting and not signals.count):
            taken = {apart(worker.part) for worker in living.values()}
            for part in [each for each in waiting if not signals.count]:
                if len(living) < most and apart(part) not in taken:
                    taken.add(apart(part))
                    waiting.remove(part)
                    line, pid = _start(part, work, [*living])
                    living[line] = Worker(pid, part)
            _pass_on(signals, living)
            for line in wait(list(living), POLL_S):
                assert isinstance(line, Connection)
                try:
                    told = line.recv()
                except (EOFError, OSError):
                    worker = living.pop(line)
                    hear(worker.part, "ended", _reap(line, worker))
                else:
                    hear(living[line].part, *told)
            tick()
    finally:
        _drain(living)


def _start(part: Part, work: Callable[[Part, Tell, Signals], None], others: Sequence[Connection]) -> tuple[Connection, int]:
    """Fork a worker; what is heard from it, and its process id."""
    line, theirs = multiprocessing.Pipe(duplex=False)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # one for the worker must not meet our handlers there
    try:
        pid = os.fork()
        if pid == 0:
            _become(lambda signals: work(part, Tell(theirs, parent), signals), [line, *others], blocked)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()
    return line, pid


def _become(work: Callable[[Signals], None], lines: Sequence[Connection], mask: Any) -> NoReturn:
    """The worker's side. A session of its own: Ctrl-C at the terminal is for the parent, which passes it on."""
    code = exits.FAILED
    try:
        gc.freeze()
        os.setsid()
        for line in lines:  # else one worker would keep another's line open after the parent's death
            line.close()
        signals = Signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        work(signals)
        code = exits.OK
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        leave(code)


def _pass_on(signals: Signals, living: dict[Connection, Worker[Part]]) -> None:
    for worker in living.values():
        while worker.signals < min(signals.count, len(SAME_SIGNAL_TWICE_IS_ONE)):
            os.kill(worker.pid, SAME_SIGNAL_TWICE_IS_ONE[worker.signals])
            worker.signals += 1


def _drain(living: dict[Connection, Worker[Part]]) -> None:
    """Something failed here (the reader of our output is gone, say): have every worker finish what is in flight, and wait for it."""
    for worker in living.values():
        os.kill(worker.pid, signal.SIGTERM)
    for line, worker in living.items():
        try:
            while True:
                line.recv()
        except (EOFError, OSError):
            _reap(line, worker)


def _reap(line: Connection, worker: Worker[Part]) -> int:
    line.close()
    return os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
