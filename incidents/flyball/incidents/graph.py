"""The dependency graph, learned from events: run → agent → app; pod → GPU → node; deployment → model, node.

Who uses which prompt version, model, provider or deployment stands in the cells of the windows (`cells`), which are
asked directly; here is what cells do not carry. Edges fade with event time, and their number is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from flyball.core.entities import Entity
from flyball.core.events import AgentStep, Event, GpuSample, LlmCall

_RUN_LABELS: Final = ("agent", "app", "prompt", "team", "tenant")
_UPWARD: Final[dict[str, tuple[str, ...]]] = {
    "pod": ("gpu", "node", "deployment"),
    "gpu": ("node",),
    "deployment": ("model", "node"),
}
"""Label → labels of what it stands on, as they occur together in one GPU sample."""


class Run(msgspec.Struct):
    """What is known of one agent run: who it belongs to, and what it used so far. Missing labels are empty."""

    first_at: float
    last_at: float
    calls: int = 0
    steps: int = 0
    usd: float = 0.0
    tokens: int = 0
    agent: str = ""
    app: str = ""
    prompt: str = ""
    team: str = ""
    tenant: str = ""

    def labels(self) -> dict[str, str]:
        return {name: value for name in _RUN_LABELS if (value := getattr(self, name))}

    @property
    def usd_per_min(self) -> float:
        """Over at least one minute: the first call of a run is no velocity."""
        return self.usd / max((self.last_at - self.first_at) / 60.0, 1.0)


class Graph:
    """Edges between things that occur together, weighted by how often and how lately.

    Misleads where one name means two things (a pod name reused on another node): the newer use wins as the older fades.
    """

    def __init__(self, *, max_edges: int, max_runs: int, half_life_s: float = 3600.0) -> None:
        self._max_edges, self._max_runs, self._half_life_s = max_edges, max_runs, half_life_s
        self.runs: dict[str, Run] = {}
        self._up: dict[str, dict[str, list[float]]] = {}
        self._down: dict[str, dict[str, None]] = {}
        self._edges = 0
        self.seen: dict[str, float] = {}
        """entity → when something of it was last heard: GPUs, nodes, inference servers, senders."""
        self.newest = 0.0
        """Event time of the newest event that taught anything."""

    # ---- learning

    def observe(self, events: Sequence[Event], keep_runs: frozenset[str] = frozenset()) -> None:
        """Learns from a batch. Calls outside runs cost one comparison; the result does not depend on how batches are cut."""
        runs = self.runs
        for e in events:
            kind = type(e)
            if kind is LlmCall:
                if e.run:  # type: ignore[union-attr]
                    self._observe_call(e)  # type: ignore[arg-type]
            elif kind is AgentStep:
                if e.run:  # type: ignore[union-attr]
                    self._run(e).steps += 1  # type: ignore[arg-type]
            elif kind is GpuSample:
                self._observe_gpu(e)  # type: ignore[arg-type]
        if len(runs) > 2 * self._max_runs:
            newest = sorted(runs.items(), key=lambda kv: (-kv[1].last_at, kv[0]))
            kept = {k for k, _ in newest[: self._max_runs]} | (keep_runs & runs.keys())
            self.runs = {k: v for k, v in runs.items() if k in kept}

    def _run(self, e: LlmCall | AgentStep) -> Run:
        run = self.runs.get(e.run)
        if run is None:
            run = self.runs[e.run] = Run(e.at, e.at)
        if e.at > run.last_at:
            run.last_at = e.at
        self.newest = max(self.newest, e.at)
        # First word stands: a run that changes its app midway is a hand-off, and belongs to who began it.
        if not run.agent:
            run.agent = e.agent
        if not run.app:
            run.app = e.app
        if not run.tenant:
            run.tenant = e.tenant
        if not run.team:
            run.team = e.team
        return run

    def _observe_call(self, e: LlmCall) -> None:
        run = self._run(e)
        run.calls += 1
        run.usd += e.cost_usd or 0.0
        run.tokens += (e.input_tokens or 0) + (e.output_tokens or 0)
        if e.prompt:
            run.prompt = e.prompt

    def _observe_gpu(self, e: GpuSample) -> None:
        found = {"pod": e.pod, "gpu": e.gpu, "node": e.node, "deployment": e.deployment, "model": e.model}
        for child, parents in _UPWARD.items():
            if not found[child]:
                continue
            for parent in parents:
                if found[parent]:
                    self.learn(Entity(child, found[child]), Entity(parent, found[parent]), e.at)
        for kind in ("gpu", "node", "deployment"):
            if found[kind]:
                self.hear(Entity(kind, found[kind]), e.at)

    def hear(self, entity: Entity, at: float) -> None:
        key = str(entity)
        self.newest = max(self.newest, at)
        if at > self.seen.get(key, 0.0):
            self.seen[key] = at
        if len(self.seen) > self._max_edges:
            newest = sorted(self.seen.items(), key=lambda kv: (-kv[1], kv[0]))[: self._max_edges // 2]
            self.seen = dict(sorted(newest))

    def learn(self, child: Entity, parent: Entity, at: float) -> None:
        edges = self._up.setdefault(str(child), {})
        edge = edges.get(str(parent))
        if edge is None:
            edges[str(parent)] = [1.0, at]
            self._down.setdefault(str(parent), {})[str(child)] = None
            self._edges += 1
            if self._edges > self._max_edges:
                self._prune(at)
        else:
            edge[0] = edge[0] * 0.5 ** (max(at - edge[1], 0.0) / self._half_life_s) + 1.0
            edge[1] = max(edge[1], at)

    def _prune(self, now: float) -> None:
        every = [
            (self._weight(edge, now), c, p) for c, edges in self._up.items() for p, edge in edges.items()
        ]
        every.sort()
        for _, child, parent in every[: len(every) // 4]:
            del self._up[child][parent]
            if not self._up[child]:
                del self._up[child]
            self._down[parent].pop(child, None)
            if not self._down[parent]:
                del self._down[parent]
        self._edges -= len(every) // 4

    def _weight(self, edge: Sequence[float], now: float) -> float:
        return float(edge[0] * 0.5 ** (max(now - edge[1], 0.0) / self._half_life_s))

    # ---- asking

    def parents(self, entity: Entity, kind: str) -> list[str]:
        """Names of what the entity stands on, of one kind, heaviest edge first."""
        edges = self._up.get(str(entity), {})
        newest = max((e[1] for e in edges.values()), default=0.0)
        found = [(-self._weight(e, newest), p) for p, e in edges.items() if p.startswith(kind + ":")]
        return [p.partition(":")[2] for _, p in sorted(found)]

    def children(self, entity: Entity, kind: str) -> list[str]:
        """Names of what stands on the entity, of one kind, sorted."""
        return sorted(
            c.partition(":")[2] for c in self._down.get(str(entity), {}) if c.startswith(kind + ":")
        )

    def expand(self, labels: Mapping[str, str]) -> dict[str, str]:
        """The labels and what they imply: a run's agent and app, a GPU's node, a server's model and node.

        >>> g = Graph(max_edges=100, max_runs=100)
        >>> g.learn(Entity("gpu", "g0"), Entity("node", "n1"), 0.0)
        >>> g.expand({"gpu": "g0"})
        {'gpu': 'g0', 'node': 'n1'}
        """
        found = dict(labels)
        run = self.runs.get(found.get("run", ""))
        if run is not None:
            for name, value in run.labels().items():
                found.setdefault(name, value)
        for child in ("pod", "gpu", "deployment"):
            if found.get(child):
                for parent in _UPWARD[child]:
                    if not found.get(parent) and (names := self.parents(Entity(child, found[child]), parent)):
                        found[parent] = names[0]
        return found

    def reaches(self, scope: Mapping[str, str]) -> list[dict[str, str]]:
        """Label sets of calls that depend on a GPU, node or inference server: its deployments, else their models."""
        deployments: list[str] = []
        for kind in ("gpu", "node"):
            if scope.get(kind):
                below = Entity(kind, scope[kind])
                deployments += self.children(below, "deployment")
                for pod in self.children(below, "pod"):
                    deployments += self.parents(Entity("pod", pod), "deployment")
                if deployments:
                    break
        if not deployments and scope.get("deployment"):
            deployments = [scope["deployment"]]
        return [{"deployment": d} for d in dict.fromkeys(deployments)]

    # ---- snapshot

    def state(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "up": self._up,
            "seen": self.seen,
            "newest": self.newest,
            "down": {p: list(c) for p, c in self._down.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.runs = {k: msgspec.convert(v, Run) for k, v in state["runs"].items()}
        self._up = {
            c: {p: [float(w), float(at)] for p, (w, at) in edges.items()} for c, edges in state["up"].items()
        }
        self._down = {p: dict.fromkeys(children) for p, children in state["down"].items()}
        self._edges = sum(len(e) for e in self._up.values())
        self.seen = dict(state["seen"])
        self.newest = float(state["newest"])
