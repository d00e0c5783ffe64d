"""Staged batches without a database: what aa-serialize leaves, made by the same formats.

    line = staged(tmp_path / "staging", bucket="b", rows=100)      # files, batch.json, and the batch line as a dict
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Sequence

from audit_archiver import lines
from audit_archiver.formats import batch as batches
from audit_archiver.formats import keys, members, metadata, names
from audit_archiver.formats.find import Finder

RUN = "20251230T021545Z-4711"
ARCHIVED_AT = "2025-12-30T02:15:47Z"
SYSTEM = "7710284313221365056"
COLUMNS = [["id", "bigint", False], ["created_at", "timestamptz", False], ["action", "text", True]]


def row(number: int, key: Sequence[str] = ("id",), width: int = 60, seed: int = 0) -> bytes:
    """One row line: key columns first, `width` characters that gzip halves."""
    noise = random.Random(number * 7919 + seed).getrandbits(4 * width)
    values: dict[str, Any] = {"id": number, "created_at": f"2024-01-01T{number // 3600 % 24:02d}:{number // 60 % 60:02d}:00+00:00"}
    first = {column: values.pop(column, f"k{number}") for column in key}
    return lines.dump({**first, **values, "action": f"{noise:0{width}x}"})


def staged(root: Path, bucket: str, *, prefix: str = "archives/", rows: int = 100, number: int = 1, database: str = "prod",
           schema: str = "public", table: str = "audit_logs", key: Sequence[str] = ("id",), run: str = RUN,
           archived_at: str = ARCHIVED_AT, system: str = SYSTEM, txn: Optional[dict[str, str]] = None,
           first_id: Optional[int] = None, width: int = 60, seed: int = 0, find: Sequence[str] = ()) -> dict[str, Any]:
    """Write a staged batch of generated rows and return its batch line; `find` are columns that stand behind the key."""
    start = first_id if first_id is not None else 1 + (number - 1) * rows
    plain = [row(start + place, key, width, seed) for place in range(rows)]
    key_texts = keys.texts(b"".join(plain), keys.pattern(key))
    digest = keys.Digest()
    digest.update(key_texts)
    ends = [[json.loads(line)["created_at"], *json.loads(b"[" + text + b"]")]
            for line, text in ((plain[0], key_texts[0]), (plain[-1], key_texts[-1]))]
    batch: dict[str, Any] = {
        "id": "", "number": number, "run": run, "database": database, "schema": schema, "table": table, "key": list(key),
        "timestamp": "created_at", "cutoff": "2025-09-30T02:15:45.123456Z", "archived_at": archived_at, "rows": rows,
        "skipped_locked": 0, "first": ends[0], "last": ends[1], "keys_sha256": digest.hexdigest(),
        "columns": [column[:2] for column in COLUMNS],
        "server": {"version": 150018, "system": system, "timeline": 1, "database_oid": 16384, "table_oid": 16397},
        "shape_sha256": "5d" * 32, "txn": txn}
    batch["id"] = batches.identity(batch)
    frame = {"batch": batch, "table": {"host": "db1.example.com", "postgres_version": "15.18", "columns": COLUMNS,
                                       "primary_key": list(key), "indexes": [], "range": [ends[0][0], ends[1][0]],
                                       **({"find": list(find)} if find else {})}}
    directory = Path(names.staging_dir(str(root), batch))
    directory.mkdir(parents=True, mode=0o700)
    stem = names.stem(prefix, database, schema, table, archived_at, number)
    base = directory / stem.rpartition("/")[2]
    tail = lines.dump({"_archived_at": archived_at, "_batch_id": batch["id"], "_source_database": database,
                       "_source_table": table})[1:-2]
    with open(f"{base}{names.DATA}", "wb") as out:
        writer = members.Writer(out, 6)
        writer.write(b"".join(line[:-2] + b"," + tail + b"}\n" for line in plain), rows)
        writer.close()
    serialized: dict[str, Any] = {"dir": str(directory), "stem": stem, "rows": rows,
                                  "rows_sha256": hashlib.sha256(b"".join(plain)).hexdigest(), "data": writer.summary()}
    finder = Finder(key, find, COLUMNS)
    finder.add(keys.values(b"".join(plain), keys.pattern(finder.columns)))
    described = metadata.dump(metadata.build(frame, serialized, finder.found(), bucket, 6))
    listed = metadata.key_list(batch, key_texts)
    Path(f"{base}{names.METADATA}").write_bytes(described)
    Path(f"{base}{names.KEYS}").write_bytes(listed)
    serialized["metadata_sha256"] = hashlib.sha256(described).hexdigest()
    serialized["manifest_sha256"] = hashlib.sha256(listed).hexdigest()
    line = batches.new(batch, serialized)
    (directory / "batch.json").write_bytes(lines.dump(line))
    return line


def committed(line: dict[str, Any], by: str = "holder") -> dict[str, Any]:
    """A verified line as it comes out of the transaction that deleted and committed it."""
    deleted = {"at": "2025-12-30T02:15:49Z", "verdict": "FULL", "rows": line["batch"]["rows"]}
    commit = {"at": "2025-12-30T02:15:50Z", "xid": "4711", "lsn": "0/3A5F", "by": by, "sample_absent": True}
    return {**line, "deleted": deleted, "committed": commit}


def dump(*batch_lines: dict[str, Any]) -> bytes:
    """Batch lines as a stage reads them."""
    return b"".join(map(lines.dump, batch_lines))


NOWHERE = SimpleNamespace(name="prod", host="127.0.0.1", port=5432, user="archiver", password="never-asked-for")
QUICK = {"retry_base_s": 0.01, "retry_max_s": 0.05, "storage_class": "STANDARD"}


def s3_section(endpoint: str, **changes: Any) -> dict[str, Any]:
    """What a configuration's s3 section says in these tests: short pauses, and an endpoint of the test's choice."""
    return {"endpoint": endpoint, **QUICK, **changes}
