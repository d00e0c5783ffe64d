"""A store that lies, object by object: what each lie is, which object it is about, and how a run must end that met it.

Everything else is tests/crash/campaign.py's. Needs no pytest.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

from tests.ground.faulty_s3 import Answer, Fault, answers, error, flip_bit, ignores_if_none_match, lists_late, on, once, stores, swaps

DROPS, TRUNCATES, FLIPS, SWAPS = "accepts and drops", "truncates", "flips a bit", "swaps objects"
ERROR_IN_200, BUSY, UNCONDITIONAL, LATE = "answers 200 with an error body", "answers 503 for a while", "loses If-None-Match", "lists late"
OBJECTS = {"data": ".jsonl.gz", "metadata": "_metadata.json", "key list": "_manifest.json", "commit record": "_commit.json",
           "start of the run": "-start.json", "end of the run": "-end.json"}
CODES = {(what, name): 7 if what == ERROR_IN_200 else 2 for what in (DROPS, TRUNCATES, FLIPS, SWAPS, ERROR_IN_200) for name in OBJECTS}
CODES[LATE, ""] = 2
"""How a run ends that met a lie; with 0 where nothing is said here."""
BUSY_TIMES = 3
LATE_S = 3.0


class Lie(NamedTuple):
    """What the store does to which object ("" : to every one)."""

    what: str
    object: str


def lies() -> list[Lie]:
    """Every lie that there is."""
    return [Lie(what, name) for what in (DROPS, TRUNCATES, FLIPS, SWAPS, ERROR_IN_200, BUSY) for name in OBJECTS] + [
        Lie(UNCONDITIONAL, ""), Lie(LATE, "")]


def fault(lie: Lie) -> Fault:
    """The lie as a fault of FaultyS3."""
    which = on("PUT", OBJECTS.get(lie.object, ""))
    make: dict[str, Callable[[], Fault]] = {
        DROPS: lambda: stores(which, lambda body: None),
        TRUNCATES: lambda: stores(which, lambda body: body[:len(body) // 2]),
        FLIPS: lambda: stores(which, flip_bit),
        SWAPS: lambda: swaps(which),
        ERROR_IN_200: lambda: answers(which, Answer(200, {"content-type": "application/xml"}, error(200, "InternalError").body)),
        BUSY: lambda: answers(once(which, BUSY_TIMES), error(503, "SlowDown")),
        UNCONDITIONAL: ignores_if_none_match,
        LATE: lambda: lists_late(LATE_S),
    }
    return make[lie.what]()
