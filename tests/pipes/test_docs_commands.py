"""The commands of docs/*.md, carried out as they stand, on a real server and a real bucket.

A ```sh block is run line by line; a comment above it says in which scene, with which exit codes, with which command that is not
ours, or why it is not run at all:

    <!-- scene: held; exits: 2 0; needs: jq -->
    <!-- not run: REASON -->

A block without a comment goes on where the one before it stopped. The README's are in test_readme.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import pytest

from audit_archiver.formats import names
from audit_archiver.postgres import connect
from tests.conftest import Bucket, TestDatabase
from tests.ground import tables
from tests.ground.by_hand import ByHand, dump
from tests.ground.held import Holder, plan
from tests.ground.run import BIN, ROOT, Child, finish, spawn
from tests.ground.wait import until

ROWS = 250
BLOCK = re.compile(r"^( *)(?:<!-- ([^\n]*?) -->\n *)?```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {("recovery.md", "it needs the aws command, and the bucket on AWS"), ("operations.md", "it needs a server and a store of yours")}
PAGES = sorted((ROOT / "docs").glob("*.md"))


@dataclass
class Case:
    """Blocks that belong together: (line, expected exit code) in order."""

    page: str
    scene: str
    needs: str = ""
    lines: list[tuple[str, int]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page}-{self.scene}".replace(" ", "_")


def blocks(page: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """(what its comment says, its command lines) of each block of a page."""
    for _, said, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        parts = [part.split(": ", 1) for part in said.split("; ")] if said else []
        yield {key: value for key, value in parts}, [line.strip() for line in text.splitlines() if line.strip()]


def cases() -> list[Case]:
    """Everything that can be run."""
    found: list[Case] = []
    for page in PAGES:
        for said, lines in blocks(page):
            if "not run" in said:
                continue
            if said:
                found.append(Case(page.name, said["scene"], said.get("needs", "")))
            codes = map(int, said["exits"].split()) if "exits" in said else [0] * len(lines)
            found[-1].lines += zip(lines, codes)
    return found


@dataclass
class Place:
    """Where the commands are run: a scratch directory with prod.yaml and my.yaml, and who does what else is needed."""

    hand: ByHand
    bucket: Bucket
    path: Path
    line: dict[str, Any] = field(default_factory=dict)
    busy: list[Child] = field(default_factory=list)

    @property
    def db(self) -> TestDatabase:
        """The database."""
        return self.hand.db  # type: ignore[no-any-return]

    def here(self, command: str) -> str:
        """A command with the page's places and the name of its batch as they are here."""
        given = {"/var/lib/audit-archiver/": f"{self.hand.staging}/", "/srv/": f"{self.path}/", "/var/log/": f"{self.path}/",
                 "scratch:": f"{self.scratch}:"}
        if self.line:
            stamp = re.sub("[-:]", "", self.line["batch"]["archived_at"])
            given["20251230T021545Z-4711"] = self.line["batch"]["run"]
            given["20251230T021547Z_batch_003"] = f"{stamp}_batch_{self.line['batch']['number']:03d}"
        for theirs, ours in given.items():
            command = command.replace(theirs, ours)
        return command

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """A line of a page, in a shell as a person has it."""
        return subprocess.run(["sh", "-c", self.here(command)], cwd=self.path, capture_output=True, text=True, timeout=120, check=False,
                              env={"PATH": f"{BIN}:{os.defpath}", "HOME": str(self.path)})

    @property
    def scratch(self) -> str:
        """A database that is there in one scene only."""
        return f"scratch_{self.db.name}"

    def rows(self) -> int:
        """How many are in the table."""
        return int(self.db.scalar("SELECT count(*) FROM audit_logs"))

    def recorded(self) -> bool:
        """Whether the scene's batch is archived."""
        return "commit" in self.hand.states(self.line)


# -- scenes: what was before the commands, and what must be after them


def old_rows(_place: Place) -> None:
    """There is a table with old rows, and no run was before."""


def stay(place: Place, _said: list[str]) -> None:
    assert place.rows() == ROWS


def archived(place: Place, _said: list[str]) -> None:
    assert place.rows() == 0
    report = json.loads((place.path / "audit-archiver-reports.jsonl").read_text())
    assert report["exit"] == 0 and (place.path / "audit-archiver.log").read_text().startswith("{")


def interrupted(place: Place, commit: bool = True) -> None:
    """A run that died: between COMMIT and the record, or before its delete."""
    with Holder(place.hand.path) as holder:
        data = holder.select(plan(place.hand.settings, "audit_logs", cutoff="2025-01-01T00:00:00Z", limit=100)).out
        for stage in ("aa-serialize", "aa-upload", "aa-verify"):
            data = holder.stage(stage, data).out
        place.line = json.loads(data)
        if commit:
            place.line = holder.commit(holder.delete([place.line]).lines[0])


def is_recorded(place: Place, _said: list[str]) -> None:
    assert place.recorded() and place.rows() == ROWS - 100


def held(place: Place) -> None:
    """A batch that was rolled back, and one of whose rows somebody removed since."""
    interrupted(place, commit=False)
    place.db.execute("DELETE FROM audit_logs WHERE id = 4")


def is_decided(place: Place, said: list[str]) -> None:
    assert '{"key":[4],"now":"absent"}' in "".join(said).replace(" ", "")
    assert place.recorded() and place.rows() == ROWS - 1


def looked_at(place: Place) -> None:
    """The same, and aa-recover has written held.json."""
    held(place)
    found = place.hand.recover().lines[0]["databases"][0]["verdicts"][0]
    shutil.copy(found["line"], place.path / "held.json")


def set_aside(place: Place) -> None:
    """The store was away when a batch that was exported by hand was sent."""
    staged = place.hand.export("--limit", "100", upto="aa-serialize")
    path = place.path / "away.yaml"
    path.touch(mode=0o600)
    gone = "endpoint: http://127.0.0.1:9\n  retries: 0\n  local_fallback_dir: fallback"
    path.write_text(re.sub(r"endpoint: .*", gone, place.hand.path.read_text()))
    sent = place.hand.run("aa-upload", ["-c", str(path)], dump(staged))
    assert sent.rc == 7, sent.err
    place.line = staged[0]


def changed(place: Place) -> None:
    """A batch that was exported by hand, and a row of which was changed before it could be deleted."""
    place.line = place.hand.export("--limit", "100")[0]
    place.db.execute("UPDATE audit_logs SET action = 'other' WHERE id = 7")
    assert "DIVERGED" in place.hand.delete([place.line]).err
    (place.path / "batch.json").write_bytes(dump([place.line]))


def is_exported_again(place: Place, said: list[str]) -> None:
    assert '{"key":[7],"now":"changed"}' in "".join(said).replace(" ", "")
    assert len((place.path / "batches.jsonl").read_bytes().splitlines()) == 3 and place.rows() == ROWS


def copied(place: Place) -> None:
    """Everything is archived and was copied from the bucket, and two batches lie there that are not archived."""
    place.db.execute("UPDATE audit_logs SET user_id = CASE WHEN id IN (5, 205) THEN 42 ELSE 43 END")
    assert place.run("aa-archive -c prod.yaml").returncode == 0
    for key in place.bucket.keys():
        inside = key.partition("/audit_logs/")[2]
        if inside:
            target = place.path / "copy" / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            place.bucket.client.download_file(place.bucket.name, key, str(target))
    for data in list((place.path / "copy").rglob("*_batch_001.jsonl.gz")):
        shutil.copy(data, str(data).replace("_batch_001", "_batch_901"))


def are_found(_place: Place, said: list[str]) -> None:
    assert sorted(json.loads(line)["id"] for line in said[0].splitlines()) == [5, 205]


def logged(place: Place) -> None:
    """A run's log."""
    assert place.run("aa-archive -c prod.yaml --log-format json 2> run.log").returncode == 0


def is_read(_place: Place, said: list[str]) -> None:
    assert [json.loads(line)[0] for line in said[2].splitlines()] == ["public.audit_logs"]


def at_work(place: Place) -> None:
    """Somebody holds the lock."""
    child = spawn("aa-lock", ["-c", str(place.hand.path), "--", "sh", "-c", "touch begun; exec cat"], cwd=place.path, stdin=subprocess.PIPE)
    place.busy.append(child)
    until((place.path / "begun").exists, "aa-lock has the lock")


def is_ended(place: Place, said: list[str]) -> None:
    assert "aa-lock" in said[0]
    child = place.busy.pop()
    assert finish(child).rc == 7


def all_archived(place: Place) -> None:
    """Everything is archived."""
    place.db.execute("UPDATE audit_logs SET user_id = 123 WHERE id % 50 = 7")
    place.db.execute("CREATE TABLE before AS SELECT * FROM audit_logs")
    assert place.run("aa-archive -c prod.yaml").returncode == 0 and place.rows() == 0


def is_restored(place: Place, said: list[str]) -> None:
    reports = [json.loads(text) for text in said[2:]]
    assert len(said[0].splitlines()) == 5 and len(said[1].splitlines()) == 1
    assert [report["rows"]["inserted"] for report in reports] == [ROWS, reports[1]["rows"]["meant"], 5, ROWS - 5]
    january = tables.digest(place.db.connection, "before", where="created_at < '2024-02-01Z'")
    assert tables.digest(place.db.connection, "january") == january
    assert tables.digest(place.db.connection, "audit_logs") == tables.digest(place.db.connection, "before")


def is_held(place: Place, said: list[str]) -> None:
    report, job = json.loads(said[0]), json.loads(said[1])
    assert report["rows"]["inserted"] == place.rows() > 0 and (job["estimate"], len(job["held"])) == (0, 1)
    assert place.run("aa-archive -c prod.yaml --force").returncode == 0 and place.rows() == report["rows"]["inserted"]


def scratch_database(place: Place) -> None:
    """The same, and an empty database on the same server."""
    all_archived(place)
    place.db.admin(f"CREATE DATABASE {place.scratch} OWNER {place.hand.settings.databases[0].user}")


def is_in_scratch(place: Place, said: list[str]) -> None:
    there = connect.connect(dataclasses.replace(place.hand.settings.databases[0], dbname=place.scratch), purpose="look")
    try:
        assert tables.digest(there, "public.audit_logs") == tables.digest(place.db.connection, "before")
    finally:
        there.close()
        place.db.admin(f"DROP DATABASE {place.scratch}")
    assert place.rows() == 0 and json.loads(said[0])["target"]["created"]


def by_mistake(place: Place) -> None:
    """One run has archived everything."""
    all_archived(place)
    listed = json.loads(place.run("aa-ls -c prod.yaml --output json").stdout.splitlines()[0])
    place.line = json.loads(place.hand.store.get_bytes(listed["s3_key"].replace(names.DATA, names.COMMIT)))


def is_undone(place: Place, said: list[str]) -> None:
    reports = [json.loads(text) for text in said]
    assert [report["dry_run"] for report in reports] == [True, False, False]
    assert [report["rows"]["inserted"] for report in reports] == [150, 150, 100]
    assert tables.digest(place.db.connection, "audit_logs") == tables.digest(place.db.connection, "before")


def validated(place: Place) -> None:
    """A run has archived everything, and the index of its table is there."""
    assert place.run("aa-archive -c prod.yaml").returncode == 0


def index_lost(place: Place) -> None:
    """The same, and somebody has removed the index."""
    validated(place)
    for key in place.bucket.keys():
        if "/.index/" in key:
            place.hand.store.delete(key)


def index_is_back(place: Place, said: list[str]) -> None:
    assert "would be written" in said[0] and "index.unlisted" not in said[2]
    assert sum("/.index/" in key for key in place.bucket.keys()) == 1


def is_even(place: Place, said: list[str]) -> None:
    assert "EQUAL" in said[2] and "each row is in one place" in said[3] and place.rows() == 0


def is_whole(_place: Place, said: list[str]) -> None:
    assert "exit 0" in said[0] or said == [""]


def copied_out(place: Place) -> None:
    """Everything is archived, and the bucket is copied into a directory."""
    all_archived(place)
    for entry in place.hand.store.list(""):
        path = place.path / "copy" / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(place.hand.store.get_bytes(entry.key))


def is_printed(_place: Place, said: list[str]) -> None:
    user, day, three, batches, copy = said
    assert [json.loads(line)["id"] % 50 for line in user.splitlines()] == [7] * 5 and copy == user and len(batches.splitlines()) == 3
    assert day.startswith("id,created_at,user_id,") and day.count("2024-02-10T") >= 2
    assert all(list(json.loads(line)) == ["id", "created_at", "amount"] for line in three.splitlines()) and three


SCENES: dict[str, Any] = {
    "to be read": (copied_out, is_printed),
    "all archived": (all_archived, is_restored),
    "old rows": (old_rows, stay), "every night": (old_rows, archived), "interrupted": (interrupted, is_recorded),
    "held": (held, is_decided), "held and looked at": (looked_at, is_recorded),
    "set aside": (set_aside, is_recorded), "changed": (changed, is_exported_again), "copied": (copied, are_found),
    "logged": (logged, is_read), "at work": (at_work, is_ended), "validated": (validated, is_whole),
    "needed again": (all_archived, is_held), "a scratch database": (scratch_database, is_in_scratch),
    "archived by mistake": (by_mistake, is_undone), "index lost": (index_lost, index_is_back), "weighed": (old_rows, is_even)}


@pytest.fixture()
def place(db: TestDatabase, bucket: Bucket, config_file: Any, tmp_path: Path) -> Iterator[Place]:
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    path = config_file(db, bucket, database={"name": "prod", "dbname": db.name}, defaults={"vacuum_strategy": "standard"})
    for name in ("prod.yaml", "my.yaml"):
        shutil.copy(path, tmp_path / name)
    made = Place(ByHand(db, tmp_path / "prod.yaml"), bucket, tmp_path)
    yield made
    for child in made.busy:
        finish(child)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_commands_of_a_page_do_what_it_says(case: Case, place: Place) -> None:
    if case.needs and shutil.which(case.needs) is None:
        pytest.skip(f"'{case.needs}' is not installed")
    before, after = SCENES[case.scene]
    before(place)
    said = []
    for line, code in case.lines:
        done = place.run(line)
        assert done.returncode == code, f"{line}\n{done.stdout}{done.stderr}"
        said.append(done.stdout)
    after(place, said)


def test_what_is_not_run_is_known_with_the_reason() -> None:
    assert {(page.name, said["not run"]) for page in PAGES for said, _ in blocks(page) if "not run" in said} == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_that_can_be_copied_stands_in_a_block_that_is_run(page: Path) -> None:
    rest = BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert re.findall(r"^ +(?:\$ )?(?:aa-[a-z]+|jq|aws|find) (?:\S.* )?--?[a-z].*$", rest, re.MULTILINE) == []
