"""Look whether a run would work: configuration, databases, tables, staging directory and bucket, with a remedy for each finding.

Reads the configuration, PostgreSQL and the bucket; writes a report. Rows are only read, nothing is locked, and one small
object comes and goes under the prefix in the bucket. A finding never hides the next: a database that cannot be reached,
or a table that is refused, is a line, and the others are looked at all the same. Run again it looks anew.
"""

from __future__ import annotations

from typing import Optional, Sequence

from audit_archiver import cli, config, log
from audit_archiver.cli import Command
from audit_archiver.preflight import validate
from audit_archiver.preflight.plan import Selection, selected

NAME = "aa-check"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    parser.add_argument("--database", metavar="DB", action="append", default=[], type=cli.text,
                        help="check this database only; may be repeated (default: every configured one)")
    parser.add_argument("--table", metavar="[SCHEMA.]TABLE", action="append", default=[], type=cli.text,
                        help="check this table only; may be repeated (default: every configured one)")
    parser.add_argument("--output", choices=("text", "json"),
                        help="form of the report on stdout (default: text on a terminal, json elsewhere)")
    return parser


def run(command: Command) -> int:
    """Check everything that the selection means; the exit code is what the failures have in common, else 3."""
    args = command.args
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    wanted = selected(settings, Selection(databases=tuple(args.database), tables=tuple(args.table)))
    return validate.run(settings, wanted, config.staging_root(settings, None, command.env),
                        write=(lambda data: None) if args.quiet else command.sink.write, text=command.as_text)
