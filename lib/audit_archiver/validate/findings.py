"""What a validation can find, as values: a stable id, a severity, a remedy; and the report of everything that was found.

    report.add(Finding("data.rows", where, "...", object=url, expected=50, found=49))

docs/validation.md is made of `CHECKS`. The exit code tells "it is wrong" (2) from "could not look" (5, 6, 7).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, Optional, Sequence

from audit_archiver import __version__, exits
from audit_archiver.exits import ArchiverError

LIGHT, SAMPLE, FULL = "light", "sample", "full"
DEPTHS = (LIGHT, SAMPLE, FULL)
FAIL, WARN, UNKNOWN = "fail", "warn", "unknown"
FORMAT, VERSION = "aa-validation", 1

KEPT = 1000
"""So many findings of one check are told in full; the others are counted."""
KEYS_TOLD = 10
LOOKED = ("tables", "batches", "objects", "bytes", "rows", "keys_in_tables")
COULD_NOT_LOOK = (exits.CONFIG, exits.LOCKED, exits.PERMISSION, exits.RESOURCE, exits.NETWORK)

BRING_BACK = "bring the object back from a version, a replica or a backup of the bucket; where the rows are still known, archive them again"


@dataclass(frozen=True)
class Check:
    """One thing that is looked at: from which depth on, how bad it is, and what to do. A finding may be milder."""

    id: str
    status: str
    depth: str
    about: str
    remedy: str


CHECKS = {check.id: check for check in (
    Check("look.failed", UNKNOWN, LIGHT, "everything that was asked for could be looked at",
          "nothing is known of what is named: cure the reason and validate again"),
    Check("batch.gone", FAIL, LIGHT, "a batch that the index names has objects at all", BRING_BACK),
    Check("record.missing", FAIL, LIGHT, "a batch that the index names has its commit record",
          "bring the commit record back; until then restores leave this batch out, and recovery decides it anew"),
    Check("record.invalid", FAIL, LIGHT, "the commit record is valid, and of this batch and place", BRING_BACK),
    Check("record.abandoned", FAIL, LIGHT, "no batch is recorded and abandoned",
          "look whether its rows are in the table (aa-delete --explain), and remove the record that is wrong"),
    Check("data.missing", FAIL, LIGHT, "each archived batch has its data object", BRING_BACK),
    Check("data.size", FAIL, LIGHT, "the data object has the bytes that were uploaded", BRING_BACK),
    Check("data.replaced", FAIL, LIGHT, "the data object is the one that was verified, by its ETag; a warning if its bytes are the same",
          "--depth full says whether the bytes are others; then bring the earlier version back"),
    Check("metadata.missing", FAIL, LIGHT, "each archived batch has its metadata", BRING_BACK),
    Check("metadata.replaced", FAIL, LIGHT, "the metadata are those that were verified, by their ETag; a warning if the bytes are the same",
          "bring the earlier version back"),
    Check("metadata.sha256", FAIL, LIGHT, "the metadata are, byte for byte, those that were verified", BRING_BACK),
    Check("metadata.invalid", FAIL, LIGHT, "the metadata are valid and say of the batch what its commit record says", BRING_BACK),
    Check("metadata.columns", FAIL, LIGHT, "the schema in the metadata is the one of the batch's rows", BRING_BACK),
    Check("keys.missing", FAIL, LIGHT, "each archived batch has its key list", BRING_BACK),
    Check("keys.replaced", FAIL, LIGHT, "the key list is the one that was verified, by its ETag; a warning if its bytes are the same",
          "--depth full says whether the bytes are others; then bring the earlier version back"),
    Check("keys.sha256", FAIL, SAMPLE, "the key list is, byte for byte, the one that was verified", BRING_BACK),
    Check("keys.invalid", FAIL, SAMPLE, "the key list is valid and names the keys of this batch", BRING_BACK),
    Check("data.damaged", FAIL, SAMPLE, "the data object unpacks to its end, and its lines are rows of the table", BRING_BACK),
    Check("data.rows", FAIL, SAMPLE, "the data object holds as many rows as were archived", BRING_BACK),
    Check("data.sha256", FAIL, SAMPLE, "packed and unpacked bytes of the data object have the digests that were verified", BRING_BACK),
    Check("data.keys", FAIL, SAMPLE, "the rows of the data object bear the keys that were deleted, in their order", BRING_BACK),
    Check("orphan.batch", FAIL, LIGHT, "no orphaned objects: every batch in the bucket has a commit record or was abandoned; a warning "
          "while its run has not ended", "aa-recover decides what it is; of a run that has ended bring the commit record back"),
    Check("foreign.object", FAIL, LIGHT, "nothing lies under a table's prefix that the archiver did not write",
          "find out who wrote it, and move it elsewhere"),
    Check("index.invalid", FAIL, LIGHT, "every index segment can be read and is of this table",
          "bring it back; or remove it and rebuild it with --repair --execute"),
    Check("index.gap", FAIL, LIGHT, "the segments of a run are numbered without a gap", BRING_BACK),
    Check("index.differs", FAIL, LIGHT, "the index says of a batch what its commit record says, and names no two batches alike",
          "the commit record is the truth: remove the segment and rebuild it with --repair --execute"),
    Check("index.unlisted", WARN, LIGHT, "every archived batch of a run that has ended stands in the index",
          "--repair --execute writes the missing segments"),
    Check("numbers.gap", WARN, LIGHT, "a run's batches are numbered without a gap; a failure while the run's index is incomplete",
          "a batch that was given up leaves a gap, and so does one of which everything is gone: compare with the run's report, or with a baseline "
          "(aa-balance)"),
    Check("run.empty", WARN, LIGHT, "every run that has ended has batches, archived or abandoned",
          "a run may end before its first object; if its report says otherwise, all of its batches are gone: bring them back"),
    Check("owner.missing", WARN, LIGHT, "each table's prefix says which server and database write there",
          "the next run says so anew; until then another server's table of that name could take the prefix"),
    Check("owner.invalid", FAIL, LIGHT, "_owner.json is valid and of this table", "bring the earlier version back"),
    Check("archive.empty", WARN, LIGHT, "something is archived of each database", "if it should be, look at s3.bucket and s3.prefix"),
    Check("table.unknown", FAIL, LIGHT, "each prefix in the archive says which table it is", "bring its _owner.json back"),
    Check("run.unknown", WARN, LIGHT, "every archived batch's run has a record of its beginning", "bring the run's records back"),
    Check("schema.changed", WARN, LIGHT, "the batches of a table have the same columns and types",
          "expect differences at a restore: aa-restore --dry-run names them"),
    Check("batch.twice", FAIL, LIGHT, "no batch is archived under two names", "find out which one the index names, and move the other elsewhere"),
    Check("rows.twice", FAIL, SAMPLE, "no key is in two of the batches that were read",
          "rows that were restored and archived again are so; restore with the later batch last, or move the surplus batch elsewhere"),
    Check("rows.in_table", FAIL, LIGHT, "no archived key is in the table; a warning if aa-restore has brought rows back into it",
          "aa-delete --explain with the batch's commit record compares the rows; rows that were restored are in both places"),
)}


@dataclass(frozen=True)
class Where:
    """The table, and the batch by the last part of its name."""

    database: str
    schema: Optional[str] = None
    table: Optional[str] = None
    batch: Optional[str] = None

    def __str__(self) -> str:
        title = f"{self.database} {self.schema}.{self.table}" if self.table else self.database
        return f"{title} {self.batch}" if self.batch else title


@dataclass(frozen=True)
class Finding:
    """One difference between what must be and what is. `keys` are JSON texts: they are told, never logged.

    `status` is the check's own unless it is said; `code` is the exit code where something could not be looked at.
    """

    check: str
    where: Where
    text: str
    object: Optional[str] = None
    expected: Any = None
    found: Any = None
    keys: Sequence[str] = ()
    status: Optional[str] = None
    remedy: Optional[str] = None
    code: int = exits.OK

    @property
    def severity(self) -> str:
        """FAIL, WARN or UNKNOWN."""
        return self.status or CHECKS[self.check].status

    @property
    def advice(self) -> str:
        """What to do."""
        return self.remedy or CHECKS[self.check].remedy

    def as_json(self) -> dict[str, Any]:
        """As the report has it."""
        return {"check": self.check, "status": self.severity, "database": self.where.database, "schema": self.where.schema,
                "table": self.where.table, "batch": self.where.batch, "object": self.object, "expected": _text(self.expected),
                "found": _text(self.found), "text": self.text, "keys": [json.loads(key) for key in self.keys], "remedy": self.advice,
                "code": exits.FAILED if self.severity == FAIL else self.code}


def could_not_look(where: Where, error: ArchiverError, object: Optional[str] = None) -> Finding:
    """An error on the way as a finding: nothing is known of its subject."""
    code = error.code if error.code in COULD_NOT_LOOK else exits.NETWORK
    return Finding("look.failed", where, "; ".join(part for part in (error.msg, error.detail) if part), object=object, remedy=error.hint, code=code)


@dataclass
class Report:
    """What was looked at, what was not, and what was found."""

    depth: str
    subset: Optional[str] = None
    looked: Counter[str] = field(default_factory=Counter)
    not_looked: dict[str, None] = field(default_factory=dict)
    repairs: list[dict[str, Any]] = field(default_factory=list)
    executed: bool = False
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    codes: set[int] = field(default_factory=set)

    def add(self, *found: Finding) -> None:
        """Note findings; of one check KEPT in full."""
        for each in found:
            self.counts[each.check] += 1
            self.statuses[each.severity] += 1
            if each.severity == UNKNOWN:
                self.codes.add(each.code)
            if self.counts[each.check] <= KEPT:
                self.findings.append(each)

    def leave(self, *sentences: str) -> None:
        """Note what was not looked at."""
        self.not_looked.update(dict.fromkeys(sentences))

    @property
    def exit(self) -> int:
        """2 if anything is wrong; else the code of what could not be looked at, the highest if there are several; else 0."""
        if self.statuses[FAIL]:
            return exits.FAILED
        return max(self.codes, default=exits.OK)

    def as_json(self) -> dict[str, Any]:
        """The whole report (schemas/validation.v1.json)."""
        return {"format": FORMAT, "version": VERSION, "archiver_version": __version__, "depth": self.depth, "subset": self.subset,
                "exit": self.exit, "looked_at": {name: self.looked[name] for name in LOOKED},
                "not_looked_at": list(self.not_looked), "findings": [each.as_json() for each in self.findings],
                "counts": [{"check": check, "count": count} for check, count in sorted(self.counts.items())],
                "repair": {"executed": self.executed, "segments": self.repairs}}

    def lines(self) -> Iterator[str]:
        """The report for people."""
        wide = max((len(each.check) for each in self.findings), default=0)
        for each in self.findings:
            keys = f" (keys {', '.join(each.keys)})" if each.keys else ""
            yield f"{each.severity:<7}  {each.check:<{wide}}  {each.where}: {each.text}{keys}. {each.advice}"
        for check, count in self.counts.items():
            if count > KEPT:
                yield f"{CHECKS[check].status:<7}  {check:<{wide}}  and {count - KEPT:,} more"
        for each in self.repairs:
            yield (f"{'written' if self.executed else 'would be written (--execute)'}: an index segment of run {each['run']} for "
                   f"{each['schema']}.{each['table']} with {_count(each['batches'], 'batch', 'batches')}")
        looked = self.looked
        yield (f"looked at: {_count(looked['tables'], 'table')}, {_count(looked['batches'], 'batch', 'batches')}"
               + (f" (subset {self.subset})" if self.subset else "") +
               f" at depth {self.depth}; {_count(looked['objects'], 'object')} and {looked['bytes'] / 1e6:,.1f} MB read, "
               f"{_count(looked['rows'], 'row')} unpacked, {_count(looked['keys_in_tables'], 'key')} looked up in tables")
        for sentence in self.not_looked:
            yield f"not looked at: {sentence}"
        told = ", ".join(_count(self.statuses[status], word) for status, word in
                         ((FAIL, "failure"), (WARN, "warning")) if self.statuses[status])
        if self.statuses[UNKNOWN]:
            told = f"{told}, " * bool(told) + f"{self.statuses[UNKNOWN]:,} could not be looked at"
        yield f"exit {self.exit}: {told or 'nothing is wrong with what was looked at'}"


def told(keys: Iterable[bytes]) -> list[str]:
    """The first few keys as JSON arrays."""
    return [f"[{key.decode()}]" for _, key in zip(range(KEYS_TOLD), keys)]


def _text(value: Any) -> Optional[str]:
    return None if value is None else str(value)


def _count(number: int, one: str, many: Optional[str] = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
