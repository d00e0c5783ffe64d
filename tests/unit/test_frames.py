"""The frames around rows, and job lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import lines
from audit_archiver.exits import InputError
from audit_archiver.formats import frames, job

CONTRACTS = Path(__file__).parents[1] / "contracts"


def example(name: str) -> Any:
    """A valid value of the contracts."""
    return json.loads((CONTRACTS / name).read_text(encoding="utf-8"))


ROWS = example("rows.v1/valid-held.json")
END = example("rows-end.v1/valid-end.json")
JOB = example("job.v1/valid-whole-table.json")


def test_an_opening_frame_is_read_as_it_was_written() -> None:
    line = frames.opening(ROWS["batch"], ROWS["table"])
    assert line.startswith(b'["aa-rows",1,{"batch":{') and line.endswith(b"}]\n")
    assert frames.parse(line, frames.OPEN) == ROWS


def test_a_closing_frame_is_read_as_it_was_written() -> None:
    line = frames.closing(END["id"], END["rows"], END["rows_sha256"])
    assert line == f'["end",1,{{"id":"{END["id"]}","rows":1200,"rows_sha256":"{END["rows_sha256"]}"}}]\n'.encode()
    assert frames.parse(line, frames.END) == END


@pytest.mark.parametrize("line, words", [
    (b'{"id":1}\n', "expected an 'end' frame, found something else"), (b"\n", "found something else"), (b"", "found something else"),
    (b' ["end",1,{}]\n', "found something else"), (b"[]\n", "found another one"), (b'["end"]\n', "found another one"),
    (b'["end",1,{},{}]\n', "found another one"), (b'["aa-rows",1,{}]\n', "found another one"), (b'["end",1,{}\n', "is not JSON"),
    (b'["end",2,{}]\n', "has version 2"), (b'["end",true,{}]\n', "has version True"), (b'["end","1",{}]\n', "has version '1'"),
    (b'["end",1,{}]\n', "breaks the format rows-end.v1: 'id' is missing"), (b'["end",1,[]]\n', "does not satisfy type 'object'"),
    (b'["end",1,null]\n', "does not satisfy type 'object'"),
])
def test_what_is_no_closing_frame_is_refused(line: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        frames.parse(line, frames.END)
    assert words in str(caught.value)


def test_bare_rows_for_people_are_no_rows_stream_and_the_hint_says_where_they_come_from() -> None:
    with pytest.raises(InputError) as caught:
        frames.parse(b'{"id":1}\n', frames.OPEN)
    assert caught.value.hint == "aa-serialize reads what aa-select writes (without --rows)"


def test_a_frame_of_another_batch_section_is_refused_with_its_place() -> None:
    broken = json.loads(json.dumps(ROWS))
    broken["batch"]["surplus"] = 1
    with pytest.raises(InputError, match="the 'aa-rows' frame breaks the format rows.v1 at 'batch': unknown key 'surplus'"):
        frames.parse(lines.dump([frames.OPEN, 1, broken]), frames.OPEN)


@pytest.mark.parametrize("name", ["whole-table", "refused", "resumed-with-limit"])
def test_a_job_line_is_read_as_it_was_written(name: str) -> None:
    value = example(f"job.v1/valid-{name}.json")
    assert job.parse(lines.dump(value)) == value
    fields = {key: item for key, item in value.items() if key not in ("format", "version")}
    assert lines.dump(job.build(**fields)) == lines.dump(value)


@pytest.mark.parametrize("line, words", [
    (b"{}\n", "the line is no job line"), (b"[]\n", "no job line"), (b'{"format":"aa-batch","version":1}\n', "no job line"),
    (b"x\n", "the job line is not JSON"), (b'{"format":"aa-job","version":2}\n', "has version 2"),
    (b'{"format":"aa-job","version":1}\n', "'run' is missing"),
])
def test_what_is_no_job_line_is_refused(line: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        job.parse(line)
    assert words in str(caught.value)


def test_a_plan_cannot_build_what_a_stage_would_refuse() -> None:
    fields = {key: item for key, item in JOB.items() if key not in ("format", "version")}
    with pytest.raises(InputError, match="the planned job breaks the format job.v1: unknown key 'host'"):
        job.build(**fields, host="db1")
    with pytest.raises(InputError, match="'batch_size'"):
        job.build(**{**fields, "batch_size": 0})


def test_messages_call_a_job_by_schema_and_table() -> None:
    assert job.name(JOB) == "public.audit_logs"
