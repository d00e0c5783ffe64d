"""The table of docs/restore.md: what comes of each change of the table since it was archived, under each strategy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

from tests.ground.restored import Restored

PAGE = Path(__file__).resolve().parents[2] / "docs" / "restore.md"
STRATEGIES = ("strict", "lenient", "transform")
LOGS = [{"name": "logs", "timestamp_column": "at", "primary_key": "id"}]
ROWS = 20
AS_IT_WAS = "id, at, word, gap, number, same"
CREATE = "CREATE TABLE logs (id int PRIMARY KEY, at timestamptz NOT NULL, word text, gap text, number int, same text)"
FILL = f"""
INSERT INTO logs SELECT i, '2024-01-01 12:00Z'::timestamptz + i * interval '1 hour', 'word ' || i, CASE WHEN i % 3 > 0 THEN 'gap' END, i * 100, 'x'
FROM generate_series(1, {ROWS}) i"""


class Change(NamedTuple):
    """SQL that changes a table so that every archived row goes in (`fits`; None: there is no table), or so that not each does (`breaks`).

    `expressions` are those of `transform`, for the table that breaks, if there is one. `lenient`, `transform`: columns of the table, and
    what they must be in terms of the archived ones.
    """

    fits: Optional[str]
    breaks: Optional[str] = None
    expressions: dict[str, str] = {"gap": "a.gap"}
    lenient: tuple[str, str] = (AS_IT_WAS, AS_IT_WAS)
    transform: tuple[str, str] = (AS_IT_WAS, AS_IT_WAS)


LEFT = "id, at, gap, number, same"
CHANGES = {
    "got a column that may be NULL or has a default": Change(
        "ADD extra text, ADD other text DEFAULT 'new'", None, {"extra": "a.word"},
        (f"{AS_IT_WAS}, extra, other", f"{AS_IT_WAS}, NULL::text, 'new'"), (f"{AS_IT_WAS}, extra, other", f"{AS_IT_WAS}, word, 'new'")),
    "got a NOT NULL column without default": Change(
        "ADD extra text NOT NULL", None, {"extra": "a.word"}, transform=(f"{AS_IT_WAS}, extra", f"{AS_IT_WAS}, word")),
    "lost a column": Change("DROP word", lenient=(LEFT, LEFT), transform=(LEFT, LEFT)),
    "renamed a column": Change(
        "RENAME word TO said", None, {"said": "a.word"}, (f"{LEFT}, said", f"{LEFT}, NULL::text"), (f"{LEFT}, said", f"{LEFT}, word")),
    "widened a type": Change("ALTER number TYPE bigint"),
    "narrowed a type": Change(
        "ALTER number TYPE smallint", "ALTER word TYPE varchar(5)", {"word": "left(a.word, 5)"},
        transform=(f"{LEFT}, word", f"{LEFT}, left(word, 5)")),
    "changed a type": Change(
        "ALTER number TYPE text", "ALTER at TYPE date", {"at": "a.at::date"}, (AS_IT_WAS, AS_IT_WAS.replace("number", "number::text")),
        (AS_IT_WAS, AS_IT_WAS.replace("at,", "at::date,"))),
    "has its columns in another order": Change("DROP word, ADD word text"),
    "made a column NOT NULL": Change(
        "ALTER word SET NOT NULL", "ALTER gap SET NOT NULL", {"gap": "coalesce(a.gap, '')"},
        transform=(AS_IT_WAS, AS_IT_WAS.replace("gap", "coalesce(gap, '')"))),
    "got another unique constraint": Change(
        "ADD UNIQUE (number)", "ADD UNIQUE (same)", {"same": "a.id::text"}, transform=(AS_IT_WAS, AS_IT_WAS.replace("same", "id::text"))),
    "lost a column of the key": Change("DROP id"),
    "is gone": Change(None),
}


def outcomes() -> dict[str, dict[str, str]]:
    """What the page says: change -> strategy -> outcome."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    first = next(number for number, row in enumerate(rows) if row[0] == "since it was archived, the table")
    assert [re.findall("`([a-z]+)`", cell)[0] for cell in rows[first][1:]] == list(STRATEGIES)
    found = {}
    for row in rows[first + 2:first + 2 + len(CHANGES)]:
        found[row[0]] = dict(zip(STRATEGIES, row[1:]))
    return found


def test_the_page_names_the_changes_that_are_tried() -> None:
    assert list(outcomes()) == list(CHANGES)


@pytest.mark.req("REQ-RST-004", "REQ-RESTORE-001", "REQ-RESTORE-002", "REQ-RESTORE-003", "REQ-RESTORE-004", "T50")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_change_of_a_table_comes_to_what_the_page_says(strategy: str, db: Any, bucket: Any, config_file: Any, tmp_path: Path) -> None:
    db.execute(CREATE)
    db.execute(FILL)
    db.execute("CREATE TABLE original AS SELECT * FROM logs")
    scene = Restored(db, bucket, config_file(db, bucket, LOGS))
    scene.archive()
    number = 0

    def restored(change: Change, sql: Optional[str], *more: str) -> tuple[int, int, str]:
        """(exit code, rows that are in, name) of a restore into a new table with that change."""
        nonlocal number
        number += 1
        table = f"changed_{number}"
        if sql is not None:
            db.execute(f"CREATE TABLE {table} (LIKE logs INCLUDING ALL)")
            for part in sql.split(", ") if sql.startswith("DROP") else [sql]:
                db.execute(f"ALTER TABLE {table} {part}")
        argv = ["--restore-all", "--table", "logs", "--into", table, "--schema-strategy", strategy, *more]
        if strategy == "transform":
            file = tmp_path / f"{table}.json"
            file.write_text(json.dumps({"transform": change.expressions}))
            argv += ["--functions", str(file)]
        code = scene.run(*argv).rc
        there = db.scalar("SELECT to_regclass(%s)::text", (table,))
        return code, db.scalar(f"SELECT count(*) FROM {table}") if there else 0, table

    for name, row in outcomes().items():
        said, change = row[strategy], CHANGES[name]
        what = f"{name}, {strategy}: {said}"
        if said.startswith("refused"):
            assert restored(change, change.fits)[:2] == (3, 0), what
            if "without `--create-table`" not in said:
                continue
        else:
            assert said.startswith("restored"), what
        good = change.breaks if strategy == "transform" and change.breaks else change.fits
        code, count, table = restored(change, good, *(["--create-table"] if change.fits is None else []))
        assert (code, count) == (0, ROWS), what
        columns, wanted = change.transform if strategy == "transform" else change.lenient
        assert db.execute(f"SELECT {columns} FROM {table} ORDER BY 1") == db.execute(f"SELECT {wanted} FROM original ORDER BY 1"), what
        if change.breaks and strategy != "transform":
            assert "is refused" in said and restored(change, change.breaks)[:2] == (2, 0), what
