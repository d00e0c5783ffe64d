"""What every command does around its work, seen from outside: exit codes, streams, signals, last words."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Optional, Sequence

import pytest

from audit_archiver import __version__, cli, exits
from tests.ground.run import ROOT, Result
from tests.ground.wait import until
from tests.unit import specimen

BARE = {"PATH": os.defpath, "LC_ALL": "C", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu"}


def start(argv: Sequence[str], env: Optional[dict[str, str]] = None, shell: str = "", **popen: Any) -> subprocess.Popen[bytes]:
    """The specimen as a process; `shell` are redirections around it."""
    words = [sys.executable, "-m", "tests.unit.specimen", *argv]
    if shell:
        words = ["sh", "-c", f'exec "$@" {shell}', "sh", *words]
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
    return subprocess.Popen(words, cwd=ROOT, env={**BARE, "PYTHONPATH": str(ROOT), **(env or {})}, **options)


def forked(argv: Sequence[str], stdin: bytes = b"", env: Optional[dict[str, str]] = None, shell: str = "", **popen: Any) -> Result:
    """Run it to its end."""
    child = start(argv, env, shell, **{"stdin": subprocess.PIPE, **popen})
    out, err = child.communicate(stdin if child.stdin else None, timeout=60)
    return Result(child.returncode, out or b"", (err or b"").decode())


def inside(argv: Sequence[str], stdin: bytes = b"", env: Optional[dict[str, str]] = None) -> Result:
    """Run it in this process."""
    out, err = io.BytesIO(), io.StringIO()
    code = cli.run("aa-specimen", specimen.build_parser, specimen.run, argv, stdin=io.BytesIO(stdin), stdout=out,
                   stderr=err, env=env or {}, stage=True)
    return Result(code, out.getvalue(), err.getvalue())


def last(result: Result) -> dict[str, Any]:
    """The last record of the log, which must be the only error."""
    assert [record["level"] for record in result.log].count("ERROR") == 1, result.err
    return result.log[-1]


@pytest.mark.req("REQ-USE-010", "T45")
@pytest.mark.parametrize("how, code", [("copy", 0), ("some", 1), ("failed", 2), ("config", 3), ("locked", 4), ("permission", 5),
                                       ("resource", 6), ("network", 7), ("raise", 2), ("memory", 6), ("reset", 7), ("denied", 2),
                                       ("files", 6), ("parts", 3), ("exit", 0)])
def test_each_way_to_end_has_its_exit_code_in_process_and_forked(how: str, code: int) -> None:
    assert forked(["--end", how]).rc == code == inside(["--end", how]).rc


def test_the_table_of_codes_is_that_of_appendix_d_and_names_every_code() -> None:
    assert {name: getattr(exits, name) for name in ("OK", "SOME_FAILED", "FAILED", "CONFIG", "LOCKED", "PERMISSION", "RESOURCE", "NETWORK")} \
        == {"OK": 0, "SOME_FAILED": 1, "FAILED": 2, "CONFIG": 3, "LOCKED": 4, "PERMISSION": 5, "RESOURCE": 6, "NETWORK": 7}
    assert list(exits.TABLE) == [0, 1, 2, 3, 4, 5, 6, 7, 141]


@pytest.mark.req("REQ-USE-005")
def test_an_error_says_what_why_what_to_do_and_where() -> None:
    assert last(inside(["--end", "failed"])).items() >= {"msg": "failed", "detail": "why", "hint": "do this", "code": 2,
                                                        "event": "stopped"}.items()
    assert last(inside(["--end", "config"])).items() >= {"at": "prod.yaml:31", "code": 3}.items()
    assert last(inside(["--end", "permission"])).items() >= {"sqlstate": "42501", "code": 5}.items()
    assert inside(["--end", "failed", "--log-format", "text"]).err == "aa-specimen: error: failed; why. do this\n"
    assert inside(["--end", "config", "--log-format", "text"]).err == "aa-specimen: error: prod.yaml:31: config\n"


def test_an_error_of_several_parts_is_said_part_by_part() -> None:
    found = [(record["at"], record["msg"]) for record in inside(["--end", "parts"]).log if record["level"] == "ERROR"]
    assert found == [("a:1", "one"), ("a:2", "two")]


@pytest.mark.parametrize("argv, words", [(["--bad"], "unrecognized arguments: --bad"), (["--end"], "expected one argument"),
                                         (["--log-format", "xml"], "invalid choice"), (["--verb"], "unrecognized arguments: --verb")])
def test_a_usage_error_exits_3_and_points_to_the_help(argv: list[str], words: str) -> None:
    result = forked(argv)
    assert (result.rc, result.out) == (3, b"")
    assert words in last(result)["msg"] and last(result)["hint"] == "see 'aa-specimen --help'"


def test_an_internal_error_exits_2_with_its_place_and_without_its_text() -> None:
    for argv in (["--end", "raise"], ["--end", "raise", "-vvv"]):
        result = forked(argv)
        assert result.rc == 2 and "4711" not in result.err and "Traceback" not in result.err
        error = next(record for record in result.log if record["level"] == "ERROR")
        assert error["event"] == "internal" and error["msg"].startswith("internal error: ValueError in specimen.py:")
    assert "specimen.py" in result.log[-1]["msg"], "-v shows the way there"


@pytest.mark.req("REQ-OBS-013")
def test_quiet_says_nothing_when_all_is_well_and_why_otherwise() -> None:
    result = forked(["--quiet"], b"1\n")
    assert (result.rc, result.out, result.err) == (0, b"1\n", "")
    assert [record["msg"] for record in forked(["-q", "--end", "locked"]).log] == ["locked"]


@pytest.mark.req("REQ-EXE-006")
def test_verbose_says_more() -> None:
    events = [[record["event"] for record in inside(argv).log] for argv in ([], ["-v"], ["-vvv"])]
    assert events[0] == ["specimen.begun", "specimen.cleaned"]
    assert events[1] == events[2] == ["specimen.begun", "specimen.detail", "specimen.cleaned"]


def test_help_and_version_go_to_stdout_and_nothing_to_stderr() -> None:
    for result in (forked(["--version"]), inside(["--version"])):
        assert (result.rc, result.out, result.err) == (0, f"aa-specimen {__version__}\n".encode(), "")
    shown = forked(["--help"])
    assert (shown.rc, shown.err) == (0, "") and b"how to end" in shown.out and inside(["-h"]).rc == 0


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"]])
def test_a_full_disk_under_stdout_is_exit_6(argv: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = forked(argv, b"1\n", stdout=full)
    assert result.rc == 6
    assert last(result)["msg"] == "cannot use 'standard output': No space left on device"


def test_a_reader_that_went_away_is_exit_141_said_once_also_under_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = forked(["--quiet"], b"1\n" * 100, stdout=writer)
    os.close(writer)
    assert result.rc == 141
    assert last(result).items() >= {"event": "reader.gone", "code": 141}.items()


def test_a_reader_that_goes_away_ends_a_command_that_waits_for_input() -> None:
    child = start([], stdin=subprocess.PIPE)
    assert child.stdin and child.stdout and child.stderr
    child.stdin.write(b"1\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"1\n"
    child.stdout.close()
    assert child.wait(60) == 141, "it must not wait for a second line that nobody will read"
    child.stdin.close()
    child.stderr.close()


@pytest.mark.parametrize("stream, words", [("<&-", "standard input is closed"), (">&-", "standard output is closed")])
def test_a_closed_stream_is_refused_by_name(stream: str, words: str) -> None:
    result = forked([], shell=stream)
    assert (result.rc, last(result)["msg"]) == (3, words)


def test_a_command_that_reads_nothing_runs_with_its_input_closed() -> None:
    assert forked(["--end", "socket"], shell="<&-").rc == 0


def test_a_closed_stderr_costs_no_exit_code() -> None:
    assert forked([], b"1\n", shell="2>&-")[:2] == (0, b"1\n")
    assert forked(["--end", "locked"], shell="2>&-").rc == 4


def test_what_is_opened_never_gets_the_number_of_a_closed_stream() -> None:
    result = forked(["--end", "socket"], shell="<&- 2>&-")
    assert result.rc == 0 and json.loads(result.out) > 2


def test_files_are_written_for_their_owner_only() -> None:
    assert forked(["--end", "umask"]).lines == ["0o77"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("how", ["wait", "swallow"])
@pytest.mark.req("T45")
def test_a_signal_ends_the_command_as_a_signal_does_after_saying_so(signum: signal.Signals, how: str) -> None:
    child = start(["--end", how], stdin=subprocess.PIPE)
    assert child.stdout and int(child.stdout.readline()) == child.pid
    child.send_signal(signum)
    _, err = child.communicate(timeout=60)
    assert child.returncode == -signum, err
    assert [record["msg"] for record in map(json.loads, err.splitlines()) if record["level"] == "ERROR"] == [f"stopped by {signum.name}"]


def test_a_shell_sees_128_and_the_signal() -> None:
    words = [sys.executable, "-m", "tests.unit.specimen", "--end", "wait"]
    shell = subprocess.Popen(["sh", "-c", '"$@"; echo "code $?"', "sh", *words], cwd=ROOT, env={**BARE, "PYTHONPATH": str(ROOT)},
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert shell.stdout
    os.kill(int(shell.stdout.readline()), signal.SIGTERM)
    assert shell.communicate(timeout=60)[0] == b"code 143\n"


def test_a_second_signal_does_not_break_the_cleanup_of_the_first() -> None:
    child = start(["--end", "cleanup"], stdin=subprocess.PIPE)
    assert child.stdout and int(child.stdout.readline()) == child.pid
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == b'"cleaning"\n'
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(b"go on\n", timeout=60)
    assert (child.returncode, out) == (-signal.SIGTERM, b'"cleaned"\n')


def test_a_command_under_nohup_survives_a_hangup() -> None:
    child = start(["--end", "wait"], stdin=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert child.stdout and int(child.stdout.readline()) == child.pid
    child.send_signal(signal.SIGHUP)
    child.communicate(b"1\n", timeout=60)
    assert child.returncode == 0


def test_input_is_the_files_in_order_and_a_dash_is_stdin(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a\n")
    (tmp_path / "b").write_bytes(b"b\n")
    paths = [str(tmp_path / "a"), "-", str(tmp_path / "b")]
    assert inside(paths, b"stdin\n").out == b"a\nstdin\nb\n" == forked(paths, b"stdin\n").out
    assert inside(["-"], b"stdin\n").out == b"stdin\n" == inside([], b"stdin\n").out


@pytest.mark.parametrize("name, words", [("gone", "No such file or directory"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_refused_before_anything_is_done(tmp_path: Path, name: str, words: str) -> None:
    result = inside(["-", str(tmp_path / name)], b"1\n")
    assert (result.rc, result.out) == (3, b"")
    assert words in last(result)["msg"]


def test_input_that_ends_inside_a_line_is_exit_2_and_the_whole_lines_before_it_are_used() -> None:
    result = inside([], b"1\n2\n3")
    assert (result.rc, result.out) == (2, b"1\n2\n")
    assert "ends inside a line" in last(result)["msg"]


def test_a_name_is_utf_8_whatever_the_locale_says() -> None:
    assert forked(["--table", "Ереignis"]).lines == ["Ереignis"]


@pytest.mark.req("REQ-OBS-001", "REQ-OBS-004")
def test_the_log_is_json_without_a_terminal_also_where_the_locale_is_ascii() -> None:
    result = forked(["--end", "raise", "--table", "t"], env={"AA_RUN": "20251230T021545Z-4711"})
    for record in result.log:
        assert record["ts"].endswith("Z") and record["stage"] == "aa-specimen" and record["run_id"] == "20251230T021545Z-4711"
    odd = forked(["é😀"])
    assert odd.rc == 3 and last(odd)["msg"].startswith("cannot read '")


class Holder:
    """A transaction holder that remembers what it was told, and answers everything but the operation `mute`."""

    def __init__(self, path: Path, mute: str = "") -> None:
        self.path, self.mute = str(path), mute
        self.heard: list[dict[str, Any]] = []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listening.accept()
        with client, client.makefile("rwb", buffering=0) as lines:
            for line in lines:
                self.heard.append(json.loads(line))
                if self.heard[-1]["op"] != self.mute and (self.mute, self.heard[-1]["op"]) != ("probe", "bye"):
                    lines.write(b'{"ok":true,"holder":"h-1"}\n')

    def ended(self) -> list[dict[str, Any]]:
        """What was said, once the client is gone."""
        until(lambda: not self._thread.is_alive(), "the client to hang up")
        self._listening.close()
        return self.heard


@pytest.fixture()
def holder(tmp_path: Path) -> Holder:
    return Holder(tmp_path / "txn")


@pytest.mark.parametrize("how, code, words", [("copy", 0, None), ("network", 7, "gone"), ("raise", 2, "internal error: ValueError"),
                                              ("failed", 2, "failed; why. do this"), ("memory", 6, "out of memory")])
@pytest.mark.req("REQ-TXN-006")
def test_a_stage_tells_the_holder_its_name_its_code_and_its_last_words(holder: Holder, how: str, code: int, words: Optional[str]) -> None:
    assert inside(["--end", how], env={"AA_TXN": holder.path}).rc == code
    hello, bye = holder.ended()
    assert (hello["op"], hello["stage"]) == ("hello", "aa-specimen")
    assert (bye["op"], bye["code"]) == ("bye", code)
    assert words is None or bye["msg"].startswith(words)


@pytest.mark.req("T45")
def test_a_stage_that_is_stopped_tells_the_holder_before_it_dies(holder: Holder) -> None:
    child = start(["--end", "wait"], env={"AA_TXN": holder.path}, stdin=subprocess.PIPE)
    assert child.stdout and int(child.stdout.readline()) == child.pid
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGTERM
    assert holder.ended()[-1].items() >= {"op": "bye", "code": 143, "msg": "stopped by SIGTERM"}.items()


@pytest.mark.parametrize("mute, how", [("probe", "call"), ("bye", "copy")])
def test_a_stage_that_is_stopped_does_not_wait_for_a_holder_that_says_nothing(tmp_path: Path, mute: str, how: str) -> None:
    holder = Holder(tmp_path / "txn", mute)
    child = start(["--end", how], env={"AA_TXN": holder.path})
    until(lambda: any(said["op"] == mute for said in holder.heard), f"the stage to say '{mute}'")
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGTERM and b"Traceback" not in err
    bye = holder.ended()[-1]
    assert (bye["op"], bye["code"], bye.get("msg")) == (("bye", 143, "stopped by SIGTERM") if mute == "probe" else ("bye", 0, None))


def test_a_stage_whose_reader_went_away_tells_the_holder(holder: Holder) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert forked([], b"1\n", env={"AA_TXN": holder.path}, stdout=writer).rc == 141
    os.close(writer)
    assert holder.ended()[-1]["code"] == 141


def test_aa_txn_that_names_no_living_holder_is_an_error_and_never_a_change_of_mode(tmp_path: Path) -> None:
    result = inside([], b"1\n", env={"AA_TXN": str(tmp_path / "nobody")})
    assert (result.rc, result.out) == (3, b"")
    assert "no transaction holder answers there" in last(result)["msg"]
    assert inside([], env={"AA_TXN": "x" * 200}).rc == 3
