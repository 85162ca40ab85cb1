"""Agent runs that grow out of proportion: context per step, money per minute, children per run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.core.codec import pack_state, unpack_state
from flyball.core.errors import ConfigError
from flyball.core.events import AgentStep, Event, LlmCall
from flyball.detectors._budget import PageBudget
from flyball.detectors._gates import Level

_VERSION: Final = 1
_Facts = dict[str, float | int | str | list[str]]
_EDGES: Final = (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 1025)
"""First step of each bucket: steps further on are compared more coarsely, as growth per step gets smaller."""


@dataclass(frozen=True, slots=True)
class Params:
    """Settings of `agent_inflation`.

    Args:
        warmup_runs: runs of the same agent that must have come this far before another is compared with them.
        z: standard deviations (of the logarithm) above them.
        factor: and so many times their geometric mean.
        floor_sd: the least standard deviation of the logarithm that is believed.
        min_context_tokens, min_usd_per_min, min_tokens_per_min: below it nobody cares.
        dwell_calls: calls in a row over it before it is told.
        calm_calls: calls in a row under it before it is over.
        spend_half_life_s: how fast spend is forgotten in the velocity.
        min_children: fewer children are never told.
        children_without_baseline: so many are told although nothing is known of the application's other runs.
        relearn_runs: when runs that would be told outnumber the others lately by so many, they are the new normal. A change
            that hits every run is the concern of detectors over windows, not of this one.
        idle_s: a run that says nothing for so long has ended.
        still_every_s: the least event time between two `still`.
        max_runs, max_groups: remembered; the ones silent longest are forgotten first.

    Raises: ConfigError for values out of range.
    """

    warmup_runs: int = 15
    z: float = 4.0
    factor: float = 3.0
    floor_sd: float = 0.35
    min_context_tokens: int = 4_000
    min_usd_per_min: float = 0.05
    min_tokens_per_min: float = 20_000.0
    dwell_calls: int = 3
    calm_calls: int = 3
    spend_half_life_s: float = 120.0
    min_children: int = 10
    children_without_baseline: int = 100
    relearn_runs: int = 20
    idle_s: float = 900.0
    still_every_s: float = 10.0
    max_runs: int = 50_000
    max_groups: int = 5_000

    def __post_init__(self) -> None:
        for name in (
            "warmup_runs",
            "dwell_calls",
            "calm_calls",
            "relearn_runs",
            "max_runs",
            "max_groups",
            "min_children",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 1, not {getattr(self, name)}", where="agent_inflation"
                )
        for name in ("z", "floor_sd", "spend_half_life_s", "idle_s", "still_every_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} must be above 0, not {getattr(self, name)}", where="agent_inflation"
                )
        if self.factor <= 1:
            raise ConfigError(f"factor must be above 1, not {self.factor}", where="agent_inflation")


class _Peers:
    """What other runs of the same agent had: one level, and by how many runs those kept out outnumber the others lately."""

    __slots__ = ("kept_out", "level")

    def __init__(self) -> None:
        self.level = Level()
        self.kept_out = 0

    def offer(self, x: float, over: bool, p: Params) -> None:
        """One run's value. What is anomalous does not teach, until so many more runs are than are not that it is the new normal."""
        if over:
            self.kept_out += 1
            if self.kept_out < p.relearn_runs:
                return
            self.level, self.kept_out = Level(), 0
        else:
            self.kept_out = max(0, self.kept_out - 1)
        level = self.level
        if level.n >= p.warmup_runs:
            # One large run among the normal ones may pull, but not far.
            x = min(x, level.mean + 2.5 * level.sd(p.floor_sd))
        level.learn(x)

    def pack(self) -> list[float]:
        return [*self.level.pack(), self.kept_out]

    @classmethod
    def load(cls, s: Sequence[Any]) -> _Peers:
        peers = cls()
        peers.level, peers.kept_out = Level.load(s), int(s[3])
        return peers


class _Group:
    """Runs of one agent of one application."""

    __slots__ = ("context", "tokens_per_min", "usd_per_min")

    def __init__(self) -> None:
        self.context: dict[int, _Peers] = {}
        self.usd_per_min = _Peers()
        self.tokens_per_min = _Peers()


@dataclass(slots=True)
class _Watch:
    """One signal of one run: calls over or under in a row, and the open episode."""

    over: int = 0
    calm: int = 0
    first_at: float = 0.0
    id: str = ""
    since: float = 0.0
    said_at: float = 0.0
    count: int = 0

    def step(self, at: float, over: bool, p: Params) -> Phase | None:
        if over:
            if self.over == 0:
                self.first_at = at
            self.over, self.calm = min(self.over + 1, 1_000_000), 0
            if not self.id:
                return "on" if self.over >= p.dwell_calls else None
            self.count += 1
            return "still" if at - self.said_at >= p.still_every_s else None
        self.over, self.calm = 0, self.calm + 1
        return "off" if self.id and self.calm >= p.calm_calls else None

    def pack(self) -> list[Any]:
        return [self.over, self.calm, self.first_at, self.id, self.since, self.said_at, self.count]

    @classmethod
    def load(cls, s: Sequence[Any]) -> _Watch:
        return cls(int(s[0]), int(s[1]), float(s[2]), str(s[3]), float(s[4]), float(s[5]), int(s[6]))


class _Run:
    """One agent of one run."""

    __slots__ = (
        "app", "bucket", "calls", "children", "context", "fan_out", "first_at", "first_tokens", "labels", "last_at",
        "last_tokens", "learned_spend", "spend", "tokens_sum", "usd", "usd_known", "usd_sum",
    )  # fmt: skip

    def __init__(self, at: float, app: str, labels: dict[str, str]) -> None:
        self.app = app
        self.labels = labels
        self.first_at = self.last_at = at
        self.calls = 0
        self.bucket = -1
        self.first_tokens = self.last_tokens = 0
        self.usd_sum = self.tokens_sum = 0.0  # decaying, for the velocity
        self.usd = 0.0
        self.usd_known = False
        self.learned_spend = False
        self.children = 0
        self.context: _Watch | None = None
        self.spend: _Watch | None = None
        self.fan_out: _Watch | None = None


class AgentInflation:
    """Compares every agent run with other runs of the same agent.

    `agent.context`: input tokens of a call against those of other runs at the same step. In normal coding runs the prompt grows twelvefold
    from first to last call, so growth as such says nothing. Where a run goes further than any before it, the last
    known step is extended in proportion to the number of steps. `agent.spend`: dollars (tokens where no cost is told) a
    minute, against other runs' velocity. `agent.fan_out`: child runs of one run, against those of other runs of the application.

    Score: nats of a normal tail of the logarithm, z²/2. Levels are learned run by run, each run once per level, after it was scored;
    what is anomalous does not teach.

    When it misleads: two kinds of task under one agent name widen the spread and hide outliers. A change that hits every run at once is told
    for the first `relearn_runs` runs, then taken as normal. Runs whose events arrive late look slow, then fast. A child
    counts only where its events name the parent run.

    Args:
        params: see `Params`.
        budget: accepted so that all detectors are made alike; the limits are fixed z values and factors.

    Raises: ConfigError when params are out of range.
    """

    kind: ClassVar[str] = "agent_inflation"
    reads: ClassVar[Literal["events"]] = "events"
    types: ClassVar[tuple[type, ...]] = (LlmCall, AgentStep)

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params or Params()
        self._runs: OrderedDict[tuple[str, str], _Run] = OrderedDict()
        self._groups: OrderedDict[tuple[str, str], _Group] = OrderedDict()
        self._children: OrderedDict[str, str] = OrderedDict()
        self._fan_outs: OrderedDict[str, _Peers] = OrderedDict()

    def feed(self, batch: Sequence[Event]) -> list[Anomaly]:
        """Events in order; events without a run are passed over."""
        out: list[Anomaly] = []
        for event in batch:
            if type(event) is LlmCall:
                if event.run:
                    self._call(event, out)
            elif (
                type(event) is AgentStep and event.run and event.parent_run and event.parent_run != event.run
            ):
                self._child(event, out)
        return out

    def tick(self, now: float) -> list[Anomaly]:
        """Ends runs that have said nothing for `idle_s`."""
        out: list[Anomaly] = []
        oldest = now - self.params.idle_s
        while self._runs:
            key = next(iter(self._runs))
            if self._runs[key].last_at > oldest:
                break
            self._drop(key, now, out)
        return out

    def _drop(self, key: tuple[str, str], at: float, out: list[Anomaly]) -> None:
        run = self._runs.pop(key)
        for signal, watch in (
            ("agent.context", run.context),
            ("agent.spend", run.spend),
            ("agent.fan_out", run.fan_out),
        ):
            if watch is not None and watch.id:
                out.append(
                    self._say(run, signal, watch, "off", at, 0.0, 0.0, "", 0.0, {"why": "the run ended"})
                )
        if run.children:
            peers = self._fan_outs.setdefault(run.app, _Peers())
            self._fan_outs.move_to_end(run.app)
            _trim(self._fan_outs, self.params.max_groups)
            x = math.log(run.children)
            peers.offer(
                x, self._over(peers.level, x)[0] and run.children >= self.params.min_children, self.params
            )

    def _run_of(self, run_name: str, agent: str, event: LlmCall | AgentStep, out: list[Anomaly]) -> _Run:
        key = (run_name, agent)
        run = self._runs.get(key)
        if run is None:
            named = (
                ("run", run_name),
                ("agent", agent),
                ("app", event.app),
                ("team", event.team),
                ("tenant", event.tenant),
            )
            run = self._runs[key] = _Run(event.at, event.app, {k: v for k, v in named if v})
            while len(self._runs) > self.params.max_runs:
                self._drop(next(iter(self._runs)), event.at, out)
        else:
            self._runs.move_to_end(key)
        return run

    def _call(self, call: LlmCall, out: list[Anomaly]) -> None:
        run = self._run_of(call.run, call.agent, call, out)
        seconds = call.at - run.last_at
        run.last_at = max(run.last_at, call.at)
        if call.input_tokens is None or (call.error and not call.input_tokens):
            return
        name = (call.app, call.agent)
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group()
            _trim(self._groups, self.params.max_groups)
        else:
            self._groups.move_to_end(name)
        run.calls += 1
        self._context(call, run, group, out)
        self._spend(call, run, group, seconds, out)

    def _over(self, level: Level, x: float) -> tuple[bool, float]:
        """Whether a logarithm is out of proportion to a level, and its z."""
        p = self.params
        if level.n < p.warmup_runs:
            return False, 0.0
        z = level.z(x, p.floor_sd)
        return z >= p.z and x - level.mean >= math.log(p.factor), z

    def _context(self, call: LlmCall, run: _Run, group: _Group, out: list[Anomaly]) -> None:
        p = self.params
        tokens = call.input_tokens or 0
        bucket = bisect_right(_EDGES, run.calls) - 1
        x = math.log(max(1, tokens))
        own = group.context.get(bucket)
        level, beyond = (own.level if own is not None else Level()), 0.0
        known = bucket
        if level.n < p.warmup_runs:
            known = max(
                (b for b, peers in group.context.items() if b < bucket and peers.level.n >= p.warmup_runs),
                default=-1,
            )
            if known >= 0:
                # Nobody came so far: a prompt grows about in proportion to the steps taken.
                level, beyond = group.context[known].level, math.log(run.calls / _EDGES[known])
        over, z = self._over(level, x - max(0.0, beyond))
        over = over and tokens >= p.min_context_tokens
        expected = math.exp(level.mean + beyond) if level.n else 0.0
        if run.context is None and over:
            run.context = _Watch()
        if run.context is not None:
            phase = run.context.step(call.at, over, p)
            facts: _Facts = {
                "input_tokens": tokens,
                "usual_input_tokens": round(expected),
                "call_of_run": run.calls,
                "first_input_tokens": run.first_tokens,
                "previous_input_tokens": run.last_tokens,
                "compared_with_runs": level.n,
                "z": round(z, 2),
            }
            if beyond > 0:
                facts["extended_from_call"] = _EDGES[known]
            self._phase(
                run,
                "agent.context",
                run.context,
                phase,
                call,
                float(tokens),
                expected,
                "tokens",
                z,
                facts,
                out,
            )
        if bucket != run.bucket:
            run.bucket = bucket
            is_open = run.context is not None and bool(run.context.id)
            if own is None:
                own = group.context[bucket] = _Peers()
            own.offer(x, over or is_open, p)
        run.first_tokens = run.first_tokens or tokens
        run.last_tokens = tokens

    def _spend(self, call: LlmCall, run: _Run, group: _Group, seconds: float, out: list[Anomaly]) -> None:
        p = self.params
        fade = 0.5 ** (max(0.0, seconds) / p.spend_half_life_s)
        run.usd_sum = run.usd_sum * fade + (call.cost_usd or 0.0)
        run.tokens_sum = run.tokens_sum * fade + (call.input_tokens or 0) + (call.output_tokens or 0)
        run.usd += call.cost_usd or 0.0
        run.usd_known = run.usd_known or call.cost_usd is not None
        age = call.at - run.first_at
        if age < p.spend_half_life_s / 2:
            return  # a velocity over a few seconds is noise
        # What an unbroken stream would have left of itself by this age: without it young runs look slow.
        span_min = p.spend_half_life_s / math.log(2) * (1.0 - 0.5 ** (age / p.spend_half_life_s)) / 60.0
        unit, least = (
            ("usd/min", p.min_usd_per_min) if run.usd_known else ("tokens/min", p.min_tokens_per_min)
        )
        rate = (run.usd_sum if run.usd_known else run.tokens_sum) / span_min
        peers = group.usd_per_min if run.usd_known else group.tokens_per_min
        x = math.log(max(1e-9, rate))
        over, z = self._over(peers.level, x)
        over = over and rate >= least
        expected = math.exp(peers.level.mean) if peers.level.n else 0.0
        if run.spend is None and over:
            run.spend = _Watch()
        if run.spend is not None:
            phase = run.spend.step(call.at, over, p)
            facts: _Facts = {
                "velocity": round(rate, 4),
                "usual_velocity": round(expected, 4),
                "unit": unit,
                "usd_so_far": round(run.usd, 4),
                "calls": run.calls,
                "compared_with_runs": peers.level.n,
                "z": round(z, 2),
            }
            self._phase(run, "agent.spend", run.spend, phase, call, rate, expected, unit, z, facts, out)
        if not run.learned_spend and age >= p.spend_half_life_s:
            run.learned_spend = True
            peers.offer(x, over or (run.spend is not None and bool(run.spend.id)), p)

    def _child(self, step: AgentStep, out: list[Anomaly]) -> None:
        p = self.params
        if step.run in self._children:
            self._children.move_to_end(step.run)
            return
        self._children[step.run] = step.parent_run
        _trim(self._children, p.max_runs)
        parent = self._run_of(step.parent_run, "", step, out)
        parent.last_at = max(parent.last_at, step.at)
        parent.children += 1
        peers = self._fan_outs.get(parent.app)
        level = peers.level if peers is not None else Level()
        known = level.n >= p.warmup_runs
        over, z = self._over(level, math.log(parent.children))
        over = (
            (over and parent.children >= p.min_children)
            if known
            else parent.children >= p.children_without_baseline
        )
        if not over:
            return
        if parent.fan_out is None:
            # The children so far are the dwell: each of them was one more.
            parent.fan_out = _Watch(over=p.dwell_calls - 1, first_at=parent.first_at)
        phase = parent.fan_out.step(step.at, True, p)
        expected = math.exp(level.mean) if known else 0.0
        facts: _Facts = {
            "children": parent.children,
            "usual_children": round(expected, 1),
            "compared_with_runs": level.n,
        }
        if known:
            facts["z"] = round(z, 2)
        else:
            # A rule, not a probability: the score says by how much the limit is passed.
            facts["limit_without_baseline"] = p.children_without_baseline
            z = p.z * parent.children / p.children_without_baseline
        self._phase(
            parent,
            "agent.fan_out",
            parent.fan_out,
            phase,
            step,
            float(parent.children),
            expected,
            "children",
            z,
            facts,
            out,
        )

    def _phase(
        self, run: _Run, signal: str, watch: _Watch, phase: Phase | None, event: LlmCall | AgentStep, observed: float,
        expected: float, unit: str, z: float, facts: _Facts, out: list[Anomaly],
    ) -> None:  # fmt: skip
        if phase is None:
            return
        if phase == "on":
            watch.since, watch.count = min(watch.first_at, event.at), watch.over
            watch.id = anomaly_id(self.kind, signal, "", run.labels, watch.since)
        watch.said_at = event.at
        samples = (event.id or event.span,) if phase != "off" and (event.id or event.span) else ()
        out.append(
            self._say(run, signal, watch, phase, event.at, observed, expected, unit, z, facts, samples)
        )
        if phase == "off":
            watch.id = ""

    def _say(
        self, run: _Run, signal: str, watch: _Watch, phase: Phase, at: float, observed: float, expected: float, unit: str,
        z: float, facts: _Facts, samples: tuple[str, ...] = (),
    ) -> Anomaly:  # fmt: skip
        return Anomaly(
            id=watch.id, detector=self.kind, signal=signal, labels=dict(run.labels), at=at, since=watch.since, phase=phase,
            klass=signal.removeprefix("agent."), observed=round(observed, 6), expected=round(expected, 6), unit=unit,
            score=round(max(0.0, z) ** 2 / 2, 4), threshold=round(self.params.z**2 / 2, 4), n=watch.count,
            impact=round(max(0.0, 1.0 - expected / observed), 4) if observed > 0 else 0.0, evidence=facts, samples=samples,
        )  # fmt: skip

    def snapshot(self) -> bytes:
        state = [
            [[list(key), _pack(run)] for key, run in self._runs.items()],
            [
                [
                    list(key),
                    [[b, peers.pack()] for b, peers in g.context.items()],
                    g.usd_per_min.pack(),
                    g.tokens_per_min.pack(),
                ]
                for key, g in self._groups.items()
            ],
            list(self._children.items()),
            [[app, peers.pack()] for app, peers in self._fan_outs.items()],
        ]
        return pack_state(self.kind, _VERSION, state)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError for bytes of another detector or version."""
        runs, groups, children, fan_outs = unpack_state(state, self.kind, _VERSION)
        self._runs = OrderedDict((tuple(key), _load(packed)) for key, packed in runs)
        self._groups = OrderedDict()
        for key, context, usd, tokens in groups:
            group = self._groups[tuple(key)] = _Group()
            group.context = {int(b): _Peers.load(peers) for b, peers in context}
            group.usd_per_min, group.tokens_per_min = _Peers.load(usd), _Peers.load(tokens)
        self._children = OrderedDict((run, parent) for run, parent in children)
        self._fan_outs = OrderedDict((app, _Peers.load(peers)) for app, peers in fan_outs)


def _trim(known: OrderedDict[Any, Any], limit: int) -> None:
    while len(known) > limit:
        known.popitem(last=False)


def _pack(r: _Run) -> list[Any]:
    return [
        r.app, r.labels, r.first_at, r.last_at, r.calls, r.bucket, r.first_tokens, r.last_tokens, r.usd_sum, r.tokens_sum,
        r.usd, r.usd_known, r.learned_spend, r.children,
        *(None if w is None else w.pack() for w in (r.context, r.spend, r.fan_out)),
    ]  # fmt: skip


def _load(s: Sequence[Any]) -> _Run:
    r = _Run(float(s[2]), s[0], dict(s[1]))
    r.last_at, r.calls, r.bucket, r.first_tokens, r.last_tokens = (
        float(s[3]),
        int(s[4]),
        int(s[5]),
        int(s[6]),
        int(s[7]),
    )
    r.usd_sum, r.tokens_sum, r.usd = float(s[8]), float(s[9]), float(s[10])
    r.usd_known, r.learned_spend, r.children = bool(s[11]), bool(s[12]), int(s[13])
    r.context, r.spend, r.fan_out = (None if w is None else _Watch.load(w) for w in s[14:17])
    return r


__all__ = ["AgentInflation", "Params"]
