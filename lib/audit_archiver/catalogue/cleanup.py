"""What may be removed for good: objects of abandoned batches, and uploads that nobody will complete.

Only a batch with recovery's evidence beside it, an hour old at least, whose rows were all accounted for when it was
abandoned. The evidence stays. Called under K1 (postgres.md S10).
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Optional, Sequence

from audit_archiver import lines, log
from audit_archiver.catalogue import leftovers
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store

ABANDONED_FOR = datetime.timedelta(hours=1)

_OBJECTS = (names.DATA, names.METADATA, names.KEYS)


@dataclass
class Cleaned:
    """What was removed: object keys, and the keys of uploads that were given up. `kept`: abandoned batches that stay."""

    objects: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def clean(store: Store, database: str, tables: Optional[Sequence[tuple[str, str]]], *, upload_hours: float, dry_run: bool) -> Cleaned:
    """Remove what may go below a database's prefix, or below those of `tables`; with `dry_run` only name it.

    An upload in parts that was begun `upload_hours` ago and is not completed is given up (REQ-NET-006).
    """
    done, now = Cleaned(), datetime.datetime.now(datetime.timezone.utc)
    places = leftovers.table_dirs(store, database) if tables is None else [
        names.table_dir(store.prefix, database, *table) for table in tables]
    for place in places:
        for batch in leftovers.batches_since(store, place):
            if batch.abandoned and not batch.recorded and batch.suffixes.intersection(_OBJECTS):
                _clean_batch(store, batch, now, done, dry_run)
        for key, upload_id, begun in store.unfinished_uploads(place):
            if now - begun >= datetime.timedelta(hours=upload_hours):
                done.uploads.append(key)
                if not dry_run:
                    store.abort_upload(key, upload_id)
    return done


def _clean_batch(store: Store, batch: leftovers.Leftover, now: datetime.datetime, done: Cleaned, dry_run: bool) -> None:
    key = batch.stem + names.ABANDONED
    said = lines.parse(store.get_bytes(key), f"'{store.url(key)}'")
    schema.validate("abandoned", said, f"'{store.url(key)}'")
    if not _may_go(said):
        log.warning("cleanup.kept", f"'{batch.name}' was abandoned while rows of it were in neither place; its objects stay", key=batch.stem)
        done.kept.append(batch.stem)
    elif now - _time(said["at"]) >= ABANDONED_FOR:
        for suffix in _OBJECTS:
            if suffix in batch.suffixes:
                done.objects.append(batch.stem + suffix)
                if not dry_run:
                    store.delete(batch.stem + suffix)


def _may_go(said: dict[str, Any]) -> bool:
    """True if every row of the batch was in the table, or known to be elsewhere, when it was abandoned."""
    found = said["evidence"]
    return found["present"] + found.get("accounted", 0) >= found["keys"]


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=datetime.timezone.utc)
