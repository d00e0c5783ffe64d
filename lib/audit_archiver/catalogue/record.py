"""The commit record of a batch: from then on it is archived, and its staging directory is not needed any more.

aa-record writes it for a batch that comes out of its transaction, recovery for one whose run was interrupted.
"""

from __future__ import annotations

import os
from typing import Any, Optional

from audit_archiver import lines, log
from audit_archiver.catalogue import index
from audit_archiver.exits import Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NameTaken
from audit_archiver.objectstore.multipart import STATE

HELD = "held.json"  # the line of a batch that recovery holds, for aa-delete --explain


def record(store: Store, line: dict[str, Any]) -> bool:
    """Write the commit record of a committed batch; False if this batch was recorded before (REQ-IDEM-007, 010).

    Raises Mismatch if the objects are no longer the verified ones, or if the record is another batch's.
    """
    key = line["serialized"]["stem"] + names.COMMIT
    if not line["uploaded"]["create_only"]:
        _look_again(store, line)
    try:
        created = store.put_record(key, lines.dump(line)).created
    except NameTaken:
        found = index.read_commit(store, line["serialized"]["stem"])
        if found["batch"]["id"] != line["batch"]["id"]:
            raise Mismatch(f"'{store.url(key)}' is the commit record of another batch",
                           hint="this batch's rows are deleted, and its objects lie beside: run aa-recover") from None
        created = False
    word = "recorded" if created else "was recorded already"
    log.info("record.done", f"{batches.name(line['batch'])} {word}: {line['batch']['rows']} rows", key=key,
             rows=line["batch"]["rows"])
    return created


def remove_staging(line: dict[str, Any], directory: Optional[str] = None) -> None:
    """Remove the batch's staging directory: exactly the files that a batch has, nothing that somebody else put there.

    `directory` is where it is, if not where the line says.
    """
    directory = directory or line["serialized"].get("dir")
    if directory is None or not os.path.isdir(directory):
        return
    if not os.path.abspath(directory).endswith(names.staging_dir(os.sep, line["batch"])):
        log.warning("record.staging", f"'{directory}' is no staging directory of {batches.name(line['batch'])}; it stays")
        return
    stem = os.path.basename(line["serialized"]["stem"])
    try:
        for name in ("batch.json", HELD, STATE, *(stem + suffix for suffix in (names.DATA, names.METADATA, names.KEYS))):
            try:
                os.unlink(os.path.join(directory, name))
            except FileNotFoundError:
                continue
        os.rmdir(directory)
    except OSError as error:
        log.warning("record.staging", f"cannot remove '{directory}': {error.strerror}",
                    hint="the batch is recorded; remove the directory by hand")


def _look_again(store: Store, line: dict[str, Any]) -> None:
    """Without conditional writes a delayed PUT can replace what was verified (C10): compare ETags and versions again."""
    data, _, key_list = batches.keys_of(line)
    uploaded = line["uploaded"]
    for place, key in ((0, data), (2, key_list)):
        head = store.head(key)
        found = None if head is None else (head.etag, head.version)
        if found != (uploaded["etags"][place], uploaded["versions"][place]):
            raise Mismatch(f"'{store.url(key)}' is {'missing' if head is None else 'another object than the verified one'}",
                           hint="its rows are deleted; do not remove anything under this prefix, and restore the object's "
                                "earlier version or the staging directory")
