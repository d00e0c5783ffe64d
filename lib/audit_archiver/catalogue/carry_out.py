"""What recovery does with a verdict: write the commit record, write the evidence, or leave everything as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional

from audit_archiver import lines, log
from audit_archiver.catalogue import index, leftovers, readback
from audit_archiver.catalogue.decide import ABANDON, ABORTED, HOLD, NONE, RECORD, Decision
from audit_archiver.catalogue.evidence import Case
from audit_archiver.catalogue.record import HELD, record, remove_staging
from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NameTaken, NotFound
from audit_archiver.points import point
from audit_archiver.postgres import witness

BY = "aa-recover"


class Hands:
    """Carries out verdicts; `close` writes what the index still lacks."""

    def __init__(self, store: Store, here: witness.Place, staging: Optional[Path]) -> None:
        self._store, self._here, self._staging = store, here, staging
        self._segments = index.Segments(store)

    def carry_out(self, case: Case, decision: Decision) -> Decision:
        """Do it. Returns the verdict that became of it: a batch that cannot be read back whole is held."""
        if decision.verdict == RECORD:
            return self._record(case, decision)
        if decision.verdict == ABANDON:
            return self._abandon(case, decision)
        if decision.verdict == HOLD:
            log.warning("recover.held", f"{case.title} of {case.leftover.day} is held: {decision.why}", **case.said(),
                      hint="'aa-delete --explain' lists the rows in question, 'aa-recover --decide' settles it")
        else:
            log.info("recover.undecided", f"{case.title} of {case.leftover.day} is not decided: {decision.why}", **case.said())
        return decision

    def close(self) -> None:
        """Write the last index segments."""
        self._segments.close()

    def keep_line(self, case: Case) -> Optional[str]:
        """Write the line of a held batch into its staging directory, for aa-delete --explain; the path, or None."""
        if case.line is None or self._staging is None:
            return None
        directory = Path(names.staging_dir(str(self._staging), case.line["batch"]))
        line = {key: part for key, part in case.line.items() if key != "uploaded"}
        if (uploaded := leftovers.uploaded(self._store, line)) is not None:
            line["uploaded"] = uploaded
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = directory / (HELD + ".tmp")
            temporary.write_bytes(lines.dump(line))
            os.replace(temporary, directory / HELD)
        except OSError as error:
            log.warning("recover.line", f"cannot write '{directory / HELD}': {error.strerror}")
            return None
        return str(directory / HELD)

    def _record(self, case: Case, decision: Decision) -> Decision:
        assert case.line is not None
        line = {"format": "aa-batch", "version": 1, "batch": case.line["batch"], "serialized": dict(case.line["serialized"])}
        line["serialized"].pop("dir", None)
        try:
            uploaded = leftovers.uploaded(self._store, line)
            if uploaded is None:
                raise Mismatch("one of its three objects is missing")
            line["uploaded"] = uploaded
            line["verified"] = readback.read_back(self._store, line)
            deleted = self._deleted(case, line)
        except (Mismatch, InputError, NotFound) as error:
            held = Decision(HOLD, f"{decision.why}; but it cannot be recorded: {error.msg}")
            return self.carry_out(case, held)
        if deleted is not None:
            line["deleted"] = deleted
        known = case.evidence.transaction == "committed"
        line["committed"] = {"at": self._here.now, "xid": case.xid if known else None, "lsn": self._lsn(line), "by": BY,
                             "sample_absent": True if case.evidence.present == 0 and case.evidence.trouble is None else None}
        created = record(self._store, line)
        point("recover.record.put")
        if created:
            self._segments.add(line)
        log.info("recover.recorded", f"{case.title} of {case.leftover.day} is recorded: {decision.why}", **case.said())
        self._forget(case)
        return decision

    def _deleted(self, case: Case, line: dict[str, Any]) -> Optional[dict[str, Any]]:
        """The `deleted` section where fewer rows left the table than the object holds; None for the whole batch."""
        left_out = [number - 1 for number in case.present]
        if case.intent is not None and case.evidence.transaction not in (NONE, ABORTED):
            left_out = sorted({*left_out, *case.intent.get("left_out", ())})
        if not left_out:
            return None
        rows = line["batch"]["rows"] - len(left_out)
        if not rows:
            raise Mismatch("none of its rows is gone that this batch could have taken")
        return {"at": case.intent["at"] if case.intent else self._here.now, "verdict": "SUBSET", "rows": rows, "left_out": left_out}

    def _lsn(self, line: dict[str, Any]) -> Optional[str]:
        """Where the log is now, if this is still the server that the batch names."""
        server = line["batch"]["server"]
        return self._here.lsn if (server["system"], server["timeline"]) == (self._here.system, self._here.timeline) else None

    def _abandon(self, case: Case, decision: Decision) -> Decision:
        stem = case.leftover.stem
        if self._store.head(stem + names.COMMIT) is not None:  # a listing may lag behind
            return Decision(RECORD, "it is recorded already")
        batch = case.line["batch"] if case.line else {"id": None, "run": None}
        value = {"format": "aa-abandoned", "version": 1, "id": batch["id"], "run": batch["run"], "stem": stem, "at": self._here.now,
                 "by": BY, "reason": decision.why, "evidence": case.said()}
        schema.validate("abandoned", value, "the evidence")
        try:
            self._store.put_record(stem + names.ABANDONED, lines.dump(value))
        except NameTaken:
            log.debug("recover.abandoned", f"{case.title} was abandoned before")
        point("recover.abandon.put")
        log.info("recover.abandoned", f"{case.title} of {case.leftover.day} is abandoned: {decision.why}", key=stem, **case.said())
        self._forget(case)
        return decision

    def _forget(self, case: Case) -> None:
        if case.line is not None and self._staging is not None:
            remove_staging(case.line, names.staging_dir(str(self._staging), case.line["batch"]))
