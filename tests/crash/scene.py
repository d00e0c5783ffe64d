"""One crash: a table that is due, a command that stops itself at a named point, a kill, and what must hold afterwards.

    scene = Scene(db, bucket, config_file(db, bucket, **QUICK), tmp_path)
    crash = scene.start(ARCHIVE, "upload.data.put")       # runs until some process of it has stopped there
    crash.kill_victim(); crash.wait()                     # or crash.kill_driver(); crash.kill_rest()
    scene.run(); scene.must_be_whole()                    # the next run, and the invariants
"""

from __future__ import annotations

import datetime
import os
import secrets
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence
from unittest import mock

from audit_archiver.catalogue import evidence, staged
from audit_archiver.formats import names
from tests.ground import processes
from tests.ground.driven import Driven, logs
from tests.ground.held import staged_files
from tests.ground.kill import family, find_stopped, go_on, kill, kill_family, stopped_at
from tests.ground.run import BIN, Child, Result, run_stage
from tests.ground.wait import PATIENCE, until

NO_TIME = datetime.timedelta(0)
TABLE = "public.audit_logs"
OLD, YOUNG = 350, 50
QUICK: dict[str, Any] = {"s3": {"retry_base_s": 0.01, "retry_max_s": 0.05}}
"""Configuration of every scene: batches of 100, two in flight, and hardly any pause before another attempt."""

ARCHIVE = "exec aa-archive --force"
RECOVER = "exec aa-recover --output json"
TXN = ("aa-plan | aa-txn -- sh -c 'aa-select | aa-serialize | aa-upload | aa-verify | aa-delete' | aa-record")


class Crash:
    """A command that some process of has stopped at a point: `victim` is that process, `driver` who runs the show."""

    def __init__(self, child: Child, point: str, place: Path) -> None:
        self.child, self._place, self._point, self.deaths = child, place, point, 0
        try:
            self.victim = stopped_at(point, child.token, 60, child.poll)
        except BaseException:  # nobody else knows of these processes yet
            kill_family(child.token)
            print(trouble(self.said()))
            raise

    @property
    def driver(self) -> int:
        """The process that was started: aa-archive or aa-recover itself; under a shell, aa-txn."""
        found = [pid for pid in family(self.child.token) if _runs(pid, "aa-txn")]
        return found[0] if found else self.child.pid

    def living(self) -> list[int]:
        """The living processes of the command."""
        return family(self.child.token)

    def others(self) -> list[int]:
        """The living processes of the command, apart from the victim and the shell that waits for it."""
        return [pid for pid in self.living() if pid != self.victim and not _runs(pid, "sh")]

    def wait(self, seconds: float = 60.0) -> Result:
        """Wait until the command and all its descendants have ended by themselves.

        A driver that starts its pipeline again starts it with the same environment: who stops now is sent on.
        """
        def ended() -> bool:
            again = None if self.child.poll() is not None else find_stopped(self._point, self.child.token)
            if again is not None:
                go_on(again)
            return self.child.poll() is not None

        until(ended, f"{self._names()} end", seconds)
        until(lambda: not family(self.child.token), f"{self._names()} end after the driver", seconds)
        return Result(self.child.returncode, (self._place / "out").read_bytes(), self.said())

    def kill_whoever_stops(self) -> int:
        """Kill every process that stops at the point until the command has ended; how many there were."""
        kill(self.victim)
        self.deaths = 1
        while (victim := until(lambda: self.child.poll() is not None and -1 or find_stopped(self._point, self.child.token),
                               "another process stops there, or all is over", 60)) != -1:
            kill(victim)
            self.deaths += 1
        return self.deaths

    def kill_driver(self) -> None:
        """Kill the driver while the victim stands still; everybody else has to end by itself."""
        kill(self.driver)
        until(lambda: not self.others(), f"{self._names()} end after their driver was killed", 30)

    def must_be_gone(self) -> None:
        """Nobody is left."""
        until(lambda: not self.living(), f"{self._names()} end", 30)

    def said(self) -> str:
        """The log until now."""
        return (self._place / "err").read_text(errors="replace")

    def _names(self) -> str:
        return ", ".join(f"{pid} {processes.command(pid)}" for pid in self.others()) or "all processes"


class Scene(Driven):
    """An audit table with 350 rows that are due and 50 that are not, and the runs that archive it."""

    def __init__(self, db: Any, bucket: Any, path: Path, place: Path, **rows: int) -> None:
        super().__init__(db, bucket, path)
        self.place = place
        self.before = logs(db, TABLE, **{"old": OLD, "young": YOUNG, **rows})
        self.young = rows.get("young", YOUNG)
        self._weigh = ["-c", path, "--database", db.name, "--table", TABLE]
        self._baseline = place / "baseline"
        made = run_stage("aa-balance", [*self._weigh, "--make-baseline", self._baseline])
        assert made.rc == 0, made

    def spawn_command(self, command: str, env: Optional[Mapping[str, str]] = None) -> tuple[Child, Path]:
        """Start a shell command with our programs in its PATH; its output goes into files, which no process can fill up."""
        place = self.place / secrets.token_hex(4)
        place.mkdir()
        token = secrets.token_hex(8)
        given = {"PATH": f"{BIN}:{os.defpath}", "AA_TEST_RUN": token, "AA_CONFIG": str(self.path), **(env or {})}
        with open(place / "out", "wb") as out, open(place / "err", "wb") as err, open(os.devnull, "rb") as nothing:
            child = Child(["/bin/sh", "-c", command], env=given, stdin=nothing, stdout=out, stderr=err)
        child.token = token
        return child, place

    def start(self, command: str, point: str) -> Crash:
        """Start a command and wait until one of its processes has stopped at `point` (`name` or `name:3`)."""
        return Crash(*_pointed(self.spawn_command(command, {"AA_TEST_POINT": point}), point))

    def go(self, command: str = ARCHIVE, seconds: float = 60.0) -> Result:
        """A command from its start to its end, undisturbed."""
        child, place = self.spawn_command(command)
        rc = child.wait(seconds * PATIENCE)
        return Result(rc, (place / "out").read_bytes(), (place / "err").read_text(errors="replace"))

    def left(self) -> int:
        """Rows in the table."""
        return int(self.db.scalar(f"SELECT count(*) FROM {TABLE}"))

    def sessions(self) -> list[tuple[Any, ...]]:
        """The sessions of ours that are in the database."""
        return self.db.admin("SELECT pid, application_name, state FROM pg_stat_activity WHERE datname = %s "
                             "AND application_name LIKE 'audit-archiver %%'", (self.db.name,))

    def must_be_free(self) -> None:
        """Every session of a dead run goes away, and with it every lock."""
        until(lambda: not self.sessions(), f"the sessions of the dead run end: {self.sessions()}", 30)
        assert self.locks() == 0

    def locks(self) -> int:
        """Advisory locks in this database."""
        return int(self.db.admin("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
                                 "(SELECT oid FROM pg_database WHERE datname = %s)", (self.db.name,))[0][0])

    def batches(self) -> dict[str, set[str]]:
        """Every batch in the bucket by its stem: the suffixes of its objects."""
        found: dict[str, set[str]] = {}
        for key in self.archive.keys():
            stem, cut, rest = key.rpartition("_batch_")
            if cut:
                number = rest[:3]
                found.setdefault(f"{stem}_batch_{number}", set()).add(rest[3:])
        return found

    def must_be_whole(self, *, left: Optional[int] = None, wild: Sequence[str] = (), late: bool = False) -> None:
        """Nothing lost, doubled or altered; every run ended, every batch decided, staging empty, locks free.

        What could still be a person's at work waits for a day: a directory that a dying aa-serialize left half written,
        and in late mode a batch that no delete has begun on. Then recovery settles that too, and all is as it was.
        `late`: a process of the dead run woke up after it; `wild` are the stems that it wrote though the run has ended.
        """
        self.must_be_free()
        assert self.left() == (self.young if left is None else left)
        self.whole(TABLE, self.before)
        if self.settings.locking.mode == "held":
            assert self._unsettled() == ([], sorted(wild))
            assert late or not [name for name in self._staged() if name.endswith("batch.json")], self._staged()
        else:
            assert not [stem for stem in self._unsettled()[1] if names.intent(1) in self.batches()[stem]]
        if self._unsettled() != ([], sorted(wild)) or self._staged():
            self._a_day_later()
            assert (self._unsettled(), self._staged()) == (([], sorted(wild)), [])
            self.whole(TABLE, self.before)
        self.must_be_in_balance(wild)

    def must_be_in_balance(self, wild: Sequence[str] = ()) -> None:
        """What an operator would ask: aa-balance finds every row in one place, aa-validate nothing wrong but what `wild` left."""
        weighed = run_stage("aa-balance", [*self._weigh, "--baseline", self._baseline])
        assert weighed.rc == 0, weighed
        validated = run_stage("aa-validate", ["-c", self.path, "--output", "json"])
        wrong = {each["batch"] for each in validated.lines[0]["findings"] if each["status"] != "warn"}
        assert wrong == {stem.rpartition("/")[2] for stem in wild}, validated

    def _a_day_later(self) -> None:
        with mock.patch.object(evidence, "PATIENCE", NO_TIME), mock.patch.object(staged, "PATIENCE", NO_TIME):
            recovered = run_stage("aa-recover", ["-c", self.path])
        assert recovered.rc == 0, recovered

    def _unsettled(self) -> tuple[list[str], list[str]]:
        """The runs without an end, and the stems with neither or both of commit record and evidence."""
        runs = [key.rpartition("/")[2] for key in self.archive.keys() if "/.runs/" in key]
        begun, ended = ({name[:-len(suffix)] for name in runs if name.endswith(suffix)} for suffix in ("-start.json", "-end.json"))
        return sorted(begun - ended), sorted(stem for stem, has in self.batches().items()
                                             if len(has & {names.COMMIT, names.ABANDONED}) != 1)

    def _staged(self) -> list[str]:
        return staged_files(self.path.parent / "staging")

    def outcome(self, left_at_crash: int) -> str:
        """What became of the batches that were open at the crash, in words."""
        batches = self.batches()
        abandoned = sum(names.ABANDONED in has for has in batches.values())
        recovered = sum(line["committed"]["by"] == "aa-recover" for line in self.archive.commits())
        said = [f"{count} {word}" for count, word in ((recovered, "recorded"), (abandoned, "abandoned")) if count]
        if not said:
            said = ["rolled back" if left_at_crash > self.young else "complete"]
        return ", ".join(said)


def trouble(err: str) -> str:
    """What a log says of errors and warnings, and whatever is no record."""
    return "\n".join(line for line in err.split("\n") if '"level": "INFO"' not in line and '"config.warning"' not in line)


def _pointed(started: tuple[Child, Path], point: str) -> tuple[Child, str, Path]:
    return started[0], point, started[1]


def _runs(pid: int, name: str) -> bool:
    return any(os.path.basename(word) == name for word in processes.command(pid).split()[:2])
