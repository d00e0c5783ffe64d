"""The table manifest: what is archived of a table, read out of index segments and commit records.

Per run and table create-only segments of up to 1,000 batches are written; nothing is ever rewritten, so the
millionth batch costs what the first did. The commit record is the truth: a batch whose segment was never
written (a killed run) is found by its commit record. Watermark and history are read out of the same entries.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Iterable, Iterator, Optional

from audit_archiver import lines, log
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NameTaken

SEGMENT_BATCHES = 1000

Entry = dict[str, Any]
_YEAR = re.compile(r"(\d+)-(.*?)( BC)?$")


def entry(line: dict[str, Any]) -> Entry:
    """What the index keeps of a committed batch line."""
    batch, serialized = line["batch"], line["serialized"]
    data, rows = serialized["data"], line.get("deleted", batch)["rows"]  # fewer than in the object on SUBSET
    return {"id": batch["id"], "number": batch["number"], "stem": serialized["stem"], "rows": rows,
            "first": batch["first"], "last": batch["last"], "bytes": data["bytes"], "gz_bytes": data["gz_bytes"],
            "sha256": data["sha256"], "committed_at": line["committed"]["at"]}


class Segments:
    """Collects recorded batches by run and table and writes them as index segments, when full and at `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[tuple[str, str, str, str], list[Entry]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """One more recorded batch; a segment that is full with it is written."""
        batch = line["batch"]
        table = (batch["run"], batch["database"], batch["schema"], batch["table"])
        found = self._open.setdefault(table, [])
        found.append(entry(line))
        if len(found) == SEGMENT_BATCHES:
            write(self._store, *table, self._open.pop(table))

    def close(self) -> int:
        """Write what is left; the number of segments written."""
        for table, found in self._open.items():
            write(self._store, *table, found)
        count = len(self._open)
        self._open.clear()
        return count


def write(store: Store, run: str, database: str, schema_name: str, table: str, entries: list[Entry]) -> str:
    """Write one segment under the next free number and return its key.

    A number that is taken by a concurrent or an earlier recorder of the same run is left to it (REQ-IDEM-008);
    one that holds these very batches is ours already.
    """
    number = 1
    while True:
        key = names.index_key(store.prefix, database, schema_name, table, run, number)
        value = {"format": "aa-index", "version": 1, "run": run, "database": database, "schema": schema_name,
                 "table": table, "segment": number, "batches": entries}
        try:
            store.put_record(key, lines.dump(value))
        except NameTaken:
            number += 1
            continue
        log.info("index.written", f"{len(entries)} batches of {schema_name}.{table} in '{store.url(key)}'", key=key,
                 batches=len(entries))
        return key


def read_segment(store: Store, key: str) -> list[Entry]:
    """The entries of one segment. Raises InputError if it is none, or not the one its name says."""
    return list(_segment(store, key)["batches"])


def segments(store: Store, database: str, schema_name: str, table: str, lenient: bool = False) -> Iterator[tuple[str, Entry]]:
    """(run, entry) of every batch that the segments of a table name; `lenient` passes over a segment that is none."""
    for found in store.list(names.index_dir(store.prefix, database, schema_name, table)):
        try:
            value = _segment(store, found.key)
        except (InputError, Mismatch):
            if not lenient:
                raise
            continue
        for each in value["batches"]:
            yield value["run"], each


def _segment(store: Store, key: str) -> dict[str, Any]:
    what = f"'{store.url(key)}'"
    value = lines.parse(store.get_bytes(key), what)
    schema.validate("index", value, what)
    named = names.index_key(store.prefix, value["database"], value["schema"], value["table"], value["run"], value["segment"])
    if named != key:
        raise InputError(f"{what} holds the index of another table or run")
    return dict(value)


def read_commit(store: Store, stem: str) -> dict[str, Any]:
    """The batch line in a commit record. Raises NotFound, and InputError if it is another batch's."""
    key = stem + names.COMMIT
    line = batches.parse(store.get_bytes(key), needs=("committed",))
    if line["serialized"]["stem"] != stem:
        raise InputError(f"'{store.url(key)}' is the commit record of another batch")
    return line


def manifest(store: Store, database: str, schema_name: str, table: str) -> Iterator[Entry]:
    """Every archived batch of a table, once: the union of its segments and of the commit records without one, less what was rolled back.

    Lists the table's objects once and reads a segment per 1,000 batches (REQ-S3-019, REQ-IDEM-004 as ruled).
    """
    listed = [found.key for found in store.list(names.table_dir(store.prefix, database, schema_name, table))
              if found.key.endswith((names.COMMIT, names.ROLLED_BACK))]
    back = {key[:-len(names.ROLLED_BACK)] for key in listed if key.endswith(names.ROLLED_BACK)}
    seen: dict[str, str] = {}
    for found in store.list(names.index_dir(store.prefix, database, schema_name, table)):
        for each in read_segment(store, found.key):
            known = seen.get(each["stem"])
            if known is None:
                seen[each["stem"]] = each["id"]
                if each["stem"] not in back:
                    yield each
            elif known != each["id"]:
                raise Mismatch(f"the index of {schema_name}.{table} names two batches '{each['stem']}'")
    for key in listed:
        stem = key[:-len(names.COMMIT)]
        if key.endswith(names.COMMIT) and stem not in seen and stem not in back:
            yield entry(read_commit(store, stem))


def watermark(entries: Iterable[Entry]) -> Optional[dict[str, Any]]:
    """How far a table is archived: greatest timestamp and key, rows and batches, with a checksum; None if nothing is.

    A hint and a report (REQ-ARC-018..022 as ruled): eligibility is swept from the oldest row in every run.
    """
    last: Optional[list[Any]] = None
    rows = count = 0
    for each in entries:
        rows, count = rows + each["rows"], count + 1
        if last is None or time_order(each["last"][0]) > time_order(last[0]):
            last = each["last"]
    if last is None:
        return None
    value = {"timestamp": last[0], "key": last[1:], "rows": rows, "batches": count}
    return {**value, "sha256": _checksum(value)}


def check_watermark(value: dict[str, Any]) -> dict[str, Any]:
    """`value` if it is the watermark it was made as; Mismatch otherwise (REQ-ARC-023)."""
    if _checksum({name: part for name, part in value.items() if name != "sha256"}) != value.get("sha256"):
        raise Mismatch("the watermark's checksum is wrong", hint="read it out of the bucket again")
    return value


def time_order(timestamp: str) -> tuple[int, str]:
    """A key that sorts the server's timestamps (same zone) by time, also with five-digit years and BC."""
    found = _YEAR.match(timestamp)
    if found is None:
        return (0, timestamp)
    year = int(found.group(1))
    return (-year if found.group(3) else year, found.group(2))


def _checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
