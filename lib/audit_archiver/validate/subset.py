"""A rolling part of the batches: K/N names the same batches whenever it is asked, and K = 1..N together name each once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

from audit_archiver.exits import ConfigError

_FORM = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Subset:
    """The K-th of N parts, counted from 1."""

    part: int
    parts: int

    def means(self, batch_id: Optional[str]) -> bool:
        """True if the batch of this id (a SHA-256 in hex) belongs to the part; one whose id nobody knows always does."""
        return batch_id is None or int(batch_id[:16], 16) % self.parts == self.part - 1

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}"


WHOLE = Subset(1, 1)


def parse(text: str) -> Subset:
    """The subset that K/N names. Raises ConfigError."""
    found = _FORM.fullmatch(text)
    if found is None or not 1 <= int(found.group(1)) <= int(found.group(2)):
        raise ConfigError(f"--subset '{text}' is no part of a whole", hint="write K/N with K from 1 to N, as 3/30")
    return Subset(int(found.group(1)), int(found.group(2)))
