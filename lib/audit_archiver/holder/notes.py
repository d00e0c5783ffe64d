"""What the holder notes of each job: exit code, report and restarts come from here, not from the shell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

from audit_archiver.exits import ArchiverError

JobKey = tuple[str, str, str]

MAX_BATCH_ROWS = 50_000
MIN_BATCH_ROWS = 1_000
QUICK_S = 10.0
SLOW_S = 120.0


@dataclass
class JobNotes:
    """One job's progress: rows that left the table (committed), what stayed and why."""

    job: dict[str, Any]
    batch_rows: int
    rows: int = 0
    batches: int = 0
    bytes: int = 0
    gz_bytes: int = 0
    skipped_locked: int = 0
    inexact: list[str] = field(default_factory=list)
    too_wide: list[str] = field(default_factory=list)
    cursor: Optional[list[str]] = None
    swept: bool = False
    error: Optional[ArchiverError] = None
    first_at: Optional[float] = None
    last_at: Optional[float] = None

    def adapt(self, seconds: float) -> None:
        """Choose the next batch's rows from how long a batch took (REQ-ARC-013..016)."""
        ceiling, floor = max(MAX_BATCH_ROWS, self.job["batch_size"]), min(MIN_BATCH_ROWS, self.job["batch_size"])
        if seconds < QUICK_S:
            self.batch_rows = min(ceiling, max(self.batch_rows + 1, self.batch_rows * 3 // 2))
        elif seconds > SLOW_S:
            self.batch_rows = max(floor, self.batch_rows // 2)

    def unfinished(self) -> dict[str, Any]:
        """The job that is left after a failed pipeline: from the last committed batch on, the limit less its rows."""
        left = self.job["limit"]
        return {**self.job, "cursor": self.cursor or self.job["cursor"],
                "limit": None if left is None else max(0, left - self.rows)}

    @property
    def finished(self) -> bool:
        """True if all that the job asks for was done: the table swept, or the limit reached."""
        limit = self.job["limit"]
        return self.swept or (limit is not None and self.rows >= limit)

    def outcome(self) -> dict[str, Any]:
        """How the job ended in aa-select, as a line of its --outcomes."""
        error = self.error
        said = None if error is None else {"code": error.code, "msg": error.msg, "detail": error.detail, "hint": error.hint,
                                           "at": error.at, "retry": error.retry}
        return {**dict(zip(("database", "schema", "table"), key_of(self.job))), "swept": self.swept, "inexact": self.inexact,
                "too_wide": self.too_wide, "error": said}

    def take(self, outcome: Mapping[str, Any]) -> None:
        """Note what such a line says; a sweep that began anew has found again what it left before."""
        self.swept, self.inexact, self.too_wide = outcome["swept"], outcome["inexact"], outcome["too_wide"]
        said = outcome["error"]
        if said is not None:
            self.error = ArchiverError(said["msg"], detail=said["detail"], hint=said["hint"], at=said["at"])
            self.error.code, self.error.retry = said["code"], said["retry"]


def key_of(job: dict[str, Any]) -> JobKey:
    """What identifies a job in a run."""
    return job["database"], job["schema"], job["table"]
