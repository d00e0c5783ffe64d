"""Keys and row digests on disk: what is there twice, or not any more, is found by SQL, with a few MB of memory.

SQLite's unnamed database lives in a temporary file without a name, which goes with the process however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sqlite3
from typing import Any, Iterable, Iterator, NamedTuple, Optional, Sequence

from audit_archiver.exits import ResourceError

CACHE_KB = 4 << 10
DIGEST_HEX = 64

BEFORE, IN_TABLE, ARCHIVED = 0, 1, 2
"""Where a row was seen: in the baseline, in the table, in the archive."""

LOST, DOUBLED, TWICE, CHANGED = "lost", "doubled", "archived twice", "changed"


class _OnDisk:
    """An empty database of our own; a disk that is full, or cannot be written, is a ResourceError."""

    def __init__(self, table: str) -> None:
        with _errors():
            self._db = sqlite3.connect("", isolation_level=None)
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KB}"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.execute(table)

    def _insert(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with _errors():
            self._db.execute("BEGIN")
            self._db.executemany(statement, rows)
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Free the disk."""
        self._db.close()


class KeyLedger(_OnDisk):
    """The keys of a table's batches as they are read; `twice` finds what is in two of them."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE keys (key BLOB NOT NULL, batch INTEGER NOT NULL, meant INTEGER NOT NULL)")
        self._names: list[str] = []

    def add(self, batch: str, key_texts: Sequence[bytes], *, meant: bool = True) -> None:
        """The keys of one more batch; of one that is not `meant` only what it shares with one that is."""
        self._insert(f"INSERT INTO keys VALUES (?, ?, {int(meant)})", zip(key_texts, itertools.repeat(len(self._names))))
        self._names.append(batch)

    def twice(self) -> Iterator[tuple[str, str, int, list[bytes]]]:
        """(batch, other batch, how many keys both hold, some of these) of every pair that shares a key."""
        with _errors():
            self._db.execute("CREATE TABLE twice AS SELECT key, min(batch) AS one, max(batch) AS other FROM keys "
                             "GROUP BY key HAVING count(*) > 1 AND max(meant)")
            pairs = self._db.execute("SELECT one, other, count(*) FROM twice GROUP BY one, other ORDER BY one, other").fetchall()
            for one, other, count in pairs:
                some = self._db.execute("SELECT key FROM twice WHERE one = ? AND other = ? LIMIT 10", (one, other))
                yield self._names[one], self._names[other], count, [bytes(row[0]) for row in some]


class Sums(NamedTuple):
    """What there was and what there is: rows in each place, rows that are new since the baseline, and the digests of the multisets.

    The digests are SHA-256 over the sorted row digests, of the baseline, and of the rows of the baseline as they are now.
    """

    before: int
    in_table: int
    archived: int
    new: int
    before_sha256: Optional[str]
    now_sha256: Optional[str]


class RowLedger(_OnDisk):
    """Every row of a table by key and digest, in the places where it was seen. `leaf` numbers the physical tables."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE rows (leaf INTEGER NOT NULL, key BLOB NOT NULL, place INTEGER NOT NULL, digest BLOB)")

    def add(self, place: int, leaf: int, digests_and_keys: Iterable[bytes]) -> None:
        """Rows as lines: the SHA-256 in hex, a space, the key's text."""
        self._insert(f"INSERT INTO rows SELECT {int(leaf)}, substr(line, {DIGEST_HEX + 2}), {int(place)}, substr(line, 1, {DIGEST_HEX}) "
                     "FROM (SELECT ? AS line)", zip(digests_and_keys))

    def add_keys(self, place: int, leaf: int, key_texts: Iterable[bytes]) -> None:
        """Rows of which the content is not compared."""
        self._insert(f"INSERT INTO rows VALUES ({int(leaf)}, ?, {int(place)}, NULL)", zip(key_texts))

    def uneven(self, *, against: bool) -> Iterator[tuple[int, bytes, str]]:
        """(leaf, key text, what is wrong) of every row that is not in exactly one place; with a baseline `against` which it is
        compared, also of rows that are in none, or are there with another content."""
        clauses = [f"WHEN sum(place = {ARCHIVED}) > 1 THEN '{TWICE}'",
                   f"WHEN sum(place <> {BEFORE}) > 1 THEN '{DOUBLED}'"]
        if against:
            clauses += [f"WHEN sum(place <> {BEFORE}) = 0 THEN '{LOST}'",
                        f"WHEN sum(place = {BEFORE}) > 0 AND count(DISTINCT digest) > 1 THEN '{CHANGED}'"]
        with _errors():
            yield from self._db.execute(f"SELECT leaf, key, wrong FROM (SELECT leaf, key, CASE {' '.join(clauses)} END AS wrong FROM rows "
                                        "GROUP BY leaf, key) WHERE wrong IS NOT NULL ORDER BY leaf, key")

    def sums(self, *, against: bool) -> Sums:
        """Counts, and with a baseline the digests."""
        with _errors():
            places = dict(self._db.execute("SELECT place, count(*) FROM rows GROUP BY place").fetchall())
            new = 0
            if against:
                [[new]] = self._db.execute(f"SELECT coalesce(sum(n), 0) FROM (SELECT count(*) AS n FROM rows GROUP BY leaf, key "
                                           f"HAVING sum(place = {BEFORE}) = 0)")
            before = self._digest(f"SELECT digest FROM rows WHERE place = {BEFORE} ORDER BY digest") if against else None
            now = self._digest(
                f"SELECT r.digest FROM rows r WHERE r.place <> {BEFORE} AND (r.leaf, r.key) IN (SELECT leaf, key FROM rows "
                f"WHERE place = {BEFORE}) ORDER BY r.digest") if against else None
        return Sums(places.get(BEFORE, 0), places.get(IN_TABLE, 0), places.get(ARCHIVED, 0), new, before, now)

    def lines(self, leaf: int) -> Iterator[bytes]:
        """Every row of the table and the archive as a line, for a baseline."""
        with _errors():
            for digest, key in self._db.execute("SELECT digest, key FROM rows WHERE leaf = ? AND place <> ? ORDER BY key", (leaf, BEFORE)):
                yield bytes(digest) + b" " + bytes(key) + b"\n"

    def _digest(self, query: str) -> Optional[str]:
        """None where the content of a row is not known."""
        made = hashlib.sha256()
        for (digest,) in self._db.execute(query):
            if digest is None:
                return None
            made.update(digest)
        return made.hexdigest()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if not any(word in str(error) for word in ("full", "disk", "open")):
            raise
        raise ResourceError(f"cannot keep keys in a temporary file: {error}", hint="set TMPDIR to a directory with more room") from None
