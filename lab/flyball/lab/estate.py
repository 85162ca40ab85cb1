"""The estate that the lab simulates, as a frozen description: who calls what, at which price, on which machines.

Nothing here moves; `flyball.lab.sim` brings it to life. Numbers are invented, in the range of what such estates show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from flyball.core.errors import ConfigError, did_you_mean
from flyball.lab._draws import Floats

Priority = Literal["high", "normal", "low"]
Style = Literal["coder", "researcher", "support"]
TENANT_SIGMA = 0.25
"""How much tenants differ in the length of what they write, in ln units."""


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens. `cached_input` is what a token read from the provider's prompt cache costs."""

    input_usd: float
    cached_input_usd: float
    output_usd: float


@dataclass(frozen=True, slots=True)
class Model:
    """`speed` divides times: 2.0 answers in half the time of 1.0."""

    name: str
    context_tokens: int
    speed: float
    price: Price


@dataclass(frozen=True, slots=True)
class Provider:
    """A company, or ourselves, that answers calls.

    `floor` scales the background errors; `price_ratio` scales every model's list price; `deployments` are named
    only where calls can be told apart by machine (our own servers).
    """

    name: str
    regions: tuple[str, ...]
    models: tuple[str, ...]
    ttft_s: float
    seconds_per_token: float
    price_ratio: float = 1.0
    floor: float = 1.0
    overloaded_code: str = "503"
    deployments: tuple[str, ...] = ()
    writes_cache: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Where a share of an app's calls goes."""

    provider: str
    model: str
    weight: float


@dataclass(frozen=True, slots=True)
class App:
    """An application: who owns it, how much it calls, how long its prompts and answers are.

    Input = `system_tokens` + a lognormal (median, sigma), of which `tail_share` is stretched by a Pareto tail.
    `burstiness` is the coefficient of variation of its rate from minute to minute; `max_retries` is the gateway's.
    """

    name: str
    team: str
    weight: float
    prompt: str
    routes: tuple[Route, ...]
    input_median_tokens: float
    input_sigma: float
    output_median_tokens: float
    output_sigma: float
    system_tokens: int
    cache_share: float = 0.6
    tail_share: float = 0.01
    tail_alpha: float = 1.6
    burstiness: float = 0.5
    stream_share: float = 0.7
    priority: Priority = "normal"
    max_retries: int = 1
    timeout_s: float = 120.0

    @property
    def input_spread_log(self) -> float:
        """Standard deviation of ln(input tokens) from call to call, tenants' own habits among it; the rare tail left out."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        sigma = float(np.hypot(self.input_sigma, TENANT_SIGMA))
        logs = np.log(self.system_tokens + self.input_median_tokens * np.exp(sigma * nodes))
        weights = weights / weights.sum()
        mean = float((weights * logs).sum())
        return float(np.sqrt((weights * (logs - mean) ** 2).sum()))


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent: runs of its app that alternate model calls and tools. `share` is its part of all agent runs."""

    name: str
    app: str
    style: Style
    share: float


@dataclass(frozen=True, slots=True)
class GpuNode:
    """One node: its GPUs, and the inference server that runs on all of them."""

    name: str
    gpus: int
    hardware: str
    deployment: str
    model: str
    pod: str
    namespace: str = "serving"

    def gpu_names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}/gpu-{i}" for i in range(self.gpus))


@dataclass(frozen=True, slots=True)
class Sender:
    """One process that reports events: it holds them up to `flush_s`, and its clock is `skew_s` ahead of true time."""

    name: str
    flush_s: float
    network_s: float = 0.1
    skew_s: float = 0.0


@dataclass(frozen=True)
class Estate:
    """All of it. `rate` is logical calls a second on average, agents' calls included (`agent_share` of them)."""

    rate: float
    providers: tuple[Provider, ...]
    models: tuple[Model, ...]
    apps: tuple[App, ...]
    agents: tuple[Agent, ...]
    nodes: tuple[GpuNode, ...]
    pods: tuple[Sender, ...]
    sdk: Sender
    n_tenants: int = 240
    tenant_exponent: float = 0.9
    agent_share: float = 0.15
    burst_share: float = 0.12
    daily_amplitude: float = 0.35
    scrape_s: float = 15.0
    deploys_per_day: float = 1.0
    blips_per_day: float = 4.0
    """Short spells (10–30 s) in which one model at one provider fails a little more (5–15 %): normal life, not a fault."""
    fallback: bool = False
    """Whether a retry goes to the app's next provider instead of the same one."""
    copies: float = 0.0
    """Share of agents' calls that their SDK reports as well, with the same id."""
    evaluated: float = 0.01
    """Share of successful calls that get a quality score."""

    @cached_property
    def tenants(self) -> tuple[str, ...]:
        """`t1` calls most."""
        return tuple(f"t{i + 1}" for i in range(self.n_tenants))

    @cached_property
    def tenant_weights(self) -> Floats:
        """float64[n_tenants], sums to 1: a Zipf law."""
        weights: Floats = np.arange(1, self.n_tenants + 1, dtype=np.float64) ** -self.tenant_exponent
        total: Floats = weights / weights.sum()
        return total

    @cached_property
    def provider_index(self) -> dict[str, int]:
        return {p.name: i for i, p in enumerate(self.providers)}

    @cached_property
    def model_index(self) -> dict[str, int]:
        return {m.name: i for i, m in enumerate(self.models)}

    @cached_property
    def app_index(self) -> dict[str, int]:
        return {a.name: i for i, a in enumerate(self.apps)}

    @cached_property
    def tenant_index(self) -> dict[str, int]:
        return {t: i for i, t in enumerate(self.tenants)}

    @cached_property
    def agent_index(self) -> dict[str, int]:
        return {a.name: i for i, a in enumerate(self.agents)}

    @cached_property
    def gpu_names(self) -> tuple[str, ...]:
        return tuple(g for node in self.nodes for g in node.gpu_names())

    def node_of(self, gpu: str) -> GpuNode:
        """The node that a GPU (`node-1/gpu-3`) is in. Raises: ConfigError when there is none."""
        for node in self.nodes:
            if gpu in node.gpu_names():
                return node
        raise ConfigError(f"no GPU {gpu!r} in the estate{did_you_mean(gpu, self.gpu_names)}", where="lab")

    def scaled(self, rate: float) -> Estate:
        """The same estate with another number of calls a second."""
        return replace(self, rate=rate)


def _apps() -> tuple[App, ...]:
    return (
        App("checkout", "payments", 0.16, "checkout@3", (Route("b", "heron", 0.6), Route("a", "heron", 0.4)),
            300, 0.6, 90, 0.7, 1200, cache_share=0.8, burstiness=0.3, priority="high"),
        App("assistant", "consumer", 0.2, "assistant@12", (Route("a", "heron", 0.5), Route("c", "heron", 0.5)),
            620, 1.05, 170, 0.8, 350, tail_share=0.03, burstiness=0.35),
        App("search", "discovery", 0.14, "search@7",
            (Route("c", "wren", 0.4), Route("own", "osprey", 0.4), Route("b", "wren", 0.2)),
            2200, 0.7, 120, 0.6, 800, tail_share=0.03, burstiness=0.5),
        App("autocomplete", "devtools", 0.2, "autocomplete@21", (Route("a", "wren", 0.6), Route("c", "wren", 0.4)),
            1350, 1.15, 13, 0.8, 60, cache_share=0.2, burstiness=0.9, stream_share=0.2, priority="low", timeout_s=60.0),
        App("summarize", "documents", 0.1, "summarize@5", (Route("b", "heron", 0.65), Route("c", "heron", 0.35)),
            6500, 1.1, 340, 0.55, 300, tail_share=0.05, burstiness=0.8, priority="low", max_retries=2),
        App("moderation", "trust", 0.12, "moderation@9",
            (Route("b", "wren", 0.5), Route("a", "wren", 0.3), Route("own", "osprey", 0.2)),
            140, 0.9, 8, 0.5, 420, cache_share=0.9, burstiness=0.5, stream_share=0.0, priority="high"),
        App("translate", "consumer", 0.08, "translate@4", (Route("c", "wren", 0.6), Route("b", "wren", 0.4)),
            480, 1.0, 420, 0.9, 150, burstiness=0.6),
        # The apps below are called by agents only.
        App("research", "analysis", 0.0, "research@2", (Route("b", "heron", 0.6), Route("c", "heron", 0.4)),
            1200, 0.3, 150, 0.9, 900, cache_share=0.75, max_retries=2),
        App("devbot", "devtools", 0.0, "devbot@6", (Route("a", "heron", 0.7), Route("b", "heron", 0.3)),
            1640, 0.25, 88, 1.3, 1100, cache_share=0.8, max_retries=2),
        App("helpdesk", "support", 0.0, "helpdesk@8", (Route("c", "heron", 0.6), Route("a", "heron", 0.4)),
            900, 0.4, 110, 0.7, 1500, cache_share=0.8, max_retries=2, priority="high"),
    )  # fmt: skip


def default_estate(rate: float = 20.0) -> Estate:
    """Three providers and our own servers, ten apps, 240 tenants, three agents, two GPU nodes, four gateway pods.

    >>> [p.name for p in default_estate().providers]
    ['a', 'b', 'c', 'own']
    """
    return Estate(
        rate=rate,
        models=(
            Model("heron", 200_000, 1.0, Price(3.0, 0.3, 15.0)),
            Model("wren", 128_000, 2.2, Price(0.6, 0.06, 2.4)),
            Model("osprey", 32_000, 2.5, Price(0.1, 0.1, 0.3)),
        ),
        providers=(
            Provider("a", ("us", "eu"), ("heron", "wren"), 0.45, 0.014, 1.0, 1.0, "503"),
            Provider("b", ("us", "eu"), ("heron", "wren"), 0.55, 0.016, 1.1, 1.3, "529", writes_cache=True),
            Provider("c", ("us", "eu", "asia"), ("heron", "wren"), 0.4, 0.012, 0.9, 0.8, "503"),
            Provider("own", ("dc1",), ("osprey",), 0.2, 0.02, 1.0, 0.5, "503", ("vllm-1", "vllm-2")),
        ),
        apps=_apps(),
        agents=(
            Agent("coder", "devbot", "coder", 0.3),
            Agent("researcher", "research", "researcher", 0.4),
            Agent("concierge", "helpdesk", "support", 0.3),
        ),
        nodes=(
            GpuNode("node-1", 4, "H100-SXM", "vllm-1", "osprey", "vllm-osprey-0"),
            GpuNode("node-2", 4, "H100-SXM", "vllm-2", "osprey", "vllm-osprey-1"),
        ),
        pods=(
            Sender("gateway-1", 5.0, 0.12, 0.05),
            Sender("gateway-2", 5.0, 0.2, -0.15),
            Sender("gateway-3", 2.0, 0.08, 0.3),
            Sender("gateway-4", 0.5, 0.3, 0.0),
        ),
        sdk=Sender("agents-sdk", 5.0, 0.25, -0.05),
    )
