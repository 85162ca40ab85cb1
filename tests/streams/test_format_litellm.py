"""LiteLLM's records in its three formats: what counts, what is left out, what is never kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.events import LlmCall
from flyball.core.ports import Decoded, Format
from flyball.streams.formats._options import FormatOptions
from flyball.streams.formats.litellm import LiteLlm
from flyball.streams.labels import LabelRules

FORMAT: Format = LiteLlm()
AT = 1_800_000_000.0


def record(**changes: Any) -> dict[str, Any]:
    """A success through the proxy, as version 1.106 posts it, with only what it holds that matters here."""
    base: dict[str, Any] = {
        "id": "chatcmpl-1",
        "litellm_call_id": "call-1",
        "trace_id": "session-1",
        "session_id": "",
        "call_type": "acompletion",
        "cache_hit": False,
        "stream": None,
        "status": "success",
        "custom_llm_provider": "openai",
        "startTime": AT - 2.0,
        "endTime": AT,
        "completionStartTime": AT,
        "model": "openai/gpt-4.1-mini",
        "model_group": "chat-main",
        "model_id": "dep-main",
        "prompt_tokens": 2048,
        "completion_tokens": 60,
        "response_cost": 0.0006,
        "request_tags": ["User-Agent: OpenAI"],
        "end_user": None,
        "messages": [{"role": "user", "content": "SECRET prompt"}],
        "response": {
            "id": "chatcmpl-1",
            "model": "gpt-4.1-mini-2025-04-14",
            "choices": [{"finish_reason": "stop", "message": {"content": "SECRET answer"}}],
        },
        "error_str": None,
        "error_information": {"error_code": "", "error_class": "", "error_message": ""},
        "hidden_params": {"additional_headers": {"x-litellm-attempted-retries": 1}},
        "metadata": {
            "user_api_key_alias": "shop-key",
            "user_api_key_team_id": "team-7",
            "user_api_key_team_alias": None,
            "requester_metadata": {},
            "prompt_management_metadata": None,
            "usage_object": {
                "prompt_tokens_details": {"cached_tokens": 1024},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        },
    }
    return {**base, **changes}


def failure(code: str, klass: str, message: str, normalized: str = "", **changes: Any) -> dict[str, Any]:
    return record(
        status="failure",
        response={},
        prompt_tokens=0,
        completion_tokens=0,
        response_cost=0.0,
        error_str=message,
        error_information={
            "error_code": code,
            "error_class": klass,
            "error_message": message,
            "normalized_error": normalized,
            **changes,
        },
    )


def decode(*records: dict[str, Any]) -> Decoded:
    return FORMAT.decode(json.dumps(list(records)).encode())


def call(one: dict[str, Any]) -> LlmCall:
    decoded = decode(one)
    assert decoded.rejected == []
    (event,) = decoded.events
    assert isinstance(event, LlmCall)
    return event


def test_a_success_carries_what_the_record_says() -> None:
    event = call(record())
    assert event == LlmCall(
        at=AT,
        id="chatcmpl-1",
        provider="openai",
        model="gpt-4.1-mini",
        model_served="gpt-4.1-mini-2025-04-14",
        deployment="chat-main/dep-main",
        app="shop-key",
        key="shop-key",
        team="team-7",
        tenant="team-7",
        run="session-1",
        operation="chat",
        input_tokens=2048,
        output_tokens=60,
        cache_read_tokens=1024,
        reasoning_tokens=0,
        cost_usd=0.0006,
        latency_s=2.0,
        finish="stop",
        retries=1,
        scope="litellm",
    )


def test_array_lines_and_a_single_object_say_the_same_whatever_the_content_type() -> None:
    one, two = record(), record(id="chatcmpl-2", response={"id": "chatcmpl-2"})
    array = FORMAT.decode(json.dumps([one, two]).encode(), "application/json")
    lines = FORMAT.decode(json.dumps(one).encode() + b"\n" + json.dumps(two).encode(), "application/json")
    assert array.events == lines.events
    assert FORMAT.decode(json.dumps(one).encode()).events == array.events[:1]
    assert FORMAT.decode(json.dumps(one, indent=1).encode()).events == array.events[:1]


def test_content_is_never_kept() -> None:
    bad = record(prompt_tokens=-1)
    decoded = decode(record(), bad)
    assert "SECRET" not in repr(decoded.events)
    assert "SECRET" not in repr(decoded.rejected)


@pytest.mark.parametrize(
    ("one", "klass"),
    [
        (
            failure(
                "429", "RateLimitError", "OpenAIException - Rate limit reached", "429_RATE_LIMIT_EXCEEDED"
            ),
            "rate_limited",
        ),
        (
            failure("429", "RateLimitError", "You exceeded your current quota", "429_RATE_LIMIT_EXCEEDED"),
            "quota_exhausted",
        ),
        (failure("500", "InternalServerError", "overloaded_error", "503_PROVIDER_OVERLOADED"), "overloaded"),
        (
            failure("429", "HTTPException", "429: {'error': {'type': 'agent_session_blocked'}}"),
            "gateway_local",
        ),
        (failure("", "ProxyException", "No connected db.", "400_INVALID_REQUEST"), "gateway_local"),
        (
            failure("429", "RateLimitError", "x", error_rate_limit_category="litellm_rate_limit"),
            "gateway_local",
        ),
    ],
)
def test_a_failure_gets_its_class_and_no_tokens(one: dict[str, Any], klass: str) -> None:
    event = call(one)
    assert event.error == klass
    assert (event.input_tokens, event.output_tokens, event.cost_usd) == (None, None, None)


def test_a_fallback_is_two_attempts_with_ids_of_their_own() -> None:
    failed = failure("503", "ServiceUnavailableError", "overloaded")
    again = {**failed, "endTime": AT + 1.0}
    succeeded = record(endTime=AT + 2.0, startTime=AT + 1.5)
    decoded = decode(failed, again, succeeded)
    ids = [e.id for e in decoded.events if isinstance(e, LlmCall)]
    assert len(set(ids)) == 3
    assert ids[2] == "chatcmpl-1"
    assert decode(failed).events[0] == decoded.events[0], "posted again, it is the same attempt"


def test_a_stream_tells_its_time_to_first_token() -> None:
    event = call(record(stream=True, completionStartTime=AT - 1.5))
    assert (event.stream, event.ttft_s) == (True, 0.5)
    assert call(record(completionStartTime=AT - 1.5)).ttft_s is None


def test_a_stream_without_usage_is_not_a_call_of_zero_tokens() -> None:
    event = call(record(stream=True, prompt_tokens=0, completion_tokens=0))
    assert (event.error, event.input_tokens, event.output_tokens) == ("", None, None)


def test_an_answer_of_no_tokens_is_zero() -> None:
    assert call(record(completion_tokens=0)).output_tokens == 0


def test_cached_tokens_left_out_of_the_input_are_added() -> None:
    usage = {"cache_read_input_tokens": 3000, "cache_creation_input_tokens": 500}
    event = call(record(prompt_tokens=1000, metadata={"usage_object": usage}))
    assert (event.input_tokens, event.cache_read_tokens, event.cache_write_tokens) == (4500, 3000, 500)


def test_health_probes_are_left_out_and_counted() -> None:
    probe = record(call_type="", model_group="", custom_llm_provider=None)
    decoded = decode(probe, record())
    assert (len(decoded.events), dict(decoded.ignored)) == (1, {"health_probe": 1})


def test_labels_take_the_first_source_that_is_present() -> None:
    metadata = {
        "user_api_key_alias": "key",
        "requester_metadata": {"app": "checkout", "session_id": "s-9"},
        "prompt_management_metadata": {"prompt_id": "greet", "prompt_version": 3},
        "user_api_key_team_alias": "payments",
    }
    event = call(record(metadata=metadata, end_user="customer-1", request_tags=["app:other", "prompt:old"]))
    assert (event.app, event.tenant, event.team, event.prompt, event.run) == (
        "checkout", "customer-1", "payments", "greet@3", "s-9",
    )  # fmt: skip
    tagged = call(record(metadata={}, request_tags=["app:other", "prompt:old"]))
    assert (tagged.app, tagged.prompt, tagged.tenant, tagged.run) == ("other", "old", "", "session-1")


def test_a_setting_changes_where_a_label_comes_from() -> None:
    rules = LabelRules.of(litellm={"app": ["metadata.requester_metadata.service", "tag:service"]})
    decoder = LiteLlm(FormatOptions(labels=rules))
    one = record(metadata={"requester_metadata": {"service": "billing"}, "user_api_key_alias": "k"})
    (event,) = decoder.decode(json.dumps(one).encode()).events
    assert isinstance(event, LlmCall)
    assert event.app == "billing"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"endTime": None}, "missing_field"),
        ({"endTime": 5.0}, "timestamp"),
        ({"endTime": 4_102_444_800.0}, "timestamp"),
        ({"prompt_tokens": -4}, "negative"),
        ({"response_cost": -0.1}, "negative"),
        ({"completion_tokens": 10**15}, "too_large"),
    ],
)
def test_a_record_that_would_be_wrong_is_rejected_and_the_others_count(
    changes: dict[str, Any], reason: str
) -> None:
    decoded = decode(record(), record(**changes), record())
    assert len(decoded.events) == 2
    assert [(r.reason, r.index) for r in decoded.rejected] == [(reason, 1)]
    assert decoded.rejected[0].data


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": None},
        {"metadata": "none"},
        {"response": "redacted"},
        {"response": ["x"]},
        {"response": {"choices": "none"}},
        {"hidden_params": []},
        {"error_information": None},
        {"request_tags": None},
        {"request_tags": [1, None]},
        {"prompt_tokens": None},
        {"prompt_tokens": "many"},
        {"stream": "yes"},
        {"model_id": 5},
        {"endTime": "2027-01-15T08:00:00+00:00"},
        {"custom_llm_provider": None},
        {"id": "x" * 5000, "response": {"id": "y" * 5000}},
    ],
)
def test_fields_of_another_type_are_missing_and_the_event_stands(changes: dict[str, Any]) -> None:
    event = call(record(**changes))
    assert len(event.id) <= 512


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"[", b'[{"a"]', b"[" * 50_000, b"\xff", b"5", b'["x"]', b"null"]
)
def test_what_is_no_record_is_refused_without_an_exception(body: bytes) -> None:
    assert FORMAT.decode(body).events == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(record())), VALUES, max_size=6))
@settings(max_examples=300)
def test_no_value_in_any_field_makes_it_raise(changes: dict[str, Any]) -> None:
    body = json.dumps([record(), record(**changes)]).encode()
    decoded = FORMAT.decode(body)
    assert len(decoded.events) + len(decoded.rejected) + sum(decoded.ignored.values()) >= 1


@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise(body: bytes) -> None:
    FORMAT.decode(body)
