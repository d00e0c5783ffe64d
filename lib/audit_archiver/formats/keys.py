"""The keys of rows, taken out of their JSON lines without parsing a row in Python.

Key columns stand first in each line, in key order, so one regular expression per chunk finds them. A key's
text is the bytes of its JSON values joined by ","; `keys_sha256` hashes one such text per row, each ended by
LF, in batch order. SQL computes the same (postgres/rows_sql.py); by hand it is zcat, grep and sha256sum.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Iterable, Pattern, Sequence

from audit_archiver.exits import InputError

# A string, or what stands without quotes: a number, true, false. Neither can hold a line feed.
_VALUE = rb'(?:"[^"\\\n]*(?:\\.[^"\\\n]*)*"|[^",{}\[\]\s]+)'


def pattern(columns: Sequence[str]) -> Pattern[bytes]:
    """A pattern that matches one whole row line and captures the values of its first columns, which are scalars."""
    parts = [re.escape(json.dumps(column, ensure_ascii=False).encode()) + rb":(" + _VALUE + rb")" for column in columns]
    return re.compile(rb"(?m)^\{" + rb",".join(parts) + rb"(?:,.*)?\}\n")


def texts(chunk: bytes, matcher: Pattern[bytes], rows: int) -> list[bytes]:
    """The key texts of the `rows` whole lines in `chunk`.

    Raises InputError if a line does not begin with the key or does not end as a row does.
    """
    found = _found(chunk, matcher, rows)
    return found if matcher.groups == 1 else list(map(b",".join, found))


def values(chunk: bytes, matcher: Pattern[bytes], rows: int) -> list[Sequence[bytes]]:
    """The JSON values of the `rows` whole lines in `chunk`: for each column of the pattern one per row. Raises as `texts`."""
    found = _found(chunk, matcher, rows)
    return [found] if matcher.groups == 1 else list(zip(*found))


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


def _found(chunk: bytes, matcher: Pattern[bytes], rows: int) -> list[Any]:
    found = matcher.findall(chunk)
    if len(found) != rows:
        raise InputError(f"{rows - len(found)} of {rows} row lines do not begin with the key columns")
    return found


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
