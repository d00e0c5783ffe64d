"""One open batch in the holder: its transaction, how far it has come, and what its line must say.

Everything in a line's `batch` section was made here, so a line that says anything else is none of ours.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Optional

from audit_archiver import log
from audit_archiver.exits import Failed, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import schema
from audit_archiver.holder.notes import JobNotes
from audit_archiver.holder.session import DatabaseSession, Plan
from audit_archiver.postgres import catalog
from audit_archiver.postgres.transaction import Locked, Transaction


class Batch:
    """One open batch: its transaction and what is known of it."""

    def __init__(self, handle: str, number: int, job: dict[str, Any], notes: JobNotes, session: DatabaseSession, plan: Plan,
                 transaction: Transaction) -> None:
        self.handle, self.number, self.job, self.notes = handle, number, job, notes
        self.session, self.plan, self.transaction = session, plan, transaction
        self.state = "begun"
        self.locked: Optional[Locked] = None
        self.passed: list[Locked] = []  # itself, and empty batches after it that came to their end before it
        self.rows_sha256 = ""
        self.line: dict[str, Any] = {}
        self.deleted: dict[str, Any] = {}
        self.begun_at = time.monotonic()
        self.xid = transaction.xid
        self.busy = threading.RLock()

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.plan.shape.title} batch_{self.number:03d}"

    @property
    def age_s(self) -> float:
        """Seconds since its transaction began."""
        return time.monotonic() - self.begun_at

    def section(self, holder: str) -> dict[str, Any]:
        """The `batch` section of its line: all of it is known here, so a line that says anything else is refused."""
        assert self.locked is not None
        locked, shape = self.locked, self.plan.shape
        made = {"number": self.number,
                **{name: self.job[name] for name in ("run", "database", "schema", "table", "key", "timestamp", "cutoff")},
                "archived_at": self.transaction.now, "rows": locked.rows, "skipped_locked": locked.skipped_locked,
                "first": locked.first, "last": locked.last,
                "keys_sha256": locked.keys_sha256, "columns": [[column.name, column.type] for column in shape.ordered()],
                "server": self.plan.server, "shape_sha256": shape.sha256,
                "txn": {"xid": self.xid, "holder": holder, "handle": self.handle}}
        return {"id": batches.identity(made), **made}

    def require_verified(self, line: dict[str, Any], holder: str) -> None:
        """Raise Failed or Mismatch unless `line` shows that just the rows of this batch were verified in the store."""
        schema.validate("batch", line, "the batch line")
        said, verified = line["batch"], line.get("verified")
        if not verified:
            raise Failed(f"{batches.name(said)} was not verified")
        assert self.locked is not None
        if said != self.section(holder) or line["serialized"]["rows_sha256"] != self.rows_sha256:
            raise Mismatch(f"{batches.name(said)} is not the batch that this transaction locked and copied")
        if (verified["rows"], verified["keys_sha256"], verified["sha256"]) != (
                self.locked.rows, self.locked.keys_sha256, line["serialized"]["data"]["sha256"]):
            raise Mismatch(f"{batches.name(said)}: what was verified is not what was copied")
        batches.require_fresh(line)


def name_left(title: str, locked: Locked, max_row_mb: float) -> None:
    """Name the rows that were left out of a batch because they would not come back as they are, or are too large."""
    for text in locked.too_wide:
        log.error("row.left.wide", f"a row of '{title}' is larger than max_row_mb ({max_row_mb:g}) and stays in the table",
                  key=text, hint="raise resources.max_row_mb; a process may then take three times as much, and 100 MB")
    for text in locked.inexact:
        log.error("row.left.inexact", f"a row of '{title}' would not come back exactly and stays in the table",
                  key=text, hint="its value breaks the round trip; see docs/types.md")


def describe(shape: Any, host: Optional[str], version: int, least_greatest: tuple[str, str],
             ddl: Optional[list[str]] = None) -> dict[str, Any]:
    """The `table` object of the rows frame, which is for the metadata only; `ddl` goes into a run's first one (REQ-INT-012)."""
    return {**({"ddl": ddl} if ddl else {}), **({"find": list(shape.find)} if shape.find else {}),
            "host": host or "local", "postgres_version": catalog.version(version),
            "columns": [[column.name, column.type, column.nullable] for column in shape.ordered()],
            "primary_key": list(shape.key), "range": list(least_greatest),
            "indexes": [{"name": name, "columns": list(columns)} for name, columns in shape.indexes]}
