"""The one question before a run that deletes, on a terminal only (contracts.md, 6; REQ-USE-009)."""

from __future__ import annotations

from typing import TextIO

from audit_archiver.driver import figures

YES = ("y", "yes")


def confirm(rows: int, tables: int, *, force: bool, stdin: TextIO, stderr: TextIO, exact: bool = True) -> bool:
    """Ask whether to archive and delete; True without asking with `force`, without rows, or without a terminal.

    Anything but y or yes, the end of the input too, is a no.
    """
    if force or not rows or not (stdin.isatty() and stderr.isatty()):
        return True
    about = "" if exact else "about "
    stderr.write(f"archive and delete {about}{figures.counted(rows, 'row')} of {figures.counted(tables, 'table')}? [y/N] ")
    stderr.flush()
    return stdin.readline().strip().lower() in YES
