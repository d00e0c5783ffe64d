"""Is a batch in the bucket what was selected? Counts, digests and keys, taken from what is read back.

Findings are values: every difference is collected before any is reported. Not being able to look is an
exception of its own (NotFound, NetworkError, PermissionDenied). No row is parsed in Python.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from dataclasses import dataclass
from typing import Any, Iterator, Optional

from audit_archiver import lines, log, points
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import keys, members, metadata
from audit_archiver.objectstore.beside import Beside
from audit_archiver.objectstore.client import Store

SAMPLE_SHARE = 0.01
SAMPLE_LEAST, SAMPLE_MOST = 10, 1000
KEY_LIST_BYTES_MOST = 1 << 31
HINT = "nothing of it is deleted; run aa-recover, then select again"


@dataclass(frozen=True)
class Finding:
    """One difference between the batch line and the bucket."""

    path: str
    kind: str
    expected: object
    found: object

    def __str__(self) -> str:
        return f"{self.kind} of '{self.path}' is {self.found}, not {self.expected}"


def read_back(store: Store, line: dict[str, Any]) -> dict[str, Any]:
    """Compare the three objects with the line, byte by byte and key by key; the `verified` section of a batch that is whole.

    Raises Mismatch naming every difference, and NotFound, NetworkError or PermissionDenied if it could not look.
    """
    batch, serialized = line["batch"], line["serialized"]
    beside = Beside(lambda: list(_small_differences(store, line)))
    data = store.again(lambda: Data(store, line))
    points.point("verify.data.read")
    locked, fetched, archived = batch["rows"], serialized["rows"], data.rows
    log.info("verify.counts", f"{batches.name(batch)}: {locked} rows locked, {fetched} fetched, {archived} in S3",
             locked=locked, fetched=fetched, archived=archived, sha256=data.reader.sha256(), key=serialized["stem"])
    _refuse(line, [*data.differences(), *beside.result()])
    return {"at": _now(), "how": "read", "rows": archived, "sha256": data.reader.sha256(),
            "keys_sha256": data.keys_sha256, "sample": [json.loads(b"[" + text + b"]") for text in data.sample]}


def look(store: Store, line: dict[str, Any]) -> dict[str, Any]:
    """Compare sizes and ETags only (REQ-INT-004 as a downgrade); nothing is known of the content, so no sample either."""
    batch, serialized = line["batch"], line["serialized"]
    sizes = (serialized["data"]["gz_bytes"], None, None)
    found = []
    for place, (key, size) in enumerate(zip(batches.keys_of(line), sizes)):
        head = store.head(key)
        if head is None:
            found.append(Finding(store.url(key), "presence", "there", "missing"))
            continue
        if size is not None and head.size != size:
            found.append(Finding(store.url(key), "size", size, head.size))
        found.extend(_identity(store.url(key), line, place, head.etag, head.version))
    if batch["rows"] != serialized["rows"]:
        found.append(Finding(serialized["stem"], "row count", batch["rows"], serialized["rows"]))
    _refuse(line, found)
    return {"at": _now(), "how": "head", "rows": serialized["rows"], "sha256": serialized["data"]["sha256"],
            "keys_sha256": batch["keys_sha256"], "sample": []}


class Data:
    """A batch's data object, read to its end: counts, digests, the keys' digest and a random sample of the keys."""

    def __init__(self, store: Store, line: dict[str, Any]) -> None:
        self._line, self._key = line, batches.keys_of(line)[0]
        self.url = store.url(self._key)
        batch = line["batch"]
        matcher, digest = keys.pattern(batch["key"]), keys.Digest()
        wanted = _sample_places(batch["rows"])
        self.sample: list[bytes] = []
        self.rows = 0
        with store.get(self._key) as body:
            self.etag, self.version = body.etag, body.version
            self.reader = members.Reader(iter(body))
            try:
                for chunk in self.reader:
                    texts = keys.texts(chunk, matcher)
                    digest.update(texts)
                    begun, self.rows = self.rows, self.rows + len(texts)
                    while wanted and wanted[-1] < self.rows:
                        self.sample.append(texts[wanted.pop() - begun])
            except (InputError, Mismatch) as error:
                raise Mismatch(f"'{self.url}' is not what was selected: {error.msg}", hint=HINT) from None
        self.keys_sha256 = digest.hexdigest()

    def differences(self) -> Iterator[Finding]:
        """Where the object is not what the line says."""
        batch, serialized, reader = self._line["batch"], self._line["serialized"], self.reader
        data = serialized["data"]
        for kind, expected, found in (
                ("row count", batch["rows"], self.rows), ("row count", serialized["rows"], self.rows),
                ("packed size", data["gz_bytes"], reader.gz_bytes), ("packed SHA-256", data["gz_sha256"], reader.gz_sha256()),
                ("size", data["bytes"], reader.bytes), ("SHA-256", data["sha256"], reader.sha256()),
                ("digest of the keys", batch["keys_sha256"], self.keys_sha256)):
            if expected != found:
                yield Finding(self.url, kind, expected, found)
        yield from _identity(self.url, self._line, 0, self.etag, self.version)


def _small_differences(store: Store, line: dict[str, Any]) -> Iterator[Finding]:
    """Where metadata and key list are not what the line says."""
    batch, serialized = line["batch"], line["serialized"]
    _, metadata_key, keys_key = batches.keys_of(line)
    for place, key, sha256, check in ((1, metadata_key, serialized["metadata_sha256"], metadata_differences),
                                      (2, keys_key, serialized["manifest_sha256"], key_list_differences)):
        content, body = store.read(key, KEY_LIST_BYTES_MOST)
        url = store.url(key)
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            yield Finding(url, "SHA-256", sha256, found)
        else:
            yield from check(url, batch, serialized, content)
        yield from _identity(url, line, place, body.etag, body.version)


def metadata_differences(url: str, batch: dict[str, Any], serialized: dict[str, Any], content: bytes) -> Iterator[Finding]:
    """The metadata must be able to rebuild this very line, for recovery without staging."""
    value = lines.parse(content, f"'{url}'")
    made = metadata.rebuild(value, serialized["stem"], serialized["metadata_sha256"], serialized["manifest_sha256"])
    for section, ours in (("batch", batch), ("serialized", {k: v for k, v in serialized.items() if k != "dir"})):
        for name in ours:
            if made[section].get(name) != ours[name]:
                yield Finding(url, f"'{section}.{name}'", "that of the line", "another")


def key_list_differences(url: str, batch: dict[str, Any], serialized: dict[str, Any], content: bytes) -> Iterator[Finding]:
    header, texts = metadata.parse_key_list(content, f"'{url}'")
    digest = keys.Digest()
    digest.update(texts)
    for kind, expected, found in (
            ("batch", f"sha256:{batch['id']}", header["batch_id"]), ("key count", batch["rows"], len(texts)),
            ("digest of the keys", batch["keys_sha256"], digest.hexdigest()),
            ("key columns", batch["key"], header["key"]), ("transaction", batch["txn"], header["txn"]),
            ("server", batch["server"], header["server"])):
        if expected != found:
            yield Finding(url, kind, expected, found)


def _identity(url: str, line: dict[str, Any], place: int, etag: str, version: Optional[str]) -> Iterator[Finding]:
    """An object that is not the one uploaded, though it bears its name (T23)."""
    uploaded = line["uploaded"]
    if etag != uploaded["etags"][place]:
        yield Finding(url, "ETag", uploaded["etags"][place], etag)
    if version != uploaded["versions"][place]:
        yield Finding(url, "version", uploaded["versions"][place], version)


def _refuse(line: dict[str, Any], found: list[Finding]) -> None:
    if found:
        raise Mismatch(f"{batches.name(line['batch'])} is not in the bucket as it was selected: {found[0]}",
                       detail="; ".join(map(str, found[1:])) or None,
                       hint=HINT)


def _sample_places(rows: int) -> list[int]:
    """The row numbers of a random sample, the last first: 1 %, at least 10, at most 1,000 (REQ-VER-017)."""
    size = min(rows, SAMPLE_MOST, max(SAMPLE_LEAST, round(rows * SAMPLE_SHARE)))
    return sorted(random.sample(range(rows), size), reverse=True)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
