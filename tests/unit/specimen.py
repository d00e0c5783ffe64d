"""A command for the tests of cli and log: copies lines, or ends in the way that --end names.

    python -m tests.unit.specimen --end raise
"""

from __future__ import annotations

import os
import sys
from typing import Optional, Sequence

from audit_archiver import cli, exits, log
from audit_archiver.exits import ArchiverError, Failed

ENDS = {
    "some": exits.SomeFailed("some"), "failed": exits.Failed("failed", detail="why", hint="do this"),
    "config": exits.ConfigError("config", at="prod.yaml:31"), "locked": exits.LockHeld("locked"),
    "permission": exits.PermissionDenied("denied", sqlstate="42501"), "resource": exits.ResourceError("full"),
    "network": exits.NetworkError("gone"), "raise": ValueError("row content 4711"), "memory": MemoryError(),
    "reset": ConnectionResetError(104, "Connection reset by peer"), "denied": PermissionError(13, "Permission denied", "/x"),
    "files": OSError(24, "Too many open files"), "exit": SystemExit("text"),
}


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser("aa-specimen", __doc__, reads="lines")
    parser.add_argument("--end", metavar="HOW", default="copy", help="how to end")
    parser.add_argument("--table", type=cli.text, metavar="TABLE", help="a name")
    return parser


def run(command: cli.Command) -> int:
    """Do as --end says."""
    how = command.args.end
    if command.args.table:
        command.sink.emit(command.args.table)
    if how in ENDS:
        raise ENDS[how]
    log.info("specimen.begun", "begun", rows=3)
    log.debug("specimen.detail", "detail")
    if how == "parts":
        error = ArchiverError("two things are wrong")
        error.code = exits.CONFIG
        error.parts = [exits.ConfigError("one", at="a:1"), exits.ConfigError("two", at="a:2")]  # type: ignore[attr-defined]
        raise error
    if how == "socket":  # what takes the first free number must not be mistaken for a standard stream
        command.sink.emit(os.open(os.devnull, os.O_RDONLY))
        return exits.OK
    if how == "umask":
        mask = os.umask(0)
        command.sink.emit(oct(mask))
        return exits.OK
    if how == "swallow":
        try:
            _wait(command)
        except Exception:  # what a stage might do to one batch; a stop must not end here
            log.error("specimen.swallowed", "swallowed")
        return exits.OK
    if how == "wait":
        _wait(command)
    if how == "call" and command.holder:
        command.sink.emit(os.getpid())
        command.holder.call("probe")
    if how == "cleanup":
        source = command.source()
        try:
            command.sink.emit(os.getpid())
            source.line()
        finally:
            command.sink.emit("cleaning")
            source.line()
            command.sink.emit("cleaned")
    try:
        for line in command.source():
            if not line.endswith(b"\n"):
                raise Failed("half a line")
            command.sink.write(line)
    finally:
        log.info("specimen.cleaned", "cleaned up")
    return exits.OK


def _wait(command: cli.Command) -> None:
    command.sink.emit(os.getpid())  # it has begun, and this is whom to signal
    command.source().line()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run("aa-specimen", build_parser, run, argv, stage=True)


if __name__ == "__main__":
    sys.exit(main())
