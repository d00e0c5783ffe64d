"""What recovery reads out of names and numbers, without a store."""

from __future__ import annotations

import datetime
from typing import Any, Dict, Iterator, Optional

import pytest

from audit_archiver import exits, lines
from audit_archiver.catalogue import guard, leftovers, rewound, runs
from audit_archiver.formats import names
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.objectstore.listing import Entry
from audit_archiver.postgres.witness import Place

NOW = datetime.datetime(2025, 12, 30, 2, 15, tzinfo=datetime.timezone.utc)
HERE = Place("7710284313221365056", 1, 16384, "1/20", "2025-12-30T02:15:00Z")


class Ends:
    """A store whose clock knows whole seconds, with the ends of runs."""

    prefix = "a/"

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}

    def list(self, prefix: str) -> Iterator[Entry]:
        """All of them, of the same second."""
        return iter([Entry(key, 1, NOW) for key in sorted(self.stored) if key.startswith(prefix)])

    def put_record(self, key: str, value: bytes) -> None:
        """Store an end."""
        assert key not in self.stored
        self.stored[key] = value

    def get_bytes(self, key: str) -> bytes:
        """Read it."""
        return self.stored[key]

    def url(self, key: str) -> str:
        """Its name in messages."""
        return key


@pytest.mark.req("REQ-REL-006")
@pytest.mark.parametrize("order", [("20251230T021547Z-1", "20251230T021547Z-2"), ("20251230T021547Z-2", "20251230T021547Z-1")])
def test_of_two_runs_that_ended_in_one_second_the_later_says_where_the_log_is(order: tuple[str, str],
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run after the accepted one would compare with the log of the server as it was before it was rewound."""
    store: Any = Ends()
    for millisecond, (run, lsn) in enumerate(zip(order, ("2/0", "1/0"))):
        class Clock(datetime.datetime):
            """Stands still."""

            @classmethod
            def now(cls, tz: Optional[datetime.tzinfo] = None, after: int = millisecond) -> Any:
                return NOW + datetime.timedelta(milliseconds=after)

        monkeypatch.setattr(runs.datetime, "datetime", Clock)
        runs.put_end(store, "prod", run, "aa-recover", {"system": "7", "timeline": 1, "lsn": lsn})
    assert runs.listed(store, "prod").wal == {"system": "7", "timeline": 1, "lsn": "1/0"}


class Listing:
    """Keys as a store lists them."""

    def __init__(self, *keys: str) -> None:
        self._keys = sorted(keys)

    def list(self, prefix: str, start_after: Optional[str] = None) -> Iterator[Entry]:
        """Those under a prefix and after a key."""
        for key in self._keys:
            if key.startswith(prefix) and key > (start_after or ""):
                yield Entry(key, 1, NOW)


def stem(number: int, day: str = "2025-12-30") -> str:
    return names.stem("a/", "prod", "public", "t", f"{day}T02:15:47Z", number)


@pytest.mark.req("T9")
def test_batches_100_and_1000_are_told_apart_though_one_name_begins_with_the_other() -> None:
    store: Any = Listing(*(stem(number) + suffix for number in (100, 1000) for suffix in names.SUFFIXES[:3]),
                         stem(1000) + names.COMMIT, stem(100) + names.intent(1))
    found = {each.name: each for each in leftovers.batches_since(store, "a/prod/t/")}
    assert [each.recorded for each in found.values()] == [False, True]
    assert found["t_20251230T021547Z_batch_100"].suffixes == {*names.SUFFIXES[:3], "_intent_1.json"}
    assert found["t_20251230T021547Z_batch_1000"].suffixes == {*names.SUFFIXES[:3], names.COMMIT}


def test_only_the_days_that_an_open_run_can_have_written_are_listed() -> None:
    store: Any = Listing(*(stem(1, day) + names.DATA for day in ("2024-02-29", "2025-12-28", "2025-12-29", "2026-01-01")),
                         "a/prod/t/.index/x_001.json", "a/prod/t/_owner.json")
    found = [each.day for each in leftovers.batches_since(store, "a/prod/t/", datetime.date(2025, 12, 29))]
    assert found == ["2025-12-29", "2026-01-01"]
    assert len(list(leftovers.batches_since(store, "a/prod/t/"))) == 4


def test_a_run_may_have_written_on_the_day_before_it_began() -> None:
    """Selected at 23:59:59 by one clock, uploaded at 00:00:02 by another."""
    begun = datetime.datetime(2025, 12, 30, 0, 0, 2, tzinfo=datetime.timezone.utc)
    assert runs.OpenRun("20251230T000001Z-1", True, begun).since == datetime.date(2025, 12, 29)
    assert runs.OpenRun("20991230T000001Z-1", True, begun).since == datetime.date(2025, 12, 29)


@pytest.mark.req("T8")
@pytest.mark.parametrize("table", [("public", "t"), ("audit", "t"), ("public", "audit.t"), ("Ü/x", "a%b.c"), ("public", ".index")])
def test_a_tables_prefix_leads_back_to_its_names(table: tuple[str, str]) -> None:
    assert leftovers.table_of(owners(), names.table_dir("a/", "prod", *table)) == table


class Owners(Dict[str, bytes]):
    """A store that holds nothing but owners of prefixes."""

    prefix = "a/"

    def url(self, key: str) -> str:
        return f"s3://b/{key}"

    def get_bytes(self, key: str) -> bytes:
        if key not in self:
            raise NotFound(f"'{key}' does not exist")
        return self[key]


def owners(found: Optional[dict[str, bytes]] = None) -> Any:
    return Owners(found or {})


def owner_of(schema: str, table: str) -> bytes:
    return lines.dump({"format": "aa-owner", "version": 1, "system": "7", "database_oid": 5, "database": "prod", "schema": schema, "table": table})


@pytest.mark.req("T8")
def test_a_shortened_prefix_leads_back_to_its_names_through_its_owner_and_through_nobody_elses() -> None:
    table = ("ß" * 31, "日" * 21)
    place = names.table_dir("a/", "prod", *table)
    assert leftovers.table_of(owners({place + "_owner.json": owner_of(*table)}), place) == table
    for store in (owners(), owners({place + "_owner.json": owner_of("public", "other")})):
        with pytest.raises(exits.Mismatch, match="nothing says whose it is") as refused:
            leftovers.table_of(store, place)
        assert place + "_owner.json" in str(refused.value.hint)


@pytest.mark.parametrize(("then", "behind"), [
    (("7710284313221365056", 1, "1/1F"), False), (("7710284313221365056", 1, "1/20"), False),
    (("7710284313221365056", 1, "1/21"), True), (("7710284313221365056", 1, "0/FFFFFFFF"), False),
    (("7710284313221365056", 1, "10/0"), True), (("7710284313221365056", 2, "0/1"), True), (("1", 1, "0/1"), True)])
def test_a_server_is_behind_on_another_timeline_or_an_older_position(then: tuple[str, int, str], behind: bool) -> None:
    assert rewound.behind(HERE, dict(zip(("system", "timeline", "lsn"), then))) is behind


def test_rows_are_told_apart_by_number_and_digest() -> None:
    archived = ["a", "b", "c", "d", "e"]
    now = [(1, "a"), (3, "x"), (5, "e")]
    assert list(guard._states(archived, now)) == ["same", "absent", "changed", "absent", "same"]
    assert list(guard._states(archived, [])) == ["absent"] * 5
    assert list(guard._states(archived, list(enumerate(archived, 1)))) == ["same"] * 5
