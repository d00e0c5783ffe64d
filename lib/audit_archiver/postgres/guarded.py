"""The guarded delete's side of PostgreSQL: lock rows by their keys, see what they are now, delete, commit.

For batches that were exported without a lock (postgres.md C9). The rows are locked in the order of the key list and
serialized again by the expressions that exported them; the caller compares, and deletes only what is still the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import Any, Callable, Iterator, Optional, Sequence

from audit_archiver.exits import ArchiverError, ConfigError, Failed, Mismatch, NetworkError
from audit_archiver.formats.hold import Hold
from audit_archiver.postgres import catalog, connect, held, witness
from audit_archiver.postgres.rows_sql import BATCH, Statements, Window
from audit_archiver.postgres.transaction import Transaction

Fence = Callable[[connect.Connection], None]

KEYS_AT_ONCE = 2000
COMMIT_WITHIN_S = 60.0

_NOW_SQL = "to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"


class InDoubt(NetworkError):
    """COMMIT was sent and its answer is unknown: recovery decides."""

    retry = False


class Guarded:
    """One table's guarded deletes: `control` holds the lock, `transaction` has a connection of its own.

    `enter` marks a transaction as one under the lock; `require` raises, inside it, unless the lock is still ours.
    """

    def __init__(self, control: connect.Connection, transaction: Transaction, batch: dict[str, Any], enter: Fence, require: Fence,
                 at: Optional[str] = None) -> None:
        self._control, self._transaction, self._enter, self._require = control, transaction, enter, require
        self._shape = catalog.shape(control, batch["schema"], batch["table"], tuple(batch["key"]), batch["timestamp"],
                                    at).as_exported(batch["columns"])
        self.server = catalog.server(control, self._shape.oid)
        self._statements = Statements(self._shape, Window(batch["cutoff"]))

    def require_unchanged(self, batch: dict[str, Any]) -> None:
        """Raise Mismatch unless the table is the one that the batch was selected from, in the shape it had then (C7)."""
        ours = tuple(self.server[name] for name in ("system", "database_oid", "table_oid"))
        theirs = tuple(batch["server"][name] for name in ("system", "database_oid", "table_oid"))
        if ours != theirs:
            raise Mismatch(f"table '{self._shape.title}' is not the one that the batch was selected from",
                           detail="server, database or table are others", hint="nothing was deleted; select again")
        if self._shape.sha256 != batch["shape_sha256"]:
            raise Mismatch(f"table '{self._shape.title}' was altered after the batch was selected",
                           detail="what was added to it is not archived", hint="nothing was deleted; select again")

    @contextlib.contextmanager
    def begun(self) -> Iterator[Transaction]:
        """A transaction of this batch, which takes K2. Rolled back at the end unless committed."""
        transaction = self._transaction
        try:
            transaction.prepare(self._statements)
            transaction.begin(self._enter)
            yield transaction
        finally:
            transaction.rollback()

    def lock(self, key_texts: Sequence[bytes]) -> list[int]:
        """Lock the rows with these keys, in their order, waiting up to lock_timeout; the numbers (from 1) of the found."""
        transaction, statements = self._transaction, self._statements
        for start in range(0, len(key_texts), KEYS_AT_ONCE):
            listed = statements.key_list(key_texts[start:start + KEYS_AT_ONCE], start)
            connect.execute(transaction.connection, statements.find(listed))
        transaction.check_shape()
        transaction.check()
        numbers = statements.number_column
        return [row[0] for row in connect.rows(transaction.connection, f"SELECT {numbers} FROM {BATCH} ORDER BY {numbers}")]

    def require_unheld(self, holds: Sequence[Hold], title: str) -> None:
        """Raise ConfigError if a hold that the plan did not know keeps a locked row in the table (T12)."""
        shape, connection = self._shape, self._transaction.connection
        found = held.of_table(connection, holds, shape.schema, shape.name, shape.timestamp)
        rows = connect.scalar(connection, self._statements.held([hold.range for hold in found])) if found else 0
        if rows:
            raise ConfigError(f"{rows} rows of {title} are held; nothing was deleted", detail="; ".join(hold.words for hold in found),
                              hint="plan and select anew: what is held is left out; --force-rearchive deletes them all the same")

    def rows_sha256(self) -> str:
        """The digest of the locked rows, serialized again by the expressions of the export."""
        sink = os.open(os.devnull, os.O_WRONLY)
        try:
            return self._transaction.copy(sink)[2]
        finally:
            os.close(sink)

    def digests(self, key_texts: Sequence[bytes]) -> Iterator[tuple[int, str]]:
        """(number, SHA-256) of the row of each key that is there, in order."""
        return witness.digests(self._transaction.connection, self._statements, key_texts)

    def require_ready(self) -> None:
        """What must hold right before the DELETE: no child row would be reached (S4), and the lock is still ours (C3)."""
        self._transaction.refuse_children()
        self._require(self._transaction.connection)

    def delete(self, rows: int, keys_sha256: str) -> str:
        """Delete the locked rows; the server's time. Mismatch unless exactly the keys of `keys_sha256` went."""
        return self._transaction.delete(rows, keys_sha256)

    def commit(self, deadline_s: float = COMMIT_WITHIN_S) -> None:
        """COMMIT; only the command tag COMMIT means that it happened (C4).

        Raises InDoubt if no answer came, in time or at all: a half-open connection would block for ever (S1).
        """
        transaction = self._transaction
        transaction.check()
        answers: list[Any] = []

        def send() -> None:
            try:
                answers.append(connect.execute(transaction.connection, "COMMIT"))
            except ArchiverError as error:
                answers.append(error)

        thread = threading.Thread(target=send, name="commit", daemon=True)
        thread.start()
        thread.join(deadline_s)
        if not answers:  # wake the thread, or it would hold the connection's lock for ever
            connect.cut(transaction.connection)
            thread.join()
        answer = answers[0]
        if isinstance(answer, NetworkError):
            raise InDoubt(f"whether the delete from '{self._shape.title}' was committed is unknown: {answer.msg}",
                          hint="'aa-recover' finds out, and so does the next run")
        if isinstance(answer, ArchiverError):
            raise answer
        if answer != "COMMIT":
            raise Failed(f"COMMIT was answered with '{answer}', so nothing was deleted from '{self._shape.title}'")

    def after_commit(self, sample: Sequence[Any]) -> tuple[str, str, int]:
        """Time, WAL position, and how many of the sampled keys are in the table, asked on the control connection."""
        texts = [json.dumps(key, ensure_ascii=False, separators=(",", ":"))[1:-1].encode() for key in sample]
        present = self._statements.present(self._statements.key_list(texts))
        at, lsn, count = connect.row(self._control, f"SELECT {_NOW_SQL}, pg_current_wal_lsn()::text, ({present})")
        return at, lsn, count
