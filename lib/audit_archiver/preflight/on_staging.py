"""Checks of the staging directory, where a batch lies between aa-serialize and aa-record."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Union

from audit_archiver import exits
from audit_archiver.preflight.check import Check, Good, Said, declare
from audit_archiver.preflight.findings import FAIL

BATCHES = 2  # REQ-VAL-007
MB, GB = 1e6, 1e9
Answers = Iterator[Union[Said, Good]]

CHECKS: list[Check] = []
check = functools.partial(declare, CHECKS)


@dataclass(frozen=True)
class Look:
    """The staging directory, which need not exist yet, and the bytes of the largest batch that may come."""

    path: Path
    batch_bytes: int
    least_gb: float = 0

    @property
    def existing(self) -> Path:
        """The directory itself, or the nearest one above it that exists."""
        return next(each for each in (self.path, *self.path.parents) if each.exists())


@check("staging.directory", FAIL, "the staging directory is, or can be made, a directory that we may write",
       "choose another with staging_dir or AA_STAGING")
def directory(look: Look) -> Answers:
    """Nothing is uploaded that was not staged."""
    if not look.existing.is_dir() or not os.access(look.existing, os.W_OK | os.X_OK):
        yield Said(f"'{look.path}' cannot be written")


@check("staging.space", FAIL, "there is room for two of the largest batches, and for min_free_disk_gb",
       "make room, choose another directory, or lower batch_size or min_free_disk_gb", code=exits.RESOURCE)
def space(look: Look) -> Answers:
    """REQ-VAL-007, REQ-RES-006. A batch is compressed there, so this asks for more than it should need."""
    free = shutil.disk_usage(look.existing).free
    if free < BATCHES * look.batch_bytes:
        yield Said(f"'{look.path}' has {free / MB:.0f} MB free; two batches may take {BATCHES * look.batch_bytes / MB:.0f} MB")
    elif free < look.least_gb * GB:
        yield Said(f"'{look.path}' has {free / GB:.2f} GB free and min_free_disk_gb is {look.least_gb:g}")
    else:
        yield Good(f"'{look.path}', {free / MB:,.0f} MB free")
