"""What a person asks of a column (--where), and whether a value of the archive answers it.

A value is looked at as the JSON text that stands in its row line (man 5 aa-rows). Equality is that of the column's type where its
equal values are written in one way, or are numbers; of all other types it is the text's, as the archive has it.
"""

from __future__ import annotations

import datetime
import json
import re
import uuid
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Callable, Mapping, Optional

from audit_archiver.exits import ConfigError

NULL = "null"
_WRITTEN = re.compile(r"(?s)(.+?)\s*(<=|>=|=|<|>)(.*)")
_IS = re.compile(r"(?is)(.+?)\s+is(\s+not)?\s+null")
_INTEGERS = ("smallint", "integer", "bigint")
_REALS = ("real", "double precision")
_TIMES = ("date", "timestamp without time zone", "timestamp with time zone")
_MOMENT = re.compile(r"(\d{4,})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,6})\d*)?)?)?\s*([Zz]|[+-]\d\d(?::?\d\d)?)?( BC)?")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Condition:
    """One --where: `column`, `operator` (=, <, <=, >, >=, null, not null) and the value as it was given."""

    column: str
    operator: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.column}{self.operator}{self.value}" if self.operator in "<=>=" else f"{self.column} is {self.operator}"

    def check(self, kind: str) -> Check:
        """The condition for a column of the type `kind`, as the metadata name it. Raises ConfigError where it asks what the type
        cannot answer."""
        if self.operator in ("null", "not null"):
            wanted = self.operator == "null"
            return Check((NULL,) if wanted else (), lambda text: (text == NULL) == wanted, None, self.operator)
        base, places = _base(kind)
        try:
            value, forms = _value(base, places, self.value)
        except (ValueError, InvalidOperation, OverflowError):
            raise ConfigError(f"--where '{self}': '{self.value}' is no {kind}", hint=_HINTS.get(base)) from None
        read = _READERS.get(base)
        if self.operator == "=":
            if read is None or base in _TIMES:
                return Check(forms, lambda text: text in forms, value, "=")
            return Check(forms, lambda text: text != NULL and read(text) == value, value, "=")
        if read is None:
            raise ConfigError(f"--where '{self}': column '{self.column}' has the type {kind}, whose order only the server knows",
                              hint="ask for numbers, dates and times by < and >, for all others by =")
        compare = _COMPARE[self.operator]
        return Check((), lambda text: text != NULL and compare(read(text), value), value, self.operator)


@dataclass(frozen=True)
class Check:
    """A condition for a column's type.

    `forms` are the only JSON texts that equal values can have; empty if there are others. `value` is what `matches` compares with.
    """

    forms: tuple[str, ...]
    matches: Callable[[str], bool]
    value: Any
    operator: str

    def may_be_within(self, bounds: Optional[Mapping[str, Any]]) -> bool:
        """False only if no value between the bounds (an item of the metadata's `ranges`) answers it."""
        if bounds is None or self.operator == "not null":
            return True
        if self.operator == "null":
            return True  # NULL is in no range
        if bounds["order"] == "number":
            least, greatest = bounds["min"], bounds["max"]
            return {"=": least <= self.value <= greatest, "<": least < self.value, "<=": least <= self.value,
                    ">": greatest > self.value, ">=": greatest >= self.value}[self.operator]
        if self.operator != "=" or not self.forms:
            return True
        least, greatest = (_json(bounds[end]).encode() for end in ("min", "max"))
        return any(least <= form.encode() <= greatest for form in self.forms)


def at_or_after(time: str) -> Check:
    """Whether a date or time is not before `time`, which is RFC 3339 in UTC; a date is its 00:00."""
    return Check((), lambda text: text != NULL and moment(_text(text)) >= moment(time), moment(time), ">=")


def before(time: str) -> Check:
    """Whether a date or time is before `time`, as `at_or_after`."""
    return Check((), lambda text: text != NULL and moment(_text(text)) < moment(time), moment(time), "<")


def parse(argument: str) -> Condition:
    """COL=VALUE, COL<VALUE and so on, COL is null, COL is not null. Raises ConfigError for anything else."""
    nothing, written = _IS.fullmatch(argument), _WRITTEN.fullmatch(argument)
    if nothing is not None:
        return Condition(nothing[1], "not null" if nothing[2] else "null")
    if written is None:
        raise ConfigError(f"--where '{argument}' is no condition", hint="write COL=VALUE, COL<VALUE, <=, >, >=, or 'COL is null'")
    return Condition(*written.groups())


def moment(text: str) -> tuple[int, str]:
    """A date or time as the archive writes it, as something that compares by time."""
    found = _MOMENT.fullmatch(text)
    if found is None:  # infinity, and what no range of ours reaches
        return (-10**9 if text.startswith("-") else 10**9, text)
    year, month, day, hour, minute, second, fraction, _, before = found.groups()
    return (1 - int(year) if before else int(year),
            f"{month}-{day}T{hour or '00'}:{minute or '00'}:{second or '00'}.{(fraction or '').ljust(6, '0')}")


def _base(kind: str) -> tuple[str, tuple[int, ...]]:
    """("numeric", (8, 2)) of "numeric(8,2)"."""
    found = re.fullmatch(r"(.*?)\s*\(([0-9, ]+)\)(.*)", kind)
    name = (found[1] + found[3]) if found else kind
    name = {"timestamptz": _TIMES[2], "timestamp": _TIMES[1], "decimal": "numeric", "int": "integer", "bool": "boolean"}.get(name, name)
    return name, tuple(map(int, found[2].split(","))) if found else ()


def _value(base: str, places: tuple[int, ...], text: str) -> tuple[Any, tuple[str, ...]]:
    """What to compare with, and the JSON texts of its equals (none if they are not all known)."""
    if base in _INTEGERS:
        return int(text), (str(int(text)),)
    if base in _REALS:
        return _number(text), ()
    if base == "numeric":
        number = Decimal(text)
        exact = len(places) == 2 and number.is_finite()
        return _number(text), (_json(format(number.quantize(Decimal(1).scaleb(-places[1])), "f")),) if exact else ()
    if base == "boolean":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower(), (text.lower(),)
    if base == "uuid":
        return None, (_json(str(uuid.UUID(text))),)
    if base in _TIMES:
        written = _time(base, text)
        return moment(written), (_json(written),)
    if base == "character" and places:
        text = text.ljust(places[0])
    forms = (_json(text),)
    return text, (*forms, text) if _NUMBER.fullmatch(text) or text in ("true", "false") else forms


def _time(base: str, text: str) -> str:
    """A date or time as the archive writes one: with time zone in UTC, no more digits than it needs."""
    found = _MOMENT.fullmatch(text.strip())
    if found is None:
        raise ValueError(text)
    year, month, day, hour, minute, second, fraction, zone, before = found.groups()
    if base == "date":
        if hour is not None:
            raise ValueError(text)
        return f"{year}-{month}-{day}{before or ''}"
    if base == _TIMES[1] and zone:
        raise ValueError(text)
    if before or int(year) > 9999:
        if zone not in (None, "Z", "z", "+00", "+00:00", "-00"):
            raise ValueError(text)
        day_and_time = f"{year}-{month}-{day}T{hour or '00'}:{minute or '00'}:{second or '00'}"
    else:
        when = datetime.datetime(int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0))
        if zone and zone not in "Zz":
            hours, minutes = int(zone[1:3]), int(zone[3:].lstrip(":") or 0)
            when -= datetime.timedelta(hours=hours, minutes=minutes) * (-1 if zone[0] == "-" else 1)
        day_and_time = when.strftime("%Y").rjust(4, "0") + when.strftime("-%m-%dT%H:%M:%S")
    rest = (fraction or "").rstrip("0")
    return f"{day_and_time}{'.' + rest if rest else ''}{'+00:00' if base == _TIMES[2] else ''}{before or ''}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text(value: str) -> str:
    return str(json.loads(value)) if value.startswith('"') else value


def _number(text: str) -> tuple[bool, Decimal]:
    """A number as PostgreSQL orders it: NaN behind all others."""
    number = Decimal(text)
    return number.is_nan(), Decimal() if number.is_nan() else number


_READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(_INTEGERS, int), **dict.fromkeys((*_REALS, "numeric"), lambda text: _number(_text(text))),
    **dict.fromkeys(_TIMES, lambda text: moment(_text(text)))}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda one, other: bool(one < other), "<=": lambda one, other: bool(one <= other),
    ">": lambda one, other: bool(one > other), ">=": lambda one, other: bool(one >= other)}
_HINTS = {**dict.fromkeys(_INTEGERS, "write a whole number, as 42"), "numeric": "write a number, as 1.50", "boolean": "write true or false",
          "uuid": "write it as 01234567-89ab-cdef-0123-456789abcdef", "date": "write 2024-01-31",
          _TIMES[1]: "write 2024-01-31T12:00:00, without a time zone", _TIMES[2]: "write 2024-01-31T12:00:00Z, or with an offset as +02:00"}
