"""The one question before a run that deletes, on a terminal only (contracts.md, 6; REQ-USE-009)."""

from __future__ import annotations

from typing import TextIO

from audit_archiver import cli
from audit_archiver.driver import figures


def confirm(rows: int, tables: int, *, force: bool, stdin: TextIO, stderr: TextIO, exact: bool = True) -> bool:
    """Ask whether to archive and delete; True without asking with `force`, without rows, or without a terminal."""
    if force or not rows or not (stdin.isatty() and stderr.isatty()):
        return True
    about = "" if exact else "about "
    return cli.agreed(f"archive and delete {about}{figures.counted(rows, 'row')} of {figures.counted(tables, 'table')}?", stdin, stderr)
