"""Write a job line for each configured table: key, cutoff by the server's clock, estimate, or why it is refused.

Reads the configuration, PostgreSQL, read-only, and in the bucket which restored rows are held; writes job lines (man 5
aa-job) to standard output. A table
that cannot be archived, and every table of a database that cannot be reached, becomes a refused line, and the
others are planned all the same. Run again it plans anew: the cutoff is the server's now() less the retention.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import threading
import time
from typing import Any, Callable, Mapping, Optional, Sequence

from audit_archiver import cli, config, exits, lines, log
from audit_archiver.catalogue import holds
from audit_archiver.cli import Command
from audit_archiver.exits import ConfigError
from audit_archiver.formats import job as jobs
from audit_archiver.formats import names
from audit_archiver.objectstore.client import open_store
from audit_archiver.postgres import connect
from audit_archiver.preflight import dates
from audit_archiver.preflight.plan import Planned, Selection, plan_database, selected

NAME = "aa-plan"
BATCH_ROWS_MAX = 50_000  # REQ-ARC-016
STOP_S = 2.0
_RUN = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9]+")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv, stage=True)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    add_selection(parser)
    parser.add_argument("--count", choices=("exact", "estimate"), default="exact",
                        help="how the eligible rows are counted: exact, which reads them, or estimate, which asks "
                             "the server's planner (default: exact)")
    return parser


def add_selection(parser: cli.Parser) -> None:
    """The options that choose databases, tables and rows; aa-archive has them too."""
    parser.add_argument("--database", metavar="DB", action="append", default=[], type=cli.text,
                        help="plan this database only; may be repeated (default: every configured one)")
    parser.add_argument("--table", metavar="[SCHEMA.]TABLE", action="append", default=[], type=cli.text,
                        help="plan this table only; may be repeated (default: every configured one)")
    parser.add_argument("--start-date", metavar="D",
                        help="leave older rows in place: a date (its 00:00 UTC) or an RFC 3339 time")
    parser.add_argument("--end-date", metavar="D",
                        help="leave later rows in place: a date (the day is included) or an RFC 3339 time (it is not)")
    parser.add_argument("--force-rearchive", action="store_true",
                        help="take also rows that aa-restore --hold-until keeps in their table")
    parser.add_argument("--limit", metavar="ROWS", type=cli.at_least_one,
                        help="take at most that many rows of each table (default: all that are eligible)")
    parser.add_argument("--batch-size", metavar="ROWS", type=_batch_rows,
                        help=f"rows of a table's first batch, up to {BATCH_ROWS_MAX} (default: as configured)")


def run(command: Command) -> int:
    """Plan database after database; jobs are written as soon as their database is planned."""
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    chosen = selection(command.args, exact=command.args.count == "exact")
    wanted = selected(settings, chosen)
    run_id = new_run(command.env)
    log.bind(run_id=run_id)
    for warning in settings.warnings:
        log.warning("config.warning", warning)
    planned: list[dict[str, Any]] = []
    store = open_store(settings, watch=command.sink.stream)
    for database, tables in wanted:
        found = _watched(command, functools.partial(plan_database, database, settings, run_id, chosen, tables=tables,
                                                    holds=holds.for_plan(store, database.name)))
        for note in found.notes:
            (log.warning if note.warning else log.info)(note.event, note.msg, **note.fields)
        for job in found.jobs:
            if "refused" in job:
                why = job["refused"]
                log.error("plan.refused", f"{job['database']}: {jobs.name(job)} is refused: {why['msg']}",
                          at=why.get("at"), code=why["code"])
            command.sink.emit(job)
        planned += found.jobs
    return exit_code(planned)


def _watched(command: Command, plan: Callable[..., Planned]) -> Planned:
    """`plan(opened=...)`, given up at once on a signal or when our reader is gone.

    psycopg2 comes back to Python with the server's answer only, so a thread waits for it, and its connection is cut.
    """
    outcome: list[Any] = []
    connections: list[connect.Connection] = []
    stopped = threading.Event()
    ended, end = os.pipe()

    def opened(connection: connect.Connection) -> None:
        connections.append(connection)
        if stopped.is_set():
            connect.cut(connection)

    def wait_for_the_server() -> None:
        try:
            outcome.append(plan(opened=opened))
        except BaseException as error:
            outcome.append(error)
        finally:
            os.close(end)

    thread = threading.Thread(target=wait_for_the_server, name="plan", daemon=True)
    thread.start()
    try:
        lines.wait_readable(ended, _output(command))
    except BaseException:
        stopped.set()
        for connection in connections:
            connect.cut(connection)
        thread.join(STOP_S)
        raise
    finally:
        os.close(ended)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _output(command: Command) -> Optional[int]:
    try:
        return command.sink.descriptor()
    except ValueError:
        return None


def exit_code(planned: Sequence[Mapping[str, Any]]) -> int:
    """0; 1 if some tables are refused; if all are, the code of the one reason, or 2."""
    refused = [job["refused"]["code"] for job in planned if "refused" in job]
    if not refused:
        return exits.OK
    if len(refused) < len(planned):
        return exits.SOME_FAILED
    return refused[0] if len(set(refused)) == 1 else exits.FAILED


def selection(args: argparse.Namespace, *, exact: bool) -> Selection:
    """What the options of `add_selection` ask for. Raises ConfigError for dates that are none."""
    start, end = dates.start(args.start_date), dates.end(args.end_date)
    dates.check_order(start, end)
    return Selection(tuple(args.database), tuple(args.table), start, end, args.limit, args.batch_size, exact, args.force_rearchive)


def new_run(env: Mapping[str, str]) -> str:
    """The run that AA_RUN names, or a new one."""
    given = env.get("AA_RUN")
    if given and not _RUN.fullmatch(given):
        raise ConfigError("AA_RUN is no run id", hint="it looks like 20251230T021545Z-4711; leave it unset for a new one")
    return given or names.run_id(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), os.getpid())


def _batch_rows(text: str) -> int:
    rows = cli.at_least_one(text)
    if rows > BATCH_ROWS_MAX:
        raise argparse.ArgumentTypeError(f"'{text}' is more than {BATCH_ROWS_MAX} rows")
    return rows
