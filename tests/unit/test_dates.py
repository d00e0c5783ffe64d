"""Dates and times of --start-date and --end-date."""

from __future__ import annotations

import pytest

from audit_archiver.exits import ConfigError
from audit_archiver.preflight import dates


@pytest.mark.parametrize("text, first, after", [
    ("2025-09-30", "2025-09-30T00:00:00.000000Z", "2025-10-01T00:00:00.000000Z"),
    ("2024-02-28", "2024-02-28T00:00:00.000000Z", "2024-02-29T00:00:00.000000Z"),
    ("2025-12-31", "2025-12-31T00:00:00.000000Z", "2026-01-01T00:00:00.000000Z")])
def test_a_date_is_a_whole_day_in_utc(text: str, first: str, after: str) -> None:
    assert (dates.start(text), dates.end(text)) == (first, after)


@pytest.mark.parametrize("text, moment", [
    ("2025-09-30T12:00:00Z", "2025-09-30T12:00:00.000000Z"), ("2025-09-30t12:00:00z", "2025-09-30T12:00:00.000000Z"),
    ("2025-09-30 12:00:00+02:00", "2025-09-30T10:00:00.000000Z"),
    ("2025-09-30T23:30:00-05:45", "2025-10-01T05:15:00.000000Z"),
    ("2025-09-30T12:00:00.5Z", "2025-09-30T12:00:00.500000Z"),
    ("2025-09-30T12:00:00.1234567Z", "2025-09-30T12:00:00.123456Z")])
def test_a_time_is_that_moment_at_both_ends(text: str, moment: str) -> None:
    assert (dates.start(text), dates.end(text)) == (moment, moment)


@pytest.mark.parametrize("text", ["", "yesterday", "2025-9-30", "2025-02-30", "2025-09-30T12:00:00", "2025-09-30T12:00Z",
                                  "2025-09-30T25:00:00Z", "2025-09-30T12:00:00+25:00", "2025-09-30\n", "٢٠٢٥-09-30",
                                  "0001-01-01T00:00:00+01:00"])
def test_what_is_neither_is_refused_with_the_forms_to_write(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dates.start(text)
    assert str(caught.value) == (f"--start-date '{text}' is neither a date nor a time. write 2025-09-30 (UTC), or "
                                 "2025-09-30T12:00:00Z, or with an offset as +02:00")


def test_the_last_day_that_python_knows_has_no_next_one() -> None:
    assert dates.start("9999-12-31") == "9999-12-31T00:00:00.000000Z"
    with pytest.raises(ConfigError, match="--end-date '9999-12-31' is neither"):
        dates.end("9999-12-31")


@pytest.mark.parametrize("first, last, fits", [
    ("2025-09-30", "2025-09-30", True), ("2025-10-01", "2025-09-30", False), (None, "2025-09-30", True),
    ("2025-09-30T12:00:00Z", "2025-09-30T12:00:00Z", False), ("2025-09-30T12:00:00Z", "2025-09-30T12:00:00.5Z", True),
    ("2025-09-30T14:00:00+02:00", "2025-09-30T12:00:01Z", True)])
def test_something_must_lie_between_the_two(first: str, last: str, fits: bool) -> None:
    if fits:
        dates.check_order(dates.start(first), dates.end(last))
        return
    with pytest.raises(ConfigError) as caught:
        dates.check_order(dates.start(first), dates.end(last))
    assert caught.value.msg == "--start-date is not before --end-date"
