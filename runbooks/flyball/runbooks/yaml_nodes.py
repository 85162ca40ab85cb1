"""YAML for runbooks: only plain data, and every value knows the line and column it stands at.

PyYAML's own loaders are not used because they read `on:` as true, `1:30` as 90 and keep the last of two equal keys.
Here the event stream of its parser is turned into nodes: scalars by the YAML 1.2 core schema, and whatever YAML
1.1 readers would take for something else is refused with the way out. Duplicate keys, anchors, aliases, tags, several documents,
and too deep or too long documents are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import yaml

from flyball.core.errors import ConfigError

MAX_BYTES: Final = 64 * 1024
MAX_DEPTH: Final = 24
_LARGEST: Final = 1e15
"""Beyond it whole numbers are no longer exact in every reader of JSON, and no runbook means them."""

_ODD_BREAK = re.compile("[\x85\u2028\u2029]")
"""Line breaks to a YAML parser and to nobody else: the lines of errors would be others than those of the editor."""
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where PyYAML was built with it: five times as fast; only the event stream of either is used."""
_RESOLVERS_1_1: Final = yaml.SafeLoader.yaml_implicit_resolvers


@dataclass(slots=True)
class Node:
    """One value with its place. `line` and `column` count from 1.

    `value`: a str, int, float, bool or None for a scalar; dict[str, Node] or list[Node] for a collection.
    """

    value: Any
    line: int
    column: int
    raw: str = ""
    start: int = 0
    end: int = 0
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of a mapping: where each key stands."""

    def plain(self) -> Any:
        """The value as plain Python data."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed file: its text, name and root node."""

    path: str
    text: str
    root: Node

    def error(self, code: str, what: str, line: int, column: int) -> ConfigError:
        return ConfigError(what, where=f"{self.path}:{line}:{column}", code=code)

    def place(self, location: tuple[int | str, ...], *, key: bool = False) -> tuple[int, int]:
        """Line and column of the value at a path such as `("steps", 0, "verify")`; of the nearest parent when it is missing.

        Args:
            key: the place of the last key instead of its value: right for an unknown field.
        """
        node, place = self.root, (self.root.line, self.root.column)
        for depth, part in enumerate(location):
            if isinstance(node.value, dict) and part in node.value:
                last = depth == len(location) - 1
                place = node.keys[str(part)]
                node = node.value[str(part)]
                if not (last and key):
                    place = (node.line, node.column)
            elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                place = (node.line, node.column)
            else:
                break
        return place

    def node(self, *location: int | str) -> Node | None:
        node = self.root
        for part in location:
            if isinstance(node.value, dict) and part in node.value:
                node = node.value[str(part)]
            elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
            else:
                return None
        return node

    def inside(self, node: Node, offset: int) -> tuple[int, int]:
        """Line and column of the character `offset` of a scalar's text, also within quotes, folds and block scalars."""
        at = node.start
        source, value = self.text, node.raw
        if source[at : at + 1] in "|>":  # the header of a block scalar is no text
            at = source.find("\n", at) + 1
        elif source[at : at + 1] in "'\"":
            at += 1
        for char in value[:offset]:
            # Folding turns a line break and indentation into one blank; what is skipped is never part of the value.
            while at < node.end and source[at] != char:
                if char in " \n" and source[at] in " \n\r\t":
                    break
                at += 1
            at += 1
        while at < node.end and source[at] in " \t\r\n" and value[offset : offset + 1] not in " \t\r\n":
            at += 1
        line = source.count("\n", 0, at) + 1
        return line, at - (source.rfind("\n", 0, at) + 1) + 1


def parse(text: str | bytes, path: str) -> Document:
    """One YAML document as nodes.

    Raises: ConfigError with a code `RB00x` and `path:line:column`:
        RB001 not YAML, not UTF-8 or too long; RB002 duplicate key; RB003 anchors, aliases, tags, several documents;
        RB004 too deep; RB005 a key that is no text; RB006 a word that YAML 1.1 and 1.2 read differently; RB108 too large a number.
    """
    if isinstance(text, bytes):
        text = _decoded(text, path)
    # One kind of line break, so that marks and offsets mean the same.
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > MAX_BYTES:
        raise ConfigError(f"longer than {MAX_BYTES} characters; split it", where=f"{path}:1:1", code="RB001")
    odd = _ODD_BREAK.search(text)
    if odd:
        raise _not_allowed(odd[0], text, odd.start(), path)
    try:
        return _Builder(text, path).build()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else f"{path}:1:1"
        raise ConfigError(
            f"not YAML: {e.problem or e.context}{_hint(str(e.problem), text, mark)}",
            where=where,
            code="RB001",
        ) from e
    except yaml.reader.ReaderError as e:
        raise _not_allowed(e.character, text, e.position, path) from e
    except (ValueError, OverflowError) as e:  # an escape such as "\UFFFFFFFF" is no character
        raise ConfigError(f"not YAML: {e}", where=f"{path}:1:1", code="RB001") from e


def _not_allowed(character: str | int, text: str, at: int, path: str) -> ConfigError:
    code = character if isinstance(character, int) else ord(character)
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    what = f"character U+{code:04X} is not allowed; write plain text"
    return ConfigError(what, where=f"{path}:{line}:{column}", code="RB001")


def _hint(problem: str, text: str, mark: Any) -> str:
    if "mapping values are not allowed" in problem:
        return "; quote text that contains `: `"
    lines = text.split("\n")
    if mark is not None and mark.line < len(lines) and lines[mark.line][: mark.column + 1].endswith("\t"):
        return "; indent with blanks, not with tabs"
    if "cannot start any token" in problem:
        return "; quote text that begins with this character"
    return "; compare quotes, brackets and indentation with the lines above"


def _decoded(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        before = data[: e.start].decode("utf-8-sig", "replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError("not UTF-8; save it as UTF-8", where=f"{path}:{line}:{column}", code="RB001") from e


class _Builder:
    """Turns parser events into nodes; recursion is bounded by MAX_DEPTH before the parser goes deeper."""

    def __init__(self, text: str, path: str) -> None:
        self._text = text
        self._path = path
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)

    def build(self) -> Document:
        next(self._events)  # stream start
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            raise ConfigError(
                "empty; a runbook begins with `runbook: v1`", where=f"{self._path}:1:1", code="RB001"
            )
        root = self._node(next(self._events), 0)
        next(self._events)  # document end
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._error(event, "RB003", "a second document; one file holds one runbook")
        return Document(self._path, self._text, root)

    def _error(self, event: Any, code: str, what: str) -> ConfigError:
        mark = event.start_mark
        return ConfigError(what, where=f"{self._path}:{mark.line + 1}:{mark.column + 1}", code=code)

    def _node(self, event: Any, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._error(event, "RB003", "anchors and aliases are not allowed; write the value out")
        if event.tag is not None and event.tag != "!":
            raise self._error(event, "RB003", f"tag {event.tag} is not allowed; write plain values")
        if depth > MAX_DEPTH:
            raise self._error(event, "RB004", f"nested deeper than {MAX_DEPTH} levels; a runbook needs six")
        mark = event.start_mark
        if isinstance(event, yaml.ScalarEvent):
            end: Any = event.end_mark
            value = self._scalar(event) if not event.style else event.value
            return Node(value, mark.line + 1, mark.column + 1, event.value, mark.index, end.index)
        node = Node([], mark.line + 1, mark.column + 1, start=mark.index)
        if isinstance(event, yaml.SequenceStartEvent):
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                node.value.append(self._node(item, depth + 1))
        else:
            self._mapping(node, depth)
        return node

    def _mapping(self, node: Node, depth: int) -> None:
        items: dict[str, Node] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise self._error(key, "RB005", "a key is a word, not a list or mapping; write `name: value`")
            name_node = self._node(key, depth + 1)
            name = name_node.raw
            if not isinstance(name_node.value, str):
                raise self._error(key, "RB005", f"key {name!r} is no text; quote it")
            if name in items:
                first = node.keys[name][0]
                raise self._error(
                    key, "RB002", f"{name!r} stands here a second time; the first is on line {first}"
                )
            node.keys[name] = (name_node.line, name_node.column)
            items[name] = self._node(next(self._events), depth + 1)
        node.value = items

    def _scalar(self, event: Any) -> Any:
        """A plain scalar by the YAML 1.2 core schema; refused when YAML 1.1 readers see something else."""
        raw: str = event.value
        # Names of fields and short values come again and again; long ones would only fill the memory.
        kind, value, old = _kinds(raw) if len(raw) <= 40 else _kinds.__wrapped__(raw)
        if kind != old:
            raise self._error(
                event,
                "RB006",
                f"{raw[:40]!r} is {_WORDS[old]} to some YAML readers and {_WORDS[kind]} to others; {_way_out(raw, old)}",
            )
        if isinstance(value, int | float) and not abs(value) < _LARGEST:
            raise self._error(
                event, "RB108", f"{raw[:40]} is larger than {_LARGEST:g}; quote it if text is meant"
            )
        return value


_WORDS: Final = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "null": "nothing", "str": "text",
    "timestamp": "a date", "merge": "a merge key", "value": "a special key",
    "octal": "an octal number",
}  # fmt: skip


def _way_out(raw: str, old: str) -> str:
    if raw.lower() == "on":
        return "write `when:` for the condition, or quote it"
    if old == "bool":
        return "write true or false, or quote it"
    if old in ("int", "float") and ":" in raw:
        return "write a duration such as 90s, or quote it"
    return "quote it if text is meant"


@lru_cache(maxsize=4096)
def _kinds(raw: str) -> tuple[str, Any, str]:
    """Kind and value by the core schema, and the kind that YAML 1.1 would take it for."""
    kind, value = _core(raw)
    return kind, value, _kind_1_1(raw)


def _core(raw: str) -> tuple[str, Any]:
    if _NULL.fullmatch(raw):
        return "null", None
    if _BOOL.fullmatch(raw):
        return "bool", raw.lower() == "true"
    if _INT.fullmatch(raw) and len(raw) <= 40:
        return "int", int(raw)
    if _FLOAT.fullmatch(raw) and len(raw) <= 40:
        return "float", float(raw)
    return "str", raw


def _kind_1_1(raw: str) -> str:
    """What PyYAML (YAML 1.1) would make of a plain scalar; octal `010` counts as something else than 10."""
    first = raw[0] if raw else ""
    for tag, pattern in [*_RESOLVERS_1_1.get(first, []), *_RESOLVERS_1_1.get(None, [])]:
        if pattern.match(raw):
            kind: str = tag.rpartition(":")[2]
            if kind == "int" and re.fullmatch(r"[-+]?0[0-9]+", raw):
                return "octal"
            return kind
    return "str"
