"""Old rows that stayed because other rows still reference them: counted after a run, for the report (S3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterable

from audit_archiver import log
from audit_archiver.config.model import Database
from audit_archiver.exits import ArchiverError
from audit_archiver.holder.notes import JobKey, key_of
from audit_archiver.postgres import catalog, connect, eligible
from audit_archiver.postgres.rows_sql import window


def still_referenced(database: Database, jobs: Iterable[dict[str, Any]], *, run: str) -> dict[JobKey, int]:
    """How many old rows of each job's table are still referenced by a plain foreign key; reads only.

    A count that cannot be had is said and left out: it changes nothing about what was archived.
    """
    found: dict[JobKey, int] = {}
    wanted = [job for job in jobs if "refused" not in job]
    if not wanted:
        return found
    try:
        connection = connect.connect(database, purpose="count", run=run)
        try:
            eligible.only_read(connection)
            for job in wanted:
                found[key_of(job)] = _count(connection, job)
        finally:
            connection.close()
    except ArchiverError as error:
        log.warning("left.unknown", f"database '{database.name}': how many rows are still referenced could not be counted: {error.msg}",
                    hint=error.hint)
    return found


def _count(connection: connect.Connection, job: dict[str, Any]) -> int:
    shape = catalog.shape(connection, job["schema"], job["table"], tuple(job["key"]), job["timestamp"])
    asked = window(job)
    all_old = replace(shape, references=())
    return eligible.count(connection, all_old, asked) - eligible.count(connection, shape, asked)
