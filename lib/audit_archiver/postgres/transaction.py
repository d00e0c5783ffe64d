"""One batch's transaction: begin, lock, copy, delete, commit, each checked before the next may come.

The connection is in autocommit and BEGIN and COMMIT are statements. After each operation the session must be
in a transaction and the transaction must be the one that was published; anything else ends the connection
(C4). The caller decides what happens when; nothing here decides to commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import psycopg2
import psycopg2.extensions

from audit_archiver.exits import ArchiverError, Failed, Mismatch, NetworkError
from audit_archiver.points import point
from audit_archiver.postgres import catalog, connect
from audit_archiver.postgres.rows_sql import EXPANSION, Statements

WRITE_BYTES = 1 << 18
ROW_BYTES = 256_000_000  # of a row's line
BATCH_BYTES = 256 << 20  # of a batch's rows as they are stored, where any are stored out of line
ROLLBACK_WITHIN_S = 10.0

# COPY's binary format: signature, flags, length of the extension; fields, length and value of the first, length of the second
_HEADER, _MESSAGE, _END = struct.Struct(">11sii"), struct.Struct(">hiii"), struct.Struct(">h")

_NOW_SQL = "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')"

_CLOCK_SQL = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"


@dataclass(frozen=True)
class Locked:
    """What `lock` took: counts, digest, the outermost rows, the cursor for the next batch (None when swept)."""

    rows: int
    skipped_locked: int
    first: list[Any]
    last: list[Any]
    keys_sha256: str
    range: tuple[str, str]
    next: Optional[list[str]]
    inexact: list[str]
    too_wide: list[str]


class ShapeChanged(Failed):
    """The table changed under the batch: roll back and plan the table anew."""

    retry = True


class Transaction:
    """A transaction of one batch on its own connection; `export` reads under one snapshot and locks nothing."""

    def __init__(self, connection: connect.Connection, *, export: bool = False,
                 cancel: Callable[[connect.Connection], None] = connect.cut) -> None:
        self.connection = connection
        self.export = export
        self._cancel = cancel
        self.statements: Optional[Statements] = None
        self.xid: Optional[str] = None
        self.now = ""
        self._keys_sha256: Optional[str] = None

    def prepare(self, statements: Statements) -> None:
        """Make the batch table for `statements`, unless this connection has it already."""
        if self.statements is None or self.statements.shape != statements.shape:
            for sql in statements.create():
                connect.execute(self.connection, sql)
        self.statements = statements

    def begin(self, enter: Callable[[connect.Connection], None]) -> None:
        """BEGIN, take the scope's key with `enter`, publish the transaction's id and the server's time."""
        connect.execute(self.connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY" if self.export
                        else "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
        enter(self.connection)
        self._keys_sha256 = None
        if not self.export:
            self.xid = connect.scalar(self.connection, "SELECT txid_current()::text")
        self.now = connect.scalar(self.connection, _NOW_SQL)

    def lock(self, cursor: Optional[Sequence[str]], limit: int, *, roundtrip: Optional[str],
             leave: Sequence[str] = (), row_bytes: int = ROW_BYTES) -> Locked:
        """Take the next rows after `cursor`, locked, and digest their keys.

        `roundtrip` "all" checks every column of these rows, "some" those whose exactness depends on the value,
        None checks nothing; a row that would not come back as it is, one whose line is longer than `row_bytes`, and each key
        text in `leave`, is left out and named. Raises ShapeChanged, Retryable, NetworkError, Failed.
        """
        made = self._made()
        widest = 0
        if made.shape.toasted:
            fit, there, widest = connect.row(self.connection, made.fitting(cursor, limit, BATCH_BYTES))
            limit = limit if fit == there else max(1, fit)
        others = not self.export and connect.scalar(self.connection, made.others())
        self._run(made.fill(cursor, limit, lock=not self.export))
        self.check_shape()
        rows, digest, first, last, end, least, greatest = self._facts()
        taken, swept = rows, rows < limit
        too_wide = self._leave_wide(row_bytes) if widest > row_bytes // EXPANSION else []
        inexact = self._leave_out(roundtrip, leave, taken) if taken else []
        if inexact or too_wide or leave:
            rows, digest, first, last, _, least, greatest = self._facts()
        self._keys_sha256 = digest
        skipped = 0
        if others or not self.export and connect.scalar(self.connection, made.others()):
            skipped = max(0, connect.scalar(self.connection, made.skipped(cursor, None if swept else end)) - taken)
        self.check()
        return Locked(rows=rows, skipped_locked=skipped, first=first, last=last, keys_sha256=digest,
                      range=(least, greatest), next=None if swept else end, inexact=inexact, too_wide=too_wide)

    def refuse_children(self) -> None:
        """Raise Failed if deleting the batch would change or destroy rows of a child table (S4, T32)."""
        made = self._made()
        for reference in made.shape.references:
            if reference.destroys and (count := connect.scalar(self.connection, made.children(reference))):
                raise Failed(f"deleting rows of '{made.shape.title}' would reach {count} rows of "
                             f"'{reference.schema}.{reference.child}' through '{reference.name}' ({reference.action})",
                             hint="archive and remove those rows first, or change the foreign key")

    def copy(self, descriptor: int) -> tuple[int, int, str]:
        """Write the batch's rows to `descriptor`; returns rows, bytes and their SHA-256.

        Raises Failed unless everything arrived that COPY's command tag counts, up to the end mark.
        """
        out = _Lines(descriptor, self.cancel)
        with connect.errors(), self.connection.cursor() as cursor:
            try:
                cursor.copy_expert(self._made().copy(), out, WRITE_BYTES)
                out.flush()
            except Exception:
                if out.failure is not None:
                    raise out.failure from None
                raise
            counted = cursor.rowcount  # psycopg2 reads it from COPY's command tag; -1 if there was none
        self.check()
        if not out.ended or counted != out.messages:
            raise Failed(f"COPY wrote {counted} messages and {out.messages} arrived", hint="nothing was deleted; run again")
        return out.rows, out.bytes, out.sha256.hexdigest()

    def delete(self, rows: int, keys_sha256: str) -> str:
        """Delete the batch and return the server's time; Mismatch unless exactly the keys of `keys_sha256` went and stay away."""
        made = self._made()
        self.check()
        connect.execute(self.connection, "SAVEPOINT aa_delete")
        try:
            if (self._keys_sha256 or self._facts()[1]) != keys_sha256:
                raise Mismatch(f"other rows of '{made.shape.title}' are locked than were verified", hint="nothing was deleted")
            count, ours = connect.row(self.connection, made.delete())
            connect.execute(self.connection, "SET CONSTRAINTS ALL IMMEDIATE")
            if not count == ours == rows:
                raise Mismatch(f"the delete removed {count} rows of '{made.shape.title}' where {rows} were verified"
                               if count != rows else f"the delete removed other rows of '{made.shape.title}' than were verified",
                               hint="a trigger, rule or policy interferes; nothing was deleted")
            if made.shape.delete_triggers and (left := connect.scalar(self.connection, made.recount())):
                raise Mismatch(f"{left} deleted rows of '{made.shape.title}' are there again after the delete",
                               hint=f"look at the trigger '{made.shape.delete_triggers[0]}'; nothing was deleted")
        except ArchiverError:
            self._back_to_savepoint()
            raise
        self.check_shape()
        self.check()
        return connect.scalar(self.connection, _CLOCK_SQL)

    def commit(self) -> str:
        """Send COMMIT and return its command tag; only the tag COMMIT means committed (C4)."""
        point("holder.commit.before")
        tag = connect.execute(self.connection, "COMMIT")
        point("holder.commit.sent")
        return tag

    def cancel(self) -> None:
        """Have the server stop what runs here; called from another thread than the one that waits for it."""
        self._cancel(self.connection)

    def rollback(self) -> None:
        """End the transaction without a trace; closes the connection if even that fails or takes too long."""
        try:
            if self.connection.closed == 0 and self.status() != psycopg2.extensions.TRANSACTION_STATUS_IDLE:
                connect.within(self.connection, ROLLBACK_WITHIN_S, lambda: connect.execute(self.connection, "ROLLBACK"))
        except (ArchiverError, psycopg2.Error):
            self.connection.close()
        self.xid = None

    def status(self) -> int:
        """psycopg2's transaction status of the session."""
        return self.connection.get_transaction_status()

    def check(self) -> None:
        """Raise NetworkError and end the connection unless we are still in the very transaction that we published."""
        if self.status() != psycopg2.extensions.TRANSACTION_STATUS_INTRANS:
            self.connection.close()
            raise NetworkError("the batch's transaction is no longer open")
        if not self.export and connect.scalar(self.connection, "SELECT txid_current_if_assigned()::text") != self.xid:
            self.connection.close()
            raise Failed("the session is in another transaction than the batch's")

    def check_shape(self) -> None:
        """Raise ShapeChanged if the table is not what the plan's statements were made for (C7)."""
        shape = self._made().shape
        if catalog.read_fingerprint(self.connection, shape.oid) != shape.sha256:
            raise ShapeChanged(f"table '{shape.title}' changed while its batch was open", hint="it is planned anew")

    def _leave_wide(self, row_bytes: int) -> list[str]:
        found = connect.rows(self.connection, self._made().too_wide(row_bytes))
        if found:
            self._run(self._made().leave_numbers([row[0] for row in found]))
        return [row[1] for row in found]

    def _leave_out(self, roundtrip: Optional[str], leave: Sequence[str], taken: int) -> list[str]:
        made = self._made()
        if leave:
            self._run(made.leave_keys(leave))
        if roundtrip is None or made.inexact(all_columns=roundtrip == "all") is None:
            return []
        found = self._inexact(roundtrip == "all", 1, taken)
        if found:
            self._run(made.leave_numbers([row[0] for row in found]))
        return [row[1] for row in found]

    def _inexact(self, all_columns: bool, first: int, last: int) -> list[tuple[int, str]]:
        """Rows first..last that would not come back; where the check itself raises (a value its type no longer takes),
        the range is halved until the row that does it is known (S5)."""
        made = self._made()
        connect.execute(self.connection, "SAVEPOINT aa_roundtrip")
        try:
            found = connect.rows(self.connection, made.inexact(all_columns=all_columns, numbers=(first, last)) or "")
            connect.execute(self.connection, "RELEASE SAVEPOINT aa_roundtrip")
            return found
        except Failed as error:
            if (error.sqlstate or "")[:2] not in ("22", "23"):
                raise
        connect.execute(self.connection, "ROLLBACK TO SAVEPOINT aa_roundtrip")
        if first == last:
            return connect.rows(self.connection, made.key_of(first))
        middle = (first + last) // 2
        return self._inexact(all_columns, first, middle) + self._inexact(all_columns, middle + 1, last)

    def _facts(self) -> tuple[Any, ...]:
        found = connect.rows(self.connection, self._made().facts())
        if not found:
            return 0, "", [], [], None, "", ""
        rows, digest, first, last, cursor, least, greatest = found[0]
        return rows, digest, json.loads(first), json.loads(last), cursor, least, greatest

    def _run(self, sql: str) -> None:
        connect.execute(self.connection, sql)

    def _back_to_savepoint(self) -> None:
        """Undo a failed delete at once, so that triggers' effects do not wait for the rollback (REQ-TXN-014)."""
        if self.status() in (psycopg2.extensions.TRANSACTION_STATUS_INTRANS, psycopg2.extensions.TRANSACTION_STATUS_INERROR):
            connect.execute(self.connection, "ROLLBACK TO SAVEPOINT aa_delete")

    def _made(self) -> Statements:
        if self.statements is None:
            raise Failed("the batch has no prepared table")
        return self.statements


class _Lines:
    """Takes COPY's binary messages, each (rows, their lines), apart, writes the lines to a descriptor and hashes them.

    On a gone reader it cancels the COPY at once: psycopg2 would drain the rest of it first, seconds with the locks held.
    """

    def __init__(self, descriptor: int, cancel: Callable[[], None]) -> None:
        self._descriptor, self._cancel = descriptor, cancel
        self._held = b""
        self._begun = False
        self._parts: list[memoryview] = []
        self._waiting = 0
        self.sha256 = hashlib.sha256()
        self.rows = self.messages = self.bytes = 0
        self.ended = False
        self.failure: Optional[Exception] = None

    def write(self, data: bytes) -> int:
        """Called by psycopg2 with a message, or any part of one."""
        try:
            self._held = self._take(self._held + data if self._held else data)
            if self._waiting >= WRITE_BYTES:
                self.flush()
        except Exception as error:
            self.failure = error
            self._cancel()
            raise
        return len(data)

    def flush(self) -> None:
        """Write what waits."""
        parts: list[Any] = [b"".join(self._parts)] if self._waiting < 2 * WRITE_BYTES else self._parts  # a large row not once more
        self._parts, self._waiting = [], 0
        for part in map(memoryview, parts):
            self.sha256.update(part)
            while part:
                written = _write(self._descriptor, part)
                self.bytes += written
                part = part[written:]
                point("holder.copy.half")

    def _take(self, data: bytes) -> bytes:
        """Keep the lines of all whole messages; returns the rest."""
        place = 0
        if not self._begun and len(data) >= _HEADER.size:
            signature, _, extension = _HEADER.unpack_from(data)
            if signature != b"PGCOPY\n\xff\r\n\0" or extension:
                raise Failed("COPY did not begin as its binary format does")
            self._begun, place = True, _HEADER.size
        while self._begun and len(data) - place >= _END.size:
            if self.ended:
                raise Failed("COPY wrote on after its end mark")
            if _END.unpack_from(data, place) == (-1,):
                self.ended, place = True, place + _END.size
                continue
            if len(data) - place < _MESSAGE.size:
                break
            fields, width, rows, size = _MESSAGE.unpack_from(data, place)
            if (fields, width) != (2, 4) or size < 0:
                raise Failed("COPY wrote something else than rows and their lines")
            begin = place + _MESSAGE.size
            if len(data) < begin + size:
                break
            place = begin + size
            self._parts.append(memoryview(data)[begin:place])
            self._waiting += size
            self.rows, self.messages = self.rows + rows, self.messages + 1
        return data[place:]


def _write(descriptor: int, data: Any) -> int:
    while True:
        try:
            return os.write(descriptor, data)
        except BlockingIOError:  # somebody who shares the open file made it non-blocking again
            os.set_blocking(descriptor, True)
