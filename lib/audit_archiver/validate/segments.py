"""A table's index segments against its commit records, which are the truth; and the segments that are missing, written anew."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Iterator

from audit_archiver.catalogue import index
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store
from audit_archiver.validate.findings import Finding, Where

Run = str


class Segments:
    """What the segments of a table name. `stems` are those of every batch in them; `findings` what is wrong with themselves."""

    def __init__(self, store: Store, where: Where) -> None:
        assert where.schema is not None and where.table is not None
        self._store, self._where = store, where
        self._dir = names.index_dir(store.prefix, where.database, where.schema, where.table)
        self.stems: set[str] = set()
        self.objects = 0
        self.findings = list(self._read())

    def _read(self) -> Iterator[Finding]:
        numbers: dict[Run, list[int]] = defaultdict(list)
        ids: dict[str, str] = {}
        for found in self._store.list(self._dir):
            self.objects += 1
            run, _, number = found.key[len(self._dir):].rpartition("_")
            if number[:-len(".json")].isdigit():
                numbers[run].append(int(number[:-len(".json")]))
            try:
                entries = index.read_segment(self._store, found.key)
            except (InputError, Mismatch) as error:
                yield Finding("index.invalid", self._where, error.msg, object=self._store.url(found.key))
                continue
            for entry in entries:
                if ids.setdefault(entry["stem"], entry["id"]) != entry["id"]:
                    yield Finding("index.differs", self._where, f"the index names two batches '{entry['stem']}'",
                                  object=self._store.url(found.key), expected=ids[entry["stem"]], found=entry["id"])
        self.stems = set(ids)
        for run, known in numbers.items():
            for missing in sorted(set(range(1, max(known) + 1)) - set(known)):
                key = f"{self._dir}{run}_{missing:03d}.json"
                yield Finding("index.gap", self._where, f"segment {missing} of run {run} is not there", object=self._store.url(key))


class Rebuilt:
    """The segments that a table lacks, out of the commit records of batches that no segment names."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._missing: dict[Run, list[index.Entry]] = defaultdict(list)

    def add(self, line: dict[str, Any]) -> None:
        """A recorded batch that the index lacks."""
        self._missing[line["batch"]["run"]].append(index.entry(line))

    def write(self, store: Store, execute: bool) -> Iterator[dict[str, Any]]:
        """Write them, or with `execute` false only say which: run, table and number of batches of each."""
        database, schema, table = self._where.database, self._where.schema, self._where.table
        assert schema is not None and table is not None
        for run, entries in sorted(self._missing.items()):
            entries.sort(key=lambda entry: int(entry["number"]))
            for start in range(0, len(entries), index.SEGMENT_BATCHES):
                part = entries[start:start + index.SEGMENT_BATCHES]
                if execute:
                    index.write(store, run, database, schema, table, part)
                yield {"run": run, "database": database, "schema": schema, "table": table, "batches": len(part)}
