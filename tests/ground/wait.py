"""Waiting without sleeping: look again until it is so, with a deadline and one patience factor for slow machines."""

from __future__ import annotations

import os
import time
from typing import Callable, TypeVar

T = TypeVar("T")

PATIENCE = float(os.environ.get("AA_TEST_PATIENCE", "1"))
POLL_S = 0.01


def until(check: Callable[[], T], what: str, seconds: float = 30.0, poll_s: float = POLL_S) -> T:
    """Call `check` until it returns something true, and return that.

    `seconds` is multiplied by AA_TEST_PATIENCE; it looks every `poll_s` seconds. Raises AssertionError naming `what` when the time is up.
    """
    deadline = time.monotonic() + seconds * PATIENCE
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {seconds * PATIENCE:g} s in vain: {what}")
        time.sleep(poll_s)
