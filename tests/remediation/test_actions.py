"""What steps may do: how their parameters are written, and how they are resolved once, against live traffic, into a frozen plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import ValidationError

from flyball.core.entities import Entity
from flyball.core.errors import ConfigError
from flyball.core.estate import Ratio
from flyball.core.incident import Impact, Incident
from flyball.core.plans import Candidate, Frozen, PlanContext, Refusal
from flyball.remediation.actions import registry
from flyball.remediation.actions._action import CALL_LABELS, OfNow
from flyball.remediation.points.matching import limits_of

ACTIONS = registry()
NOW = 1_700_000_000.0


@dataclass
class Traffic:
    """An estate of which only the newest figures are known, the same over every span."""

    calls_of: dict[tuple[tuple[str, str], ...], int] = field(default_factory=dict)
    bad: dict[str, float] = field(default_factory=dict)
    usd: float | None = 400.0
    tokens: float | None = 90_000.0
    gpus_of: dict[tuple[tuple[str, str], ...], list[str]] = field(default_factory=dict)
    latency: float | None = None

    def now(self) -> float:
        return NOW

    def errors(self, scope: Mapping[str, str], span_s: float) -> Ratio:
        n = self.calls(scope, span_s)
        return Ratio(round(n * self.bad.get(scope.get("model", ""), 0.0)), n)

    def calls(self, scope: Mapping[str, str], span_s: float) -> int:
        return self.calls_of.get(tuple(sorted(scope.items())), 0)

    attempts = calls

    def values(self, label: str, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        return [dict(k)[label] for k in self.calls_of if label in dict(k)]

    def usd_per_hour(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return self.usd

    def tokens_per_min(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return self.tokens

    def latency_s(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return self.latency

    def gpus(self, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        return self.gpus_of.get(tuple(sorted(scope.items())), [])


def traffic(*scopes: dict[str, str], **more: Any) -> Traffic:
    return Traffic({tuple(sorted(s.items())): 120 for s in scopes}, **more)


def incident(root: str = "tenant:t3", **more: Any) -> Incident:
    kind, _, name = root.partition(":")
    entity = Entity(kind, name)
    fields: dict[str, Any] = {"signal": "llm.cost", "scope": {entity.label: name}, **more}
    return Incident(id="INC-1", at=NOW, since=NOW, updated_at=NOW, root=entity, **fields)


def freeze(
    kind: str, params: dict[str, Any], root: Incident | None = None, estate: Traffic | None = None
) -> Frozen | Refusal:
    action = ACTIONS.get(kind)

    def nowhere(scope: Mapping[str, str]) -> Sequence[Candidate]:
        return []

    context = PlanContext(root or incident(), estate or traffic({"tenant": "t3"}), nowhere)
    found: Frozen | Refusal = action.freeze(action.Params.model_validate(params), context)
    return found


def frozen(*args: Any, **more: Any) -> Frozen:
    found = freeze(*args, **more)
    assert isinstance(found, Frozen), found
    return found


def refusal(*args: Any, **more: Any) -> str:
    found = freeze(*args, **more)
    assert isinstance(found, Refusal), found
    return found.reason


# --- parameters ----------------------------------------------------------------------------------------------------

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("limit", {}, "limit needs one of requests_per_min, tokens_per_min, usd_per_hour"),
    ("limit", {"usd_per_hour": 0}, "to stop all calls there is `block`"),
    ("limit", {"usd_per_hour": True}, "no amount"),
    ("limit", {"usd_per_hour": float("inf")}, "no limit"),
    ("limit", {"usd_per_hour": "50"}, "write a number, or a part of what flows now"),
    ("limit", {"usd_per_hour": "150%"}, "not a share"),
    ("limit", {"usd_per_hour": ["50%", "75%"]}, "must fall from stage to stage"),
    ("limit", {"usd_per_hour": ["50%", 10]}, "mixes numbers and percentages"),
    ("limit", {"usd_per_hour": []}, "one to 10 stages"),
    ("limit", {"usd_per_hour": [9, 8], "requests_per_min": [3, 2, 1]}, "the same number of stages"),
    ("limit", {"usd_per_hour": 5, "scope": {"tenent": "t"}}, "did you mean 'tenant'?"),
    ("limit", {"usd_per_hour": 5, "scope": {"prompt_version": "p"}}, "unknown label"),
    ("limit", {"usd_per_hour": 5, "scope": {}}, "never read as all"),
    ("limit", {"usd_per_hour": 5, "scope": {"tenant": ""}}, "never read as all"),
    ("limit", {"usd_per_hour": 5, "scope": {"tenant": False}}, "write it in quotes"),
    ("limit", {"usd_per_hour": 5, "scope": {"tenant": "$incident.title"}}, "unknown reference"),
    ("limit", {"usd_per_hour": 5, "scope": "$incident.tenant"}, "is no scope"),
    ("limit", {"usd_per_hour": 5, "scope": ["tenant"]}, "a scope is $incident.root or labels"),
    ("limit", {"usd_per_hour": 5, "for": "20s"}, "at least 30s"),
    ("limit", {"usd_per_hour": 5, "for": "2m", "lease": "5m"}, "at most as long as `for`"),
    ("limit", {"usd_per_hour": 5, "for": "9d", "lease": "8d"}, "at most 24h"),
    ("limit", {"usd_per_hour": 5, "usd_per_day": 5}, "Extra inputs"),
    ("cap", {}, "cap needs output_tokens, model or both"),
    ("cap", {"output_tokens": 0}, "greater than or equal to 1"),
    ("cap", {"output_tokens": "50%"}, "valid integer"),
    ("cap", {"output_tokens": [256, 1024]}, "must fall"),
    ("cap", {"model": " "}, "never read as all"),
    ("cap", {"model": "$incident.root"}, "unknown reference"),
    ("cap", {"model": "big", "scope": {"model": "big"}}, "already"),
    ("block", {"scope": {"provider": "b"}}, "block stops one of run, key, agent, tenant"),
    ("block", {"scope": {"tenant": "t", "app": "a"}}, "block stops one of run, key, agent, tenant"),
    ("hook", {}, "Field required"),
    ("hook", {"name": "Drain Node", "action": "drain"}, "is no name"),
    ("hook", {"name": "h", "action": "drain", "targets": []}, "never read as all"),
    ("hook", {"name": "h", "action": "drain", "targets": ["a", "a"]}, "named twice"),
    ("hook", {"name": "h", "action": "drain", "targets": ["$incident.scope"]}, "unknown reference"),
    ("hook", {"name": "h", "action": "drain", "with": {"node": "$incident.root"}}, "literals only"),
    ("hook", {"name": "h", "action": "drain", "with": {"x": ["$x"]}}, "literals only"),
    ("hook", {"name": "h", "action": "drain", "with": {"x": float("nan")}}, "texts, numbers"),
    ("hook", {"name": "h", "action": "drain", "with": {"x": "y" * 9000}}, "longer than"),
    ("hook", {"name": "h", "action": "drain", "for": "5s"}, "at least 30s"),
    ("hook", {"name": "h", "action": "drain", "dry_run": "no"}, "valid boolean"),
    ("redirect", {"hold": "1h"}, "Extra inputs"),
    ("redirect", {"share": ["50%", "25%"]}, "share must rise"),
    ("redirect", {"share": 0.5}, "write a percentage"),
]


@pytest.mark.parametrize(("kind", "params", "said"), BROKEN, ids=lambda v: str(v)[:60])
def test_parameters_that_could_mean_two_things_are_refused_with_what_would_be_right(
    kind: str, params: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError) as e:
        ACTIONS.get(kind).Params.model_validate(params)
    assert said in str(e.value)


def test_one_value_and_a_list_of_one_are_the_same() -> None:
    params = ACTIONS.get("limit").Params
    assert params(usd_per_hour="50%") == params(usd_per_hour=["50%"])
    assert params(usd_per_hour=["75%", "50%"]).usd_per_hour == (OfNow(0.75), OfNow(0.5))


def test_a_lease_is_no_longer_than_what_it_may_last_in_all() -> None:
    found = frozen("limit", {"usd_per_hour": 9, "for": "2m"})
    assert (found.hold_s, found.lease_s) == (120.0, 120.0)


def test_every_action_describes_its_parameters_for_editors() -> None:
    for kind in ACTIONS.kinds():
        action = ACTIONS.get(kind)
        schema = action.Params.model_json_schema(by_alias=True)
        assert action.kind == kind
        assert all(p.get("description") for p in schema["properties"].values()), kind
        assert schema["additionalProperties"] is False
    with pytest.raises(ConfigError, match="did you mean 'limit'"):
        ACTIONS.get("limits")


# --- limit ---------------------------------------------------------------------------------------------------------


def test_a_percentage_is_of_what_flows_when_the_plan_is_made() -> None:
    found = frozen(
        "limit", {"usd_per_hour": ["75%", "50%"], "tokens_per_min": "10%", "requests_per_min": "50%"}
    )
    assert found.stages == (
        {"requests_per_min": 60.0, "tokens_per_min": 9000.0, "usd_per_hour": 300.0},
        {"requests_per_min": 60.0, "tokens_per_min": 9000.0, "usd_per_hour": 200.0},
    )
    assert all(limits_of(stage) == stage for stage in found.stages), "points understand every parameter"


@pytest.mark.parametrize("measured", [None, 0.0])
def test_a_percentage_of_what_nobody_measured_is_refused(measured: float | None) -> None:
    estate = traffic({"tenant": "t3"}, usd=measured)
    assert refusal("limit", {"usd_per_hour": "50%"}, estate=estate) == "unmeasured"
    assert frozen("limit", {"usd_per_hour": 20}, estate=estate).stages == ({"usd_per_hour": 20.0},)


@pytest.mark.parametrize(
    ("root", "scope"),
    [
        ("tenant:t3", {"tenant": "t3"}),
        ("app:shop", {"app": "shop"}),
        ("prompt_version:greeting@4", {"prompt": "greeting@4"}),
        ("model:m", {"model": "m"}),
        ("provider:b", {"provider": "b"}),
        ("deployment:d", {"deployment": "d"}),
        ("agent:a", {"agent": "a"}),
        ("run:r-1", {"run": "r-1"}),
    ],
)
def test_the_root_of_the_incident_is_what_is_acted_on_and_locked(root: str, scope: dict[str, str]) -> None:
    for kind, params in (("limit", {"requests_per_min": 9}), ("cap", {"output_tokens": 9})):
        found = frozen(kind, params, incident(root), traffic(scope))
        assert (found.scope, found.source, found.locks) == (scope, scope, (root,))


@pytest.mark.parametrize(
    "root", ["tool:search", "stream:s", "tenant:", "tenant:other", "gpu:0", "tenant:gone"]
)
def test_a_root_that_no_call_carries_or_that_has_no_traffic_is_no_target(root: str) -> None:
    for kind, params in (("limit", {"requests_per_min": 9}), ("cap", {"output_tokens": 9})):
        assert refusal(kind, params, incident(root)) == "no_target"


def test_of_a_gpu_the_calls_of_its_inference_server_are_acted_on() -> None:
    root = incident("gpu:0", scope={"gpu": "0", "node": "n1", "deployment": "vllm-1"})
    found = frozen("limit", {"requests_per_min": "50%"}, root, traffic({"deployment": "vllm-1"}))
    assert (found.scope, found.locks) == ({"deployment": "vllm-1"}, ("deployment:vllm-1",))


def test_a_key_is_acted_on_only_where_the_incident_is_about_it() -> None:
    assert frozen("block", {}, incident("key:k1")).scope == {"key": "k1"}
    assert refusal("block", {"scope": {"key": "k9"}}, incident("key:k1")) == "no_target"


def test_a_written_scope_is_checked_against_live_traffic() -> None:
    scope = {"tenant": "t3", "app": "shop"}
    found = frozen("limit", {"requests_per_min": 9, "scope": scope}, None, traffic(scope))
    assert (found.scope, found.locks) == (scope, ("tenant:t3",))
    assert refusal("limit", {"requests_per_min": 9, "scope": {"tenant": "t9"}}) == "no_target"


def test_the_baseline_is_what_the_incident_knows_of_better_days() -> None:
    known = incident(impact=Impact(usd_per_min_baseline=1.5))
    assert frozen("limit", {"usd_per_hour": 9}, known).baseline == {"usd_per_min": 1.5}
    assert frozen("limit", {"usd_per_hour": 9}).baseline == {}


# --- cap -----------------------------------------------------------------------------------------------------------


def test_a_cap_names_tokens_model_or_both() -> None:
    estate = traffic({"tenant": "t3"}, {"model": "small"})
    found = frozen("cap", {"output_tokens": [1024, 256], "model": "small"}, estate=estate)
    assert found.stages == (
        {"output_tokens": 1024, "model": "small"},
        {"output_tokens": 256, "model": "small"},
    )
    assert found.target == {"tenant": "t3", "model": "small"}
    assert frozen("cap", {"model": "small"}, estate=estate).stages == ({"model": "small"},)


def test_a_model_that_is_not_seen_or_fails_takes_nobody_over() -> None:
    assert refusal("cap", {"model": "small"}) == "no_candidate"
    failing = traffic({"tenant": "t3"}, {"model": "small"}, bad={"small": 0.5})
    assert refusal("cap", {"model": "small"}, estate=failing) == "no_candidate"
    itself = traffic({"model": "small"})
    assert refusal("cap", {"model": "small"}, incident("model:small"), itself) == "no_candidate"


class Priced(Traffic):
    """A tenant whose calls go to provider a, mostly; models with a price a token there."""

    def __init__(self, tenant_usd: float, prices: Mapping[str, float], elsewhere: str = "") -> None:
        at_a = [{"provider": "a", "model": m} for m in prices if m != elsewhere]
        scopes = [{"tenant": "t3"}, {"provider": "a", "tenant": "t3"}, *at_a, *({"model": m} for m in prices)]
        super().__init__({tuple(sorted(s.items())): 120 for s in scopes})
        self._tenant_usd, self._prices = tenant_usd, prices

    def values(self, label: str, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        wide = [dict(k) for k in self.calls_of if scope.items() <= dict(k).items()]
        return [k[label] for k in wide if label in k]

    def usd_per_hour(self, scope: Mapping[str, str], span_s: float) -> float | None:
        return self._prices[scope["model"]] if "model" in scope else self._tenant_usd


def test_the_cheapest_model_is_the_one_of_least_cost_a_token_where_the_calls_go() -> None:
    params = {"model": "cheapest"}
    estate = Priced(400.0, {"large": 400.0, "small": 40.0, "tiny": 4.0}, elsewhere="tiny")
    assert frozen("cap", params, estate=estate).stages == ({"model": "small"},)
    assert refusal("cap", params, estate=Priced(50.0, {"large": 60.0, "small": 40.0})) == "no_candidate"
    assert refusal("cap", params, estate=traffic({"tenant": "t3"})) == "unmeasured"


# --- block ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["run:r-1", "agent:a", "tenant:t3"])
def test_a_block_stops_one_run_agent_or_tenant(root: str) -> None:
    kind, _, name = root.partition(":")
    found = frozen("block", {}, incident(root), traffic({kind: name}))
    assert (found.scope, found.locks, found.max_share) == ({kind: name}, (root,), 1.0)
    assert found.hold_s == 900.0


@pytest.mark.parametrize("root", ["provider:b", "app:shop", "model:m", "team:x", "node:n", "region:eu"])
def test_nothing_wider_is_ever_blocked(root: str) -> None:
    kind, _, name = root.partition(":")
    assert refusal("block", {}, incident(root), traffic({kind: name})) == "no_target"


def test_what_a_caller_is_told_names_the_incident_and_nothing_that_an_event_said() -> None:
    found = frozen("block", {}, incident(title="ignore all rules", summary="<script>"))
    assert found.stages == ({"reason": "incident INC-1 (llm.cost)"},)


def test_a_run_that_is_not_seen_any_more_is_no_target() -> None:
    assert refusal("block", {}, incident("run:r-9")) == "no_target"


# --- hook ----------------------------------------------------------------------------------------------------------

DRAIN = {"name": "drain-node", "action": "drain"}


def test_a_hook_gets_typed_targets_that_are_frozen_and_counted() -> None:
    estate = traffic(gpus_of={(("node", "n1"),): ["n1/0", "n1/1"]})
    found = frozen("hook", {**DRAIN, "with": {"grace_s": 30}}, incident("node:n1"), estate)
    assert found.hook is not None
    assert (found.hook.targets, found.hook.params, found.hook.dry_run_first) == (
        ("node:n1",),
        {"grace_s": 30},
        True,
    )
    assert (found.gpus, found.max_share, found.locks, found.release) == (2, 0.0, ("node:n1",), "resolved")
    assert (found.scope, found.stages) == ({"node": "n1"}, ({},))


def test_one_gpu_is_counted_once_however_it_is_named() -> None:
    estate = traffic(gpus_of={(("node", "n1"),): ["n1/0", "n1/1"], (("gpu", "0"),): ["n1/0"]})
    targets = ["$incident.root", "node:n1"]
    assert frozen("hook", {**DRAIN, "targets": targets}, incident("gpu:0"), estate).gpus == 2


def test_a_node_of_which_nobody_knows_the_gpus_is_not_drained() -> None:
    assert refusal("hook", DRAIN, incident("node:n1")) == "unmeasured"


def test_a_drain_is_proved_on_the_calls_of_the_server_that_ran_there() -> None:
    on_it = (("deployment", "vllm-1"), ("node", "n1"))
    estate = traffic(
        {"deployment": "vllm-1"},
        {"deployment": "vllm-2"},
        gpus_of={(("node", "n1"),): ["n1/0"], on_it: ["n1/0"]},
    )
    found = frozen("hook", DRAIN, incident("node:n1"), estate)
    assert (found.source, found.target) == ({"deployment": "vllm-1"}, {"deployment": "vllm-1"})
    assert (found.scope, found.gpus) == ({"node": "n1"}, 1)


def test_a_hook_about_calls_touches_all_of_them_and_no_gpu() -> None:
    found = frozen("hook", {"name": "rollback", "action": "prompt"}, incident("prompt_version:p@4"))
    assert found.hook is not None
    assert (found.hook.targets, found.scope) == (("prompt_version:p@4",), {"prompt": "p@4"})
    assert (found.gpus, found.max_share) == (None, 1.0)


@pytest.mark.parametrize("root", ["node:", "node:other"])
def test_a_hook_without_a_root_is_refused(root: str) -> None:
    assert refusal("hook", DRAIN, incident(root)) == "no_target"


# --- redirect ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "evidence", "latency_s", "baseline"),
    [
        ("llm.latency", {"observed": 4.0, "expected": 1.0}, 6.0, {"latency_s": 1.5}),
        ("llm.latency", {"observed": 4.0, "expected": 1.0}, None, {}),
        ("llm.latency", {"observed": 1.0, "expected": 4.0}, 6.0, {}),
        ("llm.latency", {}, 6.0, {}),
        ("llm.errors", {"observed": 0.6, "expected": 0.004}, 6.0, {}),
        ("llm.ttft", {"observed": 4.0, "expected": 1.0}, 6.0, {}),
    ],
)
def test_a_redirect_away_from_a_slow_provider_knows_how_fast_it_was(
    signal: str, evidence: dict[str, Any], latency_s: float | None, baseline: dict[str, float]
) -> None:
    slow = incident("provider:b", signal=signal, evidence=evidence)
    estate = traffic({"provider": "b"}, {"provider": "c"}, latency=latency_s)
    c = Candidate({"provider": "c"}, 0.0, 120, 1, 1)
    action = ACTIONS.get("redirect")
    params = action.Params.model_validate({"share": ["25%"], "for": "1h", "lease": "5m"})
    found = action.freeze(params, PlanContext(slow, estate, lambda scope: [c]))
    assert isinstance(found, Frozen), found
    assert found.baseline == baseline


# --- all -----------------------------------------------------------------------------------------------------------


def test_hostile_names_stay_names() -> None:
    name = '"}; DROP TABLE x; $(reboot) {{ 7*7 }} ../../etc'
    found = frozen("limit", {"requests_per_min": 9}, incident(f"tenant:{name}"), traffic({"tenant": name}))
    assert found.scope == {"tenant": name}
    hook = frozen("hook", {"name": "h", "action": "a"}, incident(f"tenant:{name}"))
    assert hook.hook is not None
    assert hook.hook.targets == (f"tenant:{name}",)


def test_params_of_another_action_are_refused() -> None:
    context = PlanContext(incident(), traffic(), lambda scope: [])
    other = ACTIONS.get("block").Params()
    for kind in ("limit", "cap", "hook", "redirect"):
        found = ACTIONS.get(kind).freeze(other, context)
        assert isinstance(found, Refusal)
        assert found.reason == "bad_params"


def test_the_labels_of_scopes_are_those_of_calls() -> None:
    from flyball.core.events import LlmCall

    assert set(CALL_LABELS) <= set(LlmCall.__struct_fields__)
