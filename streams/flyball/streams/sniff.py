"""Tells the format of a body from the body: senders' content types cannot be trusted (LiteLLM posts NDJSON as JSON)."""

from __future__ import annotations

import re
from typing import Final

_LOOK: Final = 65_536
_TYPE: Final = re.compile(rb'"type"\s*:\s*"(?:llm_call|agent_step|gpu_sample|change|evaluation)"')
_LITELLM: Final = (
    b'"litellm_call_id"',
    b'"call_type"',
    b'"custom_llm_provider"',
    b'"model_group"',
    b'"hidden_params"',
)
_OTLP: Final = (b'"resourceSpans"', b'"resource_spans"')
_BINARY: Final = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_METRIC: Final = re.compile(rb"^(?:# (?:HELP|TYPE) |[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{[^\n]*\})?[ \t]+[-+0-9.NI])")


def sniff(body: bytes, content_type: str = "", name: str = "") -> str:
    """`native`, `litellm`, `otlp` or `prometheus`; a body that shows nothing (an empty one) goes by content type and name.

    Args:
        body: plain bytes; unpack gzip or zstd before.
        content_type: as sent; only a hint.
        name: file name; only a hint.

    >>> sniff(b'{"type":"llm_call","at":1800000000}')
    'native'
    >>> sniff(b'[{"litellm_call_id":"x"}]')
    'litellm'
    """
    head = body[:_LOOK]
    if _BINARY.search(head, 0, 256):
        return (
            "otlp"  # the only binary one; its first byte is also a line feed, and may be followed by a brace
        )
    start = head.lstrip()
    if start[:1] in (b"{", b"["):
        if any(word in head for word in _OTLP):
            return "otlp"
        if _TYPE.search(start[:4096]):
            return "native"
        if any(word in head for word in _LITELLM):
            return "litellm"
        return "native" if _TYPE.search(head) else _hinted(content_type, name)
    return "prometheus" if _METRIC.match(start) else _hinted(content_type, name)


def _hinted(content_type: str, name: str) -> str:
    hint = f"{content_type} {name}".lower()
    for word, kind in (
        ("protobuf", "otlp"),
        (".pb", "otlp"),
        ("otlp", "otlp"),
        ("traces", "otlp"),
        ("litellm", "litellm"),
        ("text/plain", "prometheus"),
        (".prom", "prometheus"),
    ):
        if word in hint:
            return kind
    return "native"
