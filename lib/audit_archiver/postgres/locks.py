"""The two advisory keys of a lock scope (design, section 3; postgres.md C2, C3).

K1 is the driver's session lock on its control connection. K2 is taken shared by every batch transaction; a
starting driver takes it exclusively for a moment, which proves that no transaction of an earlier driver is
alive. The scope is a database, or tables of it; both scopes meet at the database's own key, so that a run per
table and a run per database exclude each other.

Each session has a fencing token: a transaction id that the server hands out while it holds its first lock, so that of two
sessions the later one has the larger. It stands behind the ` #` in the session's application_name, where the
transaction that deletes looks for it. A session that has been idle longer than `stale_s` holds a stale lock: its
owner has missed every heartbeat, and who starts next ends it.
"""

from __future__ import annotations

import time
from typing import Optional, Sequence

from audit_archiver import log
from audit_archiver.exits import ArchiverError, ConfigError, Failed, LockHeld, PermissionDenied
from audit_archiver.postgres import connect

K1_CLASS = 0x61610001
K2_CLASS = 0x61610002
DATABASE = 0
SETTLE_S = 4.0
GONE_WITHIN_S = 10.0
LOOK_EVERY_S = 0.05
NAME_BYTES = 63  # of an application_name
POOLED = "a connection pooler sits between this host and the server"
POOLED_HINT = "name the server itself as host: locks belong to a session, and a pooler changes sessions"
ENDED = "it ended just now; try again"
AA_LOCK = "aa-lock"  # the purpose of its connection: who meets that lock is told why

_SESSION = """
SELECT a.pid, split_part(a.application_name, ' #', 1), coalesce(host(a.client_addr), 'local socket'), a.usename,
       to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), a.state
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
"""

_WHO_SQL = _SESSION + """
WHERE l.locktype = 'advisory' AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.classid = %s AND l.objid = %s AND l.objsubid = 2 AND l.pid <> pg_backend_pid() ORDER BY a.backend_start LIMIT 1
"""

# whoever holds K2 of the database and of no table: a transaction of a run whose scope was the whole database
_WHOLE_DATABASE_SQL = _SESSION + """
WHERE l.locktype = 'advisory' AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.classid = %s AND l.objid = %s AND l.objsubid = 2 AND NOT EXISTS (
    SELECT FROM pg_locks t WHERE t.locktype = 'advisory' AND t.granted AND t.pid = l.pid AND t.database = l.database
      AND t.classid = %s AND t.objid <> %s AND t.objsubid = 2)
ORDER BY a.backend_start LIMIT 1
"""

# of those that hold the key, who has said nothing for so long; what another role's session does is not shown, and then it is never stale
_STALE_SQL = _SESSION + """
WHERE l.locktype = 'advisory' AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.classid = %s AND l.objid = %s AND l.objsubid = 2 AND l.pid <> pg_backend_pid()
  AND a.state LIKE 'idle%%' AND a.state_change < clock_timestamp() - %s * interval '1 second' ORDER BY a.backend_start
"""

_HELD_SQL = """
SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.mode = 'ExclusiveLock'
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.classid = %s AND l.objid = %s AND l.objsubid = 2 AND l.pid = %s AND split_part(a.application_name, ' #', 2) = %s
"""


def take(control: connect.Connection, table_oids: Optional[Sequence[int]], what: str, stale_s: Optional[float] = None) -> int:
    """Take K1 of the scope and prove with K2 that nobody's transaction is left; the token. Raises LockHeld naming who it is.

    `table_oids` None is the whole database, which `what` names. The locks live until `control` closes. Who holds one and has
    given no sign of life for `stale_s` seconds is ended, with its transactions (REQ-LOCK-016). Raises ConfigError
    before anything is locked if a pooler sits between: the lock would stay with a session that is anybody's (T41).
    """
    require_own_session(control)
    if table_oids is None:
        broken = _k1(control, "pg_try_advisory_lock", DATABASE, what, stale_s)
        _k2(control, DATABASE, what, broken)
        return _mark(control)
    broken = _k1(control, "pg_try_advisory_lock_shared", DATABASE, what, stale_s)
    whole = _WHOLE_DATABASE_SQL, (K2_CLASS, DATABASE, K2_CLASS, DATABASE)
    while (found := connect.rows(control, *whole)) and broken:
        end(control, [found[0][0]])
    if found:
        raise LockHeld(f"a transaction of an earlier run of the whole database is still open, which may touch {what}: {_words(found[0])}",
                       hint="wait until it ends, or end it with 'aa-lock --break'")
    for oid in sorted(table_oids):
        broken = _k1(control, "pg_try_advisory_lock", oid, f"table {oid} of {what}", stale_s)
        _k2(control, oid, f"table {oid} of {what}", broken)
    return _mark(control)


def untake(control: connect.Connection, table_oid: Optional[int]) -> None:
    """Give K1 of one table, or of the database, back at once: nothing was begun under it."""
    connect.scalar(control, "SELECT pg_advisory_unlock(%s, %s)", (K1_CLASS, _int4(DATABASE if table_oid is None else table_oid)))


def require_own_session(control: connect.Connection) -> None:
    """Raise ConfigError if a pooler lends us its backends: it makes up the process id that it tells us."""
    if connect.scalar(control, "SELECT pg_backend_pid()") != control.info.backend_pid:
        raise ConfigError(POOLED, hint=POOLED_HINT)


def give_up(control: connect.Connection, table_oids: Optional[Sequence[int]], seconds: float) -> None:
    """Release K1, after waiting at most `seconds` until no transaction of the scope holds K2 any more.

    A cancelled transaction takes a moment to end, and so does the session of a connection that was closed. Who
    starts next shall not be refused because of either (REQ-LOCK-014).
    """
    deadline = time.monotonic() + seconds
    for objid in (DATABASE,) if table_oids is None else table_oids:
        while not connect.scalar(control, "SELECT pg_try_advisory_lock(%s, %s)", (K2_CLASS, _int4(objid))) and time.monotonic() < deadline:
            time.sleep(0.01)
    connect.execute(control, "SELECT pg_advisory_unlock_all()")


def release(control: connect.Connection, table_oids: Optional[Sequence[int]]) -> None:
    """Give up what `take` took and close the connection: of one that is merely closed, the server may hear only after who comes next."""
    try:
        connect.within(control, SETTLE_S, lambda: give_up(control, table_oids, SETTLE_S / 2))
    except ArchiverError as error:
        log.debug("control.close", f"the control connection was gone already: {error.msg}")
    control.close()


def enter(batch: connect.Connection, table_oid: Optional[int], what: str) -> None:
    """Take K2 shared in the batch's transaction, until it ends. Raises LockHeld while a driver is starting."""
    for objid in (DATABASE,) if table_oid is None else (table_oid, DATABASE):  # the table first: see take()
        if not connect.scalar(batch, "SELECT pg_try_advisory_xact_lock_shared(%s, %s)", (K2_CLASS, _int4(objid))):
            raise LockHeld(f"another run is starting in {what}: {_who(batch, K2_CLASS, objid)}")


def still_held(batch: connect.Connection, control_pid: int, token: int, table_oid: Optional[int]) -> bool:
    """True if the backend `control_pid` still holds K1 of the scope under `token`: asked in the transaction that deletes."""
    objid = DATABASE if table_oid is None else table_oid
    return connect.scalar(batch, _HELD_SQL, (K1_CLASS, objid, control_pid, str(token))) > 0


def holder(connection: connect.Connection, table_oid: Optional[int] = None) -> Optional[str]:
    """Who holds K1 of the scope, in words, or None."""
    found = connect.rows(connection, _WHO_SQL, (K1_CLASS, DATABASE if table_oid is None else table_oid))
    return _words(found[0]) if found else None


def end(connection: connect.Connection, pids: Sequence[int]) -> None:
    """End these sessions and wait until the server has freed what they held.

    Raises PermissionDenied without the role's membership or pg_signal_backend, Failed if one does not go.
    """
    for pid in pids:
        connect.scalar(connection, "SELECT pg_terminate_backend(%s)", (pid,))
    deadline = time.monotonic() + GONE_WITHIN_S
    while left := connect.rows(connection, "SELECT pid FROM pg_stat_activity WHERE pid = ANY(%s) ORDER BY pid", (list(pids),)):
        if time.monotonic() > deadline:
            raise Failed(f"backend {left[0][0]} was told to end and is still there", hint="look at it in pg_stat_activity; try again")
        time.sleep(LOOK_EVERY_S)


def _mark(control: connect.Connection) -> int:
    """The session's token, in sight of everybody: behind its name. It stays the same for the tables that are taken later: other
    threads delete meanwhile, under what was taken first."""
    name, _, given = connect.scalar(control, "SELECT current_setting('application_name')").partition(" #")
    if given:
        return int(given)
    token = int(connect.scalar(control, "SELECT txid_current()"))
    mark = f" #{token}"
    connect.scalar(control, "SELECT set_config('application_name', %s, false)", (name[:NAME_BYTES - len(mark)] + mark,))
    return token


def _k1(control: connect.Connection, function: str, objid: int, what: str, stale_s: Optional[float]) -> bool:
    """Take the key; True if a stale holder was ended for it."""
    broken = False
    while not connect.scalar(control, f"SELECT {function}(%s, %s)", (K1_CLASS, _int4(objid))):
        stale = connect.rows(control, _STALE_SQL, (K1_CLASS, objid, stale_s)) if stale_s else []
        if not stale:
            raise _held(control, objid, what)
        _break(control, stale[0], what, stale_s)
        broken = True
    return broken


def _break(control: connect.Connection, stale: tuple[object, ...], what: str, stale_s: Optional[float]) -> None:
    log.warning("lock.stale", f"{what} is locked by a run that has given no sign of life for {stale_s:g} s, so its session is ended: {_words(stale)}",
                hint="what it had not committed is rolled back; if it wakes up it deletes nothing")
    try:
        end(control, [int(str(stale[0]))])
    except PermissionDenied as error:
        raise LockHeld(f"{what} is locked by a run that has given no sign of life, and its session cannot be ended: {_words(stale)}",
                       detail=error.msg, hint="end it as its own role, or grant pg_signal_backend") from None


def _held(control: connect.Connection, objid: int, what: str) -> LockHeld:
    who = _who(control, K1_CLASS, objid)
    if f"'audit-archiver {AA_LOCK}" in who:
        return LockHeld(f"{what} is locked by aa-lock: {who}",
                        hint="aa-lock is for foreign commands; the aa- commands take the lock themselves: run them outside it")
    return LockHeld(f"{what} is locked by another run: {who}", hint="wait for it; 'aa-lock --show' names it, 'aa-lock --break' ends it")


def _k2(control: connect.Connection, objid: int, what: str, broken: bool) -> None:
    """Prove that nobody's transaction is left; those of a holder that was `broken` are ended too: K1 is ours, so nobody else has any."""
    while not connect.scalar(control, "SELECT pg_try_advisory_lock(%s, %s)", (K2_CLASS, _int4(objid))):
        found = connect.rows(control, _WHO_SQL, (K2_CLASS, objid))
        if not (broken and found):
            raise LockHeld(f"a transaction of an earlier run is still open in {what}: {_words(found[0]) if found else ENDED}",
                           hint="wait until it ends, or end it with 'aa-lock --break'")
        end(control, [row[0] for row in found])
    connect.scalar(control, "SELECT pg_advisory_unlock(%s, %s)", (K2_CLASS, _int4(objid)))


def _who(connection: connect.Connection, classid: int, objid: int) -> str:
    found = connect.rows(connection, _WHO_SQL, (classid, objid))
    return _words(found[0]) if found else ENDED


def _words(row: tuple[object, ...]) -> str:
    pid, application, address, user, since, state = row
    return f"backend {pid} ('{application}', {user} from {address}, since {since}, {state})"


def _int4(oid: int) -> int:
    """Advisory keys are signed, oids are not; pg_locks shows both unsigned."""
    return oid - (1 << 32) if oid >= 1 << 31 else oid
