"""What a batch's metadata say so that a reader finds rows without fetching all of them (man 5 aa-metadata, FINDING ROWS).

A range is the least and the greatest value of a column in the batch. A filter is a compact set of (value, gzip member): it
names every member that holds a value, and one that does not in about one of 500 cases. Both are made of the JSON values
as they stand in the row lines, so nothing is left out that a reader could find there; who looks for a value must write it as
the line does.
"""

from __future__ import annotations

import json
import zlib
from array import array
from bisect import bisect_left
from itertools import accumulate, chain, repeat
from operator import add, mod, mul, sub
from typing import Any, Collection, Optional, Sequence

from audit_archiver.exits import InputError
from audit_archiver.formats import members

MODULUS = 262139  # the largest prime below 2**18: the CRC alone, which is linear, would be unfair to values in a row
PART = 1 << 14  # residues in a part of a filter: a reader fetches one of 16
PARTS = -(-MODULUS // PART)
RANGE_BYTES = 100  # a longer value is no bound worth having in each metadata

_NUMBERS = ("smallint", "integer", "bigint")
_UNIFORM = (*_NUMBERS, "uuid", "text", "date", "timestamp without time zone", "timestamp with time zone")
_NULL = b"null"
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_HALF = len(_DIGITS) // 2
_PLACES = {digit: place for place, digit in enumerate(_DIGITS)}


class Finder:
    """Collects ranges of the key and of the columns to find rows by, and filters of the latter, while the rows pass.

    `types` is the list of [name, type, ...] of the table's columns. Without columns to find by only ranges are made. A key may
    be of a type whose equal values are written differently (1.0 and 1): of it there is no range, or a reader would leave out a batch
    that holds what he looks for. Columns to find by are never of such a type (postgres/catalog.py).
    """

    def __init__(self, key: Sequence[str], find: Sequence[str], types: Sequence[Sequence[Any]]) -> None:
        self.columns = list(dict.fromkeys((*key, *find)))
        """The names of the columns that `add` takes, as they stand first in each row line."""
        known = {name: kind for name, kind, *_ in types}
        self._ranges = [(place, _Range(name, known.get(name) in _NUMBERS, name not in key))
                        for place, name in enumerate(self.columns) if name in find or known.get(name) in _UNIFORM]
        self._filters = [(self.columns.index(name), name, _Filter()) for name in find]

    def add(self, values: Sequence[Sequence[bytes]]) -> None:
        """The next rows' JSON values, for each column one per row. Raises InputError where an integer is none."""
        for place, column in self._ranges:
            column.add(values[place])
        for place, _, made in self._filters:
            made.add(values[place])

    def found(self) -> dict[str, Any]:
        """What goes into the metadata: `ranges`, and if there are columns to find rows by, `find` and `filters`."""
        made: dict[str, Any] = {"ranges": [each.summary() for _, each in self._ranges if each.known]}
        if self._filters:
            parts = [part for _, _, each in self._filters for part in each.parts()]
            made["find"] = {"hash": "crc32", "modulus": MODULUS, "columns": [name for _, name, _ in self._filters],
                            "ends": list(accumulate(len(line) for line in lines_of(parts)))}
            made["filters"] = parts
        return made


def lines_of(parts: Sequence[str]) -> list[bytes]:
    """The lines that the parts of filters are in the metadata, from the second line on."""
    return [b'"' + part.encode() + (b'",\n' if number < len(parts) else b'"\n') for number, part in enumerate(parts, 1)]


def members_of(part: bytes, residue: int, count: int) -> set[int]:
    """The members, of `count`, that a value of this residue may be in, out of its part of a filter (a line of the metadata)."""
    found, number, difference = set(), 0, 0
    for digit in map(_PLACES.__getitem__, part.decode().strip('",\n')):
        difference = difference * _HALF + digit % _HALF
        if digit < _HALF:
            number, difference = number + difference, 0
            if number >= (residue + 1) * count:
                break
            if number >= residue * count:
                found.add(number % count)
    return found


class _Range:
    """The least and the greatest value of one column: integers as numbers, all others as the bytes of their JSON."""

    def __init__(self, column: str, number: bool, nullable: bool) -> None:
        self._column, self._number, self._nullable = column, number, nullable
        self._least: Any = None
        self._greatest: Any = None
        self._given_up = False

    @property
    def known(self) -> bool:
        """False if every value was NULL, or one of the two is too long, or written as JSON would not write it again."""
        return not self._given_up and self._least is not None and (
            self._number or None not in (_value(self._least), _value(self._greatest)))

    def add(self, values: Collection[bytes]) -> None:
        """Take in the JSON values of the next rows."""
        if self._given_up:
            return
        if self._nullable:
            values = set(values)
            values.discard(_NULL)
        if not values:
            return
        least, greatest = _numbers(values, self._column) if self._number else (min(values), max(values))
        if not self._number and max(len(least), len(greatest)) > RANGE_BYTES:
            self._given_up = True
            return
        self._least = least if self._least is None else min(self._least, least)
        self._greatest = greatest if self._greatest is None else max(self._greatest, greatest)

    def summary(self) -> dict[str, Any]:
        """The range as the metadata have it."""
        if self._number:
            return {"column": self._column, "order": "number", "min": self._least, "max": self._greatest}
        return {"column": self._column, "order": "json", "min": _value(self._least), "max": _value(self._greatest)}


class _Filter:
    """The residues of one column's values, row by row."""

    def __init__(self) -> None:
        self._residues = array("I")

    def add(self, values: Sequence[bytes]) -> None:
        """Take in the JSON values of the next rows."""
        self._residues.extend(map(mod, map(zlib.crc32, values), repeat(MODULUS)))

    def parts(self) -> list[str]:
        """The filter's parts: each the ascending numbers residue * members + member as differences."""
        rows = members.MEMBER_ROWS
        count = -(-len(self._residues) // rows)
        numbers: list[int] = []
        for member in range(count):
            held = set(self._residues[member * rows:(member + 1) * rows])
            numbers += map(add, map(mul, held, repeat(count)), repeat(member))
        numbers.sort()
        borders = [bisect_left(numbers, first * count) for first in range(0, MODULUS, PART)] + [len(numbers)]
        parts = [numbers[start:end] for start, end in zip(borders, borders[1:])]
        return ["".join(map(_WRITTEN.__getitem__, map(sub, part, chain((0,), part)))) for part in parts]


class _Written(dict):  # type: ignore[type-arg]
    """Differences as text: base 32, the most significant digit first; the last digit says that it is the last."""

    KEPT = 1 << 13

    def __missing__(self, number: int) -> str:
        text, rest = _DIGITS[number % _HALF], number // _HALF
        while rest:
            text, rest = _DIGITS[_HALF + rest % _HALF] + text, rest // _HALF
        if number < self.KEPT:
            self[number] = text
        return text


_WRITTEN = _Written()


def _numbers(texts: Collection[bytes], column: str) -> tuple[int, int]:
    """The least and the greatest of JSON integers. Of those of one length without a sign the bytes say it, at half the cost."""
    try:
        if len(set(map(len, texts))) == 1 and min(texts) >= b"0":
            return int(min(texts)), int(max(texts))
        numbers = list(map(int, texts))
    except ValueError:
        raise InputError(f"a value of column '{column}' is no integer") from None
    return min(numbers), max(numbers)


def _value(text: bytes) -> Optional[Any]:
    """The value of a JSON text, None where a reader might not write it like that again."""
    try:
        value = json.loads(text)
        return value if json.dumps(value, ensure_ascii=False).encode() == text and not isinstance(value, float) else None
    except ValueError:
        return None
