"""Checks a tree against schemas/config.v1.json and says, for each error, where it is and what to write instead.

All errors are reported, not the first one. A value is shown only where it cannot be a secret: neither one of a
secret key nor one that came out of the environment.
"""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any, Iterator, Optional

from audit_archiver.config.tree import KeyPath, Tree
from audit_archiver.exits import InputError
from audit_archiver.formats import schema as formats_schema

_KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
          "array": "a list", "object": "a mapping"}
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_FREE = ("notifications", "legal_holds")
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_SHOWN = 60


def structure(tree: Tree) -> None:
    """Note every breach of the schema in tree.problems, and drop what is wrong, so that the rules find sound types.

    Values from the environment are text; they take the type that their key wants first.
    """
    _drop_empty_sections(tree)
    if tree.broken or not _sound(tree.value):
        _adopt_types(tree)
        _breaches(tree)
    _one_line(tree, tree.value, ())


def _sound(value: Any) -> bool:
    """True if the schema has nothing to say, which is found out without loading jsonschema."""
    try:
        formats_schema.validate("config", value, "the configuration")
    except InputError:
        return False
    return True


def _breaches(tree: Tree) -> None:
    found = _worst(error for error in formats_schema.iter_errors("config", tree.value)
                   if tuple(error.absolute_path) not in tree.broken)
    for error in found:
        _explain(tree, error)
    for error in found:
        path = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            for key in _unknown(error):
                tree.drop(path + (key,))
        elif error.validator != "required":
            tree.drop(path)
    for path in tree.broken:
        tree.drop(path)


def _worst(errors: Iterator[Any]) -> list[Any]:
    """One error per value: what is empty also breaks a pattern, and a person needs to hear of one."""
    kept: dict[Any, Any] = {}
    for error in errors:
        alone = error.validator in ("additionalProperties", "required")
        place = (tuple(error.absolute_path), error.validator if alone else "")
        if place not in kept or error.validator in ("type", "minLength"):
            kept[place] = error
    return list(kept.values())


def _drop_empty_sections(tree: Tree) -> None:
    """A section whose lines are all commented out is null: the same as none."""
    for key, value in list(tree.value.items()):
        if value is None and "object" in _as_list(_schema()["properties"].get(key, {}).get("type")) \
                and key not in _schema()["required"]:
            del tree.value[key]


def _adopt_types(tree: Tree) -> None:
    for error in formats_schema.iter_errors("config", tree.value):
        path = tuple(error.absolute_path)
        if error.validator == "type" and path in tree.taken and isinstance(error.instance, str):
            value = _converted(error.instance.strip(), _as_list(error.validator_value))
            if value is not None:
                tree.put(path, value)


def _converted(text: str, kinds: list[str]) -> Any:
    if "integer" in kinds and re.fullmatch(r"[-+]?[0-9]{1,18}", text):
        return int(text)
    if "number" in kinds and re.fullmatch(r"[-+]?[0-9]{1,18}(\.[0-9]{1,18})?", text):
        return float(text)
    if "boolean" in kinds:
        return _TRUTHS.get(text.lower())
    return None


def _explain(tree: Tree, error: Any) -> None:
    """One schema error in words."""
    path = tuple(error.absolute_path)
    if error.validator == "additionalProperties":
        for key in _unknown(error):
            _unknown_key(tree, path, key, error.schema)
    elif error.validator == "required":
        for key in error.validator_value:
            if key not in error.instance:
                _missing_key(tree, path, key, error.schema["properties"][key])
    elif path == ("version",):
        tree.refuse(path, f"version {_shown(tree, path, error)} of the configuration is not known",
                    "write 'version: \"2.0\"' and the keys of aa-config(5)")
    else:
        tree.refuse(path, f"{tree.subject(path)} {_breach(tree, path, error)}", _advice(error))


def _unknown(error: Any) -> list[str]:
    known, patterns = error.schema.get("properties", {}), error.schema.get("patternProperties", {})
    return [key for key in error.instance if key not in known and not any(re.search(each, key) for each in patterns)]


def _unknown_key(tree: Tree, path: KeyPath, key: str, section: dict[str, Any]) -> None:
    known = list(section["properties"])
    near = difflib.get_close_matches(key, known, 1, 0.6)
    elsewhere = _homes().get(key, [])
    if near:
        hint = f"did you mean '{near[0]}'?"
    elif elsewhere:
        hint = f"'{key}' belongs to {' or '.join(elsewhere)}"
    else:
        hint = f"known keys are: {', '.join(known)}"
    where = f" in {tree.subject(path)}" if path else ""
    tree.refuse(path + (key,), f"unknown key '{key}'{where}", hint)


def _missing_key(tree: Tree, path: KeyPath, key: str, wanted: dict[str, Any]) -> None:
    described = _resolved(wanted)
    example = (described.get("examples") or ["..."])[0]
    line = f"{key}: {example}" if not isinstance(example, (list, dict)) else f"{key}:"
    tree.refuse(path, f"{tree.subject(path + (key,))} is missing", f"write '{line}': {_sentence(described)}")


def _breach(tree: Tree, path: KeyPath, error: Any) -> str:
    """What is wrong with a value."""
    rule, limit, schema = error.validator, error.validator_value, error.schema
    shown = _shown(tree, path, error)
    if rule == "type":
        if error.instance is None:
            return "has no value"
        kinds = [_KINDS[kind] for kind in _as_list(limit) if kind != "null"]
        return f"must be {' or '.join(kinds)}, not {shown}"
    if rule == "enum":
        choices = ", ".join("null" if each is None else str(each) for each in limit)
        return f"must be one of {choices}, not {shown}"
    if rule in ("minimum", "maximum"):
        low, high = schema.get("minimum"), schema.get("maximum")
        span = f"between {low} and {high}" if high is not None else f"at least {low}"
        return f"must be {span}, not {shown}"
    if rule in ("minLength", "minItems"):
        return "is empty"
    if rule in ("maxLength", "maxItems"):
        return f"is longer than {limit} {'characters' if rule == 'maxLength' else 'entries'}"
    if rule == "uniqueItems":
        return "names the same thing twice"
    return "has a form that is not allowed"


def _advice(error: Any) -> Optional[str]:
    """What to write instead."""
    if error.validator == "enum" and isinstance(error.instance, str):
        texts = [each for each in error.validator_value if isinstance(each, str)]
        near = difflib.get_close_matches(error.instance.lower(), [each.lower() for each in texts], 1, 0.5)
        if near:
            return f"did you mean '{next(each for each in texts if each.lower() == near[0])}'?"
    if error.validator == "type" and error.instance is not None:
        kinds = _as_list(error.validator_value)
        if "string" in kinds and isinstance(error.instance, (bool, int, float)):
            return "put it in quotes"
        if "string" not in kinds and isinstance(error.instance, str) and _converted(error.instance.strip(), kinds) is not None:
            return "remove the quotes or leading zeros"
    return _sentence(_described(error)) or None


def _shown(tree: Tree, path: KeyPath, error: Any) -> str:
    """The value as far as it may be printed."""
    value = error.instance
    taken = tree.taken.get(path)
    if taken:
        return f"what {' and '.join('${' + name + '}' for name in taken.names)} holds"
    if error.schema.get("writeOnly"):
        return "what is written here"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        if "@" in value or len(value) > _SHOWN:
            return "this text"
        return f"'{value}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _one_line(tree: Tree, value: Any, path: KeyPath) -> None:
    """Refuse control characters, among them the line break at the end of a '|' block or of a mounted secret."""
    if path and (path[0] in _FREE or str(path[0]).startswith("x-")):
        return
    if isinstance(value, dict):
        for key, inner in list(value.items()):
            _one_line(tree, inner, path + (key,))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _one_line(tree, inner, path + (number,))
    elif isinstance(value, str) and _CONTROL.search(value):
        tree.refuse(path, f"{tree.subject(path)} holds a line break or another control character",
                    "write it on one line, and mind how the variable is set" if path in tree.taken
                    else "write it on one line, without '|'")
        tree.drop(path)


def _described(error: Any) -> dict[str, Any]:
    """The schema with the description of the very key: what a `$ref` leads to is described where it is used."""
    node: Any = _schema()
    best = node
    for part in list(error.absolute_schema_path)[:-1]:  # a path does not say where it went through a `$ref`
        node = node[part]
        if isinstance(node, dict):
            node = _resolved(node)
            best = node if isinstance(node.get("description"), str) else best
    return best


def _sentence(schema: dict[str, Any]) -> str:
    """The first sentence of the description, without its full stop."""
    return schema.get("description", "").partition(". ")[0].rstrip(".")


def _schema() -> dict[str, Any]:
    return formats_schema.load("config")


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    return {**_schema()["$defs"][schema["$ref"].rpartition("/")[2]], **schema}


@functools.cache
def _homes() -> dict[str, list[str]]:
    """For every key the sections it belongs to, in words."""
    homes: dict[str, list[str]] = {}
    for path, section in _sections():
        for key in section.get("properties", {}):
            homes.setdefault(key, []).append(path)
    return homes


def _sections() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "the top of the file", _schema()
    for key, section in _schema()["properties"].items():
        if "properties" in section:
            yield f"'{key}'", section
    yield "'databases'", _schema()["$defs"]["database"]
    yield "'tables'", _schema()["$defs"]["table"]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
