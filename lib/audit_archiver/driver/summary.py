"""The JSON summary of a run: one object on stdout (schemas/report.v1.json), for whatever watches over the runs."""

from __future__ import annotations

import datetime
from typing import Any, Optional

from audit_archiver import __version__
from audit_archiver.driver.results import DONE, FAILED, NOTHING, PHASES, REFUSED, STOPPED, DatabaseResult, Run, TableResult
from audit_archiver.driver.vacuum import Reclaimed
from audit_archiver.postgres.space import Space

FORMAT = "aa-report"
VERSION = 1


def build(run: Run) -> dict[str, Any]:
    """The summary of `run` (man 5 aa-report)."""
    tables = run.tables
    return {
        "format": FORMAT, "version": VERSION, "run": run.run, "archiver_version": __version__,
        "started_at": run.started_at, "ended_at": _later(run.started_at, run.seconds), "seconds": _seconds(run.seconds),
        "exit": run.exit, "stopped_by": run.stopped_by, "bucket": run.bucket, "prefix": run.prefix,
        "totals": {
            "tables": {outcome: sum(1 for table in tables if table.outcome == outcome)
                       for outcome in (DONE, NOTHING, REFUSED, FAILED, STOPPED)},
            "rows": sum(table.rows for table in tables), "objects": sum(table.batches for table in tables),
            "bytes": sum(table.bytes for table in tables), "gz_bytes": sum(table.gz_bytes for table in tables),
            "reusable": sum(table.reclaimed.reusable or 0 for table in tables if table.reclaimed),
            "returned": sum(table.reclaimed.returned for table in tables if table.reclaimed)},
        "databases": [_database(each) for each in run.databases],
        "warnings": [{"msg": each.msg, "hint": each.hint, "database": each.database, "table": each.table} for each in run.warnings],
        "errors": [_error(table) for table in tables if table.error is not None],
    }


def _database(made: DatabaseResult) -> dict[str, Any]:
    return {"name": made.name, "host": made.host, "server": made.server, "recovered": made.recovered,
            "phases": {phase: _seconds(made.phases.get(phase, 0.0)) for phase in PHASES},
            "tables": [_table(table) for table in made.tables]}


def _table(table: TableResult) -> dict[str, Any]:
    return {
        "schema": table.schema, "table": table.table, "outcome": table.outcome, "code": table.code, "rows": table.rows,
        "left": {"locked": table.locked, "referenced": table.referenced, "null_timestamps": table.null_timestamps,
                 "infinite_timestamps": table.infinite_timestamps, "inexact": table.inexact,
                 "too_wide": table.too_wide, "failing": table.failing},
        "objects": table.batches, "bytes": table.bytes, "gz_bytes": table.gz_bytes,
        "ratio": None if table.ratio is None else round(table.ratio, 4), "seconds": _seconds(table.seconds),
        "rows_per_s": None if table.rows_per_s is None else round(table.rows_per_s), "space": _space(table.reclaimed)}


def _space(made: Optional[Reclaimed]) -> Optional[dict[str, Any]]:
    """Sizes before and after, what is reusable and what was returned (REQ-VAC-004..007)."""
    if made is None:
        return None
    share = 100 * made.returned / made.before.total if made.before and made.before.total else 0.0
    return {"strategy": made.strategy, "done": made.done, "seconds": _seconds(made.seconds), "reusable": made.reusable,
            "returned": made.returned, "returned_percent": round(share, 1), "problem": made.problem,
            "before": _sizes(made.before), "after": _sizes(made.after)}


def _sizes(made: Optional[Space]) -> Optional[dict[str, int]]:
    return None if made is None else {"total": made.total, "heap": made.heap, "toast": made.toast, "indexes": made.indexes}


def _error(table: TableResult) -> dict[str, Any]:
    error = table.error
    assert error is not None
    return {"code": error.code, "msg": error.msg, "detail": error.detail, "hint": error.hint, "at": error.at,
            "database": table.database, "schema": table.schema, "table": table.table}


def _seconds(value: float) -> float:
    return round(value, 3)


def _later(text: str, seconds: float) -> str:
    began = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    return (began + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
