"""Row lines on their way from the rows stream into the data object: checked and extended by the chunk.

A row line is what the server made: '{' first, '}' and LF last. No row is parsed, and there is no Python step
per row.
"""

from __future__ import annotations

from typing import Any, Mapping

from audit_archiver import lines
from audit_archiver.exits import InputError


def added_fields(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What stands behind the columns in each archived row (REQ-S3-016)."""
    return {"_archived_at": batch["archived_at"], "_batch_id": batch["id"], "_source_database": batch["database"],
            "_source_table": batch["table"]}


class Appender:
    """Puts the same fields behind the last one of every row (REQ-S3-016): `_archived_at`, `_batch_id` and so on."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._ending = b"," + lines.dump(fields)[1:]

    def extend(self, bodies: list[bytes]) -> bytes:
        """The lines of the rows with the fields in each; `bodies` are row lines without their '}' and LF, and are used up."""
        bodies.append(b"")
        return self._ending.join(bodies)


class Stripper:
    """Takes those fields off again: what is left is the row line as the server made it."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._ending = b"," + lines.dump(fields)[1:]

    def strip(self, line: bytes) -> bytes:
        """The row line, with its LF, of one archived line. InputError if the line does not end in the fields."""
        if not line.endswith(self._ending):
            raise InputError("an archived row does not end as its batch's rows do")
        return line[:-len(self._ending)] + b"}\n"
