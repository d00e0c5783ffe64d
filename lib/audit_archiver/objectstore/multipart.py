"""Large objects in parts, with a state file that lets a killed upload go on with its next part.

`upload.json` beside the staged batch: upload_id, completed_parts, part_etags (REQ-NET-003). It is believed only for
the same bucket, key, size, digest and part size. A part that fails is sent again alone; the upload is aborted when it
is given up, and kept when only the network failed.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Optional

from audit_archiver import log
from audit_archiver.exits import ArchiverError, NetworkError
from audit_archiver.objectstore.connection import Connection
from audit_archiver.objectstore.content import Content, Put
from audit_archiver.objectstore.errors import NotFound, Refused
from audit_archiver.objectstore.get import etag_of, head

if TYPE_CHECKING:
    from audit_archiver.objectstore.put import Writer

MIB = 1 << 20
LEAST_PART_BYTES = 5 * MIB
MOST_PARTS = 10_000
STATE = "upload.json"
_MD5 = re.compile("[0-9a-f]{32}")


class State:
    """What of an upload is done, in memory and, with a path, in the state file (temp + rename, no fsync)."""

    def __init__(self, path: Optional[Path], identity: dict[str, Any]) -> None:
        self._path, self._identity = path, identity
        self.upload_id: Optional[str] = None
        self.parts: list[int] = []
        self.etags: list[str] = []

    def load(self) -> bool:
        """Take over an earlier upload of the same bytes to the same name; False if there is none."""
        if self._path is None or not self._path.exists():
            return False
        try:
            found = json.loads(self._path.read_bytes())
            ours = all(found[name] == value for name, value in self._identity.items())
            upload_id, parts, etags = found["upload_id"], found["completed_parts"], found["part_etags"]
        except (ValueError, KeyError, TypeError):
            log.warning("upload.state", f"'{self._path}' is no upload state; the upload begins anew")
            return False
        if not ours or parts != list(range(1, len(etags) + 1)):
            return False
        self.upload_id, self.parts, self.etags = upload_id, parts, etags
        return True

    def begin(self, upload_id: str) -> None:
        """A new upload without parts."""
        self.upload_id, self.parts, self.etags = upload_id, [], []
        self._save()

    def add(self, number: int, etag: str) -> None:
        """One more part lies in the store."""
        self.parts.append(number)
        self.etags.append(etag)
        self._save()

    def forget(self) -> None:
        """The upload is over."""
        if self._path is not None and self._path.exists():
            self._path.unlink()

    def _save(self) -> None:
        if self._path is None:
            return
        value = {"format": "aa-upload", "version": 1, **self._identity, "upload_id": self.upload_id,
                 "completed_parts": self.parts, "part_etags": self.etags}
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(json.dumps(value) + "\n")
        os.replace(temporary, self._path)


def upload(writer: Writer, key: str, content: Content, params: dict[str, Any], path: Optional[Path]) -> Put:
    """Write `content` under the new name `key` in parts, going on where `path` says an earlier try stopped.

    Raises NameTaken, and NetworkError when the retries of a part are spent: then the state stays for the next try.
    """
    connection, size = writer.connection, content.size
    part_bytes = max(int(connection.s3.multipart_part_mb * MIB), LEAST_PART_BYTES, math.ceil(size / MOST_PARTS))
    state = State(path, {"bucket": connection.s3.bucket, "key": key, "size": size, "sha256": content.sha256,
                         "part_bytes": part_bytes})
    resumed = state.load()
    try:
        if not resumed:
            if head(connection, key) is not None:
                return connection.retrying(lambda: writer.compare(key, content))
            state.begin(begin(connection, key, params))
        else:
            log.info("upload.resumed", f"'{connection.url(key)}' goes on after part {len(state.parts)}", key=key)
        try:
            put = _send(writer, key, content, part_bytes, state)
        except NotFound:  # the upload is gone: completed by a try that was killed before it knew, or cleaned up
            if head(connection, key) is not None:
                put = connection.retrying(lambda: writer.compare(key, content))
            else:
                state.begin(begin(connection, key, params))
                put = _send(writer, key, content, part_bytes, state)
    except NetworkError:
        if path is None:
            _give_up(connection, key, state)
        raise
    except ArchiverError:
        _give_up(connection, key, state)
        raise
    if not put.created:
        abort(connection, key, state.upload_id)
    state.forget()
    return put


def _send(writer: Writer, key: str, content: Content, part_bytes: int, state: State) -> Put:
    connection, upload_id = writer.connection, str(state.upload_id)
    count = max(1, math.ceil(content.size / part_bytes))
    for number in range(len(state.parts) + 1, count + 1):
        offset = (number - 1) * part_bytes
        state.add(number, send_part(connection, key, upload_id, number, content, offset,
                                    min(part_bytes, content.size - offset)))
        log.debug("upload.part", f"part {number} of {count} of '{connection.url(key)}'", key=key)
    create_only = writer.create_only_multipart
    if not create_only and head(connection, key) is not None:
        return connection.retrying(lambda: writer.compare(key, content))
    try:
        complete(connection, key, upload_id, state.parts, state.etags, create_only)
    except Refused:
        return connection.retrying(lambda: writer.compare(key, content))
    made = head(connection, key)  # some stores name another ETag in the answer than they keep
    if made is None:
        raise NetworkError(f"'{connection.url(key)}' was completed and is not there", hint="run again")
    return Put(made.etag, made.version, True)


def begin(connection: Connection, key: str, params: dict[str, Any]) -> str:
    """Begin a multipart upload and return its id."""
    return str(connection.safely("create_multipart_upload", f"write '{connection.url(key)}'", Key=key, **params)["UploadId"])


def send_part(connection: Connection, key: str, upload_id: str, number: int, content: Content, offset: int,
              length: int) -> str:
    """Send one part, alone again as often as it fails, and return its ETag (REQ-NET-004, 005).

    An ETag that is an MD5 and not the part's means that other bytes arrived, unless the store's ETags are no MD5
    (encryption by KMS): then it gives the same ETag for the same bytes again.
    """
    md5 = content.md5(offset, length)
    seen: set[str] = set()

    def attempt() -> str:
        body = content.body(offset, length)
        try:
            answer = connection.request(
                "upload_part", f"write part {number} of '{connection.url(key)}'", Key=key, UploadId=upload_id,
                PartNumber=number, Body=body, ContentLength=length, ContentMD5=base64.b64encode(md5.digest()).decode())
        finally:
            if not isinstance(body, bytes):
                body.close()
        etag = etag_of(answer)
        if not _MD5.fullmatch(etag) or etag == md5.hexdigest() or etag in seen:
            return etag
        if str(answer.get("ServerSideEncryption", "")).startswith("aws:kms"):
            return etag
        seen.add(etag)
        raise NetworkError(f"part {number} of '{connection.url(key)}' arrived with another digest")

    return connection.retrying(attempt)


def complete(connection: Connection, key: str, upload_id: str, parts: list[int], etags: list[str],
             create_only: bool) -> None:
    """Make the parts one object; Refused if the name is taken and the store honours If-None-Match here."""
    condition = {"IfNoneMatch": "*"} if create_only else {}
    listed = [{"PartNumber": number, "ETag": f'"{etag}"'} for number, etag in zip(parts, etags)]
    connection.safely("complete_multipart_upload", f"complete '{connection.url(key)}'", Key=key, UploadId=upload_id,
                      MultipartUpload={"Parts": listed}, **condition)


def abort(connection: Connection, key: str, upload_id: Optional[str]) -> None:
    """Give an upload up; its parts are freed. One that is gone is fine, one that cannot be aborted is named."""
    if upload_id is None:
        return
    try:
        connection.safely("abort_multipart_upload", f"abort '{connection.url(key)}'", Key=key, UploadId=upload_id)
    except NotFound:
        return
    except ArchiverError as error:
        log.warning("upload.orphan", f"the parts of '{connection.url(key)}' are left behind: {error.msg}",
                    hint="they cost money until the upload is aborted", upload_id=upload_id)


def unfinished(connection: Connection, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(key, upload id, begun) of every upload under `prefix` that was neither completed nor aborted (REQ-NET-007)."""
    place: dict[str, str] = {}
    while True:
        page = connection.safely("list_multipart_uploads", f"list uploads under '{connection.url(prefix)}'",
                                 Prefix=prefix, **place)
        for found in page.get("Uploads", ()):
            yield found["Key"], found["UploadId"], found["Initiated"]
        if not page.get("IsTruncated"):
            return
        place = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _give_up(connection: Connection, key: str, state: State) -> None:
    abort(connection, key, state.upload_id)
    state.forget()
