"""Look whether the archive is what was written: records, metadata, checksums, counts, keys, index, orphans, doubles.

Reads the bucket and, where it can be reached, looks archived keys up in the database; writes a report. Nothing is ever
written into the bucket but, with --repair --execute, index segments that are missing, out of the commit records, which
are the truth. A finding never hides the next, and the exit code tells "it is wrong" from "could not look". Run again
it looks anew.
"""

from __future__ import annotations

from typing import Optional, Sequence

from audit_archiver import cli, config, log
from audit_archiver.cli import Command
from audit_archiver.commands import selection_flags, thaw_flags
from audit_archiver.exits import ConfigError
from audit_archiver.objectstore.client import open_store
from audit_archiver.validate import findings, in_table, subset
from audit_archiver.validate.run import say, validate
from audit_archiver.validate.table import Asked

NAME = "aa-validate"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    selection_flags.add(parser, "validate")
    parser.add_argument("--depth", choices=findings.DEPTHS, default=findings.FULL,
                        help="light: listing, sizes, ETags, commit records, metadata; sample: also a random part of the key lists and data "
                             "objects, read to their ends; full: all of them (default: %(default)s)")
    parser.add_argument("--subset", metavar="K/N", type=subset.parse, default=subset.WHOLE,
                        help="only the K-th of N parts of the batches, always the same ones, so that N calls see them all (default: all)")
    parser.add_argument("--against-table", choices=(in_table.AUTO, in_table.YES, in_table.NO), default=in_table.AUTO,
                        help="look archived keys up in the tables: yes, no, or auto: where the database can be reached (default: %(default)s)")
    thaw_flags.add(parser)
    parser.add_argument("--repair", action="store_true", help="say which index segments are missing and would be rebuilt from the commit records")
    parser.add_argument("--execute", action="store_true", help="with --repair: write them")
    parser.add_argument("--output", choices=("text", "json"), help="form of the report (default: text on a terminal, json elsewhere)")
    return parser


def run(command: Command) -> int:
    """Validate what is selected, and report."""
    args = command.args
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    selection = selection_flags.chosen(args)
    if args.s3_key and args.subset != subset.WHOLE:
        raise ConfigError("--s3-key names one batch already", hint="leave --subset out")
    if args.execute and not args.repair:
        raise ConfigError("--execute belongs to --repair", hint="add --repair, or leave --execute out")
    if args.repair and (args.s3_key or args.subset != subset.WHOLE):
        raise ConfigError("--repair looks at every batch of a table", hint="leave --subset and --s3-key out")
    if args.against_table == in_table.YES and args.depth == findings.LIGHT:
        raise ConfigError("--against-table yes needs the keys, and depth light reads none", hint="use --depth sample or full")
    asked = Asked(selection, args.depth, args.subset, args.repair, args.execute, thaw_flags.chosen(args))
    store = open_store(settings, watch=command.sink.stream)
    report = validate(settings, store, args.database or [database.name for database in settings.databases], asked,
                      against_table=args.against_table, s3_key=args.s3_key)
    return say(report, write=(lambda data: None) if args.quiet else command.sink.write, text=command.as_text)
