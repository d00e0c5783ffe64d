"""One stage's connection as the holder sees it: requests and descriptors in, answers out, and who it is."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
from typing import Any, Optional

from audit_archiver import log
from audit_archiver.exits import ArchiverError


class Caller:
    """One connection of a stage; receives one request at a time, with the descriptor that rides with it."""

    _count = 0

    def __init__(self, connection: socket.socket) -> None:
        Caller._count += 1
        self.number = Caller._count
        self.stage: Optional[str] = None
        self.serving = self.ended = False
        self._connection = connection
        self._held = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket's descriptor, -1 once closed."""
        return self._connection.fileno()

    def last_words(self) -> Optional[dict[str, Any]]:
        """The request that waits to be read, None if there is nothing any more; it stays where it is."""
        try:
            data = self._connection.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return None
        return _request(data.partition(b"\n")[0]) if data else None

    def receive(self) -> tuple[Optional[dict[str, Any]], Optional[int]]:
        """The next request and its descriptor (close-on-exec, blocking), or (None, None) at the end."""
        descriptor: Optional[int] = None
        while b"\n" not in self._held:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._connection, 1 << 16, 4)
            except OSError:
                data, descriptors = b"", []
            for extra in descriptors:
                os.set_inheritable(extra, False)
                if descriptor is None:
                    descriptor = extra
                    os.set_blocking(descriptor, True)
                else:
                    os.close(extra)
            if not data:
                if descriptor is not None:
                    os.close(descriptor)
                return None, None
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return _request(line), descriptor

    def send(self, answer: dict[str, Any]) -> None:
        """Send one answer; a client that is gone shows at the next receive."""
        try:
            with self._sending:
                self._connection.sendall(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            log.debug("holder.send", f"an answer found no reader: {error.strerror}", stage_name=self.stage)

    def hang_up(self) -> None:
        """Wake whoever waits on this connection."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("holder.hangup", f"the client was gone already: {error.strerror}", stage_name=self.stage)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _request(line: bytes) -> dict[str, Any]:
    """The object in a line; an empty one, which no operation accepts, if it holds anything else."""
    try:
        request = json.loads(line)
    except ValueError:
        return {}
    return request if isinstance(request, dict) else {}


def refusal(error: ArchiverError) -> dict[str, Any]:
    """An error as the protocol says it."""
    words = {"ok": False, "code": error.code, "retry": error.retry, "msg": str(error), "sqlstate": error.sqlstate,
             "scope": getattr(error, "scope", None)}
    return {key: value for key, value in words.items() if value is not None}


def same_user(connection: socket.socket) -> bool:
    """True if the process at the other end runs under our own account."""
    if not sys.platform.startswith("linux"):
        return True  # the 0700 directory keeps others out
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", packed)[1] == os.geteuid()
