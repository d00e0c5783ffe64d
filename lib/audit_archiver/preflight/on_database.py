"""Checks of a server and of our session on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Iterator, Union

from audit_archiver import exits
from audit_archiver.config.model import Database
from audit_archiver.postgres import catalog, connect, examine
from audit_archiver.preflight.check import Check, Good, Said, declare
from audit_archiver.preflight.findings import FAIL, WARN

OLDEST = 110000
Answers = Iterator[Union[Said, Good]]

CHECKS: list[Check] = []
check = functools.partial(declare, CHECKS)


@dataclass(frozen=True)
class Look:
    """One database to look at: an open session and what the server says of itself."""

    connection: connect.Connection
    database: Database
    server: examine.Server


@check("connection.session", FAIL, "where we are connected, as whom, and whether directly",
       "name the server itself as host: locks belong to a session, and a pooler changes sessions")
def session(look: Look) -> Answers:
    """REQ-VAL-001. A pooler makes up process ids, and the lock that a run holds could not be recognized as its own."""
    database, server = look.database, look.server
    local = not database.host or database.host.startswith("/")
    where = "local socket" if local else f"{database.host}:{database.port}"
    if examine.pooled(look.connection, server):
        yield Said("a connection pooler sits between this host and the server")
    tls = server.tls or ("" if local else "no TLS")
    yield Good(", ".join(part for part in (f"{where} as {server.user}", tls, f"PostgreSQL {catalog.version(server.version)}") if part))


@check("server.version", FAIL, "PostgreSQL 11 or newer", "upgrade the server")
def version(look: Look) -> Answers:
    """REQ-VAL-008."""
    if look.server.version < OLDEST:
        yield Said(f"PostgreSQL {catalog.version(look.server.version)} is older than 11")


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
