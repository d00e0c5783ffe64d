"""Restore archived rows into a table: one batch, a run, a table or a date range, each value as it was.

Reads the bucket; writes the table, a watermark and a record of what was restored. Every batch is proven by its checksums
before a row of it is inserted, and is in the table whole or not at all. Rows that are there already as they were archived
are left as they are, so a restore that was killed is run again; rows that are there with another content are conflicts.
Nothing in the archive is changed or removed.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, BinaryIO, Iterator, Optional, Sequence

from audit_archiver import cli, config, exits, log
from audit_archiver.catalogue.archived import Batch
from audit_archiver.cli import Command
from audit_archiver.commands import thaw_flags
from audit_archiver.config.model import Config
from audit_archiver.exits import ArchiverError, ConfigError
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store, open_store
from audit_archiver.preflight import dates
from audit_archiver.restore import account, choose, differences
from audit_archiver.restore import target as targets
from audit_archiver.restore.account import Account
from audit_archiver.restore.functions import Functions, read
from audit_archiver.restore.load import FAIL, MERGE, STRATEGIES
from audit_archiver.restore.restoring import Restoring, Wanted

NAME = "aa-restore"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    parser.add_argument("--database", metavar="DB", type=cli.text,
                        help="the database that the rows came from (default: the only one that is configured); with --s3-key, the one to "
                             "restore into")
    parser.add_argument("--table", metavar="[SCHEMA.]TABLE", type=cli.text,
                        help="the table that the rows came from (default: every table, with --run or --restore-all); with --s3-key, the one "
                             "to restore into")
    parser.add_argument("--restore-all", action="store_true", help="restore every batch that is archived")
    parser.add_argument("--start-date", metavar="DATE", help="restore only rows from then on: a date (UTC) or an RFC 3339 time")
    parser.add_argument("--end-date", metavar="DATE", help="restore only rows before then; a date includes that day")
    parser.add_argument("--run", metavar="RUN", help="restore only what this run archived")
    parser.add_argument("--s3-key", metavar="KEY", help="restore only the batch of this object; aa-ls shows the keys")
    parser.add_argument("--where", metavar="COL=VALUE", action="append", default=[], type=_equation,
                        help="restore only rows whose column has this value; may be repeated, all must hold")
    parser.add_argument("--into", metavar="[DB:][SCHEMA.]TABLE", type=cli.text,
                        help="restore into this table (default: the one that the rows came from); DB is a configured database or another one "
                             "on the server of the source")
    parser.add_argument("--create-table", action="store_true",
                        help="make the table from the archived DDL if there is none: keys and checks before the rows, other indexes and "
                             "foreign keys after them")
    parser.add_argument("--conflict-strategy", choices=STRATEGIES, default=FAIL,
                        help="what to do with a row whose key is in the table with another content: leave what is there (skip), give it the "
                             "archived values (overwrite; upsert does so by ON CONFLICT), make one row of the two (merge), or stop "
                             "(default: %(default)s)")
    parser.add_argument("--conflicts", metavar="FILE", help="write the keys of such rows and what was done to this new file, a JSON line each")
    parser.add_argument("--schema-strategy", choices=(differences.STRICT, differences.LENIENT, differences.TRANSFORM), default=differences.STRICT,
                        help="what to do where table and archive have different columns: stop (strict), map them by name, leave out what "
                             "the table lacks and cast what can be cast without loss (lenient), or the same with expressions of one's own "
                             "(transform) (default: %(default)s)")
    parser.add_argument("--functions", metavar="FILE", help="the SQL expressions of transform and merge, as JSON; see FUNCTIONS in the manual page")
    parser.add_argument("--ignore-watermark", action="store_true", help="look also at batches that were restored into this table before")
    parser.add_argument("--hold-until", metavar="DATE",
                        help="keep runs from archiving these rows again before then: a date (that day included) or an RFC 3339 time")
    parser.add_argument("--disable-triggers", action="store_true",
                        help="keep the table's own triggers from firing on the restored rows; takes a lock that writers wait for")
    parser.add_argument("--batch-size", metavar="ROWS", type=cli.at_least_one, default=50_000,
                        help="load as many batches in one transaction as have this many rows, at least one (default: %(default)s rows)")
    parser.add_argument("--in-flight", metavar="N", type=cli.at_least_one, default=2,
                        help="load so many transactions side by side, where conflicts are not to be settled (default: %(default)s)")
    thaw_flags.add(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="write nothing: prove the objects, compare with the table in a read-only transaction, and say what would be done")
    parser.add_argument("--output", choices=("text", "json"), help="form of the report (default: text on a terminal, json elsewhere)")
    return parser


def run(command: Command) -> int:
    """Restore table after table; one that fails does not stop the next."""
    args = command.args
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    wanted = _wanted(args, settings)
    restore = names.run_id(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), int.from_bytes(os.urandom(4), "big"))  # in containers pids repeat
    log.bind(run_id=restore)
    store = open_store(settings, watch=command.sink.stream)
    chosen = _chosen(store, settings, args, wanted)
    if len(chosen) > 1 and args.into:
        raise ConfigError(f"--into names one table, and rows of {len(chosen)} are meant", hint="name the source with --table")
    accounts: list[Account] = []
    with _report(args.conflicts) as report:
        for source, into, batches, every in chosen:
            place = targets.parse(into, settings, *source)
            configured = place.database.table(place.schema, place.table)
            if configured is not None and wanted.hold_until is None:
                log.warning("restore.archivable", f"{place.title} is archived: the next run takes away again what is older than "
                            f"{configured.retention_days} days", at=configured.at,
                            hint="--hold-until DATE keeps them there; or restore --into another table")
            made = Account(restore, source, (place.database.name, place.schema, place.table), _asked(args), wanted.dry_run)
            accounts.append(made)
            try:
                Restoring(store, place, wanted, made, report).run(batches, every)
            except ArchiverError as error:
                made.fail(error)
                log.error("restore.stopped", error.msg, detail=error.detail, hint=error.hint, at=error.at, sqlstate=error.sqlstate, code=error.code)
            finally:
                made.end(store)
            _say(command, made)
    return exits.combined(made.code for made in accounts)


def _wanted(args: Any, settings: Config) -> Wanted:
    start, end = dates.start(args.start_date), dates.end(args.end_date)
    dates.check_order(start, end)
    if args.s3_key and (args.restore_all or args.run or start or end):
        raise ConfigError("--s3-key names one batch already", hint="leave --restore-all, --run and the dates out")
    if args.s3_key and args.into and (args.database or args.table):
        raise ConfigError("--s3-key names the source, and --into the target", hint="leave --database and --table out")
    if not (args.s3_key or args.restore_all or args.run or start or end or args.where):
        raise ConfigError("nothing says what to restore", hint="--restore-all, --run, --s3-key, --start-date, --end-date or --where do; aa-ls "
                          "shows what is archived")
    functions = read(args.functions) if args.functions else Functions()
    for flag, wish, expressions in (("--schema-strategy transform", args.schema_strategy == differences.TRANSFORM, functions.transform),
                                    ("--conflict-strategy merge", args.conflict_strategy == MERGE, functions.merge)):
        if wish != bool(expressions):
            raise ConfigError(f"{flag} and its expressions in --functions go together", hint="see man aa-restore, FUNCTIONS")
    return Wanted(start, end, tuple(args.where), args.conflict_strategy, args.schema_strategy, functions, args.create_table, args.disable_triggers,
                  args.ignore_watermark, settings.restore_watermark, in_flight=args.in_flight, rows=args.batch_size, dry_run=args.dry_run,
                  hold_until=dates.until(args.hold_until, "--hold-until"), thaw=thaw_flags.chosen(args))


def _chosen(store: Store, settings: Config, args: Any,
            wanted: Wanted) -> list[tuple[tuple[str, str, str], Optional[str], list[Batch], list[Batch]]]:
    """(source, where to, batches that are meant, all of the table) of each table."""
    if args.s3_key:
        batch = choose.one(store, args.s3_key)
        into = args.into
        if args.database or args.table:  # as people write it: with a key, these name the target
            table = args.table or f"{batch.schema}.{batch.table}"
            into = f"{args.database}:{table}" if args.database else table
        every = choose.batches(store, batch.database, batch.schema, batch.table, choose.Selection()) if args.create_table else [batch]
        return [((batch.database, batch.schema, batch.table), into, [batch], every)]
    database = args.database or (settings.databases[0].name if len(settings.databases) == 1 else None)
    if database is None:
        raise ConfigError("nothing says which database the rows came from", hint="name it with --database")
    selection = choose.Selection((args.table,) if args.table else (), wanted.start, wanted.end, args.run)
    found = []
    for schema, table in choose.tables(store, database, selection.tables):
        every = choose.batches(store, database, schema, table, choose.Selection())
        meant = [batch for batch in every if selection.means(batch)]
        if meant or args.table:
            found.append(((database, schema, table), args.into, meant, every))
    if args.run and not any(batch.run == args.run for _, _, meant, _ in found for batch in meant):
        raise ConfigError(f"nothing that run '{args.run}' archived is in the archive of database '{database}'", hint="'aa-ls' shows the runs")
    return found


def _asked(args: Any) -> dict[str, Any]:
    """What was asked for, as the report has it; of a filter the column only, since values are row content."""
    return {"restore_all": args.restore_all, "start_date": args.start_date, "end_date": args.end_date, "run": args.run, "s3_key": args.s3_key,
            "where": [name for name, _ in args.where], "create_table": args.create_table, "conflict_strategy": args.conflict_strategy,
            "schema_strategy": args.schema_strategy, "ignore_watermark": args.ignore_watermark, "disable_triggers": args.disable_triggers,
            "hold_until": dates.until(args.hold_until, "--hold-until")}


@contextlib.contextmanager
def _report(path: Optional[str]) -> Iterator[Optional[BinaryIO]]:
    """The file of the conflict report, a new one: it holds keys of rows."""
    if path is None:
        yield None
        return
    try:
        file = open(path, "xb")
    except FileExistsError:
        raise ConfigError(f"'{path}' is there already", hint="name a new file with --conflicts") from None
    with file:
        yield file


def _say(command: Command, made: Account) -> None:
    """The report: nothing under --quiet."""
    if command.args.quiet:
        return
    if not command.as_text:
        command.sink.emit(made.as_json(account.END))
        return
    would = "would be " if made.dry_run else ""
    lines = [f"{'.'.join(made.source[1:])} of {made.source[0]} into {'.'.join(made.target[1:])} of {made.target[0]}"
             f"{f' ({would}made)' if made.created else ''}: {made.outcome}",
             f"  {made.inserted:,} rows {would}inserted, {made.same:,} were there already, {made.conflicts:,} in conflict, of {made.meant:,} meant",
             f"  {len(made.objects):,} of {made.chosen:,} batches proven, {made.restored_before:,} restored before, "
             f"{made.not_archived:,} not archived; {made.sampled:,} rows compared; {time.monotonic() - made.began:,.1f} s"]
    lines += [f"  column '{each['column']}': {each['words']}" for each in made.differences]
    lines += [f"  failed: {each['s3_key'] or ''} {each['msg']}" for each in made.failures]
    command.sink.write("".join(line + "\n" for line in lines).encode())


def _equation(argument: str) -> tuple[str, str]:
    name, equals, value = cli.text(argument).partition("=")
    if not name or not equals:
        raise ConfigError(f"--where '{argument}' is no equation", hint="write COL=VALUE")
    return name, value
