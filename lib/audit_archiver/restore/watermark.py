"""Which batches are in which table already, so that the next restore leaves them out (RESTORE-020 as ruled).

A set of batch ids for each table that was restored into, and the date that it summarizes. It saves work and licenses
nothing: a restore that lost it meets its rows again and leaves them as they are. The table counts by its oid, so that one
that was dropped and made again begins anew. It lies in the bucket, beside the rows in their database, or in both.
"""

from __future__ import annotations

from typing import Any, Iterable, Optional, Sequence

from audit_archiver import lines, log, points
from audit_archiver.catalogue.archived import Batch
from audit_archiver.config.model import BOTH, DATABASE, S3_STORAGE
from audit_archiver.exits import ArchiverError, ConfigError
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.postgres import connect
from audit_archiver.restore import choose
from audit_archiver.restore.target import Target

TABLE = "public.restore_watermarks"
_CREATE = f"""
CREATE TABLE IF NOT EXISTS {TABLE} (
  source_database text, source_schema text, source_table text, server text, database_oid bigint, target_oid bigint,
  batch_id text, s3_key text NOT NULL, last_archived text NOT NULL, target_schema text NOT NULL, target_table text NOT NULL,
  restored_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (source_database, source_schema, source_table, server, database_oid, target_oid, batch_id))
"""
_OF_TABLE = "(source_database, source_schema, source_table, server, database_oid, target_oid) = (%s, %s, %s, %s, %s, %s)"
_ADD = f"""
INSERT INTO {TABLE} (source_database, source_schema, source_table, server, database_oid, target_oid, target_schema, target_table,
                     batch_id, s3_key, last_archived)
SELECT %s, %s, %s, %s, %s, %s, %s, %s, b.id, b.key, b.last FROM unnest(%s::text[], %s::text[], %s::text[]) AS b(id, key, last)
ON CONFLICT DO NOTHING
"""


class Watermark:
    """What was restored of one source table into one target. `storage` is where that is kept, None nowhere."""

    def __init__(self, store: Store, control: connect.Connection, storage: Optional[str], source: tuple[str, str, str], target: Target) -> None:
        self._bucket = InBucket(store, source, target) if storage in (S3_STORAGE, BOTH) else None
        self._database = InDatabase(control, source, target) if storage in (DATABASE, BOTH) else None
        self.restored = frozenset().union(*(each.restored for each in (self._bucket, self._database) if each is not None))

    def prepare(self) -> None:
        """Before the first row: make the table in the database, if it is kept there."""
        if self._database is not None:
            self._database.create()

    def note(self, connection: connect.Connection, batches: Iterable[Batch]) -> None:
        """These are in the table, whole, once the transaction of `connection` has committed; where it is kept in the database."""
        if self._database is not None:
            self._database.note(connection, list(batches))

    def add(self, batches: Iterable[Batch]) -> None:
        """These are in the table, whole."""
        if self._bucket is not None:
            self._bucket.add(batches)

    def put(self) -> None:
        """Write what was added and not noted with its rows. A failure costs a warning, no rows."""
        if self._bucket is not None:
            self._bucket.put()

    def forget(self, batches: Iterable[Batch], every: Iterable[Batch]) -> None:
        """These are to be restored again when they are archived again: out of the set, and the date is that of what is left.

        `every` is what is known of the table's batches. Rows that are archived again in the same batches bear the same ids.
        """
        gone = {str(batch.id) for batch in batches}
        if self._bucket is not None:
            self._bucket.forget(gone, every)
        if self._database is not None:
            self._database.forget(gone)


class InDatabase:
    """The watermark as rows beside the restored ones: each is committed, or lost, together with them."""

    def __init__(self, control: connect.Connection, source: tuple[str, str, str], target: Target) -> None:
        self._control, self._target = control, target
        self._of_table = (*source, target.system, target.database_oid, target.oid)
        self.restored: frozenset[str] = frozenset()
        if self._is_there():
            self.restored = frozenset(row[0] for row in connect.rows(control, f"SELECT batch_id FROM {TABLE} WHERE {_OF_TABLE}", self._of_table))

    def create(self) -> None:
        """Make the table unless it is there (FAQ). Raises ConfigError where the role may not."""
        if self._is_there():
            return
        try:
            connect.execute(self._control, _CREATE)
        except ArchiverError as error:
            if self._is_there():
                return  # another restore made it in the same moment
            raise ConfigError(f"the watermark's table {TABLE} cannot be made in database '{self._target.place.database.name}': {error.msg}",
                              hint="GRANT CREATE ON SCHEMA public to the role, or set restore_watermark.storage_type: s3") from None

    def note(self, connection: connect.Connection, batches: Sequence[Batch]) -> None:
        """Add batches in the transaction that brings their rows."""
        place = self._target.place
        connect.execute(connection, _ADD, (
            *self._of_table, place.schema, place.table, [batch.id for batch in batches], [batch.key for batch in batches],
            [str((batch.last or [""])[0]) for batch in batches]))

    def forget(self, gone: Iterable[str]) -> None:
        """Take batches out."""
        if self._is_there():
            connect.execute(self._control, f"DELETE FROM {TABLE} WHERE {_OF_TABLE} AND batch_id = ANY(%s)", (*self._of_table, list(gone)))

    def _is_there(self) -> bool:
        return bool(connect.scalar(self._control, "SELECT to_regclass(%s) IS NOT NULL", (TABLE,)))


class InBucket:
    """The watermark as an object beside the source's batches: the only one that is ever rewritten."""

    def __init__(self, store: Store, source: tuple[str, str, str], target: Target) -> None:
        self._store, self._source, self._target = store, source, target
        self._key = names.watermark_key(store.prefix, *source)
        entry = self._entry(self._read())
        self.restored: frozenset[str] = frozenset(entry["batches"]) if entry else frozenset()
        self._new: dict[str, Batch] = {}

    def add(self, batches: Iterable[Batch]) -> None:
        """Keep these for `put`."""
        self._new.update((str(batch.id), batch) for batch in batches)

    def put(self) -> None:
        """Write what was added; another restore's additions since it was read stay."""
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

    def forget(self, gone: Iterable[str], every: Iterable[Batch]) -> None:
        """Take batches out."""
        value, out = self._read(), set(gone)
        entry = self._entry(value)
        if entry is None or not out.intersection(entry["batches"]):
            return
        entry["batches"] = [each for each in entry["batches"] if each not in out]
        left = [batch for batch in every if batch.id in entry["batches"] and batch.last is not None]
        if left:
            newest = max(left, key=lambda batch: choose.second(str((batch.last or [""])[0])))
            assert newest.last is not None
            entry["date"], entry["s3_key"] = str(newest.last[0]), newest.key
        if not entry["batches"]:
            value["targets"].remove(entry)
        self._store.put_over(self._key, lines.dump(value))

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
