"""locking.mode late: the same pipeline without a holder, so that no lock is held while a batch is uploaded.

Each batch is exported under one snapshot and deleted by aa-delete's guarded path, which locks the keys, compares
every row with the archive and commits in one short transaction. aa-record follows in the same pipe; what comes
out of it is recorded, and is all that counts here. How each job ended and what was left of it says aa-select, in the
file of its --outcomes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any, Callable, Optional, Sequence

from audit_archiver import lines
from audit_archiver.driver import children, pipeline
from audit_archiver.driver.children import Child
from audit_archiver.exits import READER_GONE, TABLE, ArchiverError, Failed
from audit_archiver.formats import batch as batches
from audit_archiver.holder.notes import JobKey, JobNotes

END_GRACE_S = 600.0
ENDINGS = (*TABLE, -signal.SIGTERM)  # of a stage that has said what there was to say


def run(processes: Sequence[Child], notes: dict[JobKey, JobNotes], jobs: int, outcomes: str, signals: pipeline.Signals,
        tick: Callable[[], bool]) -> Optional[ArchiverError]:
    """Book every recorded batch that comes out of the last of `processes`; why the pipeline failed, or None.

    `outcomes` is the file in which aa-select says how each of its `jobs` has ended: a job that fails by itself is no
    failure of the pipeline. `tick` says True once no more batches shall begin.
    """
    output = processes[-1].stdout
    assert output is not None
    began = time.monotonic()
    for each in notes.values():
        each.first_at = each.first_at or began
    try:
        drained = _book_all(output.fileno(), processes, notes, signals, tick)
        deadline = time.monotonic() + END_GRACE_S
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    except ArchiverError as error:
        return error
    except subprocess.TimeoutExpired as error:
        return Failed(f"'{children.title(processes[-1])}' ended, but another stage did not within {error.timeout:.0f} s")
    finally:
        children.end(processes)
        output.close()
    ended = _outcomes(outcomes)
    failure = _verdict(processes, drained or len(ended) == jobs)
    for outcome in ended:  # what was selected is not yet deleted: only a pipeline that ended well has swept a table
        notes[(outcome["database"], outcome["schema"], outcome["table"])].take({**outcome, "swept": outcome["swept"] and failure is None})
    return failure


def _book_all(output: int, processes: Sequence[Child], notes: dict[JobKey, JobNotes],
              signals: pipeline.Signals, tick: Callable[[], bool]) -> bool:
    """Until the output ends; True if aa-select was ended before its last job."""
    held, drained = b"", False
    while True:
        if signals.count >= 2:
            raise Failed("stopped by a second signal; the batch that was being deleted is rolled back or committed whole")
        if (tick() or signals.count) and not drained and processes[0].poll() is None:
            os.killpg(processes[0].pid, signal.SIGTERM)  # nothing new is selected; what was selected is finished
            drained = True
        if not lines.wait_readable(output, None, pipeline.POLL_S):
            continue
        data = os.read(output, lines.CHUNK_BYTES)
        if not data:
            return drained
        *whole, held = (held + data).split(b"\n")
        for text in whole:
            _book(batches.parse(text + b"\n", needs=("committed", "recorded")), notes)


def _book(line: dict[str, Any], notes: dict[JobKey, JobNotes]) -> None:
    batch = line["batch"]
    each = notes[(batch["database"], batch["schema"], batch["table"])]
    each.last_at = time.monotonic()
    each.rows += line["deleted"]["rows"]
    each.batches += 1
    each.bytes += line["serialized"]["data"]["bytes"]
    each.gz_bytes += line["serialized"]["data"]["gz_bytes"]


def _outcomes(path: str) -> list[dict[str, Any]]:
    """What aa-select said of the jobs that have ended."""
    with open(path, "rb") as said:
        return [lines.parse(line, "the outcomes of aa-select") for line in said if line.endswith(b"\n")]


def _verdict(processes: Sequence[Child], select_is_explained: bool) -> Optional[ArchiverError]:
    """The first stage that failed by itself: those after it only lost their input, those before it their reader."""
    selecting = processes[0]
    failed = [process for process in processes if process.returncode
              and not (process is selecting and select_is_explained and process.returncode in ENDINGS)]
    if not failed:
        return None
    culprit = next((process for process in failed if process.returncode != READER_GONE), failed[0])
    code = culprit.returncode or 0
    error = Failed(f"'{children.title(culprit)}' ended with code {code}", hint="its own log says why")
    error.code = code if code in TABLE and 0 < code < 128 else error.code
    error.retry = code == 7
    return error
