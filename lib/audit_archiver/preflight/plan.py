"""What a run will do to a database: a job line for each table, also for one that is refused, with the reason.

    planned = plan_database(database, config, run, Selection())
    planned.jobs     job lines in the order to work in
    planned.notes    what a person should hear of it

Reads PostgreSQL and writes nothing. A table that cannot be planned does not stop the next one, and a database
that cannot be reached refuses its own tables only (REQ-DB-005, T58).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Optional, Sequence

from audit_archiver.config.model import Config, Database, Table
from audit_archiver.exits import ArchiverError, ConfigError
from audit_archiver.formats import job as jobs
from audit_archiver.formats.hold import Hold
from audit_archiver.postgres import catalog, connect, eligible, held, partitions
from audit_archiver.postgres.rows_sql import Window

SKEW_S = 300  # REQ-TIME-002
HELD, FORCED = "plan.held", "plan.forced"


@dataclass(frozen=True)
class Selection:
    """What the flags of a command ask for; the empty one means everything that is configured."""

    databases: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    start: Optional[str] = None
    end: Optional[str] = None
    limit: Optional[int] = None
    batch_size: Optional[int] = None
    exact: bool = True
    force_rearchive: bool = False


@dataclass(frozen=True)
class Note:
    """Something to log: an event id, a sentence, figures."""

    event: str
    msg: str
    warning: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Planned:
    """A database's jobs and notes."""

    jobs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def held(self) -> list[str]:
        """What is said of rows that are held."""
        return [note.msg for note in self.notes if note.event in (HELD, FORCED)]

    @property
    def refused(self) -> list[dict[str, Any]]:
        """The jobs that are refused."""
        return [job for job in self.jobs if "refused" in job]


def selected(config: Config, selection: Selection) -> list[tuple[Database, list[Table]]]:
    """The databases and tables that a selection means, in the order of the configuration.

    A table is named as TABLE or SCHEMA.TABLE. Raises ConfigError for a name that the configuration does not know,
    naming the known ones, and for a bare name that means tables of several schemas.
    """
    known = [database.name for database in config.databases]
    for name in selection.databases:
        if name not in known:
            raise ConfigError(f"there is no database '{name}' in '{config.path}'", hint=_known(name, known))
    databases = [each for each in config.databases if not selection.databases or each.name in selection.databases]
    if not selection.tables:
        return [(database, list(database.tables)) for database in databases]
    meant: set[tuple[str, str]] = set()
    for name in selection.tables:
        found = [(database, _meant(database, name)) for database in databases]
        if not any(tables for _, tables in found):
            labels = [table.label for database in databases for table in database.tables]
            where = f"database '{databases[0].name}'" if len(databases) == 1 else f"'{config.path}'"
            raise ConfigError(f"there is no table '{name}' in {where}", hint=_known(name, labels))
        meant.update((database.name, table.label) for database, tables in found for table in tables)
    chosen = [(database, [table for table in database.tables if (database.name, table.label) in meant])
              for database in databases]
    return [(database, tables) for database, tables in chosen if tables]


def plan_database(database: Database, config: Config, run: str, selection: Selection, *,
                  tables: Optional[Sequence[Table]] = None, connection: Optional[connect.Connection] = None,
                  opened: Callable[[connect.Connection], None] = lambda connection: None, holds: Sequence[Hold] = ()) -> Planned:
    """Plan `tables` of a database (all that the selection means, by default).

    With a `connection` given it is used and stays open; otherwise one of its own is opened, read-only, and closed;
    `opened` gets to know it, so that another thread can cut it. `holds` are those of the database. Errors become refused jobs, those of the
    connection too: the caller decides what they are worth.
    """
    if tables is None:
        tables = next((found for each, found in selected(config, selection) if each.name == database.name), [])
    planned = Planned()
    try:
        session = connection or connect.connect(database, purpose="plan", run=run)
    except ArchiverError as error:
        planned.jobs = [_refused(database, table, run, error) for table in tables]
        return planned
    try:
        opened(session)
        _plan_tables(session, database, tables, run, selection, planned, holds, own=connection is None)
    finally:
        if connection is None:
            session.close()
    return planned


def _plan_tables(session: connect.Connection, database: Database, tables: Sequence[Table], run: str,
                 selection: Selection, planned: Planned, holds: Sequence[Hold], *, own: bool) -> None:
    found: list[tuple[Optional[catalog.Shape], dict[str, Any]]] = []
    try:
        if own:
            eligible.only_read(session)
        planned.notes += _skew(database, eligible.skew_s(session))
        tables = partitions.leaves(session, tables)
    except ArchiverError as error:
        planned.jobs = [_refused(database, table, run, error) for table in tables]
        return
    for table in tables:
        try:
            shape = catalog.shape(session, table.schema, table.name, table.key, table.timestamp, table.at, table.find)
            found.append((shape, _job(session, database, table, shape, run, selection, planned, holds)))
        except ArchiverError as error:
            found.append((None, _refused(database, table, run, _explained(error, table))))
    planned.jobs = _children_first(found)


def _job(session: connect.Connection, database: Database, table: Table, shape: catalog.Shape, run: str,
         selection: Selection, planned: Planned, holds: Sequence[Hold]) -> dict[str, Any]:
    cutoff = eligible.cutoff(session, table.retention_days + table.safety_buffer_days)
    window = Window(cutoff, selection.start, selection.end)
    if holds:
        window = _held(session, table, shape, window, selection, planned, holds)
    if selection.exact:
        rows = eligible.count(session, shape, window)
        planned.notes += _left_in_place(shape, *eligible.left_in_place(session, shape))
    else:
        rows = eligible.estimate(session, shape, window)
    size = selection.batch_size or table.batch_size
    planned.notes.append(_summary(shape, window, rows, size, table.sleep_s, selection))
    return jobs.build(
        run=run, database=database.name, schema=table.schema, table=table.name, key=list(table.key),
        timestamp=table.timestamp, cutoff=cutoff, start=selection.start, end=selection.end, batch_size=size,
        limit=selection.limit, sleep_s=table.sleep_s, cursor=None, estimate=rows, shape_sha256=shape.sha256,
        **({"find": list(table.find)} if table.find else {}), **({"held": [list(each) for each in window.held]} if window.held else {}),
        **({"force_rearchive": True} if selection.force_rearchive else {}))


def _held(session: connect.Connection, table: Table, shape: catalog.Shape, window: Window, selection: Selection, planned: Planned,
          holds: Sequence[Hold]) -> Window:
    """The window without the rows that are held, each hold noted; with --force-rearchive the whole window."""
    force = selection.force_rearchive
    try:
        found = held.of_table(session, holds, table.schema, table.name, table.timestamp)
    except ConfigError as error:
        if not force:
            raise
        planned.notes.append(Note(FORCED, f"--force-rearchive: {error.msg}", True, {"table": shape.title}))
        return window
    for hold in found:
        with_it = replace(window, held=(*window.held, hold.range))
        rows = eligible.count(session, shape, window) - eligible.count(session, shape, with_it) if selection.exact else None
        many = "" if rows is None else f"{rows} eligible "
        said = f"{shape.title}: {many}{hold.words}" + ("; --force-rearchive archives them all the same" if force else "")
        planned.notes.append(Note(FORCED if force else HELD, said, True, {
            "table": shape.title, "hold": hold.hold, "until": hold.until, "rows": rows}))
        window = with_it
    return replace(window, held=()) if force else window


def _refused(database: Database, table: Table, run: str, error: ArchiverError) -> dict[str, Any]:
    msg = "; ".join(part for part in (error.msg, error.detail, error.hint) if part)
    why = {"code": error.code, "msg": msg, "at": error.at or table.at}
    return jobs.build(run=run, database=database.name, schema=table.schema, table=table.name,
                      refused={key: value for key, value in why.items() if value is not None})


def _explained(error: ArchiverError, table: Table) -> ArchiverError:
    """A name with a dot is mostly a schema and a table that were written as one."""
    schema, dot, name = table.name.partition(".")
    if dot and "does not exist" in error.msg:
        error.hint = f"if '{schema}' is the schema, write 'schema: {schema}' and 'name: {name}'"
    return error


def _children_first(found: list[tuple[Optional[catalog.Shape], dict[str, Any]]]) -> list[dict[str, Any]]:
    """The jobs in the order of the configuration, but a table after the planned ones that reference it (S3).

    Rows that are still referenced are left in place, so the referencing rows must go first. Tables that reference
    each other in a circle keep their order.
    """
    waiting = list(found)
    ordered: list[dict[str, Any]] = []
    while waiting:
        names = {(shape.schema, shape.name) for shape, _ in waiting if shape}
        free = [entry for entry in waiting if entry[0] is None or not any(
            (reference.schema, reference.child) in names for reference in entry[0].references if not reference.itself)]
        chosen = free or waiting[:1]
        ordered += [job for _, job in chosen]
        waiting = [entry for entry in waiting if not any(entry is each for each in chosen)]
    return ordered


def _meant(database: Database, name: str) -> list[Table]:
    found = [table for table in database.tables if name in (table.label, table.name)]
    if len(found) > 1:
        labels = " and ".join(f"'{table.label}'" for table in found)
        raise ConfigError(f"'{name}' means {labels} in database '{database.name}'", hint="write SCHEMA.TABLE")
    return found


def _known(name: str, known: list[str]) -> str:
    short = {each.rpartition(".")[2]: each for each in known}
    near = difflib.get_close_matches(name, [*known, *short], 1, 0.6)
    if near:
        return f"did you mean '{short.get(near[0], near[0])}'?"
    return f"known are: {', '.join(known)}"


def _skew(database: Database, seconds: float) -> list[Note]:
    if abs(seconds) <= SKEW_S:
        return []
    return [Note("plan.clock", f"the clock of database '{database.name}' is {abs(seconds):.0f} s "
                 f"{'ahead of' if seconds > 0 else 'behind'} this host's; cutoffs follow the database's", True,
                 {"database": database.name, "skew_s": round(seconds)})]


def _left_in_place(shape: catalog.Shape, nulls: int, infinite: int) -> list[Note]:
    if not nulls and not infinite:
        return []
    parts = [f"{number} {kind}" for number, kind in ((nulls, "without a timestamp"), (infinite, "with an infinite one")) if number]
    return [Note("plan.left", f"{shape.title}: rows that stay in the table for ever: {', '.join(parts)}", True,
                 {"table": shape.title, "null_timestamps": nulls, "infinite_timestamps": infinite})]


def _summary(shape: catalog.Shape, window: Window, rows: int, batch_size: int, sleep_s: float, selection: Selection) -> Note:
    taken = rows if selection.limit is None else min(rows, selection.limit)
    batches = math.ceil(taken / batch_size)
    pause = max(0, batches - 1) * sleep_s
    about = "" if selection.exact else "about "
    msg = f"{shape.title}: {about}{rows} rows older than {window.cutoff}"
    if taken < rows:
        msg += f", of which {taken} are taken"
    if batches:
        msg += f", in up to {batches} batches" + (f" with {pause:g} s of sleep between them" if pause else "")
    return Note("plan.table", msg, False, {"table": shape.title, "cutoff": window.cutoff, "rows": rows,
                                           "batches": batches, "sleep_s": pause})
