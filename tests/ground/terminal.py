"""A pseudo-terminal around a command: what a person sees, and what they type.

    with Terminal("aa-archive", ["-c", path]) as terminal:
        terminal.expect("[y/N] "); terminal.type("y\\n"); assert terminal.end() == 0; print(terminal.seen)
"""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

from tests.ground.run import spawn
from tests.ground.wait import PATIENCE, until

CTRL_C, EOF = "\x03", "\x04"


class Terminal:
    """A command whose standard streams are one terminal of `columns`; with `stdout` given, stdin and stderr only."""

    def __init__(self, name: str, argv: Sequence[Union[str, Path]], env: Optional[Mapping[str, Any]] = None, *,
                 columns: int = 150, stdout: Any = None) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._seen = b""
        self.child = spawn(name, argv, env, stdin=theirs, stderr=theirs, stdout=theirs if stdout is None else stdout,
                           start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # so that Ctrl-C is heard
        os.close(theirs)
        os.set_blocking(self._ours, False)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self._ours)

    @property
    def seen(self) -> str:
        """Everything written to the terminal so far."""
        try:
            while data := os.read(self._ours, 1 << 16):
                self._seen += data
        except (BlockingIOError, OSError):  # EIO: the last writer has closed it
            pass
        return self._seen.decode()

    def expect(self, text: str, seconds: float = 30.0) -> None:
        """Wait until `text` stands on the terminal."""
        def there() -> bool:
            gone = self.child.poll() is not None
            seen = self.seen
            assert text in seen or not gone, f"the command ended with {self.child.returncode} without saying '{text}': {seen}"
            return text in seen
        until(there, f"the terminal shows '{text}'", seconds)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def end(self, seconds: float = 60.0) -> int:
        """Wait for the end of the command; its exit code."""
        until(lambda: self.seen is not None and self.child.poll() is not None, "the command ends", seconds)
        try:
            return self.child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError("the command did not end") from None
