"""Which requirements and traps have a passing test: reads .trace.json, which every test run writes.

Prints the ids that no test shows and a count; --covered prints the covered ones with their tests instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.ground.traced import TRACE, known_ids  # noqa: E402


def covered() -> dict[str, list[str]]:
    """id -> the tests that show it. A failed test takes the id away; a skipped one does not count."""
    if not TRACE.exists():
        raise SystemExit("traced: no test has run yet: make test")
    shown: dict[str, list[str]] = {}
    failed = set()
    for test, seen in json.loads(TRACE.read_text()).items():
        for each in seen["ids"]:
            if seen["outcome"] == "passed":
                shown.setdefault(each, []).append(test)
            elif seen["outcome"] == "failed":
                failed.add(each)
    return {each: tests for each, tests in shown.items() if each not in failed}


def main(argv: Optional[list[str]] = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="traced", description="which requirements have a passing test")
    parser.add_argument("--covered", action="store_true", help="list the covered ids with their tests")
    args = parser.parse_args(argv)
    known, shown = known_ids(), covered()
    if args.covered:
        for each in known:
            for test in shown.get(each, []):
                print(f"{each:18} {test}")
    else:
        for each in known:
            if each not in shown:
                print(each)
    print(f"{len(shown)} of {len(known)} ids have a passing test", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
