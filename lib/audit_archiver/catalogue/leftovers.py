"""What interrupted runs left in the bucket: batches without a commit record, and what can be read about them."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import re
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional
from urllib.parse import unquote

from audit_archiver import lines
from audit_archiver.catalogue import owner
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import metadata, names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound

NO_TABLES = (".runs/", ".rollbacks/", ".holds/")
METADATA_BYTES_MOST = 64 << 20

OBJECT = re.compile(r"(.*_batch_\d+)(\.jsonl\.gz|_(?:metadata|manifest|commit|abandoned|rolled_back|intent_\d+)\.json)")


@dataclass
class Leftover:
    """The objects of one batch: its stem, their suffixes, and when the youngest was written (the store's clock)."""

    stem: str
    suffixes: set[str] = field(default_factory=set)
    modified: Optional[datetime.datetime] = None

    @property
    def name(self) -> str:
        """What messages and --decide call it: the last part of its stem."""
        return self.stem.rpartition("/")[2]

    @property
    def day(self) -> str:
        """The day that its key bears: 2025-12-29."""
        found = re.search(r"/year=(\d+)/month=(\d+)/day=(\d+)/[^/]*$", self.stem)
        return "-".join(found.groups()) if found else "an unknown day"

    @property
    def begun(self) -> str:
        """When its rows were selected, by the server's clock, as its name says: 20251230T021547Z."""
        return self.stem.rpartition("_batch_")[0].rpartition("_")[2]

    @property
    def recorded(self) -> bool:
        """True if it was archived: its rows were deleted, and it needs no recovery."""
        return names.COMMIT in self.suffixes

    @property
    def rolled_back(self) -> bool:
        """True if it was archived and its rows are back in the table."""
        return names.ROLLED_BACK in self.suffixes

    @property
    def abandoned(self) -> bool:
        """True if recovery declared it not archived."""
        return names.ABANDONED in self.suffixes


def table_dirs(store: Store, database: str) -> list[str]:
    """The key prefixes of every table that was ever archived, also of tables no longer configured."""
    root = names.database_dir(store.prefix, database)
    return [found for found in store.directories(root) if found[len(root):] not in NO_TABLES]


def table_of(store: Store, table_dir: str) -> tuple[str, str]:
    """(schema, table) of a table's key prefix; of a shortened one its owner says them.

    Raises Mismatch if nothing says them: a held batch must block the right table.
    """
    if names.is_shortened(table_dir.rstrip("/").rpartition("/")[2]):
        found = owner.read(store, table_dir)
        if found is None or names.table_dir(store.prefix, found["database"], found["schema"], found["table"]) != table_dir:
            raise Mismatch(f"'{store.url(table_dir)}' has a shortened name, and nothing says whose it is",
                           hint=f"restore '{store.url(table_dir + owner.OWNER)}', or move what lies there elsewhere")
        return found["schema"], found["table"]
    parts = [unquote(part) for part in table_dir.rstrip("/").rpartition("/")[2].split(".")]
    return (parts[0], parts[1]) if len(parts) == 2 else ("public", parts[0])


def batches_since(store: Store, table_dir: str, day: Optional[datetime.date] = None) -> Iterator[Leftover]:
    """Every batch below a table's prefix, settled or not, from `day` on; a day at a time in memory."""
    after = f"{table_dir}year={day:%Y}/month={day:%m}/day={day:%d}/" if day is not None else None
    listed = (entry for entry in store.list(table_dir, after) if entry.key.startswith(f"{table_dir}year="))
    for _, entries in itertools.groupby(listed, key=lambda entry: entry.key.rpartition("/")[0]):
        found: dict[str, Leftover] = {}
        for entry in entries:
            match = OBJECT.fullmatch(entry.key)
            if match is None:
                continue
            batch = found.setdefault(match.group(1), Leftover(match.group(1)))
            batch.suffixes.add(match.group(2))
            batch.modified = max(filter(None, (batch.modified, entry.modified)))
        yield from found.values()


def rebuilt(store: Store, leftover: Leftover) -> Optional[dict[str, Any]]:
    """The batch line up to `serialized`, out of the batch's metadata in the bucket; None if there are none.

    Raises InputError or Mismatch if they are not what aa-serialize wrote.
    """
    key = leftover.stem + names.METADATA
    try:
        content = store.get_bytes(key, METADATA_BYTES_MOST)
    except NotFound:
        return None
    value = lines.parse(content, f"'{store.url(key)}'")
    line = metadata.rebuild(value, leftover.stem, hashlib.sha256(content).hexdigest(), _sha256(store, leftover.stem + names.KEYS))
    batch = line["batch"]
    ours = names.stem(store.prefix, batch["database"], batch["schema"], batch["table"], batch["archived_at"], batch["number"])
    if ours != leftover.stem:
        raise Mismatch(f"'{store.url(key)}' are the metadata of another batch")
    return line


def intents(store: Store, stem: str) -> list[dict[str, Any]]:
    """The intents of guarded deletes of a batch, in order. Asked one by one: a listing's silence proves nothing."""
    found: list[dict[str, Any]] = []
    while True:
        key = stem + names.intent(len(found) + 1)
        try:
            content = store.get_bytes(key)
        except NotFound:
            return found
        what = f"'{store.url(key)}'"
        value = lines.parse(content, what)
        schema.validate("intent", value, what)
        if value["n"] != len(found) + 1:
            raise InputError(f"{what} is another intent than its name says")
        found.append(value)


def uploaded(store: Store, line: dict[str, Any]) -> Optional[dict[str, Any]]:
    """The `uploaded` section of a batch as its three objects lie in the bucket now; None if one is missing."""
    heads = [head for head in map(store.head, batches.keys_of(line)) if head is not None]
    if len(heads) < 3:
        return None
    return {"bucket": store.bucket, "etags": [head.etag for head in heads], "versions": [head.version for head in heads],
            "create_only": store.probe().create_only}


def _sha256(store: Store, key: str) -> str:
    """The digest of the key list as it lies there; that it holds the batch's keys is checked by their own digest."""
    try:
        return hashlib.sha256(store.get_bytes(key, 1 << 31)).hexdigest()
    except NotFound:
        return hashlib.sha256(b"").hexdigest()
