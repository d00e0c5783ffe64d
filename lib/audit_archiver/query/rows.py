"""Row lines as their columns: what stands in a line is taken out of it, never written anew."""

from __future__ import annotations

import json
from typing import Iterator, Mapping, Optional, Sequence

from audit_archiver.exits import Mismatch
from audit_archiver.query.conditions import Check

_DECODER = json.JSONDecoder()


def fields(line: str) -> dict[str, str]:
    """Column -> JSON text of a row line (without its line feed), in their order. Raises Mismatch if it is no row."""
    found: dict[str, str] = {}
    try:
        place = 1
        while True:
            name, colon = _DECODER.raw_decode(line, place)
            _, end = _DECODER.raw_decode(line, colon + 1)
            found[name] = line[colon + 1:end]
            if line[end] != ",":
                break
            place = end + 1
    except (ValueError, IndexError, RecursionError):
        raise Mismatch(f"a row of the archive is no JSON object: {line[:80]}") from None
    return found


class Wanted:
    """The rows that every one of some checks, by column, lets pass; without checks all rows."""

    def __init__(self, checks: Sequence[tuple[str, Check]]) -> None:
        self._checks = checks
        self._needles = min((_needles(name, check) for name, check in checks if check.forms), key=len, default=[])

    def of(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """(line number in the chunk, line without its line feed) of each wanted row of a chunk of whole lines."""
        if not self._needles:
            for number, line in enumerate(chunk.split(b"\n")[:-1]):
                if self._let_pass(line):
                    yield number, line
            return
        number = counted = 0
        for start in sorted(_lines_with(chunk, self._needles)):
            number, counted = number + chunk.count(b"\n", counted, start), start
            line = chunk[start:chunk.index(b"\n", start)]
            if self._let_pass(line):
                yield number, line

    def _let_pass(self, line: bytes) -> bool:
        if not self._checks:
            return True
        values = fields(line.decode())
        return all(check.matches(values[name]) for name, check in self._checks)


def picked(line: bytes, columns: Sequence[str]) -> Mapping[str, Optional[str]]:
    """The JSON texts of these columns in a row line; None where the row has no such column."""
    values = fields(line.decode())
    return {name: values.get(name) for name in columns}


def _needles(name: str, check: Check) -> list[bytes]:
    """What stands in every line that may pass: the column's name and one of the texts of the value."""
    return [f"{json.dumps(name, ensure_ascii=False)}:{form}".encode() for form in check.forms]


def _lines_with(chunk: bytes, needles: Sequence[bytes]) -> set[int]:
    """Where the lines begin that hold one of the needles, in a column or in the midst of a value."""
    found = set()
    for needle in needles:
        place = chunk.find(needle)
        while place >= 0:
            found.add(chunk.rfind(b"\n", 0, place) + 1)
            end = chunk.find(b"\n", place)
            place = chunk.find(needle, end)
    return found
