"""What is archived of a table, and what lies beside it without being archived: one listing and the table's index.

A batch is archived if its commit record is there. One that only the index names has lost it (T52); one without either
is open until recovery has decided it, or abandoned. One that was rolled back is not archived any more, whatever else is there.
"""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Optional

from audit_archiver.catalogue import index, leftovers
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store

ARCHIVED, OPEN, ABANDONED, MISSING, ROLLED_BACK = "archived", "open", "abandoned", "missing", "rolled back"


class Batch(NamedTuple):
    """One batch as the catalogue knows it. `first` and `last` are [timestamp, key...]; what nobody knows of a batch
    that is not archived is None."""

    database: str
    schema: str
    table: str
    stem: str
    state: str
    run: Optional[str] = None
    number: Optional[int] = None
    id: Optional[str] = None
    rows: Optional[int] = None
    first: Optional[list[Any]] = None
    last: Optional[list[Any]] = None
    bytes: Optional[int] = None
    gz_bytes: Optional[int] = None
    committed_at: Optional[str] = None

    @property
    def key(self) -> str:
        """The key of its data object."""
        return self.stem + names.DATA

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.schema}.{self.table} '{self.stem.rpartition('/')[2]}'"


def of_table(store: Store, database: str, schema: str, table: str, lenient: bool = False) -> Iterator[Batch]:
    """Every batch under a table's prefix, in the order of their keys, those that the index alone knows last.

    Raises Mismatch if the index names two batches of one name, InputError if a record is none. `lenient`, for who
    looks at them one by one, raises neither: of a batch whose commit record is none only the name is known.
    """
    indexed: dict[str, Batch] = {}
    for run, entry in index.segments(store, database, schema, table, lenient):
        known = indexed.setdefault(entry["stem"], _known(database, schema, table, run, entry))
        if known.id != entry["id"] and not lenient:
            raise Mismatch(f"the index of {schema}.{table} names two batches '{entry['stem']}'")
    for found in leftovers.batches_since(store, names.table_dir(store.prefix, database, schema, table)):
        entry = indexed.pop(found.stem, None)
        if found.recorded:
            if entry is None:
                entry = _recorded(store, database, schema, table, found.stem, lenient)
            yield entry._replace(state=ROLLED_BACK) if found.rolled_back else entry
        elif entry is not None:
            yield entry._replace(state=ROLLED_BACK if found.rolled_back else MISSING)
        else:
            yield Batch(database, schema, table, found.stem, ABANDONED if found.abandoned else OPEN)
    for entry in indexed.values():
        yield entry._replace(state=MISSING)


def _recorded(store: Store, database: str, schema: str, table: str, stem: str, lenient: bool) -> Batch:
    try:
        line = index.read_commit(store, stem)
    except (InputError, Mismatch):
        if not lenient:
            raise
        return Batch(database, schema, table, stem, ARCHIVED)
    return _known(database, schema, table, line["batch"]["run"], index.entry(line))


def _known(database: str, schema: str, table: str, run: str, entry: index.Entry) -> Batch:
    return Batch(database, schema, table, entry["stem"], ARCHIVED, run, entry["number"], entry["id"], entry["rows"], entry["first"],
                 entry["last"], entry["bytes"], entry["gz_bytes"], entry["committed_at"])
