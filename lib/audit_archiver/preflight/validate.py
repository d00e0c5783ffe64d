"""Run every check of the preflight and say what was found: what aa-check is, and aa-archive --validate-only."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Optional, Sequence

from audit_archiver import exits, lines, log
from audit_archiver.config.model import Config, Database, Table
from audit_archiver.exits import ArchiverError
from audit_archiver.objectstore.client import Store, open_store
from audit_archiver.preflight import checks, findings
from audit_archiver.preflight.check import failure


def run(settings: Config, wanted: Sequence[tuple[Database, list[Table]]], staging: Path, *, write: Callable[[bytes], None],
        text: bool) -> int:
    """Check configuration, databases, tables, staging and bucket; rows are only read, and a small object comes and goes in the bucket.

    `write` gets the findings as lines (`text`) or as one JSON object; in the log the failures are errors, beside lines that name
    them already one error for all.
    """
    store: Optional[Store] = None
    unusable: list[findings.Finding] = []
    try:
        store = open_store(settings)
    except ArchiverError as error:
        unusable = [failure(checks.BUCKET, error)]
    found = checks.run_checks(settings, wanted, store, staging) + unusable
    code = findings.exit_code(found)
    write("".join(f"{line}\n" for line in findings.lines(found)).encode() if text else lines.dump(findings.summary(found)))
    failed = [each for each in found if each.status == findings.FAIL]
    if text and failed:
        names = ", ".join(dict.fromkeys(each.check for each in failed))
        log.error("check.failed", f"{len(failed)} failed: {names}", code=code)
    for each in failed if not text else ():
        where = ".".join(part for part in (each.database, each.schema, each.table) if part)
        log.error("check.failed", f"{where}: {each.text}" if where else each.text, hint=each.remedy, at=each.at, check=each.check,
                  code=each.code)
    if code == exits.OK:
        log.info("check.done", "every check is passed", code=code)
    return code
