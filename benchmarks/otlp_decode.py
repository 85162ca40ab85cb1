"""OTLP protobuf → events, against "parse and attributes to a dict" of the same body in the same run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from flyball.streams.formats.otlp import Otlp

SPANS = 510
"""Spans a body: exporters send 512 at most."""
BODIES = 20
ROUNDS = 15
BAR_SPANS_PER_S = 200_000
BAR_RATIO = 1.5


def otel_genai(i: int) -> dict[str, Any]:
    """13 attributes, as OpenTelemetry's OpenAI instrumentation sends them."""
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4.1-mini",
        "server.address": "api.openai.com",
        "server.port": 443,
        "gen_ai.request.max_tokens": 500,
        "gen_ai.response.model": "gpt-4.1-mini-2025-04-14",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.id": f"chatcmpl-{i:024x}",
        "gen_ai.conversation.id": f"conv-{i % 500}",
        "gen_ai.usage.input_tokens": 1000 + i % 1000,
        "gen_ai.usage.output_tokens": 50 + i % 200,
        "gen_ai.usage.cache_read.input_tokens": 512,
    }


def anthropic_sdk(i: int) -> dict[str, Any]:
    """20 attributes, as Anthropic's SDK traces itself."""
    return {
        "server.address": "api.anthropic.com",
        "server.port": 443,
        "gen_ai.provider.name": "anthropic",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "claude-sonnet-4-5",
        "gen_ai.request.max_tokens": 64_000,
        "http.request.method": "POST",
        "http.route": "/v1/messages",
        "url.scheme": "https",
        "url.path": "/v1/messages",
        "url.full": "https://api.anthropic.com/v1/messages",
        "gen_ai.usage.input_tokens": 5000 + i % 1000,
        "http.response.status_code": 200,
        "anthropic.request.id": f"req_{i:020x}",
        "gen_ai.response.id": f"msg_{i:024x}",
        "gen_ai.response.model": "claude-sonnet-4-5-20250929",
        "gen_ai.usage.cache_write.input_tokens": 1000,
        "gen_ai.usage.cache_read.input_tokens": 3000,
        "gen_ai.usage.output_tokens": 62 + i % 100,
        "anthropic.message.stop_reason": "end_turn",
    }


def ai_sdk(i: int) -> dict[str, Any]:
    """32 attributes, as Vercel's AI SDK 6 sends them, content included."""
    tokens, answer = 200 + i % 500, 20 + i % 100
    return {
        "operation.name": "ai.generateText.doGenerate answer",
        "resource.name": "answer",
        "ai.operationId": "ai.generateText.doGenerate",
        "ai.telemetry.functionId": "answer",
        "ai.model.provider": "openai.chat",
        "ai.model.id": "gpt-4.1-mini",
        "ai.settings.maxRetries": 2,
        "ai.telemetry.metadata.sessionId": f"conv-{i % 500}",
        "ai.telemetry.metadata.userId": f"user-{i % 300}",
        "ai.request.headers.user-agent": "ai/6.0.326",
        "ai.prompt.messages": '[{"role":"user","content":[{"type":"text","text":"'
        + "where is it? " * 20
        + '"}]}]',
        "gen_ai.system": "openai.chat",
        "gen_ai.request.model": "gpt-4.1-mini",
        "ai.response.finishReason": "stop",
        "ai.response.text": "On its way. " * 10,
        "ai.response.id": f"chatcmpl-{i:024x}",
        "ai.response.model": "gpt-4.1-mini-2025-04-14",
        "ai.response.timestamp": f"2026-11-21T04:41:31.{i % 1000:03}Z",
        "ai.response.providerMetadata": '{"openai":{"acceptedPredictionTokens":0,"rejectedPredictionTokens":0}}',
        "ai.usage.inputTokens": tokens,
        "ai.usage.inputTokenDetails.noCacheTokens": tokens,
        "ai.usage.inputTokenDetails.cacheReadTokens": 0,
        "ai.usage.outputTokens": answer,
        "ai.usage.outputTokenDetails.textTokens": answer,
        "ai.usage.totalTokens": tokens + answer,
        "ai.usage.reasoningTokens": 0,
        "ai.usage.cachedInputTokens": 0,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.id": f"chatcmpl-{i:024x}",
        "gen_ai.response.model": "gpt-4.1-mini-2025-04-14",
        "gen_ai.usage.input_tokens": tokens,
        "gen_ai.usage.output_tokens": answer,
    }


SCOPES = {
    "opentelemetry.instrumentation.openai_v2": otel_genai,
    "com.anthropic.sdk.python": anthropic_sdk,
    "ai": ai_sdk,
}


def body(spans: int = SPANS, start: int = 0) -> bytes:
    """One export with equal parts of three instrumentations' model-call spans."""
    request = ExportTraceServiceRequest()
    resource_spans = request.resource_spans.add()
    service = resource_spans.resource.attributes.add()
    service.key, service.value.string_value = "service.name", "shop-assistant"
    for number, (scope, attributes) in enumerate(SCOPES.items()):
        scope_spans = resource_spans.scope_spans.add()
        scope_spans.scope.name = scope
        for i in range(start + number, start + spans, len(SCOPES)):
            span = scope_spans.spans.add()
            span.name = "a model call"
            span.kind = 3
            span.trace_id = i.to_bytes(16, "big")
            span.span_id = (i + 1).to_bytes(8, "big")
            span.start_time_unix_nano = 1_795_000_000_000_000_000 + i * 1_000_000
            span.end_time_unix_nano = span.start_time_unix_nano + 800_000_000
            for key, value in attributes(i).items():
                attribute = span.attributes.add()
                attribute.key = key
                if isinstance(value, str):
                    attribute.value.string_value = value
                elif isinstance(value, int):
                    attribute.value.int_value = value
                else:
                    for one in value:
                        attribute.value.array_value.values.add().string_value = one
    return bytes(request.SerializeToString())


def plain(value: Any) -> Any:
    """An attribute's value as plain data; lists are lists."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(v) for v in value.array_value.values]
    if kind == "kvlist_value":
        return {kv.key: plain(kv.value) for kv in value.kvlist_value.values}
    return getattr(value, kind) if kind else None


def to_dicts(data: bytes) -> int:
    """What a straightforward receiver does first: parse, and every span's attributes as a dict."""
    request = ExportTraceServiceRequest.FromString(data)
    count = 0
    for resource_spans in request.resource_spans:
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                count += len({attribute.key: plain(attribute.value) for attribute in span.attributes})
    return count


def best(*whats: Callable[[], object]) -> list[float]:
    """Least CPU seconds of each over several rounds, taken in turns: whatever else the machine does hits all alike."""
    least = [float("inf")] * len(whats)
    for _ in range(ROUNDS):
        for i, what in enumerate(whats):
            started = time.process_time()
            what()
            least[i] = min(least[i], time.process_time() - started)
    return least


def run() -> list[dict[str, Any]]:
    bodies = [body(start=i * SPANS) for i in range(BODIES)]
    decoder = Otlp()
    assert all(len(decoder.decode(data).events) == SPANS for data in bodies)
    total = SPANS * BODIES
    ours_s, theirs_s = best(
        lambda: [len(decoder.decode(data).events) for data in bodies],
        lambda: [to_dicts(data) for data in bodies],
    )
    ours, theirs = total / ours_s, total / theirs_s
    return [
        {
            "name": "otlp_protobuf_to_events",
            "value": round(ours),
            "unit": "spans/s",
            "baseline": round(theirs),
            "ratio": round(ours / theirs, 2),
            "bar": f">= {BAR_SPANS_PER_S} spans/s or >= {BAR_RATIO} x parse and attributes to dict",
            "holds": ours >= BAR_SPANS_PER_S or ours / theirs >= BAR_RATIO,
        }
    ]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
