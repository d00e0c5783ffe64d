"""The campaign of `make crash` in short: one fault of each kind under a running application, and a judge that can say no."""

from __future__ import annotations

from typing import Iterator, Optional

import pytest

from audit_archiver.points import POINTS
from tests.crash import cases, lies
from tests.crash.campaign import Campaign
from tests.crash.cases import BACKEND, CUT, DRIVER, GROUP, KILL, LINE, POSTGRES, PROCESS, S3, SERVER, TRUNCATE, Case, Outcome
from tests.crash.epoch import TABLE, Epoch, Ground, Run, Wrong
from tests.ground.application import ABSENT, Ledger
from tools import crash

SHORT = [
    Case(KILL, DRIVER, "holder.commit.sent:2"), Case(LINE, CUT, "holder.delete.done:1", line=POSTGRES),
    Case(KILL, GROUP, "record.before:2"), Case(KILL, BACKEND, "verify.done:1"),
    Case(KILL, SERVER, "holder.commit.done:1"), Case(LINE, TRUNCATE, "upload.data.before:2", line=S3),
]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """Servers of the campaign's own: they are killed."""
    with Ground(tmp_path_factory.mktemp("campaign")) as made:
        yield made


def test_every_point_is_met_by_every_killer_and_every_fault_of_both_lines() -> None:
    met = {(case.point.partition(":")[0], case.what, case.line) for case in cases.kills() + cases.network()}
    for point in POINTS:
        if not point.startswith("rollback."):
            who = {what for name, what, line in met if name == point and line == cases.DIRECT}
            assert who >= {PROCESS, GROUP, BACKEND, SERVER} and (DRIVER in who or point.startswith(cases.OURS)), point
            assert len([each for each in met if each[0] == point and each[2] in (POSTGRES, S3)]) == 8, point
    assert len(cases.kills()) >= 500 and len(cases.network()) >= 300


@pytest.mark.req("T38", "T39", "REQ-REL-001", "REQ-REL-002", "REQ-ERR-011", "REQ-NET-001")
def test_faults_under_a_running_application_lose_double_and_alter_nothing(ground: Ground) -> None:
    outcomes: list[Outcome] = []
    made = Campaign(ground, outcomes.append)
    try:
        for case in SHORT:
            made.meet(case)
        made.end()
    except BaseException:
        print(made.last_log)
        raise
    finally:
        made.forget()
    assert {outcome.case for outcome in outcomes} == set(SHORT)
    assert made.totals["acknowledged"] > len(SHORT) and made.totals["rows"] > 0


@pytest.mark.parametrize(("wrong", "sql"), [
    ("is nowhere", f"DELETE FROM {TABLE} WHERE id = (SELECT min(id) FROM {TABLE})"),
    ("the application wrote", f"UPDATE {TABLE} SET version = version + 1 WHERE id = (SELECT min(id) FROM {TABLE})"),
    ("was altered", f"UPDATE {TABLE} SET note = 'another' WHERE id = (SELECT min(id) FROM {TABLE})"),
    ("is there in version 7", f"INSERT INTO {TABLE} VALUES (1000000, now(), 1, 7)"),
    ("is in 2 places", None),
])
def test_the_judge_sees_a_row_that_is_not_where_it_has_to_be(ground: Ground, wrong: str, sql: Optional[str]) -> None:
    epoch = Epoch(ground, 0)
    try:
        epoch.application.fill(20)
        epoch.judge(settled=True)
        if sql is None:
            again = epoch.query(f"SELECT row_to_json(t)::text FROM {TABLE} t WHERE id = 3")[0][0]
            run = Run(epoch, ["aa-archive", "--force", "-c", epoch.config()])
            assert run.wait() == 0, run.end()
            run.end()
            epoch.judge(settled=True)
            epoch.query(f"INSERT INTO {TABLE} SELECT (json_populate_record(NULL::{TABLE}, %s)).*", again)
        else:
            epoch.query(sql)
        with pytest.raises(Wrong, match=wrong):
            epoch.judge(settled=True)
    finally:
        epoch.close()


def test_the_ledger_leaves_open_what_no_answer_came_to() -> None:
    ledger = Ledger()
    ledger.wrote(1, 1, sure=True)
    ledger.wrote(1, 2, sure=False)
    assert ledger.versions(1) == {1, 2}
    ledger.wrote(1, ABSENT, sure=False)
    assert ledger.versions(1) == {1, 2, ABSENT}
    ledger.settle(1, 2)
    assert ledger.versions(1) == {2}
    ledger.wrote(1, 3, sure=True)
    ledger.wrote(1, 2, sure=True)  # acknowledged earlier by the server, heard of later
    assert ledger.versions(1) == {3}
    ledger.wrote(1, ABSENT, sure=True)
    assert ledger.versions(1) == {ABSENT} and ledger.rows() == []
    ledger.wrote(2, 1, sure=False)
    assert ledger.versions(2) == {ABSENT, 1}


def test_the_page_counts_what_came_of_each_fault_and_what_went_wrong() -> None:
    outcomes = [Outcome(Case(KILL, DRIVER, "verify.done:1"), None, 1, 2.0), Outcome(Case(KILL, PROCESS, "verify.done:2"), 0, 0, 1.0),
                Outcome(Case(LINE, CUT, "verify.done:1", line=S3), 0, 0, 4.0)]
    lines = [*map(crash.record, outcomes), {"wrong": "row 7 is nowhere"}, {"totals": {"rows": 12}}]
    text = crash.page(lines)
    assert "**2 kills, 1 network faults, 0 lies of the store: 1 of them lost" in text
    assert "| kills | 2 | 1 | 1 | 1.5 s | 2.0 s |" in text
    assert "| `verify.done` | 1 same, 1.0 s | 1 next, 2.0 s |" in text or "| `verify.done` | 1 next, 2.0 s | 1 same, 1.0 s |" in text


def test_every_lie_is_about_every_object_that_a_run_writes() -> None:
    assert len(lies.lies()) == 6 * len(lies.OBJECTS) + 2
