"""Reads YAML into a `Tree`: values with the file and line of every key; the only importer of yaml.

Variables are put into values after YAML has been parsed, so that no value of the environment can change the
structure of the file: `${NAME}`, `${NAME:-default}` (also for an empty NAME), `$${` for a literal `${`.
`!include other.yaml` reads a file relative to the one that includes it. Anchors, aliases and merge keys work; a
duplicate key is refused, since the last one would win silently. Only the plain types of YAML exist here.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any, Mapping, NamedTuple, Optional

import yaml

from audit_archiver.config.tree import KeyPath, Place, Taken, Tree
from audit_archiver.exits import ConfigError

FILE_BYTES = 4 << 20
NODES = 500_000  # aliases of aliases grow exponentially
FAST_NESTING = 3000  # the parser written in C overruns its stack far beyond this; the other one raises

_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE = "tag:yaml.org,2002:"
_PLAIN = yaml.constructor.SafeConstructor()
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_INSIDE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NESTING = re.compile(r"[\[{]|[-?] (?=[-?\[{])")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


class _File(NamedTuple):
    """A file being read: its name in messages, and the real paths of the files that led to it, itself last."""

    name: str
    chain: tuple[str, ...]


class _Pair(NamedTuple):
    key: str
    key_node: yaml.Node
    value: yaml.Node
    file: _File


def read(path: str, env: Mapping[str, str], cwd: Optional[str] = None) -> Tree:
    """Read the file `path` and what it includes.

    Raises ConfigError with file:line:column where YAML cannot be parsed. What can be read in spite of an error
    (a duplicate key, an unset variable, a missing include) is noted in the tree's problems.
    """
    tree = Tree(path)
    real = os.path.abspath(os.path.join(cwd or os.getcwd(), path))
    node, file = _open(tree, path, real, ())
    if node is None:
        raise ConfigError(f"the configuration '{path}' is empty", at=f"{path}:1",
                          hint="write at least 's3:' and 'databases:'; see aa-config(5)")
    tree.value = _Builder(tree, env).build(node, (), file)
    if not isinstance(tree.value, dict):
        raise ConfigError("the configuration must be a mapping of 'key: value' lines", at=str(_place(node, file)),
                          hint="write at least 's3:' and 'databases:'; see aa-config(5)")
    return tree


def _open(tree: Tree, name: str, real: str, chain: tuple[str, ...]) -> tuple[Optional[yaml.Node], _File]:
    """Parse one file into YAML nodes; None if it holds nothing."""
    try:
        with open(real, "rb") as stream:
            data = stream.read(FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration '{name}': {error.strerror}") from None
    tree.files[name] = real
    if len(data) > FILE_BYTES:
        raise ConfigError(f"'{name}' is larger than {FILE_BYTES >> 20} MB; is it a configuration?")
    file = _File(name, chain + (os.path.realpath(real),))
    text = _decode(data, name)
    try:
        parser = _FAST if sum(1 for _ in _NESTING.finditer(text)) < FAST_NESTING else yaml.SafeLoader
        return parser(text).get_single_node(), file
    except (RecursionError, yaml.YAMLError) as error:
        if isinstance(error, yaml.YAMLError) and "nesting depth" not in str(getattr(error, "problem", "")):  # PyYAML 6.0.4 has a limit
            raise _syntax(text, name, error) from None
        raise ConfigError("the nesting is too deep", at=f"{name}:1") from None


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError("the file is not UTF-8", at=f"{name}:{line}:{column}", hint="save it as UTF-8") from None
    odd = _UNPRINTABLE.search(text)
    if odd:
        line = text.count("\n", 0, odd.start()) + 1
        column = odd.start() - text.rfind("\n", 0, odd.start())
        raise ConfigError(f"character U+{ord(odd.group()):04X} may not stand in YAML", at=f"{name}:{line}:{column}")
    return text


def _syntax(text: str, name: str, error: yaml.YAMLError) -> ConfigError:
    """A message for text that is not YAML. The slower parser is asked again, since it explains itself better."""
    try:
        yaml.SafeLoader(text).get_single_node()
    except yaml.YAMLError as better:
        error = better
    except RecursionError:
        pass
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or "not YAML"
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    return ConfigError(f"not valid YAML: {_discreet(problem)}", at=f"{name}:{line}:{column}",
                       hint=_remedy(problem, text, line))


def _discreet(problem: str) -> str:
    """The parser's words without names out of the file: an unquoted password may look like an alias or a tag."""
    return re.sub("'([^']*)'", lambda found: found.group() if len(found.group(1)) < 2 or found.group(1)[0] in "<\\"
                  else "(name)", problem)


def _remedy(problem: str, text: str, line: int) -> str:
    lines = text.split("\n")
    written = lines[line - 1] if line <= len(lines) else ""
    if "\\t" in problem or written.lstrip(" ").startswith("\t"):
        return "indent with spaces, never with tabs"
    if "but found another document" in problem:
        return "write one document; remove the '---'"
    if "undefined alias" in problem:
        return "define the anchor (&name) above, in the same file; put a value that starts with '*' in quotes"
    if "${" in written:
        return "put a value that holds ${NAME} in double quotes"
    if "mapping values are not allowed" in problem:
        return "check the indentation, and put a value that holds ': ' in quotes"
    return "check the indentation, the quotes and the brackets of this line and the one above"


def _place(node: yaml.Node, file: _File) -> Place:
    return Place(file.name, node.start_mark.line + 1, node.start_mark.column + 1)


class _Builder:
    """Turns nodes into values and notes where each of them stands."""

    def __init__(self, tree: Tree, env: Mapping[str, str]) -> None:
        self._tree, self._env = tree, env
        self._inside: set[int] = set()
        self._nodes = 0

    def build(self, node: yaml.Node, path: KeyPath, file: _File) -> Any:
        """The value of `node`, which belongs at `path`."""
        if node.tag == "!include":
            node, file = self._include(node, file)
            if node is None:
                self._tree.broken.add(path)
                return None
        self._tree.places.setdefault(path, _place(node, file))
        self._nodes += 1
        if self._nodes > NODES or id(node) in self._inside:
            reason = "repeats itself without end" if id(node) in self._inside else f"grows beyond {NODES} entries"
            raise ConfigError(f"an alias {reason}", at=str(_place(node, file)))
        if isinstance(node, yaml.ScalarNode):
            before = len(self._tree.problems)
            value = self._scalar(node, path, file)
            if len(self._tree.problems) > before:
                self._tree.broken.add(path)
            return value
        if node.tag not in (_CORE + "map", _CORE + "seq"):
            self._refuse_tag(node, file)
            return None
        self._inside.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(each, path + (number,), file) for number, each in enumerate(node.value)]
            return self._mapping(node, path, file)
        except RecursionError:
            raise ConfigError("the nesting is too deep", at=str(_place(node, file))) from None
        finally:
            self._inside.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, file: _File) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for pair in self._pairs(node, file, ()):
            self._tree.places[path + (pair.key,)] = _place(pair.key_node, pair.file)
            values[pair.key] = self.build(pair.value, path + (pair.key,), pair.file)
        return values

    def _pairs(self, node: yaml.MappingNode, file: _File, merging: tuple[int, ...]) -> list[_Pair]:
        """The keys of a mapping and of what it merges; its own come first and win, then the first of a merged list."""
        own: dict[str, _Pair] = {}
        merged: list[_Pair] = []
        merge_line = 0
        for key_node, value in node.value:
            if key_node.tag == _CORE + "merge":
                if merge_line:
                    self._tree.refuse_at(_place(key_node, file), f"'<<' stands twice (line {merge_line})",
                                         "merge a list: '<<: [*one, *two]'")
                merge_line = key_node.start_mark.line + 1
                merged += self._merged(value, file, merging + (id(node),))
                continue
            key = self._key(key_node, file)
            if key is None:
                continue
            if key in own:
                first = own[key].key_node.start_mark.line + 1
                self._tree.refuse_at(_place(key_node, file), f"key '{key}' is written twice (line {first})",
                                     "keep one of the two")
                continue
            own[key] = _Pair(key, key_node, value, file)
        for pair in merged:
            own.setdefault(pair.key, pair)
        return list(own.values())

    def _merged(self, node: yaml.Node, file: _File, merging: tuple[int, ...]) -> list[_Pair]:
        place = _place(node, file)
        if node.tag == "!include":
            node, file = self._include(node, file)
            if node is None:
                return []
        if id(node) in merging:
            raise ConfigError("an alias repeats itself without end", at=str(place))
        if isinstance(node, yaml.MappingNode):
            return self._pairs(node, file, merging)
        if isinstance(node, yaml.SequenceNode):
            return [pair for each in node.value for pair in self._merged(each, file, merging + (id(node),))]
        self._tree.refuse_at(place, "'<<' can only merge a mapping", "write '<<: *anchor' of a mapping")
        return []

    def _key(self, node: yaml.Node, file: _File) -> Optional[str]:
        if isinstance(node, yaml.ScalarNode) and node.tag == _CORE + "str":
            return node.value
        shown = f" '{node.value}'" if isinstance(node, yaml.ScalarNode) else ""
        self._tree.refuse_at(_place(node, file), f"key{shown} is not text", "put it in quotes")
        return None

    def _include(self, node: yaml.Node, file: _File) -> tuple[Optional[yaml.Node], _File]:
        """The content of the file that `!include` names."""
        place = _place(node, file)
        name = self._substitute(node.value, place)[0] if isinstance(node, yaml.ScalarNode) else ""
        if not name:
            self._tree.refuse_at(place, "'!include' names no file", "write '!include other.yaml'")
            return None, file
        shown = os.path.join(os.path.dirname(file.name), name)
        real = os.path.join(os.path.dirname(self._tree.real(file.name)), name)
        if os.path.realpath(real) in file.chain:
            raise ConfigError(f"'!include {name}' leads back to '{shown}'", at=str(place),
                              hint="a file may not include itself, also not through another one")
        try:
            found, inner = _open(self._tree, shown, real, file.chain)
        except ConfigError as error:
            if error.at is None:
                error.at = str(place)
            raise
        if found is None:
            self._tree.refuse_at(place, f"the included file '{shown}' is empty", "fill it or remove the '!include'")
        return found, inner

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath, file: _File) -> Any:
        place = _place(node, file)
        kind = node.tag[len(_CORE):] if node.tag.startswith(_CORE) else node.tag
        if kind not in ("str", "null", "bool", "int", "float", "timestamp", "value", "merge"):
            self._refuse_tag(node, file)
            return None
        if "${" in node.value:
            text, taken = self._substitute(node.value, place)
            if taken.names:
                self._tree.taken[path] = taken
            return text if text or node.style else None
        if kind in ("timestamp", "value", "merge"):
            return node.value
        if kind in ("int", "float") and (":" in node.value or _OCTAL.fullmatch(node.value)):
            return node.value  # YAML 1.1 would make 4096 of 010000 and 750 of 12:30
        try:
            value = _PLAIN.construct_object(node)
        except (ValueError, yaml.YAMLError):
            return node.value
        if isinstance(value, float) and not math.isfinite(value):
            self._tree.refuse_at(place, f"'{node.value}' is no number to work with", "write a finite number")
            return None
        return value

    def _substitute(self, text: str, place: Place) -> tuple[str, Taken]:
        """Put the environment into `text`; unset variables and broken `${` are noted at `place`."""
        names: list[str] = []
        literal = bool(_VARIABLE.sub("", text))

        def value(found: re.Match) -> str:
            nonlocal literal
            if found.group() == "$${":
                literal = True
                return "${"
            inside = _INSIDE.fullmatch(found.group(1))
            if not inside or not found.group(2) or "${" in found.group(1):
                self._tree.refuse_at(place, "'${' is not followed by a variable's name and '}'",
                                     "write ${NAME} or ${NAME:-default}, and $${ for a literal ${")
                return ""
            name, default = inside.groups()
            names.append(name)
            if default is not None and not self._env.get(name):
                literal = literal or bool(default)
                return default
            if name not in self._env:
                self._tree.refuse_at(place, f"the environment variable '{name}' is not set",
                                     f"set it, or write ${{{name}:-default}}")
            return self._env.get(name, "")

        return _VARIABLE.sub(value, text), Taken(tuple(names), literal)

    def _refuse_tag(self, node: yaml.Node, file: _File) -> None:
        self._tree.refuse_at(_place(node, file), "a tag ('!...') that is not known",
                             "only '!include' is known; put a value that starts with '!' in quotes")
