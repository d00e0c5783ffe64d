"""Write docs/configuration-reference.md and the block KEYS of man/aa-config.5 from schemas/config.v1.json; --check only compares.

The schema is the one place where a key's type, default, meaning and example stand. A sentence "Default: ..." in a description
is a default that no value can express.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Iterator, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from audit_archiver.formats import schema  # noqa: E402
from tools.generated import escape, main, with_block  # noqa: E402

PAGE = ROOT / "docs" / "configuration-reference.md"
MANUAL = ROOT / "man" / "aa-config.5"
HEAD = """\
# Every key of the configuration

What a key means when it is left out stands under "default". How the file is found, how values come from the environment and what
is checked: [configuration](configuration.md). This page is made by `tools/reference.py` from
[schemas/config.v1.json](../schemas/config.v1.json), and so are the keys in `man 5 aa-config`.
"""
WORDS = {"object": "mapping", "array": "list", "boolean": "true or false"}
TITLES = {"": "At the top", "databases": "databases, each entry", "tables": "databases.tables, each entry"}
ORDER = ("", "s3", "databases", "tables", "defaults")
INHERITED = {"databases": "that of `defaults`", "tables": "that of the database"}


class Key(NamedTuple):
    """One key: what the reference says about it."""

    section: str
    name: str
    type: str
    default: str
    meaning: str
    example: Any


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, schema) of every mapping of the file; of a list's entries under the list's name."""
    whole = schema.load("config")
    found = {"": whole, "databases": whole["$defs"]["database"], "tables": whole["$defs"]["table"], **_mappings(whole, "")}
    yield from sorted(found.items(), key=lambda each: ORDER.index(each[0]) if each[0] in ORDER else len(ORDER))


def _mappings(node: dict[str, Any], above: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, inner in node["properties"].items():
        if "properties" in inner:
            path = f"{above}.{name}".lstrip(".")
            found.update({path: inner, **_mappings(inner, path)})
    return found


def keys(section: str, node: dict[str, Any]) -> Iterator[Key]:
    """Every key of a mapping, in the order of the schema."""
    whole = schema.load("config")
    for name, own in node["properties"].items():
        inner = {**whole["$defs"][own["$ref"].rpartition("/")[2]], **own} if "$ref" in own else own
        meaning, default = _split(inner["description"])
        if name in node.get("required", ()):
            default = "required"
        elif section in INHERITED and name in whole["properties"]["defaults"]["properties"] and "$ref" in own:
            default = INHERITED[section]
        elif not default and inner.get("default") not in (None, {}):
            default = f"`{_yaml(inner['default'])}`"
        yield Key(section, name, _type(inner), default, meaning, _example(inner))


def _split(description: str) -> tuple[str, str]:
    """A description without its sentence "Default: ...", and that sentence's rest."""
    found = re.search(r" ?\bDefault: (.+?)\.(?= |$)", description)
    return (description, "") if found is None else (description.replace(found[0], "").strip(), found[1])


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(f"`{_yaml(value)}`" for value in node["enum"])
    kinds = [WORDS.get(kind, kind) for kind in ([node["type"]] if isinstance(node["type"], str) else node["type"])]
    if kinds[0] == "mapping":
        kinds = kinds[:1]
    return " or ".join(kinds) + _bounds(node)


def _bounds(node: dict[str, Any]) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    if low is None:
        return ""
    if high is None:
        return f", {low} or more"
    return f", more than 0, at most {high}" if 0 < low < 0.001 else f", {low} to {high}"


def _example(node: dict[str, Any]) -> Any:
    """What `examples` says, else the default, else the first value that is allowed."""
    return next(each for each in (*node.get("examples", ()), node.get("default"), *node.get("enum", ())) if each is not None)


def _yaml(value: Any) -> str:
    """A value as YAML writes it in a line; a string in quotes only where it would be read as something else."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z/$~][^\s#]*|", value) and value not in ("true", "false", "null", ""):
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_yaml(each)}" for name, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, node in sections():
        parts.append(f"\n## {TITLES.get(section, section)}\n\n" + (f"{node['description']}\n\n" if section else "")
                     + "| key | type | default | meaning | example |\n|---|---|---|---|---|\n")
        for key in keys(section, node):
            example = f"`{key.name}: {_yaml(key.example)}`"
            parts.append(" | ".join(("", f"`{key.name}`", key.type, key.default, key.meaning.replace("|", "\\|"), example, "")).strip() + "\n")
    return re.sub(r"\|  (?=\|)", "| ", "".join(parts))


def block() -> str:
    """The keys as aa-config(5) has them; a key that a database or a table overrides is told once, under defaults."""
    found: list[str] = []
    for section, node in sections():
        found += [f".SS {escape(TITLES.get(section, section))}"] + ([escape(node["description"])] if section else [])
        inherited = []
        for key in keys(section, node):
            if key.default == INHERITED.get(section):
                inherited.append(f"\\fB{key.name}\\fR")
                continue
            said = f"{key.type}; {key.default}" if key.default == "required" else key.type
            default = f" Default: {key.default}." if key.default not in ("", "required") else ""
            found += [".TP", f"\\fB{escape(key.name)}\\fR ({escape(said.replace('`', ''))})", escape(f"{key.meaning}{default}".replace("`", ""))]
        if inherited:
            found += [".PP", f"Also {', '.join(inherited)}: instead of {escape(INHERITED[section]).replace('`', '')}."]
    return "\n".join(found)


def rewritten() -> dict[Path, str]:
    """Both pages as they should be."""
    return {PAGE: page(), MANUAL: with_block(MANUAL, MANUAL.read_text(encoding="utf-8"), "KEYS", block())}


if __name__ == "__main__":
    sys.exit(main("write docs/configuration-reference.md and the keys of aa-config(5)", rewritten()))
