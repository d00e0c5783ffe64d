"""Archived on one PostgreSQL, restored on another: every type that both have comes back, on an older server as on a newer one."""

from __future__ import annotations

import secrets
from typing import Any, Callable, Iterator

import psycopg2
import pytest
import yaml

from audit_archiver.postgres.quoting import ident
from tests.conftest import ARCHIVER, Bucket, TestDatabase
from tests.ground import binaries, tables
from tests.ground.postgres import Cluster
from tests.ground.restored import Restored
from tests.stages import type_zoo
from tests.stages.type_session import Session

ZOO = [{"name": "zoo", "timestamp_column": "created_at", "primary_key": "n"}]
HERE = int(binaries.WANTED) if binaries.WANTED.isdigit() else 11
PAIRS = [pair for other in (11, 17) if other != HERE for pair in ((HERE, other), (other, HERE))]
"""Source and target: the version that AA_PG asks for with the oldest and the newest common one, both ways."""

ONLY_ON = {
    11: {"abstime", "reltime", "tinterval"},
    17: {"jsonpath", "pg_snapshot", "regcollation", "xid8", *(name for name in type_zoo.VALUES if name.endswith("multirange"))},
}
"""What 11 has and 17 has not, and the other way round."""


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[int], Cluster]]:
    """A server of a major version, with the role that the suite's databases belong to."""
    running: dict[int, Cluster] = {}

    def start(major: int) -> Cluster:
        if major not in running:
            try:
                running[major] = Cluster.start(bindir=binaries.embedded(major))
            except binaries.Missing as error:
                pytest.skip(str(error))
            connection = running[major].connect()
            with connection.cursor() as cursor:
                cursor.execute(f"CREATE ROLE {ARCHIVER} LOGIN PASSWORD 'archiver-password'")
            connection.close()
        return running[major]

    yield start
    for cluster in running.values():
        cluster.stop()


@pytest.fixture()
def session(server: Callable[[int], Cluster]) -> Iterator[Callable[[int], Session]]:
    """The superuser's session in a new database on the server of a major version."""
    made: list[Session] = []

    def create(major: int) -> Session:
        cluster, name = server(major), f"t_{secrets.token_hex(6)}"
        connection = cluster.connect()
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name} OWNER {ARCHIVER}")
        connection.close()
        made.append(Session(TestDatabase(cluster, name)))
        return made[-1]

    yield create
    for each in made:
        each.connection.close()


@pytest.fixture()
def move(bucket: Bucket, config_file: Any) -> Callable[[Session, Session], dict[str, Any]]:
    """A function that archives all of public.zoo from one session's database and restores it into another's; the report."""
    def moved(there: Session, here: Session) -> dict[str, Any]:
        path = config_file(there.db, bucket, ZOO, database={"user": "postgres"})
        both = yaml.safe_load(path.read_text())
        both["databases"].append({**both["databases"][0], "name": here.db.name, "host": here.db.host, "port": here.db.port})
        path.write_text(yaml.safe_dump(both))
        scene = Restored(there.db, bucket, path)
        scene.archive("--database", there.db.name)
        assert there.rows("SELECT count(*) FROM public.zoo") == [(0,)]
        return scene.restore("--database", there.db.name, "--table", "zoo", "--restore-all", "--into", f"{here.db.name}:zoo", "--create-table")

    return moved


def digest(session: Session, table: str) -> str:
    """SHA-256 over the binary forms of all values, by the server: the same on every version, where a double's text is not.

    As text are taken: types without a send function, refcursor, whose one is text's, and json, for its line breaks are not archived.
    """
    parts = []
    for name, send in session.rows(
            "SELECT attname::text, CASE WHEN typsend <> 0 AND typname NOT IN ('json', 'refcursor') THEN typsend::regproc::text END "
            "FROM pg_attribute JOIN pg_type t ON t.oid = atttypid WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attname", (table,)):
        value = f"{send}(t.{ident(name)})" if send else f"textsend(regexp_replace(t.{ident(name)}::text, '[\\n\\r]', ' ', 'g'))"
        parts.append(f"coalesce(encode({value}, 'hex'), 'NULL')")
    return str(session.rows(f"SELECT encode(sha256(string_agg(textsend(concat_ws(',', {', '.join(parts)})), '\\x0a'::bytea ORDER BY t.n)), 'hex') "
                            f"FROM {table} t")[0][0])


@pytest.mark.req("REQ-RST-002", "T14")
@pytest.mark.parametrize("source, target", PAIRS)
def test_a_column_of_every_type_is_archived_on_one_version_and_restored_on_another(
        source: int, target: int, session: Callable[[int], Session], move: Callable[[Session, Session], dict[str, Any]]) -> None:
    there, here = session(source), session(target)
    names = [name for name in type_zoo.known(there) if name in type_zoo.known(here)]
    assert len(names) > 60
    if {source, target} == {11, 17}:
        assert set(type_zoo.known(there)) - set(names) == ONLY_ON[source]
    type_zoo.create(there, names, min(source, target))
    before = digest(there, "public.zoo")

    report = move(there, here)

    assert (report["outcome"], report["differences"]) == ("done", [])
    assert digest(here, "public.zoo") == before
    here.rows("UPDATE public.zoo SET \"a float8\" = \"a float8\" + 0.1 WHERE n = 0")
    assert digest(here, "public.zoo") != before


@pytest.mark.req("REQ-RST-002", "REQ-TYPE-006", "REQ-TYPE-009")
@pytest.mark.parametrize("source, target", PAIRS)
def test_types_of_users_and_what_a_table_has_beside_are_made_on_the_other_version(
        source: int, target: int, session: Callable[[int], Session], move: Callable[[Session, Session], dict[str, Any]]) -> None:
    there, here = session(source), session(target)
    there.rows(f"""
        CREATE TYPE public.mood AS ENUM ('sad', 'Grüße', '');
        CREATE DOMAIN public.amount AS numeric(12,4) CHECK (VALUE >= 0);
        CREATE TYPE public.place AS ("the street" text, mood public.mood, doc jsonb);
        CREATE TYPE public.textrange AS RANGE (subtype = text, collation = "C");
        CREATE TABLE public.zoo ({type_zoo.KEPT}, mood public.mood, moods public.mood[], amount public.amount CHECK (amount < 100),
            place public.place, places public.place[], r public.textrange, own bigint GENERATED ALWAYS AS IDENTITY, part serial);
        CREATE INDEX ON public.zoo (amount DESC NULLS LAST) INCLUDE (mood) WHERE n > 0;
        INSERT INTO public.zoo (n, mood, moods, amount, place, places, r)
            SELECT n, 'Grüße', '{{sad,NULL,""}}', n * 1.5, p, ARRAY[p, NULL], '["a","z,""x")'
            FROM generate_series(1, 20) n, (SELECT ROW('a, "b" \\ (c)', 'sad', 'null')::public.place AS p) q""")
    before = tables.digest(there.connection, "public.zoo")

    assert move(there, here)["outcome"] == "done"

    assert tables.digest(here.connection, "public.zoo") == before
    assert here.rows("INSERT INTO public.zoo (n, amount) VALUES (0, 99) RETURNING own, part") == [(21, 21)]
    for refused in ("n, amount) VALUES (99, 100", "n, amount) VALUES (99, -1", "n) VALUES (1"):
        with pytest.raises(psycopg2.IntegrityError):
            here.rows(f"INSERT INTO public.zoo ({refused})")
    indexes = "SELECT replace(pg_get_indexdef(indexrelid), ' USING btree', '') FROM pg_index WHERE indrelid = 'public.zoo'::regclass ORDER BY 1"
    assert here.rows(indexes) == there.rows(indexes)
