"""Whose prefix is it? One database of one server writes under a table's prefix (postgres.md S12).

Two of the same name, a copy made from a dump for instance, would decide each other's batches in flight, each by its own
keys and transactions. So each table's `_owner.json` and each run's beginning name the server and the database, and
neither aa-upload nor recovery goes on where they are another's. A server that has taken the other's place for good,
restored from a dump or upgraded, says so once with `aa-recover --adopt`.
"""

from __future__ import annotations

from typing import Any, Optional

from audit_archiver import lines, log
from audit_archiver.catalogue import runs
from audit_archiver.exits import ConfigError
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NameTaken, NotFound
from audit_archiver.postgres.witness import Place

OWNER = "_owner.json"
HINT = ("give this configuration an s3.prefix or its database a name of its own; 'aa-recover --adopt', if this server has "
        "taken the other's place for good")


def claim(store: Store, batch: dict[str, Any], at: Optional[str] = None) -> None:
    """Make the prefix of a batch's table ours. Raises ConfigError if it is another server's, database's or table's."""
    value = {"format": "aa-owner", "version": 1, "system": batch["server"]["system"], "database_oid": batch["server"]["database_oid"],
             "database": batch["database"], "schema": batch["schema"], "table": batch["table"]}
    table_dir = names.table_dir(store.prefix, batch["database"], batch["schema"], batch["table"])
    found = read(store, table_dir)
    if found is None:
        try:
            store.put_record(table_dir + OWNER, lines.dump(value))
            return
        except NameTaken:
            found = read(store, table_dir)
    if found != value:
        raise _refusal(store, table_dir, found or {}, at)


def require(store: Store, table_dir: str, here: Place) -> None:
    """Raise ConfigError if a table's prefix is another server's or database's."""
    found = read(store, table_dir)
    if found is not None and (found["system"], found["database_oid"]) != (here.system, here.database_oid):
        raise _refusal(store, table_dir, found, None)


def require_run(run: runs.OpenRun, database: str, here: Place) -> None:
    """Raise ConfigError if an open run of this database's name is another server's or database's."""
    if run.began_on not in (None, (here.system, here.database_oid)):
        raise ConfigError(f"run {run.run} of database '{database}' is not ended, and it belongs to another server or database",
                          detail=f"system {run.began_on[0]}, database oid {run.began_on[1]}", hint=HINT)


def adopt(store: Store, table_dir: str, here: Place) -> bool:
    """Make a table's prefix ours, whosever it was; True if it was another's."""
    found = read(store, table_dir)
    if found is None or (found["system"], found["database_oid"]) == (here.system, here.database_oid):
        return False
    store.delete(table_dir + OWNER)
    store.put_new(table_dir + OWNER, lines.dump({**found, "system": here.system, "database_oid": here.database_oid}))
    log.warning("recover.adopted", f"'{store.url(table_dir)}' belonged to system {found['system']} and is ours from now on",
                system=found["system"])
    return True


def read(store: Store, table_dir: str) -> Optional[dict[str, Any]]:
    """What a table's prefix says about its owner; None if it is nobody's yet."""
    key = table_dir + OWNER
    try:
        content = store.get_bytes(key)
    except NotFound:
        return None
    value = lines.parse(content, f"'{store.url(key)}'")
    schema.validate("owner", value, f"'{store.url(key)}'")
    return dict(value)


def _refusal(store: Store, table_dir: str, owner: dict[str, Any], at: Optional[str]) -> ConfigError:
    return ConfigError(f"'{store.url(table_dir)}' belongs to another table, database or server",
                       detail=f"system {owner.get('system')}, database oid {owner.get('database_oid')}, "
                              f"{owner.get('database')} {owner.get('schema')}.{owner.get('table')}",
                       hint=HINT, at=at)
