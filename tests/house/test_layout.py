"""The house rules of the tree: one stem per command, imports one way, one importer per package, one version."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Iterator

import pytest

from tests.ground.run import ROOT, module, module_name, names, written

LIB = ROOT / "lib" / "audit_archiver"
FIRST = ("exits", "log", "lines", "points", "__init__")
ORDER = ("formats", "config", "postgres", "locking", "objectstore", "holder", "catalogue", "preflight", "restore", "validate", "query",
         "selftest", "cli", "stages", "commands", "driver")
RANK = {**{part: 0 for part in FIRST}, **{part: rank for rank, part in enumerate(ORDER, 1)}}
IMPORTERS = {
    "jsonschema": {"formats/schema.py"}, "yaml": {"config"}, "psycopg2": {"postgres"}, "redis": {"locking/redis_locks.py"},
    "boto3": {"objectstore"}, "botocore": {"objectstore"}, "pythonjsonlogger": {"log.py"}, "isal": {"formats/members.py"},
}
APPARMOR = {
    "aa-audit", "aa-autodep", "aa-cleanprof", "aa-complain", "aa-decode", "aa-disable", "aa-easyprof", "aa-enabled",
    "aa-enforce", "aa-exec", "aa-features-abi", "aa-genprof", "aa-load", "aa-logprof", "aa-mergeprof", "aa-notify",
    "aa-remove-unknown", "aa-show-usage", "aa-status", "aa-teardown", "aa-unconfined", "aa-update-browser",
}
LAUNCHER = '''\
#!/usr/bin/env python3
"""Launcher of {name}."""
import sys

try:
    from audit_archiver.cli import leave
    from {module} import main
except ImportError as error:
    sys.stderr.write(f"{name}: {{error}}; run 'make setup', then .venv/bin/{name}\\n")
    sys.exit(2)
leave(main())
'''


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted(LIB.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for each in node.names:
                yield node.lineno, each.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for each in node.names:
                yield node.lineno, f"{node.module}.{each.name}"


def standard_library() -> set[str]:
    """The names of the standard library's top-level modules."""
    known = getattr(sys, "stdlib_module_names", None)  # 3.10 and newer
    if known is None:
        places = [Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_config_var("DESTSHARED"))]
        files = [entry for place in places for entry in place.iterdir()]
        known = {entry.name.split(".")[0] for entry in files if entry.suffix in (".py", ".so") or entry.is_dir()}
        known |= set(sys.builtin_module_names)
    return set(known) - {"site-packages"}


def part_of(module: str) -> str:
    """The package or root module of audit_archiver that a dotted name belongs to."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in RANK else "__init__"


@pytest.mark.parametrize("name", names())
def test_each_command_has_a_launcher_a_module_a_page_and_a_test_of_one_stem(name: str) -> None:
    module, launcher = module_name(name), ROOT / "bin" / name
    stem = name.replace("-", "_")
    assert module.split(".")[-1] == stem
    assert launcher.read_text() == LAUNCHER.format(name=name, module=module)
    assert os.access(launcher, os.X_OK)
    source = (ROOT / "lib" / Path(*module.split("."))).with_suffix(".py")
    missing = [str(path.relative_to(ROOT)) for path in (source, ROOT / "man" / f"{name}.1") if not path.exists()]
    if not list((ROOT / "tests").glob(f"*/test_{stem}.py")):
        missing.append(f"tests/*/test_{stem}.py")
    assert not missing


def test_no_command_bears_a_name_that_apparmor_owns() -> None:
    assert not [name for name in names() if name in APPARMOR or name.endswith("prof")]


def test_setup_cfg_lists_every_launcher_and_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["scripts"].split() == [f"bin/{name}" for name in names_as_listed(setup)]
    assert set(setup["options"]["scripts"].split()) == {f"bin/{path.name}" for path in (ROOT / "bin").iterdir()}
    packages = {"audit_archiver.schemas"} | {
        ".".join(path.parent.relative_to(ROOT / "lib").parts) for path in LIB.rglob("__init__.py")}
    assert set(setup["options"]["packages"].split()) == packages


def names_as_listed(setup: configparser.ConfigParser) -> list[str]:
    """The commands in setup.cfg's order, each once."""
    listed = [entry.rpartition("/")[2] for entry in setup["options"]["scripts"].split()]
    return list(dict.fromkeys(listed))


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sources():
        own = part_of("audit_archiver." + path.relative_to(LIB).parts[0].removesuffix(".py"))
        for line, name in imported(path):
            other = part_of(name)
            if name.startswith("audit_archiver") and other != own and RANK[other] > RANK[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} must not import {other}")
    assert not wrong, "\n".join(wrong)


def test_no_stage_imports_another() -> None:
    wrong = [f"{path.name}:{line} imports {name}" for path in (LIB / "stages").glob("*.py")
             for line, name in imported(path) if name.startswith("audit_archiver.stages")]
    assert not wrong


def test_each_third_party_package_is_imported_in_one_place() -> None:
    known, wrong = standard_library(), []
    for path in sources():
        place = path.relative_to(LIB)
        for line, name in imported(path):
            top = name.split(".")[0]
            if top in known or top == "audit_archiver":
                continue
            if not {str(place), place.parts[0]} & IMPORTERS.get(top, set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {top}")
    assert not wrong, "\n".join(wrong)


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    known = standard_library()
    files = [*sources(), *(ROOT / "tools").glob("*.py"), *(ROOT / "tests" / "ground").glob("*.py")]
    named = [path.relative_to(LIB) if LIB in path.parents else path.relative_to(ROOT) for path in files
             if path.stem in known]
    assert not [str(path) for path in named]


def test_the_version_is_typed_once() -> None:
    version = re.search(r'__version__ = "(.+)"', (LIB / "__init__.py").read_text())
    assert version is not None
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False).stdout.split("\n")
    files = [name for name in tracked if name] or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    typed = [name for name in files if name.endswith((".py", ".cfg", ".toml", ".1", ".5", ".7")) and (ROOT / name).exists()
             and re.search(rf"(?<![\d.]){re.escape(version.group(1))}(?![\d.])", (ROOT / name).read_text(errors="replace"))]
    assert typed == ["lib/audit_archiver/__init__.py"]


def test_every_python_file_parses_on_the_oldest_python() -> None:
    for path in [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        ast.parse(path.read_text(), str(path), feature_version=(3, 9))


def test_every_stage_and_command_starts_with_its_contract() -> None:
    for name in names():
        source = (ROOT / "lib" / Path(*module_name(name).split("."))).with_suffix(".py")
        if not source.exists():
            continue
        tree = ast.parse(source.read_text())
        said = ast.get_docstring(tree) or ""
        assert said.split("\n\n")[0].replace("\n", " ").endswith("."), f"{source.name}: the first paragraph is one sentence"
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"main", "build_parser", "run"} <= defined, source.name


@pytest.mark.parametrize("name", written())
def test_every_option_that_a_command_accepts_is_read_somewhere(name: str) -> None:
    """An option that is taken and ignored is a lie; --dry-run ignored is a deletion (T46)."""
    read = {node.attr for path in sources() for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store)}
    read |= {node.args[1].value for path in sources() for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1
             and isinstance(node.args[1], ast.Constant)}
    options = {action.dest for action in module(name).build_parser()._actions} - {"help", "version"}
    assert options <= read
