"""What follows a failed pipeline: smaller batches, a row left in place, and an end to that where every row fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from audit_archiver.config.model import S3, Config, Database
from audit_archiver.driver import database_run, pipeline
from audit_archiver.exits import (
    ArchiverError,
    ConfigError,
    Failed,
    LockHeld,
    NetworkError,
    NoConnectionFree,
    PermissionDenied,
    ResourceError,
    Retryable,
)
from audit_archiver.holder.notes import JobNotes, key_of
from audit_archiver.holder.session import Standing

JOB: dict[str, Any] = {"database": "prod", "schema": "public", "table": "t", "batch_size": 1000, "limit": None, "cursor": None}
KEY = key_of(JOB)


def part() -> database_run.DatabaseRun:
    """A database's part that has one job and never waits."""
    settings = Config(path="x.yaml", s3=dataclasses.replace(S3(bucket="b"), retry_max_s=0), databases=())
    made = database_run.DatabaseRun(settings, Database(name="prod"), "20251230T021545Z-1", {}, (), lambda *_: Standing({}), lambda _: [],
                                    pipeline.Signals(install=False), lambda _: None)
    made.notes[KEY] = JobNotes(JOB, 1000)
    return made


def fail_until_left(made: database_run.DatabaseRun, number: int) -> None:
    """The failures that lead to one row: batches of 1000, 100, 10, 1, and that one again until it counts as alone."""
    notes = made.notes[KEY]
    left = len(made.left)
    for _ in range(20):
        alone = [str(number)] if notes.batch_rows == 1 else []
        assert made._again(Failed("a trigger raised"), KEY, alone)
        if len(made.left) > left or notes.error:
            return
    raise AssertionError("the row is never left in place")


def test_a_row_that_fails_alone_is_left_and_the_batches_grow_again() -> None:
    made = part()
    fail_until_left(made, 7)

    assert made.left == [(KEY, "7")]
    assert made.notes[KEY].batch_rows == 1000 and made.notes[KEY].error is None


def test_a_table_where_every_row_fails_is_given_up_after_ten() -> None:
    made = part()
    for number in range(11):
        fail_until_left(made, number)

    error = made.notes[KEY].error
    assert len(made.left) == database_run.LEAVE_MOST == 10
    assert error is not None and error.code == 2 and not error.retry and "given up" in str(error)


@pytest.mark.req("REQ-ERR-003", "REQ-ERR-006")
@pytest.mark.parametrize("failure", [NetworkError("the store answered SlowDown"), NoConnectionFree("too many clients"), Retryable("a deadlock")])
def test_what_can_pass_is_tried_three_times_in_all(failure: ArchiverError) -> None:
    made = part()
    assert [made._again(failure, None, []) for _ in range(3)] == [True, True, False]


@pytest.mark.req("REQ-ERR-004")
@pytest.mark.parametrize("failure", [ConfigError("no table"), PermissionDenied("not yours"), ResourceError("disk full"), LockHeld("a run")])
def test_what_cannot_pass_is_not_tried_again(failure: ArchiverError) -> None:
    assert part()._again(failure, None, []) is False
    assert part()._again(failure, KEY, []) is False
