"""Everything that is archived of one table: the listing against index and records, then batch after batch, then all together."""

from __future__ import annotations

import bisect
import concurrent.futures
import random
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Collection, Iterable, Iterator, Mapping, Optional

from audit_archiver import lines, log
from audit_archiver.catalogue import archived, content, index, leftovers, owner, runs
from audit_archiver.catalogue.archived import ARCHIVED, MISSING, OPEN, Batch
from audit_archiver.exits import ArchiverError, InputError, Mismatch, NetworkError
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.objectstore.listing import Entry
from audit_archiver.restore import thaw
from audit_archiver.restore.choose import Selection
from audit_archiver.restore.thaw import Thaw
from audit_archiver.validate import findings, objects, one_batch
from audit_archiver.validate.findings import FAIL, FULL, LIGHT, SAMPLE, WARN, Finding, Report, Where
from audit_archiver.validate.in_table import Tables
from audit_archiver.validate.ledger import KeyLedger
from audit_archiver.validate.one_batch import Looked
from audit_archiver.validate.segments import Rebuilt, Segments
from audit_archiver.validate.subset import WHOLE, Subset

SAMPLE_SHARE, SAMPLE_LEAST = 0.05, 10
READERS = {LIGHT: 8, SAMPLE: 2, FULL: 2}
"""Batches that are looked at side by side: of small objects the store's latency is what counts, of large ones our memory."""
TELL_EVERY_S = 30.0


@dataclass(frozen=True)
class Asked:
    """How a validation looks: which batches, how deep, whether index segments are written anew."""

    selection: Selection
    depth: str
    subset: Subset = WHOLE
    repair: bool = False
    execute: bool = False
    thaw: Optional[Thaw] = None

    @property
    def whole(self) -> bool:
        """True if every batch of a table is meant, so that what is not there can be missed."""
        return self.selection.start is None and self.selection.end is None and self.selection.run is None


class Validation:
    """One table. `ended` are the runs of its database that had ended before anything was looked at."""

    def __init__(self, store: Store, where: Where, asked: Asked, report: Report, tables: Optional[Tables], ended: Collection[str]) -> None:
        assert where.schema is not None and where.table is not None
        self._store, self._where, self._asked, self._report, self._tables = store, where, asked, report, tables
        self._dir = names.table_dir(store.prefix, where.database, where.schema, where.table)
        self._settled = {run: True for run in ended}
        self._rebuilt = Rebuilt(where)
        self._ledger = KeyLedger() if asked.depth != LIGHT else None
        self._schemas: dict[tuple[str, int], tuple[str, tuple[tuple[str, str], ...]]] = {}
        self._in_table: list[tuple[Where, int, list[bytes]]] = []
        self.runs: set[str] = set()
        self.abandoned: set[str] = set()

    def run(self, only: Optional[Batch] = None) -> None:
        """Look at every batch that is meant, or at `only` one; what is found is in the report."""
        try:
            self._run(only)
        finally:
            if self._ledger is not None:
                self._ledger.close()

    def _run(self, only: Optional[Batch]) -> None:
        report, where = self._report, self._where
        report.looked["tables"] += 1
        segments: Optional[Segments] = None
        if only is not None:
            batches = {only.stem: only}
        else:
            self._look_at_owner()
            segments = Segments(self._store, where)
            report.looked["objects"] += segments.objects
            report.add(*segments.findings)
            assert where.schema is not None and where.table is not None
            listed = archived.of_table(self._store, where.database, where.schema, where.table, lenient=True)
            batches = {batch.stem: batch for batch in listed if self._asked.selection.means(batch)}
        self.runs = {batch.run for batch in batches.values() if batch.run is not None}
        chosen = {batch.stem for batch in batches.values() if batch.state == ARCHIVED and self._asked.subset.means(batch.id)}
        read = self._to_read(chosen)
        beside = self._beside(batches, read)
        self._say_cost(batches, chosen, read, beside)
        thaw.require(self._store, [batches[stem] for stem in sorted(chosen - read)], (names.COMMIT, names.METADATA), self._asked.thaw)
        thaw.require(self._store, [batches[stem] for stem in sorted(read)], thaw.WHOLE, self._asked.thaw)
        self._twice(batches.values())
        if segments is not None and self._asked.whole:
            self._gaps(batches.values(), segments)
        told = time.monotonic()
        for count, looked in enumerate(self._each(batches, chosen, read, only), 1):
            self._take(looked, segments)
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                log.info("validate.progress", f"{where}: {count} of {len(chosen)} batches", batches=count, of=len(chosen))
        for batch in batches.values():  # what the listing has shown is not among them any more
            if batch.state == MISSING:
                report.add(Finding("batch.gone", self._of(batch.stem), "the index names it, and nothing of it is there",
                                   object=self._store.url(batch.key), expected=f"{batch.rows} rows", found="nothing"))
        for batch in beside:
            self._take_keys(batch)
        self._together()

    def _look_at_owner(self) -> None:
        """Whose prefix this is said to be."""
        where, url = self._where, self._store.url(self._dir + owner.OWNER)
        try:
            found = owner.read(self._store, self._dir)
        except (InputError, Mismatch) as error:
            self._report.add(Finding("owner.invalid", where, error.msg, object=url))
            return
        if found is None:
            self._report.add(Finding("owner.missing", where, "nothing says whose prefix it is", object=url, expected="there", found="missing"))
        elif (found["database"], found["schema"], found["table"]) != (where.database, where.schema, where.table):
            self._report.add(Finding("owner.invalid", where, "it names another table", object=url, expected=where,
                                     found=f"{found['database']} {found['schema']}.{found['table']}"))

    def _to_read(self, chosen: set[str]) -> set[str]:
        """The batches whose key list and data are read."""
        if self._asked.depth == FULL:
            return chosen
        if self._asked.depth == LIGHT or not chosen:
            return set()
        size = min(len(chosen), max(SAMPLE_LEAST, round(len(chosen) * SAMPLE_SHARE)))
        return set(random.sample(sorted(chosen), size))

    def _beside(self, batches: Mapping[str, Batch], read: set[str]) -> list[Batch]:
        """Batches of other subsets whose times overlap those of the batches that are read: they may hold the same keys."""
        if self._asked.depth != FULL or self._asked.subset == WHOLE:
            return []
        spans = list(_spans(batches[stem] for stem in read))
        starts = [start for start, _ in spans]
        return [batch for stem, batch in batches.items() if stem not in read and batch.state == ARCHIVED
                for start, end in _spans([batch]) if (place := bisect.bisect_right(starts, end)) and spans[place - 1][1] >= start]

    def _say_cost(self, batches: Mapping[str, Batch], chosen: set[str], read: set[str], beside: list[Batch]) -> None:
        size = sum(batches[stem].gz_bytes or 0 for stem in read)
        part = f"subset {self._asked.subset}: " if self._asked.subset != WHOLE else ""
        log.info("validate.cost", f"{self._where}: {part}{len(chosen)} of {len(batches)} batches; {2 * len(chosen)} records and metadata to read, "
                 f"{len(read)} key lists, and {len(read)} data objects of {size / 1e6:,.1f} MB" + (
                     f"; records and key lists of {len(beside)} batches whose times overlap" if beside else ""),
                 batches=len(chosen), of=len(batches), objects=2 * len(chosen) + 2 * len(read) + 2 * len(beside), data_bytes=size)
        if self._asked.depth == LIGHT:
            self._report.leave("the content of data objects and key lists: sizes and ETags were compared, --depth full reads them",
                               "whether a key is in two batches (--depth sample or full)")
        elif len(read) < len(chosen):
            self._report.leave(f"{self._where}: the content of data object and key list of {len(chosen) - len(read)} of {len(chosen)} batches; "
                               f"{len(read)} were read by chance, --depth full reads them all")
        if self._asked.subset != WHOLE:
            self._report.leave(f"{self._where}: {len(batches) - len(chosen)} batches of other subsets, but for the listing"
                               + (" and for the key lists of those whose times overlap" if beside else ""))

    def _each(self, batches: dict[str, Batch], chosen: set[str], read: set[str], only: Optional[Batch]) -> Iterator[Looked]:
        """Look at the chosen batches, some at a time; what is listed is taken out of `batches`."""
        readers = READERS[self._asked.depth]
        pool = concurrent.futures.ThreadPoolExecutor(readers, "validate")
        waiting: deque[tuple[Batch, concurrent.futures.Future[Looked]]] = deque()
        try:
            for found in self._listed(only):
                for stem, there in found.batches.items():
                    batch = batches.pop(stem, None)
                    if batch is not None and stem in chosen:
                        waiting.append((batch, pool.submit(one_batch.look, self._store, batch, there, read=stem in read)))
                    elif batch is not None:
                        self._unrecorded(batch, there)
                    while len(waiting) > readers:
                        yield self._result(*waiting.popleft())
            while waiting:
                yield self._result(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # who stops does not wait for the timeout of a read

    def _result(self, batch: Batch, future: concurrent.futures.Future[Looked]) -> Looked:
        """What a look came to; not being allowed to look at one batch does not hide the next."""
        try:
            return future.result()
        except NetworkError:
            raise
        except ArchiverError as error:
            return Looked(batch, self._of(batch.stem), findings=[findings.could_not_look(self._of(batch.stem), error, self._store.url(batch.key))])

    def _listed(self, only: Optional[Batch]) -> Iterator[objects.Directory]:
        """The table's whole listing, or what there is of one batch."""
        for found in objects.listed(self._store, self._dir, only.stem if only else ""):
            for entry in found.foreign:
                self._report.add(Finding("foreign.object", self._where, f"'{entry.key[len(self._dir):]}' is nothing that the archiver writes",
                                         object=self._store.url(entry.key), found=f"{entry.size} bytes"))
            yield found

    def _unrecorded(self, batch: Batch, there: Mapping[str, Entry]) -> None:
        """A batch without a commit record, or one that is not meant."""
        where, listed = self._of(batch.stem), ", ".join(sorted(there))
        if batch.state == MISSING:
            self._report.add(Finding("record.missing", where, f"the index names it, and of its objects there are only {listed}",
                                     object=self._store.url(batch.stem + names.COMMIT), expected="there", found="missing"))
        elif batch.state == OPEN and not {names.COMMIT, names.ABANDONED} & there.keys():  # it may have been settled meanwhile
            run = self._run_of(batch)
            still = self._at_work() if run is None else not self._is_settled(run)
            self._report.add(Finding("orphan.batch", where, f"orphaned: {listed} without a commit record"
                                     + (f"; run {run} has not ended" if still and run else "; a run has not ended" if still else ""),
                                     object=self._store.url(batch.key), status=WARN if still else FAIL))
        elif names.ABANDONED in there:
            self.abandoned.add(batch.stem)

    def _run_of(self, batch: Batch) -> Optional[str]:
        """The run of a batch without a record, if its metadata say it."""
        try:
            line = leftovers.rebuilt(self._store, leftovers.Leftover(batch.stem))
        except (InputError, Mismatch):
            return None
        return None if line is None else str(line["batch"]["run"])

    def _is_settled(self, run: str) -> bool:
        """True if a run had ended before we looked, so that what it left is all there; or if nothing says that it ever began."""
        assert self._where.database is not None
        if run not in self._settled:
            self._settled[run] = self._store.head(names.run_start_key(self._store.prefix, self._where.database, run)) is None
        return self._settled[run]

    def _at_work(self) -> bool:
        """True if any run has begun and had not ended before we looked."""
        return not all(map(self._is_settled, runs.records(self._store, self._where.database)[0]))

    def _take(self, looked: Looked, segments: Optional[Segments]) -> None:
        """What one batch says, and what it adds to what is said of all."""
        report, line = self._report, looked.line
        report.add(*looked.findings)
        report.looked.update(batches=1, objects=looked.objects, bytes=looked.bytes, rows=looked.rows)
        if line is None:
            return
        self._schemas[(line["committed"]["at"], line["batch"]["number"])] = str(looked.where.batch), one_batch.columns_of(line)
        if segments is not None and looked.batch.stem not in segments.stems and self._is_settled(line["batch"]["run"]):
            report.add(Finding("index.unlisted", looked.where, f"no segment of run {line['batch']['run']} names it",
                               object=self._store.url(looked.batch.stem + names.COMMIT)))
            if self._asked.repair:
                self._rebuilt.add(line)
        if looked.keys is not None and self._ledger is not None:
            self._ledger.add(str(looked.where.batch), looked.keys)
        if self._tables is not None:
            self._look_up(looked)

    def _take_keys(self, batch: Batch) -> None:
        """The keys of a batch beside those that are meant. What is wrong with itself is said when its turn comes."""
        assert self._ledger is not None
        self._report.looked["objects"] += 2
        try:
            line = index.read_commit(self._store, batch.stem)
            key_texts = content.key_list(self._store, line)[1]
        except (InputError, Mismatch, NotFound) as error:
            self._report.leave(f"{self._of(batch.stem)}: whether it holds keys of this subset: {error.msg}")
            return
        gone = set(line.get("deleted", {}).get("left_out", ()))
        self._ledger.add(str(self._of(batch.stem).batch), [text for place, text in enumerate(key_texts) if place not in gone], meant=False)

    def _look_up(self, looked: Looked) -> None:
        """Whether the keys that were read are in the table: all of them, or at depth sample a random few (REQ-VER-011)."""
        assert self._tables is not None
        asked = looked.keys if self._asked.depth == FULL else looked.sample
        if not asked:
            return
        try:
            there = self._tables.present(looked, asked)
        except ArchiverError as error:
            self._report.add(findings.could_not_look(self._where, error))
            self._tables = None
            return
        self._report.looked["keys_in_tables"] += len(asked)
        if there:
            self._in_table.append((looked.where, len(there), there[:findings.KEYS_TOLD]))

    def _together(self) -> None:
        """What can be said when all batches were looked at."""
        report = self._report
        restored = bool(self._in_table) and self._was_restored()
        for where, count, some in self._in_table:
            report.add(Finding("rows.in_table", where, f"{count} of its keys are in the table" + (", which was restored" if restored else ""),
                               expected=0, found=count, keys=findings.told(some), status=WARN if restored else FAIL))
        for one, other, count, some in self._ledger.twice() if self._ledger is not None else ():
            where = Where(self._where.database, self._where.schema, self._where.table, other)
            report.add(Finding("rows.twice", where, f"{count} of its keys are in {one}, too" if one != other else f"{count} keys are in it twice",
                               expected=0, found=count, keys=findings.told(some)))
        before: Optional[tuple[str, tuple[tuple[str, str], ...]]] = None
        for _, (name, columns) in sorted(self._schemas.items()):
            if before is not None and columns != before[1]:
                where = Where(self._where.database, self._where.schema, self._where.table, name)
                report.add(Finding("schema.changed", where, f"its columns differ from those of {before[0]}: "
                                   + ", ".join(one_batch.changes(before[1], columns))))
            before = name, columns
        report.repairs += self._rebuilt.write(self._store, self._asked.execute)

    def _was_restored(self) -> bool:
        """True if aa-restore has brought rows back into this very table."""
        ours = {"database": self._where.database, "schema": self._where.schema, "table": self._where.table}
        for found in self._store.list(self._dir + objects.RESTORES):
            try:
                value = lines.parse(self._store.get_bytes(found.key), f"'{self._store.url(found.key)}'")
                schema.validate("restore", value, f"'{self._store.url(found.key)}'")
            except InputError:
                continue  # it proves nothing
            if not value["dry_run"] and ours.items() <= value["target"].items():
                return True
        return False

    def _twice(self, batches: Iterable[Batch]) -> None:
        """One batch under two names: its id says it, whatever the depth."""
        first: dict[str, str] = {}
        for batch in batches:
            if batch.id is not None and batch.state == ARCHIVED and first.setdefault(batch.id, batch.stem) != batch.stem:
                self._report.add(Finding("batch.twice", self._of(batch.stem), f"it is the same batch as '{first[batch.id].rpartition('/')[2]}'",
                                         object=self._store.url(batch.key), found=batch.id))

    def _gaps(self, batches: Iterable[Batch], segments: Segments) -> None:
        """Numbers that no batch of a run bears (T52): its place in the index may be gone with it."""
        numbers: dict[str, set[int]] = defaultdict(set)
        unlisted: set[str] = set()
        given_up: set[int] = set()
        for batch in batches:
            if batch.run is not None and batch.number is not None:
                numbers[batch.run].add(batch.number)
                if batch.stem not in segments.stems:
                    unlisted.add(batch.run)
            elif batch.state != ARCHIVED:
                given_up.add(int(batch.stem.rpartition("_")[2]))
        for run, known in numbers.items():
            missing = sorted(set(range(1, max(known) + 1)) - known - given_up)
            if missing:
                sure = run in unlisted and self._is_settled(run)
                self._report.add(Finding("numbers.gap", self._where, f"run {run} has no batch {_ranges(missing)}"
                                         + (", and its index is incomplete" if sure else ""), expected=f"1 to {max(known)}",
                                         found=f"{len(known)} batches", status=FAIL if sure else WARN))

    def _of(self, stem: str) -> Where:
        return Where(self._where.database, self._where.schema, self._where.table, stem.rpartition("/")[2])


def _spans(batches: Iterable[Batch]) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    """The times from the first to the last row of batches, ordered; those that overlap are one."""
    start = end = None
    for first, last in sorted((index.time_order(str(batch.first[0])), index.time_order(str(batch.last[0])))
                              for batch in batches if batch.first and batch.last):
        if start is None or end is None or first > end:
            if start is not None and end is not None:
                yield start, end
            start, end = first, last
        end = max(end, last)
    if start is not None and end is not None:
        yield start, end


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as '1 to 3, 7'; the first ten parts."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    told = [f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts[:10]]
    return ", ".join(told) + (" ..." if len(parts) > 10 else "")
