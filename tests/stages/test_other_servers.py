"""The types on the oldest and on the newest common PostgreSQL, whichever one the rest of the suite runs on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ground import binaries

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("major", [11, 17])
def test_every_type_comes_back_on_this_version_too(major: int) -> None:
    try:
        binaries.embedded(major)
    except binaries.Missing as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/stages/test_types.py"], cwd=ROOT,
                          env={**os.environ, "AA_PG": str(major)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 30
