"""The disks that batches pass through, watched while a run goes on (REQ-RES-007, 008).

Below `resources.min_free_disk_gb` no more batches begin, and those in flight are finished: a full disk would break them off,
and leave no room for the batch that cannot be uploaded.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Callable, Optional, Sequence

from audit_archiver.exits import ResourceError

GB = 1e9
LOOK_EVERY_S = 1.0


class Room:
    """Free space below `directories`, which need not exist yet; nothing is asked for where `least_gb` is 0."""

    def __init__(self, directories: Sequence[Path], least_gb: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directories, self._least_gb, self._clock = directories if least_gb else (), least_gb, clock
        self._looked_at: Optional[float] = None
        self._short: Optional[ResourceError] = None

    def short(self) -> Optional[ResourceError]:
        """Why no batch shall begin, or None; looks once a second and, once a disk was short, no more."""
        now = self._clock()
        if self._short is None and (self._looked_at is None or now - self._looked_at >= LOOK_EVERY_S):
            self._looked_at = now
            self._short = next(filter(None, map(self._look, self._directories)), None)
        return self._short

    def _look(self, directory: Path) -> Optional[ResourceError]:
        there = next(each for each in (directory, *directory.parents) if each.exists())
        free_gb = shutil.disk_usage(there).free / GB
        if free_gb >= self._least_gb:
            return None
        return ResourceError(f"'{directory}' has {free_gb:.2f} GB free and min_free_disk_gb is {self._least_gb:,g}, so no more batches begin",
                             hint="make room, choose another staging_dir or local_fallback_dir, or lower resources.min_free_disk_gb")
