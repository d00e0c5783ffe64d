"""Checks of one table: is it what the configuration says, and may and should we delete from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Iterator, Union

from audit_archiver import exits
from audit_archiver.config.model import Database, Table
from audit_archiver.postgres import catalog, connect, examine
from audit_archiver.postgres.quoting import ident
from audit_archiver.postgres.transaction import BATCH_BYTES
from audit_archiver.preflight.check import Check, Good, Said, declare
from audit_archiver.preflight.findings import FAIL, WARN

Answers = Iterator[Union[Said, Good]]
TB, GB, MB = 1e12, 1e9, 1e6
SMALL_BYTES = 16 << 20  # a table that is read in a moment needs no index
LARGE_BYTES = 1 << 30  # one that would be read for every batch must have one
BUSY_SESSIONS = 10
DOORS = ("table.rights", "table.locks")  # where one of these fails the table cannot be read

CHECKS: list[Check] = []
check = functools.partial(declare, CHECKS)


@dataclass(frozen=True)
class Look:
    """One table to look at. Its shape was read already: what catalog.shape refuses never comes here."""

    connection: connect.Connection
    database: Database
    table: Table
    shape: catalog.Shape
    server: examine.Server
    force: bool = False


@check("table.shape", FAIL, "a plain table with a unique key, a time column and types that come back exactly")
def shape(look: Look) -> Answers:
    """REQ-VAL-005, REQ-TBL-003, 004, 006; every refusal of catalog.shape is a failure of this check."""
    yield Good(f"key {', '.join(look.shape.key)}; {look.shape.timestamp} {look.shape.timestamp_type}")


@check("table.rights", FAIL, "the role may read, lock and delete rows", code=exits.PERMISSION)
def rights(look: Look) -> Answers:
    """REQ-VAL-002. FOR UPDATE needs UPDATE on at least one column, which audit tables often revoke (S13)."""
    found, table, role = examine.rights(look.connection, look.shape.oid), look.shape.qualified, ident(look.server.user)
    lacking = (
        (found.schema, "USAGE on the schema", f"GRANT USAGE ON SCHEMA {ident(look.shape.schema)} TO {role}"),
        (found.select, "SELECT", f"GRANT SELECT ON {table} TO {role}"),
        (found.delete, "DELETE", f"GRANT DELETE ON {table} TO {role}"),
        (found.lock, "UPDATE on any column, which locking rows needs", f"GRANT UPDATE ({ident(look.shape.key[0])}) ON {table} TO {role}"))
    for has, what, remedy in lacking:
        if not has:
            yield Said(f"role '{look.server.user}' lacks {what}", remedy)
    if all(has for has, _, _ in lacking):
        yield Good("may select, lock and delete")


@check("table.vacuum", WARN, "the role may vacuum the table", "make the role the table's owner, grant it MAINTAIN (PostgreSQL 17), "
       "or write 'vacuum_strategy: none'")
def vacuum(look: Look) -> Answers:
    """REQ-VAL-002. PostgreSQL only warns and skips, so nobody would notice (S13)."""
    if look.table.vacuum != "none" and not examine.rights(look.connection, look.shape.oid).vacuum:
        yield Said(f"role '{look.server.user}' may not vacuum the table: freed room waits for autovacuum")


@check("table.cascade", FAIL, "no rows of other tables go or change with a deleted row",
       "archive those rows first, change the foreign key, or write 'cascade: acknowledged' for this table")
def cascade(look: Look) -> Answers:
    """REQ-INT-016 as ruled, T32."""
    for reference in look.shape.references:
        if reference.destroys and _may_read(look, reference) and examine.references_something(look.connection, reference):
            accepted = look.table.cascade == "acknowledged"
            yield Said(f"rows of '{reference.schema}.{reference.child}' hang on it by '{reference.name}' (ON DELETE {reference.action}) "
                       "and are not archived", status=WARN if accepted else None,
                       remedy="it is accepted by 'cascade: acknowledged'" if accepted else None)


@check("table.references", WARN, "which plain foreign keys keep rows in the table",
       "rows that are still referenced stay; archive the referencing table too")
def references(look: Look) -> Answers:
    """REQ-INT-013..015."""
    for reference in look.shape.references:
        if not reference.destroys:
            yield Said(f"'{reference.schema}.{reference.child}' references it by '{reference.name}'")


@check("table.children", FAIL, "the role may read the tables that reference this one", code=exits.PERMISSION)
def children(look: Look) -> Answers:
    """Whether a row is still referenced is asked for every batch."""
    for reference in look.shape.references:
        if not _may_read(look, reference):
            child = f"{ident(reference.schema)}.{ident(reference.child)}"
            yield Said(f"role '{look.server.user}' may not read '{reference.schema}.{reference.child}', which references it",
                       f"GRANT SELECT ON {child} TO {ident(look.server.user)}")


@check("table.triggers", WARN, "which triggers fire on DELETE", "make sure that it may run for every archived row")
def triggers(look: Look) -> Answers:
    """T32: what a trigger does elsewhere is neither archived nor counted."""
    for name in look.shape.delete_triggers:
        yield Said(f"the trigger '{name}' fires on DELETE")


@check("table.published", FAIL, "what logical replication makes of the deletes")
def published(look: Look) -> Answers:
    """S13: without a replica identity the DELETE itself fails; with one the subscribers lose the rows too."""
    for publication in examine.publications(look.connection, look.shape):
        if publication.blocks:
            yield Said(f"publication '{publication.name}' publishes deletes and the table has no replica identity, so DELETE would fail",
                       f"ALTER TABLE {look.shape.qualified} REPLICA IDENTITY ...")
        else:
            yield Said(f"publication '{publication.name}': its subscribers lose the archived rows too", status=WARN,
                       remedy="publish without deletes if they shall keep them")


@check("table.locks", WARN, "nobody else has the table locked, and it is not heavily used", thorough=True)
def locks(look: Look) -> Answers:
    """REQ-VAL-011. A run waits for such a lock in every batch, and says so itself."""
    found = examine.locks(look.connection, look.shape)
    for lock in found:
        if lock.blocks and not lock.shuts:
            yield Said(f"{lock.mode} is held by {lock.who}", f"a batch waits {look.database.lock_timeout_s:g} s for it: archive when it is over")
    sessions = len({lock.who for lock in found})
    if sessions >= BUSY_SESSIONS:
        yield Said(f"{sessions} sessions use it now", "archive at a quieter time, or write 'locking: {mode: late}'")
    for lock in found:
        if lock.shuts:
            yield Said(f"{lock.mode} is held by {lock.who}, so it cannot even be read", "look again when it is over", exits.FAILED, FAIL)


@check("table.index", FAIL, "an index finds the oldest rows; a warning below 1 GB")
def index(look: Look) -> Answers:
    """REQ-TBL-007, 008. Without one every batch reads the whole table (postgres.md, section 3)."""
    name = examine.timestamp_index(look.connection, look.shape)
    if name is not None:
        yield Good(f"index {name}")
        return
    heap = examine.heap_bytes(look.connection, look.shape)
    if heap < SMALL_BYTES:
        return
    columns = ", ".join(ident(column) for column in dict.fromkeys([look.shape.timestamp, *look.shape.key]))
    remedy, tolerable = f"CREATE INDEX CONCURRENTLY ON {look.shape.qualified} ({columns})", look.force or heap < LARGE_BYTES
    forced = "" if tolerable else "; 'aa-archive --force' archives it all the same"
    yield Said(f"no index starts with {look.shape.timestamp}: each batch reads {heap / GB:.3g} GB{forced}", remedy,
               status=WARN if tolerable else None)


@check("table.size", FAIL, "the table is no larger than max_table_tb",
       "raise resources.max_table_tb, or partition the table")
def size(look: Look) -> Answers:
    """REQ-RES-016."""
    found = examine.table_bytes(look.connection, look.shape) / TB
    if found > look.database.max_table_tb:
        yield Said(f"it takes {found:.3g} TB, more than max_table_tb ({look.database.max_table_tb:g})")


@check("table.width", WARN, "batches as large as asked for fit into one", thorough=True)
def width(look: Look) -> Answers:
    """Rows come whole, so wide ones cost memory, and batches of them are cut short."""
    row = examine.bytes_per_row(look.connection, look.shape)
    if look.shape.toasted and row * look.table.batch_size > BATCH_BYTES:
        yield Said(f"rows take {row / 1000:,.0f} kB each, so batches end at {BATCH_BYTES / MB:.0f} MB and not at {look.table.batch_size:,} rows",
                   f"write 'batch_size: {max(1, int(BATCH_BYTES / row))}'; rows over max_row_mb stay in the table")


@check("table.dst", WARN, "times without a zone are not those of a clock that changes", thorough=True)
def dst(look: Look) -> Answers:
    """REQ-TIME-006. A timestamp without time zone is taken as UTC; where clocks change, an hour a year is there twice."""
    zone = examine.changing_clock(look.connection) if look.shape.timestamp_type == "timestamp" else None
    if zone is not None:
        yield Said(f"{look.shape.timestamp} has no time zone and is taken as UTC, but the database's zone is {zone}, whose clock changes",
                   "make it timestamptz, or see that its writers use UTC and that safety_buffer_days "
                   f"({look.table.safety_buffer_days}) covers the difference")


@check("table.timestamps", WARN, "some row has a finite timestamp", "rows without one are never archived; fill the column, or name another",
       thorough=True)
def timestamps(look: Look) -> Answers:
    """REQ-VAL-004, REQ-TBL-005."""
    if not examine.has_timestamps(look.connection, look.shape):
        yield Said(f"every row has a NULL or an infinite time in {look.shape.timestamp}")


def _may_read(look: Look, reference: catalog.Reference) -> bool:
    return examine.may_read(look.connection, reference.schema, reference.child)
