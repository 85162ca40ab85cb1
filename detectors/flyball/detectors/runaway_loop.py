"""Agent runs that go round in circles: repeated calls, cycles, failing streaks, agents that hand each other the turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.core.codec import pack_state, unpack_state
from flyball.core.errorclass import SCOPE_OF
from flyball.core.errors import ConfigError
from flyball.core.events import AgentStep, Event, LlmCall
from flyball.detectors._budget import PageBudget
from flyball.detectors._loops import (
    Action,
    Finding,
    Lane,
    Mark,
    Rules,
    is_handoff_name,
    is_polling_name,
)

SIGNAL: Final = "agent.loop"
_VERSION: Final = 1
_LANES: Final = 8  # agents told apart within one run
_LLM: Final = "\x00llm"  # the lane of failing model calls; no agent is called so
_TURNS: Final = frozenset({"agent", "handoff", "message"})
_Facts = dict[str, float | int | str | list[str]]


@dataclass(frozen=True, slots=True)
class Params:
    """Settings of `runaway_loop`.

    Args:
        rules: how much of each pattern is enough; see `Rules`.
        dwell_steps: steps in a row that must show a pattern before it is told; 1 tells at once.
        calm_steps: productive steps in a row (new call or new result, no error) after which the loop counts as left.
        idle_s: a run that says nothing for so long has ended.
        still_every_s: the least event time between two `still` of one run.
        max_runs: runs remembered, about 1 kB each; the one silent longest is forgotten first.
        polling_tools: tools that wait for something though their names do not say so.
        exempt_tools: tools whose steps are not looked at.

    Raises: ConfigError for values out of range.
    """

    rules: Rules = field(default_factory=Rules)
    dwell_steps: int = 1
    calm_steps: int = 2
    idle_s: float = 900.0
    still_every_s: float = 10.0
    max_runs: int = 50_000
    polling_tools: tuple[str, ...] = ()
    exempt_tools: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dwell_steps", "calm_steps", "max_runs"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 1, not {getattr(self, name)}", where="runaway_loop"
                )
        for name in ("idle_s", "still_every_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}", where="runaway_loop")
        rules = self.rules
        for name in ("repeats", "blind_repeats", "cycles", "failures", "returns", "stale"):
            if getattr(rules, name) < 2:
                raise ConfigError(
                    f"rules.{name} must be at least 2, not {getattr(rules, name)}", where="runaway_loop"
                )
        if not 8 <= rules.window <= 32:
            raise ConfigError(f"rules.window must be 8 to 32, not {rules.window}", where="runaway_loop")


@dataclass(slots=True)
class _Turns:
    """Who had the turn while nothing but agents spoke."""

    now: str = ""
    before: str = ""
    returns: int = 0
    mark: Mark = field(default_factory=Mark)


@dataclass(slots=True)
class _Episode:
    """A loop that was told and is not over."""

    lane: str
    klass: str
    labels: dict[str, str]
    since: float
    id: str
    begin: Mark
    said_at: float
    samples: list[str]


class _Run:
    __slots__ = ("app", "dwell", "episode", "lanes", "last_at", "llm_errors", "llm_mark", "seen", "steps", "team", "tenant", "tokens",
                 "turns", "usd")  # fmt: skip

    def __init__(self) -> None:
        self.lanes: dict[str, Lane] = {}
        self.app = self.team = self.tenant = ""
        self.tokens = 0
        self.usd = 0.0
        self.steps = 0
        self.last_at = 0.0
        self.dwell = 0
        self.llm_errors = 0
        self.llm_mark = Mark()
        self.turns: _Turns | None = None
        self.episode: _Episode | None = None
        self.seen: tuple[str, str, float] | None = None
        """Span (or id), scope and time of the step before: its copy by another instrumentation is not a repeat."""


class RunawayLoop:
    """Tells, per run, the moment at which a loop has shown itself.

    A run is judged by its tool calls as keyed hashes: equal hash, equal content. Patterns (`klass`): `repeat` (same call, same
    result, in a row), `cycle` (a period of 2 to 6 steps, three times, with equal results), `failing` (unsuccessful results
    outweigh successful ones), `ping_pong` (two agents pass the turn and nothing else happens), `no_progress` (nothing new
    in the last steps). A call that repeats with other steps between (re-running tests) or with other results is no loop;
    arguments that advance (pagination) are none; tools that wait, gaps that grow and machine-regular gaps are
    polling, and need many more repeats. A user's turn starts anew. A run that got far is given more patience.

    The score is a rule's, not a probability's: how often the pattern was seen over how often it must be (1 is enough); further
    patterns that hold at the same time add theirs. It spends nothing of the page budget.

    When it misleads: without hashes of arguments and results only failures, hand-overs and (with one of the two) longer
    streaks can be seen. An agent whose every result differs by a timestamp repeats unseen until the sizes give it away (20 repeats). Sub-agents
    of the same name that run in parallel are taken for one.

    Args:
        params: see `Params`.
        budget: accepted so that all detectors are made alike; not used.

    Raises: ConfigError when params are out of range.
    Source: thresholds of OpenCode, CrewAI and others for equal calls; patience measured on recorded good runs.
    """

    kind: ClassVar[str] = "runaway_loop"
    reads: ClassVar[Literal["events"]] = "events"
    types: ClassVar[tuple[type, ...]] = (AgentStep, LlmCall)

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params or Params()
        self._runs: OrderedDict[str, _Run] = OrderedDict()

    def feed(self, batch: Sequence[Event]) -> list[Anomaly]:
        """Events in order; events without a run are passed over."""
        out: list[Anomaly] = []
        for event in batch:
            if type(event) is LlmCall:
                if event.run:
                    self._call(event, out)
            elif type(event) is AgentStep and event.run:
                self._step(event, out)
        return out

    def tick(self, now: float) -> list[Anomaly]:
        """Ends runs that have said nothing for `idle_s`."""
        out: list[Anomaly] = []
        oldest = now - self.params.idle_s
        while self._runs:
            name = next(iter(self._runs))
            if self._runs[name].last_at > oldest:
                break
            self._drop(name, now, "the run ended", out)
        return out

    def _drop(self, name: str, at: float, why: str, out: list[Anomaly]) -> None:
        run = self._runs.pop(name)
        if run.episode is not None:
            out.append(self._say(run, run.episode, "off", at, None, why))

    def _run_of(self, name: str, event: AgentStep | LlmCall, out: list[Anomaly]) -> _Run:
        run = self._runs.get(name)
        if run is None:
            run = self._runs[name] = _Run()
            while len(self._runs) > self.params.max_runs:
                self._drop(next(iter(self._runs)), event.at, "forgotten: more runs than max_runs", out)
        else:
            self._runs.move_to_end(name)
        run.app, run.team, run.tenant = (
            run.app or event.app,
            run.team or event.team,
            run.tenant or event.tenant,
        )
        run.last_at = max(run.last_at, event.at)
        return run

    def _call(self, call: LlmCall, out: list[Anomaly]) -> None:
        run = self._run_of(call.run, call, out)
        run.tokens += (call.input_tokens or 0) + (call.output_tokens or 0)
        run.usd += call.cost_usd or 0.0
        if not call.error:
            run.llm_errors = 0
            if run.episode is not None and run.episode.lane == _LLM:
                out.append(self._say(run, run.episode, "off", call.at, None, "a call succeeded"))
                run.episode = None
        elif SCOPE_OF.get(call.error) == "app":
            # The application's own faults (context too long, bad request) repeat because the agent does not
            # learn from them. A provider's faults hit every run at once and are another detector's.
            if run.llm_errors == 0:
                run.llm_mark = Mark(call.at, run.steps, run.tokens, run.usd)
            run.llm_errors += 1
            run.steps += 1
            self._llm_failing(call, run, out)
        if call.agent:
            self._turn(call, run, out)

    def _llm_failing(self, call: LlmCall, run: _Run, out: list[Anomaly]) -> None:
        needed = self.params.rules.failures + 1
        if run.llm_errors < needed:
            return
        facts: _Facts = {
            "unsuccessful": run.llm_errors,
            "error": call.error,
            "tools_failing": f"model {call.model}",
        }
        self._judge(
            run, call, _LLM, [Finding("failing", run.llm_errors, needed, 1, run.llm_mark, facts)], out
        )

    def _step(self, step: AgentStep, out: list[Anomaly]) -> None:
        if step.tool in self.params.exempt_tools and step.tool:
            return
        run = self._run_of(step.run, step, out)
        if step.kind == "user":
            self._user(step, run, out)
        elif step.kind in _TURNS or (step.kind == "tool" and is_handoff_name(step.tool)):
            if step.agent:
                self._turn(step, run, out)
        elif step.kind == "tool" or step.tool:
            self._tool(step, run, out)

    def _user(self, step: AgentStep, run: _Run, out: list[Anomaly]) -> None:
        run.turns = None
        run.dwell = 0
        for lane in run.lanes.values():
            lane.settle()
        if run.episode is not None:
            out.append(self._say(run, run.episode, "off", step.at, None, "the user took the turn"))
            run.episode = None

    def _tool(self, step: AgentStep, run: _Run, out: list[Anomaly]) -> None:
        identity = step.span or step.id
        if run.seen is not None and self._is_copy(step, identity, run):
            return
        run.seen = (identity, step.scope, step.at)
        run.turns = None
        lane = run.lanes.get(step.agent)
        if lane is None:
            lane = run.lanes[step.agent] = Lane()
            if len(run.lanes) > _LANES:
                del run.lanes[next(iter(run.lanes))]
        begin = Mark(step.at, run.steps, run.tokens, run.usd)
        run.steps += 1
        polling = is_polling_name(step.tool) or step.tool in self.params.polling_tools
        lane.add(
            Action(
                step.at, step.tool, step.args_hash, step.result_hash, step.result_bytes, step.error, polling
            ),
            begin,
        )
        self._judge(run, step, step.agent, lane.findings(self.params.rules), out)

    def _is_copy(self, step: AgentStep, identity: str, run: _Run) -> bool:
        """The same step told twice: same span, or by another instrumentation at the same time with equal hashes."""
        assert run.seen is not None
        before, scope, at = run.seen
        if identity and identity == before:
            return True
        if not (step.scope and scope and step.scope != scope and abs(step.at - at) < 1.0):
            return False
        lane = run.lanes.get(step.agent)
        return lane is not None and lane.tool == step.tool

    def _turn(self, event: AgentStep | LlmCall, run: _Run, out: list[Anomaly]) -> None:
        turns = run.turns
        if turns is None:
            run.turns = _Turns(now=event.agent, mark=Mark(event.at, run.steps, run.tokens, run.usd))
            return
        if event.agent == turns.now:
            return
        if event.agent == turns.before:
            turns.returns += 1
        else:
            turns.returns = 0
            turns.mark = Mark(event.at, run.steps, run.tokens, run.usd)
        turns.before, turns.now = turns.now, event.agent
        run.steps += 1
        needed = self.params.rules.returns
        found = []
        if turns.returns >= needed:
            facts: _Facts = {
                "agents": sorted((turns.now, turns.before)),
                "between": "no tool call and no user's turn",
            }
            found.append(Finding("ping_pong", turns.returns, needed, 2, turns.mark, facts))
        self._judge(run, event, "", found, out)

    def _judge(
        self, run: _Run, event: AgentStep | LlmCall, lane_name: str, found: list[Finding], out: list[Anomaly]
    ) -> None:
        episode = run.episode
        if episode is not None:
            self._follow(run, episode, event, lane_name, found, out)
            return
        run.dwell = run.dwell + 1 if found else 0
        if run.dwell < self.params.dwell_steps or not found:
            return
        top = found[0]
        tool = event.tool if isinstance(event, AgentStep) and top.klass != "ping_pong" else ""
        if top.klass in ("cycle", "no_progress") or (
            top.klass == "failing" and top.facts["tools_failing"] == "several"
        ):
            tool = ""
        labels = {
            k: v
            for k, v in (
                ("run", event.run), ("agent", event.agent), ("app", run.app), ("team", run.team), ("tenant", run.tenant),
                ("tool", tool),
            )
            if v
        }  # fmt: skip
        since = min(top.begin.at, event.at)
        name = anomaly_id(self.kind, SIGNAL, top.klass, labels, since)
        run.episode = _Episode(lane_name, top.klass, labels, since, name, top.begin, event.at, _ids(event))
        out.append(self._say(run, run.episode, "on", event.at, found, ""))

    def _follow(
        self, run: _Run, episode: _Episode, event: AgentStep | LlmCall, lane_name: str, found: list[Finding],
        out: list[Anomaly],
    ) -> None:  # fmt: skip
        if found:
            if event.at - episode.said_at >= self.params.still_every_s:
                episode.said_at = event.at
                episode.samples = (episode.samples + _ids(event))[-5:]
                out.append(self._say(run, episode, "still", event.at, found, ""))
            return
        lane = run.lanes.get(lane_name)
        progressed = (
            lane is not None
            and isinstance(event, AgentStep)
            and lane.run_productive >= self.params.calm_steps
        )
        if (progressed and lane_name == episode.lane) or (progressed and episode.klass == "ping_pong"):
            out.append(self._say(run, episode, "off", event.at, None, "new calls and results again"))
            run.episode = None
            run.dwell = 0

    def _say(
        self, run: _Run, episode: _Episode, phase: Phase, at: float, found: list[Finding] | None, why: str
    ) -> Anomaly:
        begin = episode.begin
        evidence: _Facts = {
            "pattern": episode.klass,
            "steps": run.steps - begin.step,
            "seconds": round(max(0.0, at - episode.since), 3),
        }
        if run.tokens:
            evidence["tokens"] = run.tokens - begin.tokens
        if run.usd:
            evidence["usd"] = round(run.usd - begin.usd, 6)
        score = observed = expected = 0.0
        n = run.steps - begin.step
        if found:
            top = found[0]
            score = sum(f.strength for f in found)
            observed, expected = top.count, top.needed
            evidence |= {
                "pattern": top.klass,
                "count": round(top.count, 2),
                "needed": top.needed,
                "period": top.period,
            }
            evidence |= top.facts
            if len(found) > 1:
                evidence["also"] = [f.klass for f in found[1:]]
        else:
            evidence["why"] = why
        share = (run.tokens - begin.tokens) / run.tokens if run.tokens else n / max(1, run.steps)
        return Anomaly(
            id=episode.id, detector=self.kind, signal=SIGNAL, labels=dict(episode.labels), at=at, since=episode.since,
            phase=phase, klass=episode.klass, observed=observed, expected=expected, unit="times", score=round(score, 4),
            threshold=1.0, n=n, impact=round(min(1.0, max(0.0, share)), 4), evidence=evidence,
            samples=tuple(episode.samples),
        )  # fmt: skip

    def snapshot(self) -> bytes:
        state = [[name, _pack_run(run)] for name, run in self._runs.items()]
        return pack_state(self.kind, _VERSION, state)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError for bytes of another detector or version."""
        self._runs = OrderedDict(
            (name, _load_run(packed)) for name, packed in unpack_state(state, self.kind, _VERSION)
        )


def _ids(event: AgentStep | LlmCall) -> list[str]:
    name = event.id or event.span
    return [name] if name else []


def _pack_run(run: _Run) -> list[Any]:
    turns, episode = run.turns, run.episode
    return [
        [[name, lane.pack()] for name, lane in run.lanes.items()],
        run.app, run.team, run.tenant, run.tokens, run.usd, run.steps, run.last_at, run.dwell, run.llm_errors,
        None if turns is None else [turns.now, turns.before, turns.returns, turns.mark.pack()],
        None if episode is None else [
            episode.lane, episode.klass, episode.labels, episode.since, episode.id, episode.begin.pack(), episode.said_at,
            episode.samples,
        ],
        run.seen,
        run.llm_mark.pack(),
    ]  # fmt: skip


def _load_run(s: Sequence[Any]) -> _Run:
    run = _Run()
    run.lanes = {name: Lane.load(lane) for name, lane in s[0]}
    run.app, run.team, run.tenant = s[1:4]
    run.tokens, run.usd, run.steps, run.last_at = int(s[4]), float(s[5]), int(s[6]), float(s[7])
    run.dwell, run.llm_errors = int(s[8]), int(s[9])
    if s[10] is not None:
        run.turns = _Turns(s[10][0], s[10][1], int(s[10][2]), Mark.load(s[10][3]))
    if s[11] is not None:
        e = s[11]
        run.episode = _Episode(
            e[0], e[1], dict(e[2]), float(e[3]), e[4], Mark.load(e[5]), float(e[6]), list(e[7])
        )
    if s[12] is not None:
        run.seen = (s[12][0], s[12][1], float(s[12][2]))
    run.llm_mark = Mark.load(s[13])
    return run


__all__ = ["Params", "RunawayLoop"]
