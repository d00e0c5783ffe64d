"""Named test points: a process stops itself where a test wants to see it die.

`AA_TEST_POINT=upload.data.put:3` stops the process with SIGSTOP at the third passage of that point;
`AA_TEST_POINT=upload.data.put` at the first. The test sees the stop, then kills or continues it. Without
the variable a point costs one comparison. With `AA_TEST_KILLED=FILE` the process is killed instead of stopped, and its id
written to FILE; a point where somebody died already lets everybody pass. `POINTS` lists every name, so that the crash tests sweep them all
and a misspelt name fails at once.
"""

from __future__ import annotations

import os
import signal
import threading

POINTS = (
    "select.begun", "select.locked", "select.copied",
    "serialize.data.written", "serialize.staged",
    "upload.start.put", "upload.data.before", "upload.data.put", "upload.metadata.put", "upload.manifest.put",
    "verify.data.read", "verify.done",
    "delete.before", "delete.done",
    "guarded.locked", "guarded.compared", "guarded.intent.put", "guarded.deleted", "guarded.committed",
    "holder.lock.done", "holder.copy.half", "holder.delete.before", "holder.delete.done",
    "holder.commit.before", "holder.commit.sent", "holder.commit.done", "holder.line.passed",
    "record.before", "record.commit.put", "record.index.put", "record.staging.removed",
    "archive.locked", "archive.recovered", "archive.pipeline.started", "archive.pipeline.ended",
    "archive.end.put", "archive.vacuumed",
    "recover.decided", "recover.record.put", "recover.abandon.put", "recover.end.put",
    "restore.staged", "restore.inserted", "restore.committed", "restore.watermark.put",
    "rollback.start.put", "rollback.record.put", "rollback.end.before",
)

_wanted, _, _count = os.environ.get("AA_TEST_POINT", "").partition(":")
_left = int(_count or 1)
_killed = os.environ.get("AA_TEST_KILLED")


def point(name: str) -> None:
    """Stop this process with SIGSTOP if the test asked for this passage of `name`."""
    global _left
    if name != _wanted:
        return
    assert name in POINTS, name
    _left -= 1
    if _left == 0 and _killed:
        _die(_killed)
    elif _left == 0:
        # to this very thread: sent to the process, another thread may take the signal, and this one is past the point before it stops
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _die(note: str) -> None:
    """Be killed, unless somebody was before."""
    with open(note, "ab") as file:
        if file.tell() == 0:
            file.write(b"%d\n" % os.getpid())
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
