"""A batch's rows as they come out of the bucket: hashed while they pass, and proven before any of them is used.

Nothing is held but one chunk. No row is parsed in Python.
"""

from __future__ import annotations

import struct
from typing import Any, Iterable, Iterator, Optional

from audit_archiver.catalogue import index
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import keys, members
from audit_archiver.objectstore.client import Store

ARRAY_BYTES = 7600  # fits into a page of the staging table with its headers

_HEADER, _ROW, _TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), struct.Struct(">hi"), struct.pack(">h", -1)
HINT = "nothing of this batch was restored; get the object back from a version or a replica of the bucket"


def commit_record(store: Store, batch: Batch) -> dict[str, Any]:
    """The batch line in the commit record. Raises Mismatch if it is another batch than the index names."""
    line = index.read_commit(store, batch.stem)
    if line["batch"]["id"] != batch.id:
        raise Mismatch(f"{batch.name}: commit record and index name two batches", hint=HINT)
    return line


def chunks(store: Store, line: dict[str, Any]) -> Iterator[bytes]:
    """The archived rows in chunks of whole lines, without those that were gone from the table before the batch was deleted.

    Raises Mismatch at the end at the latest, unless packed and unpacked bytes, rows and keys are those that were verified
    before the rows were deleted (RST-003); NotFound if the object is gone, NetworkError if the stream breaks.
    """
    batch, data = line["batch"], line["serialized"]["data"]
    key = batches.keys_of(line)[0]
    matcher, digest = keys.pattern(batch["key"]), keys.Digest()
    left_out = sorted(line.get("deleted", {}).get("left_out", ()))
    with store.get(key) as body:
        reader, rows = members.Reader(iter(body)), 0
        try:
            for chunk in reader:
                texts = keys.texts(chunk, matcher)
                digest.update(texts)
                yield _without(chunk, left_out, rows, len(texts)) if left_out else chunk
                rows += len(texts)
        except (InputError, Mismatch) as error:
            raise Mismatch(f"'{store.url(key)}' is damaged: {error.msg}", hint=HINT) from None
    for what, found, expected in (
            ("packed bytes", reader.gz_bytes, data["gz_bytes"]), ("packed SHA-256", reader.gz_sha256(), data["gz_sha256"]),
            ("rows", rows, batch["rows"]), ("SHA-256", reader.sha256(), data["sha256"]),
            ("digest of the keys", digest.hexdigest(), batch["keys_sha256"])):
        if found != expected:
            raise Mismatch(f"'{store.url(key)}' is damaged: its {what} {'are' if what in ('rows', 'packed bytes') else 'is'} {found}, "
                           f"not {expected}", hint=HINT)


def _without(chunk: bytes, places: list[int], begun: int, rows: int) -> bytes:
    """The chunk, which begins with row `begun` of the batch, without the rows at these places."""
    here = {place - begun for place in places if begun <= place < begun + rows}
    if not here:
        return chunk
    return b"".join(line + b"\n" for number, line in enumerate(chunk.split(b"\n")[:-1]) if number not in here)


def arrays(chunk: bytes) -> Iterator[bytes]:
    """The lines of a chunk as JSON arrays of about ARRAY_BYTES; a row that is larger stands alone."""
    start, end = 0, len(chunk)
    while start < end:
        cut = end if end - start <= ARRAY_BYTES else chunk.rfind(b"\n", start, start + ARRAY_BYTES) + 1
        if cut <= start:
            cut = chunk.index(b"\n", start) + 1
        yield b"[" + chunk[start:cut - 1].replace(b"\n", b",") + b"]"
        start = cut


class Stream:
    """The arrays of a batch as the file that COPY ... (FORMAT binary) reads. `error` keeps what went wrong meanwhile, which
    psycopg2 would swallow; `wrapped` says whether a value may be an array with bounds of its own."""

    def __init__(self, found: Iterable[bytes]) -> None:
        self._parts = self._framed(found)
        self._part, self._at = b"", 0
        self.error: Optional[BaseException] = None
        self.wrapped = False

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end."""
        if self._at == len(self._part):
            try:
                self._part, self._at = next(self._parts, b""), 0
            except BaseException as error:
                self.error = error
                raise
        data = self._part[self._at:self._at + size]
        self._at += len(data)
        return data

    def _framed(self, found: Iterable[bytes]) -> Iterator[bytes]:
        """A row of one field for each array: the number of fields, its length, its bytes."""
        yield _HEADER
        for chunk in found:
            self.wrapped = self.wrapped or b'"$array"' in chunk
            yield b"".join(part for array in arrays(chunk) for part in (_ROW.pack(1, len(array)), array))
        yield _TRAILER
