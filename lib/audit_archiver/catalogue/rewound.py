"""Was the server rewound? A restored backup or a failover can bring back rows that are archived (postgres.md S11).

Asked before anything is decided. The last run's end says how far the server's log had come; where the log is
further back now, or on another timeline or server, the newest recorded batches of each table are checked by key.
"""

from __future__ import annotations

from typing import Any, Iterable, Iterator, Optional

from audit_archiver import log
from audit_archiver.catalogue import content, index, owner, runs
from audit_archiver.exits import ConfigError, Failed
from audit_archiver.formats import batch as batches
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store
from audit_archiver.postgres import connect, witness

NEWEST_BATCHES = 2


class Rewound(Failed):
    """Rows of recorded batches are in the table again."""


def check(store: Store, connection: connect.Connection, here: witness.Place, last: runs.Runs, table_dirs: Iterable[str],
          accepted: Iterable[str] = (), *, adopt: bool = False) -> list[str]:
    """Raise Rewound if the server seems to have been rewound and rows of the newest recorded batches are back.

    `accepted` names batches whose rows may be back, as a person decided; those of them that were met are returned.
    Raises ConfigError for a prefix of another server, unless it is to be `adopt`ed.
    """
    if not last.ended or last.wal is not None and not behind(here, last.wal):
        return []
    met = []
    for table_dir in table_dirs:
        for line in newest(store, table_dir):
            name, wal = line["serialized"]["stem"].rpartition("/")[2], runs.wal_of(line)
            if name in accepted:
                met.append(name)
            elif wal is not None and behind(here, wal):
                if not adopt:
                    owner.require(store, table_dir, here)
                log.info("recover.rewound.look", f"the server's log is not where it was when {batches.name(line['batch'])} "
                         "was committed; its keys are looked up", expected=wal["lsn"], found=here.lsn, timeline=here.timeline)
                _refuse(store, connection, line)
    return met


def behind(here: witness.Place, then: dict[str, Any]) -> bool:
    """True unless this is the same server on the same timeline, with its log at least as far as then."""
    return (here.system, here.timeline) != (then["system"], then["timeline"]) or number(here.lsn) < number(then["lsn"])


def number(lsn: str) -> int:
    """0/3A5F as a number."""
    high, _, low = lsn.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def newest(store: Store, table_dir: str) -> Iterator[dict[str, Any]]:
    """The commit records of the table's newest batches, the newest first. Asks for a few listings only."""
    day: Optional[str] = table_dir
    for _ in ("year", "month", "day"):
        below = [found for found in store.directories(str(day)) if "=" in found[len(str(day)):]]
        if not below:
            return
        day = max(below)
    keys = [found.key for found in store.list(str(day))]
    back = {key[:-len(names.ROLLED_BACK)] for key in keys if key.endswith(names.ROLLED_BACK)}  # their rows are there by intent
    stems = [stem for key in keys if key.endswith(names.COMMIT) and (stem := key[:-len(names.COMMIT)]) not in back]
    for stem in sorted(stems, key=_order, reverse=True)[:NEWEST_BATCHES]:
        yield index.read_commit(store, stem)


def _order(stem: str) -> tuple[str, int]:
    """By time, then by number: as text batch_1000 would stand before batch_999 (T9)."""
    before, _, count = stem.rpartition("_batch_")
    return before.rpartition("_")[2], int(count)


def _refuse(store: Store, connection: connect.Connection, line: dict[str, Any]) -> None:
    batch = line["batch"]
    key_texts = content.key_list(store, line)[1]
    left_out = set(line.get("deleted", {}).get("left_out", ()))
    with witness.snapshot(connection):
        try:
            table = witness.Table(connection, batch)
        except ConfigError as error:
            log.warning("recover.rewound.table", f"{batches.name(batch)} cannot be looked up: {error.msg}")
            return
        back = [number for number in table.present(key_texts) if number - 1 not in left_out]
    if back:
        raise Rewound(f"the server was rewound: {len(back)} of {batch['rows']} rows of {batches.name(batch)} of "
                      f"{batch['archived_at'][:10]}, which is archived, are in '{batch['schema']}.{batch['table']}' again",
                      detail="a backup was restored, or a standby without the last commits was promoted",
                      hint=f"archiving them again would double them; delete them, or accept it with 'aa-recover --decide "
                           f"{line['serialized']['stem'].rpartition('/')[2]}=record' (RISKS in aa-recover(1))")
