"""Run a command of somebody else's under the lock of a database or table, show who holds the lock, or break it.

`aa-lock -- COMMAND` keeps every aa- command out of the database, or of the tables named, while COMMAND runs; it ends with
COMMAND's exit code. The lock is a PostgreSQL advisory lock of a session, which the server frees when the session is gone,
and with `locking.backend: redis` or `file` a record there too. The aa- commands take the lock themselves: inside aa-lock
they exit 4 and say so. Reads and writes no table.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import threading
from typing import Any, Optional, Sequence

from audit_archiver import cli, config, exits, log
from audit_archiver.cli import Command
from audit_archiver.config.model import Config, Database, Table
from audit_archiver.exits import ArchiverError, ConfigError, Failed, NetworkError
from audit_archiver.locking.lock import Lock, backend, name
from audit_archiver.locking.record import Record
from audit_archiver.postgres import connect, lock_holders, locks
from audit_archiver.preflight.plan import Selection, selected

NAME = "aa-lock"
END_GRACE_S = 10.0

Chosen = list[tuple[Database, Optional[list[Table]]]]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv, own_signals=True)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    parser.add_argument("--database", metavar="DB", action="append", default=[], type=cli.text,
                        help="this database only; may be repeated (default: every configured one)")
    parser.add_argument("--table", metavar="[SCHEMA.]TABLE", action="append", default=[], type=cli.text,
                        help="this table only, not the whole database; may be repeated")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="say who holds the lock, and since when")
    what.add_argument("--break", action="store_true", dest="break_",
                      help="end the sessions that hold the lock and remove its records; asks on a terminal")
    parser.add_argument("--output", choices=("text", "json"),
                        help="form of what --show and --break write (default: text on a terminal, json elsewhere)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments, after --")
    return parser


def run(command: Command) -> int:
    """Show, break, or lock and run."""
    args = command.args
    argv = args.command[1:] if args.command[:1] == ["--"] else args.command
    if bool(argv) == (args.show or args.break_):
        raise ConfigError("give a command after --, or --show, or --break", hint=f"see '{NAME} --help'")
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    found = selected(settings, Selection(databases=tuple(args.database), tables=tuple(args.table)))
    chosen: Chosen = [(database, tables if args.table else None) for database, tables in found]
    if argv:
        return _run_locked(command, settings, chosen, argv)
    if args.show:
        _tell(command, [look(settings, *each) for each in chosen])
        return exits.OK
    return _break(command, settings, chosen)


def _run_locked(command: Command, settings: Config, chosen: Chosen, argv: list[str]) -> int:
    taken: list[Lock] = []
    try:
        for database, tables in chosen:
            control = connect.connect(database, purpose=locks.AA_LOCK)
            try:
                lock = Lock(settings, database, control)
                lock.take(None if tables is None else {_oid(control, table): table.label for table in tables})
            except BaseException:
                control.close()
                raise
            taken.append(lock)
            log.info("lock.taken", f"{lock.title if tables is None else ', '.join(table.label for table in tables)} is locked",
                     database=database.name)
        code = _Child(argv, command.env, taken, settings.locking.heartbeat_s).wait()
    finally:
        for lock in taken:
            lock.release()
    if code:
        log.error("lock.command", f"'{os.path.basename(argv[0])}' ended with {code}, which is its own exit code: the lock was held until then",
                  code=code)
    return code


class _Child:
    """The command under the lock. Signals are passed on to it; it is ended if the lock is lost."""

    def __init__(self, argv: list[str], env: Any, locks: list[Lock], heartbeat_s: float) -> None:
        self._locks, self._heartbeat_s = locks, heartbeat_s
        try:
            self._process = subprocess.Popen(argv, env=dict(env))
        except OSError as error:
            raise ConfigError(f"cannot run '{argv[0]}': {error.strerror}") from None
        self._ended, end = os.pipe()
        threading.Thread(target=self._reap, args=(end,), name="command", daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            for signum in cli.STOP_SIGNALS:
                signal.signal(signum, self._pass_on)

    def wait(self) -> int:
        """The command's exit code, 128 + n if a signal ended it. Raises NetworkError if the lock was lost meanwhile."""
        poller = select.poll()
        poller.register(self._ended, select.POLLIN)
        for lock in self._locks:
            poller.register(lock.control.fileno(), select.POLLIN)
        try:
            while True:
                ready = [descriptor for descriptor, _ in poller.poll(self._heartbeat_s * 1000)]
                if self._ended in ready:
                    code = self._process.wait()
                    return 128 - code if code < 0 else code
                for lock in self._locks:
                    lock.beat()
        except ArchiverError as error:
            self._end()
            raise NetworkError(f"the lock was lost while the command ran: {error.msg}",
                               hint="the command was ended; another run may have begun") from None
        finally:
            os.close(self._ended)

    def _reap(self, end: int) -> None:
        self._process.wait()
        os.close(end)

    def _pass_on(self, signum: int, _frame: Any) -> None:
        """A terminal's Ctrl-C reaches the command by itself."""
        if self._process.poll() is None and not (signum == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()):
            self._process.send_signal(signum)

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def look(settings: Config, database: Database, tables: Optional[list[Table]]) -> dict[str, Any]:
    """Who holds the keys of one database and the records of its locks, as the report has it."""
    control = connect.connect(database, purpose="show")
    try:
        found = _holders(control, tables)
    finally:
        control.close()
    limit, stale = settings.locking.lock_timeout_minutes * 60, settings.locking.stale_s
    return {"database": database.name, "backend": settings.locking.backend,
            "holders": [{**each.as_json(), "words": each.words, "overdue": each.age_s > limit, "stale": (each.heartbeat_age_s or 0) > stale}
                        for each in found],
            "records": [{**each.as_json(), "words": each.words, "stale": each.heartbeat_age_s > stale}
                        for each in _records(settings, database, tables)]}


def _records(settings: Config, database: Database, tables: Optional[list[Table]]) -> list[Record]:
    kept, whole = backend(settings), name(settings, database)
    if kept is None:
        return []
    meant = {name(settings, database, table.label) for table in tables or ()}
    return [each for each in kept.look(whole) if tables is None or each.name == whole or each.name in meant]


def _break(command: Command, settings: Config, chosen: Chosen) -> int:
    """End every session that holds a key, without which the server frees the lock and rolls its transaction back; remove every record."""
    report = [look(settings, *each) for each in chosen]
    found = [each["words"] for part in report for each in part["holders"] + part["records"]]
    question = "".join(f"{words}\n" for words in found) + _question(*(sum(len(each[kind]) for each in report) for kind in ("holders", "records")))
    if found and sys.stdin is not None and sys.stdin.isatty() and command.stdin is not None and not cli.agreed(question, sys.stdin, sys.stderr):
        raise Failed("nothing was ended")
    for part, (database, tables) in zip(report, chosen):
        _end_sessions(part["holders"], database, tables)
        for record in part["records"]:
            kept = backend(settings)
            record["ended"] = kept is not None and kept.release(record["name"], record["token"])
            if record["ended"]:
                log.warning("lock.broken", f"{database.name}: the lock record '{record['name']}' was removed; its owner deletes nothing any more",
                            token=record["token"])
    _tell(command, report)
    return exits.OK


def _end_sessions(holders: list[dict[str, Any]], database: Database, tables: Optional[list[Table]]) -> None:
    pids = [holder["pid"] for holder in holders]
    control = connect.connect(database, purpose="break")
    try:
        ended: list[int] = []
        for label in [None] if tables is None else [table.label for table in tables]:
            ended += lock_holders.end(control, pids, label) if pids else []
    finally:
        control.close()
    for holder in holders:
        holder["ended"] = holder["pid"] in ended
        if holder["ended"]:
            log.warning("lock.broken", f"{database.name}: backend {holder['pid']} ('{holder['application']}') was ended; "
                        "what it had not committed is rolled back", pid=holder["pid"])


def _question(sessions: int, records: int) -> str:
    wanted = [f"end {sessions} session{'s' * (sessions > 1)}"] * bool(sessions) + [f"remove {records} record{'s' * (records > 1)}"] * bool(records)
    return f"{' and '.join(wanted)}?"


def _tell(command: Command, report: list[dict[str, Any]]) -> None:
    if command.args.quiet:
        return
    if not command.as_text:
        command.sink.emit({"format": "aa-lock", "version": 1, "databases": [
            {**each, **{kind: [{key: value for key, value in one.items() if key != "words"} for one in each[kind]]
                        for kind in ("holders", "records")}} for each in report]})
        return
    for each in report:
        lines = [shown(each["database"], holder) for holder in each["holders"]]
        lines += [f"{each['database']}: record '{record['name']}' in {each['backend']}: {record['words']}{_mark(record)}"
                  for record in each["records"]]
        command.sink.write("".join(f"{line}\n" for line in lines or [f"{each['database']}: not locked"]).encode())


def shown(database: str, holder: dict[str, Any]) -> str:
    """The line of one session for a person."""
    place = f"{database}: " + (f"table {holder['table']} " if holder["table"] else "")
    return f"{place}{holder['words']}{_mark(holder)}"


def _mark(found: dict[str, Any]) -> str:
    if found.get("ended"):
        return " - ended"
    if found["stale"]:
        return " - stale: the next run takes it over"
    return " - longer than locking.lock_timeout_minutes" if found.get("overdue") else ""


def _holders(control: connect.Connection, tables: Optional[list[Table]]) -> list[lock_holders.Holder]:
    if tables is None:
        return lock_holders.holders(control)
    found = [holder for table in tables for holder in lock_holders.holders(control, table.label)]
    return list(dict.fromkeys(found))


def _oid(control: connect.Connection, table: Table) -> int:
    found = connect.rows(control, "SELECT c.oid::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                         "WHERE n.nspname = %s AND c.relname = %s", (table.schema, table.name))
    if not found:
        raise ConfigError(f"table '{table.label}' does not exist", at=table.at)
    return int(found[0][0])
