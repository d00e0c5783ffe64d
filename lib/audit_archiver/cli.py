"""What every command does around its work: options, log, signals, errors, exit code.

    def main(argv=None): return cli.run("aa-upload", build_parser, run, argv)
    def run(command: cli.Command) -> int: ...

`run` reads `command.source()`, writes `command.sink`, raises errors of `exits` and returns the exit code; it
never exits and reads no environment but `command.env`.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import socket
import stat
import threading
import time
import traceback
from typing import Any, BinaryIO, Callable, Mapping, NoReturn, Optional, Sequence, TextIO

from audit_archiver import __version__, exits, lines, log
from audit_archiver.exits import ArchiverError, ConfigError, Failed, NetworkError, ResourceError
from audit_archiver.holder import client as holder_client

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
YES = ("y", "yes")
RESOURCE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG)


class Stopped(BaseException):
    """A stop signal arrived; not an Exception, so that no handler of errors swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Parser(argparse.ArgumentParser):
    """argparse with exit code 3 for usage errors: 2 means that work failed."""

    def __init__(self, prog: str, description: str, **kwargs: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **kwargs)
        self.stdout: Optional[BinaryIO] = None

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"see '{self.prog} --help'")

    def _print_message(self, message: str, file: Any = None) -> None:
        """--help and --version, written at once: sys.stdout would lose a full disk until after the exit code."""
        lines.Sink(self.stdout or _output(frozenset())).write(message.encode())


class Command:
    """One call of a command: its arguments, streams and environment."""

    def __init__(self, name: str, args: argparse.Namespace, stdin: Optional[BinaryIO], stdout: BinaryIO,
                 env: Mapping[str, str], holder: Optional[holder_client.Client]) -> None:
        self.name, self.args, self.stdin, self.env, self.holder = name, args, stdin, env, holder
        self.sink = lines.Sink(stdout)
        self._source: Optional[lines.Source] = None
        self._began = time.monotonic()

    @property
    def busy_s(self) -> float:
        """How long it has worked until now: its life without the waiting for input."""
        return time.monotonic() - self._began - (self._source.waited_s if self._source else 0.0)

    @property
    def as_text(self) -> bool:
        """Whether the report is for people: --output text, or a terminal without --output."""
        return (self.args.output or ("text" if self.sink.stream.isatty() else "json")) == "text"

    def source(self) -> lines.Source:
        """The input: the FILE arguments in order ("-" is stdin), or stdin. Raises ConfigError for a missing file."""
        inputs: list[Any] = []
        for name in getattr(self.args, "files", None) or ["-"]:
            if name != "-":
                _check_readable(name)
            elif self.stdin is None:
                raise ConfigError("standard input is closed")
            inputs.append(self.stdin if name == "-" else name)
        self._source = lines.Source(inputs, self.sink.stream)
        return self._source


def agreed(question: str, stdin: TextIO, stderr: TextIO) -> bool:
    """Ask a person; anything but y or yes, the end of the input too, is a no."""
    stderr.write(f"{question} [y/N] ")
    stderr.flush()
    return stdin.readline().strip().lower() in YES


def at_least_one(argument: str) -> int:
    """An argument that is a whole number from 1 on, of 18 digits at most."""
    if not re.fullmatch(r"[0-9]{1,18}", argument) or int(argument) < 1:
        raise argparse.ArgumentTypeError(f"'{argument}' is no number from 1 on")
    return int(argument)


def text(argument: str) -> str:
    """An argument that names something in a database, which is UTF-8 there whatever LC_ALL says here."""
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def parser(prog: str, doc: str, *, reads: Optional[str] = None) -> Parser:
    """A parser with the options that every command has; `reads` names what the FILE arguments hold."""
    made = Parser(prog, (doc or "").strip().split("\n\n")[0].replace("\n", " "))
    made.add_argument("-c", "--config", metavar="FILE",
                      help="configuration file (default: $AA_CONFIG, ./audit-archiver.yaml, "
                           "$XDG_CONFIG_HOME/audit-archiver/config.yaml, /etc/audit-archiver/config.yaml)")
    made.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    made.add_argument("-v", "--verbose", action="count", default=0, help="say more; -vv and -vvv say still more")
    made.add_argument("--log-format", choices=("auto", "text", "json"), default="auto",
                      help="form of the log on stderr (default: auto, text on a terminal and json elsewhere)")
    made.add_argument("--version", action="version", version=f"{prog} {__version__}")
    if reads:
        made.add_argument("files", nargs="*", metavar="FILE",
                          help=f"{reads} ('-' or none: standard input)")
    return made


def run(name: str, build_parser: Callable[[], Parser], body: Callable[[Command], int],
        argv: Optional[Sequence[str]] = None, *, stdin: Optional[BinaryIO] = None,
        stdout: Optional[BinaryIO] = None, stderr: Optional[TextIO] = None,
        env: Optional[Mapping[str, str]] = None, stage: bool = False, own_signals: bool = False) -> int:
    """Run a command and return its exit code.

    With `stdin`, `stdout`, `stderr` and `env` given it runs in process, as the tests do. `stage` commands say
    hello and bye to the transaction holder named in AA_TXN. `own_signals`: the body handles signals itself.
    """
    in_process = stdout is not None
    closed: frozenset[int] = frozenset()
    if not in_process:
        closed = _occupy_closed_descriptors()
        os.umask(0o077)
    log.setup(name, style="auto", stream=stderr)
    signals = None if in_process or own_signals else _Signals()
    end = _End()
    try:
        _run(end, name, build_parser, body, argv, stdin or _input(closed), lambda: stdout or _output(closed), stderr,
             os.environ if env is None else env, stage, signals)
    except Stopped as stop:  # it came while the command was ending
        end.stopped(stop.signum)
    except Exception as error:
        end.internal(error)
    if signals is not None:
        signals.disarm()
        if end.signum is not None:
            _die(end.signum)
    return end.code


def leave(code: int) -> NoReturn:
    """End the process at once; every line and every log record is written by then, none waits in a buffer.

    Python would take every imported object apart first: measured 0.2 to 0.5 s where botocore is loaded, and in a
    pipeline each stage waits for the end of the one before it.
    """
    os._exit(code)


class _End:
    """How a command ended: its exit code, its last words for the holder, the signal that stopped it, and whether a holder hears it."""

    def __init__(self) -> None:
        self.code, self.last_words, self.signum = exits.FAILED, None, None  # type: int, Optional[ArchiverError], Optional[int]
        self.heard = False

    def failed(self, error: ArchiverError) -> None:
        """Say an error; one with `parts` (a configuration's) is said part by part, one line each."""
        self.code, self.last_words = error.code, error
        for part in getattr(error, "parts", (error,)):
            log.failure("stopped", part.msg, self.heard, detail=part.detail, hint=part.hint, at=part.at,
                        sqlstate=part.sqlstate, code=part.code)

    def reader_gone(self) -> None:
        self.code, self.last_words = exits.READER_GONE, Failed("the reader of the output is gone")
        log.failure("reader.gone", self.last_words.msg, self.heard, code=self.code)

    def stopped(self, signum: int) -> None:
        self.code, self.signum = 128 + signum, signum
        self.last_words = Failed(f"stopped by {signal.Signals(signum).name}")
        log.failure("stopped", self.last_words.msg, self.heard, code=self.code)

    def internal(self, error: Exception) -> None:
        self.code, self.last_words = exits.FAILED, _internal(error)


def _run(end: _End, name: str, build_parser: Callable[[], Parser], body: Callable[[Command], int],
         argv: Optional[Sequence[str]], stdin: Optional[BinaryIO], stdout: Callable[[], BinaryIO],
         stderr: Optional[TextIO], env: Mapping[str, str], stage: bool, signals: Optional[_Signals]) -> None:
    """Run the body and note in `end` how it ended; the holder is told last."""
    holder = command = None
    try:
        try:
            if signals is not None:
                signals.arm()
            made = build_parser()
            made.stdout = out = stdout()
            args = made.parse_args(argv)
            log.setup(name, style=args.log_format, quiet=args.quiet, verbose=args.verbose, stream=stderr)
            log.bind(run_id=env.get("AA_RUN"))
            if stage and env.get("AA_TXN"):
                holder = holder_client.Client(env["AA_TXN"], name)
                end.heard = True
            command = Command(name, args, stdin, out, env, holder)
            end.code = body(command)
        except SystemExit as asked:  # argparse: --help and --version
            end.code = asked.code if isinstance(asked.code, int) else exits.OK
        except BrokenPipeError:
            end.reader_gone()
        except OSError as error:
            raise _os_error(error) from error
        except MemoryError:
            raise _out_of_memory() from None
    except ArchiverError as error:
        end.failed(error)
    except Stopped as stop:
        end.stopped(stop.signum)
    except Exception as error:
        end.internal(error)
    finally:
        if holder is not None:
            holder.bye(end.code, end.last_words, command.busy_s if command else 0.0)


def explained(error: Exception) -> ArchiverError:
    """Any exception as an error that a person can act on; a defect of ours is logged with its place."""
    if isinstance(error, ArchiverError):
        return error
    if isinstance(error, MemoryError):
        return _out_of_memory()
    return _os_error(error) if isinstance(error, OSError) else _internal(error)


def _internal(error: Exception) -> ArchiverError:
    """A defect of ours: exit 2, never Python's 1. Its message could hold a row or a secret, its place cannot."""
    made = Failed(f"internal error: {type(error).__name__}")
    log.error("internal", f"{made.msg} in {_where(error)}", code=made.code,
              hint="nothing was committed by this command after this point; please report it")
    log.debug("internal.trace", "".join(traceback.format_tb(error.__traceback__)))
    return made


def _out_of_memory() -> ArchiverError:
    return ResourceError("out of memory", hint="lower batch_size or max_row_mb")


def _os_error(error: OSError) -> ArchiverError:
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return NetworkError(f"a connection failed: {error.strerror or error}")
    kind = ResourceError if error.errno in RESOURCE_ERRNOS else Failed
    where = f"'{error.filename}'" if error.filename else "the system"
    return kind(f"cannot use {where}: {error.strerror or error}")


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.path.basename(frame.filename)}:{frame.lineno}"


def _check_readable(path: str) -> None:
    """Look without opening: a FIFO's writer would take the second opening for another reader."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from None


def _occupy_closed_descriptors() -> frozenset[int]:
    """Which of 0, 1 and 2 came closed. Each is taken, or the next socket would get its number, and the rows with it."""
    closed = []
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            closed.append(os.open(os.devnull, os.O_RDONLY if descriptor else os.O_WRONLY))
    return frozenset(closed)


def _input(closed: frozenset[int]) -> Optional[BinaryIO]:
    return None if 0 in closed else io.FileIO(0, "r", closefd=False)  # type: ignore[return-value]


def _output(closed: frozenset[int]) -> BinaryIO:
    if 1 in closed:
        raise ConfigError("standard output is closed")
    return io.FileIO(1, "w", closefd=False)  # type: ignore[return-value]


class _Signals:
    """TERM, INT and HUP raise `Stopped` once; a second signal must not break the cleanup of the first."""

    def __init__(self) -> None:
        self._armed = False

    def arm(self) -> None:
        """From now on the signals raise; one that was ignored (nohup) stays ignored."""
        if threading.current_thread() is threading.main_thread():
            self._armed = True
            for each in STOP_SIGNALS:
                if signal.getsignal(each) != signal.SIG_IGN:
                    signal.signal(each, self._stop)

    def disarm(self) -> None:
        """From now on they kill: everything that had to be cleaned up is."""
        self._armed = False

    def _stop(self, signum: int, _frame: Any) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        if not self._armed:
            _die(signum)
        raise Stopped(signum)


def _die(signum: int) -> None:
    """End as the signal ends a process, so that the shell sees a true signal death."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
