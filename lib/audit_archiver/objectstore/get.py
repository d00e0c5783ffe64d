"""Read objects: whole, as a stream, or only their head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Optional

from audit_archiver.exits import Mismatch
from audit_archiver.objectstore.connection import Connection
from audit_archiver.objectstore.errors import NotFound

CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Head:
    """What HEAD says of an object; etag without its quotes, version None in a bucket without versions, restore None unless
    it was asked for out of a cold storage class."""

    size: int
    etag: str
    version: Optional[str]
    storage_class: str
    encryption: Optional[str]
    restore: Optional[str] = None


class Body:
    """An object as it arrives. Close it, or read it to its end; it is a context manager."""

    def __init__(self, connection: Connection, key: str, answer: dict[str, Any]) -> None:
        self._connection, self._stream = connection, answer["Body"]
        self._what = f"read '{connection.url(key)}'"
        self.size = int(answer["ContentLength"])
        self.etag, self.version = etag_of(answer), version_of(answer)

    def read(self, size: Optional[int] = None) -> bytes:
        """Up to `size` bytes (all without it); b"" at the end. NetworkError if the stream breaks or ends too early."""
        with self._connection.errors(self._what):
            data: bytes = self._stream.read(size)
        self._connection.arrived(len(data))
        return data

    def __iter__(self) -> Iterator[bytes]:
        while True:
            chunk = self.read(CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    def close(self) -> None:
        """Give up what was not read."""
        self._stream.close()

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def get(connection: Connection, key: str) -> Body:
    """The object as a stream; NotFound if there is none. The request is tried again, the stream is not."""
    return Body(connection, key, connection.safely("get_object", f"read '{connection.url(key)}'", Key=key))


def get_bytes(connection: Connection, key: str, limit: int) -> tuple[bytes, Body]:
    """The whole content of an object of up to `limit` bytes and its (read) Body, tried again if the stream breaks.

    Raises NotFound, and Mismatch for an object over the limit.
    """
    def attempt() -> tuple[bytes, Body]:
        answer = connection.request("get_object", f"read '{connection.url(key)}'", Key=key)
        with Body(connection, key, answer) as body:
            if body.size > limit:
                raise Mismatch(f"'{connection.url(key)}' holds {body.size} bytes, more than the {limit} it can have")
            return body.read(), body
    return connection.retrying(attempt)


def get_range(connection: Connection, key: str, start: int, end: int) -> bytes:
    """The bytes from `start` up to `end` (exclusive) of an object, fewer where it ends before; tried again if the stream breaks."""
    what = f"read '{connection.url(key)}'"

    def attempt() -> bytes:
        with Body(connection, key, connection.request("get_object", what, Key=key, Range=f"bytes={start}-{end - 1}")) as body:
            return body.read()
    return connection.retrying(attempt)


def head(connection: Connection, key: str) -> Optional[Head]:
    """What the store says of an object, or None if there is none."""
    try:
        answer = connection.safely("head_object", f"look at '{connection.url(key)}'", Key=key)
    except NotFound:
        return None
    return Head(int(answer["ContentLength"]), etag_of(answer), version_of(answer),
                answer.get("StorageClass", "STANDARD"), answer.get("ServerSideEncryption"), answer.get("Restore"))


def etag_of(answer: dict[str, Any]) -> str:
    """The ETag of an answer without its quotes."""
    return str(answer.get("ETag", "")).strip('"')


def version_of(answer: dict[str, Any]) -> Optional[str]:
    """The version an answer names, or None in a bucket without versions ("null" is what such a bucket may say)."""
    version = answer.get("VersionId")
    return None if version in (None, "", "null") else str(version)
