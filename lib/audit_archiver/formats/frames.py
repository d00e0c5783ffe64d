"""The frames around the rows of a batch: lines that start with '[' where rows start with '{'.

A rows stream that ends without its end frame is discarded: a reader cannot tell a killed writer from one
that finished.
"""

from __future__ import annotations

from typing import Any

from audit_archiver import lines
from audit_archiver.exits import InputError
from audit_archiver.formats import schema

OPEN = "aa-rows"
END = "end"
VERSION = 1


def opening(batch: dict[str, Any], table: dict[str, Any]) -> bytes:
    """The line before a batch's rows."""
    return lines.dump([OPEN, VERSION, {"batch": batch, "table": table}])


def closing(batch_id: str, rows: int, rows_sha256: str) -> bytes:
    """The line after a batch's rows: the count is COPY's, the digest the holder's."""
    return lines.dump([END, VERSION, {"id": batch_id, "rows": rows, "rows_sha256": rows_sha256}])


def parse(line: bytes, kind: str) -> dict[str, Any]:
    """The object in a frame of `kind` (OPEN or END). Raises InputError if the line is anything else."""
    if not line.startswith(b"["):
        raise InputError(f"expected an '{kind}' frame, found something else",
                         hint="aa-serialize reads what aa-select writes (without --rows)")
    value = lines.parse(line, "the frame")
    if not isinstance(value, list) or len(value) != 3 or value[0] != kind:
        raise InputError(f"expected an '{kind}' frame, found another one")
    if value[1] != VERSION or isinstance(value[1], bool):
        raise InputError(f"the '{kind}' frame has version {value[1]!r}, which this program does not know")
    schema.validate("rows" if kind == OPEN else "rows-end", value[2], f"the '{kind}' frame")
    return value[2]
