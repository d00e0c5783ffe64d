"""Conservation: the rows in a table and the rows in its archive are the rows that ever were, each in one place.

A row in the table is hashed by the server, as the line that it would be archived as; an archived row without the fields
that were added to it. So a row has one digest wherever it is, and a table can be compared with what it was.
"""

from __future__ import annotations

import datetime
import io
from dataclasses import dataclass, replace
from typing import Any, Optional, Sequence

from audit_archiver import log
from audit_archiver.catalogue import archived, content, index, runs
from audit_archiver.catalogue.archived import ARCHIVED as STATE_ARCHIVED
from audit_archiver.catalogue.archived import OPEN
from audit_archiver.config.model import Database, Table
from audit_archiver.exits import ConfigError, LockHeld
from audit_archiver.formats import batch as batches
from audit_archiver.objectstore.client import Store
from audit_archiver.postgres import catalog, connect, lock_holders, partitions, witness
from audit_archiver.postgres.rows_sql import Statements, Window
from audit_archiver.validate.ledger import ARCHIVED, DIGEST_HEX, IN_TABLE, RowLedger

ANY_CUTOFF = "2000-01-01T00:00:00Z"  # the statements used here ask for no age
ROWS_AT_ONCE = 5000


@dataclass(frozen=True)
class Leaf:
    """One physical table: as it is now, if it is, and by which columns its rows are compared."""

    schema: str
    table: str
    key: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    shape: Optional[catalog.Shape]

    def as_json(self) -> dict[str, Any]:
        """As a baseline has it."""
        return {"schema": self.schema, "table": self.table, "key": list(self.key), "columns": [list(column) for column in self.columns]}


class Scale:
    """Weighs one configured table. `known` are the tables of a baseline: their columns count, also of one that is gone by now."""

    def __init__(self, store: Store, database: Database, table: Table, known: Sequence[dict[str, Any]] = ()) -> None:
        self._store, self._database = store, database
        self._connection = connect.connect(database, purpose="balance")
        self.undecided = 0
        try:
            connect.execute(self._connection, "SET default_transaction_read_only = on")
            self._require_nobody("is at work")
            self._begun = set(runs.records(store, database.name)[0])
            self.leaves = self._leaves(table, known)
        except BaseException:
            self.close()
            raise

    def weigh(self, ledger: RowLedger, *, content_too: bool) -> None:
        """Put every row of the table and of the archive into the ledger; without `content_too` their keys only.

        Raises LockHeld if a run was at work meanwhile, for it moves rows from one place to the other.
        """
        with witness.snapshot(self._connection):
            for number, leaf in enumerate(self.leaves):
                if leaf.shape is not None:
                    self._add_table(ledger, number, leaf, content_too)
        for number, leaf in enumerate(self.leaves):
            self._add_archive(ledger, number, leaf, content_too)
        self._require_nobody("began meanwhile")
        if set(runs.records(self._store, self._database.name)[0]) != self._begun:
            raise LockHeld(f"a run was at work in database '{self._database.name}' meanwhile", hint="weigh again when none is")

    def close(self) -> None:
        """End the session."""
        self._connection.close()

    def _leaves(self, table: Table, known: Sequence[dict[str, Any]]) -> list[Leaf]:
        there = {(each.schema, each.name): each for each in partitions.leaves(self._connection, [table])}
        made = [self._leaf(each["schema"], each["table"], tuple(each["key"]), tuple((name, kind) for name, kind in each["columns"]),
                           there.pop((each["schema"], each["table"]), None)) for each in known]
        return made + [self._leaf(each.schema, each.name, each.key, None, each) for each in there.values()]

    def _leaf(self, schema: str, name: str, key: tuple[str, ...], columns: Optional[tuple[tuple[str, str], ...]],
              table: Optional[Table]) -> Leaf:
        shape = None
        if table is not None:
            shape = catalog.shape(self._connection, schema, name, table.key, table.timestamp, table.at)
            if shape.key != key:
                raise ConfigError(f"the key of table '{shape.title}' is another than in the baseline", hint="make a new baseline", at=table.at)
        if columns is None:
            assert shape is not None
            columns = tuple((column.name, column.type) for column in shape.ordered())
        return Leaf(schema, name, key, columns, shape)

    def _add_table(self, ledger: RowLedger, number: int, leaf: Leaf, content_too: bool) -> None:
        assert leaf.shape is not None
        then = dict(leaf.columns)
        kept = tuple(column for column in leaf.shape.columns if column.name in then)
        statements = Statements(replace(leaf.shape, columns=kept), Window(ANY_CUTOFF))
        comparable = tuple((column.name, column.type) for column in statements.shape.ordered()) == leaf.columns
        if content_too and not comparable:
            log.warning("balance.by_key", f"{leaf.shape.title} was altered: its rows are compared by key only")
        rows = _Rows(ledger, number, content_too and comparable)
        with connect.errors(), self._connection.cursor() as cursor:
            cursor.copy_expert(statements.every_digest(), rows)
        rows.flush_rows()

    def _add_archive(self, ledger: RowLedger, number: int, leaf: Leaf, content_too: bool) -> None:
        for batch in archived.of_table(self._store, self._database.name, leaf.schema, leaf.table):
            self.undecided += batch.state == OPEN
            if batch.state != STATE_ARCHIVED:
                continue
            line = index.read_commit(self._store, batch.stem)
            left_out = set(line.get("deleted", {}).get("left_out", ()))
            key_texts = content.key_list(self._store, line)[1]
            same = tuple((name, kind) for name, kind in line["batch"]["columns"]) == leaf.columns
            if content_too and same:
                digests = list(content.row_digests(self._store, line))  # to its end, which proves it
                ledger.add(ARCHIVED, number, (digest.encode() + b" " + key for place, (digest, key) in enumerate(zip(digests, key_texts))
                                              if place not in left_out))
            else:
                if content_too:
                    log.warning("balance.by_key", f"{batches.name(line['batch'])} has other columns: its rows are compared by key only")
                ledger.add_keys(ARCHIVED, number, (key for place, key in enumerate(key_texts) if place not in left_out))

    def _require_nobody(self, what: str) -> None:
        found = lock_holders.holders(self._connection)
        if found:
            raise LockHeld(f"a run {what} in database '{self._database.name}': {found[0].words}", hint="rows are on their way; weigh when none is")


def now() -> str:
    """The time of a baseline."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Rows(io.RawIOBase):
    """Takes what COPY writes, a line a call, and puts the lines into the ledger."""

    def __init__(self, ledger: RowLedger, leaf: int, content_too: bool) -> None:
        super().__init__()
        self._ledger, self._leaf, self._content_too = ledger, leaf, content_too
        self._held: list[bytes] = []

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """One line."""
        self._held.append(bytes(data))
        if len(self._held) >= ROWS_AT_ONCE:
            self.flush_rows()
        return len(data)

    def flush_rows(self) -> None:
        """Put what is held into the ledger."""
        found, self._held = b"".join(self._held).split(b"\n")[:-1], []
        if self._content_too:
            self._ledger.add(IN_TABLE, self._leaf, found)
        else:
            self._ledger.add_keys(IN_TABLE, self._leaf, (line[DIGEST_HEX + 1:] for line in found))
