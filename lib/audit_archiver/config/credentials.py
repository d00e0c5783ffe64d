"""Passwords and keys: where they come from, and that nobody prints them.

A secret comes from the environment (`password_env: NAME`, or `password: ${NAME}`), or stands in the file, which
is for development: that logs a warning, and a file that others can read is refused (REQ-DB-006, REQ-SEC-001).
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from typing import Any, Mapping, Optional

from audit_archiver.config.tree import KeyPath, Tree

_LOOKS_LIKE_A_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


class Secret:
    """A text that shows as *** wherever it is printed, formatted or logged; `reveal()` gives it to a connection."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself; for the call that connects, and for nothing else."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __bool__(self) -> bool:
        return bool(self._text)

    def __deepcopy__(self, _memo: Any) -> Secret:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not stored")


def choose(tree: Tree, section: KeyPath, key: str, env: Mapping[str, str], *, secret: bool = True) -> Optional[str]:
    """The text of `key` in `section`: out of the variable that `<key>_env` names, or out of `key` itself, or None.

    What is wrong goes to tree.problems: both keys given, the variable missing or empty. A secret that stands in
    the file in clear is judged by `_in_clear`.
    """
    values = tree.get(section) or {}
    named, text = values.get(f"{key}_env"), values.get(key)
    if named is not None and text is not None:
        tree.refuse(section + (key,), f"{tree.subject(section + (key,))} is given twice, as '{key}' and as '{key}_env'",
                    f"keep '{key}_env' (line {tree.place(section + (f'{key}_env',)).line})")
        return None
    if named is not None:
        return _from_variable(tree, section + (f"{key}_env",), named, env)
    if secret and text is not None and tree.in_clear(section + (key,)):
        _in_clear(tree, section + (key,))
    return text


def _from_variable(tree: Tree, path: KeyPath, name: str, env: Mapping[str, str]) -> Optional[str]:
    """The value of the environment variable `name`. A name that could be the secret itself is not printed."""
    if env.get(name):
        return env[name]
    called = f"'{name}'" if _LOOKS_LIKE_A_NAME.fullmatch(name) else f"that '{path[-1]}' names"
    state = "is empty" if name in env else "is not set"
    tree.refuse(path, f"the environment variable {called} {state}",
                f"{tree.subject(path)} takes the name of a variable, not the secret; set it, in cron and systemd too")
    return None


def _in_clear(tree: Tree, path: KeyPath) -> None:
    """Warn of a secret in clear, and refuse it in a file that everybody can read. Group-readable is the owner's choice."""
    place = tree.place(path)
    tree.warn(path, f"{tree.subject(path)} stands in the file in clear; write '{path[-1]}_env: NAME' and set NAME")
    try:
        mode = os.stat(tree.real(place.file)).st_mode
    except OSError:
        return
    if stat.S_ISREG(mode) and mode & (stat.S_IROTH | stat.S_IWOTH):
        tree.refuse(path, f"'{place.file}' holds a secret and others can read it (mode {stat.S_IMODE(mode):04o})",
                    f"run: chmod o-rwx {shlex.quote(place.file)}")
