"""Questions of a plan: the cutoff by the server's clock, how many rows are eligible, how many never will be.

Nothing here writes or locks. Times are text made by the server, in UTC (REQ-ARC-005, REQ-TIME-001, S16).
"""

from __future__ import annotations

import time

from audit_archiver.postgres import connect, rows_sql
from audit_archiver.postgres.catalog import Shape
from audit_archiver.postgres.rows_sql import Window

_CUTOFF_SQL = """
SELECT to_char((now() - make_interval(days => %s)) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
"""


GONE_CHECK = "2s"


def only_read(connection: connect.Connection) -> None:
    """Make the session read-only, so that a plan cannot write even by mistake.

    A count may take long, so the server looks now and then whether we are still there (it can from 14 on).
    """
    connect.execute(connection, "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
    if connection.server_version >= 140000:
        connect.execute(connection, f"SET client_connection_check_interval = '{GONE_CHECK}'")


def cutoff(connection: connect.Connection, days: int) -> str:
    """The server's now() minus `days`, which are retention and safety buffer together (REQ-ARC-001, 004, 005)."""
    return connect.scalar(connection, _CUTOFF_SQL, (days,))


def skew_s(connection: connect.Connection) -> float:
    """Seconds by which the server's clock is ahead of ours; half of the round trip is taken off (REQ-TIME-002)."""
    before = time.time()
    theirs = connect.scalar(connection, "SELECT extract(epoch FROM clock_timestamp())::float8")
    return theirs - (before + time.time()) / 2


def count(connection: connect.Connection, shape: Shape, window: Window) -> int:
    """How many rows are eligible now."""
    return connect.scalar(connection, rows_sql.count(shape, window))


def estimate(connection: connect.Connection, shape: Shape, window: Window) -> int:
    """How many rows the server's planner thinks are eligible; as good as the last ANALYZE, and quick."""
    sql = f"EXPLAIN (FORMAT JSON) SELECT FROM ONLY {shape.qualified} t WHERE {rows_sql.predicate(shape, window)}"
    return int(connect.scalar(connection, sql)[0]["Plan"]["Plan Rows"])


def left_in_place(connection: connect.Connection, shape: Shape) -> tuple[int, int]:
    """How many rows have a NULL and how many an infinite timestamp: they never become eligible (T7)."""
    nulls, infinite = connect.row(connection, rows_sql.never_eligible(shape))
    return nulls, infinite
