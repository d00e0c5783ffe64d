"""How fast this process may ask the store: token buckets for requests and for bytes, and less of both for a store that is busy.

S3 allows 3,500 writes and 5,500 reads a second below a prefix (REQ-NET-010); a configured limit takes the place of both.
A store that answers SlowDown gets half of what it just got, and a fifth more with every answer after that. botocore's
adaptive mode would do the like, but from one request in two seconds upwards, and its waits do not end when our reader is gone.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Callable, Optional

WRITES_PER_S, READS_PER_S = 3500.0, 5500.0
LEAST_PER_S = 1.0
CALM_S = 1.0  # refusals so close together are one: they were under way when the first came back
RECOVERY = 1.2

Clock = Callable[[], float]


class Bucket:
    """Tokens that come back `per_s` a second, up to a second's worth; what is taken beyond them has to be waited for."""

    def __init__(self, per_s: float, clock: Clock = time.monotonic) -> None:
        self.most = self.per_s = per_s
        self._clock, self._lock = clock, threading.Lock()
        self._tokens, self._at = per_s, clock()
        self._recent, self._refused_at = 0.0, -math.inf

    def take(self, amount: float = 1.0) -> float:
        """Take `amount` now; the seconds to wait before using it."""
        with self._lock:
            now = self._clock()
            passed, self._at = now - self._at, now
            self._recent = self._recent * math.exp(-passed) + amount
            self._tokens = min(self.per_s, self._tokens + passed * self.per_s) - amount
            return max(0.0, -self._tokens / self.per_s)

    def refused(self) -> None:
        """The store had enough: from now on half of what it got in the last second."""
        with self._lock:
            now = self._clock()
            if now - self._refused_at >= CALM_S:
                self._refused_at = now
                self.per_s = max(LEAST_PER_S, min(self.per_s, self._recent) / 2)
                self._tokens = min(self._tokens, self.per_s)

    def answered(self) -> None:
        """The store keeps up."""
        if self.per_s < self.most:
            with self._lock:
                self.per_s = min(self.most, self.per_s * RECOVERY)


class Pace:
    """The buckets of one process; `requests_per_s` and `bytes_per_s` as configured, None for the defaults."""

    def __init__(self, requests_per_s: Optional[float], bytes_per_s: Optional[float], clock: Clock = time.monotonic) -> None:
        self._writes = Bucket(requests_per_s or WRITES_PER_S, clock)
        self._reads = self._writes if requests_per_s else Bucket(READS_PER_S, clock)
        self._bytes = Bucket(bytes_per_s, clock) if bytes_per_s else None

    def request(self, operation: str, size: int = 0) -> float:
        """Seconds to wait before an API operation that sends a body of `size` bytes."""
        return max(self._bucket(operation).take(), self.bytes(size))

    def bytes(self, count: int) -> float:
        """Seconds to wait for the place of `count` bytes that were or will be moved."""
        return self._bytes.take(count) if self._bytes is not None and count else 0.0

    def refused(self, operation: str) -> float:
        """The store asked us to slow down; the requests a second that it gets now."""
        bucket = self._bucket(operation)
        bucket.refused()
        return bucket.per_s

    def answered(self, operation: str) -> None:
        """The store answered."""
        self._bucket(operation).answered()

    def _bucket(self, operation: str) -> Bucket:
        return self._reads if operation.startswith(("get_", "head_", "list_")) else self._writes
