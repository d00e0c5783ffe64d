"""Findings of the preflight as values, and how they are said: lines for people, one JSON object for machines.

A finding never stops the next check; whoever asked decides what a `fail` is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, Optional, Sequence

from audit_archiver import __version__, exits

OK, WARN, FAIL = "ok", "warn", "fail"
FORMAT = "aa-findings"
VERSION = 1


@dataclass(frozen=True)
class Finding:
    """What one check says of one subject. `code` is the exit code that a failure means, 0 for all others."""

    check: str
    status: str
    text: str
    remedy: Optional[str] = None
    at: Optional[str] = None
    code: int = exits.OK
    database: Optional[str] = None
    schema: Optional[str] = None
    table: Optional[str] = None


def exit_code(findings: Iterable[Finding]) -> int:
    """0 unless something failed; the code of all failures if they have one, else 3."""
    codes = {finding.code for finding in findings if finding.status == FAIL}
    if not codes:
        return exits.OK
    return codes.pop() if len(codes) == 1 else exits.CONFIG


def lines(findings: Sequence[Finding]) -> list[str]:
    """One line per subject that is well, one per warning and failure, the subjects in the order they were looked at."""
    several = len({finding.database for finding in findings if finding.database}) > 1
    told: list[tuple[str, str, str]] = []
    subjects: dict[Any, list[Finding]] = {}
    for finding in findings:
        subjects.setdefault(_subject(finding), []).append(finding)
    for own in subjects.values():
        bad = [finding for finding in own if finding.status != OK]
        good = [finding.text for finding in own if finding.status == OK and finding.text]
        if good and not any(finding.status == FAIL for finding in bad):
            told.append((OK, _label(own[0], several), ", ".join(good)))
        told += [(finding.status, _label(finding, several), _sentence(finding)) for finding in bad]
    wide = max((len(label) for _, label, _ in told), default=0)
    return [f"{status:<4}  {label:<{wide}}  {text}" for status, label, text in told]


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """All findings as one object (schemas/findings.v1.json)."""
    return {"format": FORMAT, "version": VERSION, "archiver_version": __version__, "exit": exit_code(findings),
            "findings": [{"check": each.check, "status": each.status, "database": each.database, "schema": each.schema,
                          "table": each.table, "text": each.text, "remedy": each.remedy, "at": each.at, "code": each.code}
                         for each in findings]}


def _subject(finding: Finding) -> tuple[Optional[str], Optional[str], Optional[str], Optional[str]]:
    """Tables are one subject each; of a database and of the store each kind of check is one."""
    return finding.database, finding.schema, finding.table, None if finding.table else finding.check.partition(".")[0]


def _label(finding: Finding, several: bool) -> str:
    if finding.table:
        label = f"{finding.schema}.{finding.table}"
        return f"{finding.database} {label}" if several else label
    kind, _, name = finding.check.partition(".")
    if finding.database is None:
        return kind
    return f"{finding.database}: {kind if finding.status == OK or kind == 'connection' else name}"


def _sentence(finding: Finding) -> str:
    text = finding.text + (f". {finding.remedy}" if finding.remedy else "")
    return text + (f" ({finding.at})" if finding.at and finding.status == FAIL else "")
