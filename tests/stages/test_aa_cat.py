"""aa-cat: the rows that the server would have chosen, byte for byte as archived, out of as few bytes as the metadata allow."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import AUDIT_LOGS
from tests.ground import tables
from tests.ground.faulty_s3 import FaultyS3, flip_bit, on, returns
from tests.ground.restored import Restored
from tests.ground.run import Result, run_stage
from tests.stages.test_find_columns import ODD, SCALARS, odd_table

QUOTED = '"' + ODD.replace('"', '""') + '"'
QUESTIONS = [  # --where, and what the server is asked
    ("user_id=1042", "user_id = 1042"), ("user_id = 01042", "user_id = 1042"), ("user_id is null", "user_id IS NULL"),
    ("user_id is not null", "user_id IS NOT NULL"), ("user_id>=1300", "user_id >= 1300"), ("id<7", "id < 7"), ("id=1099", "id = 1099"),
    (f"{ODD}=plain", f'{QUOTED} = \'plain\''), (f"{ODD}=", f'{QUOTED} = \'\''), (f"{ODD}=a\"b", f'{QUOTED} = \'a"b\''),
    (f"{ODD}=back\\slash", f'{QUOTED} = \'back\\slash\''), (f"{ODD}=null", f'{QUOTED} = \'null\''), (f"{ODD}=é 😀", f'{QUOTED} = \'é 😀\''),
    (f"{ODD}=tab\tnl\ncr\r\x01\x7f", f"{QUOTED} = E'tab\\tnl\\ncr\\r\\x01\\x7f'"), ("code=c7", "code = 'c7'"), ("amount=1", "amount = 1"),
    ("amount=1.00", "amount = 1"), ("amount<0.055", "amount < 0.055"), ("amount>10.9", "amount > 10.9"),
    ("at=2024-01-01T00:00:03.5", "at = '2024-01-01 00:00:03.5'"), ("at<=2024-01-01 00:00:03", "at <= '2024-01-01 00:00:03'"),
    ("day=0044-03-16 BC", "day = '0044-03-16 BC'"), ("day>0044-06-01 BC", "day > '0044-06-01 BC'"), ("mood=mad\"", "mood = 'mad\"'"),
    ("ok=true", "ok"), ("ok=FALSE", "NOT ok"), ("ip=10.0.3.7", "ip = '10.0.3.7'"),
    ("ref=" + "AB" * 16, "ref = '" + "ab" * 16 + "'"), ("small=4", "small = 4"),
    ("created_at=2024-01-01T00:01:00Z", "created_at = '2024-01-01T00:01:00Z'"),
    ("created_at>2024-01-01T02:18:00+02:00", "created_at > '2024-01-01T00:18:00Z'"),
]


class Archived(Restored):
    """A table that is archived, and what aa-cat prints of it."""

    def cat(self, *argv: Any, code: int = 0) -> Result:
        """aa-cat in process, which ends with `code`."""
        result = run_stage("aa-cat", ["-c", self.path, *argv])
        assert result.rc == code, result.err
        return result

    def ids(self, *argv: Any) -> list[int]:
        """The ids of the rows that it prints."""
        return [row["id"] for row in self.cat(*argv).lines]


def figures(result: Result) -> dict[str, Any]:
    """What it says at the end that it has read."""
    said, = [line for line in map(json.loads, result.err.splitlines()) if line["event"] == "search.read"]
    return dict(said)


@pytest.fixture()
def odd(db: Any, bucket: Any, config_file: Any) -> Archived:
    """A table of all types that rows are found by, half of them in filters, 1,100 rows in batches of 600."""
    odd_table(db, 1100)
    return Archived(db, bucket, config_file(db, bucket, [{"name": "odd", "timestamp_column": "created_at", "primary_key": "id", "batch_size": 600,
                                                          "find_columns": list(SCALARS)[:8]}]))


@pytest.fixture()
def logs(db: Any, bucket: Any, config_file: Any) -> Archived:
    """5,000 rows in one batch of ten members, found by user_id."""
    tables.create(db.connection, rows=5000, first="2024-01-01", last="2024-03-01")
    made = Archived(db, bucket, config_file(db, bucket, [{**AUDIT_LOGS, "batch_size": 5000, "find_columns": ["user_id"]}]))
    made.expected = db.execute("SELECT id, user_id FROM audit_logs ORDER BY created_at, id")  # type: ignore[attr-defined]
    made.archive()
    return made


def test_every_condition_chooses_the_rows_that_the_server_would(odd: Archived) -> None:
    wanted = [[row[0] for row in odd.db.execute("SELECT id FROM odd WHERE " + sql.replace("%", "%%") + " ORDER BY created_at, id")]
              for _, sql in QUESTIONS]
    both = [row[0] for row in odd.db.execute("SELECT id FROM odd WHERE ok AND small = 4 ORDER BY created_at, id")]
    odd.archive()

    found = [odd.ids("--where", where) for where, _ in QUESTIONS]

    assert [(where, ids) for (where, _), ids in zip(QUESTIONS, found)] == [(where, ids) for (where, _), ids in zip(QUESTIONS, wanted)]
    assert odd.ids("--where", "ok=true", "--where", "small=4") == both and both
    assert sum(map(bool, wanted)) > 25, "nearly every question has an answer"


def test_rows_are_printed_byte_for_byte_and_a_date_range_is_exact(logs: Archived) -> None:
    entry, = logs.listed()
    packed = gzip.decompress(logs.hand.store.get_bytes(entry["s3_key"]))
    assert logs.cat().out == packed
    dates = ("--start-date", "2024-01-31T12:00:00Z", "--end-date", "2024-02-01")
    some = logs.cat(*dates).out.splitlines(keepends=True)
    inside = [line for line in packed.splitlines(keepends=True) if "2024-01-31T12" <= json.loads(line)["created_at"] < "2024-02-02"]
    assert some == inside and 100 < len(some) < 200


def test_one_users_rows_are_fetched_out_of_their_members_alone(logs: Archived, config_file: Any) -> None:
    user, = [row[0] for row in logs.db.execute("SELECT %s::bigint", (logs.expected[700][1],))]  # type: ignore[attr-defined]
    ids = [row for row, of in logs.expected if of == user]  # type: ignore[attr-defined]
    with FaultyS3(logs.bucket.endpoint) as watched:
        path = config_file(logs.db, logs.bucket, [AUDIT_LOGS], s3={"endpoint": watched.endpoint})
        result = run_stage("aa-cat", ["-c", path, "--where", f"user_id={user}"])
        asked = watched.seen(on("GET", ".jsonl.gz"))
    assert [row["id"] for row in result.lines] == ids
    said = figures(result)
    assert all("range" in request.headers for request in asked) and asked
    assert said["members"] < said["of_members"] == 10 and said["bytes"] < said["of_bytes"]
    assert said["members"] - said["in_vain"] == len({[row for row, _ in logs.expected].index(each) // 500 for each in ids})  # type: ignore[attr-defined]
    nobody = figures(logs.cat("--where", "user_id=-5"))
    assert (nobody["batches"], nobody["members"], nobody["rows"]) == (0, 0, 0) and nobody["bytes"] <= 8192, "the range says that he is not there"


def test_a_copy_in_a_directory_is_read_without_configuration(logs: Archived, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for entry in logs.hand.store.list(""):
        path = whole / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(logs.hand.store.get_bytes(entry.key))
    expected = logs.cat("--where", "user_id=3").out
    below = whole / logs.hand.store.prefix.rstrip("/")
    for place in (whole, below):
        result = run_stage("aa-cat", ["--local", place, "--table", "audit_logs", "--where", "user_id=3"], env={"AA_CONFIG": str(tmp_path / "none")})
        assert (result.rc, result.out) == (0, expected), result.err
    (tmp_path / "empty").mkdir()
    refused = run_stage("aa-cat", ["--local", tmp_path / "empty"])
    assert refused.rc == 3 and "nothing is archived in" in refused.err


def test_csv_tells_null_from_an_empty_text(odd: Archived) -> None:
    odd.archive()
    result = odd.cat("--where", "id<21", "--columns", f"id,{ODD},amount,details,user_id", "--output", "csv").out.decode()
    rows = list(csv.reader(io.StringIO(result, newline="")))
    assert rows[0] == ["id", ODD, "amount", "details", "user_id"] and len(rows) == 21
    assert rows[1][:3] == ["1", "", "0.01"] and '\n1,"",0.01,' in result, "an empty text"
    assert rows[9][:3] == ["9", "", "0.09"] and "\n9,,0.09," in result, "NULL"
    assert rows[4][1] == "tab\tnl\ncr\r\x01\x7f" and json.loads(rows[4][3])["user_id"] == 42
    one, = odd.cat("--where", "id=4", "--columns", "amount,gone").out.splitlines()
    assert one == b'{"amount":"0.04","gone":null}'


def test_what_is_not_archived_is_not_printed(logs: Archived) -> None:
    entry, = logs.listed()
    stem = entry["s3_key"][:-len(".jsonl.gz")]
    commit = logs.hand.store.get_bytes(stem + "_commit.json")
    logs.hand.store.delete(stem + "_commit.json")
    lost = logs.cat(code=2)
    assert lost.out == b"" and "lost their commit record" in lost.err
    logs.hand.store.put_new(stem + "_commit.json", commit)
    logs.hand.store.put_new(stem + "_rolled_back.json", b"{}\n")
    assert logs.cat().out == b""


def test_damage_is_named_whether_whole_or_by_members(logs: Archived, config_file: Any) -> None:
    with FaultyS3(logs.bucket.endpoint) as store:
        path = config_file(logs.db, logs.bucket, [AUDIT_LOGS], s3={"endpoint": store.endpoint})
        for where in ((), ("--where", f"user_id={logs.expected[700][1]}")):  # type: ignore[attr-defined]
            store.fault = returns(on("GET", ".jsonl.gz"), flip_bit)
            result = run_stage("aa-cat", ["-c", path, *where])
            assert result.rc == 2 and "is damaged" in result.err, (where, result.err)


@pytest.mark.parametrize(("argv", "says"), [
    (("--where", "user_id"), "is no condition"), (("--where", "user_id=x"), "'x' is no integer"),
    (("--where", "action<b"), "whose order only the server"), (("--where", "usr=1"), "no batch has a column 'usr'"),
    (("--where", "created_at=soon"), "is no timestamp"), (("--table", "audit_log"), "did you mean"),
    (("--where", "user_id=1", "--s3-key", "x", "--run", "y"), "names one batch already")])
def test_a_question_without_an_answer_is_refused(logs: Archived, argv: tuple[str, ...], says: str) -> None:
    result = logs.cat(*argv, code=3)
    assert result.out == b"" and says in result.err


def test_rows_of_two_tables_are_not_mixed(db: Any, bucket: Any, config_file: Any) -> None:
    tables.create(db.connection, rows=10, first="2024-01-01", last="2024-03-01")
    tables.create(db.connection, "others", rows=10, first="2024-01-01", last="2024-03-01")
    scene = Archived(db, bucket, config_file(db, bucket, [AUDIT_LOGS, {**AUDIT_LOGS, "name": "others"}]))
    scene.archive()
    assert "rows of several tables are meant" in scene.cat(code=3).err
    assert len(scene.ids("--table", "others")) == 10


def test_aa_ls_names_the_batches_that_may_hold_such_rows(db: Any, bucket: Any, config_file: Any) -> None:
    tables.create(db.connection, rows=300, first="2024-01-01", last="2024-03-01")
    db.execute("UPDATE audit_logs SET user_id = id")
    scene = Archived(db, bucket, config_file(db, bucket, [{**AUDIT_LOGS, "find_columns": ["user_id"]}]))
    scene.archive()
    holding, = scene.listed("--where", "user_id=150")
    assert [row["user_id"] for row in scene.cat("--s3-key", holding["s3_key"], "--where", "user_id=150").lines] == [150]
    assert len(scene.listed("--where", "user_id>=150")) == 2 and scene.listed("--where", "user_id=301") == []
