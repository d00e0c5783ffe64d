"""The records of a run in the bucket: it began to write about a database, and every batch of it is settled.

A run with a beginning and no end is what recovery looks for (design, section 5). A run that has ended is never used
again: what it left later would not be found.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, Optional

from audit_archiver import __version__, lines
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NameTaken
from audit_archiver.postgres import witness

ONE_DAY = datetime.timedelta(days=1)

_START, _END = "-start.json", "-end.json"


@dataclass(frozen=True)
class OpenRun:
    """A run that began and has not ended; `held` if its batches are selected under a transaction holder.

    `began_on` is the server's system identifier and the oid of the database.
    """

    run: str
    held: bool
    begun: datetime.datetime
    began_on: Optional[tuple[str, int]] = None

    @property
    def since(self) -> datetime.date:
        """The first day that a batch of it can bear: the server's clock may be behind ours, and midnight lies between."""
        named = datetime.datetime.strptime(self.run[:8], "%Y%m%d").date()
        return min(named, self.begun.date()) - ONE_DAY


@dataclass(frozen=True)
class Runs:
    """What the records say: the open runs, and where the log was when the last one ended (None: nobody noted it)."""

    open: list[OpenRun]
    ended: bool
    wal: Optional[dict[str, Any]]


def records(store: Store, database: str) -> tuple[dict[str, datetime.datetime], dict[str, datetime.datetime]]:
    """When each run of a database left its beginning, and its end, by the store's clock; read from the listing alone."""
    starts: dict[str, datetime.datetime] = {}
    ends: dict[str, datetime.datetime] = {}
    for found in store.list(f"{names.database_dir(store.prefix, database)}.runs/"):
        name = found.key.rpartition("/")[2]
        for suffix, place in ((_START, starts), (_END, ends)):
            if name.endswith(suffix):
                place[name[:-len(suffix)]] = found.modified
    return starts, ends


def listed(store: Store, database: str) -> Runs:
    """Every open run of a database, and the end of the newest that has ended."""
    starts, ends = records(store, database)
    wal = None
    if ends:
        latest = max(ends.values())  # a store's clock may know whole seconds only; within one the records tell
        tied = [_read(store, names.run_end_key(store.prefix, database, run)) for run, at in ends.items() if at == latest]
        wal = max(tied, key=lambda end: str(end["at"])).get("wal")
    found_open = [_open(run, _read(store, names.run_start_key(store.prefix, database, run)), begun)
                  for run, begun in starts.items() if run not in ends]
    return Runs(found_open, bool(ends), wal)


def _open(run: str, start: dict[str, Any], begun: datetime.datetime) -> OpenRun:
    place = (start["system"], start["database_oid"]) if "system" in start else None
    return OpenRun(run, bool(start.get("held")), begun, place)


def is_open(store: Store, database: str, run: str) -> bool:
    """True if the run has begun and not ended, so that recovery would find what it leaves."""
    return (store.head(names.run_start_key(store.prefix, database, run)) is not None
            and store.head(names.run_end_key(store.prefix, database, run)) is None)


def put_end(store: Store, database: str, run: str, by: str, wal: Optional[dict[str, Any]] = None) -> None:
    """Write `{run}-end.json`: every batch that the run uploaded is recorded or abandoned. Written once; again is fine.

    `wal` (wal_here, or wal_of the last committed batch line) says how far the server's log has come: a run that
    finds it further back knows at once that the server was rewound (postgres.md S11).
    """
    at = datetime.datetime.now(datetime.timezone.utc)
    value: dict[str, Any] = {"format": "aa-run", "version": 1, "run": run, "database": database, "event": "end",
                             "at": f"{at.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z", "by": by,
                             "archiver_version": __version__}
    if wal is not None:
        value["wal"] = wal
    try:
        store.put_record(names.run_end_key(store.prefix, database, run), lines.dump(value))
    except NameTaken:
        return  # another end of the same run, a second apart: it says the same


def wal_here(place: witness.Place) -> dict[str, Any]:
    """Where the server's log is now."""
    return {"system": place.system, "timeline": place.timeline, "lsn": place.lsn}


def wal_of(line: dict[str, Any]) -> Optional[dict[str, Any]]:
    """Where the server's log was when a batch was committed; None if its line does not say."""
    server, lsn = line["batch"]["server"], line["committed"]["lsn"]
    return None if lsn is None else {"system": server["system"], "timeline": server["timeline"], "lsn": lsn}


def _read(store: Store, key: str) -> dict[str, Any]:
    what = f"'{store.url(key)}'"
    value = lines.parse(store.get_bytes(key), what)
    schema.validate("run", value, what)
    return value
