"""Evidence about one undecided batch: what lies in the bucket, what the table holds, what the server remembers.

Not being able to look (network, permission of the store) is an error; what is there and makes no sense is evidence,
and holds the batch.
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from audit_archiver import log
from audit_archiver.catalogue import content, index, leftovers, staged
from audit_archiver.catalogue.decide import ABORTED, COMMITTED, DIFFERS, EQUAL, IN_PROGRESS, NONE, UNKNOWN, Evidence
from audit_archiver.exits import ArchiverError, ConfigError, InputError, Mismatch, PermissionDenied
from audit_archiver.formats import batch as batches
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotFound
from audit_archiver.postgres import connect, witness

PATIENCE = datetime.timedelta(hours=24)
"""How long a batch that was exported by hand is left to the person who exported it."""


@dataclass
class Case:
    """A batch to be decided: its line where it could be rebuilt, the evidence, and what the verdict needs besides."""

    leftover: leftovers.Leftover
    table: tuple[str, str]
    line: Optional[dict[str, Any]] = None
    evidence: Evidence = field(default_factory=Evidence)
    xid: Optional[str] = None
    intent: Optional[dict[str, Any]] = None
    present: list[int] = field(default_factory=list)
    here: bool = False

    @property
    def title(self) -> str:
        """What messages call it."""
        return batches.name(self.line["batch"]) if self.line else f"{'.'.join(self.table)} '{self.leftover.name}'"

    @property
    def run(self) -> Optional[str]:
        """The run that left it; None if nothing says."""
        return self.line["batch"]["run"] if self.line else None

    def said(self) -> dict[str, Any]:
        """The evidence as `_abandoned.json` and reports have it."""
        found = self.evidence
        return {"keys": found.keys or 0, "present": found.present, "content": found.content, "xid": self.xid,
                "status": found.transaction, "accounted": found.accounted}


def age(then: datetime.datetime, now: str) -> datetime.timedelta:
    """How old something is by the server's time `now`."""
    return _time(now) - then


def gather(store: Store, control: connect.Connection, here: witness.Place, leftover: leftovers.Leftover,
           database: str, table_dir: str, staging: Optional[Path], dead: Optional[str] = None) -> Case:
    """Everything that can be found out about a batch; reads only. `dead` is a run of which nobody is at work."""
    case = Case(leftover, leftovers.table_of(store, table_dir))
    try:
        case.line = _line(store, case, database, staging)
        if case.line is None:
            return _nameless(case, here)
        case.table = case.line["batch"]["schema"], case.line["batch"]["table"]
        return _look(store, control, here, case, case.line, dead)
    except (InputError, Mismatch) as error:
        case.evidence = replace(case.evidence, keys=case.evidence.keys or 0, fresh=False,
                                trouble=f"what lies in the bucket makes no sense: {error.msg}")
        return case


def _nameless(case: Case, here: witness.Place) -> Case:
    """No metadata and nothing staged: the upload was cut off early, or something was removed from the bucket."""
    assert case.leftover.modified is not None
    fresh = age(case.leftover.modified, here.now) < PATIENCE
    missing = names.KEYS in case.leftover.suffixes
    case.evidence = Evidence(transaction=NONE, fresh=fresh and not missing, keys=0 if missing else None,
                             trouble="it has a key list, but no metadata" if missing else None)
    return case


def _look(store: Store, control: connect.Connection, here: witness.Place, case: Case, line: dict[str, Any],
          dead: Optional[str]) -> Case:
    batch, stem = line["batch"], case.leftover.stem
    intents = leftovers.intents(store, stem)
    by_hand = batch["txn"] is None and batch["run"] != dead
    young = by_hand and age(_time(batch["archived_at"]), here.now) < PATIENCE
    case.evidence = Evidence(transaction=NONE, fresh=young and not intents)
    key_texts = _key_texts(store, line)
    if key_texts is None:
        return _keyless(control, here, case, batch, intents)
    case.evidence = replace(case.evidence, keys=len(key_texts))
    with witness.snapshot(control):
        try:
            table = witness.Table(control, batch)
        except (ConfigError, PermissionDenied) as error:
            _ask_status(control, here, case, batch, intents, None)
            case.evidence = replace(case.evidence, trouble=error.msg)
            return case
        _ask_status(control, here, case, batch, intents, table.oid)
        case.present = table.present(key_texts)
        same = UNKNOWN
        if len(case.present) == len(key_texts):
            digest = table.rows_sha256(key_texts)
            same = UNKNOWN if digest is None else EQUAL if digest == line["serialized"]["rows_sha256"] else DIFFERS
    case.evidence = replace(case.evidence, present=len(case.present), content=same)
    absent = set(range(1, len(key_texts) + 1)).difference(case.present)
    if absent and case.evidence.transaction in (NONE, ABORTED):
        case.evidence = replace(case.evidence, accounted=_accounted(store, case, key_texts, absent, intents))
    elif not case.present:
        case.evidence = replace(case.evidence, accounted=_overtaken(store, case, key_texts))
    return case


def _keyless(control: connect.Connection, here: witness.Place, case: Case, batch: dict[str, Any], intents: list[dict[str, Any]]) -> Case:
    """The metadata alone are there: an upload that was cut off, or a batch that was deleted and then lost its objects.

    Its first and its last key are known. If neither is in the table, and its transaction is not known to have failed, it is held.
    """
    edges = [json.dumps(edge[1:], ensure_ascii=False, separators=(",", ":"))[1:-1].encode() for edge in (batch["first"], batch["last"])]
    trouble, present = None, []
    with witness.snapshot(control):
        try:
            table = witness.Table(control, batch)
        except (ConfigError, PermissionDenied) as error:
            trouble = error.msg
            _ask_status(control, here, case, batch, intents, None)
        else:
            _ask_status(control, here, case, batch, intents, table.oid)
            present = table.present(edges)
    if case.evidence.transaction in (COMMITTED, UNKNOWN) and not present:
        case.evidence = replace(case.evidence, keys=batch["rows"], trouble=trouble or "its key list and its data are missing, and its rows are "
                                "not in the table")
    return case


def _key_texts(store: Store, line: dict[str, Any]) -> Optional[list[bytes]]:
    """The batch's keys, out of its key list, or of its data where the list is missing or damaged; None where both are missing.

    Either way they have the digest that the batch's line says. Raises Mismatch where the list is damaged and the data are no help.
    """
    damaged: Optional[ArchiverError] = None
    try:
        return content.key_list(store, line)[1]
    except NotFound:
        log.debug("recover.keys", f"{batches.name(line['batch'])} has no key list")
    except (InputError, Mismatch) as error:
        damaged = error
        log.warning("recover.keys", f"{batches.name(line['batch'])}: {error.msg}; its keys are read out of its data")
    try:
        return content.keys_in_data(store, line)
    except NotFound:
        if damaged is not None:
            raise damaged from None
        return None


def _ask_status(control: connect.Connection, here: witness.Place, case: Case, batch: dict[str, Any], intents: list[dict[str, Any]],
                table_oid: Optional[int]) -> None:
    """What the server says of every transaction that could have deleted the batch; the one that counts most decides."""
    asked = [(intent["xid"], intent["server"], intent) for intent in intents]
    if batch["txn"] is not None:
        asked.insert(0, (batch["txn"]["xid"], batch["server"], None))
    worth = {NONE: 0, ABORTED: 1, UNKNOWN: 2, COMMITTED: 3, IN_PROGRESS: 4}
    for xid, server, intent in asked:
        ours = table_oid is not None and witness.is_here(server, here, table_oid)
        said = witness.status(control, xid) if ours else UNKNOWN
        if worth[said] >= worth[case.evidence.transaction]:
            case.evidence = replace(case.evidence, transaction=said)
            case.xid, case.intent, case.here = xid, intent, ours


def _accounted(store: Store, case: Case, key_texts: list[bytes], absent: set[int], intents: list[dict[str, Any]]) -> int:
    """How many absent rows are explained: gone before a guarded delete began, or in another batch's commit record."""
    assert case.line is not None
    batch = case.line["batch"]
    left = absent.difference(*([place + 1 for place in intent.get("left_out", ())] for intent in intents))
    wanted = {key_texts[number - 1] for number in left}
    for _, archived in _recorded(store, batch, lambda other: bool(wanted)):
        wanted.difference_update(archived.values())
    return len(absent) - len(wanted)


def _overtaken(store: Store, case: Case, key_texts: list[bytes]) -> int:
    """How many of its rows lie, with the same content, in recorded batches that were begun after it: all, if every one that it can have taken.

    Recovery comes before each selection and would have recorded it, so whoever selected its rows later proves that its transaction
    took none, whatever the server says: its stages slept, and sent it when the rows were archived already. So does a batch that was begun
    before it and recorded after: both were kept aside, and sent by hand the other way round.
    """
    assert case.line is not None
    left_out = set(case.intent.get("left_out", ())) if case.intent else set()
    wanted = {text: place for place, text in enumerate(key_texts) if place not in left_out}
    taken, own, selected_at = len(wanted), None, _time(case.line["batch"]["archived_at"])

    def later(other: leftovers.Leftover) -> bool:
        recorded_later = other.modified is not None and other.modified >= selected_at  # both to the second
        return bool(wanted) and other.stem != case.leftover.stem and (other.begun >= case.leftover.begun or recorded_later)

    for line, archived in _recorded(store, case.line["batch"], later):
        if wanted.keys().isdisjoint(archived.values()):
            continue
        try:
            own = own or list(content.row_digests(store, case.line))
            for place, digest in enumerate(content.row_digests(store, line)):
                text = archived.get(place)
                if text in wanted and own[wanted[text]] == digest:
                    del wanted[text]
        except NotFound as error:
            log.debug("recover.keys", f"{case.title} cannot be compared: {error.msg}")
    return len(key_texts) if not wanted else taken - len(wanted)


def _recorded(store: Store, batch: dict[str, Any], asked: Callable[[leftovers.Leftover], bool]) -> Iterator[tuple[dict[str, Any], dict[int, bytes]]]:
    """The commit records of the table's batches that are archived, from the day before `batch` on, if `asked` for; with each the key texts
    of the rows that left the table with it, by their place in it."""
    since = _time(batch["archived_at"]).date() - datetime.timedelta(days=1)
    table_dir = names.table_dir(store.prefix, batch["database"], batch["schema"], batch["table"])
    for other in leftovers.batches_since(store, table_dir, since):
        if other.recorded and not other.rolled_back and asked(other):
            line = index.read_commit(store, other.stem)
            left_out = set(line.get("deleted", {}).get("left_out", ()))
            yield line, {place: text for place, text in enumerate(content.key_list(store, line)[1]) if place not in left_out}


def _line(store: Store, case: Case, database: str, staging: Optional[Path]) -> Optional[dict[str, Any]]:
    """The batch's line out of its metadata, or out of its staging directory where these are missing or damaged."""
    try:
        return leftovers.rebuilt(store, case.leftover) or _staged(case, database, staging)
    except (InputError, Mismatch) as error:
        line = _staged(case, database, staging)
        if line is None:
            raise
        log.warning("recover.staged", f"'{case.leftover.name}': {error.msg}; its line is read out of the staging directory")
        return line


def _staged(case: Case, database: str, staging: Optional[Path]) -> Optional[dict[str, Any]]:
    """The line in the batch's staging directory, where the upload was cut before the metadata."""
    ending = re.search(r"\d{8}T\d{6}Z_batch_\d+$", case.leftover.stem)
    if staging is None or ending is None:
        return None
    line = staged.line_in(Path(names.staging_table_dir(str(staging), database, *case.table)) / ending.group())
    return line if line is not None and line["serialized"]["stem"] == case.leftover.stem else None


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
