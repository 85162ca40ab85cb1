"""What windows do not tell: how active single agent runs are, and which GPUs report. Bounded, by event time."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from typing import Any, Final

from flyball.core.errorclass import NOT_ATTEMPTS
from flyball.core.events import AgentStep, Event, GpuSample, LlmCall

NEWEST: Final = 32
"""How many steps of one run are remembered, of those done and of those refused each: a count within a span is never above it."""
MAX_RUNS: Final = 10_000
MAX_GPUS: Final = 200_000
_TIDY_EVERY: Final = 4096


class RunActivity:
    """The newest steps and calls of each run: those that were tried, and those that were refused before they were.

    Bounded: NEWEST times per run and kind, MAX_RUNS runs (the one silent for longest goes first), nothing older than `keep_s`.

    >>> runs = RunActivity(600.0)
    >>> runs.observe([AgentStep(at=10.0, run="r"), AgentStep(at=11.0, run="r", error="gateway_local")])
    11.0
    >>> runs.count({"run": "r"}, 0.0, refused=True), runs.count({"run": "r"}, 0.0, refused=False)
    (2, 1)
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._runs: dict[str, tuple[list[float], list[float]]] = {}
        self._newest = 0.0

    def observe(self, events: Sequence[Event], now: float | None = None) -> float:
        """Returns: time of the newest step so far; 0.0 before the first."""
        runs = self._runs
        # Most events of a batch are calls of no run: they are passed over as cheaply as can be.
        told = [e for e in events if type(e) is LlmCall or type(e) is AgentStep]
        for e in told:
            if not e.run:
                continue
            known = runs.pop(e.run, None) or ([], [])
            runs[e.run] = known  # last in the dict is latest seen
            times = known[1] if e.error in NOT_ATTEMPTS else known[0]
            at = e.at if now is None else min(e.at, now)
            # Steps may come out of order: what goes is the oldest, not the one that came first.
            insort(times, at)
            if len(times) > NEWEST:
                del times[0]
            self._newest = max(self._newest, at)
        if len(runs) > MAX_RUNS + _TIDY_EVERY:
            self._tidy()
        return self._newest

    def _tidy(self) -> None:
        oldest = self._newest - self._keep_s
        kept = [(run, times) for run, times in self._runs.items() if max(*times[0], *times[1], 0.0) > oldest]
        self._runs = dict(kept[-MAX_RUNS:])

    def count(self, scope: Mapping[str, str], since: float, *, refused: bool) -> int:
        """Steps after `since` of the one run that the scope names; 0 for a scope with other labels, which nobody could check."""
        times = self._runs.get(scope.get("run", "")) if len(scope) == 1 else None
        return _after(times, since, refused=refused) if times is not None else 0

    def active(self, since: float) -> list[str]:
        """Runs with a step after `since`, most steps first."""
        found = [(-_after(times, since), run) for run, times in self._runs.items()]
        return [run for n, run in sorted(found) if n]

    def state(self) -> Any:
        return {"newest": self._newest, "runs": self._runs}

    def load(self, state: Any) -> None:
        self._newest = float(state["newest"])
        self._runs = {run: (list(done), list(refused)) for run, (done, refused) in state["runs"].items()}


def _after(times: tuple[list[float], list[float]], since: float, *, refused: bool = True) -> int:
    done, stopped = times
    n = len(done) - bisect_right(done, since)
    return n + len(stopped) - bisect_right(stopped, since) if refused else n


class GpuInventory:
    """When each GPU last reported, and for which deployment: what a share of GPUs is a share of."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._seen: dict[tuple[str, str], tuple[float, str]] = {}
        self._newest = 0.0

    def observe(self, events: Sequence[Event], now: float | None = None) -> float:
        """Returns: time of the newest sample so far; 0.0 before the first."""
        for e in [e for e in events if type(e) is GpuSample]:
            if not e.gpu:  # an inference server
                continue
            key = (e.node, e.gpu)
            last, deployment = self._seen.pop(key, (0.0, ""))
            at = e.at if now is None else min(e.at, now)
            self._seen[key] = (max(last, at), e.deployment or deployment)
            self._newest = max(self._newest, at)
        if len(self._seen) > MAX_GPUS:
            oldest = self._newest - self._keep_s
            kept = [(key, seen) for key, seen in self._seen.items() if seen[0] > oldest]
            self._seen = dict(kept[-MAX_GPUS:])
        return self._newest

    def reporting(self, scope: Mapping[str, str], span_s: float, now: float) -> list[str]:
        """`node/gpu` of those in scope that reported within the span, sorted; `gpu` in the scope may be written either way.

        Before the estate has any time of its own, the span ends at the newest sample.
        """
        if any(label not in ("node", "gpu", "deployment") for label in scope):
            return []
        since = (now or self._newest) - span_s
        found: list[str] = []
        for (node, gpu), (at, deployment) in self._seen.items():
            labels = {"node": node, "deployment": deployment}
            if at < since or any(labels[k] != v for k, v in scope.items() if k != "gpu"):
                continue
            if scope.get("gpu", gpu) in (gpu, f"{node}/{gpu}"):
                found.append(f"{node}/{gpu}")
        return sorted(found)

    def state(self) -> Any:
        seen = [(node, gpu, at, deployment) for (node, gpu), (at, deployment) in self._seen.items()]
        return {"newest": self._newest, "seen": seen}

    def load(self, state: Any) -> None:
        self._newest = float(state["newest"])
        self._seen = {(node, gpu): (float(at), deployment) for node, gpu, at, deployment in state["seen"]}
