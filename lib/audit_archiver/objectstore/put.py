"""Write objects under names that nobody else has: create-only, and never twice with different bytes.

A name that is taken, or a PUT whose answer was lost, is settled by reading the object: equal bytes are ours,
other bytes are NameTaken. Where the store ignores If-None-Match a HEAD comes first. Content-MD5 always goes
along: buckets with Object Lock demand it, and a store that checks it refuses what broke on the way.
"""

from __future__ import annotations

import base64
import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Optional, Union

from audit_archiver import log
from audit_archiver.exits import ArchiverError, Failed, NetworkError
from audit_archiver.objectstore import multipart
from audit_archiver.objectstore.connection import Connection
from audit_archiver.objectstore.content import Content, Put
from audit_archiver.objectstore.errors import NameTaken, NotFound, Refused
from audit_archiver.objectstore.get import Body, etag_of, head, version_of

PROBE_BODIES = (b"1", b"2")
UNASKED_BYTES = 256 << 10  # up to here a body is sent without asking first: Expect: 100-continue is one more round trip


class Writer:
    """Create-only writes to one bucket. What the store honours is probed at the first write and not assumed."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._settings = connection.s3

    def put_new(self, key: str, body: Union[bytes, Path], *, content_type: str, sha256: Optional[str] = None,
                bulk: bool = False, state: Optional[Path] = None) -> Put:
        """Write `body` under the new name `key`.

        `sha256`, if given, must be the body's digest (else Mismatch, nothing is sent). `bulk` objects go into the
        configured storage class; small ones stay in STANDARD, where 128 KiB are not the least that is billed.
        Files above the multipart threshold go in parts; `state` is the file that lets a killed upload go on.
        Raises NameTaken if other bytes have the name, NetworkError when the retries are spent.
        """
        content = Content(body, sha256)
        params = {"ContentType": content_type, **self.object_params(bulk)}
        if self._in_parts(content.size):
            return multipart.upload(self, key, content, params, state)
        doubtful = not self.create_only

        def attempt() -> Put:
            nonlocal doubtful
            if doubtful and head(self.connection, key) is not None:
                return self.compare(key, content)
            try:
                return self._put(key, content, {**params, **({"IfNoneMatch": "*"} if self.create_only else {})})
            except Refused:
                return self.compare(key, content)
            except NetworkError:
                doubtful = True  # it may have arrived
                raise

        return self.connection.retrying(attempt)

    def put_over(self, key: str, body: bytes) -> Put:
        """Write `body` under `key`, whatever lies there: for what is no record of rows, as a restore watermark."""
        params = {"ContentType": "application/json", **self.object_params(False)}
        return self.connection.retrying(lambda: self._put(key, Content(body), params))

    def guards(self, size: int) -> bool:
        """Whether an object of that size is written under a condition that the store honours."""
        return self.create_only_multipart if self._in_parts(size) else self.create_only

    def _in_parts(self, size: int) -> bool:
        return size > self._settings.multipart_threshold_mb * multipart.MIB

    def object_params(self, bulk: bool) -> dict[str, Any]:
        """Encryption and storage class of an object (REQ-S3-004)."""
        params: dict[str, Any] = {}
        if self._settings.encryption == "SSE-S3":
            params["ServerSideEncryption"] = "AES256"
        elif self._settings.encryption == "SSE-KMS":
            params["ServerSideEncryption"] = "aws:kms"
            if self._settings.kms_key_id:
                params["SSEKMSKeyId"] = self._settings.kms_key_id
        if bulk and self._settings.storage_class:
            params["StorageClass"] = self._settings.storage_class
        return params

    def _put(self, key: str, content: Content, params: dict[str, Any]) -> Put:
        body: Any = content.body()
        if content.size <= UNASKED_BYTES:
            body = bytearray(body)  # botocore asks with Expect before it sends bytes or a stream
        try:
            answer = self.connection.request(
                "put_object", f"write '{self.connection.url(key)}'", Key=key, Body=body, ContentLength=content.size,
                ContentMD5=base64.b64encode(content.md5().digest()).decode(), **params)
        finally:
            if hasattr(body, "close"):
                body.close()
        etag, version = etag_of(answer), version_of(answer)
        if not etag:  # the answer need not name one, the object must
            made = head(self.connection, key)
            etag, version = (made.etag, made.version) if made is not None else ("", None)
        return Put(etag, version, True)

    def compare(self, key: str, content: Content) -> Put:
        """Settle a name that is taken: our own bytes are returned as not created, others raise NameTaken."""
        url = self.connection.url(key)
        try:
            answer = self.connection.request("get_object", f"read '{url}'", Key=key)
        except NotFound:
            raise NetworkError(f"'{url}' was refused as taken, and is not there", hint="run again") from None
        with Body(self.connection, key, answer) as found:
            if found.size == content.size:
                digest = hashlib.sha256()
                for chunk in found:
                    digest.update(chunk)
                if digest.hexdigest() == content.sha256:
                    log.info("s3.ours", f"'{url}' was there already with the same bytes", key=key)
                    return Put(found.etag, found.version, False)
        raise NameTaken(f"'{url}' is taken: it holds other bytes", hint="nothing was overwritten; select again")

    @cached_property
    def create_only(self) -> bool:
        """Whether the store refuses a PUT with If-None-Match on a name that is taken."""
        return self._probed(self._probe_put)

    @cached_property
    def create_only_multipart(self) -> bool:
        """Whether it also refuses the completion of a multipart upload so."""
        return self.create_only and self._probed(self._probe_complete)

    def _probed(self, probe: Callable[[str], bool]) -> bool:
        key = f"{self._settings.prefix}.probe-{os.urandom(8).hex()}"
        try:
            return probe(key)
        finally:
            self._forget(key)

    def _probe_put(self, key: str) -> bool:
        try:
            for body in PROBE_BODIES:
                self._put_again(key, body, IfNoneMatch="*")
        except Refused:
            return True  # also when the first one was refused: then its lost twin had arrived
        except Failed as error:
            log.debug("s3.probe", f"the store does not know If-None-Match: {error.msg}", detail=error.detail)
            self._put_again(key, PROBE_BODIES[0])
        return False

    def _probe_complete(self, key: str) -> bool:
        self._put_again(key, PROBE_BODIES[0])
        upload_id = multipart.begin(self.connection, key, {"ContentType": "text/plain", **self.object_params(False)})
        try:
            etag = multipart.send_part(self.connection, key, upload_id, 1, Content(PROBE_BODIES[1]), 0, 1)
            multipart.complete(self.connection, key, upload_id, {1: etag}, create_only=True)
        except Refused:
            multipart.abort(self.connection, key, upload_id)
            return True
        except Failed as error:
            log.debug("s3.probe", f"the store does not know If-None-Match on completion: {error.msg}", detail=error.detail)
            multipart.abort(self.connection, key, upload_id)
        return False

    def _put_again(self, key: str, body: bytes, **condition: str) -> None:
        self.connection.retrying(lambda: self._put(key, Content(body), {**self.object_params(False), **condition}))

    def _forget(self, key: str) -> None:
        try:
            self.connection.safely("delete_object", f"delete '{self.connection.url(key)}'", Key=key)
        except ArchiverError as error:
            log.warning("s3.probe", f"the probe object '{self.connection.url(key)}' is left behind: {error.msg}",
                        hint="archiving needs no s3:DeleteObject but for this; remove '.probe-*' by hand")
