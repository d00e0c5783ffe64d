"""What is written and what came of it: bytes from memory or from a file, in parts where they are large."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

from audit_archiver.exits import Mismatch

IN_MEMORY_BYTES = 16 << 20
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Put:
    """What lies in the bucket now; `created` is False if the same bytes lay there before."""

    etag: str
    version: Optional[str]
    created: bool


class Content:
    """Bytes to write, from memory or from a file."""

    def __init__(self, body: Union[bytes, Path], sha256: Optional[str] = None) -> None:
        self.path = None if isinstance(body, bytes) else body
        self.size = len(body) if isinstance(body, bytes) else os.path.getsize(body)
        self._bytes = body if isinstance(body, bytes) else body.read_bytes() if self.size <= IN_MEMORY_BYTES else None
        if sha256 is not None and sha256 != self.sha256:
            raise Mismatch(f"the bytes of '{self.path or 'an object'}' are not those of the batch line",
                           hint="nothing was sent; the staged files changed: select again")

    @cached_property
    def sha256(self) -> str:
        """The digest of all bytes, in hex."""
        return self._digest(hashlib.sha256())

    def md5(self, offset: int = 0, length: Optional[int] = None) -> Any:
        """The MD5 hash object of a part."""
        digest = hashlib.md5(usedforsecurity=False)
        self._digest(digest, offset, length)
        return digest

    def body(self, offset: int = 0, length: Optional[int] = None) -> Union[bytes, Slice]:
        """A part as bytes, or as a stream where it is too large for memory (the caller closes it)."""
        length = self.size - offset if length is None else length
        if self._bytes is not None:
            return self._bytes if length == self.size else self._bytes[offset:offset + length]
        if length <= IN_MEMORY_BYTES:
            with open(str(self.path), "rb") as file:
                file.seek(offset)
                return file.read(length)
        return Slice(str(self.path), offset, length)

    def _digest(self, digest: Any, offset: int = 0, length: Optional[int] = None) -> str:
        body = self.body(offset, length)
        if isinstance(body, bytes):
            digest.update(body)
        else:
            with body:
                for chunk in iter(lambda: body.read(READ_BYTES), b""):
                    digest.update(chunk)
        return str(digest.hexdigest())


class Slice(io.RawIOBase):
    """A part of a file as a stream of its own, which botocore may rewind."""

    def __init__(self, path: str, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = open(path, "rb"), offset, length, 0

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def read(self, size: Optional[int] = -1) -> bytes:
        """Up to `size` bytes of the part, or its rest."""
        left = self._length - self._at
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._offset + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the part."""
        self._at = offset + (self._at if whence == io.SEEK_CUR else self._length if whence == io.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        """The place within the part."""
        return self._at

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
