"""What the backends beside PostgreSQL keep of a lock, and the four operations that each of them has.

A record outlives its owner, so it carries a heartbeat and a fencing token. The token grows with every taking and never
falls, even where the backend has forgotten everything: it is the number after the last one, and no less than the
milliseconds since 1970. Who holds a lock is who has its present token, and nobody else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Optional, Protocol

from audit_archiver.exits import LockHeld


@dataclass(frozen=True)
class Record:
    """A lock that is held. `server` is the database that its owner works on: system identifier, timeline, oid."""

    name: str
    owner: str
    server: str
    since: str
    token: int
    heartbeat_age_s: float

    @property
    def words(self) -> str:
        """One line for a person."""
        return f"{self.owner}, since {self.since}, token {self.token}, heartbeat {self.heartbeat_age_s:.0f} s ago"

    def as_json(self) -> dict[str, Any]:
        """What --output json says."""
        return asdict(self)

    def refusal(self, backend: str) -> LockHeld:
        """The error of who finds it."""
        return LockHeld(f"'{self.name}' is locked in {backend}: {self.words}",
                        hint="wait for it; 'aa-lock --show' names it, 'aa-lock --break' removes it")


class Backend(Protocol):
    """Where records lie. Every method raises NetworkError, PermissionDenied, ResourceError or ConfigError if that place cannot be used."""

    title: str

    def take(self, name: str, owner: str, server: str, stale_s: float) -> tuple[int, Optional[Record]]:
        """Take a lock: its token, and the record that was left behind and is replaced, if there was one.

        Raises LockHeld for a record with a heartbeat within `stale_s`, unless it is of the same `server`: who calls holds
        PostgreSQL's own lock there, which proves that its owner does not.
        """

    def beat(self, name: str, token: int) -> bool:
        """A sign of life; False if the lock has not this token any more."""

    def release(self, name: str, token: Optional[int]) -> bool:
        """Remove the record if it has this token, with None whatever it has; True if there was one."""

    def look(self, name: str) -> list[Record]:
        """The record of a lock and those of the locks below it (`name`/...), of those that are held."""


def covers(name: str, other: str) -> bool:
    """True if `other` is `name` or below it."""
    return other == name or other.startswith(f"{name}/")


def next_token(last: int, now_ms: int) -> int:
    """The token after `last`."""
    return max(last + 1, now_ms)
