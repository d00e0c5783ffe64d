"""One archived batch against its commit record: record, sizes, ETags and metadata; read back also key list and data.

Findings are values, and a damaged object does not hide the next. Not being able to look is an exception. No row is
parsed in Python, and no more of an object than a chunk is in memory, but for the key list.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping, Optional

from audit_archiver import lines
from audit_archiver.catalogue import index, readback
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import metadata, names
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.objectstore.listing import Entry
from audit_archiver.validate.findings import FAIL, WARN, Finding, Where

KINDS = {names.DATA: "data", names.METADATA: "metadata", names.KEYS: "keys"}
"""The three objects of a batch in the order of `uploaded.etags`, and how their findings begin."""

_DATA = {"row count": "data.rows", "digest of the keys": "data.keys", "packed size": "data.size"}


@dataclass
class Looked:
    """What became of a look at one batch. `keys` are the texts of the archived keys, `sample` some of them, if they were read;
    those of rows that the delete left out are not among them."""

    batch: Batch
    where: Where
    line: Optional[dict[str, Any]] = None
    findings: list[Finding] = field(default_factory=list)
    objects: int = 0
    bytes: int = 0
    rows: int = 0
    keys: Optional[list[bytes]] = None
    sample: list[bytes] = field(default_factory=list)


def look(store: Store, batch: Batch, there: Mapping[str, Entry], *, read: bool) -> Looked:
    """Look at a batch whose objects are `there` in the listing; `read` its key list and data to their ends."""
    found = Looked(batch, Where(batch.database, batch.schema, batch.table, batch.stem.rpartition("/")[2]))
    _Look(store, found, there).run(read)
    return found


class _Look:
    """The steps; each adds to `looked`."""

    def __init__(self, store: Store, looked: Looked, there: Mapping[str, Entry]) -> None:
        self._store, self._looked, self._there = store, looked, there
        self._stem = looked.batch.stem
        self._same: dict[str, bool] = {}  # by suffix: whether the bytes are those that were verified, where they were read

    def run(self, read: bool) -> None:
        line = self._looked.line = self._record()
        for suffix, kind in KINDS.items():
            if suffix not in self._there:
                self._say(f"{kind}.missing", suffix, "there is no such object", "there", "missing")
        if line is None:
            return
        if names.ABANDONED in self._there:
            self._say("record.abandoned", names.ABANDONED, "recovery declared the batch not archived, and it has a commit record")
        if (entry := self._there.get(names.DATA)) is not None and entry.size != line["serialized"]["data"]["gz_bytes"]:
            self._say("data.size", names.DATA, "it is empty" if not entry.size else "it has another size",
                      line["serialized"]["data"]["gz_bytes"], entry.size)
        steps = [(names.METADATA, self._metadata)] + ([(names.KEYS, self._keys), (names.DATA, self._data)] if read else [])
        for suffix, step in steps:
            if suffix in self._there:
                try:
                    step(line)
                except NotFound:
                    self._say(f"{KINDS[suffix]}.missing", suffix, "it is listed, and there is no such object", "there", "missing")
                except Mismatch as error:  # it is larger than anything that was ever written
                    self._say(f"{KINDS[suffix]}.{'damaged' if suffix == names.DATA else 'invalid'}", suffix, error.msg)
        self._replaced(line)

    def _record(self) -> Optional[dict[str, Any]]:
        """The commit record, if it is one, of this batch and place, and as the index has it."""
        batch = self._looked.batch
        self._looked.objects += 1
        try:
            line = index.read_commit(self._store, self._stem)
        except (InputError, Mismatch) as error:
            self._say("record.invalid", names.COMMIT, error.msg)
            return None
        made = line["batch"]
        ours = names.stem(self._store.prefix, made["database"], made["schema"], made["table"], made["archived_at"], made["number"])
        if ours != self._stem or (made["database"], made["schema"], made["table"]) != (batch.database, batch.schema, batch.table):
            self._say("record.invalid", names.COMMIT, "it is the record of a batch of another place", self._stem, ours)
            return None
        entry = index.entry(line)
        for name, said in (("id", batch.id), ("run", batch.run), ("number", batch.number), ("rows", batch.rows), ("first", batch.first),
                           ("last", batch.last), ("bytes", batch.bytes), ("gz_bytes", batch.gz_bytes), ("committed_at", batch.committed_at)):
            true = made["run"] if name == "run" else entry[name]
            if said is not None and said != true:
                self._say("index.differs", names.COMMIT, f"the index says another '{name}' than the commit record",
                          *(() if name in ("first", "last") else (true, said)))
        return line

    def _metadata(self, line: dict[str, Any]) -> None:
        content = self._whole(names.METADATA, line["serialized"]["metadata_sha256"])
        url = self._url(names.METADATA)
        try:
            differences = list(readback.metadata_differences(url, line["batch"], line["serialized"], content))
            columns = [[each["name"], each["type"]] for each in lines.parse(content, f"'{url}'")["schema"]["columns"]]
        except InputError as error:
            self._say("metadata.invalid", names.METADATA, error.msg)
            return
        for each in differences:
            self._say("metadata.invalid", names.METADATA, f"{each.kind} is not that of the commit record")
        if columns != line["batch"]["columns"]:
            self._say("metadata.columns", names.METADATA, "they describe other columns than the batch has",
                      _columns(line["batch"]["columns"]), _columns(columns))

    def _keys(self, line: dict[str, Any]) -> None:
        content = self._whole(names.KEYS, line["serialized"]["manifest_sha256"])
        url = self._url(names.KEYS)
        try:
            differences = list(readback.key_list_differences(url, line["batch"], line["serialized"], content))
            texts = metadata.parse_key_list(content, f"'{url}'")[1]
        except InputError as error:
            self._say("keys.invalid", names.KEYS, error.msg)
            return
        for each in differences:
            self._say("keys.invalid", names.KEYS, f"its {each.kind} is not that of the commit record", each.expected, each.found)
        if not differences:
            gone = set(line.get("deleted", {}).get("left_out", ()))
            self._looked.keys = [text for place, text in enumerate(texts) if place not in gone] if gone else texts

    def _data(self, line: dict[str, Any]) -> None:
        try:
            data = self._store.again(lambda: readback.Data(self._store, line))
        except Mismatch as error:
            self._same[names.DATA] = False
            self._looked.objects += 1
            self._say("data.damaged", names.DATA, error.msg)
            return
        self._count(data.reader.gz_bytes)
        self._looked.rows += data.rows
        told: set[str] = set()
        for each in data.differences():
            if each.kind in ("ETag", "version"):
                continue  # _replaced says it, by the listing
            check = _DATA.get(each.kind, "data.sha256")
            if (check, each.kind) not in told and not (check == "data.size" and self._size_told()):
                self._say(check, names.DATA, f"its {each.kind} is another", each.expected, each.found)
            told.add((check, each.kind))
        self._same[names.DATA] = not told
        if not told and not line.get("deleted", {}).get("left_out"):
            self._looked.sample = data.sample

    def _replaced(self, line: dict[str, Any]) -> None:
        """Another object under the same name, unless its bytes were read and were said to be others already."""
        for (suffix, kind), etag in zip(KINDS.items(), line["uploaded"]["etags"]):
            entry, same = self._there.get(suffix), self._same.get(suffix)
            if entry is None or not entry.etag or entry.etag == etag or same is False:
                continue
            self._say(f"{kind}.replaced", suffix, "it was written anew, with the same bytes" if same else "it is not the object that was verified",
                      etag, entry.etag, status=WARN if same else FAIL)

    def _whole(self, suffix: str, sha256: str) -> bytes:
        """A small object's bytes; that they are others is said."""
        content, _ = self._store.read(self._stem + suffix, readback.KEY_LIST_BYTES_MOST)
        self._count(len(content))
        found = hashlib.sha256(content).hexdigest()
        self._same[suffix] = found == sha256
        if found != sha256:
            self._say(f"{KINDS[suffix]}.sha256", suffix, "it is empty" if not content else "its bytes are others", sha256, found)
        return content

    def _size_told(self) -> bool:
        return any(each.check == "data.size" for each in self._looked.findings)

    def _count(self, size: int) -> None:
        self._looked.objects += 1
        self._looked.bytes += size

    def _url(self, suffix: str) -> str:
        return self._store.url(self._stem + suffix)

    def _say(self, check: str, suffix: str, text: str, expected: Any = None, found: Any = None, status: Optional[str] = None) -> None:
        name = (self._stem + suffix).rpartition("/")[2]
        self._looked.findings.append(Finding(check, self._looked.where, text if name in text else f"'{name}': {text}",
                                             object=self._url(suffix), expected=expected, found=found, status=status))


def _columns(columns: list[list[str]]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns)


def columns_of(line: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """A batch's columns, to be compared with another's."""
    return tuple((name, kind) for name, kind in line["batch"]["columns"])


def changes(before: tuple[tuple[str, str], ...], after: tuple[tuple[str, str], ...]) -> Iterator[str]:
    """How the columns of one batch differ from those of another, in words."""
    was, now = dict(before), dict(after)
    yield from (f"'{name}' is new" for name in now if name not in was)
    yield from (f"'{name}' is gone" for name in was if name not in now)
    yield from (f"'{name}' was {was[name]} and is {now[name]}" for name in now if name in was and was[name] != now[name])
    if not was.items() ^ now.items() and before != after:
        yield "their order is another"
