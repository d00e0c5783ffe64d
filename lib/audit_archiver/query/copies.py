"""Where the archive begins in a copy of a bucket, or of a part of it: a commit record says what its own key was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from audit_archiver.exits import ConfigError
from audit_archiver.formats import batch as batches
from audit_archiver.formats import names
from audit_archiver.objectstore.local import LocalStore


def store(directory: str) -> LocalStore:
    """The copy in `directory` as a store. Raises ConfigError if no batch is archived there."""
    for root, below, files in os.walk(directory):
        below.sort()
        for name in sorted(files):
            if name.endswith(names.COMMIT):
                path = Path(root, name)
                line = batches.parse(path.read_bytes(), needs=("committed",))
                return _of(Path(directory), path, line)
    raise ConfigError(f"nothing is archived in '{directory}'",
                      hint="name a copy of the bucket, or of what lies under its prefix: a directory with *_commit.json files in it")


def _of(directory: Path, path: Path, line: dict[str, Any]) -> LocalStore:
    batch, key = line["batch"], line["serialized"]["stem"] + names.COMMIT
    here, there = path.relative_to(directory).as_posix().split("/"), key.split("/")
    same = next((n for n, (one, other) in enumerate(zip(reversed(here), reversed(there))) if one != other), min(len(here), len(there)))
    for depth in range(len(there)):
        prefix = "".join(part + "/" for part in there[:depth])
        if key.startswith(names.table_dir(prefix, batch["database"], batch["schema"], batch["table"])):
            return LocalStore(directory.joinpath(*here[:-same]), prefix, "".join(part + "/" for part in there[:-same]))
    raise ConfigError(f"'{path}' is a commit record of another place", detail=f"it belongs to {key}")
