"""Checks of the lock's backend: what a run takes before anything else."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Iterator, Union

from audit_archiver.locking.record import Backend
from audit_archiver.preflight.check import Check, Good, Said, declare
from audit_archiver.preflight.findings import FAIL

NAME, NOBODY, STALE_S = "aa-check", "nobody", 60.0
Answers = Iterator[Union[Said, Good]]

CHECKS: list[Check] = []
check = functools.partial(declare, CHECKS)


@dataclass(frozen=True)
class Look:
    """The backend beside PostgreSQL."""

    backend: Backend


@check("locking.backend", FAIL, "a lock can be taken, beaten and released in locking.backend",
       "see to it that Redis answers, or that every host may write to lock_dir; 'backend: postgres' does without")
def usable(look: Look) -> Answers:
    """REQ-LOCK-012, REQ-LOCK-015. It is a lock of its own name, so it disturbs no run; of two checks at once the later one has it."""
    token, _ = look.backend.take(NAME, NAME, NOBODY, STALE_S)
    beaten = look.backend.beat(NAME, token)
    look.backend.release(NAME, token)
    if beaten or look.backend.look(NAME):
        yield Good(f"{look.backend.title} keeps the lock's record")
    else:
        yield Said(f"{look.backend.title} did not keep a record that was just written")
