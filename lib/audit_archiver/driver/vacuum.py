"""After a database's pipeline has ended: vacuum each table that rows have left, and look at what that gave.

Not sooner: VACUUM removes nothing that an open transaction can still see, ours included (measured: 0 of 40,000
rows). Nothing here can undo or fail the archiving; a vacuum that did not happen is a warning of its table.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Iterable, Mapping, Optional

from audit_archiver import log
from audit_archiver.config.model import Database, Table
from audit_archiver.driver import figures
from audit_archiver.exits import ArchiverError
from audit_archiver.holder.notes import JobKey, JobNotes, key_of
from audit_archiver.postgres import connect, partitions, space
from audit_archiver.postgres.space import UNREMOVED_SHARE, Effect, Space

TIMEOUT_S = 2 * 3600.0  # of one VACUUM
REMEDY = ("pg_repack or VACUUM FULL returns it to the operating system (VACUUM FULL locks the table exclusively), "
          "REINDEX TABLE CONCURRENTLY what its indexes no longer need")


@dataclass(frozen=True)
class Reclaimed:
    """What became of one table's room. `reusable` is None where no vacuum ran; `problem` says why it did not help."""

    strategy: str
    done: bool
    seconds: float
    before: Optional[Space]
    after: Optional[Space]
    reusable: Optional[int] = None
    problem: Optional[str] = None
    hint: Optional[str] = None

    @property
    def returned(self) -> int:
        """Bytes given back to the operating system; 0 also where the table has grown."""
        return max(0, self.before.total - self.after.total) if self.before and self.after else 0


def sizes(connection: connect.Connection, tables: Iterable[Table]) -> dict[tuple[str, str], Space]:
    """The sizes of the tables that exist, before a run (REQ-VAC-004)."""
    found = {(table.schema, table.name): space.measure(connection, table.schema, table.name) for table in tables}
    return {name: size for name, size in found.items() if size is not None}


def after(database: Database, notes: Iterable[JobNotes], before: Mapping[tuple[str, str], Space], *, run: str,
          full: bool = False, verbose: bool = False) -> dict[JobKey, Reclaimed]:
    """Vacuum the tables of `notes` that rows have left, one after another, on a connection of its own.

    `full` overrides every table's strategy (--vacuum-full). A connection that cannot be had, or breaks, is said and
    ends it: the rows are archived, and autovacuum will come by.
    """
    left = [each for each in notes if each.rows and "refused" not in each.job]
    reclaimed: dict[JobKey, Reclaimed] = {}
    if not left:
        return reclaimed
    try:
        connection = connect.connect(database, purpose="vacuum", run=run, statement_timeout_s=TIMEOUT_S)
    except ArchiverError as error:
        log.warning("vacuum.skipped", f"database '{database.name}' is not vacuumed: {error.msg}", hint=error.hint)
        return reclaimed
    try:
        for each in left:
            _, schema, name = key = key_of(each.job)
            table = partitions.configured(connection, database, schema, name)
            strategy = "full" if full else table.vacuum if table else "standard"
            reclaimed[key] = _one(connection, schema, name, strategy, each.rows, before.get((schema, name)), verbose)
            _tell(f"{schema}.{name}", reclaimed[key])
            if connection.closed:
                break
    finally:
        connection.close()
    return reclaimed


def _one(connection: connect.Connection, schema: str, name: str, strategy: str, deleted: int, before: Optional[Space],
         verbose: bool) -> Reclaimed:
    effect, problem, hint, began = Effect(False, 0.0), None, None, time.monotonic()
    try:
        if strategy != "none":
            effect = space.vacuum(connection, schema, name, strategy, verbose=verbose)
            problem, hint = _problem(strategy, effect, deleted)
        now = space.measure(connection, schema, name)
    except ArchiverError as error:
        effect = Effect(False, time.monotonic() - began)
        return Reclaimed(strategy, False, effect.seconds, before, None, problem=error.msg, hint=error.hint)
    for text in effect.said if verbose else ():
        log.debug("vacuum.detail", text, table=f"{schema}.{name}")
    made = Reclaimed(strategy, effect.done, effect.seconds, before, now, problem=problem, hint=hint)
    if not effect.done or strategy == "analyze" or before is None or now is None:
        return made
    return replace(made, reusable=0 if strategy == "full" else space.reusable(before, now, deleted, effect.unremoved))


def _problem(strategy: str, effect: Effect, deleted: int) -> tuple[Optional[str], Optional[str]]:
    """Why the vacuum did not do what was asked, and what to do (postgres.md S13, T35)."""
    if not effect.done:
        said = next((text.partition(":")[2].strip() for text in effect.said if text.startswith("WARNING")), None)
        return (f"{space.STRATEGIES[strategy]} did nothing" + (f": {said}" if said else ""),
                "only the table's owner, or a role with MAINTAIN on it (PostgreSQL 17), may vacuum it; set 'vacuum_strategy: none' "
                "to leave it to autovacuum")
    if effect.unremoved > deleted * UNREMOVED_SHARE:
        who = effect.held_by or "an older transaction"
        return (f"VACUUM could not remove {figures.counted(effect.unremoved, 'dead row')} yet: {who} may still see them",
                "autovacuum removes them once that has ended")
    return None, None


def _tell(title: str, made: Reclaimed) -> None:
    """REQ-VAC-006, 007: the room per table, in the log; the closing table has it too."""
    if made.problem:
        log.warning("vacuum.problem", f"{title}: {made.problem}", hint=made.hint, table=title, strategy=made.strategy)
    if made.before is None or made.after is None or made.strategy == "none":
        return
    percent = round(100 * made.returned / made.before.total, 1) if made.before.total else 0.0
    inside = "" if made.reusable is None else f"{figures.size(made.reusable)} reusable inside the table, "
    log.info("vacuum.done", f"{title}: {inside}{figures.size(made.returned)} ({percent} %) returned", table=title,
             strategy=made.strategy, done=made.done, reusable=made.reusable, returned=made.returned, percent=percent,
             before=made.before.total, after=made.after.total, seconds=round(made.seconds, 3))
