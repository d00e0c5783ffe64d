"""Run a command under the transaction holder and commit each batch that comes out of it deleted.

`aa-txn -- sh -c 'aa-select | aa-serialize | aa-upload | aa-verify | aa-delete' < jobs | aa-record`. The command
reads this command's standard input; this command writes the committed batch lines. The holder keeps the
database transactions open, lends named operations on them through the socket in AA_TXN, takes the lock and
recovers what an earlier run left. It commits only what it deleted itself, and nothing once any stage failed.
"""

from __future__ import annotations

import argparse
import os
from typing import Mapping, Optional, Sequence

from audit_archiver import cli, config, exits, log
from audit_archiver.catalogue.recover import recoverer
from audit_archiver.cli import Command
from audit_archiver.config.model import Config
from audit_archiver.driver import children, pipeline
from audit_archiver.exits import ArchiverError, ConfigError
from audit_archiver.formats import job as jobs
from audit_archiver.holder.notes import JobNotes
from audit_archiver.holder.operations import Operations
from audit_archiver.holder.server import Server
from audit_archiver.objectstore.client import open_store

NAME = "aa-txn"
IN_FLIGHT_MOST = 8  # as the configuration's in_flight_batches


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv, own_signals=True)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    parser.add_argument("--in-flight", metavar="N", type=_at_least_one,
                        help="batches open at the same time (default: in_flight_batches of the configuration, 2)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments, after --")
    return parser


def run(command: Command) -> int:
    """Hold, run, commit, and say how it ended."""
    argv = command.args.command[1:] if command.args.command[:1] == ["--"] else command.args.command
    if not argv:
        raise ConfigError("a command is missing", hint="aa-txn -- sh -c 'aa-select | ... | aa-delete'")
    if command.env.get("AA_TXN"):
        raise ConfigError("AA_TXN is set already: a holder inside a holder would wait for itself", hint="unset AA_TXN")
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    store = open_store(settings)
    signals = pipeline.Signals()
    operations = Operations(settings, None, command.args.in_flight or settings.in_flight_batches,
                            recoverer(settings, store, staging=config.staging_root(settings, None, command.env)))
    server = Server(operations, command.env)
    try:
        child = children.start(argv, holder_environment(command.env, settings, server), stdin=None)
        server.serve()
        failure = pipeline.run([child], operations, server, signals, command.sink.write, watch=command.sink.stream.fileno())
    finally:
        server.close()
        operations.close()
    for notes in operations.notes.values():
        _tell(notes)
    if failure is not None and signals.count < 2:
        raise failure
    if signals.count:
        how = "open batches were rolled back" if signals.count > 1 else "the batches in flight were finished"
        log.error("stopped", f"stopped by a signal; {how}")
        return signals.exit_code
    return exit_code(list(operations.notes.values()))


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= IN_FLIGHT_MOST:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of batches from 1 to {IN_FLIGHT_MOST}")
    return int(text)


def holder_environment(env: Mapping[str, str], settings: Config, server: Server) -> dict[str, str]:
    """What the stages inherit inside a holder: its socket and absolute places."""
    return {**env, **places(settings, env), "AA_TXN": server.path}


def places(settings: Config, env: Mapping[str, str]) -> dict[str, str]:
    """Configuration and staging as absolute paths for the stages' environment."""
    return {"AA_CONFIG": os.path.abspath(settings.path), "AA_STAGING": str(config.staging_root(settings, None, env).absolute())}


def exit_code(notes: Sequence[JobNotes]) -> int:
    """0 if every job went well, 1 if some did, else the jobs' common code or 2 (Appendix D)."""
    codes = [each.error.code for each in notes if each.error is not None]
    if not codes:
        return exits.SOME_FAILED if any(each.inexact or each.too_wide for each in notes) else exits.OK
    if len(codes) < len(notes):
        return exits.SOME_FAILED
    return codes[0] if len(set(codes)) == 1 else exits.FAILED


def _tell(notes: JobNotes) -> None:
    title = jobs.name(notes.job)
    if notes.error is not None:
        error: ArchiverError = notes.error
        log.error("job.failed", f"{title}: {error.msg}", detail=error.detail, hint=error.hint, at=error.at, code=error.code)
    else:
        log.info("job.done", f"{title}: {notes.rows} rows in {notes.batches} batches", rows=notes.rows, batches=notes.batches,
                 skipped_locked=notes.skipped_locked)
