"""The two JSON files beside a batch's data: metadata (Appendix B) and key list (Appendix C).

Metadata carry the whole batch section, so that the batch line can be rebuilt when staging is gone. A key
list is one header line and then one key per line, so that `grep` finds a key and memory stays small.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence

from audit_archiver import __version__, lines
from audit_archiver.exits import InputError
from audit_archiver.formats import batch as batches
from audit_archiver.formats import find, keys, members, names, schema

_FILTERS_OPEN = b',"filters":[\n'
_KEYS_OPEN = b',"primary_keys":[\n'
_KEYS_CLOSE = b"\n]}\n"
_TWICE = {"database": "database", "schema_name": "schema", "table": "table", "batch_number": "number", "batch_id": "id",
          "archived_at": "archived_at", "record_count": "rows"}


def build(frame: dict[str, Any], serialized: dict[str, Any], found: dict[str, Any], bucket: str, level: int) -> dict[str, Any]:
    """The metadata of a batch from its opening frame and what aa-serialize made of it (REQ-S3-017, REQ-VER-013).

    `found` is what formats.find says about its rows.
    """
    batch, table, data = frame["batch"], frame["table"], serialized["data"]
    library, library_level = members.compressor(level)
    value: dict[str, Any] = {
        "format": "aa-metadata", "version": "2.0",
        "database": batch["database"], "host": table["host"],
        "table": batch["table"], "schema_name": batch["schema"],
        "batch_number": batch["number"], "batch_id": f"sha256:{batch['id']}",
        "archived_at": batch["archived_at"],
        "date_range": {"start": table["range"][0], "end": table["range"][1]},
        "record_count": serialized["rows"], "checksum": f"sha256:{data['sha256']}",
        "file_size": {"compressed": data["gz_bytes"], "uncompressed": data["bytes"]},
        "compression": {"algorithm": "gzip", "level": level, "library": f"{library} {library_level}"},
        "schema": {
            "columns": [{"name": name, "type": kind, "nullable": nullable} for name, kind, nullable in table["columns"]],
            "primary_key": table["primary_key"], "indexes": table["indexes"],
        },
        "postgres_version": table["postgres_version"], "archiver_version": __version__,
        "deletion_manifest_path": f"s3://{bucket}/{serialized['stem']}{names.KEYS}",
        "rows_sha256": serialized["rows_sha256"], "gz_sha256": data["gz_sha256"], "gz_bytes": data["gz_bytes"],
        "member_rows": data["member_rows"], "members": data["members"],
        "batch": batch, **found,
    }
    if "ddl" in table:
        value["schema"]["ddl"] = table["ddl"]
    schema.validate("metadata", value, "the metadata")
    return value


def dump(value: dict[str, Any]) -> bytes:
    """The bytes of metadata: one line, or the parts of the filters in lines of their own behind it, so that a reader can fetch one."""
    if "filters" not in value:
        return lines.dump(value)
    header = {name: item for name, item in value.items() if name != "filters"}
    return lines.dump(header)[:-2] + _FILTERS_OPEN + b"".join(find.lines_of(value["filters"])) + b"]}\n"


def head(content: bytes) -> tuple[Optional[bytes], int]:
    """The JSON of metadata without their filters, of the object's first bytes, and where the lines of the filters begin; (None, 0)
    if these bytes do not reach that far, or there are no filters."""
    end = content.find(_FILTERS_OPEN)
    return (content[:end] + b"}", end + len(_FILTERS_OPEN)) if end >= 0 else (None, 0)


def rebuild(value: Any, stem: str, metadata_sha256: str, manifest_sha256: str) -> dict[str, Any]:
    """The batch line, up to its serialized section, that `value` (a parsed metadata file at `stem`) belongs to.

    Raises InputError if the metadata are of another format, version or batch than they say.
    """
    what = f"'{stem}{names.METADATA}'"
    if not isinstance(value, dict) or value.get("format") != "aa-metadata":
        raise InputError(f"{what} holds no batch metadata")
    schema.validate("metadata", value, what)
    batch = value["batch"]
    if batch["id"] != batches.identity(batch):
        raise InputError(f"the id in {what} does not belong to its contents")
    for outside, inside in _TWICE.items():
        said = f"sha256:{batch['id']}" if outside == "batch_id" else batch[inside]
        if value[outside] != said:
            raise InputError(f"{what} contradicts itself: '{outside}' and 'batch.{inside}' differ")
    return batches.new(batch, {
        "stem": stem, "rows": value["record_count"], "rows_sha256": value["rows_sha256"],
        "data": {"sha256": value["checksum"].partition(":")[2], "bytes": value["file_size"]["uncompressed"],
                 "gz_sha256": value["gz_sha256"], "gz_bytes": value["gz_bytes"],
                 "member_rows": value["member_rows"], "members": value["members"]},
        "metadata_sha256": metadata_sha256, "manifest_sha256": manifest_sha256})


def key_list(batch: dict[str, Any], key_texts: Sequence[bytes]) -> bytes:
    """The bytes of a batch's key list (REQ-VER-009, REQ-VER-010); `key_texts` as formats.keys makes them."""
    where = " AND ".join(f"{_quoted(column)} = ${n}" for n, column in enumerate(batch["key"], 1))
    header = {
        "format": "aa-keys", "version": 1, "batch_id": f"sha256:{batch['id']}",
        "database": batch["database"], "schema_name": batch["schema"], "table": batch["table"], "key": batch["key"],
        "primary_key_checksum": f"sha256:{batch['keys_sha256']}",
        "delete_statement": f"DELETE FROM ONLY {_quoted(batch['schema'])}.{_quoted(batch['table'])} WHERE {where}",
        "transaction_id": (batch["txn"] or {}).get("xid"), "txn": batch["txn"], "server": batch["server"],
        "rows": len(key_texts),
    }
    schema.validate("keys", {**header, "primary_keys": []}, "the key list")
    return lines.dump(header)[:-2] + _KEYS_OPEN + keys.to_list(key_texts, len(batch["key"])) + _KEYS_CLOSE


def parse_key_list(content: bytes, what: str) -> tuple[dict[str, Any], list[bytes]]:
    """The header of a key list and its key texts. Raises InputError naming `what` if it is none."""
    header_end = content.find(_KEYS_OPEN)
    if header_end < 0 or not content.endswith(_KEYS_CLOSE):
        raise InputError(f"{what} is no key list, or cut off")
    header = lines.parse(content[:header_end] + b"}", what)
    schema.validate("keys", {**header, "primary_keys": []}, what)
    texts = keys.from_list(content[header_end + len(_KEYS_OPEN):-len(_KEYS_CLOSE)], len(header["key"]))
    if len(texts) != header["rows"]:
        raise InputError(f"{what} says {header['rows']} keys and holds {len(texts)}")
    return header, texts


def _quoted(name: str) -> str:
    """A name as SQL writes it; for people to read, nothing executes it."""
    return '"' + name.replace('"', '""') + '"'
