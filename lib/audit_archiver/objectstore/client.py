"""The object store as the commands see it: one object made from the configuration's S3 section."""

from __future__ import annotations

import email.utils
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Callable, Iterator, Optional, TypeVar, Union

from audit_archiver import log
from audit_archiver.exits import ArchiverError, Mismatch
from audit_archiver.objectstore import get, listing, multipart, thaw
from audit_archiver.objectstore.connection import Connection
from audit_archiver.objectstore.content import Put
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.objectstore.get import Body, Head
from audit_archiver.objectstore.put import Writer

if TYPE_CHECKING:
    from audit_archiver.config.model import S3, Config

Answer = TypeVar("Answer")

SMALL_BYTES = 64 << 20


@dataclass(frozen=True)
class Capabilities:
    """What a probe found: whether create-only writes are honoured, and where and as whom we write."""

    create_only: bool
    endpoint: str
    region: str
    identity: str


@dataclass(frozen=True)
class BucketCheck:
    """What preflight wants to know of a bucket that passed: put, get, list and delete worked."""

    capabilities: Capabilities
    clock_skew_s: Optional[float]
    versioned: Optional[bool]


class Store:
    """One bucket. Made from `config.s3` alone; `watch` is our output's descriptor.

    Nothing is sent before the first call. Safe to use from several threads. Every method raises the errors of
    `exits`: ConfigError (bucket, endpoint, region), PermissionDenied, NetworkError (after the retries), NotFound.
    """

    def __init__(self, s3: S3, *, watch: Optional[int] = None) -> None:
        self.connection = Connection(s3, watch)
        self.bucket, self.prefix = s3.bucket, s3.prefix
        self._writer = Writer(self.connection)

    def probe(self) -> Capabilities:
        """Find out once, with a small object that is removed again, whether create-only writes are honoured."""
        connection = self.connection
        return Capabilities(self._writer.create_only, connection.endpoint, connection.region, connection.identity)

    def put_new(self, key: str, body: Union[bytes, Path], *, content_type: str = "application/json",
                sha256: Optional[str] = None, bulk: bool = False, state: Optional[Path] = None) -> Put:
        """Write under a new name; see Writer.put_new."""
        return self._writer.put_new(key, body, content_type=content_type, sha256=sha256, bulk=bulk, state=state)

    def put_record(self, key: str, body: bytes) -> Put:
        """Write a record that others will decide by under a new name, and read it back (T20).

        Raises what put_new raises, and Mismatch if the store said yes and kept nothing, or other bytes; those are removed, since
        a name is used for one byte sequence only.
        """
        made = self.put_new(key, body)
        try:
            found = self.get_bytes(key, len(body))
        except (NotFound, Mismatch):
            found = None
        if found == body:
            return made
        if made.created:
            self.delete(key)
        raise Mismatch(f"'{self.url(key)}' was written, and {'is not there as it was written' if found is None else 'has other bytes'}",
                       hint="this store must not be used before it is known why: what it keeps cannot be trusted")

    def put_over(self, key: str, body: bytes) -> Put:
        """Write over what lies there; only the restore watermark is ever rewritten."""
        return self._writer.put_over(key, body)

    def guards(self, size: int) -> bool:
        """Whether the store itself refuses to overwrite an object of that many bytes (parts may differ from a PUT)."""
        return self._writer.guards(size)

    def get(self, key: str) -> Body:
        """The object as a stream (a context manager, iterable in chunks); NotFound if there is none."""
        return get.get(self.connection, key)

    def get_bytes(self, key: str, limit: int = SMALL_BYTES) -> bytes:
        """The whole object; NotFound if there is none, Mismatch if it is larger than `limit` bytes."""
        return get.get_bytes(self.connection, key, limit)[0]

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end` (exclusive) of an object; fewer where it ends before."""
        return get.get_range(self.connection, key, start, end)

    def read(self, key: str, limit: int = SMALL_BYTES) -> tuple[bytes, Body]:
        """The whole object together with its (read) Body, which has the size, ETag and version."""
        return get.get_bytes(self.connection, key, limit)

    def again(self, attempt: Callable[[], Answer]) -> Answer:
        """`attempt()`, again after a pause while it raises a NetworkError: for reading a stream to its end."""
        return self.connection.retrying(attempt)

    def head(self, key: str) -> Optional[Head]:
        """What the store says of an object, or None if there is none."""
        return get.head(self.connection, key)

    def list(self, prefix: str, start_after: Optional[str] = None) -> Iterator[listing.Entry]:
        """(key, size, modified) of the objects under `prefix` after the key `start_after`, in key order."""
        return listing.entries(self.connection, prefix, start_after)

    def directories(self, prefix: str) -> Iterator[str]:
        """The key prefixes one level below `prefix`."""
        return listing.directories(self.connection, prefix)

    def delete(self, key: str) -> None:
        """Remove an object, or mark it deleted in a versioned bucket; absent is fine."""
        self.connection.safely("delete_object", f"delete '{self.url(key)}'", Key=key)

    def thaw(self, key: str, days: int, tier: str) -> None:
        """Ask for a copy of a frozen object that can be read for so many days; asked for already is fine."""
        thaw.ask(self.connection, key, days, tier)

    def unfinished_uploads(self, prefix: str) -> Iterator[tuple[str, str, object]]:
        """(key, upload id, begun) of multipart uploads under `prefix` that nobody completed or aborted."""
        return multipart.unfinished(self.connection, prefix)

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Free the parts of such an upload."""
        multipart.abort(self.connection, key, upload_id)

    def abort_staged(self, state: Path) -> None:
        """The same for the upload that the state file of a staged batch names, if there is one."""
        multipart.abort_staged(self.connection, state)

    def url(self, key: str) -> str:
        """What messages call an object."""
        return self.connection.url(key)

    def check_bucket(self) -> BucketCheck:
        """Preflight (REQ-S3-003, 006): reach the bucket, put, get, list and delete a small object under the prefix."""
        connection = self.connection
        # not head_bucket: the answer to a HEAD has no body, and so no word about what is wrong
        answer = connection.safely("list_objects_v2", f"reach the bucket '{self.bucket}'", Prefix=self.prefix, MaxKeys=1,
                                   EncodingType="url")
        skew = _skew(answer["ResponseMetadata"]["HTTPHeaders"].get("date"))
        capabilities = self.probe()
        key, body = f"{self.prefix}.probe-{os.urandom(8).hex()}", os.urandom(16)
        self.put_new(key, body, content_type="application/octet-stream")
        try:
            if self.get_bytes(key) != body:
                raise Mismatch(f"'{self.url(key)}' came back with other bytes than were written",
                               hint="this store must not be used: what it keeps cannot be trusted")
            listed = any(entry.key == key for entry in self.list(key))
        finally:
            self.delete(key)
        if not listed:
            raise Mismatch(f"'{self.url(key)}' was written and is not listed",
                           hint="recovery finds interrupted batches by listing: use a store whose listing is up to date")
        return BucketCheck(capabilities, skew, self._versioned())

    def _versioned(self) -> Optional[bool]:
        try:
            answer = self.connection.request("get_bucket_versioning", f"ask for the versioning of '{self.bucket}'")
        except ArchiverError:
            return None  # many stores have no versioning, and many roles may not ask
        return answer.get("Status") == "Enabled"


def open_store(config: Config, *, watch: Optional[BinaryIO] = None) -> Store:
    """The store of a configuration. The first log line says where it really points and who we are: AWS_ENDPOINT_URL,
    AWS_PROFILE and proxies redirect silently. `watch` is our output: no pause outlives its reader.
    """
    try:
        descriptor = None if watch is None else watch.fileno()
    except io.UnsupportedOperation:
        descriptor = None
    store = Store(config.s3, watch=descriptor)
    connection = store.connection
    through = f" through the proxy {connection.proxy}" if connection.proxy else ""
    log.info("s3.open", f"{store.url(store.prefix)} at {connection.endpoint} ({connection.region}) as "
             f"{connection.identity}{through}",
             endpoint=connection.endpoint, region=connection.region, identity=connection.identity, proxy=connection.proxy)
    return store


def _skew(date: Optional[str]) -> Optional[float]:
    parsed = email.utils.parsedate_tz(date) if date else None
    return abs(email.utils.mktime_tz(parsed) - time.time()) if parsed else None
