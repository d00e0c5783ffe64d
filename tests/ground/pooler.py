"""A connection pooler in transaction mode, as PgBouncer is: clients share a few backends, and change them after each transaction.

    with Pooler(db.host, db.port, backends=2) as pooler:
        connect(host="127.0.0.1", port=pooler.port)

It speaks as much of the protocol as psycopg2 uses: simple queries and COPY TO, no TLS, no password towards the server. Whoever
comes next gets the backend that was unused longest, and a client that leaves leaves its backend's session as it is.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import struct
import threading
from typing import Optional

PROTOCOL = 196608
NOT_A_STARTUP = (80877103, 80877104)  # requests for TLS and GSS encryption
MADE_UP_PID = 4711


class Pooler:
    """Listens on a free port of 127.0.0.1; `backends` sessions per user and database on the server's socket."""

    def __init__(self, directory: str, port: int, backends: int = 2) -> None:
        self._socket, self._size = f"{directory}/.s.PGSQL.{port}", backends
        self._free: dict[bytes, collections.deque[socket.socket]] = {}
        self._greeting: dict[bytes, bytes] = {}
        self._changed = threading.Condition()
        self._open: list[socket.socket] = []
        self._ended = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Pooler:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(client)
            threading.Thread(target=self._client, args=(client,), daemon=True).start()

    def _client(self, client: socket.socket) -> None:
        """One client, from its startup to its end; a backend is its own only while its transaction is open."""
        backend: Optional[socket.socket] = None
        with contextlib.suppress(OSError, EOFError):
            wanted = self._startup(client)
            client.sendall(_message(b"R", struct.pack("!i", 0)) + self._greeting[wanted]
                           + _message(b"K", struct.pack("!ii", MADE_UP_PID, 1)) + _message(b"Z", b"I"))
            while True:
                kind, body = _read(client)
                if kind == b"X":
                    break
                backend = backend or self._take(wanted)
                backend.sendall(_message(kind, body))
                if self._answer(backend, client) == b"I":
                    self._give(wanted, backend)
                    backend = None
        if backend is not None:  # it left in the middle: its transaction must not become somebody else's
            backend.close()
        client.close()

    def _startup(self, client: socket.socket) -> bytes:
        """The parameters that the client asks for, once its pool is there."""
        while True:
            (length,) = struct.unpack("!i", _exactly(client, 4))
            body = _exactly(client, length - 4)
            (code,) = struct.unpack("!i", body[:4])
            if code == PROTOCOL:
                break
            assert code in NOT_A_STARTUP, code
            client.sendall(b"N")
        words = body[4:].rstrip(b"\0").split(b"\0")
        given = dict(zip(words[::2], words[1::2]))
        wanted = b"".join(name + b"\0" + given[name] + b"\0" for name in (b"user", b"database", b"client_encoding")) + b"\0"
        with self._changed:
            if wanted not in self._free:
                self._free[wanted] = collections.deque(self._backend(wanted) for _ in range(self._size))
        return wanted

    def _backend(self, wanted: bytes) -> socket.socket:
        backend = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        backend.connect(self._socket)
        self._open.append(backend)
        backend.sendall(struct.pack("!ii", len(wanted) + 8, PROTOCOL) + wanted)
        greeting = b""
        while True:
            kind, body = _read(backend)
            assert kind != b"E" and (kind != b"R" or body == b"\0\0\0\0"), body
            if kind == b"S":
                greeting += _message(kind, body)
            if kind == b"Z":
                self._greeting[wanted] = greeting
                return backend

    def _take(self, wanted: bytes) -> socket.socket:
        with self._changed:
            self._changed.wait_for(lambda: self._free[wanted], 60)
            return self._free[wanted].popleft()

    def _give(self, wanted: bytes, backend: socket.socket) -> None:
        with self._changed:
            self._free[wanted].append(backend)
            self._changed.notify()

    @staticmethod
    def _answer(backend: socket.socket, client: socket.socket) -> bytes:
        """Pass an answer on, up to the state of the transaction after it."""
        while True:
            kind, body = _read(backend)
            client.sendall(_message(kind, body))
            if kind == b"Z":
                return body


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def _read(end: socket.socket) -> tuple[bytes, bytes]:
    kind, length = struct.unpack("!ci", _exactly(end, 5))
    return kind, _exactly(end, length - 4)


def _exactly(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = end.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
