"""Rows that lie in the table in another order than the batch's are copied and deleted in the batch's order all the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import config
from audit_archiver.exits import Mismatch
from audit_archiver.postgres import connect
from tests.ground import held

SHUFFLED = """
CREATE TABLE audit_logs (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, note text);
INSERT INTO audit_logs SELECT i, timestamptz '2024-01-01 00:00Z' + i * interval '1 minute', 'row ' || i
FROM generate_series(1, 300) AS i ORDER BY {order};
"""
WIDE = """
ALTER TABLE audit_logs ALTER note SET STORAGE EXTERNAL;
UPDATE audit_logs SET note = repeat('wide', 30000) WHERE id IN (7, 150, 151);
"""


@pytest.mark.req("REQ-ARC-007")
@pytest.mark.parametrize("wide", [False, True], ids=["", "some rows out of line"])
@pytest.mark.parametrize("order", ["i", "i DESC", "md5(i::text)"])
def test_rows_are_archived_in_time_order_wherever_they_lie(db: Any, config_file: Any, order: str, wide: bool) -> None:
    db.execute(SHUFFLED.format(order=order) + (WIDE if wide else ""))
    path = config_file(db, held.NoServer())
    job = held.plan(config.load(str(path), {}), "audit_logs", batch_size=150)

    with held.Holder(path) as holder:
        lines = holder.verified(job)
        archived = [json.loads(row)["id"] for line in lines for row in _rows(line)]
        for text in holder.delete(lines).lines:
            holder.commit(text)

    assert archived == list(range(1, 301))
    assert db.scalar("SELECT count(*) FROM audit_logs") == 0


@pytest.mark.req("REQ-TXN-013")
@pytest.mark.parametrize("tampering", ["UPDATE pg_temp.aa_batch SET tid = '(0,60)' WHERE id = 1", "UPDATE pg_temp.aa_batch SET id = 60 WHERE id = 1"],
                         ids=["the place of another row", "the key of another row"])
def test_a_delete_that_meets_a_row_that_was_not_verified_is_undone(db: Any, config_file: Any, tampering: str) -> None:
    db.execute(SHUFFLED.format(order="i"))
    path = config_file(db, held.NoServer())
    job = held.plan(config.load(str(path), {}), "audit_logs", batch_size=50)

    with held.Holder(path) as holder:
        client = holder.client("aa-select")
        handle = client.call("begin", job=job)["handle"]
        locked = client.call("lock", handle=handle, cursor=None, limit=50)
        transaction = holder.operations.batches[handle].transaction
        connect.execute(transaction.connection, tampering)
        with pytest.raises(Mismatch, match="the delete removed other rows of 'public.audit_logs' than were verified"):
            transaction.delete(50, locked["keys_sha256"])
        assert connect.scalar(transaction.connection, "SELECT count(*) FROM public.audit_logs") == 300
        with pytest.raises(Mismatch, match="other rows of 'public.audit_logs' are locked than were verified"):
            transaction.delete(50, "0" * 64)

    assert db.scalar("SELECT count(*) FROM audit_logs") == 300


def _rows(line: Any) -> list[bytes]:
    directory = Path(line["serialized"]["dir"])
    return gzip.decompress((directory / (line["serialized"]["stem"].rpartition("/")[2] + ".jsonl.gz")).read_bytes()).splitlines()
