"""The records of rollbacks in the bucket: one began, this batch is back in its table, one ended.

A batch's rows are committed into the table before its record says so. Between the two they are in both places, so a
rollback leaves its beginning first: a table with a beginning and no end is left alone by every run, until aa-rollback has
gone on with it. Meeting its rows again, it changes nothing and writes what is missing.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from audit_archiver import lines
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NameTaken

START, END = "start", "end"


@dataclass(frozen=True)
class Open:
    """A rollback that began and has not ended; `stems` are its batches, the newest first."""

    rollback: str
    schema: str
    table: str
    stems: tuple[str, ...]


def start(store: Store, made: Open, database: str, by: dict[str, str]) -> None:
    """Say that a rollback begins, before its first row."""
    _put(store, made, database, by, START)


def end(store: Store, made: Open, database: str, by: dict[str, str]) -> None:
    """Say that of each of its batches it is known whether it was rolled back. Again is fine."""
    try:
        _put(store, made, database, by, END)
    except NameTaken:
        return  # another end of it, a second apart: it says the same


def unfinished(store: Store, database: str) -> list[Open]:
    """Every rollback of a database that was interrupted."""
    found: dict[str, set[str]] = {START: set(), END: set()}
    for each in store.list(names.rollbacks_dir(store.prefix, database)):
        rollback, _, event = each.key.rpartition("/")[2].rpartition(".")[0].rpartition("-")
        found.get(event, set()).add(rollback)
    return [_read(store, database, rollback) for rollback in sorted(found[START] - found[END])]


def words(store: Store, database: str) -> dict[tuple[str, str], str]:
    """Why a table must be left alone: of each (schema, table) whose rollback was interrupted."""
    return {(each.schema, each.table): f"rollback {each.rollback} was interrupted: rows of {len(each.stems)} batches may be in the table and "
            "in the archive" for each in unfinished(store, database)}


def put(store: Store, stem: str, record: dict[str, Any]) -> None:
    """Write the record that a batch is rolled back, beside its commit record; `record` is what only the caller knows. Again is fine."""
    value = {"format": "aa-rolled-back", "version": 1, "stem": stem, "at": now(), **record}
    schema.validate("rolled-back", value, "the record of the rollback")
    try:
        store.put_new(stem + names.ROLLED_BACK, lines.dump(value))
    except NameTaken:
        return  # the one before was killed between the record and its end


def now() -> str:
    """The time of a record."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _put(store: Store, made: Open, database: str, by: dict[str, str], event: str) -> None:
    value = {"format": "aa-rollback", "version": 1, "rollback": made.rollback, "event": event, "at": now(), "by": by, "database": database,
             "schema": made.schema, "table": made.table, "batches": list(made.stems)}
    schema.validate("rollback", value, "the record of the rollback")
    store.put_new(names.rollback_key(store.prefix, database, made.rollback, event), lines.dump(value))


def _read(store: Store, database: str, rollback: str) -> Open:
    key = names.rollback_key(store.prefix, database, rollback, START)
    value = lines.parse(store.get_bytes(key), f"'{store.url(key)}'")
    schema.validate("rollback", value, f"'{store.url(key)}'")
    return Open(value["rollback"], value["schema"], value["table"], tuple(value["batches"]))
