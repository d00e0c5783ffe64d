"""aa-archive --dry-run: what would be archived, with the exact SQL, and nothing else.

Its sessions are read-only, so that PostgreSQL itself refuses whatever else this program might do (T46); it takes no
lock, asks the bucket only which rows are held, and works for a role that may only SELECT.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

from audit_archiver import exits, lines, log
from audit_archiver.catalogue import holds
from audit_archiver.config.model import Config, Database, Table
from audit_archiver.driver import figures, report, results
from audit_archiver.exits import ArchiverError
from audit_archiver.formats import names
from audit_archiver.objectstore.client import open_store
from audit_archiver.postgres import catalog, connect, eligible
from audit_archiver.postgres.rows_sql import Statements, predicate, window
from audit_archiver.preflight.plan import Selection, plan_database
from audit_archiver.stages.aa_plan import exit_code

FORMAT = "aa-dry-run"
VERSION = 1
SAMPLE_ROWS = 1000


@dataclass(frozen=True)
class Look:
    """One table as a run would treat it. `sample` is the first row's JSON line, read `sampled` rows in `sample_s`."""

    job: dict[str, Any]
    rows: int
    batches: int
    pauses_s: float
    sql: dict[str, str]
    objects: tuple[str, ...]
    sampled: int = 0
    sampled_bytes: int = 0
    sample_s: float = 0.0
    sample: Optional[str] = None

    @property
    def bytes(self) -> int:
        """All rows as JSON, before compression, if they are like the sample."""
        return self.sampled_bytes * self.rows // self.sampled if self.sampled else 0

    @property
    def reading_s(self) -> float:
        """How long reading alone takes at the sample's pace."""
        return self.sample_s * self.rows / self.sampled if self.sampled else 0.0


def run(settings: Config, wanted: Sequence[tuple[Database, list[Table]]], chosen: Selection, run_id: str, *,
        write: Callable[[bytes], None], text: bool, show_row: bool) -> int:
    """Plan and show every table; the exit code is that of the plan. `show_row` adds one row to the text, never to a log."""
    made = results.Run(run_id, "", settings.s3.bucket, settings.s3.prefix)
    jobs: list[dict[str, Any]] = []
    looks: list[Look] = []
    store = open_store(settings)
    for database, tables in wanted:
        made_plan = plan_database(database, settings, run_id, chosen, tables=tables, holds=holds.for_plan(store, database.name))
        for said in made_plan.held:
            log.warning("plan.held", said)
        found, planned = _look_at_all(settings, database, made_plan.jobs, run_id)
        refused = results.table_results([job for job in planned if "refused" in job], {})
        made.databases.append(results.DatabaseResult(database.name, report.host(database), refused))
        jobs += planned
        looks += found
        if text:
            for line in _text(settings, database, planned, found, chosen.exact, show_row):
                write(line.encode() + b"\n")
    code = exit_code(jobs)
    if text:
        rows, tables_with_rows = report.planned_rows(jobs)
        write(f"dry run: {figures.counted(rows, 'row')} of {figures.counted(tables_with_rows, 'table')} would be archived and "
              f"deleted; nothing was changed. exit {code}\n".encode())
    else:
        write(lines.dump(summary(run_id, jobs, looks)))
    for said in report.failures(made):
        log.error("dry_run.refused", said, code=code)
    return code


def _look_at_all(settings: Config, database: Database, planned: list[dict[str, Any]], run_id: str) -> tuple[list[Look], list[dict[str, Any]]]:
    """The looks at a database's planned jobs, and the jobs; one that cannot be looked at becomes a refused one."""
    if all("refused" in job for job in planned):
        return [], planned
    found: list[Look] = []
    jobs: list[dict[str, Any]] = []
    connection = connect.connect(database, purpose="dry run", run=run_id)
    try:
        eligible.only_read(connection)
        for job in planned:
            if "refused" not in job:
                try:
                    found.append(look(connection, settings, job))
                except ArchiverError as error:
                    job = {**{key: job[key] for key in ("format", "version", "run", "database", "schema", "table")},
                           "refused": {"code": error.code if error.code in exits.TABLE else exits.FAILED, "msg": str(error)}}
            jobs.append(job)
    finally:
        connection.close()
    return found, jobs


def look(connection: connect.Connection, settings: Config, job: dict[str, Any]) -> Look:
    """What a run would do with `job`, with a sample of its rows; `connection` should be read-only."""
    shape = catalog.shape(connection, job["schema"], job["table"], tuple(job["key"]), job["timestamp"], find=job.get("find", ()))
    asked = window(job)
    made = Statements(shape, asked)
    rows = report.planned_rows([job])[0]
    batches = -(-rows // job["batch_size"])
    held = settings.locking.mode == "held"
    sql = {"eligible": predicate(shape, asked), "prepare": "; ".join(made.create()),
           "select": made.fill(None, job["batch_size"], lock=held), "copy": made.copy(), "delete": made.delete()}
    stem = names.stem(settings.s3.prefix, job["database"], job["schema"], job["table"],
                      time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), 1)
    objects = tuple(f"s3://{settings.s3.bucket}/{stem}{suffix}" for suffix in (names.DATA, names.METADATA, names.KEYS))
    began = time.monotonic()
    sample = [line for (line,) in connect.rows(connection, made.sample(min(SAMPLE_ROWS, rows)))] if rows else []
    return Look(job, rows, batches, max(0, batches - 1) * job["sleep_s"], sql, objects, len(sample),
                sum(len(line.encode()) + 1 for line in sample), time.monotonic() - began, sample[0] if sample else None)


def _text(settings: Config, database: Database, jobs: list[dict[str, Any]], looks: list[Look], exact: bool, show_row: bool) -> list[str]:
    said = [f"{database.name} at {report.host(database)} -> s3://{settings.s3.bucket}/{settings.s3.prefix}"]
    said += report.plan(jobs, exact=exact)
    for found in looks:
        said += ["", f"-- {figures.printable(found.job['schema'] + '.' + found.job['table'])}: eligible are rows with",
                 found.sql["eligible"], "-- once per connection", f"{found.sql['prepare']};",
                 "-- each batch, in a transaction of its own; after the first one with the last row's place as one more condition",
                 f"{found.sql['select']};", f"{found.sql['copy']};"]
        if settings.locking.mode == "late":
            said.append("-- locking.mode is late: the rows are locked and compared again before this")
        said += ["-- after these objects were read back from the store", *(f"--   {name}" for name in found.objects), f"{found.sql['delete']};"]
        if found.sampled:
            said.append(f"-- {figures.size(found.bytes)} as JSON before compression, if all rows are like the first {figures.rows(found.sampled)}; "
                        f"reading alone takes about {figures.duration(found.reading_s)}, pauses between batches {figures.duration(found.pauses_s)}")
        if show_row and found.sample is not None:
            said += ["-- the first row", found.sample]
    return [*said, ""]


def summary(run_id: str, jobs: Sequence[dict[str, Any]], looks: Sequence[Look]) -> dict[str, Any]:
    """Everything but the row as one object (schemas/dry-run.v1.json)."""
    refused = [{"database": job["database"], "schema": job["schema"], "table": job["table"], "code": job["refused"]["code"],
                "msg": job["refused"]["msg"], "at": job["refused"].get("at")} for job in jobs if "refused" in job]
    tables = [{"database": found.job["database"], "schema": found.job["schema"], "table": found.job["table"], "cutoff": found.job["cutoff"],
               "start": found.job["start"], "end": found.job["end"], "rows": found.rows, "batches": found.batches,
               "pauses_s": found.pauses_s, "sql": found.sql, "objects": list(found.objects), "bytes": found.bytes,
               "reading_s": round(found.reading_s, 3)} for found in looks]
    return {"format": FORMAT, "version": VERSION, "run": run_id, "exit": exit_code(jobs), "tables": tables, "refused": refused}
