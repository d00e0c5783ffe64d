"""Which batches the selection flags mean: database, table, date range, run, or one object's key.

A batch is chosen by the range of its rows' timestamps, to the second and rather one too many: the rows themselves are
filtered by the server (RESTORE-023 as ruled, T47).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Iterable, Optional, Sequence

from audit_archiver.catalogue import archived, index, leftovers
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import ConfigError
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound

_TEXT = re.compile(r"(\d+)(-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d))?.*?( BC)?$")
_FRACTION = re.compile(r":\d\d\.(\d{1,6})")


@dataclass(frozen=True)
class Selection:
    """What the flags ask for. `start` and `end` are RFC 3339 UTC as preflight.dates makes them, end exclusive."""

    tables: tuple[str, ...] = ()
    start: Optional[str] = None
    end: Optional[str] = None
    run: Optional[str] = None

    def means(self, batch: Batch) -> bool:
        """True if rows of the batch may be meant; of a batch that is not archived only the run can be asked, if known."""
        if self.run is not None and batch.run is not None and batch.run != self.run:
            return False
        if batch.first is None or batch.last is None:
            return self.run is None or batch.run == self.run
        return ((self.start is None or second(str(batch.last[0])) >= second(self.start))
                and (self.end is None or second(str(batch.first[0])) <= second(self.end)))


def tables(store: Store, database: str, wanted: Iterable[str]) -> list[tuple[str, str]]:
    """(schema, table) of every table of a database that was ever archived, or of the `wanted` ones.

    A table is named as TABLE or SCHEMA.TABLE. Raises ConfigError for a name of which nothing is archived.
    """
    known = [leftovers.table_of(store, found) for found in leftovers.table_dirs(store, database)]
    found: list[tuple[str, str]] = []
    for name in wanted:
        meant = [each for each in known if name in (each[1], f"{each[0]}.{each[1]}")]
        if not meant:
            near = difflib.get_close_matches(name.rpartition(".")[2], {table for _, table in known}, n=3, cutoff=0.5)
            close = [f"{schema}.{table}" for schema, table in known if table in near]
            raise ConfigError(f"nothing is archived of a table '{name}' of database '{database}'",
                              hint="did you mean " + ", ".join(close) if close else "'aa-ls' shows what there is")
        found += [each for each in meant if each not in found]
    return found if wanted else known


def batches(store: Store, database: str, schema: str, table: str, selection: Selection) -> list[Batch]:
    """The batches of a table that are meant, archived or not, in the order in which they were archived."""
    found = [batch for batch in archived.of_table(store, database, schema, table) if selection.means(batch)]
    return sorted(found, key=lambda batch: (batch.committed_at or "", batch.number or 0))


def one(store: Store, key: str) -> Batch:
    """The batch that an object's key (or s3:// URL) belongs to. Raises ConfigError if no archived batch has it."""
    bucket_url = store.url("")
    key = key[len(bucket_url):] if key.startswith(bucket_url) else key
    stem = next((key[:-len(suffix)] for suffix in (names.DATA, names.METADATA, names.KEYS, names.COMMIT) if key.endswith(suffix)), None)
    if stem is None:
        raise ConfigError(f"'{key}' is not the key of a batch", hint=f"it ends in {names.DATA}; 'aa-ls' shows the keys")
    try:
        line = index.read_commit(store, stem)
    except NotFound:
        there = store.head(stem + names.DATA) is not None
        raise ConfigError(f"'{store.url(stem + names.DATA)}' " + (
            "is not archived: it has no commit record" if there else "does not exist"),
            hint="aa-recover decides what it is" if there else "'aa-ls' shows the keys") from None
    batch = line["batch"]
    entry = index.entry(line)
    state = archived.ARCHIVED if store.head(stem + names.ROLLED_BACK) is None else archived.ROLLED_BACK
    return Batch(batch["database"], batch["schema"], batch["table"], stem, state, batch["run"], entry["number"], entry["id"],
                 entry["rows"], entry["first"], entry["last"], entry["bytes"], entry["gz_bytes"], entry["committed_at"])


def span(batches: Sequence[Batch], start: Optional[str], end: Optional[str]) -> tuple[str, str]:
    """The first and the last timestamp of the rows of `batches`, within [start, end) where given, as texts."""
    edges = [(str((batch.first or [""])[0]), str((batch.last or [""])[0])) for batch in batches]
    first, last = min((edge[0] for edge in edges), key=_moment), max((edge[1] for edge in edges), key=_moment)
    return (start if start is not None and _moment(start) > _moment(first) else first,
            end if end is not None and _moment(end) < _moment(last) else last)


def _moment(text: str) -> tuple[tuple[int, str], str]:
    """The same as `second`, with the fraction of the second."""
    found = _FRACTION.search(text)
    return second(text), (found.group(1) if found else "").ljust(6, "0")


def second(text: str) -> tuple[int, str]:
    """A server's timestamp or date, or an RFC 3339 time in UTC, as something that compares by time, to the second."""
    found = _TEXT.match(text)
    if found is None:
        return (0, text)
    year, day, time, before = found.groups()
    return (-int(year) if before else int(year), f"{day}T{time or '00:00:00'}")
