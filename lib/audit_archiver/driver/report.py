"""What aa-archive says to a person: head, plan, closing table, phases, what was left in place, how it ended."""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

from audit_archiver.config.model import S3, Database
from audit_archiver.driver import figures
from audit_archiver.driver.results import DONE, FAILED, NOTHING, PHASES, REFUSED, STOPPED, Run, TableResult
from audit_archiver.driver.vacuum import REMEDY, Reclaimed

HEADINGS = ["TABLE", "ROWS", "LEFT LOCKED", "OBJECTS", "UPLOADED", "RATIO", "ROWS/S", "REUSABLE", "RETURNED"]
GIVE_WAY = ["RATIO", "OBJECTS", "RETURNED", "ROWS/S", "REUSABLE"]  # in this order on a narrow terminal; the JSON report has them all
SHORTEST_NAME = 16
NONE = "-"
NAMED_TOGETHER = 3


def head(run: str, database: Database, server: Optional[str], s3: S3) -> str:
    """The line that says where from and where to."""
    version = f" (PostgreSQL {server})" if server else ""
    return f"run {run}   {database.name} at {host(database)}{version} -> s3://{s3.bucket}/{s3.prefix}"


def host(database: Database) -> str:
    """The server as a person knows it."""
    return "local socket" if not database.host or database.host.startswith("/") else database.host


def plan(jobs: Sequence[Mapping[str, Any]], *, exact: bool = True) -> list[str]:
    """A line per table: how old, how many rows and batches, how long the pauses; or why it is refused (REQ-ARC-010)."""
    names = [figures.printable(f"{job['schema']}.{job['table']}") for job in jobs]
    wide = max(map(figures.width, names), default=0)
    counts = [0 if "refused" in job else _planned(job) for job in jobs]
    digits = max((len(figures.rows(count)) for count in counts), default=0) + (0 if exact else 1)
    return [f"  {figures.pad(name, wide)}  {_plan_line(job, count, digits, exact)}" for name, job, count in zip(names, jobs, counts)]


def planned_rows(jobs: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(rows, tables) that a run of these jobs is about to move."""
    counts = [_planned(job) for job in jobs if "refused" not in job]
    return sum(counts), sum(1 for count in counts if count)


def _planned(job: Mapping[str, Any]) -> int:
    estimate, limit = job["estimate"] or 0, job["limit"]
    return estimate if limit is None else min(estimate, limit)


def _plan_line(job: Mapping[str, Any], count: int, digits: int, exact: bool) -> str:
    if "refused" in job:
        return f"refused: {reason(job['refused']['msg'], job['refused'].get('at'))}"
    shown = f"{'' if exact else '~'}{figures.rows(count)}"
    batches = -(-count // job["batch_size"])
    pauses = max(0, batches - 1) * job["sleep_s"]
    work = figures.counted(batches, "batch", "batches") if count else "nothing to do"
    if pauses:
        work += f", {figures.duration(pauses)} of pauses between them"
    return f"older than {figures.moment(job['cutoff'])}  {shown:>{digits}} rows  {work}"


def reason(msg: str, at: Optional[str]) -> str:
    """A refusal with the line of the configuration that it is about."""
    return figures.printable(msg) + (f" ({at})" if at else "")


def closing(run: Run, columns: Optional[int] = None) -> list[str]:
    """Everything after the last batch: table (in at most `columns`), phases, what stayed and why, room, failures, the last line."""
    lines = closing_table(run, columns) + left_in_place(run)
    if any(table.rows for table in run.tables):
        lines.append(phases(run.phases))
    return lines + room(run) + failures(run) + [last_line(run)]


def closing_table(run: Run, columns: Optional[int] = None) -> list[str]:
    """The tables that rows left or should have left; long names are shortened to fit `columns`, then columns give way."""
    several = len(run.databases) > 1
    shown = [table for table in run.tables if table.rows or table.locked]
    cells = [[(f"{table.database} " if several else "") + figures.printable(table.label), figures.rows(table.rows),
              figures.rows(table.locked), figures.rows(table.batches), figures.size(table.gz_bytes),
              NONE if table.ratio is None else f"{table.ratio:.3f}",
              NONE if table.rows_per_s is None else figures.rows(round(table.rows_per_s)), *_room(table.reclaimed)]
             for table in shown]
    return _fitted([HEADINGS, *cells], columns) if cells else []


def _fitted(cells: list[list[str]], columns: Optional[int]) -> list[str]:
    for heading in GIVE_WAY:
        over = 0 if columns is None else max(map(figures.width, figures.table(cells))) - columns
        names = max(figures.width(line[0]) for line in cells)
        if over <= names - SHORTEST_NAME or over <= 0:
            return figures.table([[figures.shorten(line[0], names - max(0, over)), *line[1:]] for line in cells])
        place = cells[0].index(heading)
        cells = [line[:place] + line[place + 1:] for line in cells]
    return figures.table([[figures.shorten(line[0], SHORTEST_NAME), *line[1:]] for line in cells])


def _room(made: Optional[Reclaimed]) -> tuple[str, str]:
    if made is None or made.before is None or made.after is None or made.strategy == "none":
        return NONE, NONE
    return NONE if made.reusable is None else figures.size(made.reusable, 0), figures.size(made.returned, 0)


def phases(seconds: Mapping[str, float]) -> str:
    """Where the time went; the stages work side by side, so these add up to more than the clock."""
    return "  ".join(f"{phase} {figures.duration(seconds.get(phase, 0.0))}" for phase in PHASES) + " (stages overlap)"


def left_in_place(run: Run) -> list[str]:
    """Rows that are old enough and stayed, or that no run will ever take, by reason."""
    lines = []
    for table in run.tables:
        reasons = (
            (table.locked, "locked by others (the next run takes them)"),
            (table.referenced, "still referenced by other rows"),
            (table.null_timestamps, "without a timestamp"),
            (table.infinite_timestamps, "with an infinite timestamp"),
            (table.inexact, "that would not come back exactly (their keys are in the log)"),
            (table.too_wide, "larger than max_row_mb (their keys are in the log)"),
            (table.failing, "that fail alone (their keys are in the log)"))
        said = [f"{figures.rows(count)} {why}" for count, why in reasons if count]
        if said:
            lines.append(f"left in {_title(run, table)}: {', '.join(said)}")
    return lines


def room(run: Run) -> list[str]:
    """What would return the freed room to the operating system; a vacuum that did not help was said by itself."""
    inside = sum(table.reclaimed.reusable or 0 for table in run.tables if table.reclaimed is not None)
    return [f"{figures.size(inside, 0)} can be used again inside the tables: new rows go there. {REMEDY}"] if inside else []


def failures(run: Run) -> list[str]:
    """Every table that was refused or failed, with its reason and where to look; one line for tables with the same reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for table in run.tables:
        if table.error is not None:
            error = table.error
            said = reason("; ".join(part for part in (error.msg, error.detail, error.hint) if part), error.at)
            found.setdefault((table.outcome, said), []).append(_title(run, table))
    return [f"{outcome}: {_some(titles)}: {said}" for (outcome, said), titles in found.items()]


def _some(titles: list[str]) -> str:
    more = len(titles) - NAMED_TOGETHER
    return ", ".join(titles[:NAMED_TOGETHER]) + (f" and {more} more" if more > 0 else "")


def last_line(run: Run) -> str:
    """done in 57 s: 2 of 3 tables, 1 refused. exit 1."""
    tables = run.tables
    well = sum(1 for table in tables if table.outcome in (DONE, NOTHING))
    parts = [f"{well} of {figures.counted(len(tables), 'table')}"]
    parts += [f"{count} {outcome}" for outcome in (REFUSED, FAILED, STOPPED)
              if (count := sum(1 for table in tables if table.outcome == outcome))]
    if tables and all(table.outcome == NOTHING for table in tables):
        parts = ["nothing to do"]
    word = f"stopped by {run.stopped_by} after" if run.stopped_by else "done in"
    return f"{word} {figures.duration(run.seconds)}: {', '.join(parts)}. exit {run.exit}"


def _title(run: Run, table: TableResult) -> str:
    return figures.printable(f"{table.database} {table.label}" if len(run.databases) > 1 else table.label)
