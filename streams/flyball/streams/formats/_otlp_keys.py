"""Which span attributes say what: the vocabulary of every instrumentation that we read, in order of preference.

OpenTelemetry GenAI (new, then old names), OpenInference, OpenLLMetry, Vercel AI SDK, pydantic-ai, Anthropic's own,
LiteLLM. Names are kept here as strings: the published constants are deprecated and renamed with every release.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from flyball.streams.labels import LABELS

FIELDS: Final[dict[str, tuple[str, ...]]] = {
    # What kind of span; who and what. Few different values, remembered instead of read again.
    "operation": ("gen_ai.operation.name",),
    "oi_kind": ("openinference.span.kind",),
    "ai_operation": ("ai.operationId",),
    "tl_kind": ("traceloop.span.kind",),
    "request_type": ("llm.request.type",),
    "provider": (
        "gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system", "ai.model.provider",
    ),
    "model": ("gen_ai.request.model", "llm.request.model_name", "ai.model.id", "embedding.model_name"),
    "served": ("gen_ai.response.model", "llm.response.model_name", "ai.response.model", "llm.model_name"),
    "finish": (
        "gen_ai.response.finish_reasons", "gen_ai.response.finish_reason", "gen_ai.response.stop_reason",
        "llm.finish_reason", "llm.response.finish_reason", "anthropic.message.stop_reason",
        "ai.response.finishReason",
    ),
    "stream": ("gen_ai.request.stream", "llm.is_streaming", "gen_ai.is_streaming"),
    # More of that, with many values.
    "attempt": ("pydantic_ai.model_request.attempt",),
    "parameters": ("llm.invocation_parameters", "embedding.invocation_parameters"),
    "id": ("gen_ai.response.id", "llm.response.id", "ai.response.id"),
    # How much.
    "input": (
        "gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt",
        "llm.usage.prompt_tokens", "ai.usage.inputTokens", "ai.usage.promptTokens", "ai.usage.tokens",
    ),
    "output": (
        "gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion",
        "llm.usage.completion_tokens", "ai.usage.outputTokens", "ai.usage.completionTokens",
    ),
    "cache_read": (
        "gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens",
        "llm.token_count.prompt_details.cache_read", "llm.token_count.prompt_details.cache_input",
        "ai.usage.cachedInputTokens", "ai.usage.inputTokenDetails.cacheReadTokens",
        "gen_ai.usage.details.cache_read_tokens", "gen_ai.usage.details.cache_read_input_tokens",
        "gen_ai.usage.details.cached_tokens",
    ),
    "cache_write": (
        "gen_ai.usage.cache_write.input_tokens", "gen_ai.usage.cache_creation.input_tokens",
        "gen_ai.usage.cache_creation_input_tokens", "llm.token_count.prompt_details.cache_write",
        "ai.usage.inputTokenDetails.cacheWriteTokens", "gen_ai.usage.details.cache_write_tokens",
        "gen_ai.usage.details.cache_creation_input_tokens",
    ),
    "reasoning": (
        "gen_ai.usage.reasoning.output_tokens", "gen_ai.usage.reasoning_tokens",
        "llm.usage.reasoning_tokens", "llm.token_count.completion_details.reasoning",
        "ai.usage.reasoningTokens", "ai.usage.outputTokenDetails.reasoningTokens",
        "gen_ai.usage.details.reasoning_tokens",
    ),
    "cost": ("gen_ai.cost.total_cost", "llm.cost.total", "operation.cost", "gen_ai.usage.cost"),
    # How it went.
    "error": ("error.type", "exception.type"),
    "status": ("http.response.status_code", "http.status_code"),
    "code": ("litellm.provider.error.code", "litellm.error.code"),
    "ttft_s": (
        "gen_ai.response.time_to_first_chunk", "gen_ai.client.operation.time_to_first_chunk",
        "gen_ai.server.time_to_first_token",
    ),
    "ttft_ms": ("ai.response.msToFirstChunk", "ai.stream.msToFirstChunk"),
    "retries": ("http.request.resend_count",),
    # Tools.
    "tool": ("gen_ai.tool.name", "tool.name", "ai.toolCall.name", "traceloop.entity.name"),
    # Content: read of tool calls only, and hashed at once.
    "arguments": (
        "gen_ai.tool.call.arguments", "ai.toolCall.args", "ai.toolCall.input", "tool_arguments",
        "input.value", "traceloop.entity.input", "tool.parameters",
    ),
    "result": (
        "gen_ai.tool.call.result", "ai.toolCall.result", "ai.toolCall.output", "tool_response",
        "output.value", "traceloop.entity.output",
    ),
}  # fmt: skip
"""Field → attribute names; the first is the modern one and has a slot of its own, the others stand in for it."""

INDEX: Final[dict[str, int]] = {name: i for i, name in enumerate(FIELDS)}

INFERENCE: Final[dict[str, str]] = {
    "chat": "chat", "generate_content": "generate_content", "text_completion": "text_completion",
    "embeddings": "embeddings", "embedding": "embeddings", "completion": "chat", "messages": "chat", "responses": "chat",
    "rerank": "rerank", "acompletion": "chat", "atext_completion": "text_completion", "aembedding": "embeddings",
    "aresponses": "chat", "anthropic_messages": "chat", "agenerate_content": "generate_content",
    "anthropic_messages_stream": "chat", "generate_text": "chat", "stream_text": "chat", "embed": "embeddings",
    "streaming_chat": "chat", "response": "chat",
}  # fmt: skip
"""`gen_ai.operation.name` (and OpenLLMetry's `llm.request.type`) of model calls → our operation."""

STEPS: Final[dict[str, str]] = {"execute_tool": "tool", "invoke_agent": "agent"}
"""Operations that are steps of an agent → our kind of step. Others (plans, memory, workflows) are left out."""


_CONSTANT_FIELDS: Final = INDEX["stream"] + 1
"""Fields below this slot have few different values."""

_CONTENT_FIELDS: Final = INDEX["arguments"]
"""Fields from this slot on are content."""

Source = tuple[int, int, str]
"""Slot of the value (the last one, always empty, for another label), slot of its version or -1, other label or nothing."""


class KeyMap:
    """Attribute name → slot of the list that a span's values are gathered in, for one set of label rules.

    Slots: one for each field (its modern name), one for each label source, one for every older or foreign name of a
    field (a stand-in), and a last one that is never read. `bits[slot]` says what a value there has a say in: label i
    by bit i, the fields that have stand-ins by the bits after those.
    """

    def __init__(self, rules: Mapping[str, tuple[str, ...]]) -> None:
        self.codes: dict[str, int] = {}
        label_keys = list(dict.fromkeys(_label_keys(rules)))
        for name, keys in FIELDS.items():
            if keys[0] not in label_keys:
                self.codes[keys[0]] = INDEX[name]
        slot = len(FIELDS)
        for key in [*label_keys, *(key for keys in FIELDS.values() for key in keys)]:
            if key not in self.codes:
                self.codes[key] = slot
                slot += 1
        self.unread = slot
        self.size = slot + 1
        self.stand_ins = [
            [self.codes[k] for k in keys if self.codes[k] != INDEX[n]] for n, keys in FIELDS.items()
        ]
        self._stood_for = [(f, slots) for f, slots in enumerate(self.stand_ins) if slots]
        self.labels = [(name, [self._source(s) for s in rules.get(name, ())]) for name in LABELS]
        self.bits = self._bits()
        self.wire_codes = {key.encode(): code for key, code in self.codes.items()}
        self.constant = self._flags(range(_CONSTANT_FIELDS))
        for key in label_keys:
            self.constant[self.codes[key]] = True
        self.content = self._flags(range(_CONTENT_FIELDS, len(FIELDS)))
        self.lazy = [
            c or (not self.constant[i] and b >> len(LABELS) > 0 and b & (1 << len(LABELS)) - 1 == 0)
            for i, (c, b) in enumerate(zip(self.content, self.bits, strict=True))
        ]
        """Slots whose values are left unread: content, and stand-ins, which are mostly not needed."""
        self._labels_of: dict[int, list[tuple[str, list[Source]]]] = {}
        self._fields_of: dict[int, list[tuple[int, list[int]]]] = {}

    def _flags(self, fields: range) -> list[bool]:
        flags = [False] * self.size
        for field in fields:
            for slot in (field, *self.stand_ins[field]):
                flags[slot] = True
        return flags

    def _source(self, text: str) -> Source:
        if text.startswith("="):
            return self.unread, -1, text[1:]
        name, _, version = text.partition("@")
        return self.codes[name], self.codes[version] if version else -1, ""

    def _bits(self) -> list[int]:
        bits = [0] * self.size
        for position, (_, sources) in enumerate(self.labels):
            for slot, version, _ in sources:
                for used in (slot, version):
                    if used >= 0 and used != self.unread:
                        bits[used] |= 1 << position
        for position, (_, sources) in enumerate(
            self.labels
        ):  # labels that follow another label change with it
            for _, _, other in sources:
                if other:
                    bits = [b | 1 << position if b >> LABELS.index(other) & 1 else b for b in bits]
        # 29 bits in all: one digit of a Python int, which is what keeps the sum of them cheap.
        for position, (_, slots) in enumerate(self._stood_for):
            for slot in slots:
                bits[slot] |= 1 << len(LABELS) + position
        return bits

    def labels_of(self, touched: int) -> list[tuple[str, list[Source]]]:
        """Name and sources of the labels whose bits are set; -1 sets all."""
        found = self._labels_of.get(touched)
        if found is None:
            found = [entry for i, entry in enumerate(self.labels) if touched >> i & 1]
            self._labels_of[touched] = found
        return found

    def fields_of(self, touched: int) -> list[tuple[int, list[int]]]:
        """Fields for which stand-ins have come, with the slots of those in order of preference."""
        found = self._fields_of.get(touched)
        if found is None:
            shift = len(LABELS)
            found = [entry for i, entry in enumerate(self._stood_for) if touched >> shift + i & 1]
            if len(self._fields_of) < 10_000:
                self._fields_of[touched] = found
        return found


def _label_keys(rules: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    for name in LABELS:
        for source in rules.get(name, ()):
            if not source.startswith(("=", "tag:")):
                yield from (key for key in source.split("@") if key)
