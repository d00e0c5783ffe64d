"""The holder's counterpart for aa-select without AA_TXN: each batch is read under one snapshot, nothing is locked.

What is exported like this is deleted later by aa-delete's guarded path, which locks and compares every row
again (postgres.md C9). `call` answers as the holder does, so that aa-select has one way to work.
"""

from __future__ import annotations

from typing import Any, Optional

from audit_archiver.config.model import Config
from audit_archiver.exits import ArchiverError, ConfigError, Failed, Mismatch, Retryable
from audit_archiver.holder.batch import describe, name_left
from audit_archiver.holder.notes import JobKey, JobNotes, key_of
from audit_archiver.postgres import catalog, connect, ddl
from audit_archiver.postgres.rows_sql import Statements, window
from audit_archiver.postgres.transaction import Locked, Transaction


class Export:
    """Reads one batch after the other; only one is open at a time. `left` counts the rows that were left out."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.left = 0
        self._notes: dict[JobKey, JobNotes] = {}
        self._transactions: dict[str, Transaction] = {}
        self._numbers: dict[JobKey, int] = {}
        self._planned: dict[tuple[Any, ...], tuple[catalog.Shape, Statements]] = {}
        self._checked: set[JobKey] = set()
        self._open: Optional[tuple[dict[str, Any], Transaction, catalog.Shape]] = None
        self._locked: Optional[Locked] = None

    def call(self, op: str, descriptor: Optional[int] = None, **fields: Any) -> dict[str, Any]:
        """One of the holder's operations begin, lock, copy, abandon, refuse."""
        if op == "begin":
            return self._begin(fields["job"])
        if op == "lock":
            return self._lock(fields["cursor"], fields["limit"])
        if op == "copy" and descriptor is not None:
            return self._copy(descriptor)
        if op in ("abandon", "refuse"):
            self._end()
            return {}
        raise Failed(f"there is no operation '{op}' without a holder")

    def ended(self, job: dict[str, Any], error: Optional[ArchiverError]) -> JobNotes:
        """What is to be said of a job that has ended."""
        notes = self._note(job)
        del self._notes[key_of(job)]
        notes.error, notes.swept = error, notes.swept and error is None
        return notes

    def close(self) -> None:
        """End every connection."""
        for transaction in self._transactions.values():
            transaction.connection.close()

    def _begin(self, job: dict[str, Any]) -> dict[str, Any]:
        self._end()
        database = self._config.database(job["database"])
        if database is None:
            raise ConfigError(f"the configuration has no database '{job['database']}'", at=str(self._config.path))
        transaction = self._transactions.get(database.name)
        if transaction is None:
            transaction = Transaction(connect.connect(database, purpose="export", run=job["run"],
                                                      transaction_timeout_s=database.transaction_timeout_s), export=True)
            self._transactions[database.name] = transaction
        shape, statements = self._plan(job, transaction.connection)
        transaction.prepare(statements)
        transaction.begin(lambda _connection: None)
        number = self._numbers[key_of(job)] = self._numbers.get(key_of(job), 0) + 1
        self._open = job, transaction, shape
        return {"handle": "", "xid": None, "now": transaction.now, "number": number, "archived_at": transaction.now,
                "server": catalog.server(transaction.connection, shape.oid), "rows": job["batch_size"],
                "host": database.host or "local"}

    def _plan(self, job: dict[str, Any], connection: connect.Connection) -> tuple[catalog.Shape, Statements]:
        find = tuple(job.get("find", ()))
        key = *key_of(job), tuple(job["key"]), job["timestamp"], job["cutoff"], job["start"], job["end"], job["shape_sha256"], find
        if key not in self._planned:
            shape = catalog.shape(connection, job["schema"], job["table"], tuple(job["key"]), job["timestamp"], find=find)
            if shape.sha256 != job["shape_sha256"]:
                raise Retryable(f"table '{shape.title}' changed after it was planned", hint="plan it anew")
            self._planned[key] = shape, Statements(shape, window(job))
        return self._planned[key]

    def _lock(self, cursor: Optional[list[str]], limit: int) -> dict[str, Any]:
        job, transaction, shape = self._current()
        first = "some" if key_of(job) in self._checked else "all"
        roundtrip = {"never": None, "always": "all", "first": first}[self._config.roundtrip]
        self._locked = locked = transaction.lock(cursor, limit, roundtrip=roundtrip, row_bytes=self._config.resources.max_row_bytes)
        self._checked.add(key_of(job))
        self.left += len(locked.inexact) + len(locked.too_wide)
        notes = self._note(job)
        notes.inexact += locked.inexact
        notes.too_wide += locked.too_wide
        notes.swept = locked.next is None
        name_left(shape.title, locked, self._config.resources.max_row_mb)
        host = self._config.database(job["database"]).host  # type: ignore[union-attr]
        return {"rows": locked.rows, "skipped_locked": 0, "first": locked.first, "last": locked.last,
                "keys_sha256": locked.keys_sha256, "shape_sha256": shape.sha256, "next": locked.next,
                "columns": [[column.name, column.type] for column in shape.ordered()],
                "table": describe(shape, host, transaction.connection.server_version, locked.range,
                                  ddl=ddl.statements(transaction.connection, shape.oid) if self._numbers[key_of(job)] == 1 else None)}

    def _copy(self, descriptor: int) -> dict[str, Any]:
        _, transaction, shape = self._current()
        rows, size, digest = transaction.copy(descriptor)
        if self._locked is None or rows != self._locked.rows:
            raise Mismatch(f"{shape.title}: the snapshot gave {rows} rows, other than it counted")
        self._end()
        return {"rows": rows, "bytes": size, "rows_sha256": digest}

    def _note(self, job: dict[str, Any]) -> JobNotes:
        return self._notes.setdefault(key_of(job), JobNotes(job, job.get("batch_size") or 1))

    def _current(self) -> tuple[dict[str, Any], Transaction, catalog.Shape]:
        if self._open is None:
            raise Failed("no batch is open")
        return self._open

    def _end(self) -> None:
        if self._open is not None:
            self._open[1].rollback()
            self._open = None
