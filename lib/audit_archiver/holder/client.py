"""A stage's side of the transaction holder: one request, one answer, over the socket in AA_TXN.

The protocol is one JSON object per line (contracts.md, 4; man 7 audit-archiver). For a copy the client sends
the descriptor that the rows shall flow into, so they never pass through the client.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any, Optional

from audit_archiver import exits
from audit_archiver.exits import ArchiverError, ConfigError, Failed

_BY_CODE = {
    exits.FAILED: exits.Failed, exits.CONFIG: exits.ConfigError, exits.LOCKED: exits.LockHeld,
    exits.PERMISSION: exits.PermissionDenied, exits.RESOURCE: exits.ResourceError, exits.NETWORK: exits.NetworkError,
}


class JobFailed(ArchiverError):
    """This job cannot go on, the next one can; the holder has noted it for the report."""


class Client:
    """A connection to the holder. Raises ConfigError if AA_TXN names no living holder: never a change of mode."""

    def __init__(self, path: str, stage: str) -> None:
        self.stage = stage
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"AA_TXN names '{path}', but no transaction holder answers there: {error.strerror or error}",
                              hint="run inside 'aa-txn -- ...', or unset AA_TXN for the guarded mode") from None
        self._replies = self._socket.makefile("rb")
        self._waiting: Optional[str] = None
        self.holder = self.call("hello", stage=stage, pid=os.getpid())["holder"]

    def call(self, op: str, descriptor: Optional[int] = None, **fields: Any) -> dict[str, Any]:
        """Send one operation and return its answer; a refusal is raised with the holder's code and words."""
        self.ask(op, descriptor, **fields)
        return self.answer()

    def ask(self, op: str, descriptor: Optional[int] = None, **fields: Any) -> None:
        """Send one operation, whose answer is to be fetched before the next is sent; until then `fileno` can be polled."""
        request = json.dumps({"op": op, **fields}, ensure_ascii=False).encode() + b"\n"
        self._waiting = op
        try:
            if descriptor is None:
                self._socket.sendall(request)
            else:
                sent = socket.send_fds(self._socket, [request], [descriptor])
                self._socket.sendall(request[sent:])
        except OSError as error:
            raise Failed(f"the transaction holder went away during '{op}': {error.strerror}") from None

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to what was asked."""
        op = self._waiting
        try:
            line = self._replies.readline()
        except OSError as error:
            raise Failed(f"the transaction holder went away during '{op}': {error.strerror}") from None
        self._waiting = None
        if not line.endswith(b"\n"):
            raise Failed(f"the transaction holder went away during '{op}'",
                         hint="it says why on its own standard error; nothing of this batch was committed by it")
        answer = json.loads(line)
        if not answer.get("ok"):
            raise _refusal(answer)
        return answer

    def fileno(self) -> int:
        """The socket's descriptor: readable when an answer is there, or the holder gone."""
        return self._socket.fileno()

    def bye(self, code: int, error: Optional[ArchiverError], busy_s: float = 0.0) -> None:
        """Say the exit code, the last words and how long we worked; after a code other than 0 nothing more is committed.

        Its answer is waited for, unless a signal broke into another call: the answer to that one may be a copy away.
        """
        words: dict[str, Any] = {"code": code, "busy_s": round(busy_s, 3)}
        if error is not None:
            words.update(msg=str(error), retry=error.retry)
        try:
            if self._waiting:
                self._socket.sendall(json.dumps({"op": "bye", **words}, ensure_ascii=False).encode() + b"\n")
            else:
                self.call("bye", **words)
        except (ArchiverError, OSError):
            return  # the holder is gone: it has rolled back already, and the exit code says why we end
        finally:
            self._replies.close()
            self._socket.close()


def _refusal(answer: dict[str, Any]) -> ArchiverError:
    kind = JobFailed if answer.get("scope") == "job" else _BY_CODE.get(answer.get("code", exits.FAILED), Failed)
    error = kind(answer.get("msg", "refused"), detail=answer.get("detail"), hint=answer.get("hint"),
                 sqlstate=answer.get("sqlstate"))
    error.retry = bool(answer.get("retry"))
    error.code = answer.get("code", exits.FAILED)
    return error
