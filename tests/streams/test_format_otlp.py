"""Spans of every instrumentation we know, in protobuf and JSON, become the same events; faults stay with their span."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from flyball.core.events import AgentStep, LlmCall
from flyball.core.ports import Decoded, Format
from flyball.streams.formats._options import FormatOptions
from flyball.streams.formats.otlp import Otlp
from flyball.streams.labels import LabelRules

FORMAT: Format = Otlp(FormatOptions(hash_key=b"test"))
START = 1_800_000_000_000_000_000
TRACE, SPAN, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7"
OTEL = "opentelemetry.instrumentation.openai_v2"


def span(attributes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "chat",
        "trace": TRACE,
        "span": SPAN,
        "parent": PARENT,
        "start": START,
        "end": START + 2_000_000_000,
        "attributes": attributes,
        "events": [],
        "status": 0,
        "message": "",
    }
    return {**base, **changes}


def exception(kind: str, message: str) -> dict[str, Any]:
    return {
        "name": "exception",
        "at": START,
        "attributes": {"exception.type": kind, "exception.message": message},
    }


def fill(value: Any, into: Any) -> None:
    if isinstance(value, bool):
        into.bool_value = value
    elif isinstance(value, int):
        into.int_value = value
    elif isinstance(value, float):
        into.double_value = value
    elif isinstance(value, str):
        into.string_value = value
    elif isinstance(value, bytes):
        into.bytes_value = value
    elif isinstance(value, list):
        for one in value:
            fill(one, into.array_value.values.add())
    elif isinstance(value, dict):
        for key, one in value.items():
            pair = into.kvlist_value.values.add()
            pair.key = key
            fill(one, pair.value)


def protobuf(*spans: dict[str, Any], scope: str = OTEL, resource: dict[str, Any] | None = None) -> bytes:
    request = ExportTraceServiceRequest()
    resource_spans = request.resource_spans.add()
    for key, value in (resource or {"service.name": "shop"}).items():
        attribute = resource_spans.resource.attributes.add()
        attribute.key = key
        fill(value, attribute.value)
    scope_spans = resource_spans.scope_spans.add()
    scope_spans.scope.name = scope
    for one in spans:
        made = scope_spans.spans.add()
        made.name = one["name"]
        made.trace_id, made.span_id = bytes.fromhex(one["trace"]), bytes.fromhex(one["span"])
        made.parent_span_id = bytes.fromhex(one["parent"])
        made.start_time_unix_nano, made.end_time_unix_nano = one["start"], one["end"]
        made.status.code, made.status.message = one["status"], one["message"]
        for key, value in one["attributes"].items():
            attribute = made.attributes.add()
            attribute.key = key
            fill(value, attribute.value)
        for event in one["events"]:
            added = made.events.add()
            added.name, added.time_unix_nano = event["name"], event["at"]
            for key, value in event["attributes"].items():
                attribute = added.attributes.add()
                attribute.key = key
                fill(value, attribute.value)
    return bytes(request.SerializeToString())


def any_json(value: Any, numbers: bool) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": value if numbers else str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [any_json(v, numbers) for v in value]}}
    return {"kvlistValue": {"values": [{"key": k, "value": any_json(v, numbers)} for k, v in value.items()]}}


def as_json(
    *spans: dict[str, Any],
    scope: str = OTEL,
    resource: dict[str, Any] | None = None,
    numbers: bool = True,
    ids: str = "hex",
) -> bytes:
    """`numbers`: int64 as JSON numbers (JavaScript) or strings (Python, Collector); `ids`: hex or base64."""

    def pairs(attributes: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"key": k, "value": any_json(v, numbers)} for k, v in attributes.items()]

    def own(text: str) -> str:
        return text if ids == "hex" else base64.b64encode(bytes.fromhex(text)).decode()

    def when(nanoseconds: int) -> int | str:
        return nanoseconds if numbers else str(nanoseconds)

    made = [
        {
            "name": one["name"],
            "traceId": own(one["trace"]),
            "spanId": own(one["span"]),
            "parentSpanId": own(one["parent"]),
            "startTimeUnixNano": when(one["start"]),
            "endTimeUnixNano": when(one["end"]),
            "attributes": pairs(one["attributes"]),
            "events": [
                {"name": e["name"], "timeUnixNano": when(e["at"]), "attributes": pairs(e["attributes"])}
                for e in one["events"]
            ],
            "status": {"code": one["status"], "message": one["message"]},
            "unknownField": 1,
        }
        for one in spans
    ]
    body = {
        "resourceSpans": [
            {
                "resource": {"attributes": pairs(resource or {"service.name": "shop"})},
                "scopeSpans": [{"scope": {"name": scope}, "spans": made}],
            }
        ]
    }
    return json.dumps(body).encode()


def decode(*spans: dict[str, Any], **where: Any) -> Decoded:
    """Through protobuf; and through JSON in all its dialects, which must say the same."""
    decoded = FORMAT.decode(protobuf(*spans, **where))
    for numbers in (True, False):
        for ids in ("hex", "base64"):
            other = FORMAT.decode(as_json(*spans, numbers=numbers, ids=ids, **where))
            assert (other.events, other.ignored) == (decoded.events, decoded.ignored)
            assert [r.reason for r in other.rejected] == [r.reason for r in decoded.rejected]
    return decoded


def call(attributes: dict[str, Any], *, scope: str = OTEL, **changes: Any) -> LlmCall:
    decoded = decode(span(attributes, **changes), scope=scope)
    assert decoded.rejected == []
    (event,) = decoded.events
    assert isinstance(event, LlmCall)
    return event


def step(attributes: dict[str, Any], *, scope: str = OTEL, **changes: Any) -> AgentStep:
    (event,) = decode(span(attributes, **changes), scope=scope).events
    assert isinstance(event, AgentStep)
    return event


NEW = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "gpt-4.1-mini",
    "gen_ai.response.model": "gpt-4.1-mini-2025-04-14",
    "gen_ai.response.id": "chatcmpl-1",
    "gen_ai.usage.input_tokens": 2048,
    "gen_ai.usage.output_tokens": 60,
    "gen_ai.usage.cache_read.input_tokens": 1024,
    "gen_ai.usage.cache_write.input_tokens": 100,
    "gen_ai.usage.reasoning.output_tokens": 40,
    "gen_ai.response.finish_reasons": ["stop"],
    "gen_ai.conversation.id": "conv-1",
    "gen_ai.agent.name": "order_agent",
    "gen_ai.prompt.name": "greet",
    "gen_ai.prompt.version": "7",
    "gen_ai.request.stream": True,
    "gen_ai.response.time_to_first_chunk": 0.25,
    "user.id": "customer-1",
    "gen_ai.input.messages": '[{"role":"user","content":"SECRET"}]',
}


def test_opentelemetrys_new_names_say_everything() -> None:
    assert call(NEW) == LlmCall(
        at=START / 1e9 + 2.0,
        id="chatcmpl-1",
        provider="openai",
        model="gpt-4.1-mini",
        model_served="gpt-4.1-mini-2025-04-14",
        app="shop",
        prompt="greet@7",
        tenant="customer-1",
        agent="order_agent",
        run="conv-1",
        operation="chat",
        input_tokens=2048,
        output_tokens=60,
        cache_read_tokens=1024,
        cache_write_tokens=100,
        reasoning_tokens=40,
        latency_s=2.0,
        ttft_s=0.25,
        finish="stop",
        stream=True,
        trace=TRACE,
        span=SPAN,
        parent=PARENT,
        scope=OTEL,
    )


def test_the_old_names_say_the_same() -> None:
    event = call(
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.system": "openai",
            "gen_ai.request.model": "gpt-4.1-mini",
            "gen_ai.usage.prompt_tokens": 90,
            "gen_ai.usage.completion_tokens": 12,
            "gen_ai.usage.cache_creation.input_tokens": 30,
        }
    )
    assert (event.provider, event.input_tokens, event.output_tokens, event.cache_write_tokens) == (
        "openai",
        90,
        12,
        30,
    )
    assert event.run == TRACE, "without a session the trace is the run"


def test_both_generations_on_one_span_are_never_added_up() -> None:
    event = call({**NEW, "gen_ai.usage.prompt_tokens": 9999, "gen_ai.usage.completion_tokens": 9999})
    assert (event.input_tokens, event.output_tokens) == (2048, 60)


def test_openinference_names_its_model_in_the_parameters_when_it_failed() -> None:
    event = call(
        {
            "openinference.span.kind": "LLM",
            "llm.system": "openai",
            "llm.invocation_parameters": '{"model": "gpt-4.1", "stream": true}',
            "input.value": "SECRET",
        },
        scope="openinference.instrumentation.openai",
        status=2,
        message="RateLimitError: Error code: 429 - You exceeded your current quota",
        events=[exception("openai.RateLimitError", "Error code: 429 - You exceeded your current quota")],
    )
    assert (event.model, event.provider, event.stream) == ("gpt-4.1", "openai", True)
    assert (event.error, event.error_code) == ("quota_exhausted", "RateLimitError")


def test_openinference_success_and_first_token_event() -> None:
    event = call(
        {
            "openinference.span.kind": "LLM",
            "llm.provider": "anthropic",
            "llm.model_name": "claude-sonnet-4-5-20250929",
            "llm.token_count.prompt": 5000,
            "llm.token_count.completion": 62,
            "llm.token_count.prompt_details.cache_read": 3000,
            "llm.token_count.prompt_details.cache_write": 1000,
            "llm.token_count.completion_details.reasoning": 0,
            "llm.finish_reason": "end_turn",
            "llm.cost.total": 0.01,
            "session.id": "thread-1",
        },
        scope="openinference.instrumentation.anthropic",
        events=[{"name": "First Token Stream Event", "at": START + 400_000_000, "attributes": {}}],
    )
    assert (event.model, event.model_served) == ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5-20250929")
    assert (event.input_tokens, event.output_tokens, event.cache_read_tokens, event.cache_write_tokens) == (
        5000, 62, 3000, 1000,
    )  # fmt: skip
    assert (event.finish, event.cost_usd, event.run) == ("stop", 0.01, "thread-1")
    assert event.ttft_s == pytest.approx(0.4)


def test_an_openinference_embedding_is_a_call() -> None:
    event = call(
        {
            "openinference.span.kind": "EMBEDDING",
            "llm.system": "openai",
            "embedding.model_name": "text-embedding-3-small",
            "llm.token_count.prompt": 12,
        }
    )
    assert (event.operation, event.model, event.input_tokens) == ("embeddings", "text-embedding-3-small", 12)


@pytest.mark.parametrize("kind", ["CHAIN", "RETRIEVER", "RERANKER", "GUARDRAIL", "EVALUATOR", "PROMPT"])
def test_other_openinference_kinds_are_left_out(kind: str) -> None:
    decoded = decode(span({"openinference.span.kind": kind, "llm.token_count.prompt": 5}))
    assert (decoded.events, dict(decoded.ignored)) == ([], {"not_inference": 1})


def test_openllmetry_is_read_by_its_own_names() -> None:
    event = call(
        {
            "llm.request.type": "chat",
            "gen_ai.system": "Anthropic",
            "gen_ai.request.model": "claude-sonnet-4-5",
            "gen_ai.usage.prompt_tokens": 500,
            "gen_ai.usage.completion_tokens": 60,
            "gen_ai.usage.cache_read_input_tokens": 3000,
            "gen_ai.usage.cache_creation_input_tokens": 1500,
            "llm.usage.reasoning_tokens": 5,
            "llm.usage.total_tokens": 560,
            "gen_ai.response.stop_reason": "tool_use",
            "traceloop.association.properties.session_id": "s-3",
            "traceloop.association.properties.user_id": "u-3",
            "traceloop.prompt.key": "greet",
            "traceloop.prompt.version": 2,
        },
        scope="opentelemetry.instrumentation.anthropic",
    )
    assert (event.provider, event.input_tokens, event.cache_read_tokens) == ("anthropic", 5000, 3000)
    assert (event.reasoning_tokens, event.finish, event.run, event.tenant) == (5, "tool_calls", "s-3", "u-3")
    assert event.prompt == "greet@2"


def test_a_framework_that_names_itself_is_not_the_provider() -> None:
    event = call({**NEW, "gen_ai.provider.name": "langchain", "gen_ai.system": "openai"})
    assert event.provider == "openai"
    assert call({**NEW, "gen_ai.provider.name": "langgraph"}).provider == ""


@pytest.mark.parametrize(
    ("operation", "events"),
    [
        ("ai.generateText.doGenerate", 1),
        ("ai.streamText.doStream", 1),
        ("ai.embedMany.doEmbed", 1),
        ("ai.generateText", 0),
        ("ai.embedMany", 0),
    ],
)
def test_of_the_ai_sdk_only_the_model_calls_count(operation: str, events: int) -> None:
    decoded = decode(
        span({"ai.operationId": operation, "ai.model.id": "m", "ai.usage.inputTokens": 5}), scope="ai"
    )
    assert len(decoded.events) == events
    assert decoded.ignored == ({} if events else {"roll_up": 1})


def test_the_ai_sdk_tells_provider_session_and_cache_in_its_own_words() -> None:
    event = call(
        {
            "ai.operationId": "ai.streamText.doStream",
            "ai.telemetry.metadata.sessionId": "conv-2",
            "ai.telemetry.metadata.userId": "user-2",
            "ai.telemetry.functionId": "answer",
            "ai.model.id": "gpt-5-mini",
            "gen_ai.system": "openai.responses",
            "gen_ai.request.model": "gpt-5-mini",
            "ai.usage.cachedInputTokens": 256,
            "ai.usage.reasoningTokens": 192,
            "ai.usage.inputTokenDetails.cacheWriteTokens": 7,
            "gen_ai.usage.input_tokens": 500,
            "gen_ai.usage.output_tokens": 300,
            "gen_ai.response.finish_reasons": ["tool-calls"],
            "ai.response.msToFirstChunk": 61.5,
        },
        scope="ai",
    )
    assert (event.provider, event.run, event.tenant, event.agent) == ("openai", "conv-2", "user-2", "answer")
    assert (event.cache_read_tokens, event.reasoning_tokens, event.cache_write_tokens) == (256, 192, 7)
    assert (event.finish, event.stream) == ("tool_calls", True)
    assert event.ttft_s == pytest.approx(0.0615)


def test_the_ai_sdk_7_agent_span_is_a_step_whose_usage_is_not_counted() -> None:
    event = step(
        {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "a", "gen_ai.usage.input_tokens": 900}
    )
    assert (event.kind, event.agent, event.tool) == ("agent", "a", "")


def test_pydantic_ai_says_failure_by_an_exception_event() -> None:
    event = call(
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",
            "gen_ai.system": "openai",
            "gen_ai.request.model": "gpt-4.1-mini",
            "gen_ai.agent.call.id": "run-1",
            "gen_ai.usage.details.reasoning_tokens": 0,
            "operation.cost": 0.0,
        },
        scope="pydantic-ai",
        status=2,
        message="ModelQuotaExceededError: status_code: 429",
        events=[
            exception(
                "pydantic_ai.exceptions.ModelQuotaExceededError", "status_code: 429, model_name: gpt-4.1-mini"
            )
        ],
    )
    assert (event.error, event.run, event.cost_usd, event.input_tokens) == (
        "quota_exhausted",
        "run-1",
        None,
        None,
    )


def test_a_failed_attempt_of_a_fallback_model_is_a_call() -> None:
    event = call(
        {
            "pydantic_ai.model_request.attempt": 0,
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "m",
        },
        scope="pydantic-ai",
        name="model request attempt m",
        status=2,
        events=[exception("pydantic_ai.exceptions.ModelOverloadedError", "status_code: 503")],
    )
    assert event.error == "overloaded"


def test_anthropics_own_spans_are_understood() -> None:
    event = call(
        {
            "gen_ai.provider.name": "anthropic",
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "claude-sonnet-4-5",
            "gen_ai.usage.output_tokens": 45,
            "gen_ai.usage.input_tokens": 1150,
            "gen_ai.usage.cache_read.input_tokens": 1024,
            "anthropic.message.stop_reason": "max_tokens",
            "http.response.status_code": 200,
            "http.request.resend_count": 1,
        },
        scope="com.anthropic.sdk.python",
        status=1,
    )
    assert (event.error, event.finish, event.retries) == ("", "length", 1)
    failed = call(
        {**NEW, "error.type": "overloaded_error", "http.response.status_code": 529},
        scope="com.anthropic.sdk.python",
        status=2,
    )
    assert (failed.error, failed.error_code) == ("overloaded", "529")


LITELLM_V1 = {
    "gen_ai.operation.name": "acompletion",
    "gen_ai.system": "openai",
    "gen_ai.request.model": "gpt-4o-mini",
    "gen_ai.response.model": "chat-main",
    "gen_ai.response.id": "chatcmpl-9",
    "gen_ai.usage.prompt_tokens": 20,
    "gen_ai.usage.completion_tokens": 8,
    "gen_ai.response.finish_reasons": '["stop"]',
    "gen_ai.cost.total_cost": 0.002,
    "metadata.user_api_key_team_alias": "payments",
    "llm.is_streaming": "False",
}


def test_litellms_first_exporter_counts_one_span_of_its_two() -> None:
    raw = {"llm.openai.messages": "SECRET", "gen_ai.request.model": "gpt-4o-mini", "gen_ai.system": "openai"}
    decoded = decode(
        span(LITELLM_V1), span(raw, name="raw_gen_ai_request", span="11f067aa0ba902b7"), scope="litellm"
    )
    (event,) = decoded.events
    assert isinstance(event, LlmCall)
    assert (event.operation, event.input_tokens, event.finish, event.cost_usd) == ("chat", 20, "stop", 0.002)
    assert (event.team, event.tenant, event.stream) == ("payments", "payments", False)
    assert decoded.ignored == {"raw_child": 1}


def test_litellms_second_exporter_reports_no_tokens_of_failures() -> None:
    event = call(
        {
            **NEW,
            "gen_ai.usage.input_tokens": 0,
            "gen_ai.usage.output_tokens": 0,
            "gen_ai.usage.prompt_tokens": 0,
            "error.type": "RateLimitError",
            "litellm.provider.error.code": "insufficient_quota",
        },
        scope="litellm",
        status=2,
    )
    assert (event.error, event.error_code) == ("quota_exhausted", "insufficient_quota")
    assert (event.input_tokens, event.output_tokens, event.cache_read_tokens) == (None, None, None)


@pytest.mark.parametrize("name", ["GET", "Received Proxy Server Request", "auth"])
def test_spans_of_other_things_are_left_out(name: str) -> None:
    decoded = decode(
        span({"http.request.method": "GET", "http.response.status_code": 500}, name=name, status=2)
    )
    assert (decoded.events, decoded.ignored) == ([], {"other_span": 1})


@pytest.mark.parametrize(
    "operation", ["create_agent", "invoke_workflow", "plan", "fetch_response", "search_memory"]
)
def test_operations_that_are_neither_call_nor_step_are_left_out(operation: str) -> None:
    decoded = decode(span({"gen_ai.operation.name": operation, "gen_ai.usage.input_tokens": 5}))
    assert (decoded.events, decoded.ignored) == ([], {"not_inference": 1})


def test_a_missing_input_is_not_zero_and_an_answer_of_no_tokens_is() -> None:
    event = call({**NEW, "gen_ai.usage.input_tokens": 0})
    assert (event.input_tokens, event.output_tokens) == (None, 60)
    assert call({**NEW, "gen_ai.usage.output_tokens": 0}).output_tokens == 0


def test_cached_tokens_left_out_of_the_input_are_added() -> None:
    event = call({**NEW, "gen_ai.usage.input_tokens": 100})
    assert (event.input_tokens, event.cache_read_tokens) == (100 + 1024 + 100, 1024)


def test_own_blocks_are_nobodys_failure() -> None:
    event = call(
        {**NEW, "error.type": "openai.RateLimitError"},
        status=2,
        message="Error code: 429 - session s stopped by directive d-1",
    )
    assert event.error == "gateway_local"


def test_a_traceback_in_the_status_does_not_decide_the_class() -> None:
    message = "OpenAIAPIError('Bad thing')Traceback (most recent call last):\n raise ReadTimeout: timed out"
    assert call({**NEW, "error.type": "APIError"}, status=2, message=message).error == "server_error"


def test_several_choices_tell_the_most_telling_finish() -> None:
    assert call({**NEW, "gen_ai.response.finish_reasons": ["stop", "length"]}).finish == "length"


def test_a_tool_call_becomes_a_step_with_hashes_and_no_content() -> None:
    attributes = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "lookup_order",
        "gen_ai.tool.call.id": "call_1",
        "gen_ai.tool.call.arguments": '{"order_id": "SECRET-17", "x": 1}',
        "gen_ai.tool.call.result": "SECRET in transit",
        "gen_ai.conversation.id": "conv-1",
    }
    event = step(attributes)
    reordered = step({**attributes, "gen_ai.tool.call.arguments": '{"x":1,"order_id":"SECRET-17"}'})
    other = step({**attributes, "gen_ai.tool.call.arguments": '{"order_id": "18", "x": 1}'})
    assert (event.kind, event.tool, event.run, event.result_bytes) == ("tool", "lookup_order", "conv-1", 17)
    assert event.args_hash == reordered.args_hash != other.args_hash
    assert len(event.result_hash) == 32
    assert "SECRET" not in repr(event)


def test_hashes_depend_on_the_key() -> None:
    body = protobuf(span({"gen_ai.operation.name": "execute_tool", "gen_ai.tool.call.arguments": "x"}))
    (one,) = FORMAT.decode(body).events
    (two,) = Otlp(FormatOptions(hash_key=b"other")).decode(body).events
    assert isinstance(one, AgentStep)
    assert isinstance(two, AgentStep)
    assert one.args_hash != two.args_hash


@pytest.mark.parametrize(
    "attributes",
    [
        {"openinference.span.kind": "TOOL", "tool.name": "t", "input.value": "a", "output.value": "b"},
        {
            "ai.operationId": "ai.toolCall",
            "ai.toolCall.name": "t",
            "ai.toolCall.args": "a",
            "ai.toolCall.result": "b",
        },
        {
            "traceloop.span.kind": "tool",
            "traceloop.entity.name": "t",
            "traceloop.entity.input": "a",
            "traceloop.entity.output": "b",
        },
        {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": "t",
            "tool_arguments": "a",
            "tool_response": "b",
        },
    ],
)
def test_tools_of_every_instrumentation_are_steps_with_the_same_hashes(attributes: dict[str, Any]) -> None:
    event = step(attributes)
    plain = step({"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "t", "gen_ai.tool.call.arguments": "a", "gen_ai.tool.call.result": "b"})  # fmt: skip
    assert (event.tool, event.args_hash, event.result_hash) == ("t", plain.args_hash, plain.result_hash)


def test_a_tool_that_failed_says_how_and_its_message_is_its_result() -> None:
    event = step(
        {"openinference.span.kind": "TOOL", "tool.name": "ship"},
        status=2,
        events=[exception("pydantic_ai.exceptions.ToolRetryError", "warehouse closed")],
    )
    assert (event.error, event.result_bytes) == ("ToolRetryError", 16)


def test_labels_of_the_span_win_over_those_of_the_resource() -> None:
    decoded = decode(
        span(NEW), span({**NEW, "service.name": "other", "team.name": "core"}), resource={"service.name": "shop", "cloud.region": "eu-1"}
    )  # fmt: skip
    first, second = decoded.events
    assert isinstance(first, LlmCall)
    assert isinstance(second, LlmCall)
    assert (first.app, first.region, second.app, second.region, second.team) == (
        "shop",
        "eu-1",
        "other",
        "eu-1",
        "core",
    )


def test_a_setting_changes_where_a_label_comes_from() -> None:
    rules = LabelRules.of(otlp={"app": ["deployment.name", "gen_ai.request.model"], "tenant": ["x.tenant"]})
    decoder = Otlp(FormatOptions(labels=rules))
    (event,) = decoder.decode(protobuf(span({**NEW, "x.tenant": "t-1"}))).events
    assert isinstance(event, LlmCall)
    assert (event.app, event.tenant, event.model) == ("gpt-4.1-mini", "t-1", "gpt-4.1-mini")


def two_scopes(inner_parent: str) -> bytes:
    """A call of one instrumentation, an HTTP-like span in it, and a call of the SDK in that."""
    outer = protobuf(span(NEW, span="aaaaaaaaaaaaaaaa", parent=""), scope="outer")
    middle = protobuf(
        span({"a": 1}, name="POST", span="bbbbbbbbbbbbbbbb", parent="aaaaaaaaaaaaaaaa"), scope="http"
    )
    inner = protobuf(span(NEW, span="cccccccccccccccc", parent=inner_parent), scope="inner")
    return inner + middle + outer  # protobuf messages joined are one message


def test_a_call_learns_its_calling_ancestor_through_spans_between() -> None:
    decoded = FORMAT.decode(two_scopes("bbbbbbbbbbbbbbbb"))
    parents = {e.scope: e.parent for e in decoded.events if isinstance(e, LlmCall)}
    assert parents == {"inner": "aaaaaaaaaaaaaaaa", "outer": ""}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (span({**NEW, "gen_ai.usage.input_tokens": -5}), "negative"),
        (span({**NEW, "gen_ai.usage.output_tokens": 10**15}), "too_large"),
        (span(NEW, start=0, end=0), "timestamp"),
        (span(NEW, end=4_102_444_800 * 10**9), "timestamp"),
        (span({"gen_ai.operation.name": "execute_tool"}, start=0, end=5), "timestamp"),
    ],
)
def test_a_bad_span_is_told_and_the_others_of_its_body_count(bad: dict[str, Any], reason: str) -> None:
    decoded = decode(span(NEW), bad, span({**NEW, "gen_ai.response.id": "chatcmpl-2"}))
    assert len(decoded.events) == 2
    assert [(r.reason, r.index) for r in decoded.rejected] == [(reason, 1)]
    assert b"SECRET" not in decoded.rejected[0].data
    assert TRACE.encode() in decoded.rejected[0].data


def test_a_span_of_wrong_types_in_json_does_not_spoil_its_body() -> None:
    body = json.loads(as_json(span(NEW), span(NEW)))
    body["resourceSpans"][0]["scopeSpans"][0]["spans"].insert(1, {"traceId": 5, "attributes": "none"})
    decoded = FORMAT.decode(json.dumps(body).encode())
    assert (len(decoded.events), [r.reason for r in decoded.rejected]) == (2, ["type"])


def test_a_string_that_is_not_utf8_spoils_itself_only() -> None:
    body = protobuf(span(NEW), span({**NEW, "gen_ai.response.id": "chatcmpl-bad!"}))
    decoded = FORMAT.decode(body.replace(b"chatcmpl-bad!", b"chatcmpl-\xff\xfe\xfd!"))
    assert len(decoded.events) == 2
    assert decoded.rejected == []


def test_a_damaged_attribute_costs_its_span_only() -> None:
    body = protobuf(span(NEW), span({"gen_ai.operation.name": "chat", "zz.broken": "abcdefgh"}))
    damaged = body.replace(b"\x0a\x09zz.broken\x12\x0a\x0a\x08", b"\x0a\x09zz.broken\x12\x0a\x0a\x7f")
    assert damaged != body
    decoded = FORMAT.decode(damaged)
    assert len(decoded.events) == 2, "an attribute that is not needed may be damaged"
    body = protobuf(span(NEW), span({**NEW, "gen_ai.response.id": "abcdefgh"}))
    damaged = body.replace(b"\x12\x0a\x0a\x08abcdefgh", b"\x12\x0a\x0a\x7fabcdefgh")
    assert len(FORMAT.decode(damaged).events) == 1


@pytest.mark.parametrize("cut", [1, 20, 100, 300])
def test_a_truncated_body_is_refused_whole(cut: int) -> None:
    decoded = FORMAT.decode(protobuf(span(NEW), span(NEW))[:-cut])
    assert decoded.events == []
    assert [r.reason for r in decoded.rejected] == ["protobuf"]


@pytest.mark.parametrize(
    "body", [b"nonsense", b"{", b"{}", b'{"resourceSpans": 5}', b"[1]", b"{" * 50_000, b"\x00\x01\x02"]
)
def test_what_is_no_trace_request_is_refused_without_an_exception(body: bytes) -> None:
    decoded = FORMAT.decode(body)
    assert decoded.events == []
    assert len(decoded.rejected) == 1


def test_an_empty_body_is_an_empty_request() -> None:
    assert FORMAT.decode(b"").rejected == []


def test_several_requests_one_a_line_are_taken() -> None:
    body = as_json(span(NEW)) + b"\n" + as_json(span(NEW)) + b"\n{broken\n" + as_json(span(NEW))
    decoded = FORMAT.decode(body)
    assert (len(decoded.events), [r.reason for r in decoded.rejected]) == (3, ["json"])


def test_deep_values_are_cut_off_quietly() -> None:
    deep: Any = "x"
    for _ in range(45):
        deep = [deep]
    attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.call.arguments": deep}
    assert len(FORMAT.decode(protobuf(span(attributes))).events) == 1


def test_template_syntax_and_shell_stay_plain_text_and_long_labels_are_cut() -> None:
    nasty = "{{ 7*7 }}; rm -rf / $(reboot)"
    event = call({**NEW, "gen_ai.agent.name": nasty, "user.id": "u" * 5000, "gen_ai.response.id": "r" * 5000})
    assert (event.agent, len(event.tenant)) == (nasty, 512)
    assert len(event.id) < 512


@pytest.mark.parametrize("encode", [protobuf, as_json])
def test_no_content_passes(encode: Any) -> None:
    content = dict.fromkeys(("gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.system_instructions", "gen_ai.prompt.0.content", "gen_ai.tool.definitions", "input.value", "output.value", "llm.input_messages.0.message.content", "ai.prompt", "ai.response.text", "ai.response.toolCalls", "traceloop.entity.input", "pydantic_ai.all_messages", "final_result", "gen_ai.tool.call.arguments", "gen_ai.tool.call.result", "llm.invocation_parameters"), "SECRET text")  # fmt: skip
    spans = [
        span(
            {**NEW, **content},
            status=2,
            message="SECRET failure",
            events=[exception("x.Error", "SECRET message")],
        ),
        span({"openinference.span.kind": "LLM", **content}),
        span(
            {"gen_ai.operation.name": "execute_tool", **content},
            status=2,
            events=[exception("E", "SECRET result")],
        ),
        span({**NEW, **content, "gen_ai.usage.input_tokens": -1}),
    ]
    decoded = FORMAT.decode(encode(*spans))
    assert len(decoded.events) == 3
    assert "SECRET" not in repr(decoded)


BODY = protobuf(
    span(NEW),
    span({"openinference.span.kind": "TOOL", "input.value": "{}"}),
    span(LITELLM_V1, status=2, events=[exception("E", "m")]),
)


@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise(body: bytes) -> None:
    FORMAT.decode(body)


@given(st.integers(0, len(BODY) - 1), st.binary(min_size=0, max_size=3))
@settings(max_examples=400)
def test_no_mutation_of_protobuf_makes_it_raise(at: int, put: bytes) -> None:
    FORMAT.decode(BODY[:at] + put + BODY[at + len(put) :])


TEXT = as_json(span(NEW), span(LITELLM_V1)).decode()


@given(st.integers(0, len(TEXT) - 1), st.text(max_size=3))
@settings(max_examples=300)
def test_no_mutation_of_json_makes_it_raise(at: int, put: str) -> None:
    FORMAT.decode((TEXT[:at] + put + TEXT[at + len(put) :]).encode("utf-8", "replace"))


ATTRIBUTES = st.dictionaries(
    st.sampled_from(sorted({*NEW, *LITELLM_V1, "error.type", "input.value", "llm.invocation_parameters", "ai.operationId"})),
    st.text(max_size=10) | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.booleans() | st.lists(st.text(max_size=5), max_size=3) | st.binary(max_size=5),
    max_size=12,
)  # fmt: skip


@given(ATTRIBUTES)
@settings(max_examples=300)
def test_values_of_any_type_become_an_event_or_a_reason(attributes: dict[str, Any]) -> None:
    decoded = FORMAT.decode(protobuf(span(attributes)))
    assert len(decoded.events) + len(decoded.rejected) + sum(decoded.ignored.values()) == 1


def test_spans_read_by_layout_say_what_they_say_alone() -> None:
    """Many spans of one body take the quick way after the first; each alone takes the patient one. Both must agree."""
    shapes: list[dict[str, Any]] = [
        NEW,
        LITELLM_V1,
        {**NEW, "error.type": "RateLimitError"},
        {"openinference.span.kind": "TOOL", "input.value": "x"},
    ]
    spans = []
    for i in range(200):
        attributes = {
            **shapes[i % 4],
            "server.address": "api",
            "server.port": 443,
            "note": f"n{i}",
            "gen_ai.usage.output_tokens": i * 97,
        }
        if i % 7 == 0:
            attributes.pop("server.port")
            attributes["error.type"] = "overloaded_error"  # as many attributes, one of them another
        spans.append(span(attributes, span=f"{i + 1:016x}"))
    decoder = Otlp()
    together = [decoder.decode(protobuf(*spans)).events for _ in range(3)][-1]
    alone = [event for one in spans for event in Otlp().decode(protobuf(one)).events]
    assert together == alone
