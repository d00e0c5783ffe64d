"""The holder's connections to one database: the control connection with the lock, batch connections, and one that watches.

The control connection holds K1 from the first begin of the database until the end; recovery runs between
"K2 exclusive granted" and the first batch, so it never meets a living transaction (design, sections 3 and 5).
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field, replace
from typing import Any, Callable, NamedTuple, Optional, Sequence

from audit_archiver.config.model import Config, Database
from audit_archiver.exits import ArchiverError, ConfigError, Retryable
from audit_archiver.formats.hold import Hold
from audit_archiver.locking.lock import Lock
from audit_archiver.postgres import catalog, connect, ddl, held, partitions
from audit_archiver.postgres.rows_sql import Statements, window
from audit_archiver.postgres.transaction import Transaction

CANCEL_WITHIN_S = 5.0


class Standing(NamedTuple):
    """What the bucket says of a database once recovery has run: the (schema, table) that must be left alone and why, and the
    rows that are held."""

    tables: dict[tuple[str, str], str]
    holds: Sequence[Hold] = ()


# recover(database, control connection, tables or None for all)
Recover = Callable[[Database, connect.Connection, Optional[list[tuple[str, str]]]], Standing]


@dataclass
class Plan:
    """A job's table as this holder archives it."""

    shape: catalog.Shape
    statements: Statements
    server: dict[str, Any]
    scope_oid: Optional[int]
    ddl: list[str]
    cascade: bool = False
    leave: list[str] = field(default_factory=list)
    checked_once: bool = False
    described: bool = False


class DatabaseSession:
    """Connections, lock and plans of one database. Its methods may be called from several threads."""

    def __init__(self, config: Config, database: Database, run: str, recover: Recover) -> None:
        self.config, self.database, self.run = config, database, run
        self._recover = recover
        self._free: list[Transaction] = []
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._locked_tables: dict[int, tuple[str, str]] = {}
        self._guard = threading.RLock()
        self.held: dict[tuple[str, str], str] = {}
        self._holds: Sequence[Hold] = ()
        self.control = connect.connect(database, purpose="control", run=run)
        try:
            self.lock = Lock(config, database, self.control, run)
            self.lock.take({} if self.per_table else None)
        except BaseException:
            self.control.close()
            raise
        ending = contextlib.ExitStack()
        ending.callback(self.lock.release)
        with ending:
            # for short questions: what is asked on the control connection may have to wait, behind an ALTER TABLE that waits for us
            self.watch = connect.connect(database, purpose="watch", run=run)
            ending.callback(self.watch.close)
            if not self.per_table:
                with self.lock.beating():
                    self._settle(recover(database, self.control, None))
            ending.pop_all()

    @property
    def per_table(self) -> bool:
        """True if the lock's scope is a table (locking.scope)."""
        return self.config.locking.scope == "table"

    def _settle(self, found: Standing) -> None:
        self.held.update(found.tables)
        self._holds = found.holds

    def plan(self, job: dict[str, Any], leave: list[str]) -> Plan:
        """The plan of `job`, made at its first begin. Raises ConfigError, Retryable (changed since planned) and others."""
        name, find = (job["schema"], job["table"]), tuple(job.get("find", ()))
        asked = *name, tuple(job["key"]), job["timestamp"], job["cutoff"], job["start"], job["end"], job["shape_sha256"], find
        with self._guard:
            if asked not in self._plans:
                configured = partitions.configured(self.control, self.database, *name)
                shape = catalog.shape(self.control, *name, tuple(job["key"]), job["timestamp"], getattr(configured, "at", None), find)
                if shape.sha256 != job["shape_sha256"]:
                    raise Retryable(f"table '{shape.title}' changed after it was planned", hint="it is planned anew")
                if self.per_table and shape.oid not in self._locked_tables:
                    self.lock.take({shape.oid: shape.title}, f"'{shape.title}' in {self.lock.title}")
                    self._settle(self._recover(self.database, self.control, [name]))
                    self._locked_tables[shape.oid] = name
                holds = () if job.get("force_rearchive") else held.of_table(self.control, self._holds, *name, job["timestamp"])
                planned = window(job)
                ranges = tuple(dict.fromkeys([*planned.held, *(hold.range for hold in holds)]))  # some may be younger than the plan
                self._plans[asked] = Plan(
                    shape, Statements(shape, replace(planned, held=ranges)), catalog.server(self.control, shape.oid),
                    shape.oid if self.per_table else None, ddl.statements(self.control, shape.oid),
                    getattr(configured, "cascade", "refuse") == "acknowledged", leave)
            if name in self.held:
                raise ConfigError(f"table '{name[0]}.{name[1]}' is held back: {self.held[name]}",
                                  hint="'aa-delete --explain' lists the rows in question, 'aa-recover --decide' settles it")
            return self._plans[asked]

    def transaction(self, plan: Plan) -> Transaction:
        """A begun transaction for `plan`, on a connection of its own."""
        with self._guard:
            transaction = self._free.pop() if self._free else None
        if transaction is None:
            transaction = Transaction(connect.connect(self.database, purpose="batch", run=self.run,
                                                      transaction_timeout_s=self.database.transaction_timeout_s), cancel=self._cancel)
        try:
            transaction.prepare(plan.statements)
            transaction.begin(lambda batch: self.lock.enter(batch, plan.scope_oid))
        except BaseException:
            transaction.connection.close()
            raise
        return transaction

    def give_back(self, transaction: Transaction) -> None:
        """Keep the connection of an ended transaction for the next batch."""
        with self._guard:
            if transaction.connection.closed == 0:
                self._free.append(transaction)

    def close(self) -> None:
        """End every connection; the server releases K1, and K2 before it: who starts next shall find nobody's transaction."""
        with self._guard:
            for transaction in self._free:
                transaction.connection.close()
            self._free.clear()
            self.watch.close()
            self.lock.release()

    def _cancel(self, batch: connect.Connection) -> None:
        """Have the server cancel what runs on `batch`; if it cannot be asked, break the connection off."""
        if batch.closed:
            return
        try:
            connect.within(self.watch, CANCEL_WITHIN_S, lambda: connect.scalar(
                self.watch, "SELECT pg_cancel_backend(%s)", (batch.info.backend_pid,)))
        except ArchiverError:
            connect.cut(batch)


def scope_error(error: ArchiverError, per_table: bool) -> bool:
    """True for an error at begin or lock that belongs to one job alone; the network and the database's lock concern all."""
    return error.code != 7 and (error.code != 4 or per_table)
