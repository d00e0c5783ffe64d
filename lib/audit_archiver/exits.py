"""Exit codes and the errors that carry them: one table for every command.

The codes are those of Appendix D of the requirements. "I looked and it is wrong" (1, 2) never shares
a code with "I could not look" (5, 6, 7). Man pages generate their EXIT STATUS from `TABLE`.
"""

from __future__ import annotations

from typing import Iterable, Optional

OK = 0
SOME_FAILED = 1
FAILED = 2
CONFIG = 3
LOCKED = 4
PERMISSION = 5
RESOURCE = 6
NETWORK = 7
READER_GONE = 141

TABLE = {
    OK: "done, or nothing to do",
    SOME_FAILED: "some tables failed, the others were done",
    FAILED: "failed; nothing was lost, see the message",
    CONFIG: "configuration, usage or preflight error",
    LOCKED: "the lock is held by another run",
    PERMISSION: "the database or the object store denied permission",
    RESOURCE: "not enough memory, disk space or connections",
    NETWORK: "the database or the object store could not be reached",
    READER_GONE: "the reader of the output went away (128 + SIGPIPE)",
}


def combined(codes: Iterable[int]) -> int:
    """The code of several pieces of work: 0 if all is done; 1 if some failed; all for one reason: its code; else 2 (Appendix D)."""
    found = set(codes)
    if not found - {OK}:
        return OK
    if found & {OK, SOME_FAILED}:
        return SOME_FAILED
    return found.pop() if len(found) == 1 else FAILED


class ArchiverError(Exception):
    """An error a person can act on: message, then detail, then hint (PostgreSQL's order).

    `msg` starts with what is wrong and quotes its subject in single quotes; `hint` says what to do;
    `at` is FILE:LINE where a configuration is to blame. `code` is the exit code, `retry` says whether
    the same attempt can succeed later. None of the texts may hold a secret or row content.
    """

    code = FAILED
    retry = False

    def __init__(self, msg: str, *, detail: Optional[str] = None, hint: Optional[str] = None,
                 at: Optional[str] = None, sqlstate: Optional[str] = None) -> None:
        super().__init__(msg)
        self.msg, self.detail, self.hint, self.at, self.sqlstate = msg, detail, hint, at, sqlstate

    def __str__(self) -> str:
        text = f"{self.at}: {self.msg}" if self.at else self.msg
        if self.detail:
            text += f"; {self.detail}"
        if self.hint:
            text += f". {self.hint}"
        return text


class Failed(ArchiverError):
    """The work was tried and did not succeed."""


class SomeFailed(ArchiverError):
    """Some tables failed, the others were done."""

    code = SOME_FAILED


class InputError(ArchiverError):
    """A line, frame or file that was read is not what its format allows: refused, nothing was touched."""


class Mismatch(ArchiverError):
    """Counts, digests or contents that must be equal differ: never delete."""


class ConfigError(ArchiverError):
    """The configuration, a flag or a preflight finding forbids the work."""

    code = CONFIG


class LockHeld(ArchiverError):
    """Another run holds the lock; the message names it."""

    code = LOCKED


class PermissionDenied(ArchiverError):
    """PostgreSQL or the object store refused for want of a privilege."""

    code = PERMISSION


class ResourceError(ArchiverError):
    """Memory, disk or connections ran out."""

    code = RESOURCE


class NoConnectionFree(ResourceError):
    """The server has no connection to give now; somebody else may end one soon."""

    retry = True


class NetworkError(ArchiverError):
    """PostgreSQL or the object store cannot be reached, or the connection broke."""

    code = NETWORK
    retry = True


class Retryable(ArchiverError):
    """A transient failure of the database: lock timeout, serialization failure, deadlock, cancelled statement."""

    retry = True
