"""The decision table of recovery (design, section 5): from evidence to verdict, and nothing else.

Two witnesses are heard: which of the batch's keys are in the table, and what the server says of the transaction
that was to delete them. The keys come first: the status of a transaction id can be that of somebody else's
transaction (postgres.md C1). Called only while K1 is held and K2 has proven that no run is at work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

RECORD, ABANDON, HOLD, WAIT, STOP = "RECORD", "ABANDON", "HOLD", "WAIT", "STOP"

NONE, COMMITTED, ABORTED, IN_PROGRESS, UNKNOWN = "none", "committed", "aborted", "in progress", "unknown"
EQUAL, DIFFERS = "equal", "differs"  # of the content; UNKNOWN where it was not or could not be compared


@dataclass(frozen=True)
class Evidence:
    """What was found about one batch without a commit record.

    `keys` is the number of rows, None where too little of the batch lies in the bucket to know them; then the delete
    was never licensed. `present` of them are in the table, with `content`. `transaction` is NONE for a batch that was
    exported by hand and that no guarded delete has begun on. `accounted` counts absent rows whose absence is
    explained: another batch's commit record covers them, or a guarded delete noted that they were gone before it; where this
    batch's own transaction may have committed, only those that a batch begun after it archived with the same content.
    `fresh`: it may belong to a person at work, since it is less than 24 hours old. `trouble`: why nothing can be said.
    """

    in_bucket: bool = True
    keys: Optional[int] = None
    present: int = 0
    content: str = UNKNOWN
    transaction: str = UNKNOWN
    accounted: int = 0
    fresh: bool = False
    trouble: Optional[str] = None


@dataclass(frozen=True)
class Decision:
    """RECORD: it is archived, write its commit record. ABANDON: it is not, its rows are in the table. HOLD: a person
    must look. WAIT: not yet. STOP: somebody is at work."""

    verdict: str
    why: str


def decide(found: Evidence) -> Decision:
    """The verdict. What is not in the table of the design is HOLD: it touches nothing."""
    if found.transaction == IN_PROGRESS:
        return Decision(STOP, "its transaction is in progress")
    if not found.in_bucket:
        return Decision(WAIT, "it is staged, and may still be sent") if found.fresh else Decision(
            ABANDON, "it never reached the bucket, so its rows are in the table")
    if found.keys is None:
        return _without_keys(found)
    if found.transaction == NONE and found.fresh:
        return Decision(WAIT, "it was exported by hand less than 24 hours ago")
    if found.trouble is not None:
        return Decision(HOLD, found.trouble)
    return _by_keys(found, found.keys)


def _without_keys(found: Evidence) -> Decision:
    if found.fresh:
        return Decision(WAIT, "its upload was cut off, or goes on by hand")
    return Decision(ABANDON, "its upload was cut off before the key list, so no delete of it was ever begun")


def _by_keys(found: Evidence, keys: int) -> Decision:
    absent = keys - found.present
    kept = found.transaction in (NONE, ABORTED)  # whatever is gone, this batch's delete did not take it
    if not absent and found.content == EQUAL:
        return Decision(ABANDON, "all its rows are in the table, unchanged")
    if not absent and found.content == DIFFERS and kept:
        return Decision(ABANDON, "all its rows are in the table; some were updated after it was given up")
    if absent and absent == found.accounted and kept:
        return Decision(ABANDON, "it deleted nothing; the rows that are gone are archived in other batches, or were gone before")
    if not found.present and not kept and found.accounted:
        return Decision(ABANDON, "it was overtaken: its rows are archived, as they were here, in batches that were begun after it") \
            if absent == found.accounted else Decision(HOLD, f"{found.accounted} of its {keys} rows are archived in batches that were begun after it")
    if not found.present and not kept:
        return Decision(RECORD, "all its rows are gone from the table, and its transaction committed"
                        if found.transaction == COMMITTED else
                        "all its rows are gone from the table; of its transaction nothing is known any more")
    if not found.present:
        return Decision(HOLD, "all its rows are gone from the table, but this batch did not delete them")
    if absent:
        return Decision(HOLD, f"{absent} of its {keys} rows are gone from the table")
    return Decision(HOLD, "its rows are in the table, but not as they were archived" if found.content == DIFFERS else
                    "its rows are in the table, but cannot be compared with what was archived")
