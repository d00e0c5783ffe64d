"""Finds rows by metadata as aa-metadata(5) says: the page's own program, and its rules for ranges.

    may_hold(metadata, "user_id", b"42")       # the members that may hold it, by the program on the page
    in_range(metadata, "user_id", b"42")       # False only if no row of the batch can have it
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "man" / "aa-metadata.5"


def block(name: str) -> str:
    """A literal block of the page, roff's escapes undone."""
    found = re.search(rf'^\.\\" {name}\n\.nf\n\.RS\n(.*?)^\.RE$', PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1].replace("\\-", "-").replace("\\e", "\\")


_program: dict[str, Any] = {}
exec(compile(block("PROGRAM"), str(PAGE), "exec"), _program)
may_hold = _program["may_hold"]


def in_range(metadata: dict[str, Any], column: str, value: bytes) -> bool:
    """False if `value`, the bytes of its JSON, lies outside of the column's range."""
    for each in metadata["ranges"]:
        if each["column"] == column and value != b"null":
            if each["order"] == "number":
                return bool(each["min"] <= int(value) <= each["max"])
            return _json(each["min"]) <= value <= _json(each["max"])
    return True


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
