"""Names of objects, directories and runs; contracts.md 5 and man 5 aa-batch show them.

An object key is never taken apart to learn a time or an order: batch 1000 sorts before batch 999 (T9).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any, Mapping

DATA = ".jsonl.gz"
METADATA = "_metadata.json"
KEYS = "_manifest.json"
COMMIT = "_commit.json"
ABANDONED = "_abandoned.json"
ROLLED_BACK = "_rolled_back.json"
SUFFIXES = (DATA, METADATA, KEYS, COMMIT, ABANDONED, ROLLED_BACK)

NAME_BYTES = 255  # of a directory or file in staging, and of a part of a key in a store on a file system
KEY_BYTES = 1024  # of a whole object key: S3's limit
TABLE_BYTES = 210  # of a table's name in a directory; what fitted before names were shortened is still written in full
BELOW_DATABASE_BYTES = TABLE_BYTES + len("/year=2025/month=12/day=30/") + NAME_BYTES
"""The most that a key has after its database's directory."""

_LONGEST_ENDING = len(f"{KEYS}.tmp")  # while it is written into staging; no shorter than _abandoned.json, _intent_9999.json
_CUT = ".sha256."
_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


def percent(name: str) -> str:
    """`name` with every byte outside A-Z a-z 0-9 _ - as %XX, so that '.' and '/' only ever separate names (S12)."""
    return "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in name.encode())


def normal_prefix(prefix: str) -> str:
    """A key prefix without leading or doubled slashes and with one at its end, or "" (T27)."""
    parts = [part for part in prefix.split("/") if part]
    return "/".join(parts) + "/" if parts else ""


def intent(n: int) -> str:
    """The suffix of the n-th intent of a guarded delete."""
    return f"_intent_{n}.json"


def database_dir(prefix: str, database: str) -> str:
    """The key prefix of everything about a database."""
    return f"{prefix}{percent(database)}/"


def table_name(schema: str, table: str) -> str:
    """The table's part of an object key: `table`, or `schema.table` outside public; shortened where it is too long."""
    return shortened(_full_name(schema, table), TABLE_BYTES)


def shortened(name: str, most: int) -> str:
    """`name`, or where it has more than `most` characters its beginning, '.sha256.' and the digest of all of it.

    No name of a table has two dots, so none is ever taken for a shortened one; who needs the schema and the table back
    reads them in `_owner.json` or in the metadata.
    """
    if len(name) <= most:
        return name
    ending = _CUT + hashlib.sha256(name.encode()).hexdigest()
    return re.sub("%.?$", "", name[:most - len(ending)]) + ending


def is_shortened(name: str) -> bool:
    """True if a table's part of a key does not lead back to its schema and name."""
    return _CUT in name


def _full_name(schema: str, table: str) -> str:
    return percent(table) if schema == "public" else f"{percent(schema)}.{percent(table)}"


def table_dir(prefix: str, database: str, schema: str, table: str) -> str:
    """The key prefix of everything about a table."""
    return f"{database_dir(prefix, database)}{table_name(schema, table)}/"


def stem(prefix: str, database: str, schema: str, table: str, archived_at: str, number: int) -> str:
    """The key of a batch's objects without their suffix; the day is the day of archiving (REQ-S3-007..011).

    `archived_at` is RFC 3339 UTC in whole seconds, as the server made it.
    """
    year, month, date = archived_at[:10].split("-")
    ending = f"_{stamp(archived_at)}_batch_{number:03d}"
    name = shortened(_full_name(schema, table), NAME_BYTES - len(ending) - _LONGEST_ENDING)
    return f"{table_dir(prefix, database, schema, table)}year={year}/month={month}/day={date}/{name}{ending}"


def stamp(archived_at: str) -> str:
    """2025-12-30T02:15:47Z as 20251230T021547Z."""
    return re.sub("[-:]", "", archived_at)


def run_start_key(prefix: str, database: str, run: str) -> str:
    """The key that says a run began to write here."""
    return f"{database_dir(prefix, database)}.runs/{run}-start.json"


def run_end_key(prefix: str, database: str, run: str) -> str:
    """The key that says every batch of a run is recorded or abandoned."""
    return f"{database_dir(prefix, database)}.runs/{run}-end.json"


def rollbacks_dir(prefix: str, database: str) -> str:
    """The key prefix of the records that rollbacks of a database began and ended."""
    return f"{database_dir(prefix, database)}.rollbacks/"


def rollback_key(prefix: str, database: str, rollback: str, event: str) -> str:
    """The key of the record that a rollback of a table began ("start") or ended ("end")."""
    return f"{rollbacks_dir(prefix, database)}{rollback}-{event}.json"


def holds_dir(prefix: str, database: str) -> str:
    """The key prefix of the records of what is held of a database."""
    return f"{database_dir(prefix, database)}.holds/"


def hold_key(prefix: str, database: str, until: str, restore: str) -> str:
    """The key of a hold: the one that ends first stands first. `until` is RFC 3339 UTC."""
    return f"{holds_dir(prefix, database)}{stamp(until[:19])}Z-{restore}.json"


def index_dir(prefix: str, database: str, schema: str, table: str) -> str:
    """The key prefix of a table's index segments."""
    return f"{table_dir(prefix, database, schema, table)}.index/"


def index_key(prefix: str, database: str, schema: str, table: str, run: str, segment: int) -> str:
    """The key of one index segment; segments count from 1 in a run."""
    return f"{index_dir(prefix, database, schema, table)}{run}_{segment:03d}.json"


def watermark_key(prefix: str, database: str, schema: str, table: str) -> str:
    """The key of what was restored of a table, and into which."""
    return f"{table_dir(prefix, database, schema, table)}.restore_watermark.json"


def restore_key(prefix: str, database: str, schema: str, table: str, restore: str, event: str) -> str:
    """The key of the record that a restore of a table began ("start") or ended ("end")."""
    return f"{table_dir(prefix, database, schema, table)}.restores/{restore}-{event}.json"


def staging_dir(root: str, batch: Mapping[str, Any]) -> str:
    """The staging directory of a batch section: one directory is one batch, `rm -r` forgets it."""
    return os.path.join(staging_table_dir(root, batch["database"], batch["schema"], batch["table"]),
                        f"{stamp(batch['archived_at'])}_batch_{batch['number']:03d}")


def staging_table_dir(root: str, database: str, schema: str, table: str) -> str:
    """The directory of a table's batches in staging: `schema.table` also in public, shortened as in a key."""
    return os.path.join(root, percent(database), shortened(f"{percent(schema)}.{percent(table)}", TABLE_BYTES))


def run_id(now: str, pid: int) -> str:
    """A run's id from the time (RFC 3339 UTC, whole seconds) and the process: 20251230T021545Z-4711."""
    return f"{stamp(now)}-{pid}"


def batch_id(database: str, schema: str, table: str, first: list[Any], last: list[Any], keys_sha256: str) -> str:
    """The identity of a batch: SHA-256 over what it holds, not over its number (REQ-IDEM-001 as ruled).

    `first` and `last` are [timestamp, key...] of its outermost rows.
    """
    parts = (database, schema, table, _compact(first), _compact(last), keys_sha256)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
