"""Are archived rows still in their table? Their keys are looked up in a session that can only read."""

from __future__ import annotations

from typing import Optional, Sequence

from audit_archiver import log
from audit_archiver.config.model import Config
from audit_archiver.exits import ConfigError
from audit_archiver.postgres import connect, witness
from audit_archiver.validate.findings import Where
from audit_archiver.validate.one_batch import Looked

AUTO, YES, NO = "auto", "yes", "no"


class Tables:
    """The tables of one database; connects at the first question."""

    def __init__(self, config: Config, database: str) -> None:
        self._database = config.database(database)
        self._name = database
        self._connection: Optional[connect.Connection] = None
        self._tables: dict[tuple[str, ...], Optional[witness.Table]] = {}

    def open(self) -> None:
        """Connect. Raises ConfigError for a database that is not configured, and what connect raises."""
        if self._connection is None:
            if self._database is None:
                raise ConfigError(f"the configuration has no database '{self._name}'", hint="--against-table no leaves its tables out")
            self._connection = connect.connect(self._database, purpose="validate")
            connect.execute(self._connection, "SET default_transaction_read_only = on")

    def present(self, looked: Looked, key_texts: Sequence[bytes]) -> list[bytes]:
        """Those of the keys of a batch that are in its table; none if there is no such table any more."""
        assert looked.line is not None and self._connection is not None
        table = self._table(looked.where, looked.line["batch"])
        return [] if table is None else [key_texts[number - 1] for number in table.present(key_texts)]

    def close(self) -> None:
        """End the session."""
        if self._connection is not None:
            self._connection.close()

    def _table(self, where: Where, batch: dict[str, object]) -> Optional[witness.Table]:
        key = (str(where.schema), str(where.table), *map(str, batch["key"]))  # type: ignore[call-overload]
        if key not in self._tables:
            assert self._connection is not None
            there = connect.scalar(self._connection, "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                                   "WHERE (n.nspname, c.relname) = (%s, %s)", (where.schema, where.table))
            self._tables[key] = witness.Table(self._connection, batch) if there else None
            if not there:
                log.info("validate.no_table", f"table '{where.schema}.{where.table}' is not in database '{self._name}' any more")
        return self._tables[key]


