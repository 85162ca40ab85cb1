"""Runs of agents: model calls and tools in turn, with prompts that grow, and the habits that only look like loops.

A good coding run calls 35 times (median), its prompt grows about 13-fold from first to last call, and two in three
repeat one action three times or more: the tests, run again after edits, with other results. A researcher pages through
results (arguments move on) and polls an export with growing gaps (arguments and result stay, the gaps grow). A run
that loops does none of this: the same call, the same result, at a steady pace, and it does not end.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np

from flyball.core.events import AgentStep
from flyball.lab._draws import generator, mix_int, uniform_int
from flyball.lab.estate import Agent, Estate
from flyball.lab.faults import AgentLoop, LookAlike

MEAN_CALLS: Final[dict[str, float]] = {"coder": 39.0, "researcher": 15.0, "support": 9.0}
SPAWN_BLOCK_S: Final = 600.0
KNOCKS: Final = 3
KNOCKING_SHARE: Final = 0.4


@dataclass(frozen=True, slots=True)
class Turn:
    """One model call and the step after it. `grow` is what the turn adds to the next prompt; `kind` empty: no step."""

    output: int
    grow: int
    think_s: float
    kind: str = "tool"
    tool: str = ""
    args: int = 0
    result: int = 0
    result_bytes: int = 0
    latency_s: float = 0.5
    error: str = ""


class Turns:
    """The turns of one run, drawn as they come up. Copying it copies where it stands: a generator alone cannot be copied.

    `skewed` are median and sigma of the length of the first prompt, which is drawn before any turn.
    """

    def __init__(
        self,
        style: Callable[[np.random.Generator], Iterator[Turn]],
        seed: tuple[int, ...],
        skewed: tuple[float, float],
    ) -> None:
        self._made_of = (style, seed, skewed)
        rng = generator(*seed)
        self.prompt_tokens = int(_skewed(rng, *skewed))
        self._turns, self._taken = style(rng), 0

    def take(self) -> Turn | None:
        self._taken += 1
        return next(self._turns, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:
        again = Turns(*self._made_of)
        again._taken = self._taken
        next(islice(again._turns, self._taken, self._taken), None)
        return again


@dataclass(slots=True)
class Run:
    """One run as it stands. `knocks`: how often it came back although it was blocked."""

    number: int
    name: str
    agent: int
    app: int
    tenant: int
    turns: Turns
    prompt_tokens: int
    current: Turn
    calls: int = 0
    steps: int = 0
    failures: int = 0
    knocks: int = 0
    loop: AgentLoop | LookAlike | None = None


class Wanted(NamedTuple):
    """A model call that a run wants to make; `unit` is one value for the whole run."""

    start: float
    run: int
    uid: int
    agent: int
    app: int
    tenant: int
    input: int
    prefix: int
    output: int
    tools: bool
    unit: int


def _skewed(rng: np.random.Generator, median: float, sigma: float) -> float:
    return float(median * math.exp(sigma * rng.standard_normal()))


def coder_turns(rng: np.random.Generator) -> Iterator[Turn]:
    """Explore, edit, run the tests again, until they pass."""
    n = int(np.clip(_skewed(rng, 35, 0.45), 16, 150))
    reruns = int(np.clip(round(_skewed(rng, 3.15, 0.6)), 2, n // 3))
    explore = max(3, int(n * 0.35))
    test_turns = set(np.linspace(explore + 1, n - 2, reruns).astype(int).tolist())
    tests = int(rng.integers(1, 1 << 60))
    red = int(
        rng.choice(7, p=(0.42, 0.32, 0.16, 0.05, 0.03, 0.01, 0.01))
    )  # runs of the tests that fail, first ones
    result, ran = int(rng.integers(1 << 62)), 0
    for i in range(n):
        output = max(8, int(_skewed(rng, 88, 1.2)))
        grow = int(np.clip(_skewed(rng, 314, 1.05), 40, 15_000))
        think = _skewed(rng, 0.4, 0.5)
        size = max(20, grow * 3)
        if i in test_turns:
            if rng.random() > 0.1:  # now and then an edit changed nothing that the tests see
                result = int(rng.integers(1 << 62))
            error = "exit_1" if ran < min(red, reruns - 1) else ""
            yield Turn(output, grow, think, tool="bash.test", args=tests, result=result, result_bytes=size,
                       latency_s=_skewed(rng, 6, 0.7), error=error)  # fmt: skip
            ran += 1
            continue
        tool = ("bash.grep", "bash.cat", "bash.ls")[int(rng.integers(3))] if i < explore else "edit"
        if rng.random() < 0.2:
            tool = "bash.cat"
        error = "exit_1" if rng.random() < 0.11 else ""
        yield Turn(output, grow, think, tool=tool, args=int(rng.integers(1 << 62)), result=int(rng.integers(1 << 62)),
                   result_bytes=size, latency_s=_skewed(rng, 0.6, 0.9), error=error)  # fmt: skip


def researcher_turns(rng: np.random.Generator) -> Iterator[Turn]:
    """Search, page through the results, poll an export, read, write it up."""
    query = int(rng.integers(1 << 60))
    for _ in range(int(rng.integers(1, 4))):
        yield Turn(60, int(_skewed(rng, 900, 0.6)), 0.3, tool="web.search", args=int(rng.integers(1 << 62)),
                   result=int(rng.integers(1 << 62)), result_bytes=4000, latency_s=_skewed(rng, 0.8, 0.4))  # fmt: skip
    pages = int(np.clip(_skewed(rng, 6, 0.8), 2, 40))
    for page in range(pages):
        yield Turn(35, int(_skewed(rng, 1300, 0.4)), 0.2, tool="records.list", args=mix_int(query + page) >> 2,
                   result=int(rng.integers(1 << 62)), result_bytes=6000, latency_s=_skewed(rng, 0.5, 0.4))  # fmt: skip
    if rng.random() < 0.4:
        job, pending, gap = int(rng.integers(1 << 62)), int(rng.integers(1 << 62)), 2.0
        for _ in range(int(rng.integers(2, 8))):
            yield Turn(
                14, 60, gap, tool="export.status", args=job, result=pending, result_bytes=40, latency_s=0.1
            )
            gap = min(gap * 2.0, 60.0)
        yield Turn(14, 90, 0.3, tool="export.status", args=job, result=int(rng.integers(1 << 62)), result_bytes=90,
                   latency_s=0.1)  # fmt: skip
    for _ in range(int(rng.integers(1, 5))):
        yield Turn(150, int(_skewed(rng, 1500, 0.7)), 0.5, tool="web.read", args=int(rng.integers(1 << 62)),
                   result=int(rng.integers(1 << 62)), result_bytes=9000, latency_s=_skewed(rng, 1.2, 0.6))  # fmt: skip
    yield Turn(int(_skewed(rng, 900, 0.4)), 0, 0.0, kind="")


def support_turns(rng: np.random.Generator) -> Iterator[Turn]:
    """A customer and tools in turn."""
    for i in range(int(np.clip(_skewed(rng, 8, 0.5), 3, 30))):
        if i % 3 == 0:
            yield Turn(int(_skewed(rng, 70, 0.5)), int(_skewed(rng, 120, 0.6)), 0.0, kind="user",
                       args=int(rng.integers(1 << 62)), latency_s=_skewed(rng, 20, 0.7))  # fmt: skip
        else:
            tool = ("orders.get", "user.get", "flights.search", "booking.change")[int(rng.integers(4))]
            error = "not_found" if rng.random() < 0.07 else ""
            yield Turn(45, int(_skewed(rng, 350, 0.8)), 0.2, tool=tool, args=int(rng.integers(1 << 62)),
                       result=int(rng.integers(1 << 62)), result_bytes=1200, latency_s=_skewed(rng, 0.4, 0.5),
                       error=error)  # fmt: skip
    yield Turn(90, 0, 0.0, kind="")


def looping_turns(rng: np.random.Generator, pattern: str) -> Iterator[Turn]:
    """A few good turns, then round and round without end."""
    for _ in range(3):
        yield Turn(60, 500, 0.3, tool="web.search", args=int(rng.integers(1 << 62)), result=int(rng.integers(1 << 62)),
                   result_bytes=3000, latency_s=0.6)  # fmt: skip
    period = 1 if pattern == "repeat" else 2
    stuck = [(int(rng.integers(1 << 62)), int(rng.integers(1 << 62))) for _ in range(period)]
    tools = ("orders.search", "records.list")
    i = 0
    while True:
        args, result = stuck[i % period]
        yield Turn(
            40, 130, 0.2, tool=tools[i % period], args=args, result=result, result_bytes=60, latency_s=0.4
        )
        i += 1


def paging_turns(rng: np.random.Generator) -> Iterator[Turn]:
    """One list, 500 pages of it: the same tool all along, the cursor moves on."""
    query = int(rng.integers(1 << 60))
    for page in range(500):
        yield Turn(30, 25, 0.1, tool="records.list", args=mix_int(query + page) >> 2,
                   result=int(rng.integers(1 << 62)), result_bytes=6000, latency_s=_skewed(rng, 0.3, 0.3))  # fmt: skip
    yield Turn(300, 0, 0.0, kind="")


def polling_turns(rng: np.random.Generator) -> Iterator[Turn]:
    """Asks for the state of one job until it is done: same question, same answer, longer and longer pauses."""
    yield Turn(40, 200, 0.2, tool="export.start", args=int(rng.integers(1 << 62)), result=int(rng.integers(1 << 62)),
               result_bytes=90, latency_s=0.4)  # fmt: skip
    job, pending, gap = int(rng.integers(1 << 62)), int(rng.integers(1 << 62)), 3.0
    for _ in range(14):
        yield Turn(
            14, 60, gap, tool="export.status", args=job, result=pending, result_bytes=40, latency_s=0.1
        )
        gap = min(gap * 1.6, 60.0)
    yield Turn(14, 90, 0.3, tool="export.status", args=job, result=int(rng.integers(1 << 62)), result_bytes=90,
               latency_s=0.1)  # fmt: skip
    yield Turn(200, 0, 0.0, kind="")


def retesting_turns(rng: np.random.Generator) -> Iterator[Turn]:
    """Edit, run the tests, again and again: the command stays, what it says changes."""
    tests = int(rng.integers(1, 1 << 60))
    for _ in range(25):
        yield Turn(120, 300, 0.5, tool="edit", args=int(rng.integers(1 << 62)), result=int(rng.integers(1 << 62)),
                   result_bytes=900, latency_s=0.3)  # fmt: skip
        yield Turn(40, 400, 0.3, tool="bash.test", args=tests, result=int(rng.integers(1 << 62)), result_bytes=1200,
                   latency_s=_skewed(rng, 4, 0.4), error="exit_1" if rng.random() < 0.6 else "")  # fmt: skip
    yield Turn(150, 0, 0.0, kind="")


STYLES: Final[dict[str, Callable[[np.random.Generator], Iterator[Turn]]]] = {
    "coder": coder_turns,
    "researcher": researcher_turns,
    "support": support_turns,
    "repeat": partial(looping_turns, pattern="repeat"),
    "cycle": partial(looping_turns, pattern="cycle"),
    "pages": paging_turns,
    "polls": polling_turns,
    "retests": retesting_turns,
}
"""How a run goes: by its agent, or by what is wrong with it."""


class Agents:
    """All runs of the estate. The simulator asks for the calls that are due and tells what became of them."""

    def __init__(self, estate: Estate, seed: int, start_at: float, rate: float) -> None:
        self.estate, self.seed = estate, seed
        self.names: list[str] = []
        self._live: dict[int, Run] = {}
        self._due: list[tuple[float, int]] = []
        self._spawned_to = start_at
        self._start_at = start_at
        mean = sum(a.share * MEAN_CALLS[a.style] for a in estate.agents)
        self._runs_per_s = rate / mean if estate.agents else 0.0
        self._salt = mix_int(seed ^ 0xA6E)

    @property
    def live(self) -> int:
        return len(self._live)

    def spawn(self, until: float) -> None:
        """Starts the runs that begin before the block of `until` ends."""
        first = int(self._spawned_to // SPAWN_BLOCK_S)
        while first * SPAWN_BLOCK_S <= until:
            rng = generator(self.seed, 6, first)
            shares = np.array([a.share for a in self.estate.agents])
            n = int(rng.poisson(self._runs_per_s * SPAWN_BLOCK_S))
            starts = np.sort(first * SPAWN_BLOCK_S + SPAWN_BLOCK_S * rng.random(n))
            agents = rng.choice(len(shares), size=n, p=shares / shares.sum())
            tenants = rng.choice(self.estate.n_tenants, size=n, p=self.estate.tenant_weights)
            for i, (start, agent, tenant) in enumerate(zip(starts, agents, tenants, strict=True)):
                if start >= self._start_at:
                    key = first * 4096 + i
                    self._begin(float(start), int(agent), int(tenant), key, None)
            first += 1
        self._spawned_to = max(self._spawned_to, first * SPAWN_BLOCK_S)

    def begin_loop(self, fault: AgentLoop | LookAlike, start: float, number: int) -> str:
        """Starts the run that loops, or seems to; returns its name."""
        agent = self.estate.agent_index[fault.agent]
        tenant = int(uniform_int(self._salt + number, 9) * 20)
        return self._begin(start, agent, tenant, (1 << 50) + number, fault)

    def _begin(
        self, start: float, agent: int, tenant: int, key: int, loop: AgentLoop | LookAlike | None
    ) -> str:
        described: Agent = self.estate.agents[agent]
        app = self.estate.app_index[described.app]
        spec = self.estate.apps[app]
        style = STYLES[described.style if loop is None else loop.pattern]
        turns = Turns(
            style,
            (self.seed, 7, key & 0xFFFFFFFF, key >> 32),
            (spec.input_median_tokens, spec.input_sigma),
        )
        first = turns.take()
        if first is None:
            raise ValueError(f"a run of {described.name} has no turn")
        number = len(self.names)
        name = f"{described.name}-{mix_int(key ^ self._salt):016x}"
        self.names.append(name)
        self._live[number] = Run(
            number, name, agent, app, tenant, turns, turns.prompt_tokens, first, loop=loop
        )
        heapq.heappush(self._due, (start, number))
        return name

    def due(self, until: float) -> list[Wanted]:
        """The model calls that runs want to start at or before `until`, in order."""
        wanted = []
        while self._due and self._due[0][0] <= until:
            start, number = heapq.heappop(self._due)
            run = self._live[number]
            if run.loop is not None and start >= run.loop.end:
                del self._live[number]
                continue
            prefix = run.prompt_tokens - run.current.grow if run.calls else run.prompt_tokens // 2
            uid = mix_int(
                mix_int(int(run.name[-16:], 16)) + run.calls + 7919 * run.failures + 104729 * run.knocks
            )
            wanted.append(Wanted(start, number, uid, run.agent, run.app, run.tenant, run.prompt_tokens,
                                 max(prefix, 0), run.current.output, run.current.kind == "tool",
                                 int(run.name[-16:], 16)))  # fmt: skip
        return wanted

    def set_loop(self, number_name: str, fault: AgentLoop | LookAlike) -> None:
        """Gives a looping run its fault's new end."""
        for run in self._live.values():
            if run.name == number_name:
                run.loop = fault

    def completed(self, number: int, end: float, ok: bool, blocked: bool) -> AgentStep | None:
        """A run's call is over: the step that follows it, if any; the next call is queued."""
        run = self._live.get(number)
        if run is None:
            return None
        if blocked:
            self._knock_or_end(run, end)
            return None
        if not ok:
            run.failures += 1
            if run.failures > 3:
                del self._live[number]
            else:
                heapq.heappush(self._due, (end + 4.0 * 2.0**run.failures, number))
            return None
        turn, run.calls = run.current, run.calls + 1
        step_end = end + turn.latency_s
        step = self._step(run, turn, step_end) if turn.kind else None
        following = run.turns.take()
        if following is None:
            del self._live[number]
        else:
            run.prompt_tokens += turn.grow
            run.current = following
            heapq.heappush(self._due, (step_end + turn.think_s, number))
        return step

    def _knock_or_end(self, run: Run, end: float) -> None:
        """A refusal that is not to be retried ends most frameworks' runs; some are started again by what is around them,
        at growing gaps, and give up after `KNOCKS` times."""
        patient = uniform_int(int(run.name[-16:], 16), 11) < KNOCKING_SHARE
        if patient and run.knocks < KNOCKS:
            run.knocks += 1
            heapq.heappush(self._due, (end + 10.0 * 2.0 ** (run.knocks - 1), run.number))
        else:
            del self._live[run.number]

    def loop_of(self, number: int) -> AgentLoop | LookAlike | None:
        run = self._live.get(number)
        return run.loop if run is not None else None

    def _step(self, run: Run, turn: Turn, at: float) -> AgentStep:
        run.steps += 1
        app = self.estate.apps[run.app]
        return AgentStep(
            at=at, run=run.name, app=app.name, agent=self.estate.agents[run.agent].name, team=app.team,
            tenant=self.estate.tenants[run.tenant], kind=turn.kind, tool=turn.tool, step=run.steps,
            args_hash=f"{turn.args:016x}", result_hash=f"{turn.result:016x}" if turn.kind == "tool" else "",
            result_bytes=turn.result_bytes, error=turn.error, latency_s=round(turn.latency_s, 4),
            id=f"{run.name}-{run.steps}", trace=run.name, scope="lab.sdk",
        )  # fmt: skip
