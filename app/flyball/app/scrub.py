"""Dead letters keep bytes, but not prompts: content fields are removed where the body parses."""

from __future__ import annotations

import json
from typing import Any, Final

CONTENT_FIELDS: Final = frozenset(
    {
        "messages", "message", "content", "prompt", "prompts", "input", "inputs", "output", "outputs", "response", "completion",
        "choices", "arguments", "result", "text", "system", "tools", "system_instructions", "body", "parameters", "standard_logging_object",
    }
)  # fmt: skip
"""Names (last part after a dot) whose values are content in one of the formats."""
_SCALAR_LABELS: Final = frozenset({"prompt"})
"""Names that are content in some formats and a short label in ours; kept when short."""


def scrub(body: bytes) -> bytes:
    """`body` with the values of content fields replaced by their type and size; unchanged when it is not JSON.

    >>> scrub(b'{"at": "x", "messages": [{"content": "secret"}]}')
    b'{"at": "x", "messages": "<list removed, 24 bytes>"}'
    """
    try:
        return json.dumps(_without_content(json.loads(body)), ensure_ascii=False).encode("utf-8", "replace")
    except (ValueError, RecursionError):
        return body


def _without_content(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_content(v) for v in value]
    if not isinstance(value, dict):
        return value
    clean = {}
    for name, inner in value.items():
        leaf = str(name).rpartition(".")[2]
        short = leaf in _SCALAR_LABELS and isinstance(inner, str) and len(inner) <= 128 and "\n" not in inner
        if leaf in CONTENT_FIELDS and not short and inner not in (None, "", [], {}):
            clean[name] = f"<{type(inner).__name__} removed, {len(json.dumps(inner))} bytes>"
        elif {"key", "value"} == set(value) and name == "value" and _is_content_attribute(value["key"]):
            clean[name] = f"<attribute removed, {len(json.dumps(inner))} bytes>"
        else:
            clean[name] = _without_content(inner)
    return clean


def _is_content_attribute(key: Any) -> bool:
    """An OTLP/JSON attribute `{"key": …, "value": …}` that carries content."""
    return isinstance(key, str) and not CONTENT_FIELDS.isdisjoint(key.replace("-", "_").split("."))
