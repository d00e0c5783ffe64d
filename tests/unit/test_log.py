"""The log: JSON lines with stable fields, one line for a person, nothing that could be a row."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_archiver import log
from tests.ground.run import ROOT
from tests.unit.profile import fixed


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def afterwards() -> Iterator[None]:
    """No test's stream is written to by the next one."""
    yield
    log.setup("test", stream=io.StringIO())


def said(call: Any, *args: Any, style: str = "json", stream: Any = None, **options: Any) -> str:
    """What one call writes."""
    stream = stream or io.StringIO()
    log.setup("aa-upload", style=style, stream=stream, **options)
    call(*args)
    return stream.getvalue()


def record(**fields: Any) -> dict[str, Any]:
    """The JSON record of one event with these fields."""
    return json.loads(said(lambda: log.info("upload.put", "put", **fields)))


@pytest.mark.req("REQ-OBS-001", "REQ-OBS-004")
def test_a_record_is_one_json_line_with_its_fields_in_order() -> None:
    stream = io.StringIO()
    log.setup("aa-upload", style="json", stream=stream)
    log.bind(run_id="20251230T021545Z-4711")
    log.info("upload.put", "3 objects put", rows=10000, key="archives/x", hint=None)
    (line,) = stream.getvalue().splitlines(keepends=True)
    assert line.endswith("\n")
    found = json.loads(line)
    assert list(found) == ["ts", "level", "run_id", "stage", "event", "msg", "rows", "key"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("ts"))
    assert found == {"level": "INFO", "run_id": "20251230T021545Z-4711", "stage": "aa-upload", "event": "upload.put",
                     "msg": "3 objects put", "rows": 10000, "key": "archives/x"}


@fixed
@given(msg=st.text(max_size=30), value=st.text(max_size=30))
def test_any_text_stays_one_line_and_comes_back(msg: str, value: str) -> None:
    line = said(lambda: log.warning("upload.put", msg, key=value))
    assert line.count("\n") == 1
    assert (json.loads(line)["msg"], json.loads(line)["key"]) == (msg, value)
    line = said(lambda: log.warning("upload.put", msg, detail=value), style="text")
    assert line.count("\n") == 1 and all(char.isprintable() for char in line[:-1])


def test_a_percent_sign_is_no_format() -> None:
    assert record()["msg"] == "put"
    assert json.loads(said(lambda: log.error("x.y", "100 %s %d")))["msg"] == "100 %s %d"


@pytest.mark.parametrize("name", ["name", "args", "msg", "message", "module", "process", "thread", "created", "lineno", "filename",
                                  "exc_info", "levelname", "asctime", "taskName", "event", "fields"])
def test_a_field_may_bear_any_name_and_never_replaces_what_every_record_has(name: str) -> None:
    found = record(**{name: "mine"})
    assert found[name] == {"msg": "put", "event": "upload.put"}.get(name, "mine")


def test_no_field_replaces_time_level_or_stage() -> None:
    found = record(ts="never", level="never", stage="never")
    assert "never" not in found.values()


def test_what_json_does_not_know_is_written_as_text() -> None:
    assert record(path=Path("/x"), error=ValueError("v"))["path"] == "/x"


@pytest.mark.req("REQ-OBS-013")
def test_a_person_gets_one_short_line() -> None:
    def calls() -> None:
        log.info("a.b", "12 rows\n  archived", rows=12)
        log.warning("a.b", "careful", detail="why", hint="do this")
        log.error("a.b", "stopped", at="prod.yaml:31")
    assert said(calls, style="text") == ("aa-upload: 12 rows archived\naa-upload: warning: careful; why. do this\n"
                                         "aa-upload: error: prod.yaml:31: stopped\n")


def test_a_terminal_is_not_sent_control_characters_of_a_name() -> None:
    assert said(lambda: log.error("a.b", "no table '\x1b[31mred\x9b\u202e'"), style="text") == \
        "aa-upload: error: no table '\\x1b[31mred\\x9b\\u202e'\n"


def test_auto_is_text_on_a_terminal_and_json_elsewhere() -> None:
    def call() -> None:
        log.info("a.b", "hello")
    assert said(call, style="auto", stream=Terminal()) == "aa-upload: hello\n"
    assert json.loads(said(call, style="auto"))["msg"] == "hello"
    assert json.loads(said(call, style="json", stream=Terminal()))["msg"] == "hello"


@pytest.mark.req("REQ-OBS-002", "REQ-EXE-006")
def test_quiet_keeps_errors_only_and_verbose_adds_debug() -> None:
    def calls() -> None:
        for write in (log.debug, log.info, log.warning, log.error):
            write("a.b", write.__name__)
    def levels(**options: Any) -> list[str]:
        return [json.loads(line)["msg"] for line in said(calls, **options).splitlines()]
    assert levels() == ["info", "warning", "error"]
    assert levels(quiet=True) == ["error"]
    assert levels(verbose=1) == levels(verbose=3) == ["debug", "info", "warning", "error"]


@pytest.mark.req("REQ-OBS-002")
@pytest.mark.parametrize("name, shown", [("DEBUG", 4), ("INFO", 3), ("WARNING", 2), ("ERROR", 1), ("CRITICAL", 1)])
def test_the_configured_level_holds_unless_a_flag_chose_and_never_hides_why_a_command_stopped(name: str, shown: int) -> None:
    def calls() -> None:
        log.set_level(name)
        for write in (log.debug, log.info, log.warning, log.error):
            write("a.b", "x")
    assert len(said(calls).splitlines()) == shown
    assert len(said(calls, quiet=True).splitlines()) == 1
    assert len(said(calls, verbose=1).splitlines()) == 4


@pytest.mark.parametrize("style, shown", [("text", "aa-upload: prod: warning: gone. try again\n"), ("json", '"database": "prod", "msg": "gone"')])
def test_what_a_worker_has_to_say_is_written_by_its_parent_and_names_the_database(style: str, shown: str) -> None:
    told: list[Any] = []
    worker = io.StringIO()
    log.setup("aa-upload", style=style, stream=worker)
    log.divert(lambda record: told.append(record) or len(told) < 2)
    log.warning("s3.retry", "gone", hint="try again")
    assert worker.getvalue() == ""
    log.error("stopped", "nobody hears this")
    assert "nobody hears this" in worker.getvalue(), "what is not heard is written after all"

    parent = io.StringIO()
    log.setup("aa-upload", style=style, stream=parent)
    log.pass_on("prod", told[0])
    assert shown in parent.getvalue()


def test_bound_fields_last_until_the_next_setup() -> None:
    log.setup("aa-upload", stream=io.StringIO())
    log.bind(run_id="r", database="prod")
    assert log.bound("run_id") == "r"
    assert record()["stage"] == "aa-upload" and "database" not in record()
    assert log.bound("run_id") is None


def python(code: str, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a few lines that log something."""
    return subprocess.run([sys.executable, "-c", "from audit_archiver import log; " + code], cwd=ROOT, check=False,
                          env={"PATH": os.defpath, **env}, **{"capture_output": True, **options})


@pytest.mark.parametrize("env", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "latin-1"}, {}])
def test_a_json_record_is_valid_json_in_every_locale(env: dict[str, str]) -> None:
    done = python(r"log.setup('aa-x', style='json'); log.error('a.b', 'caf\xe9 \u20ac \U0001f600')", env)
    assert json.loads(done.stderr.decode("latin-1" if "PYTHONIOENCODING" in env else "utf-8"))["msg"] == "café € 😀"
    text = python(r"log.setup('aa-x', style='text'); log.error('a.b', 'caf\xe9')", env)
    assert text.stderr.count(b"\n") == 1 and text.stderr.startswith(b"aa-x: error: caf")


def test_a_log_that_nobody_can_read_does_not_end_the_work() -> None:
    code = "log.setup('aa-x'); log.error('a.b', 'x'); log.info('a.b', 'y'); import os; os.write(1, b'done')"
    with open("/dev/full", "wb") as full:
        assert python(code, {}, stderr=full, stdout=subprocess.PIPE, capture_output=False).stdout == b"done"
    assert python(code, {}, preexec_fn=lambda: os.close(2), stdout=subprocess.PIPE, capture_output=False).stdout == b"done"
