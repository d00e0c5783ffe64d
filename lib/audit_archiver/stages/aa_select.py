"""Read job lines and write the rows of each batch between two frames, locked in a transaction that the holder keeps.

Reads job lines; writes rows streams (man 5 aa-rows); touches PostgreSQL only. Inside aa-txn or aa-archive the
holder locks the rows (FOR UPDATE SKIP LOCKED) and copies them straight into this command's output, and locks
the next batch meanwhile, unless the job wishes a pause; without a holder each batch is read under one snapshot
and nothing is locked: such batches can only be deleted by aa-delete's guarded path. Run again it selects what
is eligible then: archived rows are gone from the table.
"""

from __future__ import annotations

import select
import time
from typing import Any, BinaryIO, Callable, Generator, NamedTuple, Optional, Protocol, Sequence

from audit_archiver import cli, config, exits, lines, log
from audit_archiver.cli import Command
from audit_archiver.exits import ArchiverError, ConfigError
from audit_archiver.formats import frames, names
from audit_archiver.formats import job as jobs
from audit_archiver.holder.client import Client, JobFailed
from audit_archiver.holder.export import Export
from audit_archiver.points import point

NAME = "aa-select"


class Lender(Protocol):
    """What lends transactions: the holder's client, or an export of our own."""

    def call(self, op: str, descriptor: Optional[int] = None, **fields: Any) -> dict[str, Any]:
        """One named operation."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv, stage=True)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__, reads="job lines")
    parser.add_argument("--rows", action="store_true",
                        help="write bare rows without frames, for people; such rows can never be deleted")
    parser.add_argument("--outcomes", metavar="FILE", type=cli.text,
                        help="without a holder: write to FILE how each job ended, one JSON line per job, once it has ended")
    return parser


def run(command: Command) -> int:
    """Select every job's batches; a job that fails by itself is reported and the next one goes on."""
    if command.holder is not None:
        for flag in ("rows", "outcomes"):
            if getattr(command.args, flag):
                raise ConfigError(f"--{flag} cannot be used inside a transaction holder", hint="run it without AA_TXN")
        ahead = Client(command.env["AA_TXN"], NAME)
        try:
            return _select_all(command, command.holder, ahead=ahead)
        finally:
            ahead.bye(exits.OK, None)
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    export = Export(settings)
    outcomes = None if command.args.outcomes is None else lines.Sink(_created(command.args.outcomes))

    def ended(job: dict[str, Any], error: Optional[ArchiverError]) -> None:
        notes = export.ended(job, error)
        if outcomes is not None:
            outcomes.emit(notes.outcome())

    try:
        code = _select_all(command, export, ended)
        return exits.SOME_FAILED if code == exits.OK and export.left else code
    finally:
        export.close()
        if outcomes is not None:
            outcomes.stream.close()


def _created(path: str) -> BinaryIO:
    try:
        return open(path, "wb", buffering=0)  # type: ignore[return-value]
    except OSError as error:
        raise ConfigError(f"cannot write '{path}': {error.strerror}", hint="--outcomes names a file") from None


def _select_all(command: Command, lender: Lender,
                ended: Callable[[dict[str, Any], Optional[ArchiverError]], None] = lambda job, error: None,
                ahead: Optional[Client] = None) -> int:
    failures: list[ArchiverError] = []
    done = 0
    for line in command.source():
        job = jobs.parse(line)
        log.bind(run_id=job["run"])
        if "refused" in job:
            lender.call("refuse", job=job)
            failures.append(_refused(job))
            ended(job, failures[-1])
            continue
        try:
            if not _select(command, lender, job, ahead):
                break
            done += 1
            ended(job, None)
        except ArchiverError as error:
            # inside a holder it says what belongs to one job; an export's jobs are independent of each other
            if command.holder is not None and not isinstance(error, JobFailed):
                raise
            log.failure("job.failed", f"{jobs.name(job)}: {error.msg}", command.holder is not None, detail=error.detail, hint=error.hint,
                        at=error.at, code=error.code)
            failures.append(error)
            ended(job, error)
    if command.holder is not None or not failures:
        return exits.OK  # the holder has noted each failed job and answers for them
    codes = {error.code for error in failures}
    return exits.SOME_FAILED if done else codes.pop() if len(codes) == 1 else exits.FAILED


def _refused(job: dict[str, Any]) -> ArchiverError:
    why = job["refused"]
    error = ArchiverError(f"{jobs.name(job)} was refused: {why['msg']}", at=why.get("at"))
    error.code = why["code"]
    return error


def _select(command: Command, lender: Lender, job: dict[str, Any], ahead: Optional[Client]) -> bool:
    """All batches of one job, from its cursor until the sweep or its limit ends; False if the holder is draining.

    With `ahead`, which speaks to the holder beside `lender`, each batch is begun and locked while the rows of the one before
    flow. Not where a pause is wished between them: it comes before a transaction begins.
    """
    taken = _all(lender, _take(job, job["cursor"], job["limit"]))
    while taken is not None:
        cursor, left = taken.locked["next"], taken.left
        more = cursor is not None and (left is None or left > 0)
        coming = _Coming(ahead, _take(job, cursor, left)) if more and ahead is not None and not job["sleep_s"] else None
        if taken.locked["rows"]:
            _write(command, lender, job, taken, coming)
        else:
            lender.call("abandon", handle=taken.begun["handle"])
        if not more:
            return True
        if coming is not None:
            taken = coming.result()
        else:
            _sleep(command, job["sleep_s"])
            taken = _all(lender, _take(job, cursor, left))
    return False


class _Taken(NamedTuple):
    """A batch begun and locked; `left` of the job's limit after it."""

    begun: dict[str, Any]
    locked: dict[str, Any]
    left: Optional[int]


Talk = Generator[tuple[str, dict[str, Any]], dict[str, Any], Optional[_Taken]]


def _take(job: dict[str, Any], cursor: Optional[list[str]], left: Optional[int]) -> Talk:
    """Begin and lock the next batch: yields each operation, is sent its answer. None if the holder is draining."""
    begun = yield "begin", {"job": job}
    if begun.get("stop"):
        return None
    point("select.begun")
    limit = begun["rows"] if left is None else min(begun["rows"], left)
    locked = yield "lock", {"handle": begun["handle"], "cursor": cursor, "limit": limit}
    point("select.locked")
    return _Taken(begun, locked, None if left is None else left - locked["rows"])


def _all(lender: Lender, talk: Talk) -> Optional[_Taken]:
    """Have the whole talk with `lender`, waiting for each answer."""
    try:
        op, fields = next(talk)
        while True:
            op, fields = talk.send(lender.call(op, **fields))
    except StopIteration as end:
        return end.value


class _Coming:
    """A talk that goes on whenever its answer is there, beside other work."""

    def __init__(self, client: Client, talk: Talk) -> None:
        self._client, self._talk = client, talk
        self._error: Optional[ArchiverError] = None
        self._taken: Optional[_Taken] = None
        self.over = False
        self._ask(next(talk))

    def fileno(self) -> int:
        """Readable when `go_on` will not wait."""
        return self._client.fileno()

    def go_on(self) -> None:
        """Take the answer and ask the next. An error is kept for `result`: it is not that of the work beside."""
        try:
            self._ask(self._talk.send(self._client.answer()))
        except StopIteration as end:
            self._taken, self.over = end.value, True
        except ArchiverError as error:
            self._error, self.over = error, True

    def result(self) -> Optional[_Taken]:
        """Wait for the end of the talk; raises what ended it."""
        while not self.over:
            self.go_on()
        if self._error is not None:
            raise self._error
        return self._taken

    def _ask(self, request: tuple[str, dict[str, Any]]) -> None:
        self._client.ask(request[0], **request[1])


def _write(command: Command, lender: Lender, job: dict[str, Any], taken: _Taken, coming: Optional[_Coming]) -> None:
    begun, locked = taken.begun, taken.locked
    batch = {
        "id": names.batch_id(job["database"], job["schema"], job["table"], locked["first"], locked["last"], locked["keys_sha256"]),
        "number": begun["number"], **{field: job[field] for field in ("run", "database", "schema", "table", "key", "timestamp", "cutoff")},
        "archived_at": begun["archived_at"],
        **{field: locked[field] for field in ("rows", "skipped_locked", "first", "last", "keys_sha256", "columns")},
        "server": begun["server"], "shape_sha256": locked["shape_sha256"],
        "txn": None if command.holder is None else {"xid": begun["xid"], "holder": command.holder.holder, "handle": begun["handle"]},
    }
    framed = not command.args.rows
    started = time.monotonic()
    if framed:
        command.sink.write(frames.opening(batch, locked["table"]))
    if coming is None or command.holder is None:
        copied = lender.call("copy", command.sink.descriptor(), handle=begun["handle"])
    else:
        copied = _copy(command.holder, command.sink.descriptor(), begun["handle"], coming)
    point("select.copied")
    if framed:
        command.sink.write(frames.closing(batch["id"], copied["rows"], copied["rows_sha256"]))
    log.info("batch.selected", f"{job['schema']}.{job['table']} batch_{batch['number']:03d}: {copied['rows']} rows selected",
             batch=batch["id"], rows=copied["rows"], bytes=copied["bytes"], skipped_locked=locked["skipped_locked"],
             seconds=round(time.monotonic() - started, 3))


def _copy(holder: Client, descriptor: int, handle: str, coming: _Coming) -> dict[str, Any]:
    """Have the rows copied; meanwhile `coming` goes on."""
    holder.ask("copy", descriptor, handle=handle)
    while not coming.over:
        ready, _, _ = select.select([holder, coming], [], [])
        if holder in ready:
            break
        coming.go_on()
    return holder.answer()


def _sleep(command: Command, seconds: float) -> None:
    """The pause between two batches of a table, before a transaction begins; ends at once with the reader (REQ-ARC-010)."""
    if seconds > 0:
        lines.pause(command.sink.descriptor(), seconds)
