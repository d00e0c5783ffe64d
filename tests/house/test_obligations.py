"""What every command owes: help, version, usage errors; and what every filter owes its input, output and signals.

Each filter is fed with what its predecessors really write, on a table of 250 rows in batches of 100.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import __version__, exits
from tests.ground import processes, tables
from tests.ground.run import BIN, Result, finish, module, run_forked, run_stage, spawn, written
from tests.ground.wait import until

FILTERS = [name for name in ("aa-select", "aa-serialize", "aa-upload", "aa-verify", "aa-delete", "aa-record")
           if name in written()]
PRODUCERS = ["aa-plan", *FILTERS]
every_command = pytest.mark.parametrize("name", written())
every_filter = pytest.mark.parametrize("name", FILTERS)


class Bench:
    """A table, a bucket, a configuration, and each filter's input made by the filters before it."""

    def __init__(self, db: Any, config: Path) -> None:
        self.db = db
        self.env = {"AA_CONFIG": str(config), "TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONUTF8": "0"}
        tables.create(db.connection, rows=250, first="2024-01-01", last="2024-03-01")

    def input_of(self, name: str) -> bytes:
        """What the commands before `name` write when they run one after another."""
        data = b""
        for each in PRODUCERS[:PRODUCERS.index(name)]:
            result = run_stage(each, stdin=data, env=self.env)
            assert result.rc == 0, f"{each}: {result.err}"
            data = result.out
        assert data.endswith(b"\n")
        return data

    @property
    def rows(self) -> int:
        """How many rows are left in the table."""
        return int(self.db.scalar("SELECT count(*) FROM public.audit_logs"))


@pytest.fixture()
def bench(db: Any, bucket: Any, config_file: Any) -> Bench:
    return Bench(db, config_file(db, bucket))


def _one_message(result: Result) -> dict[str, Any]:
    """The last record on stderr, which says why the command ended."""
    errors = [record for record in result.log if record["level"] == "ERROR"]
    assert len(errors) == 1, result.err
    return errors[0]


@every_command
def test_help_describes_every_option_and_exits_0(name: str) -> None:
    result = run_forked(name, ["--help"], env={"COLUMNS": "200"})
    assert (result.rc, result.err) == (0, "")
    for action in module(name).build_parser()._actions:
        assert action.help, f"{action.dest} has no help"
        for spelt in action.option_strings:
            assert spelt.encode() in result.out


@every_command
def test_version_names_the_command_and_exits_0(name: str) -> None:
    result = run_forked(name, ["--version"])
    assert (result.rc, result.out.decode(), result.err) == (0, f"{name} {__version__}\n", "")


@every_command
def test_an_unknown_option_exits_3_and_says_so(name: str) -> None:
    result = run_forked(name, ["--no-such-option"])
    assert (result.rc, result.out) == (exits.CONFIG, b"")
    assert "--no-such-option" in result.err or "arguments are required" in result.err
    assert "Traceback" not in result.err


@every_command
def test_showing_the_version_loads_neither_boto3_nor_jsonschema(name: str) -> None:
    code = f"import sys; from {module(name).__name__} import main; main(['--version']); " \
           "sys.exit(bool({'boto3', 'jsonschema'} & set(sys.modules)))"
    done = subprocess.run([str(BIN / "python"), "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@every_filter
def test_empty_input_is_nothing_to_do(name: str, bench: Bench) -> None:
    result = run_stage(name, stdin=b"", env=bench.env)
    assert (result.rc, result.out) == (0, b"")
    assert run_stage(name, ["--quiet"], stdin=b"", env=bench.env).err == ""


@every_filter
@pytest.mark.parametrize("cut", ["the last line feed", "half a line"])
def test_truncated_input_is_refused_and_only_what_came_whole_is_used(name: str, cut: str, bench: Bench) -> None:
    whole = bench.input_of(name)
    inputs = whole.count(b'["end"') or whole.count(b"\n")
    rows = bench.rows
    result = run_stage(name, stdin=whole[:-1 if cut == "the last line feed" else -30], env=bench.env)
    assert (result.rc, result.out.count(b"\n")) == (exits.FAILED, inputs - 1), result.err
    assert "ends inside a line" in _one_message(result)["msg"]
    if name == "aa-delete":  # guarded and by itself it has deleted the batches before
        assert bench.rows == rows - sum(line["deleted"]["rows"] for line in result.lines)
    else:
        assert bench.rows == rows


@every_filter
def test_a_line_of_an_unknown_version_is_refused_and_nothing_is_written(name: str, bench: Bench) -> None:
    first = bench.input_of(name).split(b"\n")[0]
    line = json.loads(first)
    if isinstance(line, list):
        line[1] = 99
    else:
        line["version"] = 99
    result = run_stage(name, stdin=json.dumps(line).encode() + b"\n", env=bench.env)
    assert (result.rc, result.out) == (exits.FAILED, b""), result.err
    assert "version" in result.err and "99" in result.err


@every_filter
def test_an_unknown_key_in_a_known_version_is_refused(name: str, bench: Bench) -> None:
    first = bench.input_of(name).split(b"\n")[0]
    line = json.loads(first)
    (line[2] if isinstance(line, list) else line)["surprise"] = 1
    result = run_stage(name, stdin=json.dumps(line).encode() + b"\n", env=bench.env)
    assert (result.rc, result.out) == (exits.FAILED, b""), result.err
    assert "surprise" in result.err


@every_filter
def test_something_that_is_not_json_is_refused(name: str, bench: Bench) -> None:
    result = run_stage(name, stdin=b"hello\n", env=bench.env)
    assert (result.rc, result.out) == (exits.FAILED, b""), result.err
    assert _one_message(result)["msg"]


@every_filter
def test_a_full_disk_behind_stdout_is_an_error_and_not_silence(name: str, bench: Bench) -> None:
    data = bench.input_of(name)
    with open("/dev/full", "wb", buffering=0) as full:
        result = run_forked(name, stdin=data, env=bench.env, stdout=full)
    assert result.rc == exits.RESOURCE, result.err
    assert "No space left" in result.err


@every_filter
def test_a_reader_that_is_gone_ends_the_command_with_141(name: str, bench: Bench) -> None:
    data = bench.input_of(name)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run_forked(name, stdin=data, env=bench.env, stdout=writer)
    finally:
        os.close(writer)
    assert result.rc == exits.READER_GONE, result.err
    assert "Traceback" not in result.err


@every_filter
def test_a_reader_that_goes_ends_a_command_that_waits_for_input(name: str, bench: Bench) -> None:
    child = spawn(name, env=bench.env, stdin=subprocess.PIPE)
    _waits(child.pid)
    child.stdout.close()
    assert child.wait(30) == exits.READER_GONE
    child.stdin.close()
    child.stderr.close()


@every_filter
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_said_and_ends_the_command_as_a_true_signal_death(name: str, signum: int, bench: Bench) -> None:
    child = spawn(name, env=bench.env, stdin=subprocess.PIPE)
    _waits(child.pid)
    child.send_signal(signum)
    result = finish(child)
    assert (result.rc, result.out) == (-signum, b"")
    assert f"stopped by {signal.Signals(signum).name}" in result.err


@every_filter
def test_a_set_but_dead_transaction_holder_is_an_error_and_no_change_of_mode(name: str, bench: Bench) -> None:
    data = bench.input_of(name)
    rows = bench.rows
    result = run_stage(name, stdin=data, env={**bench.env, "AA_TXN": "/nonexistent/holder.sock"})
    assert (result.rc, result.out) == (exits.CONFIG, b"")
    assert "AA_TXN" in _one_message(result)["msg"]
    assert bench.rows == rows


def _waits(pid: int) -> None:
    """Wait until the process catches SIGTERM and sleeps without using the CPU: it has set up and waits for input."""
    seen = {"ticks": "", "looks": 0}

    def idle() -> bool:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(next(line for line in status.split("\n") if line.startswith("SigCgt:")).split()[1], 16)
        ticks = " ".join(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        still = caught >> (signal.SIGTERM - 1) & 1 and processes.state(pid) == "S" and ticks == seen["ticks"]
        seen["ticks"], seen["looks"] = ticks, seen["looks"] + 1 if still else 0
        return seen["looks"] >= 20
    until(idle, "the command waits for its input")
