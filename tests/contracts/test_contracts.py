"""The released schemas: every valid example passes, every invalid one is refused, and the message names the place.

An invalid file breaks one rule, which its name says; refusals.txt holds what is said about it.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any, Iterator

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_archiver.exits import InputError
from audit_archiver.formats import accept, schema
from audit_archiver.formats import batch as batches
from tests.unit.profile import fixed

HERE = Path(__file__).parent
SCHEMAS = HERE.parents[1] / "schemas"
ELSEWHERE = {"config": "tests/unit/test_config_contracts.py", "report": "tests/unit/test_report.py"}
KINDS = sorted({path.name.partition(".")[0] for path in SCHEMAS.glob("*.v1.json")} - set(ELSEWHERE))
VALID = sorted(path for kind in KINDS for path in (HERE / f"{kind}.v1").glob("valid-*.json"))
INVALID = sorted(path for kind in KINDS for path in (HERE / f"{kind}.v1").glob("invalid-*.json"))
REFUSALS = dict(line.split(": ", 1) for line in (HERE / "refusals.txt").read_text(encoding="utf-8").splitlines()
                if not line.startswith("#"))
OPTIONAL = {
    "batch": {"serialized", "serialized.dir", "uploaded", "verified", "deleted", "deleted.left_out", "committed", "recorded"},
    "job": {"refused.at", "find", "held", "force_rearchive"},
    "run": {"held", "system", "database_oid", "wal"}, "intent": {"left_out"}, "abandoned": {"evidence.accounted"},
    "restore": {"asked.hold_until"}, "rows": {"table.ddl", "table.find"}, "metadata": {"schema.ddl", "find", "filters"},
}
OPEN = {"first", "last", "cursor", "sample", "primary_keys"}  # key values: whatever the key's types are

valid_file = pytest.mark.parametrize("path", VALID, ids=lambda path: f"{path.parent.name}/{path.stem[6:]}")
invalid_file = pytest.mark.parametrize("path", INVALID, ids=lambda path: f"{path.parent.name}/{path.stem[8:]}")
every_kind = pytest.mark.parametrize("kind", KINDS)


def kind_of(path: Path) -> str:
    """The schema that a fixture belongs to."""
    return path.parent.name.partition(".")[0]


def load(path: Path) -> Any:
    """The value in a fixture."""
    return json.loads(path.read_text(encoding="utf-8"))


def objects(value: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every object in a value, except inside key values."""
    if isinstance(value, dict):
        yield place, value
        for name, item in value.items():
            if name not in OPEN:
                yield from objects(item, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from objects(item, f"{place}[{number}]")


def at(value: Any, place: str) -> Any:
    """The object at a place that `objects` gave."""
    return dict(objects(value))[place]


def refusal(kind: str, value: Any) -> str:
    """What is said about a value that must be refused."""
    with pytest.raises(InputError) as caught:
        schema.validate(kind, value, "the file")
    return caught.value.msg


def test_every_schema_has_valid_and_invalid_examples_and_every_example_a_schema() -> None:
    assert {kind_of(path) for path in VALID} == set(KINDS) == {kind_of(path) for path in INVALID}
    assert {path.name.partition(".")[0] for path in HERE.glob("*.v1")} <= {*KINDS, *ELSEWHERE}
    assert all((HERE.parents[1] / test).exists() for test in ELSEWHERE.values())
    assert set(REFUSALS) == {f"{path.parent.name}/{path.stem[8:]}" for path in INVALID}


@every_kind
def test_a_schema_is_a_valid_schema_and_none_of_its_objects_is_open(kind: str) -> None:
    made = schema.load(kind)
    jsonschema.Draft202012Validator.check_schema(made)
    nodes = [node for _, node in objects(made) if node.get("type") == "object" and "properties" in node]
    assert nodes and all(node["additionalProperties"] is False for node in nodes)


@valid_file
def test_a_valid_file_passes(path: Path) -> None:
    schema.validate(kind_of(path), load(path), "the file")


@invalid_file
def test_an_invalid_file_is_refused_and_the_message_names_the_place(path: Path) -> None:
    assert refusal(kind_of(path), load(path)) == "the file " + REFUSALS[f"{path.parent.name}/{path.stem[8:]}"]


@valid_file
def test_no_message_repeats_a_value_of_the_file(path: Path) -> None:
    for place, found in objects(load(path)):
        for name in found:
            broken = load(path)
            at(broken, place)[name] = {"secret-4711": "secret-4711"} if name != "version" else 4
            try:
                schema.validate(kind_of(path), broken, "the file")
            except InputError as error:
                assert "secret-4711" not in str(error).replace("unknown key 'secret-4711'", "")


@valid_file
def test_an_unknown_key_in_any_object_is_refused_by_name_and_place(path: Path) -> None:
    for place, _ in objects(load(path)):
        broken = load(path)
        at(broken, place)["surplus"] = 1
        said = f" at '{place}'" if place else ""
        assert refusal(kind_of(path), broken) == f"the file breaks the format {kind_of(path)}.v1{said}: unknown key 'surplus'"


@valid_file
def test_a_key_is_required_unless_it_is_listed_here_as_optional(path: Path) -> None:
    kind = kind_of(path)
    for place, found in objects(load(path)):
        for name in found:
            broken = load(path)
            del at(broken, place)[name]
            if f"{place}.{name}".lstrip(".") in OPTIONAL.get(kind, ()):
                continue
            if kind == "job" and name == "refused":
                assert "is missing" in refusal(kind, broken)
            elif kind == "job" and "refused" in found and not place and name not in schema.load("job")["required"]:
                schema.validate(kind, broken, "the file")
            else:
                said = f" at '{place}'" if place else ""
                assert refusal(kind, broken) == f"the file breaks the format {kind}.v1{said}: '{name}' is missing"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "version" in schema.load(kind)["properties"]])
@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5, [1]])
def test_an_unknown_version_is_refused_as_such_whatever_else_is_wrong(kind: str, version: Any) -> None:
    value = load(next(path for path in VALID if kind_of(path) == kind))
    value.update(version=version, surplus=1)
    assert refusal(kind, value) == f"the file has version {version!r}, which this program does not know"


@pytest.mark.req("REQ-INT-001")
def test_a_section_of_a_batch_line_stands_only_behind_its_predecessors() -> None:
    whole = load(HERE / "batch.v1" / "valid-recorded.json")
    held = [batches.SECTIONS[:count] for count in range(len(batches.SECTIONS) + 1)]
    by_recovery = [("serialized", "uploaded", "verified", "committed"), ("serialized", "uploaded", "verified", "committed", "recorded")]
    for by, legal in (("holder", held), ("aa-delete", held), ("aa-recover", held + by_recovery)):
        for count in range(len(batches.SECTIONS) + 1):
            for chosen in itertools.combinations(batches.SECTIONS, count):
                line = copy.deepcopy({name: whole[name] for name in ("format", "version", "batch", *chosen)})
                if "committed" in line:
                    line["committed"]["by"] = by
                if chosen in legal:
                    schema.validate("batch", line, "the line")
                else:
                    with pytest.raises(InputError, match="without|is missing"):
                        schema.validate("batch", line, "the line")


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-1, 3), st.floats(allow_nan=False), st.text(max_size=3),
                   st.sampled_from(["", "4711", "0/1", "2025-12-30T02:15:47Z", "a" * 64, "a" * 64 + "\n", "FULL", "read", 1.0]),
                   st.lists(st.sampled_from(["id", "id2", 1, None]), max_size=3), st.builds(dict))


@fixed
@given(data=st.data())
def test_the_quick_check_never_accepts_what_jsonschema_refuses(data: st.DataObject) -> None:
    """It decides what may be deleted, so its yes must be jsonschema's yes; the same for its no, or it would not be quick."""
    path = data.draw(st.sampled_from(VALID))
    kind, value = kind_of(path), load(path)
    for _ in range(data.draw(st.integers(1, 3))):
        place, found = data.draw(st.sampled_from(list(objects(value))))
        name = data.draw(st.sampled_from([*found, "surplus"]))
        action = data.draw(st.sampled_from(["drop", "replace", "inside"]))
        if action == "drop":
            found.pop(name, None)
        elif action == "inside" and isinstance(found.get(name), list) and found[name]:
            found[name][data.draw(st.integers(0, len(found[name]) - 1))] = data.draw(VALUES)
        else:
            found[name] = data.draw(VALUES)
        if not value:
            break
    quick = accept.build(schema.load(kind))(value)
    assert quick == (next(schema.iter_errors(kind, value), None) is None)


def test_a_schema_with_a_keyword_that_the_quick_check_does_not_know_is_left_to_jsonschema() -> None:
    for unknown in ({"not": {}}, {"properties": {"a": {"format": "date"}}}, {"const": None}, {"enum": [[1]]},
                    {"additionalProperties": {}}, {"uniqueItems": True}):
        with pytest.raises(accept.NotKnown):
            accept.build(unknown)
