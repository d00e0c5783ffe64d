"""A baseline: every row that a table and its archive hold, by key and digest, in a file of lines.

    {"format":"aa-baseline","version":1,"database":"prod","made_at":"...","tables":[{"schema":..., "table":..., "key":[...], "columns":[...]}]}
    0 5be1...c07a 17                 the table's number, the SHA-256 of the row's JSON line, the key as it stands in that line
    ["end",1,{"rows":1}]             without it the file is cut off
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Iterator

from audit_archiver import lines
from audit_archiver.exits import ConfigError, InputError
from audit_archiver.formats import schema

AT_ONCE = 5000


def write(path: Path, header: dict[str, Any], rows: Iterable[tuple[int, Iterable[bytes]]]) -> int:
    """Write a baseline that does not exist yet, whole or not at all; the number of rows. `rows` are (table's number, its lines)."""
    schema.validate("baseline", header, "the baseline")
    if path.exists():
        raise ConfigError(f"'{path}' exists already", hint="name a new file, or remove it")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(lines.dump(header))
            for number, found in rows:
                ahead = b"%d " % number
                for line in found:
                    out.write(ahead + line)
                    count += 1
            out.write(lines.dump(["end", 1, {"rows": count}]))
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write '{path}': {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return count


def read(path: Path) -> tuple[dict[str, Any], Iterator[tuple[int, list[bytes]]]]:
    """The header of a baseline, and its rows: (table's number, lines without LF) in parts. Raises InputError if it is none, or cut off."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from None
    try:
        header = lines.parse(file.readline(), f"'{path}'")
        if not isinstance(header, dict) or header.get("format") != "aa-baseline":
            raise InputError(f"'{path}' is no baseline", hint="aa-balance --make-baseline writes one")
        schema.validate("baseline", header, f"'{path}'")
    except BaseException:
        file.close()
        raise
    return header, _rows(file, str(path), len(header["tables"]))


def _rows(file: BinaryIO, path: str, tables: int) -> Iterator[tuple[int, list[bytes]]]:
    count, last = 0, b""
    with file:
        while part := list(itertools.islice(file, AT_ONCE)):
            last = part[-1]
            if last.startswith(b"["):
                part.pop()
            count += len(part)
            for number, group in itertools.groupby(part, key=lambda line: line.partition(b" ")[0]):
                if not number.isdigit() or int(number) >= tables:
                    raise InputError(f"'{path}' holds a line that is no row of a baseline")
                yield int(number), [line[len(number) + 1:-1] for line in group]
    if last != lines.dump(["end", 1, {"rows": count}]):
        raise InputError(f"'{path}' is cut off, or was changed", hint="it proves nothing; use an earlier copy")
