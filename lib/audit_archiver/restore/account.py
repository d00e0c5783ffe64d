"""What a restore of one table came to: the JSON of the report, which also lies in the bucket (RESTORE-019)."""

from __future__ import annotations

import datetime
import os
import pwd
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Optional

from audit_archiver import __version__, lines, log
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import ArchiverError
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.restore.load import Outcome

START, END = "start", "end"
DONE, PARTLY, FAILED, NOTHING = "done", "partly", "failed", "nothing to do"


@dataclass
class Account:
    """A restore of one source table into one target, and what became of it."""

    restore: str
    source: tuple[str, str, str]
    target: tuple[str, str, str]
    asked: dict[str, Any]
    dry_run: bool = False
    created: bool = False
    differences: list[dict[str, Any]] = field(default_factory=list)
    chosen: int = 0
    restored_before: int = 0
    not_archived: int = 0
    archived: int = 0
    meant: int = 0
    inserted: int = 0
    same: int = 0
    conflicts: int = 0
    sampled: int = 0
    gz_bytes: int = 0
    bytes: int = 0
    objects: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    code: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, outcome: Outcome) -> None:
        """One more outcome."""
        if outcome.failure is not None:
            self.fail(outcome.failure, outcome.batches[0])
            return
        self.archived, self.meant, self.inserted = self.archived + outcome.rows, self.meant + outcome.meant, self.inserted + outcome.inserted
        self.same, self.conflicts, self.sampled = self.same + outcome.same, self.conflicts + outcome.conflicts, self.sampled + outcome.sampled
        self.objects += [batch.key for batch in outcome.batches]
        self.gz_bytes += sum(batch.gz_bytes or 0 for batch in outcome.batches)
        self.bytes += sum(batch.bytes or 0 for batch in outcome.batches)

    def fail(self, error: ArchiverError, batch: Optional[Batch] = None) -> None:
        """Something that was not done, and why."""
        self.failures.append({"s3_key": batch.key if batch else None, "code": error.code, "msg": error.msg})
        self.code = self.code or error.code

    @property
    def outcome(self) -> str:
        """In a word."""
        if self.failures:
            return PARTLY if self.objects else FAILED
        return DONE if self.objects else NOTHING

    def as_json(self, event: str) -> dict[str, Any]:
        """The report at its start or end, checked against its schema."""
        keys = ("database", "schema", "table")
        value = {
            "format": "aa-restore", "version": 1, "restore": self.restore, "event": event,
            "at": now(),
            "by": by(),
            "dry_run": self.dry_run, "source": dict(zip(keys, self.source)), "target": {**dict(zip(keys, self.target)), "created": self.created},
            "asked": self.asked, "differences": self.differences, "outcome": self.outcome if event == END else "begun",
            "batches": {"chosen": self.chosen, "restored": len(self.objects), "restored_before": self.restored_before,
                        "not_archived": self.not_archived},
            "rows": {"archived": self.archived, "meant": self.meant, "inserted": self.inserted, "same": self.same,
                     "conflicts": self.conflicts, "sampled": self.sampled},
            "bytes": self.bytes, "gz_bytes": self.gz_bytes, "seconds": round(time.monotonic() - self.began, 3),
            "objects": self.objects, "failures": self.failures, "exit": self.code}
        schema.validate("restore", value, "the report")
        return value

    def put(self, store: Store, event: str) -> None:
        """Leave it in the bucket, under a name of its own."""
        store.put_new(names.restore_key(store.prefix, *self.source, self.restore, event), lines.dump(self.as_json(event)))

    def end(self, store: Store) -> None:
        """Leave its end in the bucket, if anything was done. Rows are in the table or not whatever becomes of it."""
        if self.dry_run or not (self.objects or self.failures):
            return
        try:
            self.put(store, END)
        except ArchiverError as error:
            log.error("restore.record", f"the record of this restore could not be written: {error.msg}", hint=error.hint, code=error.code)
            self.fail(error)


def now() -> str:
    """The time of a record."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def by() -> dict[str, str]:
    """Who it is that restores: user, host, archiver_version."""
    return {"user": _user(), "host": socket.gethostname(), "archiver_version": __version__}


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
