"""The progress line on a terminal and in the log, on a clock of our own."""

from __future__ import annotations

import io
import json
from typing import Any, Optional

import pytest

from audit_archiver import log
from audit_archiver.driver import figures, progress
from audit_archiver.driver.progress import BAR, LOG, NONE, Figures, Progress
from audit_archiver.holder.notes import JobKey, JobNotes, key_of


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def job(table: str = "audit_logs", database: str = "prod", estimate: int = 1_204_331, limit: Optional[int] = None) -> dict[str, Any]:
    return {"database": database, "schema": "public", "table": table, "estimate": estimate, "limit": limit, "batch_size": 10_000}


def noted(made: dict[str, Any], first_at: float = 1000.0, **values: Any) -> dict[JobKey, JobNotes]:
    return {key_of(made): JobNotes(made, 10_000, first_at=first_at, **values)}


def shown(stream: io.StringIO) -> list[str]:
    """What stood on the line, draw by draw."""
    return [part.rstrip() for part in stream.getvalue().split("\r") if part.strip()]


def figures_of(**values: Any) -> Figures:
    return Figures(**{"title": "public.audit_logs", "database": "prod", "rows": 481_732, "total": 1_204_331, "batch": 49,
                      "batches": 121, "locked": 2, "done": False, "rows_per_s": 28_900.0, "eta_s": 25.0, **values})


@pytest.mark.req("REQ-OBS-011", "REQ-OBS-012", "REQ-OBS-014", "REQ-USE-008")
def test_a_wide_terminal_shows_table_bar_counts_rate_time_left_batches_and_locked_rows() -> None:
    assert progress.line(figures_of(), 140) == (
        "public.audit_logs [############------------------] 481,732/1,204,331  40%  28,900 rows/s  ETA 0:25  "
        "batch 49/121  2 locked rows left")


@pytest.mark.req("REQ-OBS-012")
def test_eighty_columns_are_enough_for_every_figure() -> None:
    assert progress.line(figures_of(), 79) == "public.audit_logs 481,732/1,204,331  40%  28,900 rows/s  ETA 0:25  batch 49/121"
    longer = progress.line(figures_of(title="prod public.audit_logs_of_last_year"), 79)
    for part in ("prod pu...t_year", "481,732/1,204,331", "40%", "28,900 rows/s", "ETA 0:25", "batch 49/121"):
        assert part in longer


@pytest.mark.parametrize("columns", [20, 39, 60, 79, 100, 139, 200])
@pytest.mark.parametrize("title", ["public.t", "a_rather_long_schema.with_a_table_of_a_long_name_too", "audit.протокол_действий",
                                   "öffentlich.監査ログ_監査ログ_監査ログ", "public.e\u0301te\u0301"])
def test_the_line_never_takes_more_columns_than_the_terminal_has(title: str, columns: int) -> None:
    assert figures.width(progress.line(figures_of(title=title), columns)) <= columns


def test_a_name_is_shown_in_what_the_terminal_can_write() -> None:
    text = progress.line(figures_of(title="audit.протокол"), 200, "ascii")
    assert text.isascii() and "\\u043f" in text


def test_a_name_with_control_characters_cannot_steer_the_terminal() -> None:
    text = progress.line(figures_of(title="public.a\x1b[31m\nb"), 200)
    assert text.isprintable() and "\\x1b[31m\\nb" in text


def test_the_bar_is_redrawn_in_place_and_at_most_every_fifth_of_a_second() -> None:
    clock, stream, made = Clock(), io.StringIO(), job()
    seen = Progress(stream, BAR, clock=clock, columns=lambda: 140)
    seen.expect([made])
    for step in range(1, 11):
        clock.now += 0.1
        seen.tick(noted(made, rows=step * 1000, batches=step))
    assert len(shown(stream)) == 5
    assert "\n" not in stream.getvalue() and "\x1b" not in stream.getvalue()


@pytest.mark.req("REQ-OBS-015")
def test_the_bar_moves_on_while_no_batch_is_committed() -> None:
    clock, stream, made = Clock(), io.StringIO(), job()
    seen = Progress(stream, BAR, clock=clock, columns=lambda: 140)
    seen.expect([made])
    clock.now += 1
    seen.tick(noted(made, rows=10_000, batches=1))
    for _ in range(100):
        clock.now += 0.1
        seen.tick(noted(made, rows=10_000, batches=1))
    draws = shown(stream)
    assert 9 <= len(draws) <= 11
    assert "10,000 rows/s" in draws[0] and "909 rows/s" in draws[-1]


def test_a_shorter_line_leaves_nothing_of_the_longer_one_before() -> None:
    clock, stream, long, short = Clock(), io.StringIO(), job("a_table_with_a_long_name"), job("t")
    seen = Progress(stream, BAR, clock=clock, columns=lambda: 100)
    seen.expect([long, short])
    clock.now += 1
    seen.tick(noted(long, rows=1, batches=1))
    clock.now += 1
    seen.tick({**noted(long, rows=1, batches=1, swept=True), **noted(short, first_at=1001.5)})
    screen = [" "] * 100
    for part in stream.getvalue().split("\r"):
        screen[:len(part)] = part
    assert "".join(screen).rstrip() == shown(stream)[-1]


def test_a_message_above_the_bar_stands_on_a_line_of_its_own() -> None:
    clock, stream, made = Clock(), io.StringIO(), job()
    seen = Progress(stream, BAR, clock=clock, columns=lambda: 100)
    seen.expect([made])
    clock.now += 1
    seen.tick(noted(made, rows=1, batches=1))
    seen.above("aa-upload: warning: tried again")
    assert stream.getvalue().endswith("\raa-upload: warning: tried again\n")


def test_closing_leaves_the_last_state_and_a_new_line() -> None:
    clock, stream, made = Clock(), io.StringIO(), job()
    seen = Progress(stream, BAR, clock=clock, columns=lambda: 140)
    seen.expect([made])
    clock.now += 60
    seen.close(noted(made, rows=1_204_329, batches=121, swept=True, skipped_locked=2))
    assert "1,204,329/1,204,329  100%" in stream.getvalue() and "2 locked rows left" in stream.getvalue()
    assert stream.getvalue().endswith("\n")


def test_a_run_without_rows_draws_nothing() -> None:
    clock, stream, made = Clock(), io.StringIO(), job(estimate=0)
    seen = Progress(stream, BAR, clock=clock)
    seen.expect([made, {**job("other"), "refused": {"code": 3, "msg": "no key"}}])
    clock.now += 10
    seen.tick(noted(made, swept=True))
    seen.close(noted(made, swept=True))
    assert stream.getvalue() == ""


@pytest.mark.parametrize("estimate, rows, percent", [(1000, 5000, 99), (1000, 0, 0), (1000, 999, 99)])
def test_an_estimate_that_was_wrong_never_says_that_all_is_done(estimate: int, rows: int, percent: int) -> None:
    clock, made = Clock(), job(estimate=estimate)
    seen = Progress(io.StringIO(), BAR, clock=clock)
    seen.expect([made])
    found = seen._figures(noted(made, rows=rows)[key_of(made)], clock.now + 1)
    assert found.percent == percent and found.total >= rows


def test_a_limit_is_the_total() -> None:
    made = job(limit=500)
    seen = Progress(io.StringIO(), BAR, clock=Clock())
    seen.expect([made])
    assert seen._figures(noted(made, rows=250)[key_of(made)], 1001).percent == 50
    assert seen._figures(noted(made, rows=500)[key_of(made)], 1002).percent == 100


def test_the_database_is_named_where_there_are_several() -> None:
    one, other = job(), job(database="billing")
    seen = Progress(io.StringIO(), BAR, clock=Clock())
    seen.expect([one])
    assert seen._figures(noted(one)[key_of(one)], 1001).title == "public.audit_logs"
    seen.expect([other])
    assert seen._figures(noted(other)[key_of(other)], 1001).title == "billing public.audit_logs"


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    clock, made = Clock(), job()
    seen = Progress(io.StringIO(), BAR, clock=clock)
    seen.expect([made])
    for second in range(1, 121):
        rows = second * 1000 if second <= 60 else 60_000 + (second - 60) * 100
        found = seen._figures(noted(made, rows=rows)[key_of(made)], clock.now + second)
    assert found.rows_per_s == pytest.approx(100, rel=0.05)
    assert found.eta_s == pytest.approx((1_204_331 - 66_000) / 100, rel=0.05)


@pytest.mark.req("REQ-OBS-001", "REQ-OBS-015")
def test_without_a_terminal_a_json_line_comes_every_five_seconds() -> None:
    clock, stream, made = Clock(), io.StringIO(), job()
    log.setup("aa-archive", style="json", stream=stream)
    log.bind(run_id="20251230T021545Z-4711")
    seen = Progress(stream, LOG, clock=clock)
    seen.expect([made])
    for _ in range(100):
        clock.now += 0.2
        seen.tick(noted(made, rows=481_732, batches=49, skipped_locked=2))
    records = [json.loads(text) for text in stream.getvalue().split("\n") if text]
    assert len(records) == 4
    assert {"event", "msg", "ts", "level", "run_id"} <= set(records[0])
    assert {key: records[0][key] for key in ("event", "run_id", "database", "table", "rows", "total", "percent", "batch", "skipped_locked")} == {
        "event": "progress", "run_id": "20251230T021545Z-4711", "database": "prod", "table": "public.audit_logs",
        "rows": 481_732, "total": 1_204_331, "percent": 40, "batch": 49, "skipped_locked": 2}


@pytest.mark.req("REQ-OBS-013")
def test_quiet_says_nothing() -> None:
    clock, stream, made = Clock(), io.StringIO(), job()
    log.setup("aa-archive", style="json", quiet=True, stream=stream)
    seen = Progress(stream, NONE, clock=clock)
    seen.expect([made])
    clock.now += 100
    seen.tick(noted(made, rows=10))
    seen.close(noted(made, rows=10))
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, quiet, log_format, style", [
    (Terminal(), False, "auto", BAR), (Terminal(), False, "text", BAR), (Terminal(), False, "json", LOG),
    (io.StringIO(), False, "auto", LOG), (io.StringIO(), False, "text", LOG),
    (Terminal(), True, "auto", NONE), (io.StringIO(), True, "json", NONE)])
def test_the_style_follows_terminal_quiet_and_log_format(stream: io.StringIO, quiet: bool, log_format: str, style: str) -> None:
    assert progress.style_of(stream, quiet, log_format) == style


@pytest.mark.parametrize("count, text", [(0, "0 MB"), (999, "1.0 kB"), (640_000, "640.0 kB"), (150_700_000, "150.7 MB"),
                                         (999_960_000, "1.0 GB"), (5_000_000_000_000, "5.0 TB")])
def test_bytes_are_written_in_the_unit_that_suits_them(count: int, text: str) -> None:
    assert figures.size(count) == text


@pytest.mark.parametrize("seconds, text", [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (57.2, "57 s"),
                                           (59.6, "1 min 00 s"), (250, "4 min 10 s"),
                                           (3599.6, "1 h 00 min"), (7500, "2 h 05 min")])
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (24.2, "0:25"), (727, "12:07"), (3600, "1:00:00"), (10964, "3:02:44")])
def test_time_left_is_written_as_a_clock(seconds: float, text: str) -> None:
    assert figures.clock(seconds) == text


@pytest.mark.req("REQ-DB-004", "REQ-OBS-012")
def test_databases_that_are_worked_on_at_once_share_one_line() -> None:
    clock, stream = Clock(), io.StringIO()
    told: list[progress.Share] = []
    worker = progress.Told(io.StringIO(), told.append, clock=clock)
    one, two, later = job("one", estimate=1_000), job("two", estimate=500), job("later", estimate=70_000)
    worker.expect([one, two, later])
    clock.now += 1
    worker.tick({**noted(one, rows=1_000, batches=3, swept=True), **noted(two, rows=100, batches=1, skipped_locked=4)})
    assert told == [progress.Share(rows=1_100, total=71_500, batch=4, batches=12, locked=4, working=2)]
    worker.tick({})
    assert len(told) == 1, "not more often than it is drawn"

    parent = Progress(stream, BAR, clock=clock, columns=lambda: 100)
    clock.now += 1
    parent.together([*told, progress.Share(rows=200, total=200, batch=2, batches=2)], 1, 3)
    clock.now += 1
    parent.together([progress.Share(rows=1_400, total=71_700, batch=9, batches=14, working=1)], 1, 3)
    assert shown(stream) == ["1 of 3 databases 1,300/71,700  2%  1,300 rows/s  ETA 0:55  batch 6/14  4 locked rows left",
                             "1 of 3 databases [-----------------------------] 1,400/71,700  2%  700 rows/s  ETA 1:41  batch 9/14"]
