"""The estate brought to life in virtual time: batches of events as their senders would deliver them.

`step(until)` gives every batch that arrives by `until`, in order of arrival. What happens depends on the seed, the faults
and the directives, not on the size of the steps, as long as directives change only between steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec
import numpy as np

from flyball.core.directives import Directive, Enforced
from flyball.core.errorclass import CLASSES
from flyball.core.errors import ConfigError
from flyball.core.events import AgentStep, Batch, Change, Evaluation, Event, LlmCall
from flyball.core.ids import short_id
from flyball.lab._draws import Records, generator, mix, mix_int, unit_interval
from flyball.lab.agents import Agents, Wanted
from flyball.lab.estate import Estate, Sender
from flyball.lab.faults import (
    AgentLoop,
    AnyFault,
    BudgetBurn,
    GpuThrottle,
    GpuXid,
    LookAlike,
    PromptInflation,
)
from flyball.lab.gateway import CODES, Answers, Gateway
from flyball.lab.gpus import NodeState
from flyball.lab.traffic import BLOCK_S, CALL, DAY_S, Traffic

START_AT: Final = 1_790_000_000.0
"""Where virtual time begins unless told otherwise: an afternoon in September 2026, UTC."""
MAX_EVIDENCE: Final = 400


@dataclass
class Shown:
    """What a fault has shown so far: the first events that bear its mark, as (at, tenant)."""

    first: list[tuple[float, int]] = field(default_factory=list)
    count: int = 0

    def evidence_at(self, enough: int, min_tenants: int, lasts_s: float = 0.0) -> float | None:
        """When the `enough`-th event that shows the fault ended, of at least `min_tenants` tenants and `lasts_s` after the first
        of them; None if never."""
        tenants: set[int] = set()
        told = sorted(self.first)
        for n, (at, tenant) in enumerate(told, start=1):
            tenants.add(tenant)
            if n >= enough and len(tenants) >= min_tenants and at - told[0][0] >= lasts_s:
                return at
        return None


@dataclass
class Totals:
    """What went in and came out. Every logical call comes to exactly one end: `answered` + `failed` = `calls` at rest."""

    calls: int = 0
    attempts: int = 0
    answered: int = 0
    failed: int = 0
    events: int = 0
    cost_usd: float = 0.0


@dataclass
class _Names:
    prompts: list[str]
    runs: list[str]


class Simulator:
    """One estate, one seed, one course of virtual time.

    Args:
        estate: what there is; `estate.rate` is logical calls a second.
        seed: the same seed gives the same events.
        start_at: seconds since the epoch.
    """

    def __init__(self, estate: Estate, seed: int, start_at: float = START_AT) -> None:
        self.estate, self.seed, self.start_at, self.now = estate, seed, start_at, start_at
        self.totals = Totals()
        self.faults: list[AnyFault] = []
        self.shown: list[Shown] = []
        agent_rate = estate.rate * estate.agent_share if estate.agents else 0.0
        self._traffic = Traffic(estate, seed, estate.rate - agent_rate)
        self._agents = Agents(estate, seed, start_at, agent_rate)
        self._names = _Names([a.prompt for a in estate.apps], self._agents.names)
        self.gateway = Gateway(estate, seed, self._names)
        self._live_prompt = np.arange(len(estate.apps), dtype=np.int32)
        self._deploys: list[tuple[float, int, int]] = []
        self._deploys_to = int(start_at // DAY_S)
        self._block = int(start_at // BLOCK_S)
        self._pending: list[Records] = []
        self._outbox: dict[tuple[float, str], list[Event]] = {}
        self._phase = {
            s.name: (mix_int(seed + i) % 1000) / 1000 for i, s in enumerate((*estate.pods, estate.sdk))
        }
        self._nodes = [NodeState(estate, seed, i) for i in range(len(estate.nodes))]
        self._next_scrape = [
            (int(start_at // estate.scrape_s) + 1) * estate.scrape_s + 1.0 + 3.7 * i
            for i in range(len(estate.nodes))
        ]

    # -- switches -----------------------------------------------------------------------------------------------

    def add_fault(self, fault: AnyFault) -> int:
        """Schedules a fault; returns its number. Raises: ConfigError when it names what the estate has not."""
        estate = self.estate
        if isinstance(fault, GpuXid | GpuThrottle):
            fault = replace(fault, deployment=estate.node_of(fault.gpu).deployment)
        if isinstance(fault, AgentLoop | LookAlike):
            if fault.agent not in estate.agent_index:
                raise ConfigError(f"no agent {fault.agent!r} in the estate", where="lab")
            name = self._agents.begin_loop(fault, max(fault.start, self.now), len(self.faults))
            fault = replace(fault, run=name)
            self._agents.set_loop(name, fault)
        if isinstance(fault, PromptInflation):
            fault = replace(fault, spread_log=self._spread(estate.app_index[fault.app], fault.start))
            if fault.prompt not in self._names.prompts:
                self._names.prompts.append(fault.prompt)
            self._announce(fault.start, fault.app, fault.prompt)
            if fault.end < math.inf:
                self._roll_back(fault)
        self.faults.append(fault)
        self.shown.append(Shown())
        return len(self.faults) - 1

    def end_fault(self, number: int, at: float) -> None:
        """Takes a fault back from `at` on."""
        fault = replace(self.faults[number], end=at)
        self.faults[number] = fault
        if isinstance(fault, AgentLoop | LookAlike):
            self._agents.set_loop(fault.run, fault)
        if isinstance(fault, PromptInflation):
            self._roll_back(fault)

    def _spread(self, app: int, at: float) -> float:
        """Standard deviation of ln(input tokens) that independent calls of an app would have, if the means of its windows scattered
        as they do: with the rare tail, and with the calls that one client sends together. Of two hours before `at`."""
        first = int(at // BLOCK_S)
        blocks = (self._traffic.block(i) for i in range(first - 120, first))
        told = [b[b["app"] == app] for b in blocks]
        start = np.concatenate([b["start"] for b in told])
        logs = np.log(np.concatenate([b["input"] for b in told]))
        if len(logs) < 200:
            return self.estate.apps[app].input_spread_log
        _, window, calls = np.unique(start // 10.0, return_inverse=True, return_counts=True)
        means = np.bincount(window, logs) / calls
        return float(np.sqrt(np.mean(calls * (means - logs.mean()) ** 2)))

    def _roll_back(self, fault: PromptInflation) -> None:
        prompt = next(a.prompt for a in self.estate.apps if a.name == fault.app)
        self._announce(fault.end, fault.app, prompt, "roll back to")

    def evidence_at(self, number: int) -> float | None:
        """When the fault had shown itself often enough to be seen; None while it has not."""
        truth = self.faults[number].truth()
        return self.shown[number].evidence_at(truth.enough, truth.min_tenants, truth.lasts_s)

    def set_directives(self, directives: Iterable[Directive]) -> None:
        """The leases that the gateway obeys from now on."""
        self.gateway.enforcement.tell(directives, self.now)

    def enforced(self) -> Enforced | None:
        """What the gateway says that it holds and did; None from one that tells nothing."""
        return self.gateway.enforcement.report(self.now)

    def copy(self) -> Simulator:
        """The same course of time from here on, as a simulator of its own; the estate is shared."""
        return copy.deepcopy(self, {id(self.estate): self.estate})

    # -- time ---------------------------------------------------------------------------------------------------

    def step(self, until: float) -> list[Batch]:
        """Every batch that arrives in (now, until], in order of arrival. Raises: ValueError when time runs back."""
        if until < self.now:
            raise ValueError(f"time runs forward only: now {self.now}, asked for {until}")
        self._make_deploys(until)
        self._agents.spawn(until)
        while self._block * BLOCK_S <= until:
            calls = self._traffic.block(self._block)
            calls = calls[calls["start"] >= self.start_at]
            if len(calls):
                self._pending.append(calls)
            self._block += 1
        while True:
            due = self._due(until)
            if not len(due):
                break
            self._resolve(due)
        self._scrape(until)
        self.now = until
        return self._deliver(until)

    def _due(self, until: float) -> Records:
        """Attempts that start at or before `until`: new calls, further attempts, and agents' calls."""
        ready, rest = [], []
        for chunk in self._pending:
            # Chunks are sorted by start.
            cut = int(np.searchsorted(chunk["start"], until, side="right"))
            if cut:
                ready.append(chunk[:cut])
            if cut < len(chunk):
                rest.append(chunk[cut:])
        self._pending = rest
        wanted = self._agents.due(until)
        if wanted:
            ready.append(self._agent_calls(wanted))
        if not ready:
            return np.zeros(0, dtype=CALL)
        due = np.concatenate(ready)
        self.totals.calls += int((due["attempt"] == 0).sum())
        return due

    def _agent_calls(self, wanted: Sequence[Wanted]) -> Records:
        told = np.array([tuple(w) for w in wanted], dtype=[(f, CALL[f]) for f in Wanted._fields])
        calls = np.zeros(len(told), dtype=CALL)
        for name in Wanted._fields:
            calls[name] = told[name]
        calls["first"], calls["prompt"], calls["stream"] = calls["start"], -1, True
        # A run stays with the provider it began with: its cache is there.
        draw = unit_interval(mix(calls["unit"]))
        calls["provider"], calls["model"] = self._traffic.route(calls["app"].astype(np.int64), draw)
        return calls

    def _resolve(self, calls: Records) -> None:
        """One round of attempts: what they ask for now, what comes back, what follows."""
        fresh = calls["attempt"] == 0
        unset = fresh & (calls["prompt"] < 0)
        calls["prompt"][unset] = self._live_prompt[calls["app"][unset]]
        for at, app, prompt in self._deploys:
            calls["prompt"][unset & (calls["app"] == app) & (calls["start"] >= at)] = prompt
        begin, end = float(calls["start"].min()), float(calls["start"].max())
        live = [(i, f) for i, f in enumerate(self.faults) if f.start <= end and begin < f.end]
        marks: list[tuple[int, Records]] = []
        for _, fault in live:
            if isinstance(fault, BudgetBurn):
                self._pending.append(fault.further(self.estate, calls))
        for i, fault in live:
            if isinstance(fault, PromptInflation):
                marks.append((i, fault.on_calls(self.estate, calls, self._names)))
        answering = [(i, f) for i, f in live if not isinstance(f, PromptInflation | AgentLoop | LookAlike)]
        answers, shown = self.gateway.answer(calls, [f for _, f in answering])
        marks += [(i, m) for (i, _), m in zip(answering, shown, strict=True) if m is not None]
        again = self.gateway.retries(answers)
        self._emit(answers, again, marks)

    def _emit(self, a: Answers, again: Records, marks: list[tuple[int, Records]]) -> None:
        calls = a.calls
        end = calls["start"] + a.latency_s
        for number, mark in marks:
            self._show(number, end[mark], calls["tenant"][mark])
        if again.any():
            further = calls[again].copy()
            further["attempt"] += 1
            further["start"] = end[again] + a.backoff_s[again]
            if self.estate.fallback:
                self._next_provider(further)
            self._pending.append(further[np.argsort(further["start"], kind="stable")])
        t, final = self.totals, ~again
        t.attempts += len(calls)
        t.failed += int((final & (a.error != 0)).sum())
        t.answered += int((final & (a.error == 0)).sum())
        t.cost_usd += float(a.cost_usd.sum())
        self._post_calls(a, end)
        for row in np.flatnonzero(final & (calls["run"] >= 0)):
            self._agent_goes_on(int(calls["run"][row]), float(end[row]), CLASSES[int(a.error[row])])

    def _next_provider(self, calls: Records) -> None:
        """Further attempts go round the app's routes that serve the same model."""
        for row in range(len(calls)):
            routes = self.estate.apps[int(calls["app"][row])].routes
            name = self.estate.providers[int(calls["provider"][row])].name
            place = next((i for i, r in enumerate(routes) if r.provider == name), 0)
            route = routes[(place + 1) % len(routes)]
            calls["provider"][row] = self.estate.provider_index[route.provider]
            calls["model"][row] = self.estate.model_index[route.model]

    def _agent_goes_on(self, run: int, end: float, error: str) -> None:
        loop = self._agents.loop_of(run)
        step = self._agents.completed(run, end, not error, error == "gateway_local")
        if step is None:
            return
        if loop is not None:
            for i, fault in enumerate(self.faults):
                if isinstance(fault, AgentLoop) and fault.run == loop.run and (step.step or 0) > 3:
                    self._show(i, np.array([step.at]), np.array([0]))
        self._post_step(step)

    def _show(self, number: int, at: Records, tenants: Records) -> None:
        shown = self.shown[number]
        shown.count += len(at)
        room = MAX_EVIDENCE - len(shown.first)
        if room > 0 and len(at):
            shown.first += zip(at[:room].tolist(), tenants[:room].tolist(), strict=True)
        elif len(at) and float(at[-1]) >= shown.first[-1][0] + 10.0:
            # Some evidence must last: of what comes later, one in ten seconds will do.
            shown.first.append((float(at[-1]), int(tenants[-1])))

    # -- changes and scrapes ------------------------------------------------------------------------------------

    def _make_deploys(self, until: float) -> None:
        """Harmless deploys, about `deploys_per_day`: a new prompt version with the same tokens."""
        while self._deploys_to * DAY_S <= until:
            rng = generator(self.seed, 8, self._deploys_to)
            for _ in range(int(rng.poisson(self.estate.deploys_per_day))):
                at = self._deploys_to * DAY_S + DAY_S * float(rng.random())
                app = int(rng.integers(len(self.estate.apps)))
                if at < self.start_at:
                    continue
                name = f"{self.estate.apps[app].prompt}.{len(self._names.prompts)}"
                self._names.prompts.append(name)
                self._deploys.append((at, app, len(self._names.prompts) - 1))
                self._announce(at, self.estate.apps[app].name, name)
            self._deploys.sort()
            self._deploys_to += 1
        # Deploys that every coming call has behind it are folded into the table.
        while self._deploys and self._deploys[0][0] < self.now:
            _, app, prompt = self._deploys.pop(0)
            self._live_prompt[app] = prompt

    def _announce(self, at: float, app: str, prompt: str, verb: str = "deploy") -> None:
        change = Change(
            at=at, kind="deploy", summary=f"{verb} {prompt}", labels={"app": app, "prompt": prompt},
            version=prompt.partition("@")[2], actor="ci", id=short_id("CHG", app, prompt, at),
        )  # fmt: skip
        self._post(at + 0.5, "ci", change)

    def _scrape(self, until: float) -> None:
        for i, state in enumerate(self._nodes):
            while self._next_scrape[i] <= until:
                at = self._next_scrape[i]
                samples, shown = state.scrape(at, int(at // self.estate.scrape_s), self.faults)
                for sample in samples:
                    sender = "dcgm" if sample.gpu else "vllm"
                    self._post(at + 0.15, f"{sender}-{sample.node}", sample)
                for fault in shown:
                    self._show(self.faults.index(fault), np.array([at]), np.array([0]))
                self._next_scrape[i] += self.estate.scrape_s

    # -- senders ------------------------------------------------------------------------------------------------

    def _post(self, received_at: float, sender: str, event: Event) -> None:
        self._outbox.setdefault((received_at, sender), []).append(event)

    def _flush_of(self, sender: Sender, end: float) -> float:
        """When an event that ended at `end` arrives: at the sender's next flush, and the network."""
        phase = self._phase[sender.name] * sender.flush_s
        return float(np.ceil((end - phase) / sender.flush_s)) * sender.flush_s + phase + sender.network_s

    def _post_step(self, step: AgentStep) -> None:
        sdk = self.estate.sdk
        skewed = msgspec.structs.replace(step, at=step.at + sdk.skew_s)
        self._post(self._flush_of(sdk, step.at), sdk.name, skewed)

    def _post_calls(self, a: Answers, end: Records) -> None:
        """Events of the gateway's pods: one for each attempt; and the copies and scores that belong to them."""
        estate, calls = self.estate, a.calls
        pods = estate.pods
        pod = (mix(calls["uid"] ^ np.uint64(0xB0D)) % np.uint64(len(pods))).astype(np.int64)
        flush = np.array([p.flush_s for p in pods])[pod]
        phase = np.array([self._phase[p.name] * p.flush_s for p in pods])[pod]
        network = np.array([p.network_s for p in pods])[pod]
        arrives = np.ceil((end - phase) / flush) * flush + phase + network
        at = end + np.array([p.skew_s for p in pods])[pod]
        scored = unit_interval(mix(calls["uid"] ^ np.uint64(0xE7A)))
        outbox = self._outbox
        for row, event in enumerate(self._events(a, at)):
            key = (float(arrives[row]), pods[pod[row]].name)
            outbox.setdefault(key, []).append(event)
            if event.error == "" and scored[row] < estate.evaluated:
                self._post_score(event, float(end[row]), float(scored[row] / max(estate.evaluated, 1e-9)))
            if estate.copies and event.run and scored[row] > 1 - estate.copies:
                self._post_copy(event, float(end[row]))

    def _post_score(self, call: LlmCall, end: float, draw: float) -> None:
        score = Evaluation(
            at=end + 2.0, name="helpfulness", score=round(1.0 - 0.5 * draw * draw, 4), app=call.app, prompt=call.prompt,
            model=call.model, tenant=call.tenant, run=call.run, id=f"{call.id}-eval",
        )  # fmt: skip
        self._post(float(np.ceil((end + 2.0) / 10.0)) * 10.0 + 0.2, "evals", score)

    def _post_copy(self, call: LlmCall, end: float) -> None:
        sdk = self.estate.sdk
        self._post(
            self._flush_of(sdk, end),
            sdk.name,
            msgspec.structs.replace(call, at=end + sdk.skew_s, scope="lab.sdk"),
        )

    def _events(self, a: Answers, at: Records) -> list[LlmCall]:
        e, calls, prompts, runs = self.estate, a.calls, self._names.prompts, self._names.runs
        providers, models, apps, tenants = e.providers, e.models, e.apps, e.tenants
        events = []
        columns = zip(
            at.round(6).tolist(), calls["uid"].tolist(), calls["attempt"].tolist(), calls["provider"].tolist(),
            calls["model"].tolist(), calls["app"].tolist(), calls["tenant"].tolist(), calls["agent"].tolist(),
            calls["run"].tolist(), calls["prompt"].tolist(), calls["input"].tolist(), calls["stream"].tolist(),
            calls["tools"].tolist(), a.error.tolist(), a.code.tolist(), a.output.tolist(), a.cached.tolist(),
            a.cost_usd.round(8).tolist(), a.latency_s.round(4).tolist(), a.ttft_s.round(4).tolist(), a.region.tolist(), a.deployment.tolist(),
            strict=True,
        )  # fmt: skip
        for (end, uid, attempt, p, m, app, tenant, agent, run, prompt, tokens_in, stream, tools, error, code, out,
             cached, cost, latency, ttft, region, deployment) in columns:  # fmt: skip
            provider, klass, word = providers[p], CLASSES[error], f"{uid:016x}"
            local, told = klass == "gateway_local", cost > 0.0 or not error
            events.append(
                LlmCall(
                    at=end,
                    id=f"{word}-{attempt}",
                    provider="" if local else provider.name,
                    model=models[m].name,
                    model_served="" if error else models[m].name,
                    deployment=provider.deployments[deployment] if provider.deployments and not local else "",
                    region="" if local else provider.regions[region],
                    app=apps[app].name,
                    prompt=prompts[prompt],
                    team=apps[app].team,
                    tenant=tenants[tenant],
                    key=f"key-{tenants[tenant]}",
                    agent=e.agents[agent].name if agent >= 0 else "",
                    run=runs[run] if run >= 0 else "",
                    error=klass,
                    error_code=CODES[code],
                    input_tokens=tokens_in if told else None,
                    output_tokens=out if told else None,
                    cache_read_tokens=cached if told else None,
                    cache_write_tokens=_written(provider.writes_cache, told, cached, tokens_in),
                    cost_usd=cost if told else None,
                    latency_s=latency,
                    ttft_s=ttft if stream and not error else None,
                    finish=_finish(klass, out, tools),
                    stream=stream,
                    retries=attempt or None,
                    trace=runs[run] if run >= 0 else word,
                    span=f"{word}-{attempt}",
                    scope="lab.gateway",
                )
            )
        return events

    def _deliver(self, until: float) -> list[Batch]:
        ready = sorted(key for key in self._outbox if key[0] <= until)
        batches = []
        for key in ready:
            events = sorted(self._outbox.pop(key), key=_order)
            self.totals.events += len(events)
            batches.append(Batch(events=events, sender=key[1], received_at=key[0]))
        return batches


def _order(event: Event) -> tuple[float, str]:
    return event.at, getattr(event, "id", "")


def _written(writes: bool, told: bool, cached: int, tokens_in: int) -> int | None:
    if not writes or not told:
        return None
    return 0 if cached else tokens_in // 2


def _finish(klass: str, out: int, tools: bool) -> str:
    if klass:
        return "content_filter" if klass == "content_filter" else ""
    if tools:
        return "tool_calls"
    return "length" if out >= 4096 else "stop"
