"""Dates and times that a person gives to a command, as the UTC texts of job lines."""

from __future__ import annotations

import datetime
import re
from typing import Optional

from audit_archiver.exits import ConfigError

_DATE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
_TIME = re.compile(_DATE.pattern + r"[Tt ]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,6})[0-9]*)?"
                   r"([Zz]|[-+][0-9]{2}:[0-9]{2})")


def start(text: Optional[str]) -> Optional[str]:
    """The first moment that is meant: of a date its 00:00 UTC, or the RFC 3339 time itself."""
    return None if text is None else _moment(text, "--start-date", days=0)


def end(text: Optional[str]) -> Optional[str]:
    """The first moment that is not meant: of a date the next 00:00 UTC, so that the day is included; or the time itself."""
    return None if text is None else _moment(text, "--end-date", days=1)


def until(text: Optional[str], flag: str) -> Optional[str]:
    """The moment at which something ends that lasts until then, a date included; raises ConfigError if that is over."""
    found = None if text is None else _moment(text, flag, days=1)
    if found is not None and found <= datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"):
        raise ConfigError(f"{flag} '{text}' is over", hint="name a day to come")
    return found


def check_order(first: Optional[str], last: Optional[str]) -> None:
    """Raise ConfigError unless something lies between the two."""
    if first is not None and last is not None and first >= last:
        raise ConfigError("--start-date is not before --end-date", detail=f"{first} to {last}",
                          hint="an --end-date that is a date includes that day; a time is exclusive")


def _moment(text: str, flag: str, days: int) -> str:
    date, time = _DATE.fullmatch(text), _TIME.fullmatch(text)
    try:
        if date:
            found = datetime.datetime(*map(int, date.groups())) + datetime.timedelta(days=days)  # type: ignore[arg-type]
        elif time:
            *numbers, fraction, zone = time.groups()
            found = datetime.datetime(*map(int, numbers)).replace(microsecond=int((fraction or "").ljust(6, "0")))  # type: ignore[arg-type]
            found -= _offset(zone)
        else:
            raise ValueError("no such form")
    except (ValueError, OverflowError):
        raise ConfigError(f"{flag} '{text}' is neither a date nor a time",
                          hint="write 2025-09-30 (UTC), or 2025-09-30T12:00:00Z, or with an offset as +02:00") from None
    return found.isoformat(timespec="microseconds") + "Z"  # of one length, so that texts compare as times do


def _offset(zone: str) -> datetime.timedelta:
    if zone in "Zz":
        return datetime.timedelta()
    hours, minutes = int(zone[1:3]), int(zone[4:6])
    if hours > 23 or minutes > 59:
        raise ValueError("no such offset")
    return datetime.timedelta(hours=hours, minutes=minutes) * (-1 if zone[0] == "-" else 1)
