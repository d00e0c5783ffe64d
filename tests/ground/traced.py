"""pytest plugin: writes which requirement ids have a passing test to .trace.json, for `make trace`.

An id counts when a test marked with it passed and none marked with it failed; what a run did not collect keeps
the result of an earlier run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT / ".trace.json"
KNOWN = ROOT / "tests" / "requirements.txt"

_ids = pytest.StashKey[list[str]]()
_results = pytest.StashKey[dict[str, dict[str, object]]]()


def known_ids() -> list[str]:
    """Every requirement and trap id, in the order of the specification."""
    return [line for line in KNOWN.read_text().split("\n") if line and not line.startswith("#")]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = set(known_ids())
    for item in items:
        ids = [str(each) for marker in item.iter_markers("req") for each in marker.args]
        unknown = [each for each in ids if each not in known]
        if unknown:
            raise pytest.UsageError(f"{item.nodeid}: no such requirement: {', '.join(unknown)}")
        item.stash[_ids] = ids


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = (yield).get_result()
    results = item.config.stash[_results]
    seen = results.setdefault(item.nodeid, {"ids": item.stash.get(_ids, []), "outcome": "passed"})
    if report.failed:
        seen["outcome"] = "failed"
    elif report.skipped and seen["outcome"] == "passed":
        seen["outcome"] = "skipped"


def pytest_sessionfinish(session: pytest.Session) -> None:
    results = {test: seen for test, seen in session.config.stash[_results].items() if seen["ids"]}
    if not results:
        return
    earlier = json.loads(TRACE.read_text()) if TRACE.exists() else {}
    fresh = {test: seen for test, seen in earlier.items() if (ROOT / test.split("::")[0]).exists()}
    text = json.dumps({**fresh, **results}, indent=1, sort_keys=True) + "\n"
    scratch = TRACE.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(TRACE)
