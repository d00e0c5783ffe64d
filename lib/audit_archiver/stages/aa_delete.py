"""Delete the rows of verified batches: exactly the keys that were read back from the store, or nothing.

Reads verified batch lines; writes them with `deleted` (and with `committed` when run without a holder);
touches PostgreSQL, and without a holder the object store too. Inside aa-txn or aa-archive the holder deletes
in the transaction that locked the rows, and commits it itself. Without AA_TXN the guarded path takes the lock,
recovers, locks the keys, compares every row's content with the archived one, and deletes and commits only what is
still the same. A rerun deletes nothing twice: a batch that is recorded is passed over, one whose rows are gone and
that is not recorded is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Sequence

from audit_archiver import cli, config, exits, log
from audit_archiver.cli import Command
from audit_archiver.exits import ConfigError, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.holder.client import Client
from audit_archiver.objectstore.client import open_store
from audit_archiver.points import point

if TYPE_CHECKING:
    from audit_archiver.catalogue.guard import Guard

NAME = "aa-delete"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv, stage=True)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__, reads="verified batch lines")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--explain", action="store_true",
                     help="delete nothing; write {\"key\":[...],\"now\":\"changed|absent\"} for each row that is not as it was archived")
    how.add_argument("--allow-subset", action="store_true",
                     help="without a holder: delete the rest of a batch of which some rows are gone and none was changed")
    parser.add_argument("--force-rearchive", action="store_true",
                        help="without a holder: delete also rows that aa-restore --hold-until keeps in their table")
    return parser


def run(command: Command) -> int:
    """Delete every batch of the input, in the holder's transaction or by the guarded path."""
    if command.holder is None:
        return _run_guarded(command)
    if command.args.explain or command.args.allow_subset or command.args.force_rearchive:
        raise ConfigError("--explain, --allow-subset and --force-rearchive belong to the guarded path", hint="unset AA_TXN")
    for text in command.source():
        line = batches.parse(text, needs=("uploaded", "verified"), lacks=("deleted",))
        command.sink.emit(_delete_held(command.holder, line))
    return exits.OK


def _delete_held(holder: Client, line: dict[str, Any]) -> dict[str, Any]:
    batch = line["batch"]
    txn = batch["txn"]
    if txn is None or txn["holder"] != holder.holder:
        raise Mismatch(f"{batches.name(batch)} was not selected in this holder's transaction",
                       hint="delete it without AA_TXN: the guarded path compares and locks first")
    point("delete.before")
    deleted = holder.call("delete", handle=txn["handle"], batch=line)
    point("delete.done")
    line["deleted"] = {"at": deleted["at"], "verdict": "FULL", "rows": deleted["rows"]}
    log.info("batch.deleted", f"{batches.name(batch)}: {deleted['rows']} rows deleted, not yet committed",
             batch=batch["id"], rows=deleted["rows"])
    return line


def _run_guarded(command: Command) -> int:
    from audit_archiver.catalogue.guard import Guard  # with it comes the database driver, which the held delete does without

    source = command.source()
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    store = open_store(settings, watch=command.sink.stream)
    guard = Guard(settings, store, config.staging_root(settings, None, command.env))
    try:
        for text in source:
            if command.args.explain:
                _explain(command, guard, batches.parse(text, needs=("serialized",)))
                continue
            line = batches.parse(text, needs=("uploaded", "verified"), lacks=("deleted", "committed"))
            log.bind(run_id=line["batch"]["run"])
            deleted = guard.delete(line, allow_subset=command.args.allow_subset, force_rearchive=command.args.force_rearchive)
            if deleted is not None:
                command.sink.emit(deleted)
    finally:
        guard.close()
    return exits.OK


def _explain(command: Command, guard: Guard, line: dict[str, Any]) -> None:
    """One JSON line for each key whose row is not as it was archived; the key's text is passed on as it is."""
    counts = {"same": 0, "changed": 0, "absent": 0}
    for key_text, now in guard.explain(line):
        counts[now] += 1
        if now != "same":
            command.sink.write(b'{"key":[' + key_text + b'],"now":"' + now.encode() + b'"}\n')
    log.info("delete.explained", f"{batches.name(line['batch'])}: {counts['same']} rows are as they were archived, "
             f"{counts['changed']} were changed, {counts['absent']} are gone", **counts)
