"""Ranges and filters in the metadata: they never leave out a value that is there, and rarely name a member without it."""

from __future__ import annotations

import json
import random
import zlib
from typing import Any, Callable, Optional, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_archiver.exits import InputError
from audit_archiver.formats import metadata
from audit_archiver.formats.find import MODULUS, PART, Finder
from audit_archiver.formats.members import MEMBER_ROWS
from tests.contracts.test_pages import examples
from tests.ground.finding import PAGE, block, in_range, may_hold
from tests.unit.profile import fixed
from tests.unit.test_keys import TEXT

VALUE = st.none() | TEXT | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1)


def dump(value: Any) -> bytes:
    """JSON as the server writes it."""
    return json.dumps(value, ensure_ascii=False).encode()


def found_of(values: Sequence[bytes], kind: str = "text", cut: int = 1 << 30) -> dict[str, Any]:
    """What the metadata say of a batch with these values of the column v, as far as a reader needs it."""
    finder = Finder(["id"], ["v"], [["id", "bigint", False], ["v", kind, True]])
    for start in range(0, len(values), cut):
        part = values[start:start + cut]
        finder.add([[b"%d" % (start + n) for n in range(len(part))], part])
    return {**finder.found(), "members": [0] * -(-len(values) // MEMBER_ROWS)}


def range_of(values: Sequence[Any], kind: str = "text") -> Optional[tuple[str, Any, Any]]:
    """(order, min, max) of a column with these values."""
    found = [each for each in found_of([dump(value) for value in values], kind)["ranges"] if each["column"] == "v"]
    return (found[0]["order"], found[0]["min"], found[0]["max"]) if found else None


@fixed
@given(pool=st.lists(VALUE, min_size=1, max_size=30), rows=st.integers(1, 3 * MEMBER_ROWS), seed=st.integers(0, 1 << 30),
       cut=st.integers(1, 700))
def test_whatever_a_member_holds_is_in_its_filter_and_in_the_range(pool: list[Any], rows: int, seed: int, cut: int) -> None:
    values = [dump(value) for value in random.Random(seed).choices(pool, k=rows)]
    found = found_of(values, cut=cut)
    assert found == found_of(values)
    for member in range(len(found["members"])):
        for value in set(values[member * MEMBER_ROWS:(member + 1) * MEMBER_ROWS]):
            assert member in may_hold(found, "v", value)
            assert in_range(found, "v", value)


@fixed
@given(pool=st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-20, 120) | st.none(), min_size=1, max_size=20))
def test_the_range_of_integers_is_that_of_their_numbers(pool: list[Optional[int]]) -> None:
    numbers = [value for value in pool if value is not None]
    assert range_of(pool, "bigint") == (("number", min(numbers), max(numbers)) if numbers else None)


@pytest.mark.parametrize("kind, made", [
    ("integers in a row", lambda n: b"%d" % (1_000_000 + n)), ("integers with gaps", lambda n: b"%d" % (n * 37)),
    ("random integers", lambda n: b"%d" % random.Random(n).getrandbits(40)), ("names in a row", lambda n: b'"user%06d@example.com"' % n),
    ("addresses", lambda n: b'"10.%d.%d.%d"' % (n >> 16, n >> 8 & 255, n & 255)), ("numbered uuids", lambda n: b'"%032x"' % n),
    ("times", lambda n: b'"2024-01-%02dT%02d:%02d:%02d+00:00"' % (1 + n // 86400, n // 3600 % 24, n // 60 % 60, n % 60)),
], ids=lambda each: each if isinstance(each, str) else "")
def test_a_member_without_the_value_is_named_once_in_hundreds(kind: str, made: Callable[[int], bytes]) -> None:
    """20 members of 500 different values each: 500 / 262139 is once in 524, whether the values are like each other or not."""
    rows = 20 * MEMBER_ROWS
    found = found_of([made(n) for n in range(rows)])
    elsewhere = sum(len(may_hold(found, "v", made(rows + n * 7))) for n in range(2000)) / (2000 * 20)
    beside = sum(len(may_hold(found, "v", made(n))) - 1 for n in range(0, rows, 5)) / (2000 * 19)
    assert 0.5 < elsewhere * MODULUS / MEMBER_ROWS < 1.5 and 0.5 < beside * MODULUS / MEMBER_ROWS < 1.5, kind


def test_a_filter_takes_about_two_bytes_a_value_and_a_few_for_few_values() -> None:
    different = [b"%d" % random.Random(n).getrandbits(40) for n in range(10_000)]
    few = [b"%d" % random.Random(n).randrange(50) for n in range(10_000)]
    assert len("".join(found_of(different)["filters"])) < 2.2 * 10_000
    assert len("".join(found_of(few)["filters"])) < 2_000


@pytest.mark.parametrize("values, expected", [
    ([9, 10], ("number", 9, 10)), ([-5, -40, 3], ("number", -40, 3)), ([7], ("number", 7, 7)), ([None], None), ([None, 3, None], ("number", 3, 3)),
    (["b", "B", "a"], ("json", "B", "b")), (["é", "z"], ("json", "z", "é")), ([None, "null", ""], ("json", "", "null")),
    (["a\n\"\\", "a"], ("json", "a", 'a\n"\\')), (["x" * 98], ("json", "x" * 98, "x" * 98)), (["x" * 99, "y"], None),
    ([True, False], ("json", False, True)), (["a", "x" * 200, "y"], ("json", "a", "y")),
], ids=str)
def test_a_range_is_of_numbers_or_of_the_bytes_of_json(values: list[Any], expected: Any) -> None:
    kind = "integer" if expected and expected[0] == "number" else "text"
    assert range_of(values, kind) == expected


@pytest.mark.parametrize("text", [b"1e20", b"-0", b'"\\u00e9"', b'"\\ud800"', b'"\xff"'])
def test_a_bound_that_a_reader_might_write_otherwise_is_left_out(text: bytes) -> None:
    assert [each["column"] for each in found_of([text])["ranges"]] == ["id"]


def test_the_columns_of_a_composite_key_have_ranges_each() -> None:
    finder = Finder(["region", "no"], ["no"], [["region", "text"], ["no", "smallint"], ["at", "date"]])
    assert finder.columns == ["region", "no"]
    finder.add([[b'"eu"', b'"us"'], [b"10", b"9"]])
    found = finder.found()
    assert found["ranges"] == [{"column": "region", "order": "json", "min": "eu", "max": "us"},
                               {"column": "no", "order": "number", "min": 9, "max": 10}]
    assert may_hold({**found, "members": [0]}, "no", b"9") == [0]


@pytest.mark.parametrize("kind", ["numeric", "numeric(8,2)", "double precision", "public.citext", "character(3)"])
def test_a_key_whose_equal_values_may_be_written_differently_has_no_range(kind: str) -> None:
    """1.0 is 1: who looks for 1 must not be told that the batch ends at "1.0"."""
    finder = Finder(["v", "id"], [], [["v", kind], ["id", "bigint"]])
    finder.add([[b'"1.0"', b'"2"'], [b"3", b"3"]])
    assert finder.found() == {"ranges": [{"column": "id", "order": "number", "min": 3, "max": 3}]}


def test_without_columns_to_find_by_there_are_ranges_of_the_key_alone() -> None:
    finder = Finder(["id"], [], [["id", "bigint"]])
    finder.add([[b"8", b"11"]])
    assert finder.found() == {"ranges": [{"column": "id", "order": "number", "min": 8, "max": 11}]}


def test_a_value_that_is_no_integer_where_the_table_has_one_is_refused() -> None:
    with pytest.raises(InputError, match="a value of column 'v' is no integer"):
        found_of([b"1", b'"secret"'], "bigint")


def test_any_part_of_a_filter_can_be_fetched_by_its_range() -> None:
    finder = Finder(["id"], ["a", "id"], [["id", "bigint"], ["a", "text"]])
    finder.add([[b"%d" % n for n in range(1200)], [b'"x%d"' % (n % 90) for n in range(1200)]])
    value = {"format": "aa-metadata", **finder.found()}
    written = metadata.dump(value)
    assert json.loads(written) == value
    header = written.index(b"\n") + 1
    starts = [0, *value["find"]["ends"]]
    for part, (start, end) in enumerate(zip(starts, starts[1:])):
        line = written[header + start:header + end]
        assert line.endswith(b"\n") and line.rstrip(b",\n") == b'"%s"' % value["filters"][part].encode()
    assert written[header + starts[-1]:] == b"]}\n" and len(starts) == 33


# -- the page

def test_the_vectors_of_the_page_are_what_its_program_and_this_package_compute() -> None:
    for line in block("VECTORS").splitlines()[1:]:
        value, crc, n, part = line.split()
        assert (int(crc, 16), int(n), int(part)) == (zlib.crc32(value.encode()), zlib.crc32(value.encode()) % MODULUS, int(n) // PART)
        found = found_of([b"0"] * (2 * MEMBER_ROWS) + [value.encode()])
        assert may_hold(found, "v", value.encode()) == [2]
        assert may_hold({**found, "filters": ["" if place == int(part) else text for place, text in enumerate(found["filters"])]},
                        "v", value.encode()) == []


def test_the_example_of_the_page_answers_as_the_page_says() -> None:
    (wrapped,) = [lines for kind, lines in examples(PAGE) if kind == "metadata"]
    made = json.loads("".join(line.strip() for line in wrapped))
    assert [may_hold(made, "user_id", value) for value in (b"42", b"7", b"null", b'"alice"')] == [[0, 2], [1], [1], []]
    assert "\n".join(wrapped[-17:]) == metadata.dump(made).decode().split("\n", 1)[1].rstrip("\n")
    assert [in_range(made, "user_id", value) for value in (b"6", b"7", b"42", b"43", b"null")] == [False, True, True, False, True]
