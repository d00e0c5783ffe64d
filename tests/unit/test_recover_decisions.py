"""The decision table of recovery, row by row, and over all evidence that there can be."""

from __future__ import annotations

import itertools

import pytest

from audit_archiver.catalogue.decide import (
    ABANDON,
    ABORTED,
    COMMITTED,
    DIFFERS,
    EQUAL,
    HOLD,
    IN_PROGRESS,
    NONE,
    RECORD,
    STOP,
    UNKNOWN,
    WAIT,
    Evidence,
    decide,
)

TABLE = [
    # found                                     evidence                                                              verdict
    ("staged, by a run that is dead", Evidence(in_bucket=False), ABANDON),
    ("staged by hand today", Evidence(in_bucket=False, fresh=True), WAIT),
    ("all keys, equal, committed (C1: somebody else's)", Evidence(keys=9, present=9, content=EQUAL, transaction=COMMITTED), ABANDON),
    ("all keys, equal, aborted", Evidence(keys=9, present=9, content=EQUAL, transaction=ABORTED), ABANDON),
    ("all keys, equal, unknown", Evidence(keys=9, present=9, content=EQUAL, transaction=UNKNOWN), ABANDON),
    ("no key, committed", Evidence(keys=9, transaction=COMMITTED), RECORD),
    ("no key, unknown: too old, other server, future", Evidence(keys=9, transaction=UNKNOWN), RECORD),
    ("no key, committed (C1), but archived as it is by a later batch", Evidence(keys=9, accounted=9, transaction=COMMITTED), ABANDON),
    ("no key, unknown, but archived as it is by a later batch", Evidence(keys=9, accounted=9, transaction=UNKNOWN), ABANDON),
    ("no key, unknown, and partly archived as it is by later batches", Evidence(keys=9, accounted=4, transaction=UNKNOWN), HOLD),
    ("no key, aborted", Evidence(keys=9, transaction=ABORTED), HOLD),
    ("all keys, content differs, aborted", Evidence(keys=9, present=9, content=DIFFERS, transaction=ABORTED), ABANDON),
    ("all keys, content differs, committed", Evidence(keys=9, present=9, content=DIFFERS, transaction=COMMITTED), HOLD),
    ("all keys, content differs, unknown", Evidence(keys=9, present=9, content=DIFFERS, transaction=UNKNOWN), HOLD),
    ("all keys, content cannot be compared", Evidence(keys=9, present=9, transaction=ABORTED), HOLD),
    ("some keys, committed", Evidence(keys=9, present=4, transaction=COMMITTED), HOLD),
    ("some keys, aborted", Evidence(keys=9, present=4, transaction=ABORTED), HOLD),
    ("some keys, unknown", Evidence(keys=9, present=4, transaction=UNKNOWN), HOLD),
    ("by hand, today", Evidence(keys=9, present=9, content=EQUAL, transaction=NONE, fresh=True), WAIT),
    ("by hand, today, and somebody else removed rows", Evidence(keys=9, present=4, transaction=NONE, fresh=True), WAIT),
    ("by hand, older than a day, all there", Evidence(keys=9, present=9, content=EQUAL, transaction=NONE), ABANDON),
    ("by hand, older, updated since", Evidence(keys=9, present=9, content=DIFFERS, transaction=NONE), ABANDON),
    ("by hand, older, archived by another run since", Evidence(keys=9, accounted=9, transaction=NONE), ABANDON),
    ("by hand, older, partly archived by another run", Evidence(keys=9, present=4, accounted=5, transaction=NONE), ABANDON),
    ("by hand, older, removed by somebody else", Evidence(keys=9, accounted=8, transaction=NONE), HOLD),
    ("a subset's delete rolled back", Evidence(keys=9, present=7, accounted=2, transaction=ABORTED), ABANDON),
    ("in progress", Evidence(keys=9, present=9, content=EQUAL, transaction=IN_PROGRESS), STOP),
    ("upload cut before the key list, under a holder", Evidence(keys=None, transaction=NONE), ABANDON),
    ("upload cut, or still going on by hand", Evidence(keys=None, transaction=NONE, fresh=True), WAIT),
    ("the table is gone", Evidence(keys=9, transaction=UNKNOWN, trouble="table 'public.t' does not exist"), HOLD),
]


@pytest.mark.req("REQ-REL-003", "REQ-ERR-012", "T37", "T38")
@pytest.mark.parametrize(("found", "verdict"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_each_row_of_the_decision_table_gives_its_verdict(found: Evidence, verdict: str) -> None:
    decision = decide(found)
    assert decision.verdict == verdict
    assert decision.why


def every_evidence() -> list[Evidence]:
    """Every combination that could be found of a batch of three rows."""
    made = []
    for present, transaction, accounted, fresh in itertools.product(
            range(4), (NONE, COMMITTED, ABORTED, IN_PROGRESS, UNKNOWN), range(4), (False, True)):
        for content in (EQUAL, DIFFERS, UNKNOWN) if present == 3 else (UNKNOWN,):
            if accounted <= 3 - present:
                made.append(Evidence(keys=3, present=present, content=content, transaction=transaction, accounted=accounted, fresh=fresh))
    return made


def test_nothing_is_recorded_while_one_of_its_rows_is_in_the_table() -> None:
    recorded = [found for found in every_evidence() if decide(found).verdict == RECORD]
    assert recorded
    assert all(found.present == 0 for found in recorded)


def test_nothing_is_recorded_that_its_own_transaction_cannot_have_deleted() -> None:
    assert not [found for found in every_evidence()
                if decide(found).verdict == RECORD and found.transaction in (NONE, ABORTED, IN_PROGRESS)]


def test_nothing_is_abandoned_while_a_row_of_it_may_be_nowhere_else() -> None:
    """Every absent row of an abandoned batch is archived elsewhere or was gone before, and this batch deleted none that is not."""
    for found in every_evidence():
        if decide(found).verdict == ABANDON:
            assert found.present + found.accounted == 3
            assert found.present in (0, 3) or found.transaction in (NONE, ABORTED)


def test_nothing_is_recorded_that_another_batch_archived() -> None:
    """A sleeper's batch: the model of the protocol found that it would be archived twice (tests/unit/commit_model.py)."""
    assert not [found for found in every_evidence() if decide(found).verdict == RECORD and found.accounted]


def test_the_status_of_a_transaction_alone_never_decides() -> None:
    """C1: whatever the status says, all rows there and unchanged means abandoned."""
    verdicts = {decide(Evidence(keys=3, present=3, content=EQUAL, transaction=said)).verdict
                for said in (COMMITTED, ABORTED, UNKNOWN)}
    assert verdicts == {ABANDON}


def test_whoever_is_in_progress_stops_everything() -> None:
    assert {decide(found).verdict for found in every_evidence() if found.transaction == IN_PROGRESS} == {STOP}
