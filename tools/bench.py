r"""How fast the archive is, against what a person could write by hand. Called by `make bench`.

Interleaved rounds over the same rows, each variant on a fresh database:
  a   psql: bare COPY (SELECT row_to_json(t) ...) to /dev/null
  b   psql COPY | gzip -6 | aws s3 cp -, then one DELETE: neither locked nor verified
  b2  the same with ISA-L: python -m isal.igzip -2
  c   aa-archive with sleep 0 and otherwise default settings
  r   aa-restore of the archived rows into an empty table with its primary key; the server's digests are compared
  d   psql: \copy of the same rows from a local CSV into such a table; r/d is to be 1.6 at most
BENCH_ROWS (1,000,000) and BENCH_ROUNDS (3) change the size. VACUUM is timed apart. The table goes to stdout, the
figures as JSON to .bench/result.json. Exit code 1 if a variant failed or left rows where none may be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import measure  # noqa: E402
from tests.ground import binaries, s3, tables  # noqa: E402
from tests.ground.postgres import Cluster  # noqa: E402

PLACE = ROOT / ".bench"
TEMPLATE, TABLE, BUCKET = "bench_template", "public.audit_logs", "bench"
SETTINGS = {"shared_buffers": "256MB", "max_wal_size": "8GB", "checkpoint_timeout": "1h", "autovacuum": "off"}
"""No checkpoint and no autovacuum inside a measurement; everything else, fsync too, as PostgreSQL comes."""
VARIANTS = ("a", "b", "b2", "c", "r", "d")
SOURCE = "bench_source"
GOALS = {"r/d": 1.6}
SAYS = {"a": "bare COPY row_to_json", "b": "psql | gzip -6 | aws s3 cp, DELETE", "b2": "the same with ISA-L",
        "c": "aa-archive, verified and recorded", "r": "aa-restore, proven and compared", "d": "psql \\copy from a local CSV"}


class Bench:
    """The servers, and one method per variant."""

    digest: tables.Digest

    def __init__(self, cluster: Cluster, store: s3.S3Server, rows: int) -> None:
        self.cluster, self.store, self.rows = cluster, store, rows
        self.psql, self.aws = shlex.quote(binaries.psql()), shlex.quote(str(awscli()))
        self.cutoff = datetime.date.today() - datetime.timedelta(days=100)
        self.servers = {"postgresql": cluster.pid or 0, "s3": store.pid}
        self.number = 0

    def prepare(self) -> None:
        """The template database with the table, vacuumed and with its statistics."""
        self._sql("postgres", f"CREATE DATABASE {TEMPLATE}")
        connection = self.cluster.connect(TEMPLATE)
        tables.create(connection, TABLE, rows=self.rows, first=str(self.cutoff - datetime.timedelta(days=365)),
                      last=str(self.cutoff))
        connection.close()
        self._sql(TEMPLATE, f"VACUUM (FREEZE, ANALYZE) {TABLE}")
        self.store.client().create_bucket(Bucket=BUCKET)

    def prepare_restores(self) -> None:
        """The rows in the archive and in a CSV, for r and d."""
        connection = self.cluster.connect(TEMPLATE)
        self.digest = tables.digest(connection, TABLE)
        with open(PLACE / "rows.csv", "wb") as file, connection.cursor() as cursor:
            cursor.copy_expert(f"COPY {TABLE} TO STDOUT (FORMAT csv)", file)
        connection.close()
        self._sql("postgres", f"CREATE DATABASE {SOURCE} TEMPLATE {TEMPLATE}")
        self.archive(SOURCE)

    def measure(self, variant: str) -> dict[str, Any]:
        """One run of a variant on a fresh copy of the database."""
        self.number += 1
        name = f"bench_{self.number}"
        if variant in ("r", "d"):
            self._sql("postgres", f"CREATE DATABASE {name}")
            self._sql(name, f"CREATE TABLE {TABLE} ({tables.COLUMNS})", "CHECKPOINT")
        else:
            copy = " STRATEGY file_copy" if int(self.cluster.version.split(".")[0]) >= 15 else ""
            self._sql("postgres", f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}{copy}", "CHECKPOINT")
        ways = {"c": self.archive, "r": self.restore, "d": self.copy_in}
        try:
            figures: dict[str, Any] = ways[variant](name) if variant in ways else self.by_hand(variant, name)
            left = self._sql(name, f"SELECT count(*) FROM {TABLE}")[0][0]
            if left != (self.rows if variant in ("a", "r", "d") else 0):
                raise SystemExit(f"bench: variant {variant} left {left} rows in the table")
            return figures
        finally:
            self._sql("postgres", f"DROP DATABASE {name}")

    def by_hand(self, variant: str, name: str) -> dict[str, Any]:
        """Variants a, b and b2: a shell pipe as one would write it."""
        psql = f"{self.psql} -qAtX -v ON_ERROR_STOP=1"
        where = "" if variant == "a" else f" WHERE created_at < '{datetime.date.today()}'"
        copy = f"{psql} -c \"COPY (SELECT row_to_json(t) FROM {TABLE} t{where}) TO STDOUT\""
        packer = {"a": "", "b": "gzip -6", "b2": f"{shlex.quote(sys.executable)} -m isal.igzip -2"}[variant]
        script = f"{copy} > /dev/null" if variant == "a" else (
            f"set -o pipefail; {copy} | {packer} | {self.aws} --endpoint-url {self.store.endpoint} "
            f"s3 cp --only-show-errors - s3://{BUCKET}/{name}.jsonl.gz && {psql} -c \"DELETE FROM {TABLE}{where}\"")
        cost = measure.run(["bash", "-c", script], env=self._environment(name), servers=self.servers)
        figures = self._figures(variant, cost)
        if variant != "a":
            began = time.monotonic()
            self._sql(name, f"VACUUM (ANALYZE) {TABLE}")
            figures["vacuum_s"] = time.monotonic() - began
            figures["object_bytes"] = self.store.client().head_object(
                Bucket=BUCKET, Key=f"{name}.jsonl.gz")["ContentLength"]
        return figures

    def archive(self, name: str) -> dict[str, Any]:
        """Variant c: the command, as cron calls it."""
        cost = self._command("aa-archive", name, "--force")
        figures = self._figures("c", cost)
        report = json.loads(cost.out.strip().split(b"\n")[-1])
        if report["totals"]["rows"] != self.rows:
            raise SystemExit(f"bench: aa-archive says that it archived {report['totals']['rows']} rows")
        figures["phases_s"] = report["databases"][0]["phases"]
        figures["object_bytes"] = report["totals"]["gz_bytes"]
        figures["vacuum_s"] = float(figures["phases_s"]["vacuum"])
        figures["wall_s"] -= figures["vacuum_s"]
        return figures

    def restore(self, name: str) -> dict[str, Any]:
        """Variant r: everything that was archived, into the empty table of another database."""
        cost = self._command("aa-restore", SOURCE, "--table", TABLE, "--restore-all", "--into", f"{name}:{TABLE}")
        figures = self._figures("r", cost)
        connection = self.cluster.connect(name)
        if tables.digest(connection, TABLE) != self.digest:
            raise SystemExit("bench: aa-restore restored other rows than were archived")
        connection.close()
        return figures

    def copy_in(self, name: str) -> dict[str, Any]:
        """Variant d: what is fastest without an archive."""
        copy = f"\\copy {TABLE} FROM '{PLACE / 'rows.csv'}' WITH (FORMAT csv)"
        return self._figures("d", measure.run([binaries.psql(), "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", copy],
                                              env=self._environment(name), servers=self.servers))

    def _command(self, command: str, name: str, *words: str) -> measure.Cost:
        """One of our commands on a configuration for the database `name`."""
        config = PLACE / "config.yaml"
        config.touch(mode=0o600)
        config.write_text(CONFIG.format(endpoint=self.store.endpoint, bucket=BUCKET, region=s3.REGION, name=name,
                                        host=self.cluster.host, port=self.cluster.port, place=PLACE))
        return measure.run([str(Path(sys.prefix) / "bin" / command), "--config", str(config), *words, "--output", "json"],
                           env=self._environment(name), servers=self.servers)

    def _figures(self, variant: str, cost: measure.Cost) -> dict[str, Any]:
        if cost.code != 0:
            raise SystemExit(f"bench: variant {variant} ended with code {cost.code}:\n"
                             f"{cost.err.decode(errors='replace')[-3000:]}")
        scale = 1e6 / self.rows
        return {"wall_s": cost.wall_s, "peak_mb": dict(sorted(cost.peaks.items())), "max_rss_mb": cost.max_rss_mb,
                "client_cpu_s_per_million": {name: spent * scale for name, spent in sorted(cost.client_cpu_by_name.items())},
                "cpu_s_per_million": {"client": cost.client_cpu_s * scale,
                                      **{name: spent * scale for name, spent in cost.server_cpu_s.items()}}}

    def _environment(self, name: str) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(PLACE), "LC_ALL": "C.UTF-8",
                "PGHOST": self.cluster.host, "PGPORT": str(self.cluster.port), "PGUSER": "postgres",
                "PGDATABASE": name, "AWS_ACCESS_KEY_ID": self.store.access_key,
                "AWS_SECRET_ACCESS_KEY": self.store.secret_key, "AWS_DEFAULT_REGION": s3.REGION,
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required", "AWS_EC2_METADATA_DISABLED": "true"}

    def _sql(self, dbname: str, *statements: str) -> list[tuple[Any, ...]]:
        connection = self.cluster.connect(dbname)
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            found = cursor.fetchall() if cursor.description else []
        connection.close()
        return found


CONFIG = """\
version: "2.0"
s3:
  endpoint: {endpoint}
  bucket: {bucket}
  prefix: archives/
  region: {region}
defaults:
  retention_days: 30
  sleep_between_batches: 0
staging_dir: {place}/staging
resources:
  min_free_disk_gb: 0
databases:
  - name: {name}
    host: {host}
    port: {port}
    user: postgres
    tables:
      - name: audit_logs
        timestamp_column: created_at
        primary_key: id
"""


def awscli() -> Path:
    """The aws command, in a virtual environment of its own."""
    home = PLACE / "awscli"
    program = home / "bin" / "aws"
    if not program.exists():
        venv.EnvBuilder(with_pip=True, clear=True).create(home)
        subprocess.run([str(home / "bin" / "python"), "-m", "pip", "install", "--quiet",
                        "--disable-pip-version-check", "awscli"], check=True)
    return program


def summarize(runs: dict[str, list[dict[str, Any]]], rows: int, cluster: Cluster) -> dict[str, Any]:
    """Medians over the rounds, and of the ratios within each round."""
    result: dict[str, Any] = {"rows": rows, "rounds": len(next(iter(runs.values()))), "cpus": os.cpu_count(),
                              "machine": platform.machine(), "python": platform.python_version(),
                              "postgresql": cluster.version, "variants": {}, "ratios": {}}
    for variant, figures in runs.items():
        walls = [each["wall_s"] for each in figures]
        middle = statistics.median(walls)
        nearest = min(figures, key=lambda each: abs(each["wall_s"] - middle))
        result["variants"][variant] = {**nearest, "wall_s": middle, "walls_s": walls, "rows_per_s": rows / middle}
    for other in [name for name in runs if name in ("a", "b", "b2") and "c" in runs]:
        pairs = list(zip(runs["c"], runs[other]))  # of one round, so that a busy minute weighs on both
        result["ratios"][f"c/{other}"] = statistics.median(ours["wall_s"] / theirs["wall_s"] for ours, theirs in pairs)
        result["ratios"][f"c/{other} with vacuum"] = statistics.median(
            (ours["wall_s"] + ours["vacuum_s"]) / (theirs["wall_s"] + theirs.get("vacuum_s", 0.0)) for ours, theirs in pairs)
    if {"r", "d"} <= set(runs):
        result["ratios"]["r/d"] = statistics.median(ours["wall_s"] / theirs["wall_s"] for ours, theirs in zip(runs["r"], runs["d"]))
        result["goals"] = GOALS
    return result


def missing(result: dict[str, Any]) -> list[str]:
    """Figures that are not there or cannot be: a bench that measures nothing fails."""
    wrong = [f"{name}: {figure}" for name, each in result["variants"].items()
             for figure, value in (("rows/s", each["rows_per_s"]), ("client CPU", each["cpu_s_per_million"]["client"]),
                                   ("PostgreSQL CPU", each["cpu_s_per_million"]["postgresql"]),
                                   ("peak memory", max(each["peak_mb"].values(), default=0.0))) if not value > 0]
    ours = result["variants"].get("c", {})
    return wrong + [f"c: phase {name}" for name in ours.get("phases_s", {}) if name != "vacuum" and not ours["phases_s"][name] > 0]


def report(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{result['rows']:,} rows, median of {result['rounds']} rounds; PostgreSQL {result['postgresql']}, "
             f"Python {result['python']}, {result['cpus']} CPUs", "",
             f"{'':3} {'':36} {'seconds':>8} {'rows/s':>9} {'vacuum':>7}   CPU s per million rows         largest",
             f"{'':3} {'':36} {'':>8} {'':>9} {'s':>7}   {'client':>7} {'PostgreSQL':>10} {'S3':>6}   process MB"]
    for name, each in result["variants"].items():
        cpu = each["cpu_s_per_million"]
        vacuum = f"{each['vacuum_s']:.2f}" if "vacuum_s" in each else ""
        lines.append(f"{name:3} {SAYS[name]:36} {each['wall_s']:8.2f} {each['rows_per_s']:9,.0f} {vacuum:>7}   "
                     f"{cpu['client']:7.2f} {cpu['postgresql']:10.2f} {cpu['s3']:6.2f}   "
                     f"{max(each['peak_mb'].values(), default=0.0):10.1f}")
    if result["ratios"]:
        goals = {name: f" (goal {goal})" for name, goal in GOALS.items()}
        lines += ["", "   ".join(f"{name} {value:.2f}{goals.get(name, '')}" for name, value in result["ratios"].items())]
    for name, each in result["variants"].items():
        peaks = "  ".join(f"{program} {peak:.0f}" for program, peak in each["peak_mb"].items())
        spent = "  ".join(f"{program} {cpu:.2f}" for program, cpu in each["client_cpu_s_per_million"].items())
        lines += [f"{name}: peak MB {peaks}", f"{'':{len(name)}}  CPU s per million rows {spent}"]
    if "c" in result["variants"]:
        phases = result["variants"]["c"]["phases_s"]
        lines.append("phases of c: " + "  ".join(f"{name} {spent:.1f} s" for name, spent in phases.items()))
    return "\n".join(lines) + "\n"


def main(argv: Optional[list[str]] = None) -> int:
    """Build, measure in rounds, report."""
    parser = argparse.ArgumentParser(prog="bench", description="measure archive and restore against pipes written by hand")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="LIST", help="which of a,b,b2,c,r,d (default: all)")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="form of the report (default: text)")
    args = parser.parse_args(argv)
    rows, rounds = int(os.environ.get("BENCH_ROWS", "1000000")), int(os.environ.get("BENCH_ROUNDS", "3"))
    chosen = [name for name in VARIANTS if name in args.variants.split(",")]
    PLACE.mkdir(exist_ok=True)
    for leftover in ("s3", "staging"):
        shutil.rmtree(PLACE / leftover, ignore_errors=True)
    store = s3.RcloneServer(PLACE / "s3")
    try:
        with Cluster.start(settings=SETTINGS) as cluster:
            bench = Bench(cluster, store, rows)
            bench.prepare()
            if {"r", "d"} & set(chosen):
                bench.prepare_restores()
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
            for number in range(1, rounds + 1):
                for name in chosen:
                    runs[name].append(bench.measure(name))
                    print(f"round {number} {name:2} {runs[name][-1]['wall_s']:.2f} s", file=sys.stderr, flush=True)
            result = summarize(runs, rows, cluster)
    finally:
        store.stop()
    (PLACE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n" if args.output == "json" else report(result))
    for figure in missing(result):
        print(f"bench: a figure is missing: {figure}", file=sys.stderr)
    return 1 if missing(result) else 0


if __name__ == "__main__":
    sys.exit(main())
