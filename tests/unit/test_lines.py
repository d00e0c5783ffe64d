"""Lines in, lines out: chunk borders, real pipes, readers that go away."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_archiver import lines
from audit_archiver.exits import ConfigError, InputError
from tests.ground.wait import until
from tests.unit.profile import fixed

PIECES = st.lists(st.binary(max_size=20) | st.sampled_from([b"\n", b"\r\n", b"\xe2\x80\xa8", b"\xc2\x85", b"\x0b\x0c\x1c\x1d\x1e", b"\n\n"]),
                  max_size=12)


class Portions(io.RawIOBase):
    """A stream without a descriptor that gives one portion per read."""

    def __init__(self, portions: list[bytes]) -> None:
        self.portions = [portion for portion in portions if portion]

    def read(self, size: int = -1) -> bytes:
        return self.portions.pop(0) if self.portions else b""


def split(data: bytes) -> list[bytes]:
    """Lines with their LF, split at LF only."""
    return [part + b"\n" for part in data.split(b"\n")[:-1]]


class Pipe:
    """A pipe, each end of which is closed once."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._open = {self.reader, self.writer}

    def close(self, *ends: int) -> None:
        """Close these ends, or what is still open."""
        for end in ends or tuple(self._open):
            self._open.remove(end)
            os.close(end)


@pytest.fixture()
def pipe() -> Iterator[Pipe]:
    """A pipe that is closed when the test ends."""
    made = Pipe()
    yield made
    made.close()


def reading(descriptor: int) -> Any:
    """An unbuffered stream on a descriptor that stays open."""
    return io.FileIO(descriptor, "r", closefd=False)


@fixed
@given(pieces=PIECES)
def test_lines_are_split_at_line_feeds_only_wherever_the_chunks_end(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    source = lines.Source([Portions(pieces)])
    whole = split(data)
    if data.endswith(b"\n") or not data:
        assert list(source) == whole
    else:
        read = []
        with pytest.raises(InputError, match="ends inside a line"):
            for line in source:
                read.append(line)
        assert read == whole


@fixed
@given(pieces=PIECES, steps=st.lists(st.sampled_from(["line", "chunk", "back"]), max_size=12))
def test_lines_chunks_and_what_is_given_back_add_up_to_the_input(pieces: list[bytes], steps: list[str]) -> None:
    source = lines.Source([Portions([*pieces, b"\n"])])
    seen = b""
    for step in steps:
        if step == "back" and seen:
            seen, given = seen[:-1], seen[-1:]
            source.push_back(given)
        else:
            seen += (source.line() if step == "line" else source.chunk()) or b""
    rest = b""
    while True:
        chunk = source.chunk()
        if not chunk:
            break
        rest += chunk
    assert seen + rest == b"".join(pieces) + b"\n"


@fixed
@given(inputs=st.lists(st.lists(st.binary(max_size=8), max_size=3), max_size=4))
def test_inputs_follow_one_another_and_no_line_runs_from_one_into_the_next(inputs: list[list[bytes]]) -> None:
    whole = [b"".join(parts) for parts in inputs]
    source = lines.Source([Portions(list(parts)) for parts in inputs])
    read = []
    cut = next((place for place, data in enumerate(whole) if data and not data.endswith(b"\n")), None)
    if cut is None:
        assert list(source) == split(b"".join(whole))
    else:
        with pytest.raises(InputError, match="ends inside a line"):
            for line in source:
                read.append(line)
        assert read == [line for data in whole[:cut + 1] for line in split(data)]


@pytest.mark.req("T37")
def test_the_cut_off_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1\n2")
    (tmp_path / "b").write_bytes(b"3\n")
    source = lines.Source([str(tmp_path / "a"), str(tmp_path / "b")])
    assert source.line() == b"1\n"
    with pytest.raises(InputError, match=f"the input '{tmp_path}/a' ends inside a line"):
        source.line()


def test_a_half_line_that_was_given_back_is_not_lost_silently() -> None:
    source = lines.Source([])
    source.push_back(b"half")
    with pytest.raises(InputError, match="ends inside a line"):
        source.line()


def test_a_thousand_files_are_opened_one_at_a_time(tmp_path: Path) -> None:
    paths = []
    for number in range(1100):
        path = tmp_path / str(number)
        path.write_bytes(b"%d\n" % number)
        paths.append(str(path))
    before = len(os.listdir("/proc/self/fd"))
    source = lines.Source(paths)
    for number, line in enumerate(source):
        assert line == b"%d\n" % number
        if number % 500 == 0:
            assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_vanished_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read '.*/gone': No such file"):
        lines.Source([str(tmp_path / "gone")]).line()


def test_a_stream_that_was_handed_in_stays_open(tmp_path: Path) -> None:
    stream = io.BytesIO(b"1\n")
    assert list(lines.Source([stream])) == [b"1\n"]
    assert not stream.closed


def test_lines_come_out_of_a_real_pipe_as_they_were_written(pipe: Pipe) -> None:
    data = b"".join(b"%d %s\n" % (number, b"x" * (number * 37 % 900)) for number in range(3000))

    def write() -> None:
        with open(pipe.writer, "wb", buffering=0, closefd=False) as out:
            for start in range(0, len(data), 4999):
                out.write(data[start:start + 4999])
        pipe.close(pipe.writer)

    writer = threading.Thread(target=write)
    writer.start()
    read = list(lines.Source([reading(pipe.reader)]))
    writer.join()
    assert read == split(data)


def test_a_line_is_given_out_before_the_next_one_is_written(pipe: Pipe) -> None:
    source = lines.Source([reading(pipe.reader)])
    os.write(pipe.writer, b"first\nsec")
    assert source.line() == b"first\n"
    os.write(pipe.writer, b"ond\n")
    assert source.line() == b"second\n"


@pytest.mark.skipif(sys.platform != "linux", reason="F_GETPIPE_SZ is Linux's")
def test_a_pipe_is_made_as_wide_as_a_chunk(pipe: Pipe) -> None:
    os.write(pipe.writer, b"x\n")
    assert lines.Source([reading(pipe.reader)]).line() == b"x\n"
    assert fcntl.fcntl(pipe.reader, 1032) >= lines.CHUNK_BYTES


def test_a_reader_that_goes_away_while_we_wait_for_input_is_noticed_at_once(pipe: Pipe) -> None:
    silent, out = os.pipe(), io.FileIO(pipe.writer, "w", closefd=False)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            lines.Source([reading(silent[0])], out).line()  # type: ignore[arg-type]
        except BaseException as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    pipe.close(pipe.reader)
    waiter.join(30)
    assert [type(error) for error in caught] == [BrokenPipeError]
    for end in silent:
        os.close(end)


def test_a_socket_whose_other_side_is_gone_does_not_keep_us_busy() -> None:
    silent, (near, far) = os.pipe(), socket.socketpair()
    far.close()
    began = time.process_time()
    with pytest.raises(BrokenPipeError):
        lines.wait_readable(silent[0], near.fileno(), timeout_s=30)
    with pytest.raises(BrokenPipeError):
        lines.pause(near.fileno(), 30)
    assert time.process_time() - began < 5
    near.close()
    for end in silent:
        os.close(end)


def test_waiting_ends_at_its_time_or_with_input(pipe: Pipe) -> None:
    assert lines.wait_readable(pipe.reader, None, timeout_s=0.01) is False
    assert lines.wait_readable(pipe.reader, pipe.writer, timeout_s=0.01) is False
    os.write(pipe.writer, b"x")
    assert lines.wait_readable(pipe.reader, pipe.writer, timeout_s=30) is True


def test_a_pause_lasts_as_long_as_it_says(pipe: Pipe) -> None:
    began = time.monotonic()
    lines.pause(pipe.writer, 0.05)
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize("blocking", [True, False])
def test_a_sink_writes_every_byte_to_a_slow_reader(pipe: Pipe, blocking: bool) -> None:
    data = os.urandom(1 << 20)
    os.set_blocking(pipe.writer, blocking)
    got: list[bytes] = []

    def read() -> None:
        while sum(map(len, got)) < len(data):
            got.append(os.read(pipe.reader, 5000))

    reader = threading.Thread(target=read)
    reader.start()
    lines.Sink(io.FileIO(pipe.writer, "w", closefd=False)).write(data)  # type: ignore[arg-type]
    reader.join(60)
    assert b"".join(got) == data


def test_a_line_is_there_for_the_reader_as_soon_as_it_is_emitted(pipe: Pipe) -> None:
    sink = lines.Sink(io.FileIO(pipe.writer, "w", closefd=False))  # type: ignore[arg-type]
    sink.emit({"a": "é\u2028"})
    assert os.read(pipe.reader, 100) == '{"a":"é\u2028"}\n'.encode()


def test_a_full_disk_is_an_error_that_names_the_output() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        with pytest.raises(OSError) as caught:
            lines.Sink(full).emit({})  # type: ignore[arg-type]
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "standard output")


def test_a_reader_that_is_gone_is_a_broken_pipe(pipe: Pipe) -> None:
    pipe.close(pipe.reader)
    with pytest.raises(BrokenPipeError):
        lines.Sink(io.FileIO(pipe.writer, "w", closefd=False)).emit({})  # type: ignore[arg-type]


def test_a_sink_without_descriptor_is_for_tests_and_says_so() -> None:
    stream = io.BytesIO()
    sink = lines.Sink(stream)
    sink.emit([1])
    assert stream.getvalue() == b"[1]\n"
    with pytest.raises(ValueError, match="no descriptor"):
        sink.descriptor()


TEXT = st.text(st.characters(blacklist_categories=("Cs",)))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


@fixed
@given(value=JSON)
def test_what_is_dumped_is_one_line_and_parses_to_the_same(value: Any) -> None:
    line = lines.dump(value)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert lines.parse(line, "the line") == value == json.loads(line)


@pytest.mark.parametrize("line, words", [
    (b'{"a":1,"b":{"c":1,"c":2}}', "the line is not JSON: the key 'c' stands there twice"),
    (b'{"a":NaN}', "NaN is no number"), (b'{"a":-Infinity}', "-Infinity is no number"), (b'{"a":1}x', "is not JSON"),
    (b"\xed\xa0\x80", "is not JSON"), (b'"' + b"a" * 10 + b"\n\"", "is not JSON")])
def test_what_another_reader_would_understand_otherwise_is_refused(line: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        lines.parse(line, "the line")
    assert words in caught.value.msg


def test_a_source_waits_for_a_writer_that_opens_a_fifo_late(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.extend(lines.Source([str(path)])))
    reader.start()
    with open(path, "wb") as out:
        out.write(b"1\n2\n")
    reader.join(30)
    until(lambda: not reader.is_alive(), "the reader to end")
    assert got == [b"1\n", b"2\n"]
