"""Checks a value against its released JSON Schema; the only importer of jsonschema.

A schema `<kind>.v<N>.json` is never edited once released. An unknown version and an unknown key are both
refused: these lines license a deletion. Two rules are stricter than JSON Schema's: 3.0 is no integer, and '$'
in a pattern is the very end.
"""

from __future__ import annotations

import functools
import json
import os
import re
from typing import TYPE_CHECKING, Any, Iterator

from audit_archiver import schemas
from audit_archiver.exits import InputError
from audit_archiver.formats import accept

if TYPE_CHECKING:
    import jsonschema


def validate(kind: str, value: Any, what: str) -> None:
    """Raise InputError naming `what` and the place in it if `value` breaks the schema of `kind`."""
    if _quick(kind)(value):
        return
    error = next(iter_errors(kind, value), None)
    if error is None:
        return
    error = _innermost(error)
    path = list(error.absolute_path)
    if path == ["version"]:
        raise InputError(f"{what} has version {value['version']!r}, which this program does not know",
                         hint="use the release that wrote it, or a newer one")
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    raise InputError(f"{what} breaks the format {kind}.v1" + (f" at '{place}'" if place else "") + f": {_reason(error)}")


def iter_errors(kind: str, value: Any) -> Iterator[jsonschema.ValidationError]:
    """The jsonschema errors of `value`, the worst first: another version, then from the outside in."""
    found = _validator(kind).iter_errors(value)
    return iter(sorted(found, key=lambda error: (list(error.absolute_path) != ["version"], len(error.absolute_path))))


@functools.cache
def load(kind: str) -> dict[str, Any]:
    """The schema of `kind` as an object."""
    path = os.path.join(os.path.dirname(schemas.__file__), f"{kind}.v1.json")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


@functools.cache
def _quick(kind: str) -> accept.Check:
    try:
        return accept.build(load(kind))
    except accept.NotKnown:
        return lambda value: False


@functools.cache
def _validator(kind: str) -> Any:
    # imported at the first refusal only: its 45 ms would be half of a stage's start
    import jsonschema

    def pattern(_validator: Any, rule: str, value: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
        if isinstance(value, str) and not re.search(accept.whole(rule), value):
            yield jsonschema.ValidationError("does not match")

    base = jsonschema.Draft202012Validator
    integer = base.TYPE_CHECKER.redefine(
        "integer", lambda _checker, value: isinstance(value, int) and not isinstance(value, bool))
    return jsonschema.validators.extend(base, {"pattern": pattern}, type_checker=integer)(load(kind))


def _innermost(error: jsonschema.ValidationError) -> jsonschema.ValidationError:
    """The error inside the one alternative of a oneOf or anyOf that has the value's type, if there is one."""
    while error.validator in ("oneOf", "anyOf"):
        wrong_type = {each.schema_path[0] for each in error.context if each.validator == "type" and not each.path}
        inside = [each for each in error.context if each.schema_path[0] not in wrong_type]
        if not inside:
            return error
        error = min(inside, key=lambda each: len(each.absolute_path))
    return error


def _reason(error: jsonschema.ValidationError) -> str:
    """jsonschema's sentence without the value, which could be row content."""
    rule = error.validator_value
    if error.validator == "additionalProperties":
        known = set(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - known)
        return f"unknown key '{unknown[0]}'"
    if error.validator == "required":
        return f"'{next(key for key in rule if key not in error.instance)}' is missing"
    if error.validator == "dependentRequired":
        return "; ".join(f"'{key}' without '{need}'" for key, needs in rule.items()
                         if key in error.instance for need in needs if need not in error.instance)
    if error.validator in ("oneOf", "anyOf"):
        return "must be " + " or ".join(each.get("type", "another value") for each in rule)
    return f"does not satisfy {error.validator} {rule!r}"
