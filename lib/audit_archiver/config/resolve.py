"""Makes the objects of `model` out of a checked tree: defaults applied, secrets read, gaps filled from PG* and AWS_*.

The configuration wins: a variable of the environment fills what the file leaves out and overrides nothing.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any, Mapping, Optional

from audit_archiver.config import credentials, rules
from audit_archiver.config.credentials import Secret
from audit_archiver.config.model import S3, Compliance, Config, Database, Locking, Observability, Resources, Table
from audit_archiver.config.tree import KeyPath, Tree
from audit_archiver.formats import names, schema

BASE_MB = 100
COPIES_OF_A_ROW = 3


def resolve(tree: Tree, env: Mapping[str, str]) -> Config:
    """The configuration of `tree`. Raises its problems, all of them, before anything is made of it."""
    s3 = _s3(tree, env)
    databases = tuple(_database(tree, ("databases", number), env)
                      for number in range(len(tree.get(("databases",), []))))
    compliance = _compliance(tree)
    resources, locking = _resources(tree), _locking(tree, env)
    tree.raise_problems()
    return Config(
        path=tree.path, s3=s3, databases=databases, staging_dir=_directory(tree, ("staging_dir",), env),
        in_flight_batches=int(_value(tree, ("in_flight_batches",))),
        parallel_databases=_value(tree, ("defaults", "parallel_databases")),
        max_parallel_databases=int(_value(tree, ("defaults", "max_parallel_databases"))), roundtrip=_value(tree, ("roundtrip",)),
        restore_watermark=_value(tree, ("restore_watermark", "storage_type")) if _value(tree, ("restore_watermark", "enabled")) else None,
        locking=locking, resources=resources,
        observability=_section(tree, "observability", Observability), compliance=compliance,
        warnings=tuple(dict.fromkeys(tree.warnings)))


def _value(tree: Tree, path: KeyPath) -> Any:
    """The value at `path`, or the default that the schema gives it."""
    found = tree.get(path)
    return default(path) if found is None else found


def default(path: KeyPath) -> Any:
    """The default of the schema for a key, e.g. ("s3", "retries") or ("table", "schema")."""
    whole = schema.load("config")
    node = whole["$defs"][path[0]] if path[0] in ("table", "database") else whole["properties"][path[0]]
    for key in path[1:]:
        node = node["properties"][key]
    if "default" not in node and "$ref" in node:
        node = whole["$defs"][node["$ref"].rpartition("/")[2]]
    return node.get("default")


def _section(tree: Tree, name: str, kind: Any) -> Any:
    """An object of `kind` whose fields are the keys of a section."""
    return kind(**{field: _value(tree, (name, field)) for field in kind.__dataclass_fields__})


def _locking(tree: Tree, env: Mapping[str, str]) -> Locking:
    plain = {key: _value(tree, ("locking", key)) for key in (
        "enabled", "backend", "mode", "scope", "lock_timeout_minutes", "heartbeat_s", "when_others_wait", "others_wait_s", "held_warning_s")}
    url = credentials.choose(tree, ("locking",), "redis_url", env) if plain["backend"] == "redis" else None
    return Locking(redis_url=_secret(url), lock_dir=_directory(tree, ("locking", "lock_dir"), env), **plain)


def _resources(tree: Tree) -> Resources:
    memory = tree.get(("resources", "max_memory_mb"))
    row = _value(tree, ("resources", "max_row_mb"))
    if memory is not None:
        fits = (memory - BASE_MB) / COPIES_OF_A_ROW
        if fits < row and tree.get(("resources", "max_row_mb")) is not None:
            tree.warn(("resources", "max_row_mb"), f"'resources.max_row_mb' {row} is lowered to {fits:.0f}, "
                      f"which fits 'max_memory_mb' {memory}")
        row = min(row, fits)
    return Resources(max_row_mb=row, max_memory_mb=memory or BASE_MB + COPIES_OF_A_ROW * row,
                     max_connections_per_db=int(_value(tree, ("resources", "max_connections_per_db"))),
                     max_run_hours=_value(tree, ("resources", "max_run_hours")),
                     min_free_disk_gb=_value(tree, ("resources", "min_free_disk_gb")))


def _compliance(tree: Tree) -> Compliance:
    low, high = rules.retention_bounds(tree)
    return Compliance(low, high, _value(tree, ("compliance", "enforce_encryption")))


def _s3(tree: Tree, env: Mapping[str, str]) -> S3:
    values = tree.get(("s3",)) or {}
    section: KeyPath = ("s3",)
    secret = credentials.choose(tree, section, "secret_access_key", env)
    key_id = credentials.choose(tree, section, "access_key_id", env, secret=False)
    token = credentials.choose(tree, section, "session_token", env)
    configured = [key for key in values if key.startswith(("access_key_id", "secret_access_key"))]
    if len({key.replace("_env", "") for key in configured}) == 1:
        tree.refuse(section + (configured[0],), f"'{configured[0]}' needs its counterpart",
                    "give both the access key id and the secret access key, or neither")
    if configured and values.get("profile"):
        tree.refuse(section + ("profile",), "'s3.profile' and keys of its own exclude each other", "keep one of them")
    profile = values.get("profile")
    if not configured and not profile:
        key_id, secret, token, profile = _aws_identity(env)
    endpoint = values.get("endpoint")
    if "endpoint" not in values:
        endpoint = _first(env, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    storage = values.get("storage_class") or (None if endpoint else "STANDARD_IA")
    plain = {key: _value(tree, section + (key,)) for key in (
        "encryption", "kms_key_id", "addressing_style", "multipart_threshold_mb", "multipart_part_mb",
        "compression_level", "verify", "retries", "retry_base_s", "retry_max_s", "connect_timeout_s",
        "read_timeout_s", "multipart_timeout_hours", "local_fallback_retention_days", "rate_limit_requests_per_second",
        "rate_limit_mb_per_second", "circuit_breaker_failures", "circuit_breaker_reset_s")}
    return S3(
        bucket=values.get("bucket", ""), prefix=names.normal_prefix(values.get("prefix") or ""), endpoint=endpoint,
        region=values.get("region") or _first(env, "AWS_REGION", "AWS_DEFAULT_REGION"), storage_class=storage,
        profile=profile, access_key_id=key_id, secret_access_key=_secret(secret), session_token=_secret(token),
        ca_bundle=_file(tree, section + ("ca_bundle",), env) or env.get("AWS_CA_BUNDLE") or None,
        local_fallback_dir=_directory(tree, section + ("local_fallback_dir",), env), at=str(tree.place(section)), **plain)


def _aws_identity(env: Mapping[str, str]) -> tuple[Optional[str], Optional[str], Optional[str], Optional[str]]:
    """Keys, token and profile of the environment; never a token of one with keys of another."""
    key_id, secret = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
    if key_id and secret:
        return key_id, secret, env.get("AWS_SESSION_TOKEN") or None, None
    return None, None, None, env.get("AWS_PROFILE") or None


def _database(tree: Tree, path: KeyPath, env: Mapping[str, str]) -> Database:
    values = tree.get(path)
    password = credentials.choose(tree, path, "password", env) or env.get("PGPASSWORD") or None
    sslrootcert = values.get("sslrootcert")
    if sslrootcert != "system":
        sslrootcert = _file(tree, path + ("sslrootcert",), env)
    tables = tuple(_table(tree, path + ("tables", index)) for index in range(len(values.get("tables", []))))
    return Database(
        name=values.get("name", ""), dbname=values.get("dbname") or "", host=values.get("host") or _first(env, "PGHOST"),
        port=_port(tree, path, env), user=values.get("user") or _first(env, "PGUSER"), password=_secret(password),
        sslmode=values.get("sslmode") or _first(env, "PGSSLMODE"),
        sslrootcert=sslrootcert or _first(env, "PGSSLROOTCERT"),
        sslcert=_file(tree, path + ("sslcert",), env) or _first(env, "PGSSLCERT"),
        sslkey=_file(tree, path + ("sslkey",), env) or _first(env, "PGSSLKEY"),
        read_replica=values.get("read_replica"),
        lock_timeout_s=_inherited(tree, path, "lock_timeout"),
        transaction_timeout_s=_inherited(tree, path, "transaction_timeout"),
        fsync_off=values.get("fsync_off") or default(("database", "fsync_off")), max_table_tb=_value(tree, ("resources", "max_table_tb")),
        tables=tables, at=str(tree.place(path)))


def _port(tree: Tree, path: KeyPath, env: Mapping[str, str]) -> int:
    port = tree.get(path + ("port",))
    if port is None and env.get("PGPORT"):
        text = env["PGPORT"]
        if text.isdigit() and 1 <= int(text) <= 65535:
            return int(text)
        tree.refuse(path, "the environment variable 'PGPORT' is no port", "write 'port:' here, or set it to 1 to 65535")
    return int(port or default(("database", "port")))


def _table(tree: Tree, path: KeyPath) -> Table:
    values = tree.get(path)
    key, find = values.get("primary_key", ()), values.get("find_columns") or default(("table", "find_columns"))
    vacuum = _inherited(tree, path, "vacuum_strategy")
    return Table(
        name=values.get("name", ""), timestamp=values.get("timestamp_column", ""),
        key=(key,) if isinstance(key, str) else tuple(key), schema=values.get("schema") or default(("table", "schema")),
        retention_days=int(_inherited(tree, path, "retention_days")),
        safety_buffer_days=int(_inherited(tree, path, "safety_buffer_days")),
        batch_size=int(_inherited(tree, path, "batch_size")), sleep_s=_inherited(tree, path, "sleep_between_batches"),
        vacuum=vacuum if _inherited(tree, path, "vacuum_after") else "none",
        critical=values.get("critical") or False, classification=values.get("classification"),
        cascade=values.get("cascade") or default(("table", "cascade")),
        find=(find,) if isinstance(find, str) else tuple(find), at=str(tree.place(path)))


def _inherited(tree: Tree, path: KeyPath, key: str) -> Any:
    return rules.inherited(tree, path, key, default(("defaults", key)))[0]


def _secret(text: Optional[str]) -> Optional[Secret]:
    return Secret(text) if text else None


def _first(env: Mapping[str, str], *keys: str) -> Optional[str]:
    return next((env[key] for key in keys if env.get(key)), None)


def _file(tree: Tree, path: KeyPath, env: Mapping[str, str]) -> Optional[str]:
    """A file name made absolute: ~ is the home directory, relative is to the configuration that names it."""
    text = tree.get(path)
    if text is None:
        return None
    if text == "~" or text.startswith("~/"):
        text = home(env) + text[1:]
    return os.path.normpath(os.path.join(os.path.dirname(tree.real(tree.place(path).file)), text))


def _directory(tree: Tree, path: KeyPath, env: Mapping[str, str]) -> Optional[Path]:
    text = _file(tree, path, env)
    return None if text is None else Path(text)


def home(env: Mapping[str, str]) -> str:
    """The home directory, also where cron or a container leaves HOME unset; "/" for an account without one."""
    if env.get("HOME"):
        return env["HOME"]
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"
