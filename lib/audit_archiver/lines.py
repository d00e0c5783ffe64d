"""Lines in, lines out: how every filter reads its input and notices that its reader is gone.

`Source` splits at LF bytes only (never splitlines: U+2028 and U+0085 are data). While it waits for input it
polls the output for POLLERR, so that a stage stops at once when nobody reads it any more; otherwise a stage
that waits for a slow predecessor would keep a transaction open for nobody.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import select
import sys
import time
from typing import Any, BinaryIO, Iterator, Optional, Sequence, Union

from audit_archiver.exits import ConfigError, InputError

CHUNK_BYTES = 1 << 18

_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL
_F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032  # Linux; fcntl names them from Python 3.10 on


class Source:
    """Bytes of several inputs, one after another, by line or by chunk.

    `inputs` are binary streams or paths, each opened when its turn comes; `watch` is the output whose reader must
    stay (a stream with a descriptor, or None). Raises BrokenPipeError when the reader of `watch` went away while
    waiting, InputError when an input ends inside a line, ConfigError for a path that cannot be read.
    """

    def __init__(self, inputs: Sequence[Union[BinaryIO, str]], watch: Optional[BinaryIO] = None) -> None:
        self._inputs = list(inputs)
        self._watch = _descriptor(watch)
        self._current: Optional[BinaryIO] = None
        self._inside_line = False
        self._held = b""
        self._start = 0  # bytes of _held that were given out
        self.waited_s = 0.0  # for input; what is left of a stage's life is its own work

    def chunk(self) -> bytes:
        """Some bytes (what is held back, or up to CHUNK_BYTES of input); b"" at the end of the last input."""
        if self._start < len(self._held):
            held, self._held, start, self._start = self._held, b"", self._start, 0
            return held[start:]
        return self._next()

    def push_back(self, data: bytes) -> None:
        """Give bytes back; the next read returns them first."""
        self._held, self._start = data + self._held[self._start:], 0

    def line(self) -> Optional[bytes]:
        """The next line with its LF, or None at the end."""
        parts: list[bytes] = []
        while True:
            end = self._held.find(b"\n", self._start) + 1
            if end:
                parts.append(self._held[self._start:end])
                self._start = end
                return b"".join(parts)
            if self._start < len(self._held):
                parts.append(self._held[self._start:])
            self._held, self._start = self._next(), 0
            if not self._held:
                if parts:
                    raise _cut_off("")
                return None

    def __iter__(self) -> Iterator[bytes]:
        while True:
            line = self.line()
            if line is None:
                return
            yield line

    def _next(self) -> bytes:
        """Bytes of the current input or of one after it. A line that no LF ends is cut off: none of it is used."""
        while self._current is not None or self._inputs:
            if self._current is None:
                self._current = _opened(self._inputs[0])
            data = self._read(self._current)
            if data:
                self._inside_line = not data.endswith(b"\n")
                return data
            given = self._inputs.pop(0)
            if given is not self._current:
                self._current.close()
            self._current = None
            if self._inside_line:
                raise _cut_off(f" '{given}'" if isinstance(given, str) else "")
        return b""

    def _read(self, stream: BinaryIO) -> bytes:
        descriptor = _descriptor(stream)
        if descriptor is None:
            return stream.read(CHUNK_BYTES)
        began = time.monotonic()
        wait_readable(descriptor, self._watch)
        self.waited_s += time.monotonic() - began
        return os.read(descriptor, CHUNK_BYTES)


def wait_readable(descriptor: int, watch: Optional[int], timeout_s: Optional[float] = None) -> bool:
    """Wait until `descriptor` has input or ended; False at the timeout. BrokenPipeError if `watch` lost its reader."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    if watch is not None and watch != descriptor:
        poller.register(watch, 0)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        for ready, event in poller.poll(left):
            if ready == watch and watch != descriptor:
                if event & _GONE:
                    raise BrokenPipeError("the reader of the output is gone")
            else:
                return True
        if deadline is not None and time.monotonic() >= deadline:
            return False


def pause(watch: int, seconds: float) -> None:
    """Wait `seconds`; BrokenPipeError as soon as `watch` has lost its reader."""
    poller = select.poll()
    poller.register(watch, 0)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if any(event & _GONE for _, event in poller.poll(left * 1000)):
            raise BrokenPipeError("the reader of the output is gone")


class Sink:
    """Lines out, each written whole and at once, without a buffer that could swallow an error at exit."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self._descriptor = _descriptor(stream)

    def descriptor(self) -> int:
        """The output's descriptor, for rows that flow past this process."""
        if self._descriptor is None:
            raise ValueError("the output has no descriptor")
        return self._descriptor

    def emit(self, value: Any) -> None:
        """Write one JSON line."""
        self.write(dump(value))

    def write(self, data: bytes) -> None:
        """Write all of `data`; raises OSError (ENOSPC, EPIPE) rather than losing a byte."""
        try:
            self._write(data)
        except OSError as error:
            error.filename = error.filename or "standard output"
            raise

    def _write(self, data: bytes) -> None:
        if self._descriptor is None:
            self.stream.write(data)
            return
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view):]
            except BlockingIOError:  # whoever shares the open file made it non-blocking
                _wait_writable(self._descriptor)


def dump(value: Any) -> bytes:
    """One compact JSON line with its LF, UTF-8, non-ASCII unescaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse(line: bytes, what: str) -> Any:
    """The JSON value of one line; InputError naming `what` if it is none, or says a thing twice."""
    try:
        return json.loads(line.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _opened(given: Union[BinaryIO, str]) -> BinaryIO:
    if isinstance(given, str):
        try:
            stream: BinaryIO = open(given, "rb", buffering=0)  # type: ignore[assignment]
        except OSError as error:
            raise ConfigError(f"cannot read '{given}': {error.strerror}") from None
    else:
        stream = given
    widen(_descriptor(stream))
    return stream


def _cut_off(name: str) -> InputError:
    return InputError(f"the input{name} ends inside a line",
                      hint="the command before this one was cut off; nothing of this line was used")


def widen(descriptor: Optional[int], size: int = CHUNK_BYTES) -> None:
    """Let a pipe hold `size` bytes, a whole chunk: a quarter of the reads and of the changes between two processes."""
    if descriptor is None or sys.platform != "linux":
        return
    try:
        if fcntl.fcntl(descriptor, _F_GETPIPE_SZ) < size:
            fcntl.fcntl(descriptor, _F_SETPIPE_SZ, size)
    except OSError:
        return  # no pipe, or the user's pages for pipes are used up: it is as wide as it is


def _wait_writable(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    poller.poll()


def _descriptor(stream: Optional[BinaryIO]) -> Optional[int]:
    try:
        return None if stream is None else stream.fileno()
    except (io.UnsupportedOperation, AttributeError):
        return None
