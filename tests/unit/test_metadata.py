"""Metadata (Appendix B) and key list (Appendix C): what they say, and what can be rebuilt from them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import __version__, lines
from audit_archiver.exits import InputError
from audit_archiver.formats import batch as batches
from audit_archiver.formats import keys, metadata, names
from tests.ground.batches import staged

APPENDIX_B = {"version", "database", "host", "table", "schema", "batch_number", "batch_id", "archived_at", "date_range", "record_count",
              "checksum", "file_size", "compression", "postgres_version", "archiver_version", "deletion_manifest_path"}
APPENDIX_C = {"batch_id", "database", "table", "primary_keys", "primary_key_checksum", "delete_statement", "transaction_id"}


class Staged:
    """A batch on disk with its metadata and key list read back."""

    def __init__(self, root: Path, **fields: Any) -> None:
        self.line = staged(root, "audit-archives", **fields)
        self.batch, self.serialized = self.line["batch"], self.line["serialized"]
        self.base = Path(self.serialized["dir"]) / self.serialized["stem"].rpartition("/")[2]
        self.described = json.loads(Path(f"{self.base}{names.METADATA}").read_bytes())
        self.listed = Path(f"{self.base}{names.KEYS}").read_bytes()


@pytest.fixture()
def made(tmp_path: Path) -> Staged:
    return Staged(tmp_path, rows=120, txn={"xid": "4711", "holder": "h-1c2d", "handle": "t2-9f31"})


@pytest.mark.req("REQ-S3-017", "REQ-VER-013", "REQ-INT-011")
def test_metadata_say_what_appendix_b_shows(made: Staged) -> None:
    found = made.described
    assert APPENDIX_B <= set(found)
    assert {name: found[name] for name in ("database", "host", "table", "schema_name", "batch_number", "archived_at", "record_count",
                                           "date_range", "postgres_version", "archiver_version", "version")} == {
        "database": "prod", "host": "db1.example.com", "table": "audit_logs", "schema_name": "public", "batch_number": 1,
        "archived_at": made.batch["archived_at"], "record_count": 120, "postgres_version": "15.18", "archiver_version": __version__,
        "date_range": {"start": made.batch["first"][0], "end": made.batch["last"][0]}, "version": "2.0"}
    data = made.serialized["data"]
    assert found["batch_id"] == f"sha256:{made.batch['id']}"
    assert found["checksum"] == f"sha256:{data['sha256']}"
    assert found["file_size"] == {"compressed": data["gz_bytes"], "uncompressed": data["bytes"]}
    assert found["compression"] == {"algorithm": "gzip", "level": 6, "library": "isal 1"}
    assert found["schema"]["columns"][0] == {"name": "id", "type": "bigint", "nullable": False}
    assert found["schema"]["primary_key"] == ["id"]
    assert found["deletion_manifest_path"] == f"s3://audit-archives/{made.serialized['stem']}_manifest.json"


@pytest.mark.req("REQ-VER-009")
def test_a_key_list_says_what_appendix_c_shows_except_what_only_the_commit_record_can_know(made: Staged) -> None:
    found = json.loads(made.listed)
    assert APPENDIX_C <= set(found)
    assert not {"deleted_at", "rows_deleted"} & set(found)
    assert found["primary_keys"] == list(range(1, 121)) and found["rows"] == 120
    assert found["transaction_id"] == "4711" and found["txn"] == made.batch["txn"] and found["server"] == made.batch["server"]
    assert found["primary_key_checksum"] == f"sha256:{made.batch['keys_sha256']}"
    assert found["delete_statement"] == 'DELETE FROM ONLY "public"."audit_logs" WHERE "id" = $1'


def test_a_key_list_without_holder_names_no_transaction(tmp_path: Path) -> None:
    found = json.loads(Staged(tmp_path).listed)
    assert (found["txn"], found["transaction_id"]) == (None, None)


def test_a_key_list_is_one_key_a_line_so_that_grep_finds_one(made: Staged) -> None:
    path = f"{made.base}{names.KEYS}"
    assert subprocess.run(["grep", "-c", "^17,\\?$", path], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("key", [("id",), ("created_at", "id"), ("id", "ключ\"q")])
def test_a_key_list_gives_back_its_header_and_its_key_texts(tmp_path: Path, key: tuple[str, ...]) -> None:
    made = Staged(tmp_path, key=key, rows=7)
    header, texts = metadata.parse_key_list(made.listed, "the key list")
    digest = keys.Digest()
    digest.update(texts)
    assert digest.hexdigest() == made.batch["keys_sha256"]
    assert header["key"] == list(key) and "primary_keys" not in header
    whole = json.loads(made.listed)
    assert [json.loads(b"[" + text + b"]") for text in texts] == [each if len(key) > 1 else [each] for each in whole["primary_keys"]]
    assert metadata.key_list(made.batch, texts) == made.listed


def test_names_that_hold_quotes_are_quoted_in_the_statement_people_read(tmp_path: Path) -> None:
    found = json.loads(Staged(tmp_path, schema='a"b', table="T x", key=('k"', "id")).listed)
    assert found["delete_statement"] == 'DELETE FROM ONLY "a""b"."T x" WHERE "k""" = $1 AND "id" = $2'


@pytest.mark.parametrize("damage, said", [
    (lambda text: text[:-3], "is no key list, or cut off"),
    (lambda text: text[:40], "is no key list, or cut off"),
    (lambda text: b"", "is no key list, or cut off"),
    (lambda text: text.replace(b"\n17,\n", b"\n"), "says 120 keys and holds 119"),
    (lambda text: text.replace(b'"rows":120', b'"rows":121'), "says 121 keys and holds 120"),
    (lambda text: text.replace(b'"version":1', b'"version":2'), "has version 2"),
    (lambda text: text.replace(b'"version":1', b'"version":1,"note":1'), "unknown key 'note'"),
    (lambda text: text.replace(b'"version":1', b'"version":1,"version":1'), "stands there twice"),
    (lambda text: b"x" + text, "is not JSON"),
])
def test_a_damaged_key_list_is_refused_with_its_name(made: Staged, damage: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        metadata.parse_key_list(damage(made.listed), "'s3://b/k_manifest.json'")
    assert "'s3://b/k_manifest.json'" in caught.value.msg


@pytest.mark.req("T40")
def test_the_batch_line_is_rebuilt_from_the_metadata_when_staging_is_gone(made: Staged) -> None:
    rebuilt = metadata.rebuild(made.described, made.serialized["stem"], made.serialized["metadata_sha256"], made.serialized["manifest_sha256"])
    expected = {**made.line, "serialized": {name: value for name, value in made.serialized.items() if name != "dir"}}
    assert rebuilt == expected
    assert batches.parse(lines.dump(rebuilt), needs=("serialized",)) == expected


@pytest.mark.parametrize("place, value, said", [
    ("format", "aa-keys", "holds no batch metadata"), ("version", "3.0", "has version '3.0'"), ("surplus", 1, "unknown key 'surplus'"),
    ("table", "other", "'table' and 'batch.table' differ"), ("schema_name", "audit", "'schema_name' and 'batch.schema' differ"),
    ("batch_number", 9, "'batch_number' and 'batch.number' differ"), ("record_count", 119, "'record_count' and 'batch.rows' differ"),
    ("batch_id", "sha256:" + "0" * 64, "'batch_id' and 'batch.id' differ"), ("database", "test", "'database' and 'batch.database' differ"),
])
def test_metadata_of_another_kind_or_that_contradict_themselves_rebuild_nothing(made: Staged, place: str, value: Any, said: str) -> None:
    made.described[place] = value
    with pytest.raises(InputError, match=said) as caught:
        metadata.rebuild(made.described, "p/stem", "0" * 64, "0" * 64)
    assert "'p/stem_metadata.json'" in caught.value.msg


def test_metadata_whose_batch_was_altered_rebuild_nothing(made: Staged) -> None:
    made.described["batch"]["last"][1] += 1
    with pytest.raises(InputError, match="does not belong to its contents"):
        metadata.rebuild(made.described, "p/stem", "0" * 64, "0" * 64)
    for nothing in (None, [], "x", 7):
        with pytest.raises(InputError, match="holds no batch metadata"):
            metadata.rebuild(nothing, "p/stem", "0" * 64, "0" * 64)


@pytest.mark.req("T19")
def test_equal_batches_give_equal_metadata_and_key_lists(tmp_path: Path) -> None:
    one, other = Staged(tmp_path / "a"), Staged(tmp_path / "b")
    assert (one.described, one.listed) == (other.described, other.listed)
    for field in ("metadata_sha256", "manifest_sha256"):
        assert one.serialized[field] == other.serialized[field]
    assert one.serialized["manifest_sha256"] == hashlib.sha256(one.listed).hexdigest()
