"""Label rules, keyed hashes, and telling formats apart."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flyball.streams.formats as formats
from flyball.core.errors import ConfigError
from flyball.core.plugins import Registry
from flyball.streams.content import KeyedHash
from flyball.streams.formats._names import finish_name, identity, model_name, provider_name
from flyball.streams.labels import LabelRules
from flyball.streams.sniff import sniff


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"ap": ["x"]}, "did you mean 'app'"),
        ({"app": [""]}, "no source"),
        ({"app": ["a..b"]}, "no source"),
        ({"team": ["=tenant"]}, "resolved before"),
        ({"app": ["=nothing"]}, "resolved before"),
    ],
)
def test_a_broken_label_rule_is_refused_with_what_is_wrong(rules: dict[str, list[str]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LabelRules.of(litellm=rules)


def test_overriding_one_label_leaves_the_others() -> None:
    rules = LabelRules.of(otlp={"tenant": ["tenant.id"]})
    assert rules.otlp["tenant"] == ("tenant.id",)
    assert rules.otlp["app"] == LabelRules().otlp["app"]
    assert rules.litellm == LabelRules().litellm


def test_json_hashes_alike_whatever_its_spacing_and_order() -> None:
    h = KeyedHash(b"key")
    assert h.of('{"a": 1, "b": [1, 2]}') == h.of({"b": [1, 2], "a": 1}) == h.of(' {"b":[1,2],"a":1} ')
    assert h.of('{"a": 1}') != h.of('{"a": 2}')
    assert h.of("text") == h.of(" text ") != h.of("Text")


def test_fields_that_always_differ_are_ignored_by_default_and_by_setting() -> None:
    h = KeyedHash(b"key", {"search": ("page_token",), "*": ("at",)})
    assert h.of({"q": "x", "tool_call_id": "1"}) == h.of({"q": "x", "tool_call_id": "2"})
    assert h.of({"q": {"at": 1}}) == h.of({"q": {"at": 2}})
    assert h.of({"q": "x", "page_token": 1}, "search") == h.of({"q": "x", "page_token": 2}, "search")
    assert h.of({"q": "x", "page_token": 1}, "other") != h.of({"q": "x", "page_token": 2}, "other")


def test_a_result_inside_langchains_message_is_the_result() -> None:
    h = KeyedHash(b"key")
    message = '{"type": "tool", "data": {"content": "%s", "id": "%s"}}'
    assert h.of(message % ("in transit", "m1")) == h.of(message % ("in transit", "m2"))
    assert h.of(message % ("in transit", "m1")) != h.of(message % ("delivered", "m1"))


def test_hashes_of_different_keys_differ_and_long_keys_work() -> None:
    assert KeyedHash(b"a").of("x") != KeyedHash(b"b").of("x")
    assert len(KeyedHash(b"k" * 200).of("x")) == 32


@given(
    st.text()
    | st.binary()
    | st.recursive(st.none() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5)
)
def test_anything_can_be_hashed_and_hashes_the_same_again(content: object) -> None:
    h = KeyedHash(b"key")
    assert h.of(content) == h.of(content)


def test_deep_json_is_hashed_without_an_exception() -> None:
    KeyedHash(b"key").of("[" * 10_000 + "]" * 10_000)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("openai.chat", "openai"),
        ("openai.responses", "openai"),
        ("anthropic.messages", "anthropic"),
        ("aws.bedrock", "bedrock"),
        ("AWS_Bedrock", "bedrock"),
        ("azure.ai.openai", "azure"),
        ("gcp.vertex_ai", "vertex_ai"),
        ("google.vertex.chat", "vertex_ai"),
        ("google.generative-ai", "gemini"),
        ("x_ai", "xai"),
        ("langchain", ""),
        ("somebody new", "somebody new"),
    ],
)
def test_a_provider_has_one_name(raw: str, name: str) -> None:
    assert provider_name(raw) == name


def test_models_lose_the_provider_before_them_and_nothing_else() -> None:
    assert model_name("openai/gpt-4.1") == "gpt-4.1"
    assert model_name("bedrock/anthropic.claude-v2") == "anthropic.claude-v2"
    assert model_name("gpt-4.1") == "gpt-4.1"


@pytest.mark.parametrize("word", ["tool_call", "tool_calls", "tool-calls", "tool_use", "TOOL_CALLS"])
def test_finish_words_have_one_spelling(word: str) -> None:
    assert finish_name(word) == "tool_calls"


def test_long_ids_stay_different_where_they_differ_at_the_end() -> None:
    assert identity("x" * 600 + "a") != identity("x" * 600 + "b")
    assert len(identity("x" * 600)) <= 512


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"type":"llm_call","at":1800000000}\n', "native"),
        (b'[{"at":1800000000,"type":"agent_step"}]', "native"),
        (b'{"type": "change", "at": 1800000000, "kind": "deploy"}', "native"),
        (b'[{"id":"x","litellm_call_id":"y"}]', "litellm"),
        (b'{"id":"x","call_type":"acompletion","metadata":{}}', "litellm"),
        (b'{"resourceSpans":[]}', "otlp"),
        (b"\x0a\x05\x12\x03abc", "otlp"),
        (b"\x0a{\x0a\x16\x0a\x0cservice.name", "otlp"),
        (b"# HELP x y\n# TYPE x gauge\nx 1\n", "prometheus"),
        (b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 5\n', "prometheus"),
    ],
)
def test_the_body_tells_its_format_whatever_the_content_type(body: bytes, kind: str) -> None:
    for content_type in ("", "application/json", "application/octet-stream"):
        assert sniff(body, content_type) == kind


def test_an_empty_body_goes_by_content_type_and_name() -> None:
    assert sniff(b"", "application/x-protobuf") == "otlp"
    assert sniff(b"", "", "0001.litellm.json") == "litellm"
    assert sniff(b"", "", "x.ndjson") == "native"


@given(st.binary(max_size=100), st.text(max_size=10))
def test_sniffing_never_raises_and_always_answers(body: bytes, name: str) -> None:
    assert sniff(body, "", name) in ("native", "litellm", "otlp", "prometheus")


def test_packed_bodies_are_for_others_to_unpack() -> None:
    assert sniff(gzip.compress(b'{"type":"llm_call"}')) == "otlp"


def test_every_format_is_found_by_its_kind() -> None:
    registry = Registry("formats", formats)
    assert registry.kinds() == ["litellm", "native", "otlp", "prometheus"]
    for kind in registry.kinds():
        assert registry.get(kind)().decode(b"").events == []
