"""Find out what interrupted runs left, and record it, abandon it, or hold it for a person to decide.

Reads the bucket, PostgreSQL and the staging directory; writes commit records, evidence files and run ends, and a
report. Takes the lock of each database first, and decides by two witnesses: the keys in the table and the status of
the transaction. Every run recovers by itself before it begins; this command is for looking, for deciding by hand and
for cleaning up. A rerun finds nothing left to do. No row of a table is ever written or deleted.
"""

from __future__ import annotations

import contextlib
from typing import Any, Optional, Sequence

from audit_archiver import cli, config, exits, log
from audit_archiver.catalogue import cleanup
from audit_archiver.catalogue.decide import ABANDON, HOLD, RECORD, WAIT
from audit_archiver.catalogue.recover import Verdict, recover_database
from audit_archiver.cli import Command
from audit_archiver.config.model import Config, Database, Table
from audit_archiver.exits import ArchiverError, ConfigError, LockHeld
from audit_archiver.locking.lock import Lock
from audit_archiver.objectstore.client import Store, open_store
from audit_archiver.postgres import connect, lock_holders
from audit_archiver.preflight.plan import Selection, selected

NAME = "aa-recover"
WISHES = ("record", "abandon")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    parser.add_argument("--database", metavar="DB", action="append", default=[], type=cli.text,
                        help="recover this database only; may be repeated (default: every configured one)")
    parser.add_argument("--table", metavar="[SCHEMA.]TABLE", action="append", default=[], type=cli.text,
                        help="recover this table only; may be repeated; runs are not ended then "
                             "(default: every table that was ever archived)")
    parser.add_argument("--staging", metavar="DIR", help="staging directory (default: as aa-serialize finds it)")
    parser.add_argument("--dry-run", action="store_true", help="change nothing; say what would be done")
    parser.add_argument("--decide", metavar="BATCH=record|abandon", action="append", default=[], type=_decision,
                        help="settle a batch that is held or undecided: record it (what is gone from the table is archived, what is "
                             "there stays there), or abandon it; BATCH is its name as the report shows it; may be repeated")
    parser.add_argument("--adopt", action="store_true",
                        help="this server or database has taken the place of the one that the bucket knows (restored from a dump, "
                             "upgraded): decide its batches by the keys here, and own its tables from now on")
    parser.add_argument("--cleanup", action="store_true",
                        help="also remove the objects of batches that were abandoned more than an hour ago, and uploads in parts "
                             "that were begun more than s3.multipart_timeout_hours ago (24); the evidence stays")
    parser.add_argument("--output", choices=("text", "json"),
                        help="form of the report on stdout (default: text on a terminal, json elsewhere)")
    return parser


def run(command: Command) -> int:
    """Recover database after database; one that fails does not stop the next."""
    args = command.args
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    chosen = selected(settings, Selection(databases=tuple(args.database), tables=tuple(args.table)))
    decisions = dict(args.decide)
    if decisions and len(chosen) > 1:
        raise ConfigError("--decide needs one database", hint="name it with --database")
    store = open_store(settings, watch=command.sink.stream)
    report: list[dict[str, Any]] = []
    failures: list[ArchiverError] = []
    for database, tables in chosen:
        try:
            report.append(_recover(command, settings, store, database, tables if args.table else None, decisions))
        except ArchiverError as error:
            if len(chosen) == 1:
                raise
            log.error("recover.failed", f"{database.name}: {error.msg}", detail=error.detail, hint=error.hint, at=error.at, code=error.code)
            failures.append(error)
    _say(command, report)
    held = any(each["rollbacks"] or any(verdict["verdict"] == HOLD for verdict in each["verdicts"]) for each in report)
    if failures:
        codes = {error.code for error in failures}
        return exits.SOME_FAILED if report else codes.pop() if len(codes) == 1 else exits.FAILED
    return exits.FAILED if held else exits.OK


def _recover(command: Command, settings: Config, store: Store, database: Database, tables: Optional[list[Table]],
             decisions: dict[str, str]) -> dict[str, Any]:
    """Recover one database under its lock; what was found and done."""
    args = command.args
    chosen = None if tables is None else [(table.schema, table.name) for table in tables]
    staging = config.staging_root(settings, args.staging, command.env)
    control = connect.connect(database, purpose="recover")
    with contextlib.ExitStack() as ending:
        ending.callback(control.close)
        if args.dry_run:
            connect.execute(control, "SET default_transaction_read_only = on")
            _require_nobody(control, database)
        else:
            lock = Lock(settings, database, control)
            ending.callback(lock.release)
            lock.take(None)
            ending.enter_context(lock.beating())
        outcome = recover_database(settings, store, database, control, None, chosen, staging=staging, dry_run=args.dry_run,
                                   decisions=decisions, adopt=args.adopt)
        cleaned = cleanup.Cleaned()
        if args.cleanup:
            cleaned = cleanup.clean(store, database.name, chosen, upload_hours=settings.s3.multipart_timeout_hours, dry_run=args.dry_run)
    for verdict in outcome.verdicts:
        if verdict.verdict == HOLD:
            log.error("recover.hold", f"{database.name}: {verdict.words}", **verdict.evidence, hint=_remedy(verdict))
    for (schema, table), words in outcome.rollbacks.items():
        log.error("recover.rollback", f"{database.name} {schema}.{table}: {words}", hint=f"'aa-rollback --database {database.name} --table "
                  f"{schema}.{table}' goes on where it ended; the table is left alone until then")
    return {"database": database.name, "verdicts": [_as_json(verdict) for verdict in outcome.verdicts], "ended": outcome.ended,
            "rollbacks": [{"schema": schema, "table": table, "why": words} for (schema, table), words in outcome.rollbacks.items()],
            "forgotten": outcome.forgotten, "removed": cleaned.objects, "uploads_given_up": cleaned.uploads, "kept": cleaned.kept}


def _require_nobody(control: connect.Connection, database: Database) -> None:
    """A dry run takes no lock, so it looks: batches in flight would seem interrupted."""
    found = lock_holders.holders(control)
    if found:
        raise LockHeld(f"a run is at work in database '{database.name}': {found[0].words}", hint="look again when it has ended")


def _remedy(verdict: Verdict) -> str:
    look = f"'aa-delete --explain {verdict.line}' lists the rows; " if verdict.line else ""
    return f"{look}'aa-recover --database ... --decide {verdict.name}=record' (or =abandon) settles it"


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {"batch": verdict.name, "schema": verdict.table[0], "table": verdict.table[1], "day": verdict.day, "run": verdict.run,
            "verdict": verdict.verdict, "why": verdict.why, "evidence": verdict.evidence, "stem": verdict.stem, "line": verdict.line}


def _say(command: Command, report: list[dict[str, Any]]) -> None:
    """The report: nothing under --quiet."""
    if command.args.quiet:
        return
    if not command.as_text:
        command.sink.emit({"format": "aa-recover", "version": 1, "dry_run": command.args.dry_run, "databases": report})
        return
    for each in report:
        command.sink.write("".join(line + "\n" for line in _text(each, command.args.dry_run)).encode())


def _text(found: dict[str, Any], dry_run: bool) -> list[str]:
    words = {RECORD: "recorded", ABANDON: "abandoned", HOLD: "held", WAIT: "undecided"}
    would = "would be " if dry_run else ""
    lines = [f"  {would if each['verdict'] in (RECORD, ABANDON) else ''}{words[each['verdict']]:9}  {each['batch']}  {each['why']}"
             for each in found["verdicts"]]
    lines += [f"  held       {each['schema']}.{each['table']}  {each['why']}" for each in found["rollbacks"]]
    lines += [f"  run {run} is settled" for run in found["ended"]]
    lines += [f"  {would}removed from staging: {path}" for path in found["forgotten"]]
    lines += [f"  {would}removed: {key}" for key in found["removed"]]
    lines += [f"  upload {would}given up: {key}" for key in found["uploads_given_up"]]
    lines += [f"  kept, since rows of it were in neither place: {stem}" for stem in found["kept"]]
    return [f"{found['database']}:", *lines] if lines else [f"{found['database']}: nothing to recover"]


def _decision(argument: str) -> tuple[str, str]:
    batch, _, wish = cli.text(argument).rpartition("=")
    if not batch or wish not in WISHES:
        raise ConfigError(f"--decide '{argument}' is no decision", hint="write BATCH=record or BATCH=abandon")
    return batch.rpartition("/")[2], wish
