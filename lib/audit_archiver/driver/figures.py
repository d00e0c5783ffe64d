"""How figures and names are written for a person: thousands, bytes, durations, and text of a given width."""

from __future__ import annotations

import math
import unicodedata
from typing import Optional

_UNITS = ("kB", "MB", "GB", "TB", "PB")
_ELLIPSIS = "..."


def rows(count: int) -> str:
    """1204331 as 1,204,331."""
    return f"{count:,}"


def counted(count: int, noun: str, plural: Optional[str] = None) -> str:
    """1 batch, 2 batches: the count with its noun."""
    return f"{rows(count)} {noun if count == 1 else plural or noun + 's'}"


def size(count: int, digits: int = 1) -> str:
    """Bytes in the unit that suits them, in steps of 1,000 as S3 bills them; 0 is 0 MB."""
    value, unit = count / 1e3, 0
    while abs(value) >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1e3, unit + 1
    if count == 0:
        return "0 MB"
    return f"{value:.{digits}f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """57 s, 4 min 10 s, 2 h 05 min; below ten seconds with one decimal."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """0:25, 12:07, 3:02:44: time that is left, rounded up."""
    whole = math.ceil(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def moment(text: str) -> str:
    """2025-09-30T02:15:45.123456Z as 2025-09-30 02:15:45Z."""
    return text[:10] + " " + text[11:19] + "Z"


def printable(text: str, encoding: Optional[str] = None) -> str:
    """`text` without control characters, and with only what `encoding` can write; what goes is shown as \\xNN."""
    safe = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    if encoding is None:
        return safe
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def width(text: str) -> int:
    """Columns that `text` takes on a terminal: wide characters two, combining ones none."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def pad(text: str, columns: int) -> str:
    """`text` with spaces up to `columns`."""
    return text + " " * (columns - width(text))


def shorten(text: str, columns: int) -> str:
    """`text` cut to `columns` with an ellipsis in its middle: names of tables differ at both ends."""
    if width(text) <= columns:
        return text
    if columns <= len(_ELLIPSIS):
        return _head(text, columns)
    left = columns - len(_ELLIPSIS)
    front = _head(text, (left + 1) // 2)
    back = _head(text[::-1], left - width(front))[::-1]
    return front + _ELLIPSIS + back


def _head(text: str, columns: int) -> str:
    taken = 0
    for place, char in enumerate(text):
        taken += width(char)
        if taken > columns:
            return text[:place]
    return text


def table(lines: list[list[str]], left: int = 1) -> list[str]:
    """Lines of cells as aligned text: the first `left` columns to the left, the others to the right."""
    widths = [max(width(cell) for cell in column) for column in zip(*lines)]
    aligned = ([pad(cell, wide) if place < left else " " * (wide - width(cell)) + cell
                for place, (cell, wide) in enumerate(zip(cells, widths))] for cells in lines)
    return ["  ".join(cells).rstrip() for cells in aligned]
