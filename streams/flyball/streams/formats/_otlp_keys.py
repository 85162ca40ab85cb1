"""Which span attributes say what: the vocabulary of every instrumentation that we read, in order of preference.

OpenTelemetry GenAI (new, then old names), OpenInference, OpenLLMetry, Vercel AI SDK, pydantic-ai, Anthropic's own,
LiteLLM. Names are kept here as strings: the published constants are deprecated and renamed with every release.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from flyball.streams.labels import LABELS

FIELDS: Final[dict[str, tuple[str, ...]]] = {
    # what kind of span
    "operation": ("gen_ai.operation.name",),
    "oi_kind": ("openinference.span.kind",),
    "ai_operation": ("ai.operationId",),
    "tl_kind": ("traceloop.span.kind",),
    "request_type": ("llm.request.type",),
    "attempt": ("pydantic_ai.model_request.attempt",),
    # who and what
    "provider": ("gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system", "ai.model.provider"),
    "model": ("gen_ai.request.model", "llm.request.model_name", "ai.model.id", "embedding.model_name"),
    "served": ("gen_ai.response.model", "llm.response.model_name", "ai.response.model", "llm.model_name"),
    "parameters": ("llm.invocation_parameters", "embedding.invocation_parameters"),
    "id": ("gen_ai.response.id", "llm.response.id", "ai.response.id"),
    # how much
    "input": (
        "gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt", "llm.usage.prompt_tokens",
        "ai.usage.inputTokens", "ai.usage.promptTokens", "ai.usage.tokens",
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
        "gen_ai.usage.reasoning.output_tokens", "gen_ai.usage.reasoning_tokens", "llm.usage.reasoning_tokens",
        "llm.token_count.completion_details.reasoning", "ai.usage.reasoningTokens",
        "ai.usage.outputTokenDetails.reasoningTokens", "gen_ai.usage.details.reasoning_tokens",
    ),
    "cost": ("gen_ai.cost.total_cost", "llm.cost.total", "operation.cost", "gen_ai.usage.cost"),
    # how it went
    "finish": (
        "gen_ai.response.finish_reasons", "gen_ai.response.finish_reason", "gen_ai.response.stop_reason",
        "llm.finish_reason", "llm.response.finish_reason", "anthropic.message.stop_reason", "ai.response.finishReason",
    ),
    "error": ("error.type", "exception.type"),
    "status": ("http.response.status_code", "http.status_code"),
    "code": ("litellm.provider.error.code", "litellm.error.code"),
    "ttft_s": (
        "gen_ai.response.time_to_first_chunk", "gen_ai.client.operation.time_to_first_chunk",
        "gen_ai.server.time_to_first_token",
    ),
    "ttft_ms": ("ai.response.msToFirstChunk", "ai.stream.msToFirstChunk"),
    "stream": ("gen_ai.request.stream", "llm.is_streaming", "gen_ai.is_streaming"),
    "retries": ("http.request.resend_count",),
    # tools
    "tool": ("gen_ai.tool.name", "tool.name", "ai.toolCall.name", "traceloop.entity.name"),
    "arguments": (
        "gen_ai.tool.call.arguments", "ai.toolCall.args", "ai.toolCall.input", "tool_arguments", "input.value",
        "traceloop.entity.input", "tool.parameters",
    ),
    "result": (
        "gen_ai.tool.call.result", "ai.toolCall.result", "ai.toolCall.output", "tool_response", "output.value",
        "traceloop.entity.output",
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


CONSTANT: Final[frozenset[str]] = frozenset(
    {"operation", "oi_kind", "ai_operation", "tl_kind", "request_type", "provider", "model", "served", "finish", "stream"}
)
"""Fields with few different values: what their attribute reads as is remembered instead of read again."""

CONTENT: Final[frozenset[str]] = frozenset({"arguments", "result"})
"""Fields that are read only of tool calls, and hashed at once."""


class KeyMap:
    """Attribute name → where its value goes, for one set of label rules.

    `codes[key]` below `first_label` is a field's slot in the list that a span's values are gathered in, below `size` a
    label's; from `size` on it is a stand-in, and `stand_ins[code - size]` tells (slot, rank, label slot or -1).
    `masks[slot - first_label]` has a bit for every label that the slot has a say in.
    """

    def __init__(self, rules: Mapping[str, tuple[str, ...]]) -> None:
        self.first_label = len(FIELDS)
        self.codes: dict[str, int] = {}
        self.stand_ins: list[tuple[int, int, int]] = []
        self.label_slots: dict[str, int] = {}
        for key in _label_keys(rules):
            self.label_slots.setdefault(key, self.first_label + len(self.label_slots))
        self.size = self.first_label + len(self.label_slots)
        for name, keys in FIELDS.items():
            for rank, key in enumerate(keys):
                if rank == 0 and key not in self.label_slots:
                    self.codes[key] = INDEX[name]
                else:
                    self.codes[key] = self.size + len(self.stand_ins)
                    self.stand_ins.append((INDEX[name], rank, self.label_slots.get(key, -1)))
        for key, slot in self.label_slots.items():
            self.codes.setdefault(key, slot)
        self.labels = [[self._source(s) for s in rules.get(name, ())] for name in LABELS]
        self.masks = self._masks()
        self.wire_codes = {key.encode(): code for key, code in self.codes.items()}
        self.constant = self._codes_of(CONSTANT)
        self.content = self._codes_of(CONTENT)

    def _codes_of(self, names: frozenset[str]) -> frozenset[int]:
        return frozenset(self.codes[key] for name in names for key in FIELDS[name])

    def _source(self, text: str) -> tuple[int, int, int]:
        """(slot of the value or -1, slot of its version or -1, position of the other label or -1)."""
        if text.startswith("="):
            return -1, -1, LABELS.index(text[1:])
        name, _, version = text.partition("@")
        return self.label_slots[name], self.label_slots[version] if version else -1, -1

    def _masks(self) -> list[int]:
        masks = [0] * len(self.label_slots)
        for position, sources in enumerate(self.labels):
            for slot, version, _ in sources:
                for used in (slot, version):
                    if used >= 0:
                        masks[used - self.first_label] |= 1 << position
        for position, sources in enumerate(self.labels):  # labels that follow another label change with it
            for _, _, other in sources:
                if other >= 0:
                    masks = [m | 1 << position if m >> other & 1 else m for m in masks]
        return masks


def _label_keys(rules: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    for name in LABELS:
        for source in rules.get(name, ()):
            if not source.startswith(("=", "tag:")):
                yield from (key for key in source.split("@") if key)
