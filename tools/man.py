"""Write the generated blocks of man/*.1 from each command's parser and from exits.TABLE; --check only compares.

A page is prose by hand around three blocks:
    .\\" BEGIN NAME ... .\\" END NAME                the command and the first sentence of its module
    .\\" BEGIN OPTIONS ... .\\" END OPTIONS          build_parser()'s actions
    .\\" BEGIN EXIT STATUS ... .\\" END EXIT STATUS  the codes
What comes out does not depend on Python's version: argparse's help text does, its actions do not.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from audit_archiver import exits  # noqa: E402
from tests.ground.run import module_name  # noqa: E402
from tools.generated import escape, main, with_block  # noqa: E402


def synopsis(action: argparse.Action) -> str:
    """The option's spellings, bold, with its value in italics."""
    value = ""
    if action.nargs != 0:
        choices = action.choices
        name = action.metavar or ("{" + ",".join(map(str, choices)) + "}" if choices else action.dest.upper())
        assert isinstance(name, str)
        value = f"\\fI{escape(name)}\\fR" + (" ..." if action.nargs in ("*", "+", argparse.REMAINDER) else "")
    if not action.option_strings:
        return value
    spelt = ", ".join(f"\\fB{escape(each)}\\fR" for each in action.option_strings)
    return f"{spelt} {value}" if value else spelt


def explained(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help of an option with its %(...)s filled in."""
    words: dict[str, Any] = {**vars(action), "prog": parser.prog}
    if action.choices is not None:
        words["choices"] = ", ".join(map(str, action.choices))
    return escape((action.help or "") % words)


def blocks(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The three generated blocks of a command."""
    said = (parser.description or "").rstrip(".")
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    options = [line for action in shown for line in (".TP", synopsis(action), explained(parser, action))]
    codes = [line for code, meaning in exits.TABLE.items() for line in (".TP", f".B {code}", escape(meaning))]
    codes += [".TP", ".BI 128+ n", "ended by signal", ".I n"]
    return {"NAME": f"{escape(parser.prog)} \\- {escape(said[:1].lower() + said[1:])}",
            "OPTIONS": "\n".join(options), "EXIT STATUS": "\n".join(codes)}


def rewritten(page: Path) -> str:
    """The page with its blocks made anew. ValueError if a block is missing."""
    module = importlib.import_module(module_name(page.stem))
    text = page.read_text(encoding="utf-8")
    for name, block in blocks(module.build_parser()).items():
        text = with_block(page, text, name, block)
    return text


if __name__ == "__main__":
    sys.exit(main("write the generated blocks of the man pages of commands",
                  {page: rewritten(page) for page in sorted((ROOT / "man").glob("*.1"))}))
