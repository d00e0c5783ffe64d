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

_IDS = "requirement ids"


def known_ids() -> list[str]:
    """Every requirement and trap id, in the order of the specification."""
    return [line for line in KNOWN.read_text().split("\n") if line and not line.startswith("#")]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers run the tests and send their reports to this process
        config.pluginmanager.register(_Writer())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = set(known_ids())
    for item in items:
        ids = [str(each) for marker in item.iter_markers("req") for each in marker.args]
        unknown = [each for each in ids if each not in known]
        if unknown:
            raise pytest.UsageError(f"{item.nodeid}: no such requirement: {', '.join(unknown)}")
        item.user_properties.append((_IDS, ids))


class _Writer:
    """Collects what the reports say, which carry the ids of their test, and writes it at the end of the run."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ids = dict(report.user_properties).get(_IDS)
        if not ids:
            return
        seen = self.results.setdefault(report.nodeid, {"ids": ids, "outcome": "passed"})
        if report.failed:
            seen["outcome"] = "failed"
        elif report.skipped and seen["outcome"] == "passed":
            seen["outcome"] = "skipped"

    def pytest_sessionfinish(self) -> None:
        if not self.results:
            return
        earlier = json.loads(TRACE.read_text()) if TRACE.exists() else {}
        fresh = {test: seen for test, seen in earlier.items() if (ROOT / test.split("::")[0]).exists()}
        text = json.dumps({**fresh, **self.results}, indent=1, sort_keys=True) + "\n"
        scratch = TRACE.with_suffix(".tmp")
        scratch.write_text(text)
        scratch.replace(TRACE)
