"""What a person sees while a run works: one line that is redrawn on a terminal, a JSON line every 5 s elsewhere.

    progress = Progress(sys.stderr, style_of(sys.stderr, quiet, log_format))
    progress.expect(jobs)              when a database is planned
    progress.tick(notes)               often, several times a second; it decides itself when to say something
    progress.above("...")              a line of its own while the bar stands
    log.before_each(progress.clear)    so that a line of the log stands alone too
    progress.close(notes)

Figures come from the holder's notes: rows that have left the table and are committed, nothing earlier.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Iterable, Mapping, Optional, TextIO

from audit_archiver import log
from audit_archiver.driver import figures
from audit_archiver.holder.notes import JobKey, JobNotes, key_of

REDRAW_S = 0.2
AT_LEAST_EVERY_S = 5.0  # REQ-OBS-015
STILL_S = 1.0  # the rate and what is left move on while no batch is committed
RATE_OVER_S = 30.0
BAR_COLUMNS = 30
SHORTEST_BAR = 10
SHORTEST_NAME = 16
COLUMNS = 80

BAR, LOG, NONE = "bar", "log", "none"


@dataclass(frozen=True)
class Figures:
    """The state of the table that is being archived; `rows_per_s` and `eta_s` are None while they are unknown."""

    title: str
    database: str
    rows: int
    total: int
    batch: int
    batches: int
    locked: int
    done: bool
    rows_per_s: Optional[float]
    eta_s: Optional[float]

    @property
    def percent(self) -> int:
        """Of the rows that were planned; 100 only when the table is done, however wrong the estimate was."""
        return 100 if self.done else min(99, round(100 * self.rows / max(1, self.total)))


def style_of(stream: TextIO, quiet: bool, log_format: str = "auto") -> str:
    """A bar on a terminal unless the log is to be JSON, log lines elsewhere, nothing with --quiet (REQ-OBS-013, 014)."""
    if quiet:
        return NONE
    return BAR if stream.isatty() and log_format != "json" else LOG


@dataclass(frozen=True)
class Share:
    """What was done of what is planned, over all tables of a database; the shares of several databases add up."""

    rows: int = 0
    total: int = 0
    batch: int = 0
    batches: int = 0
    locked: int = 0
    working: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.rows + other.rows, self.total + other.total, self.batch + other.batch, self.batches + other.batches,
                     self.locked + other.locked, self.working + other.working)


class Progress:
    """Says how far the run is. `columns` gives the terminal's width, `clock` seconds."""

    def __init__(self, stream: TextIO, style: str, *, clock: Callable[[], float] = time.monotonic,
                 columns: Optional[Callable[[], int]] = None) -> None:
        self._stream, self._style, self._clock = stream, style, clock
        self._columns = columns or (lambda: terminal_columns(stream))
        self._totals: dict[JobKey, int] = {}
        self._untouched: dict[JobKey, JobNotes] = {}
        self._rate: Optional[_Rate] = None
        self._shown: Optional[Figures] = None
        self._began = self._said_at = clock()
        self._on_screen = 0
        self._drawing = threading.RLock()  # the log writes from other threads

    def expect(self, jobs: Iterable[dict[str, Any]]) -> None:
        """Take in how many rows are planned; the plan that follows a failure knows only what is left and does not count."""
        for job in jobs:
            if "refused" not in job:
                limit, estimate = job["limit"], job["estimate"] or 0
                self._totals.setdefault(key_of(job), estimate if limit is None else min(estimate, limit))
                self._untouched.setdefault(key_of(job), JobNotes(job, job["batch_size"]))

    def tick(self, notes: Mapping[JobKey, JobNotes]) -> None:
        """Say the state if it is time to."""
        if self._due() and (current := self._current(notes)) is not None:
            now = self._clock()
            self._show(self._figures(current, now), now)

    def together(self, shares: Iterable[Share], ended: int, of: int) -> None:
        """Say the state of several databases at once, of which so many have ended, in one line; a worker's log says more."""
        if self._style != BAR or not self._due():
            return
        now, found = self._clock(), sum(shares, Share())
        if found.total:
            self._show(self._figure(("", "", ""), f"{ended} of {figures.counted(of, 'database')}", found, self._began, now), now)

    def share(self, notes: Mapping[JobKey, JobNotes]) -> Share:
        """What was done of what was expected."""
        return sum((self._share(notes.get(key, untouched)) for key, untouched in self._untouched.items() if self._totals[key]), Share())

    def above(self, text: str) -> None:
        """Write a line; a bar makes way for it and comes back with the next tick."""
        with self._drawing:
            self.clear()
            self._stream.write(figures.printable(text, self._encoding()) + "\n")
            self._stream.flush()

    def close(self, notes: Mapping[JobKey, JobNotes]) -> None:
        """Draw the last state and leave the line to whatever comes next."""
        current = self._current(notes) if self._style == BAR else None
        if current is not None:
            self._say(self._figures(current, self._clock()), self._clock())
        self.leave()

    def leave(self) -> None:
        """Leave the line that stands there to whatever comes next."""
        with self._drawing:
            if self._on_screen:
                self._stream.write("\n")
                self._stream.flush()
                self._on_screen = 0

    def _current(self, notes: Mapping[JobKey, JobNotes]) -> Optional[JobNotes]:
        """The table at work: the one that began last and still has something to do, else the last one that had."""
        begun = [each for each in list(notes.values()) if each.first_at is not None and self._totals.get(key_of(each.job))]
        working = [each for each in begun if not each.swept and each.error is None]
        return max(working or begun, key=lambda each: (each.first_at or 0, each.rows), default=None)

    def _due(self) -> bool:
        return self._style != NONE and self._clock() - self._said_at >= (REDRAW_S if self._style == BAR else AT_LEAST_EVERY_S)

    def _share(self, notes: JobNotes) -> Share:
        total = notes.rows if notes.swept else max(self._totals.get(key_of(notes.job), 0), notes.rows)
        left = total - notes.rows
        done = left == 0 and (notes.swept or notes.job["limit"] is not None)
        return Share(notes.rows, total, notes.batches, notes.batches + -(-left // max(1, notes.batch_rows)), notes.skipped_locked, int(not done))

    def _figures(self, notes: JobNotes, now: float) -> Figures:
        key = key_of(notes.job)
        several = len({database for database, _, _ in self._totals}) > 1
        title = f"{key[0]} {key[1]}.{key[2]}" if several else f"{key[1]}.{key[2]}"
        return self._figure(key, figures.printable(title), self._share(notes), now if notes.first_at is None else notes.first_at, now)

    def _figure(self, key: JobKey, title: str, share: Share, began: float, now: float) -> Figures:
        if self._rate is None or self._rate.key != key:
            self._rate = _Rate(key, began)
        rate = self._rate.at(now, share.rows)
        return Figures(title=title, database=key[0], rows=share.rows, total=share.total, batch=share.batch, batches=share.batches,
                       locked=share.locked, done=not share.working, rows_per_s=rate, eta_s=(share.total - share.rows) / rate if rate else None)

    def _show(self, found: Figures, now: float) -> None:
        unchanged = self._shown is not None and (found.title, found.rows) == (self._shown.title, self._shown.rows)
        if self._style != BAR or not unchanged or now - self._said_at >= STILL_S:
            self._say(found, now)

    def _say(self, found: Figures, now: float) -> None:
        if self._style == BAR:
            columns = self._columns() - 1  # a full line would scroll
            text = line(found, columns, self._encoding())
            with self._drawing:
                blank = max(0, min(self._on_screen, columns) - figures.width(text))
                self._stream.write("\r" + text + " " * blank + "\r")
                self._stream.flush()
                self._on_screen = figures.width(text)
        else:
            log.info("progress", words(found), database=found.database, table=found.title, rows=found.rows, total=found.total,
                     percent=found.percent, batch=found.batch, batches=found.batches, skipped_locked=found.locked,
                     rows_per_s=None if found.rows_per_s is None else round(found.rows_per_s),
                     eta_s=None if found.eta_s is None else round(found.eta_s))
        self._shown, self._said_at = found, now

    def clear(self) -> None:
        """Take the bar off the screen; the next tick draws it again."""
        with self._drawing:
            if self._on_screen:
                self._stream.write("\r" + " " * self._on_screen + "\r")
                self._on_screen = 0

    def _encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"


class Told(Progress):
    """The progress of one database that another process shows: it gets the shares instead."""

    def __init__(self, stream: TextIO, tell: Callable[[Share], Any], *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, NONE, clock=clock)
        self._tell = tell

    def tick(self, notes: Mapping[JobKey, JobNotes]) -> None:
        """Tell the share if it is time to."""
        now = self._clock()
        if now - self._said_at >= REDRAW_S:
            self._tell(self.share(notes))
            self._said_at = now

    def close(self, notes: Mapping[JobKey, JobNotes]) -> None:
        """Tell the last share."""
        self._tell(self.share(notes))


class _Rate:
    """Rows a second over the last 30 s, or since the table began."""

    def __init__(self, key: JobKey, began: float) -> None:
        self.key = key
        self._seen: Deque[tuple[float, int]] = deque([(began, 0)])

    def at(self, now: float, rows: int) -> Optional[float]:
        """The rate now, None before the first rows."""
        self._seen.append((now, rows))
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_OVER_S:
            self._seen.popleft()
        then, before = self._seen[0]
        return (rows - before) / (now - then) if rows > before and now > then else None


def line(found: Figures, columns: int, encoding: str = "utf-8") -> str:
    """The progress line in at most `columns`: bar, count of locked rows and batch give way before the figures do."""
    title = figures.printable(found.title, encoding)
    locked = f"{figures.counted(found.locked, 'locked row')} left" if found.locked else ""
    rate = "-" if found.rows_per_s is None else figures.rows(round(found.rows_per_s))
    eta = "-" if found.eta_s is None else figures.clock(found.eta_s)
    counts = [f"{figures.rows(found.rows)}/{figures.rows(found.total)}", f"{found.percent}%", f"{rate} rows/s", f"ETA {eta}"]
    batch = f"batch {figures.rows(found.batch)}/{figures.rows(found.batches)}"
    short = figures.shorten(title, SHORTEST_NAME)
    for name, tail, shortest, longest in ((title, [batch, locked], SHORTEST_BAR, BAR_COLUMNS), (title, [batch, locked], 0, 0),
                                          (title, [batch], 0, 0), (short, [batch], 0, 0), (short, [], 0, 0)):
        rest = "  ".join(part for part in [*counts, *tail] if part)
        room = columns - figures.width(name) - figures.width(rest) - 1
        if longest and room >= shortest + 3:
            return f"{name} {bar(found.percent, min(longest, room - 3))} {rest}"
        if not longest and room >= 0:
            return f"{name} {rest}"
    return figures.shorten(f"{short} {counts[0]} {counts[1]}", columns)


def bar(percent: int, columns: int) -> str:
    """[####------] with `columns` places."""
    done = percent * columns // 100
    return "[" + "#" * done + "-" * (columns - done) + "]"


def words(found: Figures) -> str:
    """The state as one sentence of the log."""
    rate = "" if found.rows_per_s is None else f", {figures.rows(round(found.rows_per_s))} rows/s"
    left = "" if found.eta_s is None else f", {figures.clock(found.eta_s)} left"
    return f"{found.title}: {figures.rows(found.rows)} of {figures.rows(found.total)} rows, {found.percent}%{rate}{left}"


def terminal_columns(stream: Any) -> int:
    """The terminal's width; COLUMNS of the environment does not count, since it goes stale when a window is resized."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    except OSError:
        return COLUMNS
