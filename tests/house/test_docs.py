"""README and docs: every link leads somewhere, every quoted command and target exists, generated pages are current."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from audit_archiver import exits, points
from audit_archiver.catalogue import owner, record, staged
from audit_archiver.config import rules
from audit_archiver.formats import names as objects
from audit_archiver.formats import schema
from audit_archiver.objectstore import multipart
from tests.ground.run import ROOT, module, names, written
from tools import checks, generated, reference

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(text: str) -> list[str]:
    """What stands in code blocks and code spans."""
    fenced = FENCED.findall(text)
    rest = FENCED.sub("", text)
    return [*"\n".join(fenced + INDENTED.findall(rest)).split("\n"), *re.findall(r"`([^`\n]+)`", rest)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@every_page
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


@every_page
def test_every_quoted_command_exists_with_the_options_it_is_quoted_with(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        for name, said in re.findall(r"(?:^|[\s|'/])(aa-[a-z]+)(?![\w.(-])([^|'#>\n]*)", line):
            assert name in names() or f"man {name}" in line or f"man 5 {name}" in line, f"{page.name}: there is no {name} in '{line.strip()}'"
            if name in written():
                known = {each for action in module(name).build_parser()._actions for each in action.option_strings}
                used = set(re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", said.split(" -- ")[0]))
                assert used <= known, f"{page.name}: {name} has no {used - known}"


@every_page
def test_every_quoted_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page.read_text(encoding="utf-8")):
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", line):
            assert target in targets, f"{page.name}: make {target}"


@every_page
def test_every_quoted_manual_page_exists(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        for section, name in re.findall(r"\bman (?:([157]) )?([a-z-]+)", line):
            found = [path.name for path in (ROOT / "man").glob(f"{name}.{section or '*'}")]
            assert found or name in names(), f"{page.name}: there is no page {name} in '{line.strip()}'"


def test_the_readme_opens_with_the_demo_and_the_tests() -> None:
    first = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").split("\n")[1:] if line]
    assert first[0].startswith("    make demo") and first[1].startswith("    make test")


def test_the_table_of_exit_codes_is_complete() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d[^|]*) \| ([^|]*) \|", text[text.index("## Exit codes"):text.index("## Stopping it")], re.MULTILINE)
    assert dict(rows) == {**{str(code): meaning for code, meaning in exits.TABLE.items()}, "128+n": "ended by signal n"}
    codes = {each.code for each in vars(exits).values() if isinstance(each, type) and issubclass(each, exits.ArchiverError)}
    assert codes <= set(exits.TABLE)


def test_the_drawing_of_a_batch_names_every_point_that_a_stage_or_the_holder_passes() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = text[text.index("## One batch, from BEGIN"):text.index("## What lies where")]
    named = re.findall(r"\b[a-z]+(?:\.[a-z]+)+\b", drawn.replace(".json", ""))
    held, _, guarded = drawn.partition("By the guarded path")
    elsewhere = ("archive", "recover", "restore", "rollback")
    assert set(named) - {"locking.mode"} == {each for each in points.POINTS if each.split(".")[0] not in elsewhere}
    assert "holder.commit.sent" in held.partition("==+")[2] and "guarded.committed" in guarded.partition("==+")[2]


def test_the_drawing_of_places_names_every_file_that_is_written() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = text[text.index("## What lies where"):text.index("## After a fault")]
    for name in (*objects.SUFFIXES, owner.OWNER, record.HELD, staged.BATCH_FILE, multipart.STATE, "_intent_{n}.json",
                 "-start.json", "-end.json", "/.index/{run}_{NNN}.json"):
        assert name in places, name


@pytest.mark.parametrize("made", [checks.rewritten(), reference.rewritten()], ids=["checks", "reference"])
def test_a_generated_page_is_what_make_man_writes(made: dict[Path, str]) -> None:
    for page, text in made.items():
        assert page.read_text(encoding="utf-8") == text, "run 'make man'"


def test_the_reference_has_every_key_of_the_configuration_with_an_example_that_is_accepted() -> None:
    whole, told = schema.load("config"), 0
    for section, node in reference.sections():
        for key in reference.keys(section, node):
            alone = {"$defs": whole["$defs"], "type": "object", "properties": {key.name: node["properties"][key.name]}}
            written = f"{key.name}: {reference._yaml(key.example)}"
            jsonschema.validate(yaml.safe_load(written), alone)
            assert yaml.safe_load(written) == {key.name: key.example} and key.meaning and key.type
            told += f"`{written}`" in reference.PAGE.read_text(encoding="utf-8")
    assert told == len(re.findall(r'"description":', json.dumps(whole["properties"]))) + sum(
        len(whole["$defs"][each]["properties"]) for each in ("database", "table")) + sum(
        "$ref" in each for each in whole["properties"]["defaults"]["properties"].values())


def test_the_keys_that_are_said_to_be_not_used_are_those_that_warn() -> None:
    said = {(section, key.name) for section, node in reference.sections() for key in reference.keys(section, node)
            if key.meaning.startswith("Not used")}
    warn = {(path[0], path[1]) for path, _ in rules.COMFORT} | {("databases", key) for key, _ in rules.COMFORT_OF_A_DATABASE}
    assert said == warn | {("", "notifications"), ("tables", "classification")}


@pytest.mark.parametrize("tool", ["man", "checks", "reference"])
def test_check_writes_nothing_and_names_a_page_that_differs(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "checks.md"
    before = page.read_bytes()
    assert generated.main("of the test", {page: "other"}, ["--check"]) == 1
    assert (capsys.readouterr().out, page.read_bytes()) == ("docs/checks.md: is not what make man writes\n", before)
    done = subprocess.run([sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--check"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
