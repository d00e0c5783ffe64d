"""Undo the archiving of a run, or of the last batches of a table: their rows go back into the table they came from.

Reads the bucket; writes the table, and a record beside each commit record, which stays as it is. Takes the lock of a run,
so it never works beside one. Every batch is proven by its checksums first, goes back whole or not at all, the newest
first, and is not archived any more from then on. A row that is there with another content ends it: nothing of that batch
is done. Killed at any point and run again, it goes on where it ended. Nothing in the archive is changed or removed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any, Optional, Sequence

from audit_archiver import cli, config, exits, log
from audit_archiver.catalogue import owner, rollbacks
from audit_archiver.catalogue.archived import Batch
from audit_archiver.catalogue.recover import recover_database
from audit_archiver.catalogue.rollbacks import Open
from audit_archiver.cli import Command
from audit_archiver.config.model import Config, Database
from audit_archiver.exits import ConfigError, Failed, LockHeld
from audit_archiver.formats import names
from audit_archiver.locking.lock import Lock
from audit_archiver.objectstore.client import Store, open_store
from audit_archiver.postgres import connect, lock_holders, witness
from audit_archiver.restore import account, choose, differences, load
from audit_archiver.restore import target as targets
from audit_archiver.restore.account import Account
from audit_archiver.restore.rolling_back import Fence, Part, late, part, roll_back

NAME = "aa-rollback"
WINDOW_HOURS = 24


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    parser.add_argument("--database", metavar="DB", type=cli.text,
                        help="the database that the rows came from (default: the only one that is configured)")
    parser.add_argument("--table", metavar="[SCHEMA.]TABLE", type=cli.text,
                        help="the table that the rows came from (default: every table that --run archived); alone, it goes on with a rollback "
                             "of the table that was interrupted")
    parser.add_argument("--run", metavar="RUN", help="undo what this run archived; aa-ls shows the runs")
    parser.add_argument("--last", metavar="N", type=cli.at_least_one, help="undo only the last N batches of the table, or of the run in the table")
    parser.add_argument("--window", metavar="HOURS", type=cli.at_least_one, default=WINDOW_HOURS,
                        help="refuse batches that were archived more than so many hours ago (default: %(default)s hours)")
    parser.add_argument("--force", action="store_true", help="undo them also outside the window, and ask nothing on a terminal")
    parser.add_argument("--disable-triggers", action="store_true",
                        help="keep the table's own triggers from firing on the rows; takes a lock that writers wait for")
    parser.add_argument("--dry-run", action="store_true",
                        help="write nothing: prove the objects, compare with the table in a read-only transaction, and say what would be done")
    parser.add_argument("--output", choices=("text", "json"), help="form of the report (default: text on a terminal, json elsewhere)")
    return parser


def run(command: Command) -> int:
    """Lock, choose, ask, and undo table after table; one that fails does not stop the next."""
    args = command.args
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    database = _database(settings, args)
    store = open_store(settings, watch=command.sink.stream)
    control = connect.connect(database, purpose="rollback")
    try:
        lock = Lock(settings, database, control)
    except BaseException:
        control.close()
        raise
    scope: Optional[dict[int, str]] = None
    try:
        tables = choose.tables(store, database.name, [args.table] if args.table else [])
        if args.dry_run:
            connect.execute(control, "SET default_transaction_read_only = on")
            _require_nobody(control, database)
        elif settings.locking.scope == "table":
            tables = [(each.schema, each.table) for each in _chosen(store, database, tables, args)]
            scope = {oid: ".".join(table) for table in tables if (oid := targets.find(control, targets.Place(database, *table))) is not None}
        if not args.dry_run:
            lock.take(scope)
        with lock.beating() if not args.dry_run else contextlib.nullcontext():
            held = recover_database(settings, store, database, control, None, tables if scope is not None else None, dry_run=args.dry_run).held
            parts = _chosen(store, database, tables, args)
            _require_own(store, control, database, parts, held)
            _require_young(control, parts, args)
            if not args.dry_run and not _agreed(command, parts):
                raise Failed("nothing was rolled back")
            accounts = [_one(command, settings, store, lock, each, scope is not None) for each in parts]
    finally:
        lock.release()
    return exits.combined(made.code for made in accounts)


def _one(command: Command, settings: Config, store: Store, lock: Lock, wanted: Part, per_table: bool) -> Account:
    """Undo what is meant of one table, and say what came of it."""
    args = command.args
    database = _database(settings, args).name
    source = (database, wanted.schema, wanted.table)
    rollback = names.run_id(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), int.from_bytes(os.urandom(4), "big"))
    made = Account(rollback, source, source, _asked(args), args.dry_run)
    if wanted.batches or wanted.begun is not None:
        place = targets.parse(None, settings, *source)
        oid = targets.find(lock.control, place) if per_table else None
        roll_back(store, place, wanted, made, Fence(lock, oid, place.title), silent=args.disable_triggers)
    made.end(store)
    _say(command, made)
    return made


def _database(settings: Config, args: Any) -> Database:
    """Where the rows came from. Raises ConfigError unless it is configured, and the flags say what is to be undone."""
    name = args.database or (settings.databases[0].name if len(settings.databases) == 1 else None)
    if name is None:
        raise ConfigError("nothing says which database the rows came from", hint="name it with --database")
    database = settings.database(name)
    if database is None:
        raise ConfigError(f"there is no database '{name}' in '{settings.path}'", hint="rows go back where they came from; aa-restore --into puts "
                          "them elsewhere")
    if not (args.run or args.table):
        raise ConfigError("nothing says what to undo", hint="--run RUN, or --table TABLE --last N; aa-ls shows the runs and batches")
    if args.last and not args.table:
        raise ConfigError("--last counts the batches of one table", hint="name it with --table")
    return database


def _chosen(store: Store, database: Database, tables: Sequence[tuple[str, str]], args: Any) -> list[Part]:
    """What is to be undone of each table, and the tables of which something is meant."""
    begun: dict[tuple[str, str], Open] = {(each.schema, each.table): each for each in rollbacks.unfinished(store, database.name)}
    found: list[Part] = []
    for table in tables:
        every = choose.batches(store, database.name, *table, choose.Selection())
        meant = [batch for batch in every if args.run is None or batch.run == args.run]
        if meant:
            found.append(part(every, lambda batch: args.run is None or batch.run == args.run, args.last, begun.get(table)))
    if args.run and not found:
        raise ConfigError(f"nothing that run '{args.run}' archived is in the archive of database '{database.name}'", hint="'aa-ls' shows the runs")
    for each in found:
        if each.begun is not None:
            log.warning("rollback.goes_on", f"rollback {each.begun.rollback} of {each.schema}.{each.table} was interrupted, and goes on with "
                        f"{len(each.batches)} of {len(each.begun.stems)} batches", hint="what else is to be undone needs another call")
        elif not (args.run or args.last):
            raise ConfigError(f"nothing says how much of {each.schema}.{each.table} to undo", hint="--last N or --run RUN does")
    return found


def _require_nobody(control: connect.Connection, database: Database) -> None:
    """A dry run takes no lock, so it looks."""
    found = lock_holders.holders(control)
    if found:
        raise LockHeld(f"a run is at work in database '{database.name}': {found[0].words}", hint="look again when it has ended")


def _require_own(store: Store, control: connect.Connection, database: Database, parts: Sequence[Part], held: dict[tuple[str, str], str]) -> None:
    here = witness.place(control)
    for each in parts:
        if (each.schema, each.table) in held:
            raise ConfigError(f"table '{each.schema}.{each.table}' is held back: {held[each.schema, each.table]}",
                              hint="'aa-recover --decide' settles it")
        owner.require(store, names.table_dir(store.prefix, database.name, each.schema, each.table), here)


def _require_young(control: connect.Connection, parts: Sequence[Part], args: Any) -> None:
    """Raise ConfigError for batches outside the window; what was begun within it may end."""
    batches: list[Batch] = [batch for each in parts if each.begun is None for batch in each.batches]
    found = late(control, batches, args.window)
    if found and not args.force:
        raise ConfigError(f"{found} of {len(batches)} batches were archived more than {args.window} hours ago",
                          detail=f"the oldest on {min(batch.committed_at or '' for batch in batches)}",
                          hint="--force undoes them all the same, --window HOURS sets another limit; aa-restore puts rows back without undoing")


def _agreed(command: Command, parts: Sequence[Part]) -> bool:
    """The one question, on a terminal only."""
    if command.args.force or command.stdin is None or sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    told = "".join(f"{each.schema}.{each.table}: {each.rows:,} rows of {len(each.batches):,} batches\n" for each in parts)
    return cli.agreed(f"{told}put them back?", sys.stdin, sys.stderr)


def _asked(args: Any) -> dict[str, Any]:
    """What was asked for, as the report of a restore has it."""
    return {"restore_all": False, "start_date": None, "end_date": None, "run": args.run, "s3_key": None, "where": [], "create_table": False,
            "conflict_strategy": load.FAIL, "schema_strategy": differences.STRICT, "ignore_watermark": True,
            "disable_triggers": args.disable_triggers}


def _say(command: Command, made: Account) -> None:
    """The report: nothing under --quiet."""
    if command.args.quiet:
        return
    if not command.as_text:
        command.sink.emit(made.as_json(account.END))
        return
    would = "would be " if made.dry_run else ""
    lines = [f"{'.'.join(made.source[1:])} of {made.source[0]}: {made.outcome}",
             f"  {len(made.objects):,} of {made.chosen:,} batches {would}rolled back, {made.inserted:,} rows {would}put back, {made.same:,} were "
             f"there already, {made.conflicts:,} in conflict; {made.sampled:,} rows compared; {time.monotonic() - made.began:,.1f} s"]
    lines += [f"  failed: {each['s3_key'] or ''} {each['msg']}" for each in made.failures]
    command.sink.write("".join(line + "\n" for line in lines).encode())
