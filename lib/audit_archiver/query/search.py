"""Which batches, and which gzip members of them, may hold the wanted rows; and the rows themselves.

What need not be read is not: a batch is left out by its dates, then by the ranges in its metadata, then by their filters, of
which one part is fetched; of a batch that is left only the members are that may hold such a row. Whole objects are proven as
aa-restore proves them, single members by the CRC-32 of gzip and the number of their rows.
"""

from __future__ import annotations

import collections
import concurrent.futures
import threading
import zlib
from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, Optional, Sequence

from audit_archiver import lines, log
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import find, members, metadata, names
from audit_archiver.objectstore.client import Store
from audit_archiver.query.conditions import Check, Condition, at_or_after, before, moment
from audit_archiver.query.rows import Wanted
from audit_archiver.restore import verified

HEAD_BYTES = 8192  # of metadata with filters: the line before them has three to six
AT_ONCE = 8
AHEAD = 16


@dataclass
class Figures:
    """What a search looked at. Bytes are those of metadata and data objects; `of_bytes` those of all data objects chosen."""

    batches: int = 0
    of_batches: int = 0
    members: int = 0
    of_members: int = 0
    bytes: int = 0
    of_bytes: int = 0
    rows: int = 0
    in_vain: int = 0  # members that a filter named and that held no such row
    lacking: set[str] = field(default_factory=set)

    def say(self) -> None:
        """How much was read of how much."""
        share = f" ({self.bytes / self.of_bytes:.2%})" if self.of_bytes else ""
        log.info("search.read", f"{self.rows:,} rows; read {_size(self.bytes)} of {_size(self.of_bytes)}{share}: {self.members:,} of "
                 f"{self.of_members:,} members in {self.batches:,} of {self.of_batches:,} batches, {self.in_vain:,} in vain",
                 rows=self.rows, bytes=self.bytes, of_bytes=self.of_bytes, members=self.members, of_members=self.of_members,
                 batches=self.batches, of_batches=self.of_batches, in_vain=self.in_vain)


@dataclass(frozen=True)
class Places:
    """Where in a batch the wanted rows may be: the numbers of `members` (None: anywhere), and their packed bytes if fetched."""

    batch: Batch
    described: dict[str, Any]
    checks: tuple[tuple[str, Check], ...]
    members: Optional[tuple[int, ...]]
    packed: dict[int, bytes] = field(default_factory=dict)


class Search:
    """A search of some batches of one table. `start` and `end` are RFC 3339 UTC, `end` exclusive."""

    def __init__(self, store: Store, conditions: Sequence[Condition], start: Optional[str] = None, end: Optional[str] = None) -> None:
        self.figures = Figures()
        self._store, self._conditions, self._start, self._end = store, conditions, start, end
        self._checks: dict[tuple[Condition, str], Check] = {}
        self._counting = threading.Lock()

    def places(self, batches: Iterable[Batch], fetch: bool = False) -> Iterator[Places]:
        """The batches that may hold wanted rows, in their order; with `fetch`, what is to be read of one by members is read ahead."""
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            waiting: collections.deque[concurrent.futures.Future[Optional[Places]]] = collections.deque()
            try:
                for batch in batches:
                    waiting.append(pool.submit(self._place, batch, fetch))
                    if len(waiting) > AHEAD:
                        yield from filter(None, [waiting.popleft().result()])
                while waiting:
                    yield from filter(None, [waiting.popleft().result()])
            finally:
                for each in waiting:
                    each.cancel()

    def rows(self, batches: Iterable[Batch]) -> Iterator[list[bytes]]:
        """The wanted rows as lines without line feed, some at a time, in the order of the batches."""
        for place in self.places(batches, fetch=True):
            found = self._in_members(place) if place.members is not None else self._in_batch(place)
            for some in found:
                self.figures.rows += len(some)
                yield some

    # -- where

    def _place(self, batch: Batch, fetch: bool) -> Optional[Places]:
        figures, checks = self.figures, []
        with self._counting:
            figures.of_batches, figures.of_bytes = figures.of_batches + 1, figures.of_bytes + (batch.gz_bytes or 0)
        described, behind, size = self._described(batch)
        kinds = {column["name"]: column["type"] for column in described["schema"]["columns"]}
        for condition in self._conditions:
            if condition.column not in kinds:
                with self._counting:
                    figures.lacking.add(condition.column)
                    figures.of_members += len(described["members"])
                return None
            checks.append((condition.column, self._check(condition, kinds[condition.column])))
        ranges = {each["column"]: each for each in described["ranges"]}
        may: Optional[set[int]] = None
        if all(check.may_be_within(ranges.get(name)) for name, check in checks):
            for name, check in checks:
                if check.forms and name in described.get("find", {}).get("columns", ()):
                    these, read = self._filtered(batch, described, behind, name, check)
                    may, size = these if may is None else may & these, size + read
        else:
            may = set()
        checks += self._by_time(batch, described["batch"]["timestamp"])
        count = len(described["members"])
        chosen = None if may is None or 2 * len(may) > count else tuple(sorted(may))
        packed = dict(self._fetch(batch, described, chosen)) if fetch and chosen else {}
        with self._counting:
            taken = count if chosen is None else len(chosen)
            figures.batches, figures.members = figures.batches + bool(taken), figures.members + taken
            figures.of_members += count
            figures.bytes += size + (sum(map(len, packed.values())) if chosen is not None else (batch.gz_bytes or 0) * fetch)
        return Places(batch, described, tuple(checks), chosen, packed) if taken else None

    def _described(self, batch: Batch) -> tuple[dict[str, Any], int, int]:
        """The metadata without their filters, where these begin, and how many bytes were read."""
        key = batch.stem + names.METADATA
        content = self._store.get_range(key, 0, HEAD_BYTES)
        head, behind = metadata.head(content)
        if head is None and len(content) == HEAD_BYTES:
            content = self._store.get_bytes(key)
            head, behind = metadata.head(content)
        value = lines.parse(head if head is not None else content, f"'{self._store.url(key)}'")
        if not isinstance(value, dict) or value.get("batch", {}).get("id") != batch.id:
            raise Mismatch(f"'{self._store.url(key)}' holds the metadata of another batch", hint="aa-validate says what else is wrong")
        return value, behind, len(content)

    def _check(self, condition: Condition, kind: str) -> Check:
        found = self._checks.get((condition, kind))
        if found is None:
            found = self._checks[condition, kind] = condition.check(kind)
        return found

    def _filtered(self, batch: Batch, described: dict[str, Any], behind: int, name: str, check: Check) -> tuple[set[int], int]:
        """The members that may hold one of the texts of the value, and how many bytes were read to know."""
        made, found, read = described["find"], set(), 0
        for form in check.forms:
            residue = zlib.crc32(form.encode()) % made["modulus"]
            part = find.PARTS * made["columns"].index(name) + residue // find.PART
            begin = behind + (made["ends"][part - 1] if part else 0)
            content = self._store.get_range(batch.stem + names.METADATA, begin, behind + made["ends"][part])
            read += len(content)
            found |= find.members_of(content, residue, len(described["members"]))
        return found, read

    def _by_time(self, batch: Batch, column: str) -> Iterator[tuple[str, Check]]:
        """The checks of start and end, where the batch has rows on both sides."""
        first, last = (moment(str(bound[0])) if bound else None for bound in (batch.first, batch.last))
        if self._start is not None and (first is None or first < moment(self._start)):
            yield column, at_or_after(self._start)
        if self._end is not None and (last is None or last >= moment(self._end)):
            yield column, before(self._end)

    def _fetch(self, batch: Batch, described: dict[str, Any], chosen: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """(first member, packed bytes) of each run of neighbours among the members."""
        begins, size = described["members"], described["gz_bytes"]
        for first, last in _runs(chosen):
            end = begins[last + 1] if last + 1 < len(begins) else size
            data = self._store.get_range(batch.key, begins[first], end)
            if len(data) != end - begins[first]:
                raise Mismatch(f"'{self._store.url(batch.key)}' is shorter than its metadata say", hint=verified.HINT)
            yield first, data

    # -- what

    def _in_members(self, place: Places) -> Iterator[list[bytes]]:
        described, each = place.described, place.described["member_rows"]
        wanted, left_out = Wanted(place.checks), self._left_out(place)
        full = set()
        for first, packed in place.packed.items():
            row = first * each
            end = min(row + each * _members_in(described, first, len(packed)), described["record_count"])
            found = []
            try:
                for chunk in members.Reader([packed]):
                    for number, line in wanted.of(chunk):
                        full.add((row + number) // each)
                        if row + number not in left_out:
                            found.append(line)
                    row += chunk.count(b"\n")
            except (InputError, Mismatch) as error:
                raise Mismatch(f"'{self._store.url(place.batch.key)}' is damaged: {error.msg}", hint=verified.HINT) from None
            if row != end:
                raise Mismatch(f"'{self._store.url(place.batch.key)}' has other rows than its metadata say", hint=verified.HINT)
            yield found
        self.figures.in_vain += len(place.members or ()) - len(full)

    def _in_batch(self, place: Places) -> Iterator[list[bytes]]:
        wanted = Wanted(place.checks)
        for chunk in verified.chunks(self._store, verified.commit_record(self._store, place.batch)):
            yield [line for _, line in wanted.of(chunk)]

    def _left_out(self, place: Places) -> frozenset[int]:
        """The places of rows that were in the object but no more in the table when the batch was deleted."""
        if place.batch.rows == place.described["record_count"]:
            return frozenset()
        return frozenset(verified.commit_record(self._store, place.batch).get("deleted", {}).get("left_out", ()))


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of neighbours in ascending numbers."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[start], numbers[place - 1]
            start = place


def _members_in(described: dict[str, Any], first: int, size: int) -> int:
    """How many members the `size` bytes from member `first` on are."""
    end = described["members"][first] + size
    return sum(1 for begin in described["members"][first:] if begin < end)


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"
