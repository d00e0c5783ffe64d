"""Whose fault a pipeline without a holder is said to be, and what a job's own failure does to it: nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

import pytest

from audit_archiver import lines
from audit_archiver.driver import late, pipeline
from audit_archiver.exits import ArchiverError, Retryable
from audit_archiver.holder.notes import JobNotes, key_of

JOB: dict[str, Any] = {"database": "prod", "schema": "public", "table": "t", "batch_size": 10, "limit": None, "cursor": None}


def ended(codes: list[int], said: bytes, tmp_path: Path) -> tuple[Optional[ArchiverError], JobNotes]:
    """The verdict on a pipe of processes that end with these codes, and the notes of its one job."""
    outcomes = tmp_path / "outcomes"
    outcomes.write_bytes(said)
    notes = JobNotes(JOB, 10)
    script = "import os, sys; code = int(sys.argv[1]); os.kill(os.getpid(), -code) if code < 0 else os._exit(code)"
    processes = [subprocess.Popen([sys.executable, "-Sc", script, str(code)], stdout=subprocess.PIPE, start_new_session=True) for code in codes]
    for process in processes[:-1]:
        assert process.stdout is not None
        process.stdout.close()
    return late.run(processes, {key_of(JOB): notes}, 1, str(outcomes), pipeline.Signals(install=False), lambda: None), notes


def outcome(error: Optional[ArchiverError] = None, **noted: Any) -> bytes:
    notes = JobNotes(JOB, 10, swept=error is None, **noted)
    notes.error = error
    return lines.dump(notes.outcome())


def test_a_job_that_failed_by_itself_is_noted_with_its_own_words_and_the_pipeline_is_well(tmp_path: Path) -> None:
    failure, notes = ended([1, 0, 0], outcome(Retryable("the table changed", hint="plan anew"), inexact=["7"]), tmp_path)
    assert failure is None and not notes.swept and notes.inexact == ["7"]
    assert notes.error is not None and (str(notes.error), notes.error.retry, notes.error.code) == ("the table changed. plan anew", True, 2)


def test_rows_that_were_left_are_counted_once_however_often_the_table_is_swept(tmp_path: Path) -> None:
    failure, notes = ended([1, 0, 0], outcome(inexact=["7"], too_wide=["8"]), tmp_path)
    notes.take(json.loads(outcome(inexact=["7"], too_wide=["8"])))
    assert failure is None and notes.swept and (notes.inexact, notes.too_wide) == (["7"], ["8"])


@pytest.mark.parametrize("said", [b"", outcome()[:-1]], ids=["no outcome", "half an outcome"])
def test_a_stage_that_selects_and_ends_badly_before_its_last_job_fails_the_pipeline(tmp_path: Path, said: bytes) -> None:
    failure, notes = ended([1, 0, 0], said, tmp_path)
    assert failure is not None and "ended with code 1" in str(failure) and not notes.swept


@pytest.mark.parametrize("codes, blamed", [([141, 141, 5], 5), ([1, 2, 0], 2), ([0, 7, 2], 7), ([141, 0, 0], 141), ([-9, 0, 0], -9)])
def test_the_stage_that_failed_by_itself_is_named_not_one_that_lost_its_reader_or_its_input(tmp_path: Path, codes: list[int], blamed: int) -> None:
    failure, notes = ended(codes, b"" if codes[0] < 0 else outcome() if codes[0] == 1 else b"", tmp_path)
    assert failure is not None and f"ended with code {blamed}" in str(failure)
    assert (failure.retry, notes.swept) == (blamed == 7, False), "what was selected is not deleted by that"
