"""The flags by which a command that looks at the archive selects: database, table, date range, run, one object's key."""

from __future__ import annotations

from typing import Any

from audit_archiver import cli
from audit_archiver.exits import ConfigError
from audit_archiver.preflight import dates
from audit_archiver.query import conditions
from audit_archiver.restore.choose import Selection


def add(parser: cli.Parser, verb: str) -> None:
    """The flags by which a command that looks at the archive selects: `verb` is what it does to what is selected."""
    parser.add_argument("--database", metavar="DB", action="append", default=[], type=cli.text,
                        help=f"{verb} this database only, configured or not; may be repeated (default: every configured one)")
    parser.add_argument("--table", metavar="[SCHEMA.]TABLE", action="append", default=[], type=cli.text,
                        help=f"{verb} this table only; may be repeated (default: every table that was ever archived)")
    parser.add_argument("--start-date", metavar="DATE", help="only batches with rows from then on: a date (UTC) or an RFC 3339 time")
    parser.add_argument("--end-date", metavar="DATE", help="only batches with rows before then; a date includes that day")
    parser.add_argument("--run", metavar="RUN", help="only what this run archived")
    parser.add_argument("--s3-key", metavar="KEY", help="only the batch of this object")


def add_where(parser: cli.Parser, what: str) -> None:
    """--where, of a command that reads what stands in the rows."""
    parser.add_argument("--where", metavar="CONDITION", action="append", default=[], type=lambda text: conditions.parse(cli.text(text)),
                        help=f"{what}: COL=VALUE, COL<VALUE, <=, >, >=, 'COL is null', 'COL is not null'; may be repeated, all must hold")


def chosen(args: Any) -> Selection:
    """What those flags ask for. Raises ConfigError where they contradict each other."""
    start, end = dates.start(args.start_date), dates.end(args.end_date)
    dates.check_order(start, end)
    if args.s3_key and (args.database or args.table or start or end or args.run):
        raise ConfigError("--s3-key names one batch already", hint="leave the other selections out")
    return Selection(tuple(args.table), start, end, args.run)
