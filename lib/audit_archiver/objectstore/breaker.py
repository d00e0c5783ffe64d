"""The circuit breaker: a store that does not answer is not asked again and again.

Closed while it answers. Open once so many operations in a row were given up after all their retries: then each fails
at once. After a while one is let through (half open); it closes the circuit, or opens it for as long again.
"""

from __future__ import annotations

import threading
import time
from typing import Callable


class Breaker:
    """Counts what was given up in a row; `failures` opens it for `reset_s` seconds (0: never opens)."""

    def __init__(self, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures, self._reset_s, self._clock = failures, reset_s, clock
        self._lock = threading.Lock()
        self._given_up, self._asked_at = 0, 0.0

    @property
    def given_up(self) -> int:
        """How many operations in a row were given up."""
        return self._given_up

    def admits(self) -> bool:
        """Whether an operation may be tried now: always while closed, one after each `reset_s` while open."""
        with self._lock:
            if not self._failures or self._given_up < self._failures:
                return True
            now = self._clock()
            if now - self._asked_at < self._reset_s:
                return False
            self._asked_at = now
            return True

    def failed(self) -> None:
        """An operation was given up."""
        with self._lock:
            self._given_up += 1
            self._asked_at = self._clock()

    def answered(self) -> None:
        """The store answered, whatever it said."""
        if self._given_up:
            with self._lock:
                self._given_up = 0
