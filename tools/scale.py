"""How aa-archive behaves on many tables and on a large one. Called by `make scale`.

  many   SCALE_TABLES (1,000) tables of 50 rows in one run: the whole time
  large  SCALE_ROWS (5,000,000) rows in one table: rows a second over the first and the last tenth, and peak memory against
         that of a table of 100,000 rows

A PostgreSQL and an S3 server of its own, as in make bench. The figures go to stdout. Exit code 1 if a run failed or left
rows, if the last tenth is more than a fifth slower than the first, or if memory grew by more than a tenth.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import bench  # noqa: E402
import yaml  # noqa: E402

import measure  # noqa: E402
from tests.ground import s3, tables  # noqa: E402
from tests.ground.postgres import Cluster  # noqa: E402

PLACE = bench.PLACE
SLOWER_MOST, MEMORY_MOST = 1.2, 1.1
SMALL_ROWS = 100_000


def archive(cluster: Cluster, store: s3.S3Server, dbname: str, names: list[str]) -> tuple[measure.Cost, dict[str, Any]]:
    """One run over the tables of a database; its cost and report."""
    table = {"timestamp_column": "created_at", "primary_key": "id"}
    settings = {"version": "2.0", "s3": {"endpoint": store.endpoint, "bucket": bench.BUCKET, "prefix": "archives/", "region": s3.REGION},
                "defaults": {"retention_days": 30, "sleep_between_batches": 0}, "staging_dir": str(PLACE / "staging"),
                "resources": {"min_free_disk_gb": 0},
                "databases": [{"name": dbname, "host": cluster.host, "port": cluster.port, "user": "postgres",
                               "tables": [{"name": name, **table} for name in names]}]}
    path = PLACE / "scale.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(settings))
    cost = measure.run([str(Path(sys.prefix) / "bin" / "aa-archive"), "--config", str(path), "--force", "--output", "json"],
                       env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(PLACE), "AWS_ACCESS_KEY_ID": store.access_key,
                            "AWS_SECRET_ACCESS_KEY": store.secret_key, "AWS_EC2_METADATA_DISABLED": "true"}, servers={})
    if cost.code != 0:
        raise SystemExit(f"scale: aa-archive ended with code {cost.code}:\n{cost.err.decode(errors='replace')[-3000:]}")
    return cost, json.loads(cost.out.strip().split(b"\n")[-1])


def many(cluster: Cluster, store: s3.S3Server, count: int) -> None:
    """Many small tables."""
    connection = cluster.connect("many")
    with connection.cursor() as cursor:
        for number in range(count):
            cursor.execute(f"CREATE TABLE t{number} (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, body text); INSERT INTO t{number} "
                           "SELECT i, timestamptz '2024-01-01' + i * interval '1 minute', md5(i::text) FROM generate_series(1, 50) i")
    connection.close()
    cost, report = archive(cluster, store, "many", [f"t{number}" for number in range(count)])
    if report["totals"]["rows"] != 50 * count:
        raise SystemExit(f"scale: {report['totals']['rows']} rows of {50 * count} were archived")
    print(f"many: {count:,} tables of 50 rows in {cost.wall_s:.1f} s, largest process {max(cost.peaks.values()):.0f} MB", flush=True)


def large(cluster: Cluster, store: s3.S3Server, dbname: str, rows: int) -> tuple[list[float], float]:
    """One table: rows a second over each tenth of the rows, and the largest process's memory in MB."""
    connection = cluster.connect(dbname)
    tables.create(connection, "public.audit_logs", rows=rows, first="2024-01-01", last="2025-06-30")
    with connection.cursor() as cursor:
        cursor.execute("VACUUM (FREEZE, ANALYZE) public.audit_logs")
    connection.close()
    cost, report = archive(cluster, store, dbname, ["audit_logs"])
    if report["totals"]["rows"] != rows:
        raise SystemExit(f"scale: {report['totals']['rows']} rows of {rows} were archived")
    records = [json.loads(line) for line in cost.err.splitlines() if b'"batch.committed"' in line]
    done, at = 0, [datetime.fromisoformat(record["ts"].replace("Z", "+00:00")).timestamp() for record in records]
    rates, began, before = [], at[0], records[0]["rows"]
    for record, moment in zip(records, at):
        done += record["rows"]
        if done >= rows * (len(rates) + 1) / 10 and moment > began:
            rates.append((done - before) / (moment - began))
            began, before = moment, done
    peak = max(cost.peaks.values())
    print(f"large: {rows:,} rows in {cost.wall_s:.1f} s, {len(records)} batches, {rows / cost.wall_s:,.0f} rows/s, largest process {peak:.0f} MB; "
          f"rows/s by tenths: {' '.join(f'{rate:,.0f}' for rate in rates)}", flush=True)
    return rates, peak


def main() -> int:
    """Both parts."""
    count, rows = int(os.environ.get("SCALE_TABLES", "1000")), int(os.environ.get("SCALE_ROWS", "5000000"))
    PLACE.mkdir(exist_ok=True)
    for leftover in ("s3", "staging"):
        shutil.rmtree(PLACE / leftover, ignore_errors=True)
    store = s3.RcloneServer(PLACE / "s3")
    try:
        store.client().create_bucket(Bucket=bench.BUCKET)
        with Cluster.start(settings=bench.SETTINGS) as cluster:
            connection = cluster.connect()
            with connection.cursor() as cursor:
                for name in ("many", "small", "large"):
                    cursor.execute(f"CREATE DATABASE {name}")
            connection.close()
            many(cluster, store, count)
            _, small_peak = large(cluster, store, "small", SMALL_ROWS)
            rates, peak = large(cluster, store, "large", rows)
    finally:
        store.stop()
    slower, grown = rates[0] / rates[-1], peak / small_peak
    print(f"first tenth / last tenth {slower:.2f} (at most {SLOWER_MOST}), memory against {SMALL_ROWS:,} rows {grown:.2f} (at most {MEMORY_MOST})")
    return int(slower > SLOWER_MOST or grown > MEMORY_MOST)


if __name__ == "__main__":
    sys.exit(main())
