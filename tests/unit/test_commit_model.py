"""The protocol survives every order of faults that the model can make, and the model notices each rule that is broken."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.commit_model import Protocol, Violated

PLAYS = settings(max_examples=150, stateful_step_count=40, derandomize=True, database=None, deadline=None,
                 suppress_health_check=list(HealthCheck))
HUNT = settings(PLAYS, max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False)
"""For a broken protocol: the first play that breaks an invariant is enough, it need not be made short."""

MUTANTS = {
    "delete before verify": ({"order": ("select", "upload", "delete", "commit", "verify", "record")}, "[12]:"),
    "record before commit": ({"order": ("select", "upload", "verify", "delete", "record", "commit")}, "2:"),
    "recover by the status alone": ({"asks_the_table": False}, "[12]:"),
    "recover while somebody is alive": ({"proves_that_nobody_is_alive": False}, "[12]:"),
    "clean up what is undecided": ({"removes_only_the_abandoned": False}, "[12]:"),
    "trust a watermark": ({"starts_from_the_oldest": False}, "4:"),
    "delete what is due instead of what was verified": ({"deletes_by_key": False}, "[123]:"),
}


@pytest.mark.req("REQ-REL-001", "T1", "T2", "T3", "T20", "T38", "T39")
def test_no_order_of_faults_breaks_an_invariant() -> None:
    run_state_machine_as_test(Protocol, settings=PLAYS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_protocol_with_one_rule_broken_is_found_out(name: str) -> None:
    changed, which = MUTANTS[name]
    with pytest.raises(Violated, match=f"^{which}"):
        run_state_machine_as_test(type("Mutant", (Protocol,), dict(changed)), settings=HUNT)
