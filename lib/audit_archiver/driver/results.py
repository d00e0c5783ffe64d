"""What a run came to, as values: one result per table, out of the jobs, the holder's notes and what failed.

The report for people (report.py), the JSON summary (summary.py) and the exit code are three views of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterable, Mapping, Optional, Sequence

from audit_archiver import exits
from audit_archiver.driver.vacuum import Reclaimed
from audit_archiver.exits import ArchiverError, Failed
from audit_archiver.holder.notes import JobKey, JobNotes, key_of

PHASES = ("select", "serialize", "upload", "verify", "delete", "record", "vacuum")
DONE, NOTHING, REFUSED, FAILED, STOPPED = "done", "nothing", "refused", "failed", "stopped"


@dataclass
class TableResult:
    """One table: `rows` have left it, are verified, committed and recorded or recordable; the others are still there."""

    database: str
    schema: str
    table: str
    outcome: str
    rows: int = 0
    batches: int = 0
    bytes: int = 0
    gz_bytes: int = 0
    seconds: float = 0.0
    locked: int = 0
    inexact: int = 0
    too_wide: int = 0
    failing: int = 0
    null_timestamps: int = 0
    infinite_timestamps: int = 0
    referenced: int = 0
    error: Optional[ArchiverError] = None
    reclaimed: Optional[Reclaimed] = None

    @property
    def label(self) -> str:
        """schema.table."""
        return f"{self.schema}.{self.table}"

    @property
    def code(self) -> int:
        """The exit code that this table alone would give; rows that no run will ever take make it 1."""
        if self.error is not None:
            return self.error.code
        return exits.SOME_FAILED if self.inexact or self.too_wide or self.failing else exits.OK

    @property
    def rows_per_s(self) -> Optional[float]:
        """Rows a second from the table's first lock to its last commit."""
        return self.rows / self.seconds if self.rows and self.seconds else None

    @property
    def ratio(self) -> Optional[float]:
        """Compressed bytes per byte."""
        return self.gz_bytes / self.bytes if self.bytes else None


@dataclass
class DatabaseResult:
    """One database's part of a run; `server` is PostgreSQL's version, `phases` seconds of work, which overlap."""

    name: str
    host: str
    tables: list[TableResult]
    server: Optional[str] = None
    recovered: list[str] = field(default_factory=list)
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Warned:
    """Something a person should look at though the work went on."""

    msg: str
    hint: Optional[str] = None
    database: Optional[str] = None
    table: Optional[str] = None


@dataclass
class Run:
    """A whole run. `stopped_by` is the name of the signal that ended it early."""

    run: str
    started_at: str
    bucket: str
    prefix: str
    databases: list[DatabaseResult] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    seconds: float = 0.0
    exit: int = exits.OK
    stopped_by: Optional[str] = None

    @property
    def tables(self) -> list[TableResult]:
        """Every table of every database."""
        return [table for database in self.databases for table in database.tables]

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of work per phase over all databases."""
        return {phase: sum(database.phases.get(phase, 0.0) for database in self.databases) for phase in PHASES}


def table_results(jobs: Sequence[Mapping[str, Any]], notes: Mapping[JobKey, JobNotes], *, failing: Iterable[JobKey] = (),
                  failure: Optional[ArchiverError] = None, stopped: bool = False) -> list[TableResult]:
    """One result per job. `failing` has a key per row that failed alone; `failure` ended the database's part early."""
    alone = list(failing)
    made = [_result(job, notes.get(key_of(dict(job))), alone.count(key_of(dict(job))), failure, stopped) for job in jobs]
    if failure is not None and not any(table.error is failure for table in made):
        # every row has left its table, but what came after, the record, failed: that is no success
        for table in [each for each in made if each.batches] or made:
            if table.error is None:
                table.outcome, table.error = FAILED, failure
    return made


def _result(job: Mapping[str, Any], notes: Optional[JobNotes], failing: int, failure: Optional[ArchiverError],
            stopped: bool) -> TableResult:
    made = TableResult(job["database"], job["schema"], job["table"], NOTHING, failing=failing)
    if "refused" in job:
        made.outcome, made.error = REFUSED, _refusal(job["refused"])
        return made
    if notes is not None:
        made.rows, made.batches, made.bytes, made.gz_bytes = notes.rows, notes.batches, notes.bytes, notes.gz_bytes
        made.locked, made.inexact, made.too_wide = notes.skipped_locked, len(notes.inexact), len(notes.too_wide)
        if notes.first_at is not None and notes.last_at is not None:
            made.seconds = notes.last_at - notes.first_at
    if notes is not None and notes.error is not None:
        made.outcome, made.error = FAILED, notes.error
    elif notes is not None and notes.finished:
        made.outcome = DONE if notes.rows else NOTHING
    elif failure is not None:
        made.outcome, made.error = FAILED, failure
    elif stopped:
        made.outcome = STOPPED
    elif notes is not None or job["estimate"]:
        made.outcome, made.error = FAILED, Failed(f"'{made.label}' was not worked through to its end", hint="run again")
    return made


def _refusal(why: Mapping[str, Any]) -> ArchiverError:
    error = ArchiverError(why["msg"], at=why.get("at"))
    error.code = why["code"]
    return error
