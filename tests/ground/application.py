"""An application at work in an audit table: inserts, updates, deletes, deadlocks, and a ledger of what was acknowledged.

    application = Application(lambda: psycopg2.connect(dsn), "public.audit_logs")
    application.create(); application.start()
    ... archive, break, recover ...
    with application.quiet() as ledger:
        ledger.allows(17, 3)                              # may row 17 be there in version 3?

The content of a row follows from its id and its version, so that every row can be judged wherever it lies. A write whose
COMMIT got no answer is open: the row may be as before or as after it, and `settle` says which once the row was seen.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import random
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, TextIO

import psycopg2
import psycopg2.extensions

ABSENT = 0
"""The version of a row that is not there."""

DUE_SINCE = int(datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc).timestamp())
NOTES = ("opened", "Prüfung abgeschlossen", "path C:\\temp, \"quoted\"", "two lines\nof text", "")
CREATE = """
CREATE TABLE {table} (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, account integer NOT NULL, version integer NOT NULL,
                      note text, detail jsonb);
CREATE INDEX ON {table} (created_at, id);
"""
INSERT = """
INSERT INTO {table} SELECT i, to_timestamp(%(since)s + i), i %% 97, 1, (%(notes)s::text[])[1 + i %% 6],
       jsonb_build_object('hash', md5(i || ':1'), 'id', i) FROM generate_series(%(first)s, %(last)s) AS i
"""
UPDATE = """
UPDATE {table} SET version = version + 1, detail = jsonb_build_object('hash', md5(id || ':' || version + 1), 'id', id)
WHERE id = %(id)s RETURNING version
"""
DELETE = "DELETE FROM {table} WHERE id = %(id)s"
SETTINGS = "SELECT set_config('lock_timeout', %s, false), set_config('synchronous_commit', 'on', false)"
LOCK_TIMEOUT = "300ms"  # the archiver may stand still with rows locked, and an application does not wait for ever
DUE = 0.1  # of the rows that are inserted all the time; were it many, a run on a slow machine would never come to an end
PAUSE_S = (0.03, 0.15)


def expected(row: int, version: int, young_since: int, young: bool) -> dict[str, Any]:
    """The row as a JSON line has it."""
    at = datetime.datetime.fromtimestamp((young_since if young else DUE_SINCE) + row, datetime.timezone.utc)
    notes = (*NOTES, None)
    return {"id": row, "created_at": at.strftime("%Y-%m-%dT%H:%M:%S+00:00"), "account": row % 97, "version": version,
            "note": notes[row % 6], "detail": {"id": row, "hash": hashlib.md5(f"{row}:{version}".encode()).hexdigest()}}


class Ledger:
    """Which versions of which rows there may be; every acknowledged write goes into `file` as a line first."""

    def __init__(self, file: Optional[TextIO] = None) -> None:
        self._file = file
        self._guard = threading.Lock()
        self._sure: dict[int, int] = {}
        self._maybe: dict[int, set[int]] = {}
        self._gone: set[int] = set()
        self.young: dict[int, None] = {}
        self.acknowledged = self.open = 0

    def wrote(self, row: int, version: int, *, sure: bool) -> None:
        """Row `row` was given `version` (ABSENT: it was deleted); not `sure` where the answer to COMMIT was lost."""
        with self._guard:
            self.acknowledged += sure
            self.open += not sure
            if self._file is not None:
                self._file.write(json.dumps([row, version, sure]) + "\n")
                self._file.flush()
            if not sure:
                self._maybe.setdefault(row, set()).add(version)
            elif version == ABSENT:
                self._gone.add(row)
            else:
                self._sure[row] = max(version, self._sure.get(row, ABSENT))

    def allows(self, row: int, version: int) -> bool:
        """Whether row `row` may be there in `version`, or may be absent."""
        return version in self.versions(row)

    def versions(self, row: int) -> set[int]:
        """The versions that the row may have."""
        if row in self._gone:
            return {ABSENT}
        sure = self._sure.get(row, ABSENT)
        return {sure} | {each for each in self._maybe.get(row, ()) if each > sure or each == ABSENT}

    def settle(self, row: int, version: int) -> None:
        """The row was seen in `version`, or nowhere: what was open about it is not any more."""
        if version == ABSENT:
            self._gone.add(row)
        else:
            self._sure[row] = version
        self._maybe.pop(row, None)

    def rows(self) -> list[int]:
        """Every row that is or may be there."""
        return [row for row in {*self._sure, *self._maybe} if self.versions(row) != {ABSENT}]


class Application:
    """Threads that write into one table as an application does, each with a connection of its own.

    Two of them insert rows, update any of the latest and delete young ones; two update the same two rows in opposite order,
    which the server has to end as a deadlock now and then. What fails is rolled back and forgotten, as applications do; a
    lost connection is opened anew. No row that is due is deleted: a batch of a dead run that has lost rows to somebody else
    is held for a person to decide (design, section 5).
    """

    def __init__(self, connect: Callable[[], psycopg2.extensions.connection], table: str, ledger: Optional[Path] = None) -> None:
        self._connect, self._table = connect, table
        self._file = None if ledger is None else open(ledger, "a", encoding="utf-8")
        self.ledger = Ledger(self._file)
        self.young_since = int(time.time()) - 5 * 86400
        self.deadlocks = self.refused = self.lost = 0
        self.spares_due = False  # while True only young rows are updated: a late batch with rows that somebody updates does not end
        self._next = 1
        self._ids = threading.Lock()
        self._stop = threading.Event()
        self._gates = [threading.Lock() for _ in range(4)]
        self._threads = [threading.Thread(target=self._live, args=(number,), daemon=True, name=f"application {number}") for number in range(4)]

    def create(self) -> None:
        """Make the table."""
        with contextlib.closing(self._connect()) as connection, connection, connection.cursor() as cursor:
            cursor.execute(CREATE.format(table=self._table))

    def start(self) -> None:
        """Begin to write."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Write no more."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if self._file is not None:
            self._file.close()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[Ledger]:
        """No write is under way or begins meanwhile."""
        with contextlib.ExitStack() as held:
            for gate in self._gates:
                held.enter_context(gate)
            yield self.ledger

    def fill(self, count: int, *, young: bool = False) -> None:
        """Add so many rows, due unless `young`, in one transaction."""
        with contextlib.closing(self._connect()) as connection, connection.cursor() as cursor:
            if not self._insert(connection, cursor, count, young):
                raise RuntimeError(f"the application could not insert {count} rows")

    def expected(self, row: int, version: int) -> dict[str, Any]:
        """The row as a JSON line has it."""
        return expected(row, version, self.young_since, row in self.ledger.young)

    # -- inside

    def _live(self, number: int) -> None:
        dice = random.Random(number)
        connection = None
        while not self._stop.is_set():
            with self._gates[number]:
                try:
                    if connection is None or connection.closed:
                        connection = self._connect()
                        connection.autocommit = True
                        with connection.cursor() as cursor:
                            cursor.execute(SETTINGS, (LOCK_TIMEOUT,))
                    with connection.cursor() as cursor:
                        self._act(number, dice, connection, cursor)
                except psycopg2.Error as error:
                    self._failed(connection, error)
            self._stop.wait(dice.uniform(*PAUSE_S))
        if connection is not None:
            connection.close()

    def _failed(self, connection: Any, error: psycopg2.Error) -> None:
        self.deadlocks += error.pgcode == "40P01"
        self.refused += error.pgcode in ("40P01", "55P03")
        if connection is None or connection.closed:
            self.lost += 1
            return
        try:
            with connection.cursor() as cursor:
                cursor.execute("ROLLBACK")
        except psycopg2.Error:
            self.lost += 1
            connection.close()

    def _act(self, number: int, dice: random.Random, connection: Any, cursor: Any) -> None:
        rows = self._young_pair(number) if self.spares_due else self._known(number, dice)
        kind = dice.random()
        if number >= 2:
            self._write(connection, cursor, [(UPDATE, row) for row in rows])
        elif kind < 0.45 or not rows:
            self._insert(connection, cursor, dice.randint(1, 4), dice.random() >= DUE)
        elif kind < 0.9:
            self._write(connection, cursor, [(UPDATE, rows[0])])
        elif young := list(self.ledger.young)[-50:]:
            self._write(connection, cursor, [(DELETE, dice.choice(young))])

    def _known(self, number: int, dice: random.Random) -> list[int]:
        """Rows that were inserted lately; for the deadlocking pair the same two, in opposite order."""
        last = self._next - 1
        if last < 10:
            return []
        if number >= 2:
            pair = [last // 40 * 40 - 1, last // 40 * 40 - 3]
            return pair if number == 2 else pair[::-1]
        return [dice.randint(max(1, last - 200), last)]

    def _young_pair(self, number: int) -> list[int]:
        """Two rows that are not due, in opposite order for every other thread."""
        pair = list(self.ledger.young)[-8:-6]
        return pair[::-1] if number % 2 else pair

    def _insert(self, connection: Any, cursor: Any, count: int, young: bool) -> bool:
        with self._ids:
            first, self._next = self._next, self._next + count
        rows = range(first, first + count)
        if young:
            self.ledger.young.update(dict.fromkeys(rows))
        values = {"since": self.young_since if young else DUE_SINCE, "notes": [*NOTES, None], "first": first, "last": rows[-1]}
        cursor.execute("BEGIN")
        cursor.execute(INSERT.format(table=self._table), values)
        return self._commit(connection, cursor, [(row, 1) for row in rows])

    def _write(self, connection: Any, cursor: Any, statements: list[tuple[str, int]]) -> None:
        cursor.execute("BEGIN")
        written = []
        for sql, row in statements:
            cursor.execute(sql.format(table=self._table), {"id": row})
            if cursor.rowcount:
                written.append((row, ABSENT if sql is DELETE else cursor.fetchone()[0]))
        self._commit(connection, cursor, written)

    def _commit(self, connection: Any, cursor: Any, written: list[tuple[int, int]]) -> bool:
        """COMMIT, and the ledger's word on it. An error after COMMIT was sent leaves the writes open."""
        sure = True
        try:
            cursor.execute("COMMIT")
            sure = cursor.statusmessage == "COMMIT"
            return sure
        except psycopg2.Error:
            sure = False
            raise
        finally:
            for row, version in written:
                self.ledger.wrote(row, version, sure=sure)
