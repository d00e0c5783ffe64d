"""Which batches are in which table already, so that the next restore leaves them out (RESTORE-020 as ruled).

A set of batch ids for each table that was restored into, and the date that it summarizes. It saves work and licenses
nothing: a restore that lost it meets its rows again and leaves them as they are. The table counts by its oid, so that one
that was dropped and made again begins anew.
"""

from __future__ import annotations

from typing import Any, Iterable, Optional

from audit_archiver import lines, log, points
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import ArchiverError
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.restore import choose
from audit_archiver.restore.target import Target


class Watermark:
    """What was restored of one source table into one target, as the bucket has it."""

    def __init__(self, store: Store, database: str, schema_name: str, table: str, target: Target) -> None:
        self._store, self._source, self._target = store, (database, schema_name, table), target
        self._key = names.watermark_key(store.prefix, database, schema_name, table)
        entry = self._entry(self._read())
        self.restored: frozenset[str] = frozenset(entry["batches"]) if entry else frozenset()
        self._new: dict[str, Batch] = {}

    def add(self, batches: Iterable[Batch]) -> None:
        """These are in the table, whole."""
        self._new.update((str(batch.id), batch) for batch in batches)

    def put(self) -> None:
        """Write what was added; another restore's additions since it was read stay. A failure costs a warning, no rows."""
        if not self._new:
            return
        try:
            value = self._read()
            entry = self._entry(value)
            if entry is None:
                place = self._target.place
                entry = {"system": self._target.system, "database_oid": self._target.database_oid, "table_oid": self._target.oid,
                         "database": place.database.name, "schema": place.schema, "table": place.table, "date": "", "s3_key": "", "batches": []}
                value["targets"].append(entry)
            entry["batches"] = sorted({*entry["batches"], *self._new})
            for batch in self._new.values():
                assert batch.last is not None
                if not entry["date"] or choose.second(str(batch.last[0])) > choose.second(entry["date"]):
                    entry["date"], entry["s3_key"] = str(batch.last[0]), batch.key
            self._store.put_over(self._key, lines.dump(value))
        except ArchiverError as error:
            log.warning("restore.watermark", f"'{self._store.url(self._key)}' could not be written: {error.msg}",
                        hint="the next restore will look at these batches again, and leave their rows as they are")
            return
        self._new.clear()
        points.point("restore.watermark.put")

    def forget(self, batches: Iterable[Batch], every: Iterable[Batch]) -> None:
        """These are to be restored again when they are archived again: out of the set, and the date is that of what is left.

        `every` is what is known of the table's batches. Rows that are archived again in the same batches bear the same ids.
        """
        gone = {batch.id for batch in batches}
        value = self._read()
        entry = self._entry(value)
        if entry is None or not gone.intersection(entry["batches"]):
            return
        entry["batches"] = [each for each in entry["batches"] if each not in gone]
        left = [batch for batch in every if batch.id in entry["batches"] and batch.last is not None]
        if left:
            newest = max(left, key=lambda batch: choose.second(str((batch.last or [""])[0])))
            assert newest.last is not None
            entry["date"], entry["s3_key"] = str(newest.last[0]), newest.key
        if not entry["batches"]:
            value["targets"].remove(entry)
        self._store.put_over(self._key, lines.dump(value))
        self.restored = frozenset(entry["batches"])

    def _read(self) -> dict[str, Any]:
        what = f"'{self._store.url(self._key)}'"
        try:
            value = lines.parse(self._store.get_bytes(self._key), what)
        except NotFound:
            database, schema_name, table = self._source
            return {"format": "aa-restore-watermark", "version": 1, "database": database, "schema": schema_name, "table": table, "targets": []}
        schema.validate("restore-watermark", value, what)
        return dict(value)

    def _entry(self, value: dict[str, Any]) -> Optional[dict[str, Any]]:
        mine = (self._target.system, self._target.database_oid, self._target.oid)
        return next((each for each in value["targets"] if (each["system"], each["database_oid"], each["table_oid"]) == mine), None)
