"""Data objects: concatenated gzip members of MEMBER_ROWS rows, reproducible byte for byte.

`zcat` reads such an object whole; with the members' offsets a reader fetches and unpacks only the rows it
wants. Equal rows give equal bytes (T19): the header's time is 0, and the compressor is fed in slices that are
counted from the member's first byte. ISA-L's output depends on how its input was cut, and a pipe cuts at random.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import zlib
from typing import Any, BinaryIO, Iterable, Iterator, Optional

from isal import isal_zlib

from audit_archiver.exits import Mismatch

MEMBER_ROWS = 500
SLICE_BYTES = 1 << 17
UNPACKED_BYTES = 1 << 20  # at most this much is unpacked at once: deflate packs zeros 1000 to 1

_GZIP_BITS = 31
_LF = re.compile(rb"\n")


def compressor(level: int) -> tuple[str, int]:
    """The library and its level for a wished gzip level of 1..9 (REQ-S3-013).

    ISA-L packs audit rows six to nine times as fast as zlib 6 and to about the same size. Its level 2 costs half
    as much again as level 1 for 1 % of the size (measured on the bench's rows), so it is not used; zlib's own
    levels remain for who wants the last percents.
    """
    if level >= 8:
        return "zlib", level
    return "isal", 1 if level <= 6 else 3


class Writer:
    """Writes rows as gzip members to `out`, counting and hashing both sides while the bytes pass."""

    def __init__(self, out: BinaryIO, level: int) -> None:
        self._out = out
        self._library, self._level = compressor(level)
        self._member: Any = None
        self._member_rows = 0
        self._slice: list[Any] = []
        self._slice_bytes = 0
        self._plain = hashlib.sha256()
        self._packed = hashlib.sha256()
        self.rows = self.bytes = self.gz_bytes = 0
        self.members: list[int] = []

    def write(self, chunk: bytes, rows: int) -> None:
        """Add `chunk`, which is exactly `rows` whole lines."""
        self._plain.update(chunk)
        self.bytes += len(chunk)
        self.rows += rows
        view, start = memoryview(chunk), 0
        while rows:
            take = min(rows, MEMBER_ROWS - self._member_rows)
            end = len(chunk) if take == rows else after_line(chunk, start, take)
            self._add(view[start:end])
            self._member_rows += take
            rows, start = rows - take, end
            if self._member_rows == MEMBER_ROWS:
                self._end_member()
        # copied, so that a few bytes in hand do not keep a chunk of any size in memory
        self._slice = [b"".join(self._slice)]

    def close(self) -> None:
        """End the last member."""
        if self._member is not None:
            self._end_member()

    def summary(self) -> dict[str, Any]:
        """The `data` part of a batch line's serialized section."""
        return {"sha256": self._plain.hexdigest(), "bytes": self.bytes, "gz_sha256": self._packed.hexdigest(),
                "gz_bytes": self.gz_bytes, "member_rows": MEMBER_ROWS, "members": self.members}

    def _add(self, data: memoryview) -> None:
        if self._member is None:
            make = isal_zlib.compressobj if self._library == "isal" else zlib.compressobj
            self._member = make(self._level, zlib.DEFLATED, _GZIP_BITS)
            self.members.append(self.gz_bytes)
        while data:
            piece = data[:SLICE_BYTES - self._slice_bytes]
            data = data[len(piece):]
            self._slice.append(piece)
            self._slice_bytes += len(piece)
            if self._slice_bytes == SLICE_BYTES:
                self._compress_slice()

    def _compress_slice(self) -> None:
        data = b"".join(self._slice)
        self._slice, self._slice_bytes = [], 0
        self._put(self._member.compress(data))

    def _end_member(self) -> None:
        self._compress_slice()
        self._put(self._member.flush())
        self._member, self._member_rows = None, 0

    def _put(self, packed: bytes) -> None:
        if packed:
            self._packed.update(packed)
            self.gz_bytes += len(packed)
            left = memoryview(packed)
            while left:  # an unbuffered file writes what fits on a full disk, and says ENOSPC only the next time
                left = left[self._out.write(left):]


class Reader:
    """Unpacks a data object as it arrives, hashing both sides.

    Iterating gives chunks of whole lines and ends with Mismatch unless the stream ended with a complete member and a
    complete line. Memory: UNPACKED_BYTES and the longest line, however well the rows were packed.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self._plain = hashlib.sha256()
        self._packed = hashlib.sha256()
        self.bytes = self.gz_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        held: list[bytes] = []
        for data in self._unpacked():
            self._plain.update(data)
            self.bytes += len(data)
            cut = data.rfind(b"\n") + 1
            if not cut:
                held.append(data)
                continue
            yield b"".join([*held, memoryview(data)[:cut]]) if held or cut < len(data) else data
            held = [data[cut:]] if cut < len(data) else []
        if held:
            raise Mismatch("the data object ends inside a row")

    def sha256(self) -> str:
        """The digest of the unpacked bytes so far."""
        return self._plain.hexdigest()

    def gz_sha256(self) -> str:
        """The digest of the packed bytes so far."""
        return self._packed.hexdigest()

    def _unpacked(self) -> Iterator[bytes]:
        member: Optional[Any] = None
        for packed in self._chunks:
            self._packed.update(packed)
            self.gz_bytes += len(packed)
            while packed:
                member = member or isal_zlib.decompressobj(_GZIP_BITS)
                try:
                    data = member.decompress(packed, UNPACKED_BYTES)
                except isal_zlib.error as error:
                    raise Mismatch(f"the data object is no gzip stream: {error}") from None
                if data:
                    yield data
                if member.eof:
                    packed, member = member.unused_data, None
                elif len(data) < UNPACKED_BYTES:
                    packed = b""
                else:
                    packed = member.unconsumed_tail
        if member is not None:
            raise Mismatch("the data object ends inside a gzip member")


def after_line(chunk: bytes, start: int, lines: int) -> int:
    """The position behind the n-th LF of `chunk` from `start`, counted without a Python step per line."""
    return next(itertools.islice(_LF.finditer(chunk, start), lines - 1, None)).end()
