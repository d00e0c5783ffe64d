"""The holder's end of COPY: messages of PostgreSQL's binary format become lines, wherever they are cut."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest

from audit_archiver.exits import Failed
from audit_archiver.postgres.transaction import _Lines

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
END = struct.pack(">h", -1)
LINES = [b'{"id":1}\n{"id":2}\n', b'{"id":3}\n', b'{"id":4}\n{"id":5}\n{"id":6}\n']


def message(lines: bytes) -> bytes:
    return struct.pack(">hiii", 2, 4, lines.count(b"\n"), len(lines)) + lines


STREAM = HEADER + b"".join(map(message, LINES)) + END


def nobody() -> None:
    raise AssertionError("nothing is to be cancelled")


@pytest.mark.parametrize("size", [1, 2, 3, 13, 14, 15, 19, 21, 1000])
def test_the_lines_are_the_same_however_the_messages_are_cut(tmp_path: Path, size: int) -> None:
    with open(tmp_path / "rows", "wb") as file:
        lines = _Lines(file.fileno(), nobody)
        for start in range(0, len(STREAM), size):
            assert lines.write(STREAM[start:start + size]) == len(STREAM[start:start + size])
        lines.flush()
    written = (tmp_path / "rows").read_bytes()
    assert written == b"".join(LINES)
    assert (lines.rows, lines.messages, lines.bytes, lines.ended) == (6, 3, len(written), True)
    assert lines.sha256.hexdigest() == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("cut", [10, len(HEADER), len(STREAM) - 2, len(STREAM) - 1])
def test_a_copy_without_its_end_mark_has_not_ended(cut: int) -> None:
    lines = _Lines(-1, nobody)
    lines.write(STREAM[:cut])
    assert not lines.ended


@pytest.mark.parametrize("wrong", [b"no" + STREAM, STREAM + message(b"{}\n"), HEADER + struct.pack(">hi", 1, 4) + bytes(12),
                                   HEADER + struct.pack(">hiii", 2, 4, 0, -1)],
                         ids=["another signature", "rows after the end", "one field", "a group without rows"])
def test_anything_else_stops_the_copy_at_once(wrong: bytes) -> None:
    cancelled: list[bool] = []
    lines = _Lines(-1, lambda: cancelled.append(True))
    with pytest.raises(Failed):
        lines.write(wrong)
    assert isinstance(lines.failure, Failed) and cancelled == [True]


def test_a_gone_reader_cancels_the_copy() -> None:
    cancelled: list[bool] = []
    read_end, write_end = os.pipe()
    os.close(read_end)
    lines = _Lines(write_end, lambda: cancelled.append(True))
    with pytest.raises(BrokenPipeError):
        lines.write(HEADER + message(b"x" * (1 << 18) + b"\n"))
    os.close(write_end)
    assert isinstance(lines.failure, BrokenPipeError) and cancelled == [True]
