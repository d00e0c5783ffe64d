"""README and docs: every link leads somewhere, every quoted command and target exists, generated pages are current."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.ground.run import ROOT, module, names, written

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
                used = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", said.split(" -- ")[0]))
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


def test_the_page_of_the_checks_is_what_the_checks_declare() -> None:
    spec = importlib.util.spec_from_file_location("checks_page", ROOT / "tools" / "checks.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (ROOT / "docs" / "checks.md").read_text(encoding="utf-8") == made.page(), "run 'python tools/checks.py'"
