"""How the rows of a batch follow from how long the batches before it took, and where a broken job goes on."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from audit_archiver.holder.notes import JobNotes


def notes(batch_size: int, **job: Any) -> JobNotes:
    return JobNotes({"batch_size": batch_size, "cursor": None, "limit": None, **job}, batch_size)


def sizes(each: JobNotes, *seconds: float) -> list[int]:
    found = []
    for took in seconds:
        each.adapt(took)
        found.append(each.batch_rows)
    return found


@pytest.mark.req("REQ-ARC-013", "REQ-ARC-014", "REQ-ARC-016")
def test_quick_batches_grow_by_half_from_batch_size_up_to_fifty_thousand() -> None:
    each = notes(10_000)
    assert each.batch_rows == 10_000
    assert sizes(each, 9.9, 1, 1, 1, 1) == [15_000, 22_500, 33_750, 50_000, 50_000]


@pytest.mark.req("REQ-ARC-015", "REQ-ARC-016")
def test_slow_batches_halve_down_to_a_thousand() -> None:
    assert sizes(notes(10_000), 121, 200, 200, 200, 200) == [5_000, 2_500, 1_250, 1_000, 1_000]


@pytest.mark.req("REQ-ARC-014", "REQ-ARC-015")
@pytest.mark.parametrize("seconds", [10.0, 60.0, 120.0])
def test_batches_of_ten_to_a_hundred_and_twenty_seconds_keep_their_size(seconds: float) -> None:
    assert sizes(notes(10_000), seconds) == [10_000]


@pytest.mark.parametrize(("batch_size", "seconds", "expected"), [(80_000, 1, 80_000), (1, 1, 2), (300, 500, 300), (700, 1, 1_050)])
def test_a_batch_size_outside_the_limits_is_a_wish_that_is_kept(batch_size: int, seconds: float, expected: int) -> None:
    assert sizes(notes(batch_size), seconds) == [expected]


@pytest.mark.req("REQ-ARC-009")
@pytest.mark.parametrize(("limit", "left"), [(None, None), (500, 380), (100, 0)])
def test_the_job_that_is_left_begins_after_the_last_committed_batch(limit: Optional[int], left: Optional[int]) -> None:
    each = notes(100, limit=limit)
    each.rows, each.cursor = 120, ["2024-01-01 00:00:00+00", "17"]
    assert (each.unfinished()["cursor"], each.unfinished()["limit"]) == (["2024-01-01 00:00:00+00", "17"], left)
