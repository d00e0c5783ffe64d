"""What a configuration comes to: precedence, secrets, gaps filled from the environment, paths, where it is looked for."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import config, exits
from audit_archiver.config import places, resolve
from audit_archiver.formats import schema
from tests.unit import configs


def table(directory: Path, text: str) -> config.Table:
    return configs.load(directory, text).databases[0].tables[0]


# -- precedence


LEVELS = """\
s3: {{bucket: audit-archives}}
defaults: {{{defaults}}}
databases:
  - name: prod
    {database}
    tables:
      - name: a
        timestamp_column: t
        primary_key: id
        {table}
"""


@pytest.mark.req("REQ-CFG-002", "REQ-ARC-003")
@pytest.mark.parametrize("key, field, values", [
    ("retention_days", "retention_days", (10, 20, 30, 90)), ("safety_buffer_days", "safety_buffer_days", (2, 3, 4, 1)),
    ("batch_size", "batch_size", (100, 200, 300, 10000)), ("sleep_between_batches", "sleep_s", (0, 1.5, 3, 2)),
    ("vacuum_strategy", "vacuum", ("none", "analyze", "full", "standard"))])
def test_a_table_wins_over_its_database_and_that_over_the_defaults(tmp_path: Path, key: str, field: str,
                                                                   values: tuple[Any, ...]) -> None:
    mine, of_database, of_defaults, built_in = values
    lines = {"defaults": f"{key}: {of_defaults}", "database": f"{key}: {of_database}", "table": f"{key}: {mine}"}
    for expected, leave_out in ((mine, ()), (of_database, ("table",)), (of_defaults, ("table", "database")),
                                (built_in, ("table", "database", "defaults"))):
        written = {level: "" if level in leave_out else line for level, line in lines.items()}
        assert getattr(table(tmp_path, LEVELS.format(**written)), field) == expected


def test_timeouts_of_a_database_win_over_the_defaults(tmp_path: Path) -> None:
    both = {"defaults": "lock_timeout: 7, transaction_timeout: 600", "database": "lock_timeout: 3", "table": ""}
    found = configs.load(tmp_path, LEVELS.format(**both)).databases[0]
    assert (found.lock_timeout_s, found.transaction_timeout_s) == (3, 600)


@pytest.mark.parametrize("lines, strategy", [
    ({"defaults": "vacuum_after: false"}, "none"), ({"defaults": "vacuum_after: false", "table": "vacuum_after: true"}, "standard"),
    ({"defaults": "vacuum_strategy: full", "table": "vacuum_after: false"}, "none")])
def test_no_vacuum_after_is_the_strategy_none(tmp_path: Path, lines: dict[str, str], strategy: str) -> None:
    assert table(tmp_path, LEVELS.format(**{"defaults": "", "database": "", "table": "", **lines})).vacuum == strategy


@pytest.mark.req("REQ-TBL-002")
def test_the_shortest_configuration_has_the_documented_defaults(tmp_path: Path) -> None:
    found = configs.load(tmp_path)
    assert found == config.Config(
        path="prod.yaml",
        s3=config.S3(bucket="audit-archives", storage_class="STANDARD_IA", at="prod.yaml:1"),
        databases=(config.Database(name="prod", dbname="prod", host="db1.example.com", at="prod.yaml:4", tables=(
            config.Table(name="audit_logs", timestamp="created_at", key=("id",), at="prod.yaml:7"),)),),
        resources=config.Resources(max_row_mb=256, max_memory_mb=868))
    assert found.databases[0].tables[0] == config.Table(
        name="audit_logs", timestamp="created_at", key=("id",), schema="public", retention_days=90, safety_buffer_days=1,
        batch_size=10000, sleep_s=2, vacuum="standard", critical=False, classification=None, cascade="refuse", find=(),
        at="prod.yaml:7")


def test_the_defaults_of_the_model_are_those_of_the_schema() -> None:
    same = {config.S3: ("s3", ("encryption", "kms_key_id", "addressing_style", "multipart_threshold_mb",
                               "multipart_part_mb", "compression_level", "verify", "retries", "retry_base_s",
                               "retry_max_s", "connect_timeout_s", "read_timeout_s", "multipart_timeout_hours",
                               "local_fallback_retention_days", "rate_limit_requests_per_second", "rate_limit_mb_per_second",
                               "circuit_breaker_failures", "circuit_breaker_reset_s")),
            config.Locking: ("locking", ("enabled", "backend", "mode", "scope", "lock_timeout_minutes", "heartbeat_s", "when_others_wait",
                                         "others_wait_s", "held_warning_s")),
            config.Observability: ("observability", ("log_level", "log_format")),
            config.Table: ("table", ("schema", "retention_days", "safety_buffer_days", "batch_size", "critical",
                                     "classification", "cascade")),
            config.Database: ("database", ("port", "sslmode", "fsync_off"))}
    for kind, (section, keys) in same.items():
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        assert {key: fields[key] for key in keys} == {key: resolve.default((section, key)) for key in keys}
    assert schema.load("config")["properties"]["in_flight_batches"]["default"] == 2


def test_a_key_of_several_columns_is_a_list(tmp_path: Path) -> None:
    text = configs.SOUND.replace("primary_key: id", "primary_key: [tenant, id]")
    assert table(tmp_path, text).key == ("tenant", "id")


@pytest.mark.parametrize("written, find", [("user_id", ("user_id",)), ("[user_id, 'Client IP']", ("user_id", "Client IP")), ("[]", ())])
def test_rows_are_found_by_one_column_several_or_none(tmp_path: Path, written: str, find: tuple[str, ...]) -> None:
    text = configs.SOUND.replace("primary_key: id", f"primary_key: id\n        find_columns: {written}")
    assert table(tmp_path, text).find == find


def test_a_prefix_has_one_slash_between_its_parts_and_at_its_end(tmp_path: Path) -> None:
    for written, prefix in (("/a//b/", "a/b/"), ("a", "a/"), ("", ""), ("/", "")):
        text = configs.SOUND.replace("archives\n", f"archives\n  prefix: '{written}'\n")
        assert configs.load(tmp_path, text).s3.prefix == prefix


def test_the_largest_row_fits_the_memory(tmp_path: Path) -> None:
    found = configs.load(tmp_path, configs.with_lines("resources: {max_memory_mb: 400}"))
    assert found.resources.max_row_mb == 100 and found.warnings == ()


# -- secrets


def with_database(line: str) -> str:
    return configs.SOUND.replace("host: db1.example.com", line)


@pytest.mark.req("REQ-DB-006", "REQ-SEC-001")
def test_a_password_comes_out_of_the_variable_that_password_env_names(tmp_path: Path) -> None:
    found = configs.load(tmp_path, with_database("password_env: PROD_PW"), {"PROD_PW": "hunter2", "PGPASSWORD": "other"})
    assert found.databases[0].password == config.Secret("hunter2") and found.warnings == ()


@pytest.mark.req("REQ-CFG-011", "REQ-DB-006")
@pytest.mark.parametrize("env, state", [({}, "is not set"), ({"PROD_PW": ""}, "is empty")])
def test_a_password_variable_that_is_missing_or_empty_is_refused(tmp_path: Path, env: dict[str, str], state: str) -> None:
    assert configs.refused(tmp_path, with_database("password_env: PROD_PW"), env) == [
        f"prod.yaml:5: the environment variable 'PROD_PW' {state}. 'password_env' of database 'prod' takes the name of "
        "a variable, not the secret; set it, in cron and systemd too"]


@pytest.mark.req("REQ-DB-006")
def test_a_password_in_the_file_is_taken_with_a_warning(tmp_path: Path) -> None:
    found = configs.load(tmp_path, with_database("password: hunter2"))
    assert found.databases[0].password == config.Secret("hunter2")
    assert found.warnings == ("prod.yaml:5: 'password' of database 'prod' stands in the file in clear; "
                              "write 'password_env: NAME' and set NAME",)


@pytest.mark.req("REQ-DB-006", "REQ-SEC-001")
@pytest.mark.parametrize("mode", [0o644, 0o604, 0o666, 0o602])
def test_a_file_with_a_password_that_others_can_read_is_refused_with_the_chmod_to_run(tmp_path: Path, mode: int) -> None:
    configs.write(tmp_path, with_database("password: hunter2"), mode=mode)
    with pytest.raises(exits.ConfigError) as caught:
        config.load("prod.yaml", {}, cwd=str(tmp_path))
    assert caught.value.code == 3
    assert str(caught.value) == (f"prod.yaml:5: 'prod.yaml' holds a secret and others can read it (mode {mode:04o}). "
                                 "run: chmod o-rwx prod.yaml")
    assert os.system(f"cd {tmp_path} && chmod o-rwx prod.yaml") == 0
    assert config.load("prod.yaml", {}, cwd=str(tmp_path)).databases[0].password == config.Secret("hunter2")


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_file_with_a_password_that_only_its_owner_and_group_can_read_is_taken(tmp_path: Path, mode: int) -> None:
    configs.write(tmp_path, with_database("password: hunter2"), mode=mode)
    assert config.load("prod.yaml", {}, cwd=str(tmp_path)).databases[0].password


def test_a_readable_file_without_a_secret_in_clear_is_taken(tmp_path: Path) -> None:
    for line, env in (("password: ${PW}", {"PW": "hunter2"}), ("password_env: PW", {"PW": "hunter2"}), ("port: 5432", {})):
        configs.write(tmp_path, with_database(line), mode=0o644)
        assert config.load("prod.yaml", env, cwd=str(tmp_path)).warnings == ()


def test_the_default_of_a_variable_is_in_clear_too(tmp_path: Path) -> None:
    configs.write(tmp_path, with_database("password: ${PW:-hunter2}"), mode=0o644)
    with pytest.raises(exits.ConfigError, match="others can read it"):
        config.load("prod.yaml", {}, cwd=str(tmp_path))
    assert config.load("prod.yaml", {"PW": "x"}, cwd=str(tmp_path)).warnings == ()


def test_the_file_that_holds_the_password_is_judged_and_not_the_one_that_includes_it(tmp_path: Path) -> None:
    configs.write(tmp_path, "name: prod\npassword: hunter2\ntables:\n  - {name: a, timestamp_column: t, primary_key: i}\n",
                  "secret dir/db.yaml", mode=0o644)
    found = configs.refused(tmp_path, "s3: {bucket: audit-archives}\ndatabases:\n  - !include secret dir/db.yaml\n")
    assert found == ["secret dir/db.yaml:2: 'secret dir/db.yaml' holds a secret and others can read it (mode 0644). "
                     "run: chmod o-rwx 'secret dir/db.yaml'"]


def test_a_password_given_twice_is_refused(tmp_path: Path) -> None:
    found = configs.refused(tmp_path, with_database("password: a\n    password_env: B"), {"B": "b"})
    assert found == ["prod.yaml:5: 'password' of database 'prod' is given twice, as 'password' and as 'password_env'. "
                     "keep 'password_env' (line 6)"]


@pytest.mark.req("REQ-DB-007")
def test_a_secret_shows_as_stars_wherever_it_is_printed(tmp_path: Path) -> None:
    found = configs.load(tmp_path, with_database("password: hunter2"))
    secret = found.databases[0].password
    assert secret is not None and secret.reveal() == "hunter2"
    shown = [repr(found), str(secret), f"{secret}", f"{secret:>20}", "%s" % secret, str([secret]),
             str(dataclasses.asdict(found.databases[0])), repr(found.warnings)]
    assert not [text for text in shown if "hunter2" in text]
    assert shown[1] == "***"
    assert secret != config.Secret("other") and hash(secret) == hash(config.Secret("hunter2"))
    with pytest.raises(TypeError):
        pickle.dumps(secret)


# -- gaps filled from the environment


LIBPQ = {"PGHOST": "envhost", "PGPORT": "6000", "PGUSER": "envuser", "PGPASSWORD": "envpw", "PGSSLMODE": "require",
         "PGSSLROOTCERT": "/env/ca.pem", "PGDATABASE": "envdb", "PGSSLCERT": "/env/c", "PGSSLKEY": "/env/k"}


def connection(found: config.Config) -> tuple[Any, ...]:
    db = found.databases[0]
    return (db.host, db.port, db.user, db.password and db.password.reveal(), db.sslmode, db.sslrootcert, db.dbname,
            db.sslcert, db.sslkey)


def test_libpq_variables_fill_what_the_file_leaves_out(tmp_path: Path) -> None:
    text = configs.SOUND.replace("    host: db1.example.com\n", "")
    assert connection(configs.load(tmp_path, text, LIBPQ)) == (
        "envhost", 6000, "envuser", "envpw", "require", "/env/ca.pem", "prod", "/env/c", "/env/k")


def test_libpq_variables_override_nothing(tmp_path: Path) -> None:
    text = with_database("host: h\n    port: 5433\n    user: u\n    password: p\n    sslmode: verify-full\n"
                         "    sslrootcert: system\n    dbname: d\n    sslcert: /c\n    sslkey: /k")
    assert connection(configs.load(tmp_path, text, LIBPQ)) == (
        "h", 5433, "u", "p", "verify-full", "system", "d", "/c", "/k")


def test_a_port_of_the_environment_that_is_none_is_refused(tmp_path: Path) -> None:
    assert configs.refused(tmp_path, configs.SOUND, {"PGPORT": "x"}) == [
        "prod.yaml:4: the environment variable 'PGPORT' is no port. write 'port:' here, or set it to 1 to 65535"]


AWS = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK", "AWS_SESSION_TOKEN": "ST", "AWS_REGION": "eu-1",
       "AWS_DEFAULT_REGION": "eu-2", "AWS_ENDPOINT_URL": "http://env:1", "AWS_CA_BUNDLE": "/ca", "AWS_PROFILE": "envp"}


def store(found: config.Config) -> tuple[Any, ...]:
    s3 = found.s3
    return (s3.access_key_id, s3.secret_access_key and s3.secret_access_key.reveal(),
            s3.session_token and s3.session_token.reveal(), s3.profile, s3.region, s3.endpoint, s3.ca_bundle,
            s3.storage_class)


def s3_lines(*lines: str) -> str:
    return configs.SOUND.replace("archives\n", "archives\n" + "".join(f"  {line}\n" for line in lines))


@pytest.mark.parametrize("lines, env, expected", [
    ((), AWS, ("AK", "SK", "ST", None, "eu-1", "http://env:1", "/ca", None)),
    ((), {"AWS_PROFILE": "envp", "AWS_DEFAULT_REGION": "eu-2"},
     (None, None, None, "envp", "eu-2", None, None, "STANDARD_IA")),
    ((), {"AWS_ACCESS_KEY_ID": "AK", "AWS_SESSION_TOKEN": "ST"}, (None, None, None, None, None, None, None, "STANDARD_IA")),
    ((), {"AWS_ENDPOINT_URL_S3": "http://s3:2", **AWS}, ("AK", "SK", "ST", None, "eu-1", "http://s3:2", "/ca", None)),
    (("endpoint: null",), AWS, ("AK", "SK", "ST", None, "eu-1", None, "/ca", "STANDARD_IA")),
    (("endpoint: http://own:1", "region: own", "storage_class: STANDARD", "ca_bundle: /own"), AWS,
     ("AK", "SK", "ST", None, "own", "http://own:1", "/own", "STANDARD")),
    (("profile: ownp",), AWS, (None, None, None, "ownp", "eu-1", "http://env:1", "/ca", None)),
    (("access_key_id: k", "secret_access_key: s"), AWS, ("k", "s", None, None, "eu-1", "http://env:1", "/ca", None)),
    (("access_key_id_env: K", "secret_access_key_env: S", "session_token_env: T"),
     {**AWS, "K": "k1", "S": "s1", "T": "t1"}, ("k1", "s1", "t1", None, "eu-1", "http://env:1", "/ca", None)),
])
def test_aws_variables_fill_gaps_and_override_nothing(tmp_path: Path, lines: tuple[str, ...], env: dict[str, str],
                                                      expected: tuple[Any, ...]) -> None:
    assert store(configs.load(tmp_path, s3_lines(*lines), env)) == expected


@pytest.mark.parametrize("lines, says", [
    (("access_key_id: k",), "prod.yaml:3: 'access_key_id' needs its counterpart. "
                            "give both the access key id and the secret access key, or neither"),
    (("profile: p", "access_key_id_env: K", "secret_access_key_env: K"),
     "prod.yaml:3: 's3.profile' and keys of its own exclude each other. keep one of them"),
    (("access_key_id_env: K", "secret_access_key_env: NOPE"), "prod.yaml:4: the environment variable 'NOPE' is not set. "
     "'s3.secret_access_key_env' takes the name of a variable, not the secret; set it, in cron and systemd too"),
])
def test_keys_of_s3_that_do_not_fit_together_are_refused(tmp_path: Path, lines: tuple[str, ...], says: str) -> None:
    assert configs.refused(tmp_path, s3_lines(*lines), {"K": "k"}) == [says]


# -- paths


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    configs.write(tmp_path, "{bucket: audit-archives, local_fallback_dir: fallback, ca_bundle: ~/ca.pem}", "parts/s3.yaml")
    text = "s3: !include parts/s3.yaml\nstaging_dir: ./staging/x/..\n" + configs.SOUND.split("\n", 2)[2] \
        .replace("host: db1.example.com", "sslrootcert: certs/ca.pem")
    found = configs.load(tmp_path, text, {"HOME": "/home/me"})
    assert found.staging_dir == tmp_path / "staging"
    assert found.s3.local_fallback_dir == tmp_path / "parts/fallback"
    assert found.s3.ca_bundle == "/home/me/ca.pem"
    assert found.databases[0].sslrootcert == str(tmp_path / "certs/ca.pem")


def test_the_staging_directory_is_looked_for_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tmp_path / "system"
    monkeypatch.setattr(places, "SYSTEM_STATE", str(system))
    plain = configs.load(tmp_path)
    configured = dataclasses.replace(plain, staging_dir=Path("/configured"))
    env = {"AA_STAGING": "/env", "STATE_DIRECTORY": "/systemd:/second", "XDG_STATE_HOME": "/xdg", "HOME": "/home/me"}
    assert config.staging_root(configured, "/flag", env) == Path("/flag")
    assert config.staging_root(configured, None, env) == Path("/env")
    del env["AA_STAGING"]
    assert config.staging_root(configured, None, env) == Path("/configured")
    assert config.staging_root(plain, None, env) == Path("/systemd")
    del env["STATE_DIRECTORY"]
    assert config.staging_root(plain, None, env) == Path("/xdg/audit-archiver")
    assert config.staging_root(plain, None, {"HOME": "/home/me", "XDG_STATE_HOME": "relative"}) == Path(
        "/home/me/.local/state/audit-archiver")
    system.mkdir()
    assert config.staging_root(plain, None, env) == system


def test_a_relative_staging_flag_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.staging_root(configs.load(tmp_path), "here", {}) == tmp_path / "here"


def test_the_configuration_is_looked_for_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flag.yaml", "env.yaml", "audit-archiver.yaml", "xdg/audit-archiver/config.yaml",
                 "home/.config/audit-archiver/config.yaml", "etc.yaml"):
        configs.write(tmp_path, configs.SOUND, name)
    monkeypatch.setattr(places, "SYSTEM_CONFIG", str(tmp_path / "etc.yaml"))
    env = {"AA_CONFIG": str(tmp_path / "env.yaml"), "XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path / "home")}
    cwd = str(tmp_path)
    assert config.find("flag.yaml", env, cwd) == "flag.yaml"
    assert config.find(None, env, cwd) == str(tmp_path / "env.yaml")
    del env["AA_CONFIG"]
    assert config.find(None, env, cwd) == "audit-archiver.yaml"
    assert config.load(None, env, cwd=cwd).path == "audit-archiver.yaml"
    (tmp_path / "audit-archiver.yaml").unlink()
    assert config.find(None, env, cwd) == str(tmp_path / "xdg/audit-archiver/config.yaml")
    del env["XDG_CONFIG_HOME"]
    assert config.find(None, env, cwd) == str(tmp_path / "home/.config/audit-archiver/config.yaml")
    env["HOME"] = str(tmp_path / "elsewhere")
    assert config.find(None, env, cwd) == str(tmp_path / "etc.yaml")
    (tmp_path / "etc.yaml").unlink()
    with pytest.raises(exits.ConfigError) as caught:
        config.find(None, env, cwd)
    assert str(caught.value) == (
        f"there is no configuration; looked for ./audit-archiver.yaml, {tmp_path}/elsewhere/.config/audit-archiver/"
        f"config.yaml, {tmp_path}/etc.yaml. name one with --config FILE or AA_CONFIG")


@pytest.mark.parametrize("flag, env, by", [("no.yaml", {}, "--config"), (None, {"AA_CONFIG": "no.yaml"}, "AA_CONFIG")])
def test_a_configuration_that_was_asked_for_must_exist(tmp_path: Path, flag: str, env: dict[str, str], by: str) -> None:
    configs.write(tmp_path, configs.SOUND, "audit-archiver.yaml")
    with pytest.raises(exits.ConfigError) as caught:
        config.load(flag, env, cwd=str(tmp_path))
    assert str(caught.value) == f"there is no configuration 'no.yaml'; {by} names it. give the path of an existing file"


def test_home_is_known_without_the_variable() -> None:
    assert resolve.home({"HOME": "/x"}) == "/x"
    assert re.fullmatch(r"/.*", resolve.home({}))


def test_a_configuration_finds_its_databases_and_tables_by_name(tmp_path: Path) -> None:
    found = configs.load(tmp_path)
    database = found.database("prod")
    assert database is found.databases[0] and found.database("other") is None
    assert database.table("public", "audit_logs") is database.tables[0] and database.table("audit", "audit_logs") is None


def test_what_is_said_of_the_network_arrives(tmp_path: Path) -> None:
    keys = {"multipart_timeout_hours": 48, "local_fallback_retention_days": 14, "rate_limit_requests_per_second": 100,
            "rate_limit_mb_per_second": 20, "circuit_breaker_failures": 5, "circuit_breaker_reset_s": 30}
    said = "".join(f"\n  {key}: {value}" for key, value in keys.items())
    found = configs.load(tmp_path, configs.SOUND.replace("bucket: audit-archives", f"bucket: audit-archives{said}", 1)).s3
    assert {key: getattr(found, key) for key in keys} == keys
