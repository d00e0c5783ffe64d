"""The child processes of a driver: a command that somebody wrote, or the stages, which are forks of the driver.

Seven interpreters that each import botocore cost more than a small batch: 1.3 s of CPU. The driver has imported all of
it before the first stage starts, so on Linux a stage is a fork that runs the stage's `main` with the arguments, the
environment and the descriptors that its launcher would get. `ps -o comm` shows it under the stage's name.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Mapping, NoReturn, Optional, Sequence, Union

from audit_archiver import log
from audit_archiver.cli import STOP_SIGNALS, leave
from audit_archiver.exits import Failed

END_GRACE_S = 5.0
POLL_S = 0.005


class Fork:
    """A stage as a fork of this process, with those parts of subprocess.Popen that the drivers use.

    The fork owns its standard streams and no other descriptor of ours: it can neither keep a pipe open nor say a word on
    a connection to PostgreSQL that it has inherited.
    """

    def __init__(self, stage: str, flags: Sequence[str], env: Mapping[str, str], stdin: Any, stdout: Any) -> None:
        self.args = [stage, *flags]
        self.returncode: Optional[int] = None
        main = stage_main(stage)
        theirs = [None if stream == subprocess.PIPE else stream.fileno() for stream in (stdin, stdout)]
        pipes = [os.pipe() if descriptor is None else None for descriptor in theirs]
        read_end = theirs[0] if pipes[0] is None else pipes[0][0]
        write_end = theirs[1] if pipes[1] is None else pipes[1][1]
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # one for the child must not meet our handlers there
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _become(stage, main, flags, env, (read_end, write_end), blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.stdin = self.stdout = None
        if pipes[0] is not None:
            os.close(pipes[0][0])
            self.stdin = os.fdopen(pipes[0][1], "wb")
        if pipes[1] is not None:
            os.close(pipes[1][1])
            self.stdout = os.fdopen(pipes[1][0], "rb")

    def poll(self) -> Optional[int]:
        """The exit code (negative: the signal that ended it), or None while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        """The exit code; subprocess.TimeoutExpired if it lives longer."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(POLL_S)
        return code


Child = Union["subprocess.Popen[bytes]", Fork]


def start(argv: Sequence[str], env: Mapping[str, str], stdin: Any, stdout: Any = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own: a Ctrl-C must not kill the batch that the first signal wants finished."""
    try:
        return subprocess.Popen(list(argv), stdin=stdin, stdout=stdout, env=dict(env), start_new_session=True)
    except OSError as error:
        raise Failed(f"cannot start '{argv[0]}': {error.strerror}") from None


def start_stage(stage: str, flags: Sequence[str], env: Mapping[str, str], stdin: Any, stdout: Any = subprocess.PIPE) -> Child:
    """Start a stage in a session of its own: as a fork, or where that is not safe (other threads run) by its launcher.

    The launcher is the one beside this executable, and the interpreter this one: never through PATH (no version skew).
    """
    if sys.platform == "linux" and threading.active_count() == 1:
        return Fork(stage, flags, env, stdin, stdout)
    launcher = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), stage)
    return start([sys.executable, launcher, *flags], env, stdin, stdout)


def stage_main(stage: str) -> Any:
    """The main function of a stage."""
    return importlib.import_module(f"audit_archiver.stages.{stage.replace('-', '_')}").main


def end(processes: Sequence[Child]) -> None:
    """End every child and its own children: TERM, then KILL for who does not go; a stopped one is woken to hear it."""
    for process in processes:
        if process.returncode is None:  # not reaped yet, so its group's number is its own, even if it ended before its children
            _signal_group(process, signal.SIGTERM)
            _signal_group(process, signal.SIGCONT)
    deadline = time.monotonic() + END_GRACE_S
    for process in processes:
        try:
            process.wait(max(0.05, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def title(process: Child) -> str:
    """What messages call a child: the command it runs."""
    argv = process.args
    return os.path.basename(argv[1] if isinstance(argv, list) and len(argv) > 1 and argv[0].endswith(("python", "python3")) else argv[0])  # type: ignore[index]


def _become(stage: str, main: Any, flags: Sequence[str], env: Mapping[str, str], streams: tuple[int, int], mask: Any) -> NoReturn:
    """The child's side: from here on it is the stage.

    Nothing of the driver's is ever taken apart here, which is why this does not return and why the garbage
    collector forgets all that there is: a connection to PostgreSQL that is collected says goodbye on it.
    """
    code = 2
    try:
        gc.freeze()
        os.setsid()
        for descriptor, stream in enumerate(streams):
            os.dup2(stream, descriptor)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                _close(int(name))
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        with open("/proc/self/comm", "w") as comm:
            comm.write(stage)
        for each in STOP_SIGNALS:
            if signal.getsignal(each) != signal.SIG_IGN:
                signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.clear()
        os.environ.update(env)
        code = main(list(flags))
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        leave(code)


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        return  # it was the one that listed them


def _signal_group(process: Child, signum: int) -> None:
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        log.debug("child.gone", f"'{title(process)}' had ended already")
