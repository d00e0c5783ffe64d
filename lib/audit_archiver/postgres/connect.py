"""Connections to PostgreSQL with a pinned session, and its errors in the words of `exits`.

Every session pins what changes the text of a value or the meaning of a commit (postgres.md C8, S2, S6): the
server's, database's and role's settings and PGOPTIONS must not win. Sessions run in autocommit; BEGIN and
COMMIT are sent as statements, because psycopg2 after execute('commit') sends no BEGIN any more (C4).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any, Callable, Iterator, Optional, Sequence, TypeVar

import psycopg2
import psycopg2.extensions
import psycopg2.extras

from audit_archiver import exits, log
from audit_archiver.config.model import Database

Connection = psycopg2.extensions.connection
Answer = TypeVar("Answer")

CONNECT_TIMEOUT_S = 10
WORK_MEM = "64MB"  # one batch's sort and key digest in memory instead of a spill per batch

PINS = {
    "timezone": "UTC", "datestyle": "ISO, MDY", "intervalstyle": "postgres", "extra_float_digits": "3",
    "bytea_output": "hex", "lc_monetary": "C", "xmloption": "content", "array_nulls": "on",
    "search_path": "pg_catalog", "row_security": "off", "jit": "off", "default_transaction_read_only": "off",
    "default_transaction_isolation": "read committed", "standard_conforming_strings": "on",
    "transform_null_equals": "off", "quote_all_identifiers": "off", "client_min_messages": "warning",
    "work_mem": WORK_MEM, "enable_tidscan": "on",
}

_PIN_SQL = "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS p(name, value)"
_SET_AS_WE_CAN_SQL = """
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') <> 'remote_apply';
SELECT set_config('session_replication_role', 'origin', false) WHERE current_setting('session_replication_role') <> 'origin';
"""


def connect(database: Database, *, purpose: str, run: Optional[str] = None, transaction_timeout_s: float = 0,
            statement_timeout_s: float = 0) -> Connection:
    """Open a pinned autocommit session on `database`; `application_name` says the purpose and the run.

    `transaction_timeout_s` makes the server itself end a transaction that we, frozen, cannot end any more
    (REQ-TXN-007); 0 is none. Raises NetworkError, PermissionDenied, ResourceError or ConfigError.
    """
    name = f"audit-archiver {purpose}" + (f" {run}" if run else "")
    with errors(database):
        connection = psycopg2.connect(
            host=database.host, port=database.port, user=database.user, dbname=database.dbname,
            password=database.password.reveal() if database.password else None,
            application_name=name[:63], connect_timeout=CONNECT_TIMEOUT_S, client_encoding="UTF8",
            keepalives=1, keepalives_idle=30, keepalives_interval=10, keepalives_count=3,
            options="", **_tls(database))
    try:
        connection.autocommit = True
        with errors(database), connection.cursor() as cursor:
            timeouts = {"lock_timeout": database.lock_timeout_s, "statement_timeout": statement_timeout_s or transaction_timeout_s,
                        "idle_in_transaction_session_timeout": transaction_timeout_s}
            if connection.server_version >= 140000:
                timeouts["idle_session_timeout"] = 0
            if connection.server_version >= 170000:
                timeouts["transaction_timeout"] = transaction_timeout_s
            pins = {**PINS, **{key: f"{int(seconds * 1000)}ms" for key, seconds in timeouts.items()}}
            cursor.execute(_PIN_SQL, (list(pins), list(pins.values())))
            cursor.execute(_SET_AS_WE_CAN_SQL)
    except BaseException:
        connection.close()
        raise
    return connection


def parse_dsn(dsn: str) -> dict[str, str]:
    """The parts of a connection string, either form of it, by libpq's names. Raises ConfigError, without its text: it may hold a password."""
    try:
        return {name: str(value) for name, value in psycopg2.extensions.parse_dsn(dsn).items()}
    except psycopg2.ProgrammingError:
        raise exits.ConfigError("the connection string cannot be read",
                                hint="write postgresql://USER@HOST:PORT/DATABASE or 'host=... dbname=...'") from None


def within(connection: Connection, seconds: float, work: Callable[[], Answer]) -> Answer:
    """`work()`, which waits for the server on `connection`, or NetworkError when there is no answer in time (S1).

    The connection is then cut, which ends the wait. psycopg2's own cancel() is no way out: it keeps the whole
    process from running for as long as the network keeps silent.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        cut(connection)
        thread.join()
        if isinstance(outcome[0], exits.ArchiverError):
            raise exits.NetworkError(f"PostgreSQL did not answer within {seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def cut(connection: Connection) -> None:
    """Break a connection off without a word to the server: whoever waits for an answer on it is woken."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)
    except (psycopg2.Error, OSError) as error:
        log.debug("connection.cut", f"the connection was gone already: {type(error).__name__}")


def _tls(database: Database) -> dict[str, str]:
    wanted = {"sslmode": database.sslmode, "sslrootcert": database.sslrootcert, "sslcert": database.sslcert, "sslkey": database.sslkey}
    return {key: value for key, value in wanted.items() if value}


def rows(connection: Connection, sql: str, args: Optional[Sequence[Any]] = None) -> list[tuple[Any, ...]]:
    """All rows of one statement."""
    with errors(), connection.cursor() as cursor:
        cursor.execute(sql, args)
        return cursor.fetchall()


def row(connection: Connection, sql: str, args: Optional[Sequence[Any]] = None) -> tuple[Any, ...]:
    """The one row of a statement."""
    found = rows(connection, sql, args)
    if len(found) != 1:
        raise exits.Failed(f"a statement that gives one row gave {len(found)}")
    return found[0]


def scalar(connection: Connection, sql: str, args: Optional[Sequence[Any]] = None) -> Any:
    """The one value of a statement."""
    return row(connection, sql, args)[0]


def execute(connection: Connection, sql: str, args: Optional[Sequence[Any]] = None) -> str:
    """Run one statement and return its command tag."""
    with errors(), connection.cursor() as cursor:
        cursor.execute(sql, args)
        return cursor.statusmessage or ""


@contextlib.contextmanager
def errors(database: Optional[Database] = None) -> Iterator[None]:
    """Turn psycopg2's errors into the project's; never with row content: DETAIL and data errors stay unsaid."""
    try:
        yield
    except psycopg2.Error as error:
        raise _translated(error, database) from None


_CLASSES = {
    "42501": exits.PermissionDenied, "28000": exits.PermissionDenied, "28P01": exits.PermissionDenied,
    "55P03": exits.Retryable, "40001": exits.Retryable, "40P01": exits.Retryable, "57014": exits.Retryable,
    "3D000": exits.ConfigError, "25006": exits.ConfigError, "53300": exits.NoConnectionFree,
    "25P03": exits.NetworkError, "25P04": exits.NetworkError,
    "57P01": exits.NetworkError, "57P02": exits.NetworkError, "57P03": exits.NetworkError, "57P05": exits.NetworkError,
}
_HINTS = {
    "55P03": "another session holds the lock; it is tried again later",
    "57014": "statement_timeout or a cancel ended it; a smaller batch_size helps",
    "25006": "this is a standby or a read-only database; name the primary as host",
    "42501": "grant the role what the message names, or use another role",
    "53300": "raise max_connections or lower in_flight_batches",
}
_SAYING_CLASSES = ("08", "25", "28", "3D", "3F", "40", "42", "53", "55", "57", "0A")


def _translated(error: psycopg2.Error, database: Optional[Database]) -> exits.ArchiverError:
    state = error.pgcode
    if state is None:
        return _without_state(error, database)
    kind = _CLASSES.get(state) or (exits.ResourceError if state.startswith("53") else
                                   exits.NetworkError if state.startswith("08") else exits.Failed)
    diag = error.diag
    said = diag.message_primary if state[:2] in _SAYING_CLASSES else None
    if state.startswith("23") and diag.constraint_name:
        said = f"constraint '{diag.constraint_name}' of '{diag.schema_name}.{diag.table_name}' is violated"
    words = said or f"{type(error).__name__} (its text could hold row content and is left out)"
    return kind(f"PostgreSQL says: {words}", sqlstate=state, hint=_HINTS.get(state), at=getattr(database, "at", None))


def _without_state(error: psycopg2.Error, database: Optional[Database]) -> exits.ArchiverError:
    """An error without SQLSTATE: while connecting, or the connection broke."""
    if database is None:
        return exits.NetworkError("the connection to PostgreSQL broke", hint="what was not committed is rolled back")
    text = " ".join(str(error).split())
    where = f"'{database.name}' ({database.host or 'local socket'}:{database.port or 5432} as {database.user})"
    if "FATAL" in text:
        said = text.partition("FATAL:")[2].strip() or text
        if "does not exist" in said and "database" in said:
            return exits.ConfigError(f"cannot connect to database {where}: {said}", at=database.at)
        if "too many" in said or "remaining connection slots" in said:
            return exits.NoConnectionFree(f"cannot connect to database {where}: {said}", at=database.at, hint=_HINTS["53300"])
        if "starting up" in said or "shutting down" in said or "recovery" in said:
            return exits.NetworkError(f"cannot connect to database {where}: {said}", at=database.at)
        return exits.PermissionDenied(f"cannot connect to database {where}: {said}", at=database.at,
                                      hint="check user, password and pg_hba.conf")
    return exits.NetworkError(f"cannot connect to database {where}: {text}", at=database.at,
                              hint="check host, port and that the server runs")
