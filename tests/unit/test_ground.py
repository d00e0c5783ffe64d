"""The ground itself: servers start and stop, faults are real, digests notice a difference."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from botocore.exceptions import ClientError

from tests.ground import kill, processes, tables
from tests.ground.postgres import Cluster
from tests.ground.proxy import Proxy
from tests.ground.run import ROOT, spawn
from tests.ground.wait import until


def test_each_test_has_a_database_of_its_own_and_an_ordinary_role(db: Any) -> None:
    db.execute("CREATE TABLE only_here (id int)")
    assert db.scalar("SELECT current_user || ' ' || current_database()") == f"archiver {db.name}"
    assert db.scalar("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False


def test_a_cluster_that_crashed_comes_up_again_with_its_data() -> None:
    with Cluster.start(settings={}) as cluster:
        cluster.connect().cursor().execute("CREATE TABLE kept AS SELECT 1 AS id")
        cluster.down(signal.SIGQUIT)
        assert cluster.pid is None
        with pytest.raises(psycopg2.OperationalError):
            cluster.connect()
        cluster.up()
        cursor = cluster.connect().cursor()
        cursor.execute("SELECT id FROM kept")
        assert cursor.fetchall() == [(1,)]
        base = cluster.base
    assert not base.exists()


def test_moto_refuses_a_second_object_of_the_same_name_and_rclone_does_not(bucket: Any, poor_bucket: Any) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="k", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        bucket.client.put_object(Bucket=bucket.name, Key="k", Body=b"2", IfNoneMatch="*")
    assert bucket.read("k") == b"1"
    poor_bucket.client.put_object(Bucket=poor_bucket.name, Key="k", Body=b"1", IfNoneMatch="*")
    poor_bucket.client.put_object(Bucket=poor_bucket.name, Key="k", Body=b"2", IfNoneMatch="*")
    assert poor_bucket.read("k") == b"2"


def test_the_digest_sees_a_changed_a_missing_and_a_doubled_row_and_not_the_order(db: Any) -> None:
    tables.create(db.connection, "a", rows=300)
    db.execute("CREATE TABLE b AS TABLE a ORDER BY random(); CREATE TABLE rest (LIKE a)")
    whole = tables.digest(db.connection, "a")
    assert whole.rows == 300
    assert tables.digest(db.connection, "b") == whole
    db.execute("WITH gone AS (DELETE FROM b WHERE id % 3 = 0 RETURNING *) INSERT INTO rest SELECT * FROM gone")
    assert tables.digest(db.connection, "b") != whole
    assert tables.digest(db.connection, "b", "rest") == whole
    db.execute("UPDATE rest SET old_value = NULL WHERE old_value = 'null'")
    assert tables.digest(db.connection, "b", "rest") != whole
    db.execute("TRUNCATE rest; INSERT INTO rest SELECT * FROM a WHERE id % 3 = 0")
    assert tables.digest(db.connection, "b", "rest") == whole
    db.execute("INSERT INTO rest SELECT * FROM a LIMIT 1")
    assert tables.digest(db.connection, "b", "rest") != whole


def test_created_at_rises_with_the_key_and_fills_the_dates_evenly(db: Any) -> None:
    tables.create(db.connection, "a", rows=1000, first="2025-01-01", last="2025-01-11")
    assert db.execute("SELECT count(*) FROM a WHERE created_at < '2025-01-06 00:00Z'")[0][0] == 500
    assert db.execute("SELECT bool_and(up) FROM (SELECT created_at > lag(created_at) OVER (ORDER BY id) AS up FROM a) x"
                      ) == [(True,)]
    mean = db.scalar("SELECT avg(octet_length(row_to_json(a)::text)) FROM a")
    assert 440 < mean < 540


@pytest.fixture()
def upstream() -> Any:
    """A socket server that sends 1 MB to whoever connects and then echoes."""
    code = ("import socket,sys,threading\n"
            "s=socket.create_server(('127.0.0.1',0)); print(s.getsockname()[1],flush=True)\n"
            "def talk(c):\n"
            "    c.sendall(b'x'*1000000)\n"
            "    while True:\n"
            "        d=c.recv(65536)\n"
            "        if not d: return c.close()\n"
            "        c.sendall(d)\n"
            "while True: threading.Thread(target=talk,args=(s.accept()[0],),daemon=True).start()\n")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    yield ("127.0.0.1", int(child.stdout.readline()))
    child.kill()
    child.wait()
    child.stdout.close()


def _receive(proxy: Proxy, count: int = 1_000_000) -> bytes:
    got = b""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
        while len(got) < count:
            data = connection.recv(65536)
            if not data:
                break
            got += data
    return got


def test_the_proxy_passes_everything_on_and_counts_it(upstream: Any) -> None:
    with Proxy(upstream) as proxy:
        assert len(_receive(proxy)) == 1_000_000
        assert proxy.down_bytes == 1_000_000 and proxy.connections == 1


def test_the_proxy_cuts_after_the_bytes_it_was_told(upstream: Any) -> None:
    with Proxy(upstream) as proxy:
        proxy.cut_after = 150_000
        with pytest.raises(ConnectionResetError):
            _receive(proxy)
        assert proxy.down_bytes == 150_000


def test_the_proxy_refuses_and_accepts_again(upstream: Any) -> None:
    with Proxy(upstream) as proxy:
        proxy.refuse = True
        with pytest.raises(ConnectionResetError):
            _receive(proxy)
        proxy.refuse = False
        assert len(_receive(proxy)) == 1_000_000


def test_the_proxy_stalls_without_closing_and_goes_on(upstream: Any) -> None:
    with Proxy(upstream) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        connection.settimeout(20)
        while len(connection.recv(1 << 20, socket.MSG_PEEK)) == 0:
            pass
        proxy.stall = True
        seen = {"bytes": -1}

        def still() -> bool:
            before, seen["bytes"] = seen["bytes"], proxy.down_bytes
            time.sleep(0.1)
            return before == proxy.down_bytes
        until(still, "no byte moves any more")
        proxy.stall = False
        total = 0
        while total < 1_000_000:
            total += len(connection.recv(65536))


def test_the_proxy_limits_the_rate_and_delays(upstream: Any) -> None:
    with Proxy(upstream) as proxy:
        proxy.rate = 2_000_000
        began = time.monotonic()
        assert len(_receive(proxy)) == 1_000_000
        assert time.monotonic() - began >= 0.4
        proxy.rate, proxy.latency_s = None, 0.3
        began = time.monotonic()
        _receive(proxy, 1)
        assert time.monotonic() - began >= 0.3


def test_postgresql_is_reached_through_the_proxy(pg: Any) -> None:
    with Proxy(f"{pg.host}/.s.PGSQL.{pg.port}") as proxy:
        connection = psycopg2.connect(host="127.0.0.1", port=proxy.port, user="postgres", dbname="postgres")
        proxy.cut()
        with pytest.raises(psycopg2.OperationalError):
            connection.cursor().execute("SELECT 1")


def test_a_process_that_stops_itself_is_found_by_its_point_and_killed(tmp_path: Any) -> None:
    script = tmp_path / "stops"
    inner = "from audit_archiver.points import point; point('upload.data.put'); point('upload.data.put')"
    script.write_text(f"import subprocess, sys\nsys.exit(subprocess.call([sys.executable, '-c', {inner!r}]))")
    point = "upload.data.put:2"
    child = spawn(sys.executable, [script], env={"AA_TEST_POINT": point})
    victim = kill.stopped_at(point, child.token, ended=child.poll)
    assert victim != child.pid
    assert processes.state(victim) == "T"
    kill.kill(victim)
    assert child.wait(20) == -signal.SIGKILL % 256
    kill.all_gone(child.token)
    child.communicate()


def test_a_thread_that_stops_its_process_at_a_point_does_not_get_past_it(tmp_path: Any) -> None:
    """Ten times, since a signal to the process let the thread go on in one passage of three."""
    code = ("import sys, threading, time\nfrom audit_archiver.points import point\n"
            "def work():\n    point('holder.commit.before')\n    open(sys.argv[1], 'w').close()\n"
            "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n")
    for number in range(10):
        past = tmp_path / str(number)
        child = spawn(sys.executable, ["-c", code, past], env={"AA_TEST_POINT": "holder.commit.before"})
        victim = kill.stopped_at("holder.commit.before", child.token, ended=child.poll)
        until(lambda victim=victim: {_state(task) for task in Path(f"/proc/{victim}/task").iterdir()} == {"T"},  # type: ignore[misc]
              "all its threads stand still")
        assert not past.exists()
        kill.go_on(victim)
        assert child.wait(20) == 0 and past.exists()
        child.communicate()


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("moment", ["initdb", "up"])
def test_what_a_killed_test_run_leaves_is_removed_by_the_next(moment: str) -> None:
    code = ("import os, signal\nfrom tests.ground.postgres import Cluster\n"
            f"real = Cluster.{'_initdb' if moment == 'initdb' else 'up'}\n"
            "def die(self, *args):\n"
            f"    {'pass' if moment == 'initdb' else 'real(self)'}\n"
            "    print(self.base, self.pid, flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            f"Cluster.{'_initdb' if moment == 'initdb' else 'up'} = die\nCluster.start()\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    base, server = done.stdout.split()
    assert Path(base).exists()
    if moment == "up":
        until(lambda: not processes.alive(int(server)), "the server has died with its owner")
    with Cluster.start():
        assert not Path(base).exists()
