"""How fast aa-restore is, against `psql \\copy` of the same rows from a local CSV file: `python tools/bench_restore.py [OPTION...]`.

The table of tools/bench.py is archived once; then, interleaved, each round fills an empty table with the same indexes, by \\copy and by
aa-restore with the options given. BENCH_ROWS (1,000,000) and BENCH_ROUNDS (3) change the size. What was restored must have the digest
of the table that was archived. Exit code 1 if a round failed.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import bench  # noqa: E402

import measure  # noqa: E402
from tests.ground import s3, tables  # noqa: E402
from tests.ground.postgres import Cluster  # noqa: E402

NAME = bench.TEMPLATE  # rows are archived out of the template itself: nobody copies it here


def main() -> int:
    """Prepare, measure, say."""
    rows, rounds = int(os.environ.get("BENCH_ROWS", "1000000")), int(os.environ.get("BENCH_ROUNDS", "3"))
    bench.PLACE.mkdir(exist_ok=True)
    with Cluster.start(settings=bench.SETTINGS) as cluster, tempfile.TemporaryDirectory() as place:
        store = s3.RcloneServer(Path(place) / "s3")
        try:
            return compare(cluster, store, rows, rounds, Path(place))
        finally:
            store.stop()


def compare(cluster: Cluster, store: s3.S3Server, rows: int, rounds: int, place: Path) -> int:
    """The rounds, and their median."""
    ground = bench.Bench(cluster, store, rows)
    ground.prepare()
    connection = cluster.connect(NAME)
    before = tables.digest(connection, bench.TABLE)
    env, csv, config = ground._environment(NAME), place / "rows.csv", place / "config.yaml"
    psql = f"{ground.psql} -qAtX -v ON_ERROR_STOP=1 -c"
    measured(["bash", "-c", f"{psql} '\\copy {bench.TABLE} TO {csv} WITH (FORMAT csv)'"], env)
    config.touch(mode=0o600)
    config.write_text(bench.CONFIG.format(endpoint=store.endpoint, bucket=bench.BUCKET, region=s3.REGION, name=NAME, host=cluster.host,
                                          port=cluster.port, place=place))
    command = Path(sys.prefix) / "bin"
    measured([str(command / "aa-archive"), "-c", str(config), "--force", "--quiet"], env)
    ratios = []
    for _ in range(rounds):
        for table in ("copied", "restored"):
            ground._sql(NAME, f"DROP TABLE IF EXISTS {table}", f"CREATE TABLE {table} (LIKE {bench.TABLE} INCLUDING ALL)")
        ground._sql(NAME, "CHECKPOINT")
        theirs = measured(["bash", "-c", f"{psql} '\\copy copied FROM {shlex.quote(str(csv))} WITH (FORMAT csv)'"], env, ground.servers)
        ground._sql(NAME, "CHECKPOINT")
        ours = measured([str(command / "aa-restore"), "-c", str(config), "--quiet", "--restore-all", "--table", "audit_logs", "--into",
                         "restored", *sys.argv[1:]], env, ground.servers)
        ratios.append(ours.wall_s / theirs.wall_s)
        print(f"\\copy {theirs.wall_s:6.2f} s, CPU {theirs.client_cpu_s + sum(theirs.server_cpu_s.values()):6.2f} s    aa-restore "
              f"{ours.wall_s:6.2f} s, CPU {ours.client_cpu_s + sum(ours.server_cpu_s.values()):6.2f} s, {ours.max_rss_mb:.0f} MB    "
              f"ratio {ratios[-1]:.2f}", flush=True)
        if tables.digest(connection, "restored") != before:
            print("what was restored is not what was archived")
            return 1
    print(f"{rows:,} rows, median ratio of {rounds} rounds {statistics.median(ratios):.2f}; digests equal")
    connection.close()
    return 0


def measured(argv: list[str], env: dict[str, str], servers: Optional[dict[str, int]] = None) -> measure.Cost:
    """One command that must end well."""
    cost = measure.run(argv, env=env, servers=servers or {})
    if cost.code:
        raise SystemExit(f"bench_restore: '{argv[0]}' ended with code {cost.code}:\n{cost.err.decode(errors='replace')[-3000:]}")
    return cost


if __name__ == "__main__":
    sys.exit(main())
