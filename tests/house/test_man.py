"""The man pages: generated blocks up to date, sections in order, every quoted option real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.ground.run import ROOT, module, names, written
from tools import man

SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "FILES", "RISKS", "EXAMPLES", "SEE ALSO"]
PAGES = sorted((ROOT / "man").glob("*.[157]"))
COMMAND_PAGES = [page for page in PAGES if page.suffix == ".1"]


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_the_generated_blocks_are_what_make_man_writes(page: Path) -> None:
    assert page.read_text() == man.rewritten(page), "run 'make man'"


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_the_sections_of_a_command_page_are_complete_and_in_order(page: Path) -> None:
    found = re.findall(r'^\.SH "?([A-Z ]+?)"?$', page.read_text(), re.MULTILINE)
    assert [name for name in found if name in SECTIONS] == SECTIONS
    assert page.stem in names()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_a_fixed_date_and_its_own_name(page: Path) -> None:
    header = page.read_text().split("\n")[0].replace("\\", "")
    assert re.match(rf'\.TH "?{page.stem.upper()}"? {page.suffix[1]} "?2\d\d\d-\d\d-\d\d"? ', header), header


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_in_a_page_exists(page: Path) -> None:
    text = page.read_text().replace("\\-", "-")
    unknown = set(re.findall(r"\baa-[a-z]+(?= ?\(1\))", text)) - set(names())
    assert not unknown
    for name, said in re.findall(r"^(?:.*[|'] ?)?(aa-[a-z]+)((?: [^|'\n]*)?)", _examples(text), re.MULTILINE):
        if name in written():
            known = {each for action in module(name).build_parser()._actions for each in action.option_strings}
            used = set(re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", said.split(" -- ")[0]))
            assert used <= known, f"{name}: {used - known}"


def _examples(text: str) -> str:
    """What stands between .nf and .fi."""
    return "\n".join(re.findall(r"^\.nf$(.*?)^\.fi$", text, re.MULTILINE | re.DOTALL))
