"""A configuration as it was read: plain values, and for every key the file and line where it stands.

A path is a tuple of keys and list positions, e.g. ("databases", 0, "tables", 1, "batch_size"). Whatever reads or
checks the tree adds to `problems` and `warnings` and goes on, so that a person sees all of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Sequence

from audit_archiver.exits import ConfigError

KeyPath = tuple  # of str and int


@dataclass(frozen=True)
class Place:
    """Where something stands; lines and columns count from 1."""

    file: str
    line: int
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Taken:
    """A value that came out of the environment: the variables' names, and whether it also holds text of the file."""

    names: tuple[str, ...]
    literal: bool


class ConfigErrors(ConfigError):
    """Several things are wrong; `parts` are the single errors in the order of the file."""

    def __init__(self, parts: Sequence[ConfigError]) -> None:
        self.parts = tuple(parts)
        super().__init__(f"{len(parts)} errors in the configuration",
                         detail="; ".join(str(part) for part in parts), at=parts[0].at)


class Tree:
    """Values, places and findings of one configuration file and what it includes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.value: Any = None
        self.places: dict[KeyPath, Place] = {}
        self.taken: dict[KeyPath, Taken] = {}
        self.broken: set[KeyPath] = set()
        self.files: dict[str, str] = {}
        self.problems: list[tuple[Place, ConfigError]] = []
        self.warnings: list[str] = []

    def real(self, file: str) -> str:
        """The absolute path of a file that messages name as `file`."""
        return self.files.get(file, file)

    def get(self, path: KeyPath, default: Any = None) -> Any:
        """The value at `path`, or `default` where there is none."""
        value = self.value
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return default
        return value

    def put(self, path: KeyPath, value: Any) -> None:
        """Replace the value at `path`."""
        self.get(path[:-1])[path[-1]] = value

    def drop(self, path: KeyPath) -> None:
        """Forget a value that is wrong, so that later checks need not look at it again; list entries become empty."""
        while path and isinstance(path[-1], int) and len(path) > 1 and path[-2] not in ("databases", "tables"):
            path = path[:-1]
        parent = self.get(path[:-1])
        if not path:
            self.value = {}
        elif isinstance(parent, list) and isinstance(path[-1], int) and path[-1] < len(parent):
            parent[path[-1]] = {}
        elif isinstance(parent, dict):
            parent.pop(path[-1], None)

    def place(self, path: KeyPath) -> Place:
        """Where `path` is written; for a missing key where its section is."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path) or Place(self.path, 1, 1)

    def in_clear(self, path: KeyPath) -> bool:
        """True if some of the value at `path` is written in the file, not taken from the environment."""
        return path not in self.taken or self.taken[path].literal

    def refuse(self, path: KeyPath, msg: str, hint: Optional[str] = None, *, detail: Optional[str] = None) -> None:
        """Note an error at `path`."""
        self.refuse_at(self.place(path), msg, hint, detail=detail)

    def refuse_at(self, place: Place, msg: str, hint: Optional[str] = None, *, detail: Optional[str] = None) -> None:
        """Note an error at a place that no path leads to: a duplicate key, a broken include."""
        self.problems.append((place, ConfigError(msg, detail=detail, hint=hint, at=str(place))))

    def warn(self, path: KeyPath, msg: str) -> None:
        """Note a warning at `path`."""
        self.warnings.append(f"{self.place(path)}: {msg}")

    def subject(self, path: KeyPath) -> str:
        """How messages call a key: 's3.bucket', 'port' of database 'prod', 'batch_size' of table 'prod.audit_logs'."""
        if path[:1] == ("databases",) and len(path) > 1:
            owner, rest = self._owner(path)
            return f"{_quoted(rest)} of {owner}" if rest else owner
        return _quoted(path) if path else "the configuration"

    def _owner(self, path: KeyPath) -> tuple[str, KeyPath]:
        database = self._name(path[:2], "database")
        if path[2:3] == ("tables",) and len(path) > 3:
            return f"table {self._name(path[:4], 'table')} in database {database}", path[4:]
        return f"database {database}", path[2:]

    def _name(self, path: KeyPath, kind: str) -> str:
        name = self.get(path + ("name",))
        return f"'{name}'" if isinstance(name, str) and name else f"no. {path[-1] + 1}"

    def raise_problems(self) -> None:
        """Raise what was found, in the order of the files; one error as itself, several as ConfigErrors."""
        if not self.problems:
            return
        order = list(self.files)
        unique = {(place, error.msg): (place, error) for place, error in self.problems}
        found = sorted(unique.values(), key=lambda each: (order.index(each[0].file), each[0].line))
        parts = [error for _, error in found]
        raise parts[0] if len(parts) == 1 else ConfigErrors(parts)


def _quoted(path: Sequence[Any]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return f"'{text.lstrip('.')}'"
