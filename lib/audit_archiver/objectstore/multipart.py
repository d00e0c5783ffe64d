"""Large objects in parts, with a state file that lets a killed upload go on where it stopped.

`upload.json` beside the staged batch: upload_id, completed_parts, part_etags (REQ-NET-003). It leads to the upload, and only
for the same bucket, key, size, digest and part size; which parts are there the store is asked (ListParts), and one that does
not hold our bytes is sent again. A part that fails is sent again alone; the upload is aborted when it is given up, and kept
when only the network failed or the credentials expired.
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
from audit_archiver.exits import ArchiverError, Failed, NetworkError
from audit_archiver.objectstore.connection import Connection
from audit_archiver.objectstore.content import Content, Put
from audit_archiver.objectstore.errors import Expired, NotFound, Refused
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
        self.etags: dict[int, str] = {}

    def load(self) -> bool:
        """Take over an earlier upload of the same bytes to the same name; False if there is none."""
        if self._path is None or not self._path.exists():
            return False
        try:
            found = json.loads(self._path.read_bytes())
            ours = all(found[name] == value for name, value in self._identity.items())
            upload_id, etags = found["upload_id"], dict(zip(found["completed_parts"], found["part_etags"]))
        except (ValueError, KeyError, TypeError):
            log.warning("upload.state", f"'{self._path}' is no upload state; the upload begins anew")
            return False
        if ours:
            self.upload_id, self.etags = upload_id, etags
        return ours

    def begin(self, upload_id: str) -> None:
        """A new upload without parts."""
        self.upload_id, self.etags = upload_id, {}
        self._save()

    def keep(self, etags: dict[int, str]) -> None:
        """These parts lie in the store, and no others."""
        self.etags = etags
        self._save()

    def add(self, number: int, etag: str) -> None:
        """One more part lies in the store."""
        self.etags[number] = etag
        self._save()

    def forget(self) -> None:
        """The upload is over."""
        if self._path is not None and self._path.exists():
            self._path.unlink()

    def _save(self) -> None:
        if self._path is None:
            return
        value = {"format": "aa-upload", "version": 1, **self._identity, "upload_id": self.upload_id,
                 "completed_parts": sorted(self.etags), "part_etags": [self.etags[number] for number in sorted(self.etags)]}
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
        try:
            if resumed:
                state.keep(_good_parts(connection, key, content, part_bytes, state))
                log.info("upload.resumed", f"'{connection.url(key)}' goes on: {len(state.etags)} parts are there", key=key,
                         parts=sorted(state.etags))
            put = _send(writer, key, content, part_bytes, state)
        except NotFound:  # the upload is gone: completed by a try that was killed before it knew, or cleaned up
            if head(connection, key) is not None:
                put = connection.retrying(lambda: writer.compare(key, content))
            else:
                state.begin(begin(connection, key, params))
                put = _send(writer, key, content, part_bytes, state)
    except (NetworkError, Expired):
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
    for number in sorted(set(range(1, count + 1)).difference(state.etags)):
        offset = (number - 1) * part_bytes
        state.add(number, send_part(connection, key, upload_id, number, content, offset,
                                    min(part_bytes, content.size - offset)))
        log.debug("upload.part", f"part {number} of {count} of '{connection.url(key)}'", key=key)
    create_only = writer.create_only_multipart
    if not create_only and head(connection, key) is not None:
        return connection.retrying(lambda: writer.compare(key, content))
    try:
        complete(connection, key, upload_id, state.etags, create_only)
    except Refused:
        return connection.retrying(lambda: writer.compare(key, content))
    made = head(connection, key)  # some stores name another ETag in the answer than they keep
    if made is None:
        raise NetworkError(f"'{connection.url(key)}' was completed and is not there", hint="run again")
    return Put(made.etag, made.version, True)


def _good_parts(connection: Connection, key: str, content: Content, part_bytes: int, state: State) -> dict[int, str]:
    """The ETag of each part that the store has as we would send it now; NotFound if it does not know the upload.

    An ETag tells by being the part's MD5, or, where ETags are no MD5, by being the one that the store gave us for it.
    """
    good: dict[int, str] = {}
    try:
        for number, size, etag in _listed(connection, key, str(state.upload_id)):
            offset = (number - 1) * part_bytes
            length = min(part_bytes, content.size - offset)
            if length > 0 and (etag == content.md5(offset, length).hexdigest() or (size, etag) == (length, state.etags.get(number))):
                good[number] = etag
    except NotFound:
        raise
    except Failed as error:
        log.warning("upload.parts", f"the store does not say which parts of '{connection.url(key)}' it has, so all are sent again: {error.msg}")
        return {}
    return good


def _listed(connection: Connection, key: str, upload_id: str) -> Iterator[tuple[int, int, str]]:
    """(number, size, etag) of every part of an upload that has arrived."""
    place: dict[str, int] = {}
    while True:
        page = connection.safely("list_parts", f"list the parts of '{connection.url(key)}'", Key=key, UploadId=upload_id, **place)
        for found in page.get("Parts", ()):
            yield found["PartNumber"], found.get("Size", 0), etag_of(found)
        if not page.get("IsTruncated"):
            return
        place = {"PartNumberMarker": page["NextPartNumberMarker"]}


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


def complete(connection: Connection, key: str, upload_id: str, etags: dict[int, str], create_only: bool) -> None:
    """Make the parts one object, by number; Refused if the name is taken and the store honours If-None-Match here."""
    condition = {"IfNoneMatch": "*"} if create_only else {}
    listed = [{"PartNumber": number, "ETag": f'"{etags[number]}"'} for number in sorted(etags)]
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


def abort_staged(connection: Connection, path: Path) -> None:
    """Give up the upload of which `path` is the state file, if it is one, and of this bucket."""
    try:
        found = json.loads(path.read_bytes())
        bucket, key, upload_id = found["bucket"], found["key"], found["upload_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no upload in parts was begun, or nothing says which: --cleanup finds it in the bucket
    if bucket == connection.s3.bucket:
        abort(connection, key, upload_id)


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
