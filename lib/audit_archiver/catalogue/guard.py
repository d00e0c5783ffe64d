"""The guarded delete: nothing is believed that can be looked up (postgres.md C9).

A batch that was selected without a lock is deleted only under the lock of its scope and after recovery, from the key
list in the bucket, after every row was locked and found as it is archived, and while the verified objects are there.
An intent with the transaction's id is in the bucket before the DELETE, so that a crash at any point can be decided.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

from audit_archiver import lines, log
from audit_archiver.catalogue import content, holds, index, runs
from audit_archiver.catalogue.decide import ABORTED, HOLD, NONE
from audit_archiver.catalogue.recover import Outcome, TableName, recover_database
from audit_archiver.config.model import Config, Database
from audit_archiver.exits import ArchiverError, ConfigError, Failed, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import keys, names, schema
from audit_archiver.formats.hold import Hold
from audit_archiver.holder.commit import unasked
from audit_archiver.locking.lock import Lock
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NameTaken
from audit_archiver.points import point
from audit_archiver.postgres import connect, partitions, witness
from audit_archiver.postgres.guarded import Guarded, InDoubt
from audit_archiver.postgres.transaction import Transaction

FULL, SUBSET = "FULL", "SUBSET"
SAME, CHANGED, ABSENT = "same", "changed", "absent"
INTENTS_MOST = 100


class Guard:
    """Guarded deletes of any number of batches; keeps the lock from a scope's first batch until `close`."""

    def __init__(self, config: Config, store: Store, staging: Path) -> None:
        self._config, self._store, self._staging = config, store, staging
        self._scopes: dict[str, Scope] = {}

    def delete(self, line: dict[str, Any], *, allow_subset: bool = False, force_rearchive: bool = False) -> Optional[dict[str, Any]]:
        """Delete and commit one batch; its line with `deleted` and `committed`, or None if it is recorded already.

        Raises Mismatch or Failed, and deletes nothing, unless every row is there as it was archived (or, with
        `allow_subset`, is there as it was archived or gone); ConfigError if a row of it is held, unless `force_rearchive`;
        LockHeld if another run holds the lock.
        """
        database = self._require_ours(line)
        batches.require_fresh(line)
        scope = self._scope(database, line)
        try:
            return self._delete(line, scope, allow_subset, force_rearchive)
        except InDoubt:
            raise
        except ArchiverError as error:  # whoever took over has ended our sessions: that is the reason of whatever failed then
            raise scope.lock.stood_still() or error from None

    def _delete(self, line: dict[str, Any], scope: Scope, allow_subset: bool, force_rearchive: bool) -> Optional[dict[str, Any]]:
        batch, title = line["batch"], batches.name(line["batch"])
        if self._settled(line, scope):
            return None
        scope.require_free(line)
        _, key_texts = content.key_list(self._store, line)
        guarded = scope.guarded(batch)
        guarded.require_unchanged(batch)
        with guarded.begun() as transaction:
            found = guarded.lock(key_texts)
            point("guarded.locked")
            if not force_rearchive:
                guarded.require_unheld(scope.holds, title)
            verdict, left_out = self._compare(line, guarded, key_texts, found, allow_subset)
            point("guarded.compared")
            _require_objects(self._store, line)
            guarded.require_ready()
            chosen = keys.Digest()
            chosen.update([key_texts[number - 1] for number in found])
            deleted = {"verdict": verdict, "rows": len(found), **({"left_out": left_out} if left_out else {})}
            self._intend(line, guarded, transaction, {**deleted, "keys_sha256": chosen.hexdigest()})
            point("guarded.intent.put")
            line["deleted"] = {"at": guarded.delete(len(found), chosen.hexdigest()), **deleted}
            point("guarded.deleted")
            xid = transaction.xid
            guarded.commit()
            point("guarded.committed")
        line["committed"] = {"at": line["deleted"]["at"], "xid": xid, "lsn": None, "by": "aa-delete", "sample_absent": None,
                             **_after_commit(line, guarded)}
        log.info("batch.committed", f"{title}: {len(found)} rows deleted and committed ({verdict})", batch=batch["id"],
                 rows=len(found), verdict=verdict, xid=xid)
        return line

    def explain(self, line: dict[str, Any]) -> Iterator[tuple[bytes, str]]:
        """(key text, SAME, CHANGED or ABSENT) of each row of a batch, in order. Reads only, and takes no lock."""
        batch = line["batch"]
        database = self._require_ours(line)
        key_texts = content.key_list(self._store, line)[1]
        control = connect.connect(database, purpose="explain", run=batch["run"])
        try:
            with witness.snapshot(control):
                table = witness.Table(control, batch)
                if not table.comparable:
                    raise Mismatch(f"a column of {batches.name(batch)} is gone from the table or has another type",
                                   hint="the rows cannot be compared any more")
                states = list(_states(content.row_digests(self._store, line), table.digests(key_texts)))
        finally:
            control.close()
        return zip(key_texts, states)

    def close(self) -> None:
        """Give the locks back and end every connection."""
        for scope in self._scopes.values():
            scope.close()

    def _require_ours(self, line: dict[str, Any]) -> Database:
        """The configured database of a batch. ConfigError if the batch was made with another configuration."""
        batch, stem = line["batch"], line["serialized"]["stem"]
        database = self._config.database(batch["database"])
        if database is None:
            raise ConfigError(f"the configuration has no database '{batch['database']}'", at=str(self._config.path))
        bucket = line["uploaded"]["bucket"] if "uploaded" in line else self._store.bucket
        ours = names.stem(self._store.prefix, batch["database"], batch["schema"], batch["table"], batch["archived_at"], batch["number"])
        if (bucket, stem) != (self._store.bucket, ours):
            raise ConfigError(f"{batches.name(batch)} lies in 's3://{bucket}/{stem}', not where the configuration says",
                              hint="use the configuration it was uploaded with", at=self._config.s3.at)
        return database

    def _scope(self, database: Database, line: dict[str, Any]) -> Scope:
        """The lock scope of a batch, locked and recovered."""
        if database.name not in self._scopes:
            self._scopes[database.name] = Scope(self._config, self._store, self._staging, database, line["batch"]["run"])
        scope = self._scopes[database.name]
        scope.enter(line)
        return scope

    def _settled(self, line: dict[str, Any], scope: Scope) -> bool:
        """True if the batch is recorded and gone; raises Mismatch if it is abandoned, or recorded and there again."""
        stem, title = line["serialized"]["stem"], batches.name(line["batch"])
        if self._store.head(stem + names.ABANDONED) is not None:
            raise Mismatch(f"{title} was abandoned by recovery, so it cannot be deleted", detail=f"'{stem}{names.ABANDONED}' says why",
                           hint="those of its rows that are in the table can be selected again")
        if self._store.head(stem + names.COMMIT) is None:
            if not runs.is_open(self._store, line["batch"]["database"], line["batch"]["run"]):
                raise Mismatch(f"{title} belongs to run '{line['batch']['run']}', which has ended", hint="select its rows again")
            return False
        recorded = index.read_commit(self._store, stem)
        if recorded["batch"]["id"] != line["batch"]["id"]:
            raise Mismatch(f"'{self._store.url(stem + names.COMMIT)}' is the commit record of another batch")
        if there := scope.present(line["batch"], content.key_list(self._store, line)[1]):
            raise Mismatch(f"{title} is archived already, yet {there} of its rows are in the table; nothing was deleted",
                           hint="rows that were restored are not deleted again; aa-delete --explain compares them")
        log.info("delete.already", f"{title} is archived already, and none of its rows is in the table; nothing to do")
        return True

    def _compare(self, line: dict[str, Any], guarded: Guarded, key_texts: list[bytes], found: list[int],
                 allow_subset: bool) -> tuple[str, list[int]]:
        """FULL, or SUBSET with the places (from 0) of the rows left out; raises what forbids the delete.

        The batch's digest is compared first; the object's rows are read only where it differs.
        """
        rows, title = line["batch"]["rows"], batches.name(line["batch"])
        if not found:
            raise Failed(f"none of the {rows} rows of {title} is in the table any more (ABSENT); nothing was deleted",
                         hint="this batch's delete did not remove them, or recovery would have recorded it: another batch "
                              "or another client did")
        if len(found) == rows and guarded.rows_sha256() == line["serialized"]["rows_sha256"]:
            return FULL, []
        states = list(_states(content.row_digests(self._store, line), guarded.digests(key_texts)))
        changed = states.count(CHANGED)
        if changed:
            raise Mismatch(f"{changed} of the {rows} rows of {title} were changed after they were selected (DIVERGED); nothing was deleted",
                           hint="aa-delete --explain lists them; select them again")
        left_out = [place for place, state in enumerate(states) if state == ABSENT]
        if [place + 1 for place, state in enumerate(states) if state == SAME] != found or not left_out:
            raise Failed(f"the rows of {title} change while they are compared; nothing was deleted", hint="try again")
        if not allow_subset:
            raise Mismatch(f"{len(left_out)} of the {rows} rows of {title} are gone, the others are unchanged (SUBSET); nothing was deleted",
                           hint="aa-delete --explain lists them; --allow-subset deletes the others")
        log.warning("delete.subset", f"{title}: {len(left_out)} rows are gone already; a restore will leave them out", left_out=len(left_out))
        return SUBSET, left_out

    def _intend(self, line: dict[str, Any], guarded: Guarded, transaction: Transaction, said: dict[str, Any]) -> None:
        """Say in the bucket which transaction is about to delete, under the first free number."""
        for number in range(1, INTENTS_MOST + 1):
            value = {"format": "aa-intent", "version": 1, "id": line["batch"]["id"], "n": number, "at": transaction.now,
                     "xid": transaction.xid, "server": guarded.server, **said}
            schema.validate("intent", value, "the intent")
            try:
                self._store.put_record(line["serialized"]["stem"] + names.intent(number), lines.dump(value))
                return
            except NameTaken:
                log.debug("delete.intent", f"intent {number} of {batches.name(line['batch'])} is an earlier attempt's")
        raise Failed(f"{batches.name(line['batch'])} has {INTENTS_MOST} intents; nothing was deleted", hint="select it again")


class Scope:
    """One database as the guarded path holds it: control connection with the lock, and a connection that deletes."""

    def __init__(self, config: Config, store: Store, staging: Path, database: Database, run: str) -> None:
        self._config, self._store, self._staging, self._database, self._run = config, store, staging, database, run
        self._recovered: dict[Optional[TableName], Outcome] = {}
        self._guarded: dict[TableName, Guarded] = {}
        self._transaction: Optional[Transaction] = None
        self.holds: list[Hold] = []
        self._running = contextlib.ExitStack()
        self.control = connect.connect(database, purpose="control", run=run)
        try:
            self.lock = Lock(config, database, self.control, run)
        except BaseException:
            self.control.close()
            raise

    def enter(self, line: dict[str, Any]) -> None:
        """Take K1 and prove with K2 that nobody is at work, then recover; once per scope. A batch whose own transaction is gone, and
        whose rows are in the table unchanged, is left to this delete."""
        batch = line["batch"]
        table = (batch["schema"], batch["table"]) if self._config.locking.scope == "table" else None
        if table in self._recovered:
            return
        try:
            self.lock.take(None if table is None else {self._oid(table): ".".join(table)})
            if not self._recovered:
                self._running.enter_context(self.lock.beating())
            self._recovered[table] = recover_database(self._config, self._store, self._database, self.control, self._run,
                                                      None if table is None else [table], staging=self._staging,
                                                      in_hand=line["serialized"]["stem"])
            self.holds = holds.current(self._store, self._database.name)
        except BaseException:
            self.control.close()
            raise

    def guarded(self, batch: dict[str, Any]) -> Guarded:
        """The PostgreSQL side of a batch's table."""
        table = batch["schema"], batch["table"]
        if table not in self._guarded:
            if self._transaction is None or self._transaction.connection.closed:
                self._transaction = Transaction(connect.connect(self._database, purpose="delete", run=self._run,
                                                                transaction_timeout_s=self._database.transaction_timeout_s))
            configured = partitions.configured(self.control, self._database, *table)
            scope = self._oid(table) if self._config.locking.scope == "table" else None
            self._guarded[table] = Guarded(self.control, self._transaction, batch, lambda connection: self.lock.enter(connection, scope),
                                           lambda connection: self.lock.require(connection, scope, batches.name(batch)),
                                           getattr(configured, "at", None))
        return self._guarded[table]

    def require_free(self, line: dict[str, Any]) -> None:
        """Raise ConfigError if recovery holds another batch of the table, or this one and it may have deleted rows, or if a rollback
        of the table is not over.

        Rows that this batch's own transaction took would otherwise be taken for gone before, and left out of the archive. Those
        of an open rollback may be in the table and archived already.
        """
        batch = line["batch"]
        for outcome in self._recovered.values():
            open_rollback = outcome.rollbacks.get((batch["schema"], batch["table"]))
            if open_rollback is not None:
                raise ConfigError(f"table '{batch['schema']}.{batch['table']}' is held back: {open_rollback}",
                                  hint=f"'aa-rollback --table {batch['schema']}.{batch['table']}' goes on with it; nothing was deleted")
            for verdict in outcome.verdicts:
                if verdict.verdict != HOLD or verdict.table != (batch["schema"], batch["table"]):
                    continue
                if verdict.stem != line["serialized"]["stem"] or verdict.evidence["status"] not in (NONE, ABORTED):
                    raise ConfigError(f"table '{batch['schema']}.{batch['table']}' is held back: {verdict.words}",
                                      hint="'aa-recover --decide' settles it")

    def present(self, batch: dict[str, Any], key_texts: list[bytes]) -> int:
        """How many of a batch's keys are in the table."""
        with witness.snapshot(self.control):
            return len(witness.Table(self.control, batch).present(key_texts))

    def close(self) -> None:
        """End the transaction's connection, give the lock back and end the control connection."""
        self._running.close()
        if self._transaction is not None:
            self._transaction.connection.close()
        self.lock.release()

    def _oid(self, table: TableName) -> int:
        found = connect.rows(self.control, "SELECT c.oid::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                             "WHERE n.nspname = %s AND c.relname = %s", table)
        if not found:
            raise ConfigError(f"table '{'.'.join(table)}' does not exist")
        return found[0][0]


def _states(archived: Iterable[str], now: Iterable[tuple[int, str]]) -> Iterator[str]:
    """For each archived row in order: SAME, CHANGED or ABSENT, by the digests of the rows that are there now."""
    there = iter(now)
    number, digest = next(there, (0, ""))
    for place, then in enumerate(archived, 1):
        if number != place:
            yield ABSENT
            continue
        yield SAME if digest == then else CHANGED
        number, digest = next(there, (0, ""))


def _require_objects(store: Store, line: dict[str, Any]) -> None:
    """The three objects must still be the verified ones."""
    uploaded = line["uploaded"]
    for key, etag, version in zip(batches.keys_of(line), uploaded["etags"], uploaded["versions"]):
        head = store.head(key)
        if head is None or (head.etag, head.version) != (etag, version):
            raise Mismatch(f"'{store.url(key)}' is {'gone' if head is None else 'another object than the verified one'}; nothing was deleted",
                           hint="select the batch again")


def _after_commit(line: dict[str, Any], guarded: Guarded) -> dict[str, Any]:
    """Time and WAL position after COMMIT, and whether the sample is gone (REQ-VER-017..020)."""
    title, sample = batches.name(line["batch"]), line["verified"]["sample"]
    try:
        at, lsn, present = guarded.after_commit(sample)
    except ArchiverError as error:
        log.warning("sample.unknown", f"{title} is committed, but {unasked(error)}")
        return {}
    if present:
        log.warning("sample.present", f"{present} of {len(sample)} sampled keys of {title} are in the table again after COMMIT",
                    hint="a trigger or a client puts rows back under the same keys")
    return {"at": at, "lsn": lsn, "sample_absent": None if not sample else not present}
