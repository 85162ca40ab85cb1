"""What can go wrong, each with its ground truth: where it sits, which signal shows it, and since when.

A fault is a frozen description with a span; the simulator asks it what it does to the calls, answers, runs and GPU
samples within that span. `truth()` is what a perfect governor would say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np

from flyball.core.entities import Entity
from flyball.core.errorclass import CLASS_INDEX
from flyball.lab._draws import Floats, Ints, Mask, Records, mix, unit_interval
from flyball.lab.estate import Estate
from flyball.lab.gateway import CODE_INDEX, Answers, Names

Mix: TypeAlias = Mapping[str, float]
OUTAGE_MIX: Final[Mix] = {"529": 0.55, "503": 0.15, "500": 0.2, "429": 0.1}
"""Shares of the failures by status code; the codes are those of CLASS_OF_CODE."""
CLASS_OF_CODE: Final[dict[str, str]] = {
    "529": "overloaded", "503": "overloaded", "500": "server_error", "502": "server_error", "504": "timeout",
    "429": "rate_limited", "connection_error": "connection", "401": "auth", "insufficient_quota": "quota_exhausted",
    "408": "timeout",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Truth:
    """What is the matter, as a judge would put it.

    `root` is the entity at fault; `accepted` holds it and others that a fair judge would let pass (empty: any).
    `signals` and `classes` are what the incident may say (empty: any).

    Enough evidence is what makes the departure certain to the best of all tests that keep the page budget: one that knows
    which series to look at and what its normal is. `enough` is how many affected events that takes (see `events_needed`),
    and never fewer than a person should be woken for; `min_tenants` of how many tenants they must be, before what serves
    them all may be blamed; `lasts_s` over how long they must be spread: levels move for the length of one client's burst, so one
    window is no departure.
    """

    kind: str
    start: float
    end: float
    root: Entity | None
    accepted: tuple[Entity, ...]
    signals: tuple[str, ...]
    classes: tuple[str, ...]
    enough: int = 10
    min_tenants: int = 1
    pages_least: int = 1
    """1 where somebody must be woken, 0 where that is a matter of taste; two pages are always one too many."""
    lasts_s: float = 0.0


BUDGET_NATS: Final = 19.5
"""Evidence that an alarm needs at two false pages a week over 10,000 series judged every 10 s: ln(10,000 * 60,480 / 2)."""
_SURE: Final = 2.33
"""Standard deviations of a normal variable that are not exceeded 99 times in a hundred."""


def events_needed(mean_nats: float, variance_nats: float) -> float:
    """Events after which the best sequential test has reached the page budget's threshold 99 times in a hundred.

    Its log-likelihood ratio grows by `mean_nats` an event with `variance_nats`: n * mean - 2.33 * sqrt(n * variance) = threshold.
    Source: Wald (1945), "Sequential tests of statistical hypotheses"; normal approximation of the sum.

    >>> round(events_needed(0.5, 1.0))
    81
    """
    spread = _SURE * math.sqrt(variance_nats)
    return ((spread + math.sqrt(spread**2 + 4 * mean_nats * BUDGET_NATS)) / (2 * mean_nats)) ** 2


def failures_needed(share: float, normal: float = 0.006) -> int:
    """Failed calls that prove that `share` of the calls fail where `normal` did; at least ten.

    `normal` is the floor of errors that the lab's providers always have.

    >>> failures_needed(0.95), failures_needed(0.6), failures_needed(0.25)
    (10, 12, 19)
    """
    share = min(share, 0.99)
    failed, well = math.log(share / normal), math.log((1 - share) / (1 - normal))
    mean = share * failed + (1 - share) * well
    needed = events_needed(mean, share * (1 - share) * (failed - well) ** 2)
    return max(10, math.ceil(share * needed - 0.5))


def calls_needed(factor: float, spread_log: float) -> int:
    """Calls that prove that a level is `factor` times its normal, where ln(value) has a standard deviation of `spread_log`
    from call to call; at least twenty.

    >>> calls_needed(3.0, 0.8), calls_needed(2.0, 0.7)
    (43, 83)
    """
    mean = math.log(factor) ** 2 / (2 * spread_log**2)
    return max(20, math.ceil(events_needed(mean, 2 * mean)))


@runtime_checkable
class Fault(Protocol):
    """One thing that goes wrong within [start, end)."""

    kind: ClassVar[str]

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def target(self) -> Entity:
        """What a scenario names it by, and takes it back by."""
        ...

    def truth(self) -> Truth: ...


def _during(start: float, end: float, at: Floats) -> Mask:
    during: Mask = (at >= start) & (at < end)
    return during


def _pick(fails_with: Mix, draw: Floats) -> tuple[Ints, Ints]:
    """Class and code of each failure by the shares of a mix; `draw`: float64[n] in [0, 1)."""
    codes = list(fails_with)
    cdf = np.cumsum(np.array([fails_with[c] for c in codes], dtype=np.float64))
    column = np.minimum(np.searchsorted(cdf / cdf[-1], draw, side="right"), len(codes) - 1)
    return np.array([CLASS_INDEX[CLASS_OF_CODE[c]] for c in codes])[column], np.array(
        [CODE_INDEX[c] for c in codes]
    )[column]


@dataclass(frozen=True, slots=True)
class ProviderOutage:
    """A share of a provider's calls fails with a mix of codes; `on_s`/`off_s` make it a square wave.

    `model` and `region` narrow it. The root is the provider unless it is narrowed to a model.
    """

    kind: ClassVar[str] = "provider_outage"
    provider: str
    share: float
    start: float
    end: float = math.inf
    fails_with: Mix = field(default_factory=lambda: dict(OUTAGE_MIX))
    on_s: float = 0.0
    off_s: float = 0.0
    model: str = ""

    @property
    def target(self) -> Entity:
        return Entity("provider", self.provider)

    def truth(self) -> Truth:
        root = Entity("model", self.model) if self.model else self.target
        classes = tuple(dict.fromkeys(CLASS_OF_CODE[c] for c in self.fails_with))
        kind = "square_wave" if self.on_s else self.kind
        accepted = (root, self.target) if self.model else (root,)
        enough = failures_needed(self.share)
        return Truth(kind, self.start, self.end, root, accepted, ("llm.errors",), classes, enough, 2)

    def on_answers(self, estate: Estate, a: Answers) -> Mask:
        at = a.calls["start"]
        hit: Mask = _during(self.start, self.end, at) & (
            a.calls["provider"] == estate.provider_index[self.provider]
        )
        if self.model:
            hit &= a.calls["model"] == estate.model_index[self.model]
        if self.on_s:
            hit &= (at - self.start) % (self.on_s + self.off_s) < self.on_s
        hit &= a.u[10] < self.share
        a.fail(hit, *_pick(self.fails_with, a.u[11]))
        return hit


@dataclass(frozen=True, slots=True)
class QuotaExhausted:
    """The account at a provider has no money left: every call is refused, and waiting does not help."""

    kind: ClassVar[str] = "quota_exhausted"
    provider: str
    start: float
    end: float = math.inf

    @property
    def target(self) -> Entity:
        return Entity("provider", self.provider)

    def truth(self) -> Truth:
        return Truth(
            self.kind,
            self.start,
            self.end,
            self.target,
            (self.target,),
            ("llm.errors",),
            ("quota_exhausted",),
            10,
            2,
        )

    def on_answers(self, estate: Estate, a: Answers) -> Mask:
        hit: Mask = _during(self.start, self.end, a.calls["start"])
        hit &= a.calls["provider"] == estate.provider_index[self.provider]
        a.fail(hit, np.full(len(hit), CLASS_INDEX["quota_exhausted"]))
        return hit


@dataclass(frozen=True, slots=True)
class AllProvidersDown:
    """Our own way out is broken (DNS, egress): every provider seems to fail at once. Nothing should be moved."""

    kind: ClassVar[str] = "all_providers_down"
    start: float
    end: float = math.inf
    share: float = 0.95
    fails_with: Mix = field(default_factory=lambda: {"connection_error": 0.85, "503": 0.15})

    @property
    def target(self) -> Entity:
        return Entity("provider", "*")

    def truth(self) -> Truth:
        return Truth(
            self.kind, self.start, self.end, None, (), ("llm.errors",), ("connection", "overloaded"), 10, 2
        )

    def on_answers(self, estate: Estate, a: Answers) -> Mask:
        hit: Mask = _during(self.start, self.end, a.calls["start"]) & (a.u[10] < self.share)
        a.fail(hit, *_pick(self.fails_with, a.u[11]))
        return hit


@dataclass(frozen=True, slots=True)
class BadKey:
    """One tenant's key was revoked: all its calls are refused, wherever they go."""

    kind: ClassVar[str] = "bad_key"
    tenant: str
    start: float
    end: float = math.inf

    @property
    def target(self) -> Entity:
        return Entity("tenant", self.tenant)

    def truth(self) -> Truth:
        accepted = (self.target, Entity("key", f"key-{self.tenant}"))
        return Truth(self.kind, self.start, self.end, self.target, accepted, ("llm.errors",), ("auth",), 10)

    def on_answers(self, estate: Estate, a: Answers) -> Mask:
        hit: Mask = _during(self.start, self.end, a.calls["start"])
        hit &= a.calls["tenant"] == estate.tenant_index[self.tenant]
        a.fail(hit, np.full(len(hit), CLASS_INDEX["auth"]))
        return hit


@dataclass(frozen=True, slots=True)
class RetryStorm:
    """An app's clients hammer: most of its attempts are refused for rate, and each refusal is tried again at once."""

    kind: ClassVar[str] = "retry_storm"
    app: str
    start: float
    end: float = math.inf
    share: float = 0.75
    retries: int = 8

    @property
    def target(self) -> Entity:
        return Entity("app", self.app)

    def truth(self) -> Truth:
        signals = ("llm.errors", "llm.calls", "llm.retries")
        return Truth(
            self.kind, self.start, self.end, self.target, (self.target,), signals, ("rate_limited",), 20, 2
        )

    def on_answers(self, estate: Estate, a: Answers) -> Mask:
        mine = _during(self.start, self.end, a.calls["start"]) & (
            a.calls["app"] == estate.app_index[self.app]
        )
        a.max_retries[mine] = self.retries
        a.backoff_s[mine] = 0.05 + 0.2 * a.u[0][mine]
        hit: Mask = mine & (a.u[10] < self.share)
        a.fail(hit, np.full(len(hit), CLASS_INDEX["rate_limited"]))
        return hit


@dataclass(frozen=True, slots=True)
class SlowProvider:
    """A provider answers `factor` times slower; no error but the clients' own time-outs."""

    kind: ClassVar[str] = "slow_provider"
    provider: str
    factor: float
    start: float
    end: float = math.inf

    @property
    def target(self) -> Entity:
        return Entity("provider", self.provider)

    def truth(self) -> Truth:
        signals = ("llm.latency", "llm.ttft", "llm.errors")
        # Within one app, times of calls spread by about 0.8 (ln): so do the lengths of their answers.
        enough = calls_needed(self.factor, 0.8)
        return Truth(
            self.kind, self.start, self.end, self.target, (self.target,), signals, (), enough, 2, lasts_s=10.0
        )

    def on_answers(self, estate: Estate, a: Answers) -> Mask:
        hit: Mask = _during(self.start, self.end, a.calls["start"])
        hit &= a.calls["provider"] == estate.provider_index[self.provider]
        a.slower[hit] *= self.factor
        hit &= a.error == 0
        return hit


@dataclass(frozen=True, slots=True)
class PromptInflation:
    """A new prompt version goes live and multiplies the tokens of every call of its app; a deploy change says so."""

    kind: ClassVar[str] = "prompt_inflation"
    prompt: str
    factor: float
    start: float
    end: float = math.inf
    output_factor: float = 1.0
    spread_log: float = 0.7
    """Standard deviation of ln(tokens) from call to call of the app; the simulator fills it in."""

    @property
    def app(self) -> str:
        return self.prompt.partition("@")[0]

    @property
    def target(self) -> Entity:
        return Entity("prompt_version", self.prompt)

    def truth(self) -> Truth:
        signals = ("llm.input_tokens", "llm.output_tokens", "llm.cost")
        enough = calls_needed(max(self.factor, self.output_factor), self.spread_log)
        return Truth(
            self.kind, self.start, self.end, self.target, (self.target,), signals, (), enough, 2, lasts_s=10.0
        )

    def on_calls(self, estate: Estate, calls: Records, names: Names) -> Mask:
        """Changes first attempts: tokens and prompt version. Further attempts carry theirs along."""
        hit: Mask = _during(self.start, self.end, calls["start"]) & (
            calls["app"] == estate.app_index[self.app]
        )
        hit &= calls["attempt"] == 0
        calls["prompt"][hit] = names.prompts.index(self.prompt)
        grown = (calls["input"][hit] * self.factor).astype(np.int64)
        calls["prefix"][hit] += grown - calls["input"][hit]
        calls["input"][hit] = grown
        calls["output"][hit] = (calls["output"][hit] * self.output_factor).astype(np.int64)
        return hit


@dataclass(frozen=True, slots=True)
class AgentLoop:
    """A run of an agent that goes round: the same call with the same result (`repeat`), or A-B-A-B (`cycle`)."""

    kind: ClassVar[str] = "agent_loop"
    agent: str
    start: float
    end: float = math.inf
    pattern: str = "repeat"
    run: str = ""
    """Name of the run; the simulator fills it in when the loop is switched on."""

    @property
    def target(self) -> Entity:
        return Entity("agent", self.agent)

    def truth(self) -> Truth:
        root = Entity("run", self.run)
        return Truth(
            self.kind,
            self.start,
            self.end,
            root,
            (root, self.target),
            ("agent.loop",),
            ("repeat", "cycle"),
            6,
        )


@dataclass(frozen=True, slots=True)
class LookAlike:
    """A run of an agent that does one thing again and again, and rightly: `pages` through 500 results, `polls` with growing
    gaps, `retests` after every edit. Nothing is wrong with it; it ends by itself."""

    kind: ClassVar[str] = "look_alike"
    agent: str
    start: float
    end: float = math.inf
    pattern: str = "pages"
    run: str = ""

    @property
    def target(self) -> Entity:
        return Entity("agent", self.agent)

    def truth(self) -> Truth:
        return Truth(self.kind, self.start, self.end, None, (), (), (), pages_least=0)


@dataclass(frozen=True, slots=True)
class BudgetBurn:
    """One tenant sends `times` its calls, of all its kinds: a job that somebody forgot, a key that somebody found."""

    kind: ClassVar[str] = "budget_burn"
    tenant: str
    times: float
    start: float
    end: float = math.inf

    @property
    def target(self) -> Entity:
        return Entity("tenant", self.tenant)

    def truth(self) -> Truth:
        accepted = (self.target, Entity("key", f"key-{self.tenant}"))
        # Single clients burst for a minute: three minutes at a multiple are what a person would call a burn.
        return Truth(
            self.kind, self.start, self.end, self.target, accepted, ("llm.cost",), (), 40, lasts_s=180.0, pages_least=0
        )  # fmt: skip

    def further(self, estate: Estate, calls: Records) -> Records:
        """The calls that come on top of these first ones: each with its own number and fate, a moment later."""
        mine = _during(self.start, self.end, calls["start"]) & (
            calls["tenant"] == estate.tenant_index[self.tenant]
        )
        mine &= (calls["attempt"] == 0) & (calls["run"] < 0) & ~calls["extra"]
        whole, part = int(self.times) - 1, self.times % 1.0
        copies = []
        for number in range(1, whole + (2 if part else 1)):
            more = calls[mine].copy()
            more["uid"] = more["unit"] = mix(more["uid"] ^ np.uint64(0xB0_0000 + number))
            more["start"] += 10.0 * unit_interval(mix(more["uid"]))
            more["first"], more["extra"] = more["start"], True
            if number > whole:
                more = more[unit_interval(mix(more["uid"] ^ np.uint64(0xB1))) < part]
            copies.append(more)
        found: Records = np.concatenate(copies) if copies else calls[:0]
        return found[np.argsort(found["start"], kind="stable")]

    def on_answers(self, estate: Estate, a: Answers) -> Mask:
        hit: Mask = a.calls["extra"] & (a.calls["tenant"] == estate.tenant_index[self.tenant])
        hit &= a.calls["attempt"] == 0
        return hit


@dataclass(frozen=True, slots=True)
class GpuXid:
    """A GPU reports an XID; `serving_fails` is the share of its server's calls that then fail."""

    kind: ClassVar[str] = "gpu_xid"
    gpu: str
    xid: int
    start: float
    end: float = math.inf
    serving_fails: float = 0.4
    deployment: str = ""

    @property
    def target(self) -> Entity:
        return Entity("gpu", self.gpu)

    def truth(self) -> Truth:
        node = Entity("node", self.gpu.partition("/")[0])
        accepted = (self.target, node)
        return Truth(self.kind, self.start, self.end, self.target, accepted, ("gpu.fault",), (), 1)

    def on_answers(self, estate: Estate, a: Answers) -> Mask | None:
        hit = _on_deployment(estate, self.deployment, a) & _during(self.start, self.end, a.calls["start"])
        hit &= a.u[10] < self.serving_fails
        a.fail(hit, np.full(len(hit), CLASS_INDEX["server_error"]))
        return None  # the evidence is the GPU's own sample


@dataclass(frozen=True, slots=True)
class GpuThrottle:
    """A GPU runs hot and clocks down; its server gets slower."""

    kind: ClassVar[str] = "gpu_throttle"
    gpu: str
    start: float
    end: float = math.inf
    slower: float = 1.6
    deployment: str = ""

    @property
    def target(self) -> Entity:
        return Entity("gpu", self.gpu)

    def truth(self) -> Truth:
        node = Entity("node", self.gpu.partition("/")[0])
        return Truth(
            self.kind,
            self.start,
            self.end,
            self.target,
            (self.target, node),
            ("gpu.throttle",),
            (),
            3,
            pages_least=0,
        )

    def on_answers(self, estate: Estate, a: Answers) -> Mask | None:
        hit = _on_deployment(estate, self.deployment, a) & _during(self.start, self.end, a.calls["start"])
        a.slower[hit] *= self.slower
        return None


@dataclass(frozen=True, slots=True)
class ServingSaturated:
    """An inference server has more work than it can do: the queue grows, the KV cache is full, requests are preempted."""

    kind: ClassVar[str] = "serving_saturated"
    deployment: str
    start: float
    end: float = math.inf
    slower: float = 5.0

    @property
    def target(self) -> Entity:
        return Entity("deployment", self.deployment)

    def truth(self) -> Truth:
        signals = (
            "serving.queue",
            "serving.kv_cache",
            "serving.preemptions",
            "serving.ttft",
            "llm.ttft",
            "llm.latency",
        )
        return Truth(
            self.kind, self.start, self.end, self.target, (self.target,), signals, (), 3, pages_least=0
        )

    def on_answers(self, estate: Estate, a: Answers) -> Mask | None:
        hit = _on_deployment(estate, self.deployment, a) & _during(self.start, self.end, a.calls["start"])
        a.slower[hit] *= self.slower
        return None


def _on_deployment(estate: Estate, deployment: str, a: Answers) -> Mask:
    hit: Mask = np.zeros(len(a.calls), dtype=bool)
    for i, provider in enumerate(estate.providers):
        if deployment in provider.deployments:
            hit |= (a.calls["provider"] == i) & (a.deployment == provider.deployments.index(deployment))
    return hit


@dataclass(frozen=True, slots=True)
class TargetCollapse:
    """Whoever takes over traffic breaks down under it: `share` of all calls of a redirect's target fail while the redirect
    moves `from_share` or more. What it does to the target ends with the redirect."""

    kind: ClassVar[str] = "target_collapse"
    start: float
    end: float = math.inf
    share: float = 0.5
    from_share: float = 0.2

    @property
    def target(self) -> Entity:
        return Entity("provider", "*")

    def truth(self) -> Truth:
        return Truth(self.kind, self.start, self.end, None, (), ("llm.errors",), (), pages_least=0)

    def on_answers(self, estate: Estate, a: Answers) -> Mask:
        hit: Mask = _during(self.start, self.end, a.calls["start"]) & (a.pressure >= self.from_share)
        hit &= a.u[10] < self.share
        a.fail(hit, *_pick({"503": 0.8, "429": 0.2}, a.u[11]))
        return hit


AnyFault: TypeAlias = (
    ProviderOutage | QuotaExhausted | AllProvidersDown | BadKey | RetryStorm | SlowProvider
    | PromptInflation | AgentLoop | LookAlike | BudgetBurn | GpuXid | GpuThrottle | ServingSaturated | TargetCollapse
)  # fmt: skip
