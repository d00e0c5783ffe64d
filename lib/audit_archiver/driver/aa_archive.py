"""Archive every configured table: lock, check, recover, plan, move batch by batch, record, vacuum, report.

Cron's entry point. Reads the configuration; moves rows older than their retention to the bucket in the strict
order FETCH, UPLOAD, VERIFY, DELETE, COMMIT; writes a report. It holds the transactions and runs the same stages
that a person can run by hand. Killed at any point, the next run finds out what happened and goes on; archived
rows are gone from the table, so a rerun never archives a row twice.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import replace
from typing import Any, Callable, Optional, Sequence

from audit_archiver import cli, config, exits, lines, log
from audit_archiver.catalogue import holds
from audit_archiver.catalogue.recover import Recoverer, recoverer
from audit_archiver.cli import Command
from audit_archiver.config.model import Config, Database, Table
from audit_archiver.driver import dry_run, pipeline, progress, report, results, summary, vacuum, workers
from audit_archiver.driver.ask import confirm
from audit_archiver.driver.database_run import DatabaseRun
from audit_archiver.driver.leftover import still_referenced
from audit_archiver.exits import ArchiverError, ConfigError, Failed
from audit_archiver.holder.session import DatabaseSession, Recover, Standing
from audit_archiver.objectstore.client import Store, open_store
from audit_archiver.points import point
from audit_archiver.postgres import catalog, partitions
from audit_archiver.postgres.space import Space
from audit_archiver.preflight import checks, findings, on_run, validate
from audit_archiver.preflight.findings import Finding
from audit_archiver.preflight.plan import Note, Selection, plan_database, selected
from audit_archiver.stages import aa_plan

NAME = "aa-archive"
WORKERS_MOST = 10  # as the configuration's max_parallel_databases
Part = tuple[Database, list[Table]]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    aa_plan.add_selection(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="change nothing; show what would be archived and the exact SQL")
    mode.add_argument("--validate-only", action="store_true", help="check configuration, databases and bucket, and stop")
    mode.add_argument("--verify-archives", action="store_true", help="look whether what is archived is whole, as aa-validate does, and stop")
    parser.add_argument("--vacuum-full", action="store_true", help="VACUUM FULL each archived table afterwards: it locks the table exclusively")
    parser.add_argument("--force", action="store_true", help="do not ask before deleting; archive a large table without an index too, and more "
                        "than fits into max_run_hours")
    parser.add_argument("--parallel", action="store_true", help="work on several databases at once, as parallel_databases: true does")
    parser.add_argument("--max-workers", metavar="N", type=_workers,
                        help=f"databases that are worked on at once, 1 to {WORKERS_MOST} (default: max_parallel_databases, 3)")
    parser.add_argument("--output", choices=("text", "json"), help="form of the report on stdout (default: text on a terminal, json elsewhere)")
    return parser


def _workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= WORKERS_MOST:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of databases from 1 to {WORKERS_MOST}")
    return int(text)


def run(command: Command) -> int:
    """Archive database after database, or several at once; one that fails does not stop the others (REQ-DB-005)."""
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    at_once = _at_once(command, settings)
    chosen = aa_plan.selection(command.args, exact=True)
    _require_confirmed(command.args)
    wanted = selected(settings, chosen)
    run_id = aa_plan.new_run(command.env)
    log.bind(run_id=run_id)
    for warning in settings.warnings:
        log.warning("config.warning", warning)
    if command.args.validate_only or command.args.dry_run or command.args.verify_archives:
        return _look_only(command, settings, wanted, chosen, run_id)
    store = open_store(settings)
    store.check_bucket()
    archive = Archive(command, settings, store, chosen, run_id)
    if not archive.may_begin(wanted):
        log.error("declined", "nothing was archived: the question was not answered with yes")
        return exits.CONFIG
    archive.signals = pipeline.Signals()  # only now: a Ctrl-C at the question ends it at once
    if at_once > 1 and len(wanted) > 1:
        archive.side_by_side(wanted, at_once)
    else:
        archive.in_turn(wanted)
    return archive.end()


def _require_confirmed(args: argparse.Namespace) -> None:
    """REQ-IDEM-012: what was held back on purpose is archived only if somebody says so twice."""
    if args.force_rearchive and not (args.force or args.dry_run or sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError("--force-rearchive wants a confirmation, and there is no terminal to ask on", hint="add --force")


def _at_once(command: Command, settings: Config) -> int:
    """How many databases may be worked on at the same time (REQ-DB-003, 004; REQ-EXE-004)."""
    parallel, most = command.args.parallel or settings.parallel_databases, command.args.max_workers
    if most and not parallel:
        raise ConfigError("--max-workers has no effect without --parallel", hint="add --parallel, or set 'parallel_databases: true' under 'defaults'")
    return (most or settings.max_parallel_databases) if parallel else 1


def _look_only(command: Command, settings: Config, wanted: Sequence[tuple[Database, list[Table]]], chosen: Selection, run_id: str) -> int:
    """--validate-only, --verify-archives and --dry-run: nothing is locked, archived or deleted."""
    text = command.as_text
    write = (lambda data: None) if command.args.quiet else command.sink.write
    if command.args.validate_only:
        return validate.run(settings, wanted, config.staging_root(settings, None, command.env), write=write, text=text)
    if command.args.verify_archives:
        return _verify_archives(settings, wanted, chosen, write=write, text=text)
    return dry_run.run(settings, wanted, chosen, run_id, write=write, text=text, show_row=command.args.verbose > 0)


def _verify_archives(settings: Config, wanted: Sequence[Part], chosen: Selection, *, write: Callable[[bytes], object], text: bool) -> int:
    """What aa-validate does at depth full, for the selected databases and tables."""
    from audit_archiver.restore import choose  # what no other run needs
    from audit_archiver.validate.run import say, validate
    from audit_archiver.validate.table import FULL, Asked

    asked = Asked(choose.Selection(chosen.tables, chosen.start, chosen.end), FULL)
    return say(validate(settings, open_store(settings), [database.name for database, _ in wanted], asked), write=write, text=text)


class Archive:
    """One run over all chosen databases: what it is doing, and what it came to."""

    def __init__(self, command: Command, settings: Config, store: Store, chosen: Selection, run_id: str) -> None:
        self._args, self._env, self._settings, self._store = command.args, command.env, settings, store
        self._sink, self._chosen, self._run_id = command.sink, chosen, run_id
        asked = self._args.log_format
        self._log_format = settings.observability.log_format if asked == "auto" else asked
        self._style = progress.style_of(sys.stderr, self._args.quiet, self._log_format)
        self._progress = progress.Progress(sys.stderr, self._style)
        self._text = command.as_text and not self._args.quiet
        self._began = time.monotonic()
        self._write: Callable[[bytes], Any] = self._sink.write
        self._tell: Optional[workers.Tell] = None
        self._run = results.Run(run_id, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), settings.s3.bucket, settings.s3.prefix)
        self.signals = pipeline.Signals(install=False)
        self._plan_shown = False
        self._run.warnings += [results.Warned(warning) for warning in settings.warnings]
        if self._style == progress.BAR:
            log.before_each(self._progress.clear)
            if not self._args.verbose:
                log.set_level("WARNING")  # the bar says what the lines of the log would

    def may_begin(self, wanted: Sequence[tuple[Database, list[Table]]]) -> bool:
        """Show the plan and ask the one question, on a terminal without --force; planning reads only."""
        if self._args.force or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return True
        planned: list[dict[str, Any]] = []
        for database, tables in wanted:
            planned_here = plan_database(database, self._settings, self._run_id, self._chosen, tables=tables,
                                         holds=holds.for_plan(self._store, database.name))
            jobs = planned_here.jobs
            for line in (report.head(self._run_id, database, None, self._settings.s3), *report.plan(jobs), *planned_here.held):
                self._progress.above(line)
            planned += jobs
        self._plan_shown = True
        rows, tables_with_rows = report.planned_rows(planned)
        return confirm(rows, tables_with_rows, force=False, stdin=sys.stdin, stderr=sys.stderr)

    def in_turn(self, wanted: Sequence[Part]) -> None:
        """One database after another; after a signal no more begins."""
        for database, tables in wanted:
            if not self.signals.count:
                self.database(database, tables)

    def side_by_side(self, wanted: Sequence[Part], most: int) -> None:
        """Several databases at once, each in a worker; two names of one database never are."""
        shares: dict[str, progress.Share] = {}

        def hear(part: Part, kind: str, value: Any) -> None:
            database, tables = part
            if kind == "log":
                log.pass_on(database.name, value)
            elif kind == "text":
                self._progress.clear()
                self._sink.write(value)
            elif kind == "share":
                shares[database.name] = value
            elif kind == "done":
                made, warnings = value
                self._run.databases.append(made)
                self._run.warnings += warnings
            elif kind == "ended" and not any(made.name == database.name for made in self._run.databases):
                self._run.databases.append(_lost(database, tables, value))

        workers.run(wanted, most, self.signals, work=self._work, hear=hear, apart=lambda part: (part[0].host, part[0].port, part[0].dbname),
                    tick=lambda: self._progress.together(shares.values(), len(self._run.databases), len(wanted)))
        self._progress.leave()
        order = [database.name for database, _ in wanted]
        self._run.databases.sort(key=lambda made: order.index(made.name))

    def _work(self, part: Part, tell: workers.Tell, signals: pipeline.Signals) -> None:
        """A worker's whole life: one database, with everything that is said handed to the parent."""
        log.divert(lambda record: tell("log", record))
        self._tell, self.signals = tell, signals
        self._write = lambda data: tell("text", data)
        if self._style == progress.BAR:
            self._progress = progress.Told(sys.stderr, lambda share: tell("share", share))
        self._run = results.Run(self._run.run, self._run.started_at, self._run.bucket, self._run.prefix)
        try:
            self._store = open_store(self._settings)  # a connection is not for two processes
            self.database(*part)
        except Exception as error:
            self._run.databases[:] = [_failed(*part, cli.explained(error))]
        tell("done", (self._run.databases[0], self._run.warnings))

    def _tick(self, part: DatabaseRun) -> None:
        if self._tell is not None and self._tell.alone and not self.signals.count:
            log.error("worker.alone", f"{part.database.name}: the run that started this worker is gone; the batches in flight are finished")
            self.signals.arrived(signal.SIGTERM)
        self._progress.tick(part.notes)

    def database(self, database: Database, tables: list[Table]) -> None:
        """Lock, recover, plan, archive, record and vacuum one database."""
        sizes: dict[tuple[str, str], Space] = {}
        left: dict[tuple[str, str], Note] = {}
        made = results.DatabaseResult(database.name, report.host(database), [])
        found: list[Finding] = []

        def plan(session: DatabaseSession) -> list[dict[str, Any]]:
            first = made.server is None
            chosen = self._chosen if first else replace(self._chosen, exact=False)  # an attempt counts nothing again
            planned = plan_database(database, self._settings, self._run_id, chosen, tables=tables, connection=session.control,
                                    holds=holds.current(self._store, database.name))
            if not first:
                return planned.jobs
            made.server = catalog.version(session.control.server_version)
            found.extend(self._check(session, database, tables, planned.jobs))
            jobs = checks.refuse(planned.jobs, found)
            sizes.update(vacuum.sizes(session.control, partitions.leaves(session.control, tables)))
            head, shown = report.head(self._run_id, database, made.server, self._settings.s3), report.plan(jobs)
            recovered = [f"recovered: {words}" for words in made.recovered]
            self._say(*(recovered if self._plan_shown else [head, *recovered, *shown]))
            for note in planned.notes:
                (log.warning if note.warning else log.info)(note.event, note.msg, **note.fields)
                if note.warning:
                    self._run.warnings.append(results.Warned(note.msg, database=database.name, table=note.fields.get("table")))
                if note.event == "plan.left":
                    left[note.fields["table"]] = note
            self._progress.expect(jobs)
            return jobs

        recover = recoverer(self._settings, self._store, self._run_id, config.staging_root(self._settings, None, self._env))
        part = DatabaseRun(self._settings, database, self._run_id, self._env, self._flags(), self._noting(recover, made.recovered),
                           plan, self.signals, self._tick)
        part.archive()
        self._progress.close(part.notes)
        try:
            if part.failure is None and part.wrote and recover.end(database, NAME):
                point("archive.end.put")
        except ArchiverError as error:
            part.failure = error  # the next run's recovery ends this one
        jobs = part.jobs or [_unplanned(self._run_id, database, table, part.failure) for table in tables]
        made.tables = results.table_results(jobs, part.notes, failing=[key for key, _ in part.left], failure=part.failure,
                                            stopped=bool(self.signals.count))
        self._vacuum(database, part, made, sizes)
        referenced = {(each.schema, each.table) for each in found if (each.check, each.status) == ("table.references", findings.WARN)}
        counts = still_referenced(database, [job for job in part.jobs if (job["schema"], job["table"]) in referenced], run=self._run_id)
        for table in made.tables:
            table.referenced = counts.get((table.database, table.schema, table.table), 0)
            note = left.get(table.label)
            if note is not None:
                table.null_timestamps, table.infinite_timestamps = note.fields["null_timestamps"], note.fields["infinite_timestamps"]
        self._run.databases.append(made)

    def end(self) -> int:
        """Report, and the exit code of Appendix D for all that was done."""
        run = self._run
        run.seconds = time.monotonic() - self._began
        run.exit = exits.combined(table.code for table in run.tables)
        if self.signals.count:
            run.stopped_by, run.exit = signal.Signals(self.signals.first or 0).name, self.signals.exit_code
        if not self._args.quiet:
            columns = progress.terminal_columns(self._sink.stream) if self._sink.stream.isatty() else None
            self._sink.write("".join(f"{line}\n" for line in report.closing(run, columns)).encode() if self._text
                             else lines.dump(summary.build(run)))
        if run.exit and self._text and self._style == progress.BAR:
            return run.exit  # the same terminal has just shown it
        if run.exit:
            log.error("run.end", report.last_line(run), detail="; ".join(report.failures(run)) or None, code=run.exit)
        else:
            log.info("run.end", report.last_line(run), code=run.exit)
        return run.exit

    def _vacuum(self, database: Database, part: DatabaseRun, made: results.DatabaseResult, sizes: dict[tuple[str, str], Space]) -> None:
        """After the pipeline, and not after a signal (pt-archiver's habit): whoever stops us wants us gone."""
        began = time.monotonic()
        if not self.signals.count:
            reclaimed = vacuum.after(database, part.notes.values(), sizes, run=self._run_id, full=self._args.vacuum_full,
                                     verbose=self._args.verbose > 1)
            for table in made.tables:
                table.reclaimed = reclaimed.get((table.database, table.schema, table.table))
                if table.reclaimed is not None and table.reclaimed.problem:
                    self._run.warnings.append(results.Warned(table.reclaimed.problem, table.reclaimed.hint, database.name, table.label))
            point("archive.vacuumed")
        made.phases = {**part.timings, "vacuum": time.monotonic() - began}

    def _check(self, session: DatabaseSession, database: Database, tables: list[Table], jobs: list[dict[str, Any]]) -> list[Finding]:
        """What the preflight finds before the first batch; warnings are said, the caller refuses what failed."""
        force, amounts = self._args.force, []  # type: bool, list[on_run.Amount]
        found = checks.of_database(session.control, database, tables, force=force, amounts=amounts, jobs=jobs)
        found += checks.of_run(database, on_run.Look(sum(amounts, on_run.Amount()), self._settings.resources.max_run_hours,
                                                     time.monotonic() - self._began, force))
        for finding in found:
            if finding.status == findings.WARN:
                title = f"{finding.schema}.{finding.table}: " if finding.table else f"{database.name}: "
                log.warning("check.warning", title + finding.text, hint=finding.remedy, check=finding.check)
                self._run.warnings.append(results.Warned(finding.text, finding.remedy, finding.database,
                                                         f"{finding.schema}.{finding.table}" if finding.table else None))
        return found

    def _noting(self, recover: Recoverer, said: list[str]) -> Recover:
        """Recovery for the holder, which also notes in words what it did."""
        def noting(database: Database, control: Any, tables: Any) -> Standing:
            point("archive.locked")
            found = recover(database, control, tables)
            words = recover.outcomes[database.name][-1].said()
            said.extend([words] if words else [])
            return found

        return noting

    def _say(self, *texts: str) -> None:
        if self._text:
            self._write("".join(f"{text}\n" for text in texts).encode())

    def _flags(self) -> list[str]:
        """What the stages are told: on a terminal only their errors, so that the bar stands alone."""
        if self._args.quiet or self._style == progress.BAR:
            return ["-q", "--log-format", self._log_format]
        return ["--log-format", self._log_format] + ["-v"] * self._args.verbose


def _unplanned(run_id: str, database: Database, table: Table, failure: Optional[ArchiverError]) -> dict[str, Any]:
    """A job for the report of a table that was never planned, because its database could not be used."""
    why = {"code": failure.code if failure else exits.FAILED, "msg": str(failure or "the run was stopped before it was planned")}
    return {"run": run_id, "database": database.name, "schema": table.schema, "table": table.name, "refused": why}


def _failed(database: Database, tables: Sequence[Table], error: ArchiverError) -> results.DatabaseResult:
    """A database of which nothing is known but why it failed."""
    made = [results.TableResult(database.name, table.schema, table.name, results.FAILED, error=error) for table in tables]
    return results.DatabaseResult(database.name, report.host(database), made)


def _lost(database: Database, tables: Sequence[Table], code: int) -> results.DatabaseResult:
    """A database whose worker ended without a word: killed, for instance for want of memory."""
    error = Failed(f"the process that worked on database '{database.name}' ended with code {code}",
                   hint="what it had committed is archived, though not counted here; the next run settles the rest")
    log.error("worker.lost", f"{database.name}: {error.msg}", hint=error.hint, code=error.code)
    return _failed(database, tables, error)
