"""The steps of a self-test, one after another: each leaves every row in one place, or it has failed."""

from __future__ import annotations

import time
import urllib.parse
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence

from audit_archiver import exits
from audit_archiver.exits import ArchiverError, Mismatch
from audit_archiver.selftest.line import Line, Target
from audit_archiver.selftest.rig import Ended, Rig
from audit_archiver.selftest.scratch import Scratch

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"

POINTS = ("select.locked", "holder.copy.half", "serialize.staged", "upload.data.put", "upload.manifest.put", "verify.done", "holder.delete.done",
          "holder.commit.before", "holder.commit.sent", "record.before", "record.commit.put", "archive.end.put")
"""Where a process is killed unless others are asked for: before, between and after each thing that lasts."""
KILLED = ("select.", "serialize.", "upload.", "verify.", "delete.", "holder.", "record.", "archive.")
"""The points that a run in its ordinary form comes by."""

THIRDS = (1, 2)
FREE_S, POLL_S = 60.0, 0.2


class Step(NamedTuple):
    """What was done, how it ended, how long it took, and what there is to say about it."""

    name: str
    outcome: str
    seconds: float
    detail: str


class Skipped(Exception):
    """A step that cannot be done here; its text says why."""


class Steps:
    """Everything that is tried on one scratch database and bucket."""

    def __init__(self, rig: Rig, scratch: Scratch, points: Sequence[str], endpoint: Optional[str], sslmode: Optional[str]) -> None:
        self._rig, self._scratch, self._points, self._endpoint, self._sslmode = rig, scratch, points, endpoint, sslmode
        self._tables: list[str] = []

    def all(self) -> Iterator[Step]:
        """Each step as it ends; the first two say whether the others make sense."""
        for name, work in (("preflight", self._check), ("archive, validate, restore, compare", self._plainly)):
            step = _tried(name, work)
            yield step
            if step.outcome == FAILED:
                return
        for each in self._points:
            yield _tried(f"killed at {each}", lambda each=each: self._killed(each))  # type: ignore[misc]
        passed: dict[str, int] = {}
        for what, cut in (("PostgreSQL", self._database_cut), ("the store", self._store_cut)):
            for third in THIRDS:
                yield _tried(f"connections to {what} cut at {third}/3", lambda cut=cut, third=third: cut(third, passed))  # type: ignore[misc]
        yield _tried("two drivers at once", self._two)
        yield _tried("validate everything", self._validate)

    def _check(self) -> str:
        self._tables.append("t_plain")
        self._before = self._scratch.copy("t_plain")
        _must(self._rig.run("aa-check", self._tables), "aa-check")
        return f"{len(self._scratch.types)} types" + (f"; not on this server: {', '.join(self._scratch.lacking)}" if self._scratch.lacking else "")

    def _plainly(self) -> str:
        _must(self._rig.run("aa-archive", self._tables, "--force"), "aa-archive")
        return self._whole("t_plain", self._before)

    def _killed(self, point: str) -> str:
        """One process is killed at the point; if it was the driver, the next run has to make it good, otherwise this one."""
        table, before = self._new()
        note = self._rig.scratch_file("killed")
        first = self._rig.run("aa-archive", [table], "--force", env={"AA_TEST_POINT": point, "AA_TEST_KILLED": str(note)})
        if not note.exists():
            raise Mismatch(f"nobody came by ({first.said or f'exit code {first.code}'})")
        driver = first.code < 0
        if not driver:
            _must(first, "the run whose stage was killed")
        began = time.monotonic()
        self._next(table)
        healed = f"driver killed, next run after {time.monotonic() - began:.1f} s" if driver else "stage killed, the run went on"
        return f"{healed}; {self._whole(table, before)}"

    def _database_cut(self, third: int, passed: dict[str, int]) -> str:
        host, port = self._rig.server
        if self._sslmode == "verify-full":
            raise Skipped("sslmode=verify-full knows the server by its name, which a line of ours has not")
        target: Target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        more = {} if self._sslmode or not host.startswith("/") else {"sslmode": "disable"}
        return self._cut(target, third, passed, lambda line: {"database": {"host": "127.0.0.1", "port": line.port, **more}})

    def _store_cut(self, third: int, passed: dict[str, int]) -> str:
        url = urllib.parse.urlsplit(self._endpoint or "https://aws")
        if url.scheme != "http" or url.hostname is None:
            raise Skipped("the store is known by the name in its certificate, which a line of ours has not")
        return self._cut((url.hostname, url.port or 80), third, passed,
                         lambda line: {"s3": {"endpoint": f"http://127.0.0.1:{line.port}", "retry_base_s": 0.1}})

    def _cut(self, target: Target, third: int, passed: dict[str, int], through: Callable[[Line], dict[str, Any]]) -> str:
        """All connections break once, when a third, or two, of what an undisturbed run sends has passed."""
        if str(target) not in passed:
            with Line(target) as line:
                table, before = self._new()
                _must(self._rig.run("aa-archive", [table], "--force", **through(line)), "the undisturbed run")
                passed[str(target)] = line.passed
        table, before = self._new()
        with Line(target, passed[str(target)] * third // 3) as line:
            first = self._rig.run("aa-archive", [table], "--force", **through(line))
            if not line.cuts:
                raise Mismatch(f"so many bytes did not pass ({first.said or f'exit code {first.code}'})")
        self._next(table)
        said = "the run went on" if first.code == exits.OK else f"exit code {first.code}, the next run made it good"
        return f"{said}; {self._whole(table, before)}"

    def _two(self) -> str:
        table, before = self._new()
        both = [self._rig.start("aa-archive", [table], "--force") for _ in range(2)]
        codes = sorted(self._rig.finish(child).code for child in both)
        if codes not in ([exits.OK, exits.OK], [exits.OK, exits.LOCKED]):
            raise Mismatch(f"exit codes {codes}")
        self._next(table)
        return f"exit codes {codes[0]} and {codes[1]}; {self._whole(table, before)}"

    def _validate(self) -> str:
        _must(self._rig.run("aa-validate", self._tables, "--depth", "full"), "aa-validate")
        return f"{len(self._tables)} tables"

    def _new(self) -> tuple[str, tuple[int, str]]:
        table = f"t_{len(self._tables)}"
        self._tables.append(table)
        return table, self._scratch.copy(table)

    def _next(self, table: str) -> None:
        """The next normal run, which needs no hand; it waits only for the server to notice who is dead."""
        deadline = time.monotonic() + FREE_S
        while (ended := self._rig.run("aa-archive", [table], "--force")).code == exits.LOCKED and time.monotonic() < deadline:
            time.sleep(POLL_S)
        _must(ended, "the next run")

    def _whole(self, table: str, before: tuple[int, str]) -> str:
        """Restore beside the table and compare: the rows left and the rows archived are the rows that were."""
        if due := self._scratch.due(table):
            raise Mismatch(f"{due} rows are due and still in the table")
        back = f"{table}_back"
        _must(self._rig.run("aa-restore", [table], "--table", f"aa_selftest.{table}", "--restore-all", "--into", f"aa_selftest.{back}",
                            "--create-table"), "aa-restore")
        after = self._scratch.digest(table, back)
        if after != before:
            raise Mismatch(f"{before[0]} rows before, {after[0]} after; digest {before[1][:8]}, now {after[1][:8]}")
        return f"{before[0]:,} rows, digest equal"


def _tried(name: str, work: Callable[[], str]) -> Step:
    began = time.monotonic()
    try:
        outcome, detail = PASSED, work()
    except Skipped as why:
        outcome, detail = SKIPPED, str(why)
    except ArchiverError as error:
        outcome, detail = FAILED, str(error)
    return Step(name, outcome, round(time.monotonic() - began, 3), detail)


def _must(ended: Ended, what: str) -> None:
    if ended.code != exits.OK:
        raise Mismatch(f"{what} ended with {ended.code}: {ended.said or 'it said no error'}")
