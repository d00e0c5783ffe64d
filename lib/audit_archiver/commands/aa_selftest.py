"""Prove the archiver on a scratch database and a scratch bucket of one's own: archive, kill, cut, recover, restore, compare, clean up.

Refuses a database that holds any table and a bucket or prefix that holds any object. Makes tables with a column of every type the
server has, runs the commands on them as children of its own, kills these at test points, cuts their connections, starts two at once;
after each fault the next run must put every row into one place, and what is restored must be equal. Writes a line per step. Removes
what it made, also when it is stopped; what an earlier self-test left that was killed is named, and removed with --clean.
"""

from __future__ import annotations

import time
from typing import Any, Optional, Sequence

from audit_archiver import __version__, cli, config, exits, log
from audit_archiver.cli import Command
from audit_archiver.config.model import S3
from audit_archiver.exits import ArchiverError, ConfigError
from audit_archiver.objectstore.client import open_store
from audit_archiver.points import POINTS
from audit_archiver.postgres import connect
from audit_archiver.selftest import steps
from audit_archiver.selftest.rig import Rig
from audit_archiver.selftest.scratch import SCHEMA, Scratch
from audit_archiver.selftest.steps import FAILED, Step, Steps

NAME = "aa-selftest"
BATCHES = 5


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    for action in parser._actions:
        if action.dest == "config":
            action.help = "take endpoint, credentials, encryption and so on of the store from this configuration's s3 section"
    parser.add_argument("--dsn", metavar="DSN", required=True,
                        help="the scratch database: postgresql://USER@HOST:PORT/DATABASE or 'host=... dbname=...'; its password better in PGPASSWORD")
    parser.add_argument("--s3", metavar="s3://BUCKET[/PREFIX]", required=True, help="the scratch bucket, or an empty place in one")
    parser.add_argument("--endpoint", metavar="URL", help="URL of an S3-compatible store (default: the configuration's, AWS_ENDPOINT_URL, AWS)")
    parser.add_argument("--region", metavar="REGION", help="region of the bucket (default: the configuration's, AWS_REGION)")
    parser.add_argument("--rows", metavar="N", type=cli.at_least_one, default=1000, help="rows of each table (default: %(default)s)")
    parser.add_argument("--row-bytes", metavar="N", type=cli.at_least_one, default=200,
                        help="bytes that each row has besides its column of every type (default: %(default)s)")
    parser.add_argument("--point", metavar="NAME", action="append", default=[],
                        help="kill at this test point; may be repeated, 'all' is every one that a run comes by (default: a dozen)")
    parser.add_argument("--clean", action="store_true", help="only remove what a self-test left that was killed")
    parser.add_argument("--output", choices=("text", "json"), help="form of the report (default: text on a terminal, json elsewhere)")
    return parser


def run(command: Command) -> int:
    """Look that both places are empty, claim them, try everything, remove everything."""
    args = command.args
    bucket, prefix = _place(args.s3)
    points = _points(args.point)
    base: Optional[S3] = config.load(args.config, command.env).s3 if args.config else None
    batch_rows = max(1, int(args.rows) // BATCHES)
    with Rig(args.dsn, bucket, prefix, base, {"endpoint": args.endpoint, "region": args.region}, command.env, batch_rows) as rig:
        settings = rig.settings()
        database = settings.databases[0]
        store = open_store(settings, watch=command.sink.stream)
        connection = connect.connect(database, purpose="selftest")
        try:
            scratch = Scratch(connection, store)
            if args.clean:
                return _cleaned(scratch)
            scratch.require_empty()
            bucket_check = store.check_bucket()
            told: list[Step] = []
            report = {"server": connect.scalar(connection, "SHOW server_version"), "endpoint": store.connection.endpoint,
                      "create_only": bucket_check.capabilities.create_only, "versioned": bucket_check.versioned, "rows": args.rows}
            left = None
            try:
                began = time.monotonic()
                scratch.claim()
                scratch.fill(args.rows, args.row_bytes)
                _tell(command, Step("scratch tables made", steps.PASSED, round(time.monotonic() - began, 3), f"{args.rows:,} rows each"), told)
                for step in Steps(rig, scratch, points, store.connection.endpoint, database.sslmode).all():
                    _tell(command, step, told)
            finally:
                rig.end()  # else it would hold the tables, and write objects behind our back
                left = _removed(scratch)
            _tell(command, Step("removed", FAILED if left else steps.PASSED, 0.0, left or "nothing is left"), told)
        finally:
            connection.close()
    code = exits.FAILED if any(step.outcome == FAILED for step in told) else exits.OK
    _end(command, report, scratch, told, left, code)
    return code


def _place(argument: str) -> tuple[str, str]:
    """(bucket, prefix) of s3://BUCKET/PREFIX; the prefix ends with a slash, so that no neighbour's objects begin with it."""
    scheme, _, rest = argument.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise ConfigError(f"'{argument}' is no place in a bucket", hint="write s3://BUCKET or s3://BUCKET/PREFIX")
    return bucket, f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""


def _points(wanted: Sequence[str]) -> list[str]:
    every = [point for point in POINTS if point.startswith(steps.KILLED)]
    if unknown := [point for point in wanted if point not in (*every, "all")]:
        raise ConfigError(f"a run comes by no point '{unknown[0]}'", hint=f"write all, or some of {', '.join(every)}")
    return every if "all" in wanted else list(wanted or steps.POINTS)


def _cleaned(scratch: Scratch) -> int:
    found = scratch.left()
    left = scratch.remove()
    if left:
        log.error("selftest.left", f"{left} are left", hint="a place that holds no marker of a self-test is not touched", code=exits.FAILED)
        return exits.FAILED
    log.info("selftest.cleaned", f"removed: {found}" if found else "there was nothing of a self-test")
    return exits.OK


def _removed(scratch: Scratch) -> str:
    """Remove everything; what is left, in words, also where it cannot be known."""
    try:
        left = scratch.remove()
    except ArchiverError as error:
        left = f"schema '{SCHEMA}' and objects may be left: {error.msg}"
    if left:
        log.error("selftest.left", left, hint="--clean removes it", code=exits.FAILED)
    return left


def _tell(command: Command, step: Step, told: list[Step]) -> None:
    """Keep a step, and say it at once to people."""
    told.append(step)
    if not command.as_text:
        log.info("selftest.step", f"{step.name}: {step.outcome}", seconds=step.seconds, detail=step.detail)
    elif not command.args.quiet:
        command.sink.write(f"{step.name:44} {step.outcome:8} {step.seconds:7.1f} s  {step.detail}\n".encode())
    if step.outcome == FAILED:
        log.error("selftest.failed", f"{step.name}: {step.detail}")


def _end(command: Command, report: dict[str, Any], scratch: Scratch, told: list[Step], left: Optional[str], code: int) -> None:
    if command.args.quiet:
        return
    counts = {outcome: sum(step.outcome == outcome for step in told) for outcome in (steps.PASSED, FAILED, steps.SKIPPED)}
    if command.as_text:
        command.sink.write(f"PostgreSQL {report['server']}, {report['endpoint']}: ".encode()
                           + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()).encode() + b"\n")
        return
    command.sink.emit({"format": "aa-selftest", "version": 1, "archiver_version": __version__, **report, "types": scratch.types,
                       "not_on_this_server": scratch.lacking, "steps": [step._asdict() for step in told], "left": left or None, "exit": code})
