"""The batch line: one JSON object that carries a batch's whole history from stage to stage.

Its sections come in the order of the pipeline (serialized, uploaded, verified, deleted, committed, recorded);
a stage refuses a line that lacks its predecessor's section, so the order is in the data (REQ-INT-001).
"""

from __future__ import annotations

import calendar
import time
from typing import Any, Iterator, Sequence

from audit_archiver import lines
from audit_archiver.exits import Failed, InputError
from audit_archiver.formats import names, schema

FORMAT = "aa-batch"
VERSION = 1
VERIFIED_FOR_S = 3600
CLOCKS_DIFFER_S = 300
SECTIONS = ("serialized", "uploaded", "verified", "deleted", "committed", "recorded")

_DONE_BY = {"serialized": "aa-serialize", "uploaded": "aa-upload", "verified": "aa-verify", "deleted": "aa-delete",
            "committed": "aa-txn, aa-delete or aa-recover", "recorded": "aa-record"}


def parse(line: bytes, needs: Sequence[str] = (), lacks: Sequence[str] = ()) -> dict[str, Any]:
    """The batch line in `line`, valid, with the sections `needs` and without `lacks`.

    Raises InputError: not JSON, another format or version, unknown keys, a missing or a surplus section,
    an id that is not the digest of what the line says it holds, or sections that contradict each other.
    """
    value = lines.parse(line, "the batch line")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError("the line is no batch line", hint="this command reads what the stage before it wrote")
    schema.validate("batch", value, "the batch line")
    batch = value["batch"]
    if batch["id"] != identity(batch):
        raise InputError(f"the id of {name(batch)} does not belong to its contents")
    for one, other in _contradictions(value):
        raise InputError(f"{name(batch)} contradicts itself: '{one}' and '{other}' differ")
    for section in needs:
        if section not in value:
            raise InputError(f"{name(batch)} was not {section}", hint=f"pass it through {_DONE_BY[section]} first")
    for section in lacks:
        if section in value:
            raise InputError(f"{name(batch)} is already {section}")
    return value


def new(batch: dict[str, Any], serialized: dict[str, Any]) -> dict[str, Any]:
    """A batch line as aa-serialize begins it."""
    return {"format": FORMAT, "version": VERSION, "batch": batch, "serialized": serialized}


def identity(batch: dict[str, Any]) -> str:
    """The id that a batch section must bear."""
    return names.batch_id(batch["database"], batch["schema"], batch["table"], batch["first"], batch["last"],
                          batch["keys_sha256"])


def name(batch: dict[str, Any]) -> str:
    """What messages call a batch: public.audit_logs batch_003."""
    return f"{batch['schema']}.{batch['table']} batch_{batch['number']:03d}"


def _contradictions(line: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Places in a valid line that must be equal and are not: a verified section of other rows licenses nothing."""
    batch, serialized = line["batch"], line.get("serialized")
    verified, deleted = line.get("verified"), line.get("deleted")
    pairs: list[tuple[str, Any, str, Any]] = []
    if serialized:
        data = serialized["data"]
        pairs += [("batch.rows", batch["rows"], "serialized.rows", serialized["rows"]),
                  ("serialized.rows", -(-serialized["rows"] // data["member_rows"]),
                   "serialized.data.members", len(data["members"]))]
    if serialized and verified:
        pairs += [("serialized.rows", serialized["rows"], "verified.rows", verified["rows"]),
                  ("serialized.data.sha256", serialized["data"]["sha256"], "verified.sha256", verified["sha256"]),
                  ("batch.keys_sha256", batch["keys_sha256"], "verified.keys_sha256", verified["keys_sha256"])]
    if deleted:
        left = len(deleted.get("left_out", ())) if deleted["verdict"] == "SUBSET" else 0
        pairs.append(("batch.rows", batch["rows"] - left, "deleted.rows", deleted["rows"]))
    for one, expected, other, found in pairs:
        if expected != found:
            yield one, other


def keys_of(line: dict[str, Any]) -> tuple[str, str, str]:
    """The object keys of a batch line's data, metadata and key list."""
    stem = line["serialized"]["stem"]
    return stem + names.DATA, stem + names.METADATA, stem + names.KEYS


def require_fresh(line: dict[str, Any]) -> None:
    """Raise Failed if the `verified` mark is older than an hour: one of yesterday proves nothing about today's bucket."""
    at = line["verified"]["at"]
    age = time.time() - calendar.timegm(time.strptime(at[:19], "%Y-%m-%dT%H:%M:%S"))
    if age > VERIFIED_FOR_S or age < -CLOCKS_DIFFER_S:
        raise Failed(f"{name(line['batch'])} was verified at {at}, " + (
            "more than an hour ago" if age > 0 else "which this machine's clock has not reached yet"),
            hint="pass it through aa-verify again")
