"""The pages of man 5 and man 7 say what the formats and the code do: examples, keys, events, operations, codes, points."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest

from audit_archiver import exits, points
from audit_archiver.formats import batch as batches
from audit_archiver.formats import frames, job, keys, metadata, schema

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "lib" / "audit_archiver"
SEVEN = ROOT / "man" / "audit-archiver.7"
DOCUMENTED = {"aa-batch.5": ["batch"], "aa-job.5": ["job"], "aa-rows.5": ["rows", "rows-end"], "aa-metadata.5": ["metadata"],
              "aa-keys.5": ["keys"], "aa-index.5": ["index", "run", "owner", "intent", "abandoned"],
              "aa-restored.5": ["archived", "restore", "conflict", "restore-watermark", "rollback", "rolled-back", "hold"],
              "aa-report.5": ["report", "findings", "dry-run"], "aa-validation.5": ["validation", "balance", "baseline"]}
PAGES = [*(ROOT / "man" / name for name in DOCUMENTED), SEVEN]
ELSEWHERE = {"metadata": {"batch"}, "rows": {"batch"}}  # whose keys aa-batch(5) explains
VARIABLE = re.compile(r"(?:AA|AWS|PG|XDG)_?[A-Z][A-Z_0-9]*|(?:STATE|RUNTIME)_DIRECTORY")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_format_page = pytest.mark.parametrize("name", DOCUMENTED)


def plain(text: str) -> str:
    """Roff's escapes undone."""
    for escaped, char in (("\\(aq", "'"), ("\\(ha", "^"), ("\\(ti", "~"), ("\\(ga", "`"), ("\\-", "-"), ("\\&", ""), ("\\e", "\\")):
        text = text.replace(escaped, char)
    return text


def examples(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(kind, lines) of every example that names its kind."""
    for kind, block in re.findall(r'^\.\\" EXAMPLE (\S+)\n\.nf\n(.*?)^\.fi$', page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield kind, [plain(line) for line in block.split("\n")[:-1] if line not in (".RS", ".RE")]


def tags(text: str) -> list[str]:
    """The bold names in the tags of a page's .TP paragraphs, in order."""
    return [plain(name) for line in re.findall(r"^\.TP\n(.*)$", text, re.MULTILINE) for name in re.findall(r"\\fB(.*?)\\fR", line)]


def bold(text: str) -> set[str]:
    """Every bold word of a page."""
    return {plain(name) for name in re.findall(r"\\fB(.*?)\\fR", text)}


def block(text: str, name: str) -> str:
    """What stands between BEGIN and END of a checked list."""
    found = re.search(rf'^\.\\" BEGIN {name}\b.*?\n(.*?)^\.\\" END {name}$', text, re.MULTILINE | re.DOTALL)
    assert found, f"no block {name}"
    return found[1]


def properties(node: dict[str, Any], skip: frozenset[str] = frozenset()) -> set[str]:
    """Every key that a schema knows, at any depth."""
    found: set[str] = set()
    for name, inner in node.get("properties", {}).items():
        found |= {name} | (properties(inner) if name not in skip else set())
    for part in ("items", "then", "else"):
        found |= properties(node[part]) if isinstance(node.get(part), dict) else set()
    for part in ("oneOf", "prefixItems"):
        for inner in node.get(part, ()):
            found |= properties(inner)
    for inner in node.get("$defs", {}).values():
        found |= properties(inner) if not skip else set()
    return found


def first_arguments(function: str) -> Iterator[tuple[str, ast.expr]]:
    """(place, first argument) of every call of log.debug, info, warning, error and failure in the package."""
    for path in sorted(LIB.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) \
                    and node.func.value.id == function and node.func.attr in ("debug", "info", "warning", "error", "failure"):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.args[0]


def logical_lines(wrapped: list[str], ends: tuple[str, ...]) -> Iterator[str]:
    """Lines of an example that was wrapped to the page's width."""
    held = ""
    for line in wrapped:
        held += line.strip() if held else line
        if held.endswith(ends):
            yield held
            held = ""
    assert not held


@pytest.mark.parametrize("name, kind", [(name, kind) for name, kinds in DOCUMENTED.items() for kind in kinds if kind != "rows-end"])
def test_each_format_has_an_example_on_its_page(name: str, kind: str) -> None:
    assert kind in [each for each, _ in examples(ROOT / "man" / name)]


@every_format_page
def test_the_examples_of_a_page_are_what_the_readers_accept(name: str) -> None:
    for kind, wrapped in examples(ROOT / "man" / name):
        text = "".join(line.strip() if number else line for number, line in enumerate(wrapped)).encode()
        if kind == "batch":
            batches.parse(text)
        elif kind == "job":
            job.parse(text)
        elif kind == "rows":
            check_rows_stream(list(logical_lines(wrapped, ("}", "}]"))))
        elif kind == "keys":
            check_key_list(wrapped)
        else:
            schema.validate(kind, json.loads(text), f"the example of {kind}")


def check_rows_stream(stream: list[str]) -> None:
    """Frames and rows of the example belong together."""
    opening, *rows, closing = [line.encode() + b"\n" for line in stream]
    batch, end = frames.parse(opening, frames.OPEN)["batch"], frames.parse(closing, frames.END)
    digest = keys.Digest()
    digest.update(keys.texts(b"".join(rows), keys.pattern(batch["key"])))
    assert (digest.hexdigest(), batches.identity(batch)) == (batch["keys_sha256"], batch["id"])
    assert end == {"id": batch["id"], "rows": len(rows), "rows_sha256": hashlib.sha256(b"".join(rows)).hexdigest()}


def check_key_list(wrapped: list[str]) -> None:
    """The key list of the example is read as one, and its checksum is that of its keys."""
    (header, *rest) = logical_lines(wrapped[:next(n for n, line in enumerate(wrapped) if line.endswith("["))+1], ("[",))
    assert not rest
    content = "\n".join([header, *wrapped[wrapped.index(next(line for line in wrapped if line.endswith("["))) + 1:]]) + "\n"
    read, texts = metadata.parse_key_list(content.encode(), "the example")
    digest = keys.Digest()
    digest.update(texts)
    assert read["primary_key_checksum"] == f"sha256:{digest.hexdigest()}"


@every_format_page
def test_a_page_explains_every_key_of_its_formats_and_no_other(name: str) -> None:
    text = (ROOT / "man" / name).read_text(encoding="utf-8")
    known: set[str] = set()
    for kind in DOCUMENTED[name]:
        known |= properties(schema.load(kind), frozenset(ELSEWHERE.get(kind, ())))
    assert known - bold(text) == set(), "these keys are not explained"
    assert set(tags(text)) - known == set(), "these keys do not exist"


@pytest.mark.req("REQ-OBS-001")
def test_every_event_of_the_log_is_listed_and_every_listed_event_exists() -> None:
    said: dict[str, str] = {}
    for place, argument in first_arguments("log"):
        assert isinstance(argument, ast.Constant) and isinstance(argument.value, str), f"{place}: the event id must be written out"
        assert re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", argument.value), f"{place}: '{argument.value}'"
        said.setdefault(argument.value, place)
    listed = tags(block(SEVEN.read_text(encoding="utf-8"), "EVENTS"))
    missing = [f".TP\n\\fB{event}\\fR\nWhat it means ({said[event]}).".replace("-", "\\-") for event in sorted(set(said) - set(listed))]
    assert not missing, "add to the block EVENTS of man/audit-archiver.7:\n" + "\n".join(missing)
    assert set(listed) - set(said) == set(), "remove these from man/audit-archiver.7"
    assert listed == sorted(listed)


def test_the_operations_of_the_holder_are_those_that_the_page_explains() -> None:
    source = (LIB / "holder" / "server.py").read_text(encoding="utf-8")
    answered = set(re.findall(r'op == "(\w+)"', source))
    text = SEVEN.read_text(encoding="utf-8")
    protocol = text[text.index(".SH HOLDER PROTOCOL"):text.index(".SH LOG")]
    assert set(tags(protocol)) == answered
    for _, lines_of in examples(SEVEN):
        for line in lines_of:
            request = json.loads(line)
            assert request.get("op", "hello") in answered and ("op" in request) != ("ok" in request)


def test_the_exit_codes_are_those_of_the_table() -> None:
    text = SEVEN.read_text(encoding="utf-8")
    status = text[text.index(".SH EXIT STATUS"):text.index(".SH TEST POINTS")]
    listed = dict(re.findall(r"^\.TP\n\\fB(\d+)\\fR\n(.*)$", status, re.MULTILINE))
    assert {int(code): plain(meaning) for code, meaning in listed.items()} == exits.TABLE


def test_the_test_points_are_all_listed() -> None:
    listed = re.findall(r"[a-z]+(?:\.[a-z]+)+", plain(block(SEVEN.read_text(encoding="utf-8"), "POINTS")))
    assert listed == list(points.POINTS)


def test_every_variable_that_the_code_reads_is_on_the_page() -> None:
    read = set()
    for path in LIB.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.fullmatch(node.value):
                read.add(node.value)
    assert "AA_TXN" in read
    assert read - bold(SEVEN.read_text(encoding="utf-8")) == set()


@every_page
@pytest.mark.parametrize("command", [["groff", "-man", "-ww", "-Tutf8", "-z"], ["mandoc", "-T", "lint", "-W", "warning"],
                                     ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"]], ids=lambda command: command[0])
def test_a_page_renders_without_a_warning(page: Path, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"'{command[0]}' is not installed")
    done = subprocess.run([*command, str(page)], capture_output=True, text=True, check=False,
                          env={"PATH": "/usr/bin:/bin:/usr/local/bin", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"})
    assert done.stderr == ""
    assert command[0] != "mandoc" or done.stdout == ""
