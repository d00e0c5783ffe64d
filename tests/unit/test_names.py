"""Names of objects, directories, runs and batches."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_archiver.formats import names
from tests.unit.profile import fixed

AT = "2025-12-30T02:15:47Z"
NAMES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=20)


def batch(**fields: Any) -> dict[str, Any]:
    """The part of a batch section that names are made of."""
    return {"database": "prod", "schema": "public", "table": "audit_logs", "archived_at": AT, "number": 3, **fields}


def stem(schema: str = "public", table: str = "audit_logs", at: str = AT, number: int = 3) -> str:
    """The stem of a batch in the examples' bucket."""
    return names.stem("archives/", "prod", schema, table, at, number)


@pytest.mark.req("REQ-S3-007", "REQ-S3-008", "REQ-S3-009", "REQ-S3-010", "REQ-S3-011")
def test_an_object_key_says_prefix_database_table_day_of_archiving_time_and_number() -> None:
    assert stem() + names.DATA == ("archives/prod/audit_logs/year=2025/month=12/day=30/"
                                   "audit_logs_20251230T021547Z_batch_003.jsonl.gz")


@pytest.mark.req("REQ-S3-018")
def test_the_files_beside_a_batch_bear_its_name_so_that_no_batch_overwrites_another_ones() -> None:
    beside = [stem() + suffix for suffix in (*names.SUFFIXES, names.intent(1), names.intent(2))]
    assert len(set(beside)) == len(beside)
    assert not set(beside) & {stem(number=4) + suffix for suffix in names.SUFFIXES}


@pytest.mark.req("T8")
def test_tables_that_look_alike_have_directories_of_their_own() -> None:
    tables = [("public", "t"), ("audit", "t"), ("public", "T"), ("public", "_t"), ("public", "audit.t"), ("public", "t "),
              ("public", "t/x"), ("t", "x"), ("public", "t_"), ("public", "tt"), ("public", ".index"), ("public", "%74"),
              ("public", "t%2Ex"), ("public", ".."), ("a.b", "c"), ("a", "b.c"), ("public", "т"), ("public", "t\n")]
    made = [names.table_dir("archives/", "prod", *table) for table in tables]
    assert len(set(made)) == len(made)
    for one, other in itertools.permutations(made, 2):
        assert not one.startswith(other), "a listing of one table's directory must not show another table's objects"
    assert names.table_dir("archives/", "prod", "public", ".runs") != names.run_start_key("archives/", "prod", "r").rpartition("/")[0] + "/"


@fixed
@given(one=st.tuples(NAMES, NAMES, NAMES), other=st.tuples(NAMES, NAMES, NAMES))
@pytest.mark.req("T8")
def test_two_tables_share_a_directory_only_if_they_are_the_same_table(one: Any, other: Any) -> None:
    made = [names.table_dir("p/", *each) for each in (one, other)]
    assert (made[0] == made[1]) == (one == other)
    assert made[0] == made[1] or not made[0].startswith(made[1])


@fixed
@given(name=NAMES)
def test_percent_leaves_only_plain_characters_and_loses_nothing(name: str) -> None:
    plain = names.percent(name)
    assert re.fullmatch(r"(?:[A-Za-z0-9_-]|%[0-9A-F]{2})+", plain)
    back = re.sub("%([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), plain).encode("latin-1").decode()
    assert back == name


@pytest.mark.parametrize("name, plain", [("audit_logs", "audit_logs"), ("a.b", "a%2Eb"), ("..", "%2E%2E"), ("a b", "a%20b"),
                                         ("ä", "%C3%A4"), ("100%", "100%25"), ("x/y", "x%2Fy"), ("Log-1", "Log-1")])
def test_percent_by_example(name: str, plain: str) -> None:
    assert names.percent(name) == plain


@pytest.mark.req("T27", "REQ-S3-010")
@pytest.mark.parametrize("given_prefix, key", [
    ("", "prod/"), ("/", "prod/"), ("//", "prod/"), ("archives", "archives/prod/"), ("/archives/", "archives/prod/"),
    ("a//b/", "a/b/prod/"), ("///a///b///", "a/b/prod/")])
def test_a_prefix_never_makes_an_empty_part_in_a_key(given_prefix: str, key: str) -> None:
    assert names.database_dir(names.normal_prefix(given_prefix), "prod") == key


@fixed
@given(prefix=st.text(st.sampled_from("ab/"), max_size=12))
@pytest.mark.req("T27")
def test_a_normal_prefix_stays_as_it_is(prefix: str) -> None:
    normal = names.normal_prefix(prefix)
    assert names.normal_prefix(normal) == normal
    assert "//" not in normal and not normal.startswith("/") and (normal.endswith("/") or not normal)


@pytest.mark.req("T9")
def test_numbers_grow_past_three_digits_without_taking_a_name_twice() -> None:
    made = [stem(number=number) for number in range(990, 1011)]
    assert len(set(made)) == len(made)
    assert made[9].endswith("_batch_999") and made[10].endswith("_batch_1000")
    assert sorted(made) != made, "name order is not time order: nobody may sort keys to find the newest"


@pytest.mark.req("T10")
def test_two_runs_in_one_second_differ_in_their_run_id_and_by_what_they_hold_in_their_batch_ids() -> None:
    assert names.run_id(AT, 4711) == "20251230T021547Z-4711" != names.run_id(AT, 4712)
    ids = {names.batch_id("prod", "public", "t", [AT, 1], [AT, 9], digest * 64) for digest in "ab"}
    assert len(ids) == 2


@pytest.mark.req("T1", "T10", "REQ-IDEM-001")
def test_a_batch_id_depends_on_every_part_and_on_nothing_else() -> None:
    parts: tuple[Any, ...] = ("prod", "public", "t", ["2024-01-01T00:00:03.5+00:00", 1], ["2024-01-02T00:00:00+00:00", 2], "b9" * 32)
    others: tuple[Any, ...] = ("prod2", "audit", "T", ["2024-01-01T00:00:03.5+00:00", "1"], ["2024-01-02T00:00:00+00:00", 3], "b8" * 32)
    whole = names.batch_id(*parts)
    assert whole == names.batch_id(*parts)
    assert len({names.batch_id(*parts[:place], others[place], *parts[place + 1:]) for place in range(6)} | {whole}) == 7
    assert names.batch_id("a", "bc", "t", *parts[3:]) != names.batch_id("ab", "c", "t", *parts[3:])


@pytest.mark.req("REQ-IDEM-002")
def test_a_batch_id_can_be_made_by_hand() -> None:
    text = 'prod\0public\0Ереignis\0["2024-01-01T00:00:03.5+00:00","ä"]\0["2024-01-02T00:00:00+00:00",9007199254740993]\0' + "b9" * 32
    assert hashlib.sha256(text.encode()).hexdigest() == names.batch_id(
        "prod", "public", "Ереignis", ["2024-01-01T00:00:03.5+00:00", "ä"], ["2024-01-02T00:00:00+00:00", 9007199254740993], "b9" * 32)


def test_the_keys_of_runs_and_index_stand_beside_the_batches() -> None:
    assert names.run_start_key("a/", "prod", "R-1") == "a/prod/.runs/R-1-start.json"
    assert names.run_end_key("a/", "prod", "R-1") == "a/prod/.runs/R-1-end.json"
    assert names.index_key("a/", "prod", "audit", "t", "R-1", 7) == "a/prod/audit.t/.index/R-1_007.json"
    assert names.index_key("a/", "prod", "public", "t", "R", 1).startswith(names.index_dir("a/", "prod", "public", "t"))


@pytest.mark.req("T8")
def test_a_staging_directory_is_one_batch_and_stays_under_its_root() -> None:
    assert names.staging_dir("/s", batch()) == "/s/prod/public.audit_logs/20251230T021547Z_batch_003"
    odd = names.staging_dir("/s", batch(database="../etc", schema="..", table="/"))
    assert os.path.normpath(odd) == odd and odd.startswith("/s/")
    assert len({names.staging_dir("/s", batch(**fields)) for fields in (
        {}, {"database": "p"}, {"schema": "audit"}, {"table": "T"}, {"number": 4}, {"archived_at": "2025-12-30T02:15:48Z"})}) == 6


# -- names that are too long

LONG = [("ß" * 31, "日" * 21), ("日" * 21, "ß" * 31), ("%" * 63, "%" * 63), ("%" * 63, "%" * 62 + "a"), ("." * 63, "x" * 63), ("x" * 63, "." * 63)]


def parts(schema: str, table: str, number: int = 999_999_999) -> list[str]:
    """Every part of every path and key of a table, as long as it can become."""
    key = names.stem("", "prod", schema, table, AT, number)
    directory = names.staging_dir("/s", batch(schema=schema, table=table, number=number))
    files = [os.path.basename(key) + suffix + ending for suffix in (*names.SUFFIXES, names.intent(9999)) for ending in ("", ".tmp")
             if ending == "" or suffix in (names.DATA, names.METADATA, names.KEYS)]
    return [*key.split("/"), *directory.split("/"), *files]


@pytest.mark.req("T8")
@pytest.mark.parametrize("number", [1, 1000, 999_999_999])
@pytest.mark.parametrize("table", LONG, ids=range(len(LONG)))
def test_no_part_of_a_path_or_key_is_longer_than_a_file_system_takes(table: tuple[str, str], number: int) -> None:
    made = parts(*table, number)
    assert max(map(len, made)) <= 255
    assert all(re.fullmatch(r"[A-Za-z0-9_.=-]*(?:%[0-9A-F]{2}[A-Za-z0-9_.=-]*)*", each) for each in made), "nothing is cut within a %XX"


@pytest.mark.req("T8")
def test_long_names_are_told_apart_by_the_digest_of_the_whole_and_from_every_name_written_in_full() -> None:
    for make in (lambda *table: names.table_dir("p/", "prod", *table),
                 lambda *table: names.staging_table_dir("/s", "prod", *table)):
        assert len({make(*table) for table in LONG}) == len(LONG)
    whole = "%C3%9F" * 31 + "." + "%E6%97%A5" * 21
    cut = names.table_name(*LONG[0])
    assert cut == "%C3%9F" * 23 + ".sha256." + hashlib.sha256(whole.encode()).hexdigest()
    assert names.is_shortened(cut)
    for alike in (("public", cut), tuple(cut.split(".", 1)), tuple(cut.rsplit(".", 1)), ("sha256", cut.rpartition(".")[2])):
        assert names.table_name(*alike) != cut
    assert not any(map(names.is_shortened, (names.table_name("sha256", "a" * 64), names.table_name("public", ".sha256."))))


@pytest.mark.parametrize("schema, table", [("public", "%" * 63), ("audit", "%" * 63), ("%" * 48, "x" * 63 + "y" * 2), ("s" * 63, "t" * 63)])
def test_a_name_that_fits_is_written_in_full(schema: str, table: str) -> None:
    whole = names.percent(table) if schema == "public" else f"{names.percent(schema)}.{names.percent(table)}"
    assert len(whole) <= 210
    assert names.stem("", "prod", schema, table, AT, 1) == f"prod/{whole}/year=2025/month=12/day=30/{whole}_20251230T021547Z_batch_001"
    assert f"/{names.percent(schema)}.{names.percent(table)}/" in names.staging_dir("/s", batch(schema=schema, table=table))


def test_a_name_that_fits_up_to_batch_999_keeps_its_directory_after_it() -> None:
    schema, table = "%" * 49, "x" * 62
    directory = names.table_dir("", "prod", schema, table)
    assert len(directory) == len("prod/") + 210 + len("/")
    for number in (999, 1000):
        made = names.stem("", "prod", schema, table, AT, number)
        assert made.startswith(directory) and names.is_shortened(made) == (number == 1000)
        assert len(os.path.basename(made) + "_manifest.json.tmp") <= 255


def test_the_longest_key_of_all_stays_within_what_the_configuration_leaves_room_for() -> None:
    directory = names.database_dir("p/", "prod")
    for table in LONG:
        keys = [names.stem("p/", "prod", *table, AT, 999_999_999) + suffix for suffix in (*names.SUFFIXES, names.intent(9999))]
        keys.append(names.index_key("p/", "prod", *table, names.run_id(AT, 4194304), 999_999))
        assert max(map(len, keys)) - len(directory) <= names.BELOW_DATABASE_BYTES
