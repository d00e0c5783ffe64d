"""The keys of rows, taken out of their JSON lines without parsing a row in Python.

Key columns stand first in each line, in key order, so one regular expression per chunk finds them. A key's
text is the bytes of its JSON values joined by ","; `keys_sha256` hashes one such text per row, each ended by
LF, in batch order. SQL computes the same (postgres/rows_sql.py); by hand it is zcat, grep and sha256sum.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Iterable, Pattern, Sequence

from audit_archiver.exits import InputError

# A string, or what stands without quotes: a number, true, false. Neither can hold a line feed.
_VALUE = rb'(?:"[^"\\\n]*(?:\\.[^"\\\n]*)*"|[^",{}\[\]\s]+)'


def pattern(columns: Sequence[str], *, bodies: bool = False) -> Pattern[bytes]:
    """A pattern that matches one whole row line and captures the values of its first columns, which are scalars.

    With `bodies` it captures before them all of the line but its '}' and LF.
    """
    parts = [re.escape(json.dumps(column, ensure_ascii=False).encode()) + rb":(" + _VALUE + rb")" for column in columns]
    body = rb"\{" + rb",".join(parts) + rb"(?=[,}]).*"
    return re.compile(rb"(?m)^" + (rb"(" + body + rb")" if bodies else body) + rb"\}\n")


def values(chunk: bytes, matcher: Pattern[bytes]) -> list[list[bytes]]:
    """What `matcher` captures of the whole lines in `chunk`: for each of its groups one per row.

    Raises InputError unless every line begins with its columns and ends as a row does, and nothing else is there.
    """
    pieces = matcher.split(chunk)
    groups = matcher.groups + 1
    if any(pieces[::groups]):  # what lies between the rows
        lines = chunk.count(b"\n")
        raise InputError(f"{lines - len(pieces) // groups} of {lines} lines are no rows that begin with the key columns")
    return [pieces[group::groups] for group in range(1, groups)]


def texts(chunk: bytes, matcher: Pattern[bytes]) -> Sequence[bytes]:
    """The key texts of the row lines in `chunk`. Raises as `values`."""
    return joined(values(chunk, matcher))


def joined(columns: Sequence[Sequence[bytes]]) -> Sequence[bytes]:
    """The key texts of the key columns' values, as `values` gives them."""
    return columns[0] if len(columns) == 1 else list(map(b",".join, zip(*columns)))


def to_list(key_texts: Iterable[bytes], columns: int) -> bytes:
    """Key texts as the items of a JSON array, one a line: scalars for one key column, arrays otherwise."""
    if columns == 1:
        return b",\n".join(key_texts)
    joined = b"],\n[".join(key_texts)
    return b"[" + joined + b"]" if joined else b""


def from_list(items: bytes, columns: int) -> list[bytes]:
    """The key texts of what `to_list` made, byte for byte (a JSON string holds no raw LF)."""
    if not items:
        return []
    return items.split(b",\n") if columns == 1 else items[1:-1].split(b"],\n[")


class Digest:
    """keys_sha256 over key texts as they come."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, key_texts: Sequence[bytes]) -> None:
        """Add the texts of the next rows."""
        if key_texts:
            self._sha256.update(b"\n".join(key_texts) + b"\n")

    def hexdigest(self) -> str:
        """The digest of all texts so far."""
        return self._sha256.hexdigest()
