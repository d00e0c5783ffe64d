"""The staging directory after an interrupted run: what nobody will send any more is forgotten.

Staging is never the truth. A directory goes when its batch is recorded or abandoned, when the run that held its rows
locked is dead (K1 and K2 have proven it), or when a batch that was exported by hand is older than a day. In the fallback
directory lie batches that wait to be sent by a person: they stay for as long as is configured, or until their run has ended
and they can be sent no more. What of an upload in parts such a directory had begun is given up with it.
"""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any, Collection, Iterator, Optional

from audit_archiver import log
from audit_archiver.catalogue.record import HELD, remove_staging
from audit_archiver.exits import InputError
from audit_archiver.formats import batch as batches
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.multipart import STATE

PATIENCE = datetime.timedelta(hours=24)
BATCH_FILE = "batch.json"


def directories(root: Path, database: str) -> Iterator[Path]:
    """The batch directories of a database: ROOT/database/schema.table/stamp_batch_NNN."""
    yield from sorted(path for path in (root / names.percent(database)).glob("*.*/*_batch_*")
                      if path.is_dir() and not path.is_symlink())


def line_in(directory: Path) -> Optional[dict[str, Any]]:
    """The batch line that a directory was staged or made for; None if its making was cut off."""
    for name in (BATCH_FILE, HELD):
        try:
            return batches.parse((directory / name).read_bytes(), needs=("serialized",))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except InputError as error:
            log.warning("recover.staging", f"'{directory / name}' is no batch line: {error.msg}")
    return None


def sweep(store: Store, root: Path, database: str, now: str, *, tables: Optional[Collection[tuple[str, str]]], run: Optional[str],
          dead: Optional[str] = None, kept_days: Optional[float] = None, dry_run: bool = False) -> list[str]:
    """Remove the directories that are of no use any more; returns them.

    `run` is the caller's own, which may need its, unless it is `dead`: nobody of it is at work. `kept_days`: `root` is the fallback
    directory, whose batches are kept for so long.
    """
    forgotten = []
    for directory in directories(root, database):
        line = line_in(directory)
        if tables is not None and (line is None or (line["batch"]["schema"], line["batch"]["table"]) not in tables):
            continue
        why = _broken(directory) if line is None else _why(store, line, now, run, dead, kept_days)
        if why is None:
            continue
        log.info("recover.staging", f"'{directory}' {'would be' if dry_run else 'is'} removed: {why}")
        if not dry_run:
            store.abort_staged(directory / STATE)
            if line is None:
                shutil.rmtree(directory, ignore_errors=True)
            else:
                remove_staging(line, str(directory))
        forgotten.append(str(directory))
    return forgotten


def _why(store: Store, line: dict[str, Any], now: str, run: Optional[str], dead: Optional[str],
         kept_days: Optional[float]) -> Optional[str]:
    """Why the directory of `line` is of no use, or None."""
    batch, stem = line["batch"], line["serialized"]["stem"]
    for suffix, word in ((names.COMMIT, "recorded"), (names.ABANDONED, "abandoned")):
        if store.head(stem + suffix) is not None:
            return f"its batch is {word}"
    if any(store.head(key) is not None for key in batches.keys_of(line)) or batch["run"] == run != dead:
        return None
    if kept_days is not None:
        if store.head(names.run_end_key(store.prefix, batch["database"], batch["run"])) is not None:
            return "its batch was never sent, and its run has ended: its rows are selected anew"
        long_ago = _time(now) - _time(batch["archived_at"]) >= datetime.timedelta(days=kept_days)
        return f"its batch was not sent for {kept_days:g} days, and its rows are in the table" if long_ago else None
    if batch["txn"] is not None or batch["run"] == dead:
        return "its batch never reached the bucket, and the run that had its rows locked is dead"
    old = _time(now) - _time(batch["archived_at"]) >= PATIENCE
    return "its batch was exported by hand more than a day ago and never sent" if old else None


def _broken(directory: Path) -> Optional[str]:
    """A directory without a batch line: somebody may be writing it, unless nothing in it changed for a day."""
    try:
        newest = max(entry.stat().st_mtime for entry in (directory, *directory.iterdir()))
    except FileNotFoundError:
        return None  # somebody is at work in it
    old = datetime.datetime.now().timestamp() - newest >= PATIENCE.total_seconds()
    return "it was left unfinished more than a day ago" if old else None


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
