"""Checks of a run as a whole: how much there is to do, and how long that may take."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Iterator, Union

from audit_archiver.preflight.check import Check, Good, Said, declare
from audit_archiver.preflight.findings import FAIL, WARN

ROWS_PER_S, BYTES_PER_S = 10_000, 10e6  # what two slow cores and a slow line do
Answers = Iterator[Union[Said, Good]]

CHECKS: list[Check] = []
check = functools.partial(declare, CHECKS)


@dataclass(frozen=True)
class Amount:
    """What the planner thinks there is to archive; `batch_bytes` of the largest batch that may come."""

    rows: int = 0
    batches: int = 0
    work_s: float = 0
    sleep_s: float = 0
    batch_bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.rows + other.rows, self.batches + other.batches, self.work_s + other.work_s, self.sleep_s + other.sleep_s,
                      max(self.batch_bytes, other.batch_bytes))


@dataclass(frozen=True)
class Look:
    """A run that is to come: how much it has to do, how long it may take and has taken already; `force` is a person's will."""

    amount: Amount
    max_hours: float
    spent_s: float = 0
    force: bool = False


def amount(rows: int, row_bytes: float, batch_rows: int, batch_bytes: int, sleep_s: float) -> Amount:
    """The amount of one table."""
    batches = math.ceil(rows / batch_rows)
    return Amount(rows, batches, max(rows / ROWS_PER_S, rows * row_bytes / BYTES_PER_S), max(0, batches - 1) * sleep_s, batch_bytes)


@check("run.duration", FAIL, "a run ends within max_run_hours",
       "raise batch_size, lower sleep_between_batches, begin with --limit, raise max_run_hours, or archive with --force")
def duration(look: Look) -> Answers:
    """REQ-VAL-012, REQ-RES-017, REQ-RES-018. By a cautious rate; aa-check asks the planner how many rows there are, a run has counted them."""
    due, seconds = look.amount, look.amount.work_s + look.amount.sleep_s
    text = f"about {due.rows:,} rows in {due.batches:,} batches: {_clock(seconds)}, of which {_clock(due.sleep_s)} asleep between batches"
    if look.spent_s + seconds <= look.max_hours * 3600:
        yield Good(text)
        return
    spent = f" after {_clock(look.spent_s)} of this run" if look.spent_s >= 60 else ""
    yield Said(f"{text}{spent}; max_run_hours is {look.max_hours:g}", status=WARN if look.force else None)


def _clock(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"
