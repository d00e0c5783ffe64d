"""A TCP line of our own in front of a server, which breaks once when so many bytes have passed."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import Optional, Union

Target = Union[str, tuple[str, int]]
CHUNK_BYTES = 1 << 16
POLL_S = 0.05


class Line:
    """Listens on a free port of 127.0.0.1 and passes bytes to `target`, a socket's path or (host, port).

    `cut_after`: once so many bytes have passed, both directions counted, every open connection is reset, once. New ones are served.
    """

    def __init__(self, target: Target, cut_after: Optional[int] = None) -> None:
        self._target, self.cut_after = target, cut_after
        self.passed, self.cuts = 0, 0
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="line", daemon=True).start()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()
        self._reset_all()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                if not select.select([self._listener], [], [], POLL_S)[0]:
                    continue
                client, _ = self._listener.accept()
            except (OSError, ValueError):  # the listener was closed
                return
            try:
                server = _connected(self._target)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), name="line", daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Pass bytes one way until their end, the cut, or ours."""
        try:
            while data := source.recv(CHUNK_BYTES):
                if self._due(len(data)):
                    self._reset_all()
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):
            _reset(source)
            _reset(sink)

    def _due(self, count: int) -> bool:
        """Count bytes; True for those that are not to arrive any more."""
        with self._lock:
            self.passed += count
            due = self.cut_after is not None and not self.cuts and self.passed >= self.cut_after
            self.cuts += due
            return due

    def _reset_all(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _reset(end)


def _connected(target: Target) -> socket.socket:
    if isinstance(target, tuple):
        return socket.create_connection(target, timeout=None)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.connect(target)
    return made


def _reset(end: socket.socket) -> None:
    """Break a connection off, so that its peer sees an error and whoever reads from it here wakes up."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    end.close()
