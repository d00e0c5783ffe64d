"""What a schema cannot say: rules between keys, and keys of capabilities that this release does not have.

A key that guards rows and does not work yet is refused; one of comfort logs a warning; none is silently ignored.
Every rule is a function of the tree, and adds to its problems and warnings.
"""

from __future__ import annotations

from typing import Any, Optional

from audit_archiver.config.tree import KeyPath, Tree
from audit_archiver.formats import names

UNREADABLE_CLASSES = ("GLACIER", "DEEP_ARCHIVE")
MIN_RETENTION_DAYS = 7
MAX_RETENTION_DAYS = 2555
CONTROL_CONNECTIONS = 2

COMFORT = (
    (("observability", "log_file"), "is not written yet; the log goes to stderr, so let cron or systemd keep it"),
    (("observability", "prometheus_port"), "has no effect yet: there is no metrics endpoint"),
    (("observability", "heartbeat_interval"), "has no effect yet"),
    (("observability", "enable_profiling"), "has no effect yet"),
    (("resources", "max_disk_space_gb"), "has no effect yet; put 'staging_dir' on a file system of its own"),
    (("defaults", "connection_pool_size"), "has no effect: a run opens one connection per batch in flight"),
)
COMFORT_OF_A_DATABASE = (
    ("read_replica", "is not used yet: planning reads the primary too"),
    ("connection_pool_size", "has no effect: a run opens one connection per batch in flight"),
)
_OFF = (None, False)


def apply(tree: Tree) -> None:
    """Apply every rule."""
    for rule in (_legal_holds, _locking, _classifications, _encryption, _storage, _connections, _retention,
                 _names, _keys, _comfort):
        rule(tree)


def _legal_holds(tree: Tree) -> None:
    holds = tree.get(("legal_holds",))
    if isinstance(holds, dict) and holds.get("enabled") is not False:
        tree.refuse(("legal_holds",) + (("enabled",) if "enabled" in holds else ()),
                    "'legal_holds' does not work yet, and rows under a hold would be deleted",
                    "write 'enabled: false' under 'legal_holds', and leave tables under a hold out of 'databases'")


def _locking(tree: Tree) -> None:
    backend = tree.get(("locking", "backend"))
    for wanted, key, example in (("redis", "redis_url_env", "REDIS_URL"), ("file", "lock_dir", "/srv/shared/locks")):
        if backend == wanted and tree.get(("locking", key)) is None:
            tree.refuse(("locking", "backend"), f"the locking backend '{wanted}' needs '{key}'", f"write '{key}: {example}' under 'locking'")
        elif backend != wanted and tree.get(("locking", key)) is not None:
            tree.warn(("locking", key), f"'locking.{key}' has no effect: the backend is {backend or 'postgres'}")
    timeout, beat = tree.get(("locking", "lock_timeout_minutes"), 120), tree.get(("locking", "heartbeat_s"), 30)
    if timeout * 60 < 2 * beat:
        path = ("locking", "heartbeat_s" if tree.get(("locking", "heartbeat_s")) is not None else "lock_timeout_minutes")
        tree.refuse(path, f"a lock times out after {timeout * 60:g} s and is to be beaten every {beat:g} s: a run that works would seem dead",
                    "let 'lock_timeout_minutes' be at least twice as long as 'heartbeat_s'")
    if tree.get(("locking", "enabled")) is False:
        tree.refuse(("locking", "enabled"), "'locking.enabled: false' would let two runs delete the same rows",
                    "remove the line, or write 'enabled: true'")


def _classifications(tree: Tree) -> None:
    path = ("compliance", "data_classifications")
    if tree.get(path):
        tree.refuse(path, "rules by classification do not work yet, and rows would be archived against them",
                    "remove 'data_classifications', and give each table its 'retention_days'")


def _encryption(tree: Tree) -> None:
    encryption = tree.get(("s3", "encryption"))
    if tree.get(("compliance", "enforce_encryption")) is True and encryption is None:
        tree.refuse(("compliance", "enforce_encryption"), "'compliance.enforce_encryption' needs 's3.encryption'",
                    "write 'encryption: SSE-S3' or 'encryption: SSE-KMS' under 's3'")
    if tree.get(("s3", "kms_key_id")) is not None and encryption != "SSE-KMS":
        tree.refuse(("s3", "kms_key_id"), "'s3.kms_key_id' has no effect without 's3.encryption: SSE-KMS'",
                    "write 'encryption: SSE-KMS', or remove 'kms_key_id'")


def _storage(tree: Tree) -> None:
    storage = tree.get(("s3", "storage_class"))
    if storage in UNREADABLE_CLASSES:
        tree.refuse(("s3", "storage_class"), f"objects of class '{storage}' cannot be read back at once, and nothing "
                    "is deleted that was not read back",
                    "write 'storage_class: GLACIER_IR', or let a lifecycle rule of the bucket move the objects later")
    if tree.get(("s3", "partition_by")) == "record":
        tree.refuse(("s3", "partition_by"), "'s3.partition_by: record' does not work yet",
                    "write 'partition_by: execution'; restores select by the rows' own dates all the same")
    if tree.get(("s3", "verify")) == "head":
        tree.warn(("s3", "verify"), "'s3.verify: head' deletes rows whose archived content was never read back")
        for path, table in _tables(tree):
            if table.get("critical") is True:
                tree.refuse(path + ("critical",), f"{tree.subject(path)} is critical and 's3.verify' is head",
                            f"write 'verify: read' ({tree.place(('s3', 'verify'))})")
    low, high = tree.get(("s3", "retry_base_s")), tree.get(("s3", "retry_max_s"))
    if low is not None and high is not None and low > high:
        tree.refuse(("s3", "retry_max_s"), "'s3.retry_max_s' is less than 's3.retry_base_s'", "swap the two")


def _connections(tree: Tree) -> None:
    in_flight = tree.get(("in_flight_batches",), 2)
    limit = tree.get(("resources", "max_connections_per_db"), 5)
    if in_flight + CONTROL_CONNECTIONS > limit:
        path = ("in_flight_batches",) if tree.get(("in_flight_batches",)) else ("resources", "max_connections_per_db")
        tree.refuse(path, f"{in_flight} batches in flight need {in_flight + CONTROL_CONNECTIONS} connections, and "
                    f"'resources.max_connections_per_db' is {limit}",
                    f"write 'max_connections_per_db: {in_flight + CONTROL_CONNECTIONS}' under 'resources', "
                    "or fewer batches in flight")


def retention_bounds(tree: Tree) -> tuple[Optional[int], Optional[int]]:
    """The smallest and the largest retention that a table may have, in days; None, None where switched off."""
    if tree.get(("compliance", "retention_policy", "enabled")) is False:
        return None, None
    low = _bound(tree, "min_retention_days")
    high = _bound(tree, "max_retention_days")
    return (MIN_RETENTION_DAYS if low is None else low), (MAX_RETENTION_DAYS if high is None else high)


def _bound(tree: Tree, key: str) -> Optional[int]:
    direct = tree.get(("compliance", key))
    return tree.get(("compliance", "retention_policy", key)) if direct is None else direct


def _retention(tree: Tree) -> None:
    """REQ-CMP-001..003: a table whose retention lies outside the bounds is refused where its retention is written."""
    for key in ("min_retention_days", "max_retention_days"):
        outer, inner = ("compliance", key), ("compliance", "retention_policy", key)
        if tree.get(outer) is not None and tree.get(inner) not in (None, tree.get(outer)):
            tree.refuse(inner, f"'{key}' is given twice, with different values", f"keep one ({tree.place(outer)})")
    low, high = retention_bounds(tree)
    if low is None or high is None:
        tree.warn(("compliance", "retention_policy", "enabled"), "the bounds of retention are switched off")
        return
    if low > high:
        tree.refuse(_written(tree, "max_retention_days"), f"'max_retention_days' {high} is less than "
                    f"'min_retention_days' {low}", "swap the two")
        return
    outside: dict[KeyPath, list[KeyPath]] = {}
    for path, _table in _tables(tree):
        days, written = inherited(tree, path, "retention_days", 90)
        if isinstance(days, int) and not low <= days <= high:
            outside.setdefault(written or path, []).append(path)
    for written, tables in outside.items():
        days = inherited(tree, tables[0], "retention_days", 90)[0]
        few = days < low
        bound = _written(tree, "min_retention_days" if few else "max_retention_days")
        where = f" ({tree.place(bound)})" if tree.get(bound) is not None else ""
        more = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
        tree.refuse(written, f"'retention_days' {days} of {tree.subject(tables[0])}{more} is "
                    f"{'less than the minimum of' if few else 'more than the maximum of'} {low if few else high}",
                    f"write {low} to {high}, or change '{bound[-1]}' of 'compliance'{where}")


def _written(tree: Tree, key: str) -> KeyPath:
    outer, inner = ("compliance", key), ("compliance", "retention_policy", key)
    return inner if tree.get(outer) is None and tree.get(inner) is not None else outer


def inherited(tree: Tree, table: KeyPath, key: str, default: Any) -> tuple[Any, Optional[KeyPath]]:
    """The value of `key` for a table or database, and where it is written: table > database > defaults (REQ-CFG-002)."""
    owners = [table] + ([table[:2]] if len(table) > 2 else []) + [("defaults",)]
    for owner in owners:
        value = tree.get(owner + (key,))
        if value is not None:
            return value, owner + (key,)
    return default, None


def _names(tree: Tree) -> None:
    """No database and no table twice: two jobs for one table would be two deleters."""
    databases: dict[str, KeyPath] = {}
    tables: dict[tuple[Any, ...], KeyPath] = {}
    for number, database in enumerate(tree.get(("databases",), [])):
        path, name = ("databases", number), database.get("name")
        if name is not None and name in databases:
            tree.refuse(path + ("name",), f"database '{name}' is configured twice ({tree.place(databases[name])})",
                        "put its tables under one entry, or give this one another 'name' and its 'dbname'")
        elif name is not None:
            databases[name] = path + ("name",)
        server = (database.get("host"), database.get("port", 5432), database.get("dbname") or name)
        for index, table in enumerate(database.get("tables", [])):
            inner = path + ("tables", index)
            if table.get("name") is None:
                continue
            identity = server + (table.get("schema", "public"), table["name"])
            if identity in tables:
                tree.refuse(inner + ("name",), f"{tree.subject(inner)} is configured twice "
                            f"({tree.place(tables[identity] + ('name',))})", "keep one of the two")
            tables.setdefault(identity, inner)
    if databases and not tables and not tree.problems:
        tree.refuse(("databases",), "no table is configured", "list at least one under 'tables' of a database")


def _keys(tree: Tree) -> None:
    """Every object key fits into S3's 1,024 bytes, whatever the tables are called."""
    prefix = names.normal_prefix(str(tree.get(("s3", "prefix")) or ""))
    most = names.KEY_BYTES - names.BELOW_DATABASE_BYTES
    for number, database in enumerate(tree.get(("databases",), [])):
        size = len(names.database_dir(prefix, str(database.get("name") or "")).encode())
        if size > most:
            tree.refuse(("s3", "prefix"), f"'s3.prefix' and the name of {tree.subject(('databases', number))} take {size} bytes of every "
                        f"object key, of which S3 allows {names.KEY_BYTES}", f"choose a prefix that is {size - most} bytes shorter")


def _comfort(tree: Tree) -> None:
    for path, says in COMFORT:
        if tree.get(path) not in _OFF:
            tree.warn(path, f"{tree.subject(path)} {says}")
    for number, database in enumerate(tree.get(("databases",), [])):
        for key, says in COMFORT_OF_A_DATABASE:
            if database.get(key) is not None:
                path = ("databases", number, key)
                tree.warn(path, f"{tree.subject(path)} {says}")
    labelled = next((path for path, table in _tables(tree) if table.get("classification")), None)
    if labelled is not None:
        tree.warn(labelled + ("classification",), "'classification' is a label only: no rule depends on it yet")
    if _wanted(tree.get(("notifications",))):
        tree.warn(("notifications",), "'notifications' are not sent yet; cron mails what a failing run prints")


def _wanted(section: Any) -> bool:
    """True unless the section is empty or everything in it says 'enabled: false'."""
    if isinstance(section, dict):
        if section.get("enabled") is False:
            return False
        parts = [each for each in section.values() if isinstance(each, (dict, list))]
        return any(_wanted(each) for each in parts) if parts else bool(section)
    return bool(section)


def _tables(tree: Tree) -> list[tuple[KeyPath, dict[str, Any]]]:
    return [(("databases", number, "tables", index), table)
            for number, database in enumerate(tree.get(("databases",), []))
            for index, table in enumerate(database.get("tables", []))]
