"""Content never passes the edge: what loop detection needs of it is whether two pieces are equal.

A keyed hash tells that and nothing else: without the key nobody can test guesses ("was the argument `order 17`?").
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

VOLATILE: Final[frozenset[str]] = frozenset(
    {"tool_call_id", "toolCallId", "call_id", "run_id", "request_id", "requestId", "trace_id", "traceId"}
)
"""Fields that differ between equal calls, ignored at any depth for every tool."""

_DEEPEST: Final = 40
_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder().decode


class KeyedHash:
    """Hex hashes of tool arguments and results; JSON counts as equal whatever its spacing and order of keys.

    Misleads where a tool puts something fresh into every result (a time, a request id) under a name that is
    neither in `VOLATILE` nor in `ignore`: then no two results are ever equal, and a loop looks like progress.

    Args:
        key: secret of this installation; hashes of different keys cannot be compared. Any length.
        ignore: tool name → names of JSON fields to leave out at any depth; `"*"` means every tool.

    >>> h = KeyedHash(b"k")
    >>> h.of('{"a": 1, "b": 2}') == h.of({"b": 2, "a": 1})
    True
    """

    def __init__(self, key: bytes, ignore: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self._key = key if len(key) <= 64 else hashlib.blake2b(key).digest()
        ignore = ignore or {}
        self._everywhere = VOLATILE | frozenset(ignore.get("*", ()))
        self._ignore = {tool: self._everywhere | frozenset(names) for tool, names in ignore.items()}

    def of(self, content: object, tool: str = "") -> str:
        """32 hex digits. `content` is text (JSON or not), bytes, or what JSON decodes to."""
        if isinstance(content, str):
            content = _parsed(content)
        if isinstance(content, bytes):
            data = content
        elif isinstance(content, str):
            data = content.strip().encode("utf-8", "surrogatepass")
        else:
            data = _canonical(content, self._ignore.get(tool, self._everywhere))
        return hashlib.blake2b(data, digest_size=16, key=self._key).hexdigest()


def _parsed(text: str) -> object:
    """What the text says as JSON when it is an object or a list; else the text itself."""
    if text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        return _unwrapped(_decode(text))
    except (msgspec.DecodeError, RecursionError):
        return text


def _unwrapped(value: Any) -> object:
    """LangChain writes a tool's result inside a message with ids and metadata; the content alone is the result."""
    if isinstance(value, dict) and value.get("type") == "tool" and isinstance(value.get("data"), dict):
        return value["data"].get("content", value)
    return value


def _canonical(value: object, ignore: frozenset[str]) -> bytes:
    try:
        return _encode(_without(value, ignore, 0))
    except (TypeError, ValueError, RecursionError):
        return repr(value).encode("utf-8", "surrogatepass")


def _without(value: object, names: frozenset[str], depth: int) -> object:
    if depth > _DEEPEST:
        return "deeper"  # a bound, not a meaning: nothing real nests this deep
    if isinstance(value, dict):
        return {str(k): _without(v, names, depth + 1) for k, v in value.items() if k not in names}
    if isinstance(value, (list, tuple)):
        return [_without(v, names, depth + 1) for v in value]
    return value
