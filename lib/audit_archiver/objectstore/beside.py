"""One request beside another: the second round trip of a batch costs nothing where latency rules."""

from __future__ import annotations

import threading
from typing import Callable, Generic, Optional, TypeVar

Answer = TypeVar("Answer")


class Beside(Generic[Answer]):
    """Runs `work` in a thread of its own; `result()` waits for it and raises what it raised.

    The thread is a daemon: a stage that stops does not wait for the timeout of a request nobody needs any more.
    """

    def __init__(self, work: Callable[[], Answer]) -> None:
        self._work = work
        self._answer: Optional[Answer] = None
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> Answer:
        """What `work` returned."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answer  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._answer = self._work()
        except BaseException as error:  # raised again in the thread that asks
            self._error = error
