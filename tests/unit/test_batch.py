"""Batch lines: what is refused, with which words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import lines
from audit_archiver.exits import InputError
from audit_archiver.formats import batch as batches
from audit_archiver.formats import names

EXAMPLES = Path(__file__).parents[1] / "contracts" / "batch.v1"


def example(name: str) -> dict[str, Any]:
    """A valid line of the contracts."""
    return json.loads((EXAMPLES / f"valid-{name}.json").read_text(encoding="utf-8"))


def said(line: Any, **wanted: Any) -> str:
    """The message for a line that must be refused."""
    with pytest.raises(InputError) as caught:
        batches.parse(line if isinstance(line, bytes) else lines.dump(line), **wanted)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("valid-*.json")), ids=lambda path: path.stem[6:])
def test_a_valid_line_is_read_as_it_was_written(path: Path) -> None:
    line = example(path.stem[6:])
    assert batches.parse(lines.dump(line)) == line
    assert lines.dump(batches.parse(lines.dump(line))) == lines.dump(line), "a stage hands on what it read byte for byte"


@pytest.mark.parametrize("has, needs, lacks, words", [
    ("serialized", ("uploaded",), (), "public.audit_logs batch_003 was not uploaded. pass it through aa-upload first"),
    ("uploaded", ("verified",), ("deleted",), "was not verified. pass it through aa-verify first"),
    ("born", ("serialized",), (), "was not serialized. pass it through aa-serialize first"),
    ("deleted", ("committed",), (), "was not committed. pass it through aa-txn, aa-delete or aa-recover first"),
    ("deleted", ("verified",), ("deleted",), "public.audit_logs batch_003 is already deleted"),
    ("recorded", ("committed",), ("recorded",), "is already recorded"),
])
@pytest.mark.req("REQ-INT-001", "REQ-S3-025")
def test_a_line_without_its_predecessor_s_mark_is_refused_and_the_stage_to_run_is_named(
        has: str, needs: tuple[str, ...], lacks: tuple[str, ...], words: str) -> None:
    assert said(example(has), needs=needs, lacks=lacks).endswith(words)


@pytest.mark.parametrize("line, words", [
    (b"", "is not JSON"), (b"\n", "is not JSON"), (b"{\n", "is not JSON"), (b"{}{}\n", "is not JSON"), (b"[]\n", "the line is no batch line"),
    (b"null\n", "no batch line"), (b'"aa-batch"\n', "no batch line"), (b'{"format":"aa-job","version":1}\n', "no batch line"),
    (b'["aa-rows",1,{}]\n', "no batch line"), (b'{"format":"aa-batch","version":NaN}\n', "NaN is no number"),
    (b'{"format":"aa-batch","version":1,"version":1}\n', "the key 'version' stands there twice"),
    (b"\xff\n", "is not JSON"), ("\ufeff{}\n".encode(), "is not JSON"), ("{}\n".encode("utf-16"), "is not JSON"),
    (b"[" * 100_000 + b"\n", "is not JSON"), (b"9" * 5000 + b"\n", "the "),
])
def test_a_line_that_is_no_batch_line_is_refused(line: bytes, words: str) -> None:
    assert words in said(line)


@pytest.mark.parametrize("field, value", [("first", ["2024-01-01T00:00:03.5+00:00", 1002]), ("table", "audit_log"), ("schema", "audit"),
                                          ("database", "test"), ("keys_sha256", "0" * 64), ("id", "0" * 64)])
@pytest.mark.req("REQ-IDEM-001")
def test_a_line_whose_id_is_not_that_of_its_contents_is_refused(field: str, value: Any) -> None:
    line = example("uploaded")
    line["batch"][field] = value
    assert "does not belong to its contents" in said(line)


@pytest.mark.parametrize("has, section, field, value, words", [
    ("serialized", "serialized", "rows", 1199, "'batch.rows' and 'serialized.rows' differ"),
    ("verified", "verified", "rows", 1199, "'serialized.rows' and 'verified.rows' differ"),
    ("verified", "verified", "sha256", "0" * 64, "'serialized.data.sha256' and 'verified.sha256' differ"),
    ("verified", "verified", "keys_sha256", "0" * 64, "'batch.keys_sha256' and 'verified.keys_sha256' differ"),
    ("deleted", "deleted", "rows", 1199, "'batch.rows' and 'deleted.rows' differ"),
    ("subset-deleted-by-hand", "deleted", "rows", 1200, "'batch.rows' and 'deleted.rows' differ"),
    ("subset-deleted-by-hand", "deleted", "left_out", [7], "'batch.rows' and 'deleted.rows' differ"),
])
@pytest.mark.req("REQ-INT-005", "REQ-S3-025")
def test_sections_that_contradict_each_other_license_nothing(has: str, section: str, field: str, value: Any, words: str) -> None:
    line = example(has)
    line[section][field] = value
    assert said(line) == f"public.audit_logs batch_003 contradicts itself: {words}"


def test_offsets_of_more_members_than_the_rows_can_fill_are_refused() -> None:
    line = example("serialized")
    line["serialized"]["data"]["members"].append(125000)
    assert "'serialized.rows' and 'serialized.data.members' differ" in said(line)


def test_a_new_line_says_format_and_version_first() -> None:
    line = example("serialized")
    text = lines.dump(batches.new(line["batch"], line["serialized"]))
    assert text.startswith(b'{"format":"aa-batch","version":1,"batch":{')
    assert batches.parse(text) == line


def test_the_objects_of_a_batch_share_its_stem() -> None:
    line = example("serialized")
    stem = line["serialized"]["stem"]
    assert batches.keys_of(line) == (stem + names.DATA, stem + names.METADATA, stem + names.KEYS)


def test_messages_call_a_batch_by_schema_table_and_number() -> None:
    batch = copy.deepcopy(example("born")["batch"])
    batch.update(schema="audit", number=1000)
    assert batches.name(batch) == "audit.audit_logs batch_1000"
