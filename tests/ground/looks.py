"""What the checks of a preflight say of a test's database: look at it, and name what is not well."""

from __future__ import annotations

from typing import Any

from audit_archiver.config.model import Database, Table
from audit_archiver.postgres import connect
from audit_archiver.preflight import checks
from audit_archiver.preflight.findings import OK, Finding

LOGS = Table("audit_logs", "created_at", ("id",), at="prod.yaml:7")


def database(db: Any, *configured: Table, user: str = "archiver", **values: Any) -> Database:
    """The configuration of a test database with these tables (default: audit_logs)."""
    return Database(**{"name": db.name, "host": db.host, "port": db.port, "user": user, "fsync_off": "acknowledged",
                       "tables": configured or (LOGS,), "at": "prod.yaml:4", **values})


def look(made: Database, thorough: bool = True, force: bool = False) -> list[Finding]:
    """What the checks say of a database and its tables."""
    session = connect.connect(made, purpose="test")
    try:
        return checks.of_database(session, made, made.tables, thorough=thorough, force=force)
    finally:
        session.close()


def bad(found: list[Finding]) -> list[tuple[str, str]]:
    """(check, status) of what is not well, without the test server's fsync."""
    return [(each.check, each.status) for each in found if each.status != OK and each.check != "server.fsync"]


def only(found: list[Finding], check: str, status: str) -> Finding:
    """The one finding of a check that is not well; nothing else may be."""
    assert bad(found) == [(check, status)]
    return next(each for each in found if each.check == check)
