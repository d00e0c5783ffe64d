"""Processes: start a server that dies with us or outlives us, see whether one is alive, stop one by its pid.

A stopped daemon may linger as a zombie where nobody reaps it, so `alive` looks at the state and not only at
kill(pid, 0). Numbers come from /proc, or from ps where there is no /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO, Callable, Mapping, Optional, Sequence

from tests.ground.wait import until

PR_SET_PDEATHSIG = 1


def state(pid: int) -> Optional[str]:
    """The one-letter state of a process (R, S, D, T, Z ...), or None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:  # a hundred times a second for each process there is
            return stat.read(1024).rpartition(b")")[2].split()[0].decode()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    seen = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], stdout=subprocess.PIPE, text=True, check=False)
    return seen.stdout.strip()[:1] or None


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return state(pid) not in (None, "Z", "X")


def stop(pid: int, signum: int = signal.SIGTERM, seconds: float = 30.0) -> None:
    """Send `signum`, wait until the process has ended, and use SIGKILL when it has not done so in `seconds`."""
    if not alive(pid):
        return
    os.kill(pid, signum)
    try:
        until(lambda: not alive(pid), f"process {pid} ends after signal {signum}", seconds)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid), f"process {pid} ends after SIGKILL", seconds)


def start(argv: Sequence[str], *, log: BinaryIO, outlive: bool, account: Optional[pwd.struct_passwd] = None,
          env: Optional[Mapping[str, str]] = None, cwd: Optional[Path] = None, end: int = signal.SIGTERM,
          stdout: Optional[int] = None) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own.

    Unless it may `outlive` us, it gets the signal `end` when we die, however we die (Linux). `account` is whom
    root becomes for it. Its stderr, and stdout unless given, go to `log`.
    """
    who: dict[str, Any] = {}
    if account is not None:
        who = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log if stdout is None else stdout, stderr=log,
                            env=dict(os.environ if env is None else env), cwd=cwd, start_new_session=True,
                            preexec_fn=None if outlive else _die_with_parent(end), **who)


def _die_with_parent(signum: int) -> Optional[Callable[[], None]]:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)

    return ask


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now, for a server that does not say which one it took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty if it is gone or not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            raw = file.read()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def pids() -> list[int]:
    """Every process id there is."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def command(pid: int) -> str:
    """The command line of a process, or the name that a stage has given itself; empty if it does not run."""
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name.startswith("aa-"):
            return name
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    seen = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], stdout=subprocess.PIPE, text=True, check=False)
    return seen.stdout.strip()
