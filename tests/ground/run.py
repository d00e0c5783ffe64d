"""Run a command: in process (fast, debuggable), or forked from the virtual environment (signals, pipes, exit codes).

    result = run_stage("aa-upload", ["--quiet"], stdin=line, env={"AA_CONFIG": path})
    child = spawn("aa-archive", ["-c", path, "--force"]); result = finish(child)
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence, Union

from audit_archiver import cli
from tests.ground import kill
from tests.ground.wait import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"
_IMPORT = re.compile(r"^\s*from (audit_archiver\.\S+) import main$", re.MULTILINE)


class Result(NamedTuple):
    """How a command ended: exit code (negative: the signal that killed it), stdout, stderr."""

    rc: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[Any]:
        """stdout's JSON lines."""
        return [json.loads(line) for line in self.out.split(b"\n") if line]

    @property
    def log(self) -> list[dict[str, Any]]:
        """stderr's JSON records; a line that is none is an error of the command."""
        return [json.loads(line) for line in self.err.split("\n") if line]


def names() -> list[str]:
    """Every command in bin/."""
    return sorted(path.name for path in (ROOT / "bin").iterdir() if path.name.startswith("aa-"))


def module_name(name: str) -> str:
    """The dotted name of the module that the launcher bin/NAME starts."""
    found = _IMPORT.search((ROOT / "bin" / name).read_text())
    if found is None:
        raise AssertionError(f"bin/{name} imports no main() of audit_archiver")
    return found.group(1)


def written() -> list[str]:
    """The commands in bin/ whose module exists; a launcher can be there before its module is."""
    return [name for name in names()
            if (ROOT / "lib" / Path(*module_name(name).split("."))).with_suffix(".py").exists()]


def module(name: str) -> Any:
    """The imported module of a command."""
    return importlib.import_module(module_name(name))


def run_stage(name: str, argv: Sequence[Union[str, Path]] = (), stdin: bytes = b"",
              env: Optional[Mapping[str, Any]] = None) -> Result:
    """Run a command in this process on bytes, with exactly `env` as its environment.

    Its stdout is a file without a name: a copy flows past the command into the output's descriptor.
    """
    command = module(name)
    err = io.StringIO()
    with tempfile.TemporaryFile(buffering=0) as out:
        code = cli.run(name, command.build_parser, command.run, [str(arg) for arg in argv],
                       stdin=io.BytesIO(stdin), stdout=out, stderr=err,
                       env={key: str(value) for key, value in (env or {}).items()},
                       stage=".stages." in command.__name__)
        out.seek(0)
        return Result(code, out.read(), err.getvalue())


class Child(subprocess.Popen):  # type: ignore[type-arg]
    """A forked command; `token` marks it and every descendant (AA_TEST_RUN in their environment)."""

    token: str


def spawn(name: str, argv: Sequence[Union[str, Path]] = (), env: Optional[Mapping[str, Any]] = None,
          **popen: Any) -> Child:
    """Start a command of the virtual environment; `env` is added to an environment as bare as cron's."""
    token = secrets.token_hex(8)
    given = {"PATH": os.defpath, "AA_TEST_RUN": token, **{key: str(value) for key, value in (env or {}).items()}}
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = Child([str(BIN / name), *map(str, argv)], env=given, **{**options, **popen})
    child.token = token
    return child


def finish(child: Child, stdin: Optional[bytes] = None, seconds: float = 60.0) -> Result:
    """Feed `stdin`, collect both outputs and the exit code; kill the child and fail when the time is up."""
    try:
        out, err = child.communicate(stdin, timeout=seconds * PATIENCE)
    except subprocess.TimeoutExpired:
        kill.kill_family(child.token)  # one of its own that stands still would keep the pipes open for ever
        out, err = child.communicate()
        raise AssertionError(f"'{child.args}' did not end in {seconds * PATIENCE:g} s; "  # type: ignore[str-bytes-safe]
                             f"stderr so far: {(err or b'')[-2000:].decode(errors='replace')}") from None
    return Result(child.returncode, out or b"", (err or b"").decode(errors="replace"))


def run_forked(name: str, argv: Sequence[Union[str, Path]] = (), stdin: bytes = b"",
               env: Optional[Mapping[str, Any]] = None, seconds: float = 60.0, **popen: Any) -> Result:
    """spawn and finish in one."""
    return finish(spawn(name, argv, env, **{"stdin": subprocess.PIPE, **popen}), stdin, seconds)
