"""Run the checks of a preflight: databases, their tables, the bucket. Each declares itself in on_*.py.

    findings = run_checks(config, wanted, store, staging)        everything (aa-check)
    findings = of_database(connection, database, tables)         what a run asks before its first batch
    jobs = refuse(jobs, findings)                                failures become refused jobs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from audit_archiver.config.model import Config, Database, Table
from audit_archiver.exits import ArchiverError, NetworkError
from audit_archiver.formats import job as jobs_format
from audit_archiver.holder.notes import MAX_BATCH_ROWS
from audit_archiver.locking.lock import backend
from audit_archiver.objectstore.client import Store
from audit_archiver.postgres import catalog, connect, eligible, examine, partitions
from audit_archiver.postgres.rows_sql import Window
from audit_archiver.postgres.transaction import BATCH_BYTES
from audit_archiver.preflight import on_database, on_locking, on_run, on_staging, on_store, on_table
from audit_archiver.preflight.check import Check, failure
from audit_archiver.preflight.findings import FAIL, WARN, Finding

ALL: list[Check] = [*on_locking.CHECKS, *on_database.CHECKS, *on_table.CHECKS, *on_run.CHECKS, *on_staging.CHECKS, *on_store.CHECKS]
WIDTH_MATTERS_ROWS = 1000  # fewer take no time, whatever they hold
CONNECTION, SHAPE, BUCKET, BACKEND = "connection.session", "table.shape", "s3.bucket", "locking.backend"


def run_checks(config: Config, wanted: Sequence[tuple[Database, Sequence[Table]]], store: Optional[Store],
               staging: Optional[Path] = None) -> list[Finding]:
    """Everything that can be known before a run. One database that cannot be reached does not hide the next."""
    found = [Finding("configuration", WARN, text) for text in config.warnings]
    found += _of_locking(config)
    amounts: list[on_run.Amount] = []
    for database, tables in wanted:
        try:
            connection = connect.connect(database, purpose="check")
        except ArchiverError as error:
            found.append(failure(CONNECTION, error, database=database.name, at=database.at))
            continue
        try:
            found += of_database(connection, database, tables, thorough=True, amounts=amounts)
        finally:
            connection.close()
    amount = sum(amounts, on_run.Amount())
    run = on_run.Look(amount, config.resources.max_run_hours)
    found += [finding for check in on_run.CHECKS for finding in check.run(run)]
    if staging is not None:
        for directory in (staging, *filter(None, [config.s3.local_fallback_dir])):
            look = on_staging.Look(directory, amount.batch_bytes, config.resources.min_free_disk_gb)
            found += [finding for check in on_staging.CHECKS for finding in check.run(look)]
    return found + (of_store(store) if store is not None else [])


def _of_locking(config: Config) -> list[Finding]:
    """The findings about the lock's backend; none where PostgreSQL alone keeps the lock."""
    try:
        kept = backend(config)
    except ArchiverError as error:
        return [failure(BACKEND, error)]
    return [] if kept is None else [finding for check in on_locking.CHECKS for finding in check.run(on_locking.Look(kept))]


def _amount(connection: connect.Connection, table: Table, shape: catalog.Shape, job: Optional[dict[str, Any]]) -> on_run.Amount:
    """What there is to do in a table: by its job, or by what the server remembers of it; nothing if it cannot be asked."""
    batch_size = table.batch_size if job is None else job["batch_size"]
    try:
        if job is None:
            cutoff = eligible.cutoff(connection, table.retention_days + table.safety_buffer_days)
            rows = eligible.estimate(connection, shape, Window(cutoff))
        else:
            due = job["estimate"] or 0
            rows = due if job["limit"] is None else min(due, job["limit"])
        width = examine.bytes_per_row(connection, shape) if job is None or rows >= WIDTH_MATTERS_ROWS else 0
    except ArchiverError:
        return on_run.Amount()
    most = BATCH_BYTES if shape.toasted else sys.maxsize
    batch_rows = max(1, int(min(batch_size, most / width))) if width else batch_size
    return on_run.amount(rows, width, batch_rows, int(min(most, width * max(batch_size, MAX_BATCH_ROWS))), table.sleep_s)


def of_database(connection: connect.Connection, database: Database, tables: Sequence[Table], *,
                thorough: bool = False, force: bool = False, amounts: Optional[list[on_run.Amount]] = None,
                jobs: Sequence[dict[str, Any]] = ()) -> list[Finding]:
    """The findings about a database and its tables, on an open session; without `thorough` those of a run only.

    `force` is a person's will to archive a large table without an index all the same. `amounts` gets what there is
    to do in each table that nothing is said against, by its job where `jobs` has one.
    """
    where: dict[str, Any] = {"database": database.name, "at": database.at}
    try:
        server = examine.server(connection)
    except ArchiverError as error:
        return [failure(CONNECTION, error, **where)]
    try:
        physical = partitions.leaves(connection, tables)
    except ArchiverError as error:
        return [failure(CONNECTION, error, **where)]
    look = on_database.Look(connection, database, server, physical)
    found = [finding for check in on_database.CHECKS if thorough or not check.thorough for finding in check.run(look, **where)]
    if server.standby:
        return found
    by_name = {(job["schema"], job["table"]): job for job in jobs if "refused" not in job}
    for table in physical:
        job = by_name.get((table.schema, table.name))
        found += _of_table(connection, database, table, server, thorough, force, amounts if thorough or job else None, job)
        if connection.closed:
            break
    return found


def _of_table(connection: connect.Connection, database: Database, table: Table, server: examine.Server, thorough: bool,
              force: bool, amounts: Optional[list[on_run.Amount]], job: Optional[dict[str, Any]]) -> list[Finding]:
    where = {"database": database.name, "schema": table.schema, "table": table.name, "at": table.at}
    try:
        shape = catalog.shape(connection, table.schema, table.name, table.key, table.timestamp, table.at, table.find)
    except ArchiverError as error:
        return [failure(SHAPE, error, **where)]
    look = on_table.Look(connection, database, table, shape, server, force)
    found: list[Finding] = []
    for check in on_table.CHECKS:
        said = check.run(look, **where) if thorough or not check.thorough else []
        found += said
        if check.id in on_table.DOORS and said and said[-1].status == FAIL:
            break  # what follows reads the table
    if amounts is not None and not any(finding.status == FAIL for finding in found):
        amounts.append(_amount(connection, table, shape, job))
    return found


def of_run(database: Database, look: on_run.Look) -> list[Finding]:
    """The findings about a run of one database as a whole."""
    return [finding for check in on_run.CHECKS for finding in check.run(look, database=database.name, at=database.at)]


def of_store(store: Store) -> list[Finding]:
    """The findings about the bucket; it writes, reads and removes a small object under the prefix."""
    try:
        look = on_store.Look(store.check_bucket(), store.bucket)
    except ArchiverError as error:
        return [failure(BUCKET, error)]
    return [finding for check in on_store.CHECKS for finding in check.run(look)]


def refuse(jobs: Sequence[dict[str, Any]], findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The jobs, those with a failure of their own or of their database as refused ones. Raises NetworkError if that failed."""
    lost = next((finding for finding in findings if finding.code == NetworkError.code), None)
    if lost is not None:
        raise NetworkError(lost.text, hint=lost.remedy, at=lost.at)
    failures = [finding for finding in findings if finding.status == FAIL]
    return [_refused(job, failures) for job in jobs]


def _refused(job: dict[str, Any], failures: Sequence[Finding]) -> dict[str, Any]:
    names = (None, None), (job["schema"], job["table"])
    failed = next((finding for finding in failures if finding.database == job["database"]
                   and (finding.schema, finding.table) in names), None)
    # what the plan says stands, but that it was not permitted to count is better said with the missing grant
    if failed is None or ("refused" in job and failed.check != "table.rights"):
        return job
    msg = "; ".join(part for part in (failed.text, failed.remedy) if part)
    why = {"code": failed.code, "msg": msg, "at": failed.at}
    return jobs_format.build(run=job["run"], database=job["database"], schema=job["schema"], table=job["table"],
                             refused={key: value for key, value in why.items() if value is not None})
