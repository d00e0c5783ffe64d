"""Hundreds of kills and network faults under a running application, a store that lies, and what came of each. Called by `make crash`.

Several workers, each with servers of its own, meet one fault after another (tests/crash/campaign.py). What came of each is
appended to .crash/outcomes.jsonl at once; the table goes to stdout and to docs/faults.md. Exit code 1 if a row was not
where it has to be, if a run that nothing disturbed did not end with 0, or if a lie ended otherwise than its table says.
CRASH_JOBS=N workers (default 2); CRASH_SEED=N shuffles otherwise; CRASH_MINUTES=N begins no fault after so long;
CRASH_GO_ON=1 keeps the outcomes of a run that was ended and meets the other faults.
`tools/crash.py --write` makes the page again from the outcomes that are there.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Iterable, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.crash.campaign import Campaign  # noqa: E402
from tests.crash.cases import KILL, LIE, LINE, SWEPT, Case, Outcome, everything  # noqa: E402
from tests.crash.epoch import Ground  # noqa: E402

KINDS = {KILL: "kills", LINE: "network faults", LIE: "lies of the store"}
PAGE = ROOT / "docs" / "faults.md"
PLACE = ROOT / ".crash"
OUTCOMES = PLACE / "outcomes.jsonl"
HEAD = """# Faults

Written by `make crash`: one fault after another is made under an application that inserts, updates and deletes rows of the
same table all the time and runs into deadlocks. Each run of the archiver heals what the last fault left, and is then broken
itself. After each fault every row that the application ever had acknowledged is looked for: it must be in the table or in the
archive, once, as it was last written; and `aa-balance` must agree. *Point* is where a process stood when the fault came
(`lib/audit_archiver/points.py` lists them); SIGKILL of a PostgreSQL backend makes the server restart all sessions.

"""


def record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a line of the file."""
    return {**outcome.case._asdict(), "fault": outcome.case.fault, "code": outcome.code, "runs": outcome.runs, "seconds": round(outcome.seconds, 3),
            "said": outcome.said}


def work(number: int, jobs: int, seed: int, until: float) -> None:
    """Meet every case whose turn is this worker's."""
    def put(line: dict[str, Any]) -> None:
        with open(OUTCOMES, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def failed(error: Exception) -> None:
        put({"wrong": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:],
             "log": [line for line in campaign.last_log.split("\n") if '"INFO"' not in line][-40:]})
        campaign.forget()

    known = met()
    with tempfile.TemporaryDirectory(prefix="aa-crash-") as place, Ground(Path(place)) as ground:
        campaign = Campaign(ground, lambda outcome: put(record(outcome)), seed + number)
        for case in [case for case in everything(seed)[number::jobs] if case not in known]:
            if time.time() > until:
                break
            try:
                campaign.meet(case)
            except Exception as error:
                failed(error)
            put({"totals": campaign.take_totals()})
        try:
            campaign.end()
        except Exception as error:
            failed(error)
        put({"totals": campaign.take_totals()})


def read() -> list[dict[str, Any]]:
    """The lines of the file."""
    return [json.loads(line) for line in OUTCOMES.read_text().split("\n") if line]


def met() -> set[Case]:
    """The cases whose outcome is known."""
    return {Case(*(line[name] for name in Case._fields)) for line in read() if "fault" in line}


def cell(found: Sequence[dict[str, Any]]) -> str:
    """What came of a fault at a point: how often, by which run it was healed, and the longest time."""
    if not found:
        return ""
    same = sum(each["runs"] == 0 for each in found)
    said = [f"{count} {word}" for count, word in ((same, "same"), (len(found) - same, "next")) if count]
    return f"{' + '.join(said)}, {max(each['seconds'] for each in found):.1f} s"


def matrix(outcomes: Iterable[dict[str, Any]]) -> list[str]:
    """Points down, faults across."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for each in outcomes:
        cells[each["point"].partition(":")[0], each["fault"]].append(each)
    faults = sorted({fault for _, fault in cells})
    points = [point for point in SWEPT if any(name == point for name, _ in cells)]
    return [f"| point | {' | '.join(faults)} |", "|---" * (len(faults) + 1) + "|",
            *(f"| `{point}` | {' | '.join(cell(cells[point, fault]) for fault in faults)} |" for point in points), ""]


def times(title: str, outcomes: Sequence[dict[str, Any]]) -> str:
    """Median and worst time to recover."""
    seconds = [each["seconds"] for each in outcomes]
    same = sum(each["runs"] == 0 for each in outcomes)
    return (f"| {title} | {len(outcomes)} | {same} | {len(outcomes) - same} | {statistics.median(seconds):.1f} s | {max(seconds):.1f} s |"
            if seconds else f"| {title} | 0 | | | | |")


def page(lines: Sequence[dict[str, Any]]) -> str:
    """docs/faults.md."""
    outcomes = [line for line in lines if "fault" in line]
    wrong = [line for line in lines if "wrong" in line]
    totals: Counter[str] = Counter()
    for line in lines:
        totals.update(line.get("totals", {}))
    by_kind = {kind: [each for each in outcomes if each["kind"] == kind] for kind in (KILL, LINE, LIE)}
    there_are = Counter(case.kind for case in everything(0))
    told = [f"**{', '.join(f'{len(by_kind[kind])} {words}' for kind, words in KINDS.items())}: {len(wrong)} of them lost, doubled or altered a "
            f"row, or left a run that did not end with 0.** A whole campaign has {', '.join(str(there_are[kind]) for kind in KINDS)} cases; some "
            "need a kill before them that is counted too.", "",
            f"The application had at least {totals['acknowledged']:,} writes acknowledged meanwhile, {totals['open']} answers to COMMIT were lost, "
            f"{totals['deadlocks']:,} of its transactions ended as deadlocks, and {totals['rows']:,} rows were archived.", "",
            "Time to recover is how long the archiver ran after the cause was gone until one of its runs had ended with 0, that run's own "
            "work included, and where that next run was itself broken and lived through it, that too.", "",
            "| faults | number | healed by the same run | by the next | median | worst |", "|---|---|---|---|---|---|",
            *(times(words, by_kind[kind]) for kind, words in KINDS.items()), "",
            "In the tables: *same* is a run that lived through its fault and ended with 0, *next* one that was healed by the run after it; "
            "the time is the longest.", "", "## Kills", "", *matrix(by_kind[KILL]), "## Network faults", "", *matrix(by_kind[LINE])]
    told += ["## A store that lies", "", "The lie lasts for one whole run; then the store is honest, and the next run has to end with 0.", "",
             "| the store | object | exit code | said in the log | time to recover |", "|---|---|---|---|---|"]
    told += [f"| {each['what']} | {each['point'] or 'all'} | {each['code']} | {each['said']} | {each['seconds']:.1f} s |"
             for each in sorted(by_kind[LIE], key=lambda each: (each["what"], each["point"]))]
    told += ["", f"{datetime.date.today()}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs at a load average of "
             f"{os.getloadavg()[2]:.0f}; times follow from both."]
    return HEAD + "\n".join(told) + "\n"


def report() -> int:
    """The page, and the exit code."""
    lines = read()
    text = page(lines)
    print(text)
    PAGE.write_text(text, encoding="utf-8")
    wrong = [line for line in lines if "wrong" in line]
    for line in wrong:
        print(f"WRONG: {line['wrong']}\n{line['trace']}\n" + "\n".join(line["log"]), file=sys.stderr)
    return int(bool(wrong))


def main() -> int:
    """Start the workers, wait, report."""
    if sys.argv[1:] == ["--write"]:
        return report()
    if len(sys.argv) > 1:
        number, jobs, seed, until = sys.argv[1:]
        work(int(number), int(jobs), int(seed), float(until))
        return 0
    jobs, seed = int(os.environ.get("CRASH_JOBS", "2")), int(os.environ.get("CRASH_SEED", "1"))
    until = time.time() + 60 * float(os.environ.get("CRASH_MINUTES", "600"))
    PLACE.mkdir(exist_ok=True)
    if "CRASH_GO_ON" not in os.environ or not OUTCOMES.exists():
        OUTCOMES.write_text("")
    workers = [subprocess.Popen([sys.executable, __file__, str(number), str(jobs), str(seed), str(until)]) for number in range(jobs)]
    failed = any([worker.wait() for worker in workers])
    return report() or int(failed)


if __name__ == "__main__":
    sys.exit(main())
