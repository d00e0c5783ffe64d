"""COMMIT with a deadline, and the check of a sample after it.

COMMIT counts only with the command tag COMMIT. On any doubt (lost connection, deadline) nothing is said about
the batch: the pipeline ends, and recovery decides by the keys in the table and the transaction's status
(postgres.md S1).
"""

from __future__ import annotations

import json
import time
from typing import Any

from audit_archiver import log
from audit_archiver.exits import ArchiverError, Failed, NetworkError
from audit_archiver.formats.batch import name as batch_name
from audit_archiver.holder.batch import Batch
from audit_archiver.holder.operations import Operations
from audit_archiver.points import point
from audit_archiver.postgres import connect

DEADLINE_S = 60.0

_NOW_SQL = "to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"


class InDoubt(NetworkError):
    """COMMIT was sent and its answer is unknown: recovery decides."""


def commit(operations: Operations, line: dict[str, Any], deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """Commit the deleted batch that `line` names and return the line with `committed`.

    Raises Failed if this holder did not delete that batch itself, InDoubt if the answer to COMMIT is unknown.
    """
    batch = _own(operations, line)
    began = time.monotonic()
    with batch.busy:
        _own(operations, line)  # the pipeline may have failed while we waited
        _send(batch, deadline_s)
        line["committed"] = _after(batch, line)
        point("holder.commit.done")
        operations.committed(batch, line)
    operations.spent("delete", time.monotonic() - began)
    return line


def _own(operations: Operations, line: dict[str, Any]) -> Batch:
    """The batch that `line` names, if this holder deleted it and the line is what aa-delete made of it, to the letter."""
    title = batch_name(line["batch"])
    if operations.failure is not None:
        raise Failed(f"{title} is not committed: {operations.failure.msg}")
    txn = line["batch"]["txn"] or {}
    batch = operations.batches.get(txn.get("handle", ""))
    if batch is None or batch.state != "deleted" or txn["holder"] != operations.name:
        raise Failed(f"{title} was not deleted by this holder, so it does not commit it",
                     hint="the line must be what aa-delete wrote in this run")
    if line != {**batch.line, "deleted": batch.deleted}:
        raise Failed(f"the line of {title} was altered after its rows were deleted, so they are not committed",
                     hint="the line must be what aa-delete wrote in this run")
    return batch


def _send(batch: Batch, deadline_s: float) -> None:
    """COMMIT with a deadline: a half-open connection would block for ever."""
    batch.transaction.check()
    try:
        tag = connect.within(batch.transaction.connection, deadline_s, batch.transaction.commit)
    except NetworkError as error:
        raise InDoubt(f"{batch.title}: COMMIT was sent and its answer is unknown; {error.msg}",
                      hint="the next run finds out whether it happened") from None
    if tag != "COMMIT":
        raise Failed(f"{batch.title}: COMMIT was answered with '{tag}', so nothing was deleted")


def unasked(error: ArchiverError) -> str:
    """Why the sample could not be looked for after COMMIT, in words."""
    what = "the control connection broke" if isinstance(error, NetworkError) else "whether its rows are gone could not be asked"
    return f"{what}: {error.msg}"


def _after(batch: Batch, line: dict[str, Any]) -> dict[str, Any]:
    """Time, WAL position and whether the sample is gone, asked on the control connection (REQ-VER-017..020)."""
    sample = [json.dumps(key, ensure_ascii=False, separators=(",", ":"))[1:-1].encode() for key in line["verified"]["sample"]]
    statements = batch.plan.statements
    try:
        at, lsn, present = connect.row(batch.session.control, (
            f"SELECT {_NOW_SQL}, pg_current_wal_lsn()::text, ({statements.present(statements.key_list(sample))})"))
    except ArchiverError as error:
        raise InDoubt(f"{batch.title} is committed, but {unasked(error)}",
                      hint="the next run records it") from None
    if present:
        log.warning("sample.present", f"{present} of {len(sample)} sampled keys of {batch.title} are in the table again after COMMIT",
                    hint="a trigger or a client puts rows back under the same keys")
    else:
        log.debug("sample.absent", f"{len(sample)} sampled keys of {batch.title} are gone from the table", sample=len(sample))
    return {"at": at, "xid": batch.xid, "lsn": lsn, "by": "holder", "sample_absent": not present}
