"""Validate what a selection means, table after table; one that cannot be looked at does not hide the next."""

from __future__ import annotations

from typing import Callable, Optional, Sequence

from audit_archiver import exits, lines, log
from audit_archiver.catalogue import archived, runs
from audit_archiver.config.model import Config
from audit_archiver.exits import ArchiverError, ConfigError, InputError, Mismatch, NetworkError
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.restore import choose
from audit_archiver.validate.findings import FAIL, LIGHT, UNKNOWN, WARN, Finding, Report, Where, could_not_look
from audit_archiver.validate.in_table import AUTO, NO, YES, Tables
from audit_archiver.validate.subset import WHOLE
from audit_archiver.validate.table import Asked, Validation


def validate(config: Config, store: Store, databases: Sequence[str], asked: Asked, *, against_table: str = AUTO,
             s3_key: Optional[str] = None) -> Report:
    """The report of a validation. Raises ConfigError for a selection that means nothing; whatever else goes wrong is a finding.

    `against_table` says whether archived keys are looked up in the database: AUTO where the depth reads keys and it can be reached.
    """
    report = Report(asked.depth, str(asked.subset) if asked.subset != WHOLE else None, executed=asked.execute)
    only = choose.one(store, s3_key) if s3_key else None
    refused: list[ConfigError] = []
    for name in [only.database] if only else databases:
        try:
            _Database(config, store, name, asked, report, against_table).run(only)
        except ConfigError as error:
            refused.append(error)  # a table that is meant need not be archived of each database
        except (InputError, Mismatch) as error:
            report.add(Finding("table.unknown", Where(name), error.msg))
        except ArchiverError as error:
            report.add(could_not_look(Where(name), error))
            if isinstance(error, NetworkError):
                break  # the store is away, for the next database as well
    if refused and not report.looked["tables"]:
        raise refused[0]
    return report


def say(report: Report, *, write: Callable[[bytes], object], text: bool) -> int:
    """Write a report, as lines for people (`text`) or as JSON, and log its failures; the exit code.

    Each failure is an error in the log; beside lines that name them already there is one for all.
    """
    write("".join(f"{line}\n" for line in report.lines()).encode() if text else lines.dump(report.as_json()))
    bad = [each for each in report.findings if each.severity in (FAIL, UNKNOWN)]
    if report.exit == exits.OK:
        log.info("validate.done", f"{report.looked['batches']} batches at depth {report.depth}: nothing is wrong with what was looked at",
                 warnings=report.statuses[WARN])
    elif text:
        log.error("validate.failed", f"{len(bad)} failed: {', '.join(dict.fromkeys(each.check for each in bad))}", code=report.exit)
    else:
        for each in bad:
            log.error("validate.failed", f"{each.where}: {each.text}", hint=each.advice, check=each.check, object=each.object, code=report.exit)
    return report.exit


class _Database:
    """The tables of one database, and its runs."""

    def __init__(self, config: Config, store: Store, name: str, asked: Asked, report: Report, against_table: str) -> None:
        self._store, self._name, self._asked, self._report = store, name, asked, report
        self._tables = Tables(config, name)
        self._runs: set[str] = set()
        self._abandoned: set[str] = set()
        self._against = self._tables if self._can_ask(against_table) else None

    def run(self, only: Optional[archived.Batch]) -> None:
        """Look at the one batch, or at every table that is meant."""
        try:
            begun, ended = map(set, runs.records(self._store, self._name))
            if only is not None:
                self._look(Where(self._name, only.schema, only.table), ended, only)
                return
            tables = choose.tables(self._store, self._name, self._asked.selection.tables)
            for schema_name, table in tables:
                self._look(Where(self._name, schema_name, table), ended, None)
            if not tables:
                self._report.add(Finding("archive.empty", Where(self._name), "nothing is archived of it",
                                         object=self._store.url(names.database_dir(self._store.prefix, self._name))))
            if self._asked.whole and not self._asked.selection.tables:
                self._look_at_runs(begun & ended)
        finally:
            self._tables.close()

    def _look(self, where: Where, ended: set[str], only: Optional[archived.Batch]) -> None:
        validation = Validation(self._store, where, self._asked, self._report, self._against, ended)
        try:
            validation.run(only)
        except NetworkError:
            raise
        except ArchiverError as error:
            self._report.add(could_not_look(where, error))
        self._runs |= validation.runs
        self._abandoned |= validation.abandoned

    def _can_ask(self, against_table: str) -> bool:
        """Whether keys are looked up in tables; that they are not is said."""
        if against_table == NO or self._asked.depth == LIGHT:
            self._report.leave("whether archived rows are still in their tables" + (
                " (--depth sample or full)" if self._asked.depth == LIGHT else " (--against-table no)"))
            return False
        try:
            self._tables.open()
        except ArchiverError as error:
            if against_table == YES:
                self._report.add(could_not_look(Where(self._name), error))
            self._report.leave(f"whether archived rows are still in the tables of database '{self._name}': {error.msg}")
            return False
        return True

    def _look_at_runs(self, ended: set[str]) -> None:
        """Runs without batches, and batches without a run: the last witnesses of what is gone with its index (T52)."""
        begun = set(runs.records(self._store, self._name)[0])
        empty = ended - self._runs
        if empty:
            empty -= {run for stem in self._abandoned if (run := self._run_of(stem)) is not None}
        for run in sorted(empty):
            self._report.add(Finding("run.empty", Where(self._name), f"run {run} began to write and has ended, and there is no batch of it",
                                     object=self._store.url(names.run_end_key(self._store.prefix, self._name, run))))
        for run in sorted(self._runs - begun):
            self._report.add(Finding("run.unknown", Where(self._name), f"run {run} has archived batches, and no record of its beginning",
                                     object=self._store.url(names.run_start_key(self._store.prefix, self._name, run))))

    def _run_of(self, stem: str) -> Optional[str]:
        """The run of an abandoned batch, as the evidence says."""
        key = stem + names.ABANDONED
        try:
            value = lines.parse(self._store.get_bytes(key), f"'{self._store.url(key)}'")
            schema.validate("abandoned", value, f"'{self._store.url(key)}'")
        except InputError:
            return None
        return None if value["run"] is None else str(value["run"])
