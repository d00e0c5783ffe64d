"""What a command and the servers behind it cost: wall time, CPU seconds, peak memory of every process.

Peak memory of each process is its VmHWM, looked at twenty times a second. The kernel's own maximum over the
command and all it waited for (ru_maxrss) is an upper bound only: it counts our own size before exec, too.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

POLL_S = 0.05
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Cost:
    """One measured command. Memory in MB of 10^6 bytes; `peaks` by process name, the largest of each name, and
    `client_cpu_by_name`, which lacks what a process did after the last look at it."""

    code: int
    wall_s: float
    client_cpu_s: float
    max_rss_mb: float
    out: bytes
    err: bytes
    peaks: dict[str, float] = field(default_factory=dict)
    client_cpu_by_name: dict[str, float] = field(default_factory=dict)
    server_cpu_s: dict[str, float] = field(default_factory=dict)


def run(argv: Sequence[str], *, env: Mapping[str, str], servers: Mapping[str, int],
        stdout: Optional[int] = None) -> Cost:
    """Run `argv` to its end. `servers` maps a name to the process id at the root of a server's process tree."""
    before = {name: tree_cpu_s(pid) for name, pid in servers.items()}
    began = time.monotonic()
    child = subprocess.Popen(argv, env=dict(env), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             stdout=subprocess.PIPE if stdout is None else stdout, start_new_session=True)
    peaks: dict[str, float] = {}
    spent: dict[int, tuple[str, float]] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(child.pid, peaks, spent, ended), daemon=True)
    watcher.start()
    caught: dict[str, bytes] = {"out": b"", "err": b""}
    readers = [threading.Thread(target=_drain, args=(stream, caught, name), daemon=True)
               for name, stream in (("out", child.stdout), ("err", child.stderr)) if stream is not None]
    for reader in readers:
        reader.start()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    for thread in [watcher, *readers]:
        thread.join()
    by_name: dict[str, float] = {}
    for name, seconds in spent.values():
        by_name[name] = by_name.get(name, 0.0) + seconds
    return Cost(child.returncode, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6,
                caught["out"], caught["err"], peaks, by_name,
                {name: tree_cpu_s(pid) - before[name] for name, pid in servers.items()})


def tree_cpu_s(root: int) -> float:
    """CPU seconds of a process, of its living children, and of the children it has waited for.

    A child that ends while we look could be in neither sum, so we look until the children stay the same.
    """
    seen: dict[int, int] = {-1: 0}
    while True:
        table = _processes()
        found = {pid: own + (waited if pid == root else 0) for pid, (parent, own, waited) in table.items() if root in (pid, parent)}
        if found.keys() == seen.keys():
            return sum(found.values()) / TICKS
        seen = found
        time.sleep(POLL_S)


def _below(root: int, table: Mapping[int, tuple[int, int, int]]) -> list[int]:
    """`root` and everything below it in a table of processes."""
    found, fresh = {root}, {root}
    while fresh:
        fresh = {pid for pid, (parent, _, _) in table.items() if parent in fresh} - found
        found |= fresh
    return [pid for pid in found if pid in table]


def _processes() -> dict[int, tuple[int, int, int]]:
    """pid -> (parent, own CPU ticks, ticks of children waited for)."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            table[int(entry)] = (int(fields[1]), int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14]))
    return table


def _watch(root: int, peaks: dict[str, float], spent: dict[int, tuple[str, float]], ended: threading.Event) -> None:
    while not ended.wait(POLL_S):
        table = _processes()
        for pid in _below(root, table):
            name, peak = _peak(pid)
            if name:
                peaks[name] = max(peaks.get(name, 0.0), peak)
                spent[pid] = (name, table[pid][1] / TICKS)


def _peak(pid: int) -> tuple[str, float]:
    """("aa-upload", 61.2): what the process is called, and the most memory it has had so far in MB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        comm = Path(f"/proc/{pid}/comm").read_bytes().strip()
        words = [comm] if comm.startswith(b"aa-") else Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "", 0.0
    marked = [line for line in status.split("\n") if line.startswith("VmHWM:")]
    if not marked:
        return "", 0.0
    return _name(words), int(marked[0].split()[1]) * 1024 / 1e6


def _name(words: Sequence[bytes]) -> str:
    """The program, or the script or module that an interpreter runs."""
    names = [os.fsdecode(word) for word in words if word]
    if not names:
        return ""
    if os.path.basename(names[0]).startswith("python") and len(names) > 1:
        return names[2] if names[1] == "-m" and len(names) > 2 else os.path.basename(names[1])
    return os.path.basename(names[0])


def _drain(stream: Any, caught: dict[str, bytes], name: str) -> None:
    with stream:
        caught[name] = stream.read()
