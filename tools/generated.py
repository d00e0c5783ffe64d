"""What writes generated pages: tools/man.py, checks.py and reference.py write theirs, or with --check only compare."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Mapping, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]


def main(about: str, pages: Mapping[Path, str], argv: Optional[Sequence[str]] = None) -> int:
    """Write every page whose text differs and name it; with --check write nothing, and return 1 if one differs."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a byte would change")
    check = parser.parse_args(argv).check
    differing = [page for page, text in pages.items() if text != page.read_text(encoding="utf-8")]
    for page in differing:
        print(f"{page.relative_to(ROOT)}: {'is not what make man writes' if check else 'written'}")
        if not check:
            page.write_text(pages[page], encoding="utf-8")
    return 1 if check and differing else 0


def with_block(page: Path, text: str, name: str, block: str) -> str:
    """A manual page's `text` with its block `name` replaced. ValueError unless there is exactly one."""
    pattern = re.compile(rf'(?<=^\.\\" BEGIN {name}\n).*?(?=^\.\\" END {name}$)', re.MULTILINE | re.DOTALL)
    text, count = pattern.subn(lambda _: block + "\n", text)
    if count != 1:
        raise ValueError(f'{page.relative_to(ROOT)}: {count} blocks .\\" BEGIN {name} ... .\\" END {name}, 1 is needed')
    return text


def escape(text: str) -> str:
    """Text as roff takes it: hyphens stay hyphens, a leading dot or quote is no request."""
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text[:1] in (".", "'") else text
