"""What a restore would do, asked in a read-only transaction and without a temporary table: it can write nothing (T46)."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence

from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import ArchiverError, InputError, Mismatch
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.postgres import connect, witness
from audit_archiver.postgres.quoting import literal
from audit_archiver.restore import verified
from audit_archiver.restore.load import Outcome
from audit_archiver.restore.statements import Statements, conflict_fields


def rehearse(store: Store, connection: connect.Connection, batches: Sequence[Batch], resolution: str,
             statements_of: Callable[[dict[str, Any]], Optional[Statements]], done: Callable[[Outcome], None]) -> None:
    """Read and prove every batch, and compare its rows with the table's; `done` hears what would become of each.

    `statements_of` gives None where there is no table yet to compare with.
    """
    for batch in batches:
        try:
            done(_one(store, connection, batch, resolution, statements_of))
        except (InputError, Mismatch, NotFound) as error:
            done(Outcome((batch,), rows=batch.rows or 0, failure=error))


def _one(store: Store, connection: connect.Connection, batch: Batch, resolution: str,
         statements_of: Callable[[dict[str, Any]], Optional[Statements]]) -> Outcome:
    line = verified.commit_record(store, batch)
    made = statements_of(line)
    rows = int(line.get("deleted", line["batch"])["rows"])

    def look() -> Outcome:
        meant = same = conflicts = 0
        said: list[str] = []
        fields = conflict_fields(batch, made.title, resolution) if made else ""
        with witness.snapshot(connection):
            for chunk in verified.chunks(store, line):
                if made is None:
                    continue
                for array in verified.arrays(chunk):
                    source = f"(SELECT {literal(array.decode())}::json AS rows) s"
                    found = connect.row(connection, made.clash_here(source))
                    meant, same, conflicts = meant + found[0], same + found[1], conflicts + found[2]
                    if found[2]:
                        said += [row[0] + "\n" for row in connect.rows(connection, made.clash_lines_here(source, fields))]
        if made is None:
            meant = rows
        return Outcome((batch,), rows, meant, meant - same - conflicts, same, conflicts, 0, "".join(said).encode())

    try:
        return store.again(look)
    except ArchiverError:
        if not connection.closed:
            connect.execute(connection, "ROLLBACK")
        raise
