"""Checks of a server and of our session on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Iterator, Sequence, Union

from audit_archiver import exits
from audit_archiver.config.model import Database, Table
from audit_archiver.postgres import catalog, connect, eligible, examine, locks
from audit_archiver.postgres.quoting import literal
from audit_archiver.preflight.check import Check, Good, Said, declare
from audit_archiver.preflight.findings import FAIL, WARN
from audit_archiver.preflight.plan import SKEW_S

OLDEST, NEWEST = 11, 18  # the releases that the tests run on
Answers = Iterator[Union[Said, Good]]

CHECKS: list[Check] = []
check = functools.partial(declare, CHECKS)


@dataclass(frozen=True)
class Look:
    """One database to look at: an open session, what the server says of itself, and the physical tables that are meant."""

    connection: connect.Connection
    database: Database
    server: examine.Server
    tables: Sequence[Table] = ()


@check("connection.session", FAIL, "where we are connected, as whom, and whether directly", locks.POOLED_HINT)
def session(look: Look) -> Answers:
    """REQ-VAL-001, REQ-DB-009. A pooler makes up process ids, and the lock that a run holds could not be recognized as its own."""
    database, server = look.database, look.server
    local = not database.host or database.host.startswith("/")
    where = "local socket" if local else f"{database.host}:{database.port}"
    pooled = examine.pooled(look.connection, server)
    if pooled:
        yield Said(locks.POOLED)
    tls = (server.tls or ("" if local else "no TLS")).replace("TLSv", "TLS ")
    known = (f"{where} as {server.user}", tls, f"PostgreSQL {catalog.version(server.version)}", "" if pooled else "no pooler")
    yield Good(", ".join(part for part in known if part))


@check("server.version", FAIL, "PostgreSQL 11 or newer", "upgrade the server")
def version(look: Look) -> Answers:
    """REQ-VAL-008, REQ-PG-008."""
    if look.server.version // 10000 < OLDEST:
        yield Said(f"PostgreSQL {catalog.version(look.server.version)} is older than {OLDEST}")


@check("server.tested", WARN, "PostgreSQL no newer than 18, the newest that this program is tested with",
       "look for a newer audit archiver, or try it on a copy first")
def tested(look: Look) -> Answers:
    """REQ-PG-007, REQ-PG-008."""
    if look.server.version // 10000 > NEWEST:
        yield Said(f"PostgreSQL {catalog.version(look.server.version)} is newer than {NEWEST}, the newest that was tested")


@check("server.primary", FAIL, "the server can be written to", "name the primary as host")
def primary(look: Look) -> Answers:
    """Rows are locked and deleted on the primary only (REQ-DB-008 as ruled)."""
    if look.server.standby:
        yield Said(f"'{look.database.host or 'the local socket'}' is a standby, which cannot delete")


@check("server.encoding", FAIL, "the database has an encoding", "convert the database to UTF8 (pg_dump, createdb --encoding=UTF8, restore)")
def encoding(look: Look) -> Answers:
    """In SQL_ASCII nobody knows what the bytes of a text mean, and JSON is UTF-8 (postgres.md S5)."""
    if look.server.encoding == "SQL_ASCII":
        yield Said("the database's encoding is SQL_ASCII: its texts may be no valid UTF-8")


@check("server.fsync", FAIL, "fsync is on", "set fsync = on, or write 'fsync_off: acknowledged' for this database")
def fsync(look: Look) -> Answers:
    """A crash may bring archived rows back or take others along (postgres.md S2)."""
    if not look.server.fsync:
        accepted = look.database.fsync_off == "acknowledged"
        yield Said("fsync is off: after a crash deleted rows may be back, or others gone", status=WARN if accepted else None,
                   remedy="it is accepted by 'fsync_off: acknowledged'" if accepted else None)


@check("server.full_page_writes", WARN, "full_page_writes is on", "set full_page_writes = on unless the storage writes pages at once")
def full_page_writes(look: Look) -> Answers:
    """A torn page loses rows of any kind."""
    if look.server.fsync and not look.server.full_page_writes:
        yield Said("full_page_writes is off: a crash can tear pages of this table too")


@check("server.synchronous_commit", FAIL, "our sessions commit synchronously", "let the role set synchronous_commit")
def synchronous_commit(look: Look) -> Answers:
    """A commit that is acknowledged before it is on disk would be recorded and lost (postgres.md S2)."""
    if look.server.synchronous_commit not in ("on", "remote_apply"):
        yield Said(f"synchronous_commit stays '{look.server.synchronous_commit}' in our sessions")


@check("server.clock", WARN, "the server's clock and ours agree within 5 minutes", "set both clocks (NTP); cutoffs follow the server's",
       thorough=True)
def clock(look: Look) -> Answers:
    """REQ-TIME-002. A run's plan says the same."""
    skew = eligible.skew_s(look.connection)
    if abs(skew) > SKEW_S:
        yield Said(f"the server's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this host's")


@check("server.slots", WARN, "which logical replication slots will carry the deletes",
       "see that its reader may lose the archived rows, and keeps up")
def slots(look: Look) -> Answers:
    """A slot that nobody reads makes the server keep the WAL of every delete until its disk is full."""
    for slot in examine.slots(look.connection):
        if slot.active:
            yield Said(f"the replication slot '{slot.name}' will carry every delete")
        else:
            yield Said(f"nobody reads from the replication slot '{slot.name}': the server keeps the WAL of every delete for it",
                       f"start its reader, or SELECT pg_drop_replication_slot({literal(slot.name)})")


@check("tables.circle", WARN, "no tables keep each other's rows by foreign keys in a circle",
       "rows that reference each other stay for ever: set one of the columns to NULL in old rows, or drop one of the keys")
def circle(look: Look) -> Answers:
    """REQ-VAL-009."""
    names = [table.label for table in look.tables]
    meant, keeps = set(names), {}  # type: set[str], dict[str, list[str]]
    for child, parent in examine.kept_by(look.connection) if len(names) > 1 else ():
        if child in meant and parent in meant:
            keeps.setdefault(child, []).append(parent)
    told: set[str] = set()
    for name in names:
        found = [] if name in told else _way_back(name, keeps)
        told.update(found)
        if found:
            yield Said(f"{' -> '.join([*found, name])} reference each other in a circle")


@check("role.temporary", FAIL, "the role may make temporary tables", code=exits.PERMISSION)
def temporary(look: Look) -> Answers:
    """The keys of a batch stand in a temporary table."""
    if not look.server.may_temp:
        yield Said(f"role '{look.server.user}' may not make temporary tables in '{look.database.dbname}'",
                   f'GRANT TEMPORARY ON DATABASE "{look.database.dbname}" TO "{look.server.user}"')


@check("role.identity", FAIL, "the role may ask which server this is", code=exits.PERMISSION)
def identity(look: Look) -> Answers:
    """A transaction id means nothing without its server and timeline (postgres.md C1)."""
    if not look.server.may_identify:
        yield Said(f"role '{look.server.user}' may not ask for the server's identity",
                   f'GRANT EXECUTE ON FUNCTION pg_control_system(), pg_control_checkpoint() TO "{look.server.user}"')


def _way_back(start: str, keeps: dict[str, list[str]]) -> list[str]:
    """The tables of a shortest way from `start` along foreign keys back to it; empty if there is none."""
    ways = [[start]]
    seen: set[str] = set()
    while ways:
        way = ways.pop(0)
        for parent in keeps.get(way[-1], ()):
            if parent == start:
                return way
            if parent not in seen:
                seen.add(parent)
                ways.append([*way, parent])
    return []
