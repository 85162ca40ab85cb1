"""What the LiteLLM guard makes of a request: its labels, where a group's calls can go, and what is changed or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from flyball.core.directives import Directive
from flyball.core.events import LlmCall
from flyball.remediation.points import PointClient
from flyball.remediation.points import _litellm_calls as calls
from flyball.remediation.points._litellm_calls import Groups, labels_of, record_of
from flyball.remediation.points._litellm_guard import Obeyer
from flyball.streams.formats import _names as names
from flyball.streams.formats.litellm import LiteLlm
from flyball.streams.labels import LABELS, LITELLM

NOW = 1_700_000_000.0

# --- labels --------------------------------------------------------------------------------------------------------


def test_the_rules_for_labels_are_those_of_the_format() -> None:
    assert calls.RULES == LITELLM
    assert calls.LABELS == LABELS


LITELLM_PROVIDERS = [
    "openai", "anthropic", "bedrock", "bedrock_converse", "azure", "azure_text", "azure_ai", "vertex_ai", "vertex_ai_beta",
    "gemini", "mistral", "cohere", "cohere_chat", "together_ai", "fireworks_ai", "text-completion-openai", "xai", "moonshot",
    "hosted_vllm", "openrouter", "groq", "deepseek", "watsonx", "huggingface", "OpenAI", "perplexity", "databricks", "ollama",
]  # fmt: skip


@pytest.mark.parametrize("raw", [*LITELLM_PROVIDERS, *calls.PROVIDERS])
def test_a_provider_has_the_name_that_events_give_it(raw: str) -> None:
    assert calls.provider_name(raw) == names.provider_name(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "gpt-4.1",
        "openai/gpt-4.1",
        "anthropic.claude-v2",
        "anthropic/claude",
        "a/b/c",
        "/x",
        "x/",
        "us.amazon/m",
    ],
)
def test_a_model_has_the_name_that_events_give_it(raw: str) -> None:
    assert calls.model_name(raw) == names.model_name(raw)


REQUEST: dict[str, Any] = {
    "model": "fine", "litellm_call_id": "c-1", "litellm_session_id": "s-7", "prompt_id": "greeting",
    "metadata": {
        "requester_metadata": {"app": "checkout-bot", "agent": "planner", "region": "eu"},
        "tags": ["team-x", "prompt:greeting@3"], "user_api_key": "0" * 64, "user_api_key_alias": "checkout-key",
        "user_api_key_team_alias": "payments", "user_api_key_team_id": "t-1", "user_api_key_end_user_id": "tenant-3",
    },
}  # fmt: skip


def test_a_request_has_the_labels_that_its_event_will_have() -> None:
    """The record below is what the proxy reports of the request above, as far as labels go."""
    record = {
        "id": "x", "status": "success", "endTime": NOW, "startTime": NOW - 1, "call_type": "acompletion", "model": "gpt",
        "end_user": "tenant-3", "trace_id": "s-7", "request_tags": ["team-x", "prompt:greeting@3"],
        "metadata": {
            "user_api_key_alias": "checkout-key", "user_api_key_hash": "0" * 64, "user_api_key_team_alias": "payments",
            "user_api_key_team_id": "t-1", "prompt_management_metadata": {"prompt_id": "greeting"},
            "requester_metadata": {"app": "checkout-bot", "agent": "planner", "region": "eu"},
        },
    }  # fmt: skip
    event = LiteLlm().decode(json.dumps(record).encode()).events[0]
    assert isinstance(event, LlmCall)
    found = labels_of(record_of(REQUEST))
    assert found == {name: getattr(event, name) for name in LABELS}
    assert found["run"] == "s-7"


def test_where_the_proxy_keeps_its_notes_apart_they_are_read_there() -> None:
    request = {
        "model": "fine", "metadata": {"user_id": "of the provider"},
        "litellm_metadata": {**REQUEST["metadata"], "user_api_key_alias": None, "session_id": "s-9"},
    }  # fmt: skip
    found = labels_of(record_of(request))
    assert (found["tenant"], found["run"], found["key"]) == ("tenant-3", "s-9", "0" * 64)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"metadata": None, "model": 7},
        {"metadata": "text", "litellm_metadata": []},
        {"metadata": {"requester_metadata": "x", "tags": "app:shop", "user_api_key": 5}},
        {"metadata": {"tags": [None, 5, "app", "app:"], "user_api_key_end_user_id": True}},
    ],
    ids=str,
)
def test_a_request_of_an_odd_shape_has_no_labels(request_: dict[str, Any]) -> None:
    assert labels_of(record_of(request_)) == {}


# --- groups --------------------------------------------------------------------------------------------------------


def provider_of(params: Mapping[str, Any]) -> tuple[str, str]:
    provider, _, model = str(params.get("model", "")).partition("/")
    return model, provider


def entry(group: str, model: str, id: str = "") -> dict[str, Any]:
    return {"model_name": group, "litellm_params": {"model": model}, "model_info": {"id": id}}


MODELS = [
    entry("fine", "openai/gpt", "d1"),
    entry("fine-azure", "azure/gpt", "d2"),
    entry("claude", "anthropic/claude", "d3"),
    entry("claude-aws", "bedrock_converse/claude-v1", "d4"),
    entry("mixed", "openai/gpt-m", "d5"),
    entry("mixed", "azure/gpt-m", "d6"),
    entry("cheap", "openai/gpt-small", "d7"),
    entry("cheap-azure", "azure/gpt-small", "d8"),
    entry("anthropic/*", "anthropic/*", "d9"),
]


def groups(**more: Any) -> Groups:
    return Groups(MODELS, provider_of, **more)


def test_a_group_has_the_labels_that_its_deployments_agree_on() -> None:
    assert groups().labels("fine") == {"provider": "openai", "model": "gpt", "deployment": "fine/d1"}
    assert groups().labels("mixed") == {"model": "gpt-m"}
    assert (
        groups(aliases={"gpt-latest": "fine", "hidden": {"model": "fine"}}).labels("hidden")["model"] == "gpt"
    )
    assert groups().labels("anthropic/claude-9")["model"] == "claude-9"
    assert groups().labels("nobody") == {}


def test_calls_go_where_every_deployment_fits() -> None:
    to_azure = {"provider": "azure"}
    assert groups().target("fine", to_azure) == "fine-azure", "it serves the same model"
    assert groups().target("claude", {"provider": "bedrock"}) == "", (
        "under another name: nobody said that it is the same"
    )
    assert (
        groups(fallbacks=[{"claude": ["fine", "claude-aws"]}]).target("claude", {"provider": "bedrock"})
        == "claude-aws"
    )
    assert groups(fallbacks=[{"*": ["claude-aws"]}]).target("claude", {"provider": "bedrock"}) == "claude-aws"
    named = groups(alternates={"fine": ["cheap-azure"]}, fallbacks=[{"fine": ["fine-azure"]}])
    assert named.target("fine", to_azure) == "cheap-azure", "the setting comes first"
    assert groups(alternates={"fine": ["mixed", "gone"]}).target("fine", to_azure) == "fine-azure"
    assert groups(alternates={"fine": ["anthropic/*"]}).target("fine", {"provider": "anthropic"}) == ""
    assert groups().target("fine", {"tenant": "t9"}) == ""
    assert groups().target("fine", {}) == ""


def test_a_cap_goes_to_the_group_of_that_name_or_model_at_the_same_provider_first() -> None:
    assert groups().target("fine", {"model": "cheap"}) == "cheap"
    assert groups().target("fine", {"model": "gpt-small"}) == "cheap"
    assert groups().target("fine-azure", {"model": "gpt-small"}) == "cheap-azure"
    assert groups().target("fine", {"model": "gpt-small", "provider": "azure"}) == "cheap-azure"
    assert groups().target("fine", {"model": "unheard-of"}) == ""


# --- obeying -------------------------------------------------------------------------------------------------------


class Clock:
    def now(self) -> float:
        return NOW

    def monotonic(self) -> float:
        return 0.0


def directive(id: str, kind: Any, scope: dict[str, str], /, **params: Any) -> Directive:
    return Directive(
        id=id, kind=kind, scope=scope, params=params, granted_at=NOW, expires_at=NOW + 300.0, incident="INC-1",
        runbook="r", step="s",
    )  # fmt: skip


class Point:
    """A guard that holds these directives, and what it reports."""

    def __init__(self, *held: Directive, **more: Any) -> None:
        self.reports: list[dict[str, int]] = []
        listed = json.loads(json.dumps([{f: getattr(d, f) for f in d.__struct_fields__} for d in held]))

        def answer(request: httpx.Request) -> httpx.Response:
            if request.method == "POST":
                self.reports.append(json.loads(request.content)["directives"])
                return httpx.Response(202)
            return httpx.Response(200, json=listed)

        self.client = PointClient("http://flyball", clock=Clock(), transport=httpx.MockTransport(answer))
        self.client.poll()
        self.obeyer = Obeyer(self.client, lambda: groups(**more))

    def counted(self) -> dict[str, int]:
        self.client.report()
        return self.reports[-1]


def request(model: str = "fine", id: str = "c-1", **more: Any) -> dict[str, Any]:
    return {**REQUEST, "model": model, "litellm_call_id": id, **more}


def test_without_directives_a_request_is_not_touched() -> None:
    asked = request()
    assert Point().obeyer.obey(asked, "acompletion") is None
    assert asked == request()


def test_a_redirect_changes_the_group() -> None:
    point = Point(directive("DIR-1", "redirect", {"provider": "openai"}, to={"provider": "azure"}, share=1.0))
    asked = request()
    assert point.obeyer.obey(asked, "acompletion") is None
    assert asked == request("fine-azure")
    elsewhere = request("claude")
    point.obeyer.obey(elsewhere, "acompletion")
    assert elsewhere == request("claude")
    assert point.counted() == {"DIR-1": 1}


def test_a_redirect_that_no_group_can_follow_is_not_reported_as_done() -> None:
    point = Point(
        directive("DIR-1", "redirect", {"provider": "anthropic"}, to={"provider": "bedrock"}, share=1.0)
    )
    asked = request("claude")
    point.obeyer.obey(asked, "acompletion")
    assert asked == request("claude")
    assert point.counted() == {"DIR-1": 0}


def test_sessions_stay_together_under_a_share() -> None:
    point = Point(directive("DIR-1", "redirect", {"provider": "openai"}, to={"provider": "azure"}, share=0.5))
    went = set()
    for i in range(20):
        asked = request(id=f"c-{i}")
        point.obeyer.obey(asked, "acompletion")
        went.add(asked["model"])
    assert len(went) == 1
    for i in range(20):
        asked = request(id=f"c-{i}", litellm_session_id="")
        point.obeyer.obey(asked, "acompletion")
        went.add(asked["model"])
    assert went == {"fine", "fine-azure"}


def test_of_a_group_that_spans_providers_a_redirect_leaves_the_others() -> None:
    point = Point(directive("DIR-1", "redirect", {"provider": "openai"}, to={"provider": "azure"}, share=1.0))
    both = [MODELS[4], MODELS[5]]
    asked = request("mixed")
    point.obeyer.obey(asked, "acompletion")
    assert asked == request("mixed")
    assert point.obeyer.among("c-1", both) == [MODELS[5]]
    assert point.obeyer.among("c-1", [MODELS[4], MODELS[4]]) == [MODELS[4], MODELS[4]], (
        "nobody else is healthy"
    )
    assert point.obeyer.among("c-2", both) == both, "a call that was not seen before"
    assert point.counted() == {"DIR-1": 1}


@pytest.mark.parametrize(
    ("call_type", "before", "after"),
    [
        ("acompletion", {}, {"max_tokens": 64}),
        ("completion", {"max_tokens": 4000}, {"max_tokens": 64}),
        ("acompletion", {"max_tokens": 10}, {"max_tokens": 10}),
        ("acompletion", {"max_completion_tokens": 4000}, {"max_completion_tokens": 64}),
        ("acompletion", {"max_tokens": None}, {"max_tokens": 64}),
        ("acompletion", {"max_tokens": "4000"}, {"max_tokens": 64}),
        ("atext_completion", {}, {"max_tokens": 64}),
        ("anthropic_messages", {"max_tokens": 100}, {"max_tokens": 64}),
        ("aresponses", {}, {"max_output_tokens": 64}),
        ("aembedding", {}, {}),
        ("image_generation", {"n": 1}, {"n": 1}),
    ],
    ids=str,
)
def test_a_cap_sets_what_this_kind_of_call_calls_its_output(
    call_type: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    point = Point(directive("DIR-1", "cap", {"tenant": "tenant-3"}, output_tokens=64))
    asked = request(**before)
    point.obeyer.obey(asked, call_type)
    assert asked == request(**after)


def test_a_block_and_a_limit_refuse_with_a_status_a_reason_and_a_time() -> None:
    blocked = Point(directive("DIR-1", "block", {"run": "s-7"}, reason="incident INC-1")).obeyer
    refusal = blocked.obey(request(), "acompletion")
    assert refusal is not None
    assert (refusal.status, refusal.text) == (403, "stopped by directive DIR-1: incident INC-1")
    assert blocked.obey(request(litellm_session_id="s-8"), "acompletion") is None
    limited = Point(directive("DIR-1", "limit", {"key": "checkout-key"}, requests_per_min=6.0)).obeyer
    assert limited.obey(request(), "acompletion") is None
    refusal = limited.obey(request(), "acompletion")
    assert refusal is not None
    assert (refusal.status, refusal.retry_after_s) == (429, 10.0)


def test_tokens_are_charged_to_the_limits_that_let_the_call_through() -> None:
    point = Point(directive("DIR-1", "limit", {"tenant": "tenant-3"}, tokens_per_min=60.0))
    assert point.obeyer.obey(request(id="c-1"), "acompletion") is None
    assert point.obeyer.obey(request(id="c-2"), "acompletion") is None
    point.obeyer.charge("c-9", 10_000, None)
    assert point.obeyer.obey(request(id="c-3"), "acompletion") is None, "of another scope"
    point.obeyer.charge("c-1", 50, None)
    assert point.obeyer.obey(request(id="c-4"), "acompletion") is not None


def test_own_rules_for_labels_are_used_as_the_server_uses_them() -> None:
    point = Point(directive("DIR-1", "block", {"tenant": "payments"}))
    own = Obeyer(point.client, groups, {"tenant": ["=team"]})
    assert point.obeyer.obey(request(), "acompletion") is None
    assert own.obey(request(), "acompletion") is not None
