"""Write docs/checks.md from the declarations in preflight/on_*.py, and the list of findings in docs/validation.md; --check only compares."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from audit_archiver.preflight import checks  # noqa: E402
from audit_archiver.validate import findings  # noqa: E402
from tools.generated import main  # noqa: E402

PAGE = ROOT / "docs" / "checks.md"
VALIDATION = ROOT / "docs" / "validation.md"
BEGIN, END = "<!-- BEGIN FINDINGS -->\n", "<!-- END FINDINGS -->\n"
HEAD = """\
# The checks before a run

`aa-check` runs all of them, and so does `aa-archive --validate-only`:

<!-- scene: old rows -->
```sh
aa-check -c my.yaml --output text
```

A run itself repeats them before its first batch, but for those that take a while or that it learns anyway.
A failure refuses the table or the database with the exit code given; a warning lets the run go on. This page is made by
`tools/checks.py` from the checks themselves.

| check | if not | exit | what is looked at | what to do |
|---|---|---|---|---|
"""


SEVERITY = {"fail": "fails", "warn": "warns", "ok": "is said"}


def page() -> str:
    """The whole page."""
    rows = []
    for each in checks.ALL:
        code = str(each.code) if each.severity == "fail" else ""
        remedy = each.remedy or ("" if each.severity == "ok" else "the message names it")
        rows.append(" | ".join(("", f"`{each.id}`", SEVERITY[each.severity], code, each.about, remedy, "")).strip())
    return HEAD + "\n".join(rows).replace("|  |", "| |") + "\n"


def validation() -> str:
    """docs/validation.md with its list of findings."""
    before, _, rest = VALIDATION.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    rows = [f"| `{each.id}` | {SEVERITY.get(each.status, 'is said')} | {each.depth} | {each.about} | {each.remedy} |"
            for each in findings.CHECKS.values()]
    return "\n".join([before + BEGIN.strip(), "| finding | if not | from depth | what must be | what to do |", "|---|---|---|---|---|",
                      *rows, END.strip(), after.rstrip("\n"), ""])


def rewritten() -> dict[Path, str]:
    """Both pages as they should be."""
    return {PAGE: page(), VALIDATION: validation()}


if __name__ == "__main__":
    sys.exit(main("write docs/checks.md and the findings in docs/validation.md", rewritten()))
