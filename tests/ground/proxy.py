"""A TCP proxy that makes faults: delay, a rate limit, a cut after n bytes, a stall, a refusal.

    with Proxy("/var/tmp/aa-pg-x/.s.PGSQL.5432") as proxy:   # or ("127.0.0.1", 41873)
        proxy.cut_after = 100_000                            # counts bytes to the client from now on
        connect(host="127.0.0.1", port=proxy.port)

Every fault can be set and unset while connections are open.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from typing import Optional, Union

Target = Union[str, tuple[str, int]]
CHUNK_BYTES = 1 << 16
POLL_S = 0.02


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes bytes to `target` (a socket path, or host and port).

    latency_s     delay before each piece of data goes on, in either direction
    rate          bytes a second, each direction of each connection; None: unlimited
    cut_after     reset the connection once so many bytes went to the client (answers); None: never
    cut_after_up  the same for bytes from the client (requests)
    stall         while true nothing goes on in either direction and nothing is closed
    stall_down    the same for answers only: requests arrive, their answers do not
    refuse        while true new connections are reset at once
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.latency_s = 0.0
        self.rate: Optional[float] = None
        self.stall = self.stall_down = self.refuse = False
        self.up_bytes = self.down_bytes = self.connections = 0
        self._limits: dict[str, Optional[int]] = {"up": None, "down": None}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._forgotten: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def cut_after(self) -> Optional[int]:
        """Bytes to the client that are still allowed."""
        return self._limits["down"]

    @cut_after.setter
    def cut_after(self, count: Optional[int]) -> None:
        self._limits["down"] = count

    @property
    def cut_after_up(self) -> Optional[int]:
        """Bytes from the client that are still allowed."""
        return self._limits["up"]

    @cut_after_up.setter
    def cut_after_up(self, count: Optional[int]) -> None:
        self._limits["up"] = count

    def cut(self) -> None:
        """Reset every open connection now."""
        with self._lock:
            ends = list(self._open)
        for end in ends:
            _reset(end)

    def forget(self) -> None:
        """The connections that are open now stay open, and nothing goes through them any more: a firewall that forgot them."""
        with self._lock:
            self._forgotten |= self._open

    def close(self) -> None:
        """Stop listening, reset what is open, wait for the threads."""
        self._ended.set()
        _reset(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                if not select.select([self._listener], [], [], POLL_S)[0]:
                    continue
                client, _ = self._listener.accept()
            except (OSError, ValueError):  # the listener was closed
                return
            self.connections += 1
            if self.refuse:
                _reset(client)
                continue
            try:
                server = _connect(self.target)
            except OSError:
                _reset(client)
                continue
            with self._lock:
                self._open |= {client, server}
            for direction, source, sink in (("up", client, server), ("down", server, client)):
                thread = threading.Thread(target=self._pump, args=(direction, source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        """Pass bytes one way until their end, a cut, or the proxy's end."""
        try:
            while not self._ended.is_set():
                if not select.select([source], [], [], POLL_S)[0]:
                    continue
                if self._stalled(direction) or source in self._forgotten:
                    self._ended.wait(POLL_S)
                    continue
                data = source.recv(CHUNK_BYTES)
                if not data:
                    with contextlib.suppress(OSError):
                        sink.shutdown(socket.SHUT_WR)
                    return
                if self.latency_s:
                    self._ended.wait(self.latency_s)
                while self._stalled(direction) and not self._ended.is_set():  # it began while the data was in our hands
                    self._ended.wait(POLL_S)
                allowed, cut = self._take(direction, len(data))
                self._send(sink, data[:allowed])
                if cut:
                    _reset(source)
                    _reset(sink)
                    return
        except (OSError, ValueError):
            _reset(source)
            _reset(sink)
        finally:
            with self._lock:
                self._open.discard(source)

    def _stalled(self, direction: str) -> bool:
        return self.stall or (self.stall_down and direction == "down")

    def _take(self, direction: str, count: int) -> tuple[int, bool]:
        """How many of `count` bytes may pass, and whether the connection is cut after them."""
        with self._lock:
            left = self._limits[direction]
            allowed = count if left is None else min(count, left)
            if left is not None:
                self._limits[direction] = left - allowed
            if direction == "up":
                self.up_bytes += allowed
            else:
                self.down_bytes += allowed
            return allowed, left is not None and left - allowed <= 0

    def _send(self, sink: socket.socket, data: bytes) -> None:
        if self.rate is None:
            sink.sendall(data)
            return
        began, sent = time.monotonic(), 0
        while sent < len(data) and not self._ended.is_set():
            due = int((time.monotonic() - began) * self.rate) + 1 - sent
            if due <= 0:
                self._ended.wait(POLL_S / 4)
                continue
            piece = data[sent:sent + due]
            sink.sendall(piece)
            sent += len(piece)


def _connect(target: Target) -> socket.socket:
    if isinstance(target, str):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.connect(target)
        return made
    return socket.create_connection(target)


def _reset(end: socket.socket) -> None:
    """Close with a reset instead of an orderly end, so that the peer sees a broken connection."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
