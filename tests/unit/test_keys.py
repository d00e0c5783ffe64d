"""The keys of rows, found without parsing a row; the key list and the digest made of them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_archiver.exits import InputError
from audit_archiver.formats import keys
from tests.unit.profile import fixed

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["\u2028", "\u0085", '"', "\\", '\\"', 'a","b', "{", "},\n{", '{"id":1}', "\n", "\r\n", "ä", "😀", ",", "}\n", "null"])
NAME = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=8) | st.sampled_from(
    ["id", "ID", "a.b", 'qu"ote', "back\\slash", "$1", "[x]", "été", "line\nfeed", "tab\t"])
SCALAR = TEXT | st.integers(-(10**20), 10**20) | st.booleans() | st.sampled_from([0.5, -1e300, 12345678.9])
ANY = st.recursive(SCALAR | st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)


def dump(value: Any, escaped: bool = False) -> bytes:
    """JSON as the server writes it: without spaces."""
    return json.dumps(value, ensure_ascii=escaped, separators=(",", ":")).encode()


def row_of(row: dict[str, Any], escaped: bool) -> bytes:
    """A row line; what a json column holds may be escaped, a column's name never is."""
    return b"{" + b",".join(dump(name) + b":" + dump(value, escaped) for name, value in row.items()) + b"}\n"


def text_of(values: list[Any], escaped: bool = False) -> bytes:
    """The key text of key values."""
    return b",".join(dump(value, escaped) for value in values)


def sha256(data: bytes) -> str:
    """The hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


@fixed
@given(key=st.lists(NAME, min_size=1, max_size=3, unique=True), data=st.data(), escaped=st.booleans())
def test_the_key_is_found_in_any_row_byte_for_byte(key: list[str], data: st.DataObject, escaped: bool) -> None:
    row = st.tuples(st.lists(SCALAR, min_size=len(key), max_size=len(key)), st.dictionaries(NAME, ANY, max_size=4))
    made = data.draw(st.lists(row, min_size=1, max_size=8))
    lines = [row_of({**dict(zip(key, values)), **{name: item for name, item in rest.items() if name not in key}}, escaped)
             for values, rest in made]
    found = keys.texts(b"".join(lines), keys.pattern(key))
    assert found == [text_of(values, escaped) for values, _ in made]
    assert [json.loads(b"[" + each + b"]") for each in found] == [[json.loads(line)[name] for name in key] for line in lines]


@fixed
@given(values=st.lists(st.lists(SCALAR, min_size=2, max_size=2), max_size=12), columns=st.sampled_from([1, 2]))
@pytest.mark.req("REQ-VER-009")
def test_a_key_list_gives_back_the_same_texts_and_is_plain_json(values: list[list[Any]], columns: int) -> None:
    texts = [text_of(each[:columns]) for each in values]
    items = keys.to_list(texts, columns)
    assert keys.from_list(items, columns) == texts
    assert json.loads(b"[" + items + b"]") == [each[0] if columns == 1 else each for each in values]
    assert items.count(b"\n") == max(0, len(texts) - 1), "one key a line, so that grep finds it"


@fixed
@given(values=st.lists(SCALAR, max_size=20), edges=st.lists(st.integers(0, 20), max_size=4))
def test_the_digest_is_that_of_one_text_per_line_in_any_portions(values: list[Any], edges: list[int]) -> None:
    texts = [dump(value) for value in values]
    cuts = [0, *sorted(min(edge, len(texts)) for edge in edges), len(texts)]
    digest = keys.Digest()
    for start, end in zip(cuts, cuts[1:]):
        digest.update(texts[start:end])
    assert digest.hexdigest() == sha256(b"".join(text + b"\n" for text in texts))


def test_numbers_beyond_a_double_and_spellings_of_the_server_stay_as_they_are() -> None:
    rows = b'{"id":9007199254740993,"v":1}\n{"id":1e+15,"v":1}\n{"id":-0,"v":1}\n{"id":"1.50","v":1}\n{"id":true}\n{"id":"\\u00e9\\""}\n'
    assert keys.texts(rows, keys.pattern(["id"])) == [b"9007199254740993", b"1e+15", b"-0", b'"1.50"', b"true", b'"\\u00e9\\""']


def test_a_key_that_is_the_whole_row_is_found() -> None:
    assert keys.texts(b'{"a":1,"b":"x"}\n', keys.pattern(["a", "b"])) == [b'1,"x"']


@pytest.mark.req("REQ-VER-009")
def test_the_digest_can_be_made_by_hand_with_gzip_grep_and_sha256sum(tmp_path: Path) -> None:
    rows = b"".join(b'{"id":%d,"v":"{\\"id\\":7}","j":{"id":5}}\n' % number for number in range(9007199254740990, 9007199254741000))
    (tmp_path / "rows").write_bytes(rows)
    digest = keys.Digest()
    digest.update(keys.texts(rows, keys.pattern(["id"])))
    by_hand = subprocess.run(["sh", "-c", "gzip -c rows | zcat | grep -oE '^\\{\"id\":[0-9]+' | cut -d: -f2 | sha256sum"],
                             cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert by_hand.split()[0] == digest.hexdigest()


@pytest.mark.parametrize("line", [
    b'{"x":1,"id":2}\n', b'{"x":{"id":2}}\n', b'{"id":null_,"x":1]\n', b'{"id":[1],"x":1}\n', b'{"id":{"a":1},"x":1}\n',
    b'{ "id":1}\n', b'{"id": 1}\n', b'["end",1,{"id":2}]\n', b"\n", b'{"id":1,"x":2\n', b'{"id":1}x\n', b' {"id":1}\n',
    b"null\n", b'{"id":1} \n', b'{"id":1}\r\n', b'{"id":1[2],"x":3}\n',
    b'{"id":1 ,"x":2}\n', b'{"id":"a\n', b'\x01{"id":1,"x":2}\x01\n', b'{"ID":1}\n', b'{"id2":1}\n'])
def test_a_line_that_does_not_begin_with_the_key_or_end_as_a_row_is_refused(line: bytes) -> None:
    with pytest.raises(InputError, match="1 of 3 lines are no rows that begin with the key columns"):
        keys.texts(b'{"id":1,"x":2}\n' + line + b'{"id":3,"x":2}\n', keys.pattern(["id"]))


def test_a_row_that_holds_another_row_s_text_counts_once() -> None:
    row = dump({"id": 1, "v": '{"id":2}\n{"id":3}'}) + b"\n"
    assert keys.texts(row * 2, keys.pattern(["id"])) == [b"1", b"1"]


def test_a_message_about_a_row_does_not_show_it() -> None:
    with pytest.raises(InputError) as caught:
        keys.texts(b'{"secret":"4711"}\n', keys.pattern(["id"]))
    assert "4711" not in str(caught.value) and "secret" not in str(caught.value)


def test_the_search_stays_linear_on_text_made_to_confuse_it() -> None:
    # backtracking over 2**20 quotes or backslashes would not end within anybody's patience
    odd = b'{"id":"' + b'\\"' * (1 << 20) + b'","v":"' + b'}","' * (1 << 18) + b'"}\n'
    assert len(keys.texts(odd, keys.pattern(["id"]))[0]) == (1 << 21) + 2
    with pytest.raises(InputError):
        keys.texts(b'{"id":"' + b"\\" * (1 << 20) + b"\n", keys.pattern(["id"]))
