"""A copy of a bucket in a directory, read as if it were the store. Nothing is written to it."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Callable, Iterator, Optional, TypeVar

from audit_archiver.exits import Mismatch, PermissionDenied
from audit_archiver.objectstore.client import SMALL_BYTES
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.objectstore.get import CHUNK_BYTES
from audit_archiver.objectstore.listing import Entry

Answer = TypeVar("Answer")


class LocalStore:
    """What readers of an archive ask of a Store, answered out of files.

    The object `key` is the file `directory`/`key` without `stripped` before it: a copy need not begin where the bucket does.
    """

    def __init__(self, directory: Path, prefix: str, stripped: str = "") -> None:
        self.prefix, self._directory, self._stripped = prefix, directory, stripped

    def get(self, key: str) -> LocalBody:
        """The object as a stream (a context manager, iterable in chunks); NotFound if there is none."""
        return LocalBody(self._path(key))

    def get_bytes(self, key: str, limit: int = SMALL_BYTES) -> bytes:
        """The whole object; NotFound if there is none, Mismatch if it is larger than `limit` bytes."""
        with self.get(key) as body:
            if body.size > limit:
                raise Mismatch(f"'{self.url(key)}' holds {body.size} bytes, more than the {limit} it can have")
            return body.read()

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end` (exclusive) of an object; fewer where it ends before."""
        with self.get(key) as body:
            body.seek(start)
            return body.read(end - start)

    def head(self, key: str) -> Optional[os.stat_result]:
        """Not None if there is such an object."""
        path = self._path(key)
        return path.stat() if path.is_file() else None

    def again(self, attempt: Callable[[], Answer]) -> Answer:
        """`attempt()`: a file is not better the second time."""
        return attempt()

    def list(self, prefix: str, start_after: Optional[str] = None) -> Iterator[Entry]:
        """(key, size, modified) of the objects under `prefix` after the key `start_after`, in key order."""
        under = self._path(prefix)
        found = [path for path in (under if prefix.endswith("/") else under.parent).rglob("*") if path.is_file()]
        for key, path in sorted((self._key(path), path) for path in found):
            if key.startswith(prefix) and (start_after is None or key > start_after):
                status = path.stat()
                yield Entry(key, status.st_size, datetime.datetime.fromtimestamp(status.st_mtime, datetime.timezone.utc))

    def directories(self, prefix: str) -> Iterator[str]:
        """The key prefixes one level below `prefix`."""
        under = self._path(prefix)
        yield from sorted(f"{prefix}{path.name}/" for path in (under.iterdir() if under.is_dir() else ()) if path.is_dir())

    def url(self, key: str) -> str:
        """What messages call an object."""
        return str(self._path(key))

    def _path(self, key: str) -> Path:
        return self._directory / key[len(self._stripped):] if key.startswith(self._stripped) else self._directory / key

    def _key(self, path: Path) -> str:
        return self._stripped + path.relative_to(self._directory).as_posix()


class LocalBody:
    """A file as the body of an object."""

    etag, version = "", None

    def __init__(self, path: Path) -> None:
        try:
            self._file = open(path, "rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound(f"'{path}' does not exist") from None
        except PermissionError:
            raise PermissionDenied(f"cannot read '{path}'", hint="make it readable for this user") from None
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes (all without it); b"" at the end."""
        return self._file.read(size)

    def seek(self, place: int) -> None:
        """Go on reading at this byte."""
        self._file.seek(place)

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.read(CHUNK_BYTES), b"")

    def __enter__(self) -> LocalBody:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
