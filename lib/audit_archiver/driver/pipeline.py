"""Runs a command under the holder: commits each deleted batch as it comes out, and only then passes it on.

aa-txn and aa-archive use this one loop. Batches commit as they come out (else batch 3 would wait for ever for
batch 1's place); a line goes on to aa-record only after its COMMIT (else records precede commits). Whatever
goes wrong, nothing commits any more, the children are ended before their input is closed, and what is open is
rolled back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any, Callable, Optional, Sequence

from audit_archiver import exits, lines, log
from audit_archiver.driver import children
from audit_archiver.driver.children import Child
from audit_archiver.exits import ArchiverError, Failed, InputError
from audit_archiver.formats import batch as batches
from audit_archiver.holder import commit
from audit_archiver.holder.operations import Operations
from audit_archiver.holder.server import Server
from audit_archiver.points import point

POLL_S = 0.1
IDLE_GRACE_S = 0.5
BYE_GRACE_S = 5.0


class Signals:
    """The first TERM, INT or HUP drains (batches in flight are finished), the second rolls back (contracts.md 6)."""

    def __init__(self, install: bool = True) -> None:
        self.first: Optional[int] = None
        self.count = 0
        if install:
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(each, self.arrived)

    def arrived(self, signum: int, _frame: Any = None) -> None:
        """Count a signal, or what is to be taken for one."""
        self.first = self.first or (signal.SIGTERM if signum == signal.SIGHUP else signum)
        self.count += 1

    @property
    def exit_code(self) -> int:
        """128 + the first signal."""
        return 128 + (self.first or 0)


def run(processes: Sequence[Child], operations: Operations, server: Server, signals: Signals,
        pass_on: Callable[[bytes], None], tick: Callable[[], bool] = lambda: False,
        watch: Optional[int] = None) -> Optional[ArchiverError]:
    """Commit what the last of `processes` writes, until all have ended; why it failed, or None.

    `pass_on` gets each committed line; `tick` is called several times a second and says True once no more batches
    shall begin; `watch` is the output whose reader must stay. Raises nothing for a failed pipeline: the failure is
    returned, everything is rolled back.
    """
    output = processes[-1].stdout
    assert output is not None
    failure: Optional[ArchiverError] = None
    try:
        if _commit_all(output.fileno(), operations, signals, pass_on, tick, watch):
            failure = _settle(processes, operations, server)
    except ArchiverError as error:
        failure = operations.fail(error)
    except BrokenPipeError:
        failure = Failed("the reader of the output is gone")
        failure.code = exits.READER_GONE
        operations.fail(failure)
    finally:
        children.end(processes)
        output.close()
    return failure


def _commit_all(output: int, operations: Operations, signals: Signals, pass_on: Callable[[bytes], None],
                tick: Callable[[], bool], watch: Optional[int]) -> bool:
    """True when the output has ended; False when it was to drain, by a signal or by `tick`, and nothing is in flight any more.

    From then on no batch begins, so whoever still waits then waits for jobs that nobody wants done.
    """
    os.set_blocking(output, False)
    held = b""
    idle_since: Optional[float] = None
    while True:
        if operations.failure is not None:
            raise operations.failure
        if signals.count >= 2:
            raise Failed("stopped by a second signal; open batches are rolled back")
        draining = tick() or signals.count > 0
        if draining:
            operations.drain()
            idle_since = (idle_since or time.monotonic()) if operations.idle else None
            if idle_since is not None and time.monotonic() - idle_since >= IDLE_GRACE_S:
                return False
        if not lines.wait_readable(output, watch, POLL_S):
            continue
        try:
            data = os.read(output, lines.CHUNK_BYTES)
        except BlockingIOError:
            continue
        if not data:
            if held:
                raise InputError("the command's output ends inside a line")
            return True
        held += data
        *whole, held = held.split(b"\n")
        for text in whole:
            if draining or signals.count:
                operations.drain()  # before this commit makes room for another batch
            line = batches.parse(text + b"\n", needs=("verified", "deleted"), lacks=("committed",))
            committed = commit.commit(operations, line)
            log.info("batch.committed", f"{batches.name(line['batch'])}: {line['deleted']['rows']} rows committed",
                     batch=line["batch"]["id"], rows=line["deleted"]["rows"], xid=committed["committed"]["xid"])
            pass_on(lines.dump(committed))
            point("holder.line.passed")


def _settle(processes: Sequence[Child], operations: Operations, server: Server) -> Optional[ArchiverError]:
    """Wait until every child has ended and every stage's bye was heard, then judge."""
    deadline = time.monotonic() + BYE_GRACE_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Failed(f"'{children.title(process)}' closed its output but did not end")
    while (verdict := server.verdict()) is not None and server.present() and time.monotonic() < deadline:
        server.wait_for_news(deadline - time.monotonic())
    codes = [process.returncode for process in processes]
    if verdict is None and any(codes):
        position = next(n for n, code in enumerate(codes) if code)
        verdict = Failed(f"'{children.title(processes[position])}' ended with code {codes[position]}")
    if verdict is not None:
        operations.fail(verdict)
    return verdict
