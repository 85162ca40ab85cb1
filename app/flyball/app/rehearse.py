"""Rehearsals and back-tests: what a runbook would do, in the lab and on recorded events, with no effect on the world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from flyball.app.pipeline import Pipeline
from flyball.app.replay import Replay, Source
from flyball.app.settings import Settings
from flyball.app.wiring import pipeline_config
from flyball.core.directives import Approval, Decision, Outcome, StopChange, Verdict
from flyball.core.errors import ConfigError
from flyball.core.estate import Emissions
from flyball.core.plans import Mode
from flyball.lab.scenario import Lab, Moment
from flyball.lab.warm import Warm
from flyball.remediation import actions
from flyball.runbooks.loader import Runbook, RunbookSet, library
from flyball.runbooks.rehearsal import (
    Happening,
    Match,
    Scenario,
    happening_of,
    match,
    parse_scenario,
    settles_early,
)
from flyball.runbooks.schema import Rehearsal

WARMUP_S: Final = 720.0
_SLOW_TO_LEARN: Final = {"budget_burn": 2160.0}
"""What is normal spend of a tenant is known after half an hour; of everything else, after minutes."""
SLICE_S: Final = 5.0
LINGER_S: Final = 900.0
"""How long after the end of the fault what was expected may still come."""
WATCH_S: Final = 60.0
"""How long after the end of the fault a runbook that should do nothing is watched."""

OTHERS_FIRST_S: Final = 120.0
"""With every provider failing, the others began this long before: so that their health is known when it is asked for."""
_OTHERS_FAIL: Final = 0.06

Switch = Callable[[Moment, Scenario, float], object]


def _outage(m: Moment, s: Scenario, lasts: float) -> object:
    return m.provider(s.text("provider")).fails(
        s.number("fails"), lasts=lasts, model=s.text("model"), on=s.seconds("on"), off=s.seconds("off")
    )


def _others_fail(m: Moment, s: Scenario, lasts: float) -> Moment:
    """Lets every other provider fail a little, and the fault begin later: their health is known by then."""
    share = float(s.given.get("others", 0.0)) or (_OTHERS_FAIL if s.given.get("all_providers") else 0.0)
    if not share:
        return m
    for other in m.lab.sim.estate.provider_index:
        if other != s.text("provider"):
            m.provider(other).fails(share, lasts=OTHERS_FIRST_S + lasts)
    return replace(m, time=m.time + OTHERS_FIRST_S)


SWITCHES: Final[Mapping[str, Switch]] = {
    "quiet": lambda m, s, lasts: None,
    "outage": _outage,
    "egress": lambda m, s, lasts: m.all_providers().fail(s.number("fails"), lasts=lasts),
    "rate_limit": lambda m, s, lasts: m.provider(s.text("provider")).fails(
        s.number("refuses"), lasts=lasts, fails_with={"429": 1.0}
    ),
    "quota_exhausted": lambda m, s, lasts: m.provider(s.text("provider")).quota_exhausted(lasts=lasts),
    "slow": lambda m, s, lasts: m.provider(s.text("provider")).slow(s.number("times"), lasts=lasts),
    "budget_burn": lambda m, s, lasts: m.tenant(s.text("tenant")).burns(s.number("times"), lasts=lasts),
    "inflation": lambda m, s, lasts: m.prompt(s.text("prompt")).doubles_tokens(
        s.number("times"), output_factor=s.number("output_times"), lasts=lasts
    ),
    "loop": lambda m, s, lasts: m.agent(s.text("agent")).loops(s.text("pattern"), lasts=lasts),
    "look_alike": lambda m, s, lasts: m.agent(s.text("agent")).goes_on_rightly(
        s.text("pattern"), lasts=lasts
    ),
    "retry_storm": lambda m, s, lasts: m.app(s.text("app")).retry_storm(s.number("fails"), lasts=lasts),
    "bad_key": lambda m, s, lasts: m.tenant(s.text("tenant")).bad_key(lasts=lasts),
    "gpu_xid": lambda m, s, lasts: m.gpu(s.text("gpu")).xid(
        int(s.number("xid")), serving_fails=s.number("fails"), lasts=lasts
    ),
}
"""How each fault of `flyball.runbooks.rehearsal.FAULTS` is switched on."""


def lab_settings(mode: Mode) -> Settings:
    """Settings of a simulated Flyball: everything at its default, whatever the environment says."""
    return Settings.model_construct(mode=mode, runbooks=[])


def quiet_pipeline() -> Pipeline:
    """A pipeline without runbooks: what follows a warm-up."""
    return Pipeline(pipeline_config(lab_settings("observe"), runbooks=RunbookSet()))


def acting_pipeline() -> Pipeline:
    """A pipeline with the whole library in mode auto: `flyball lab score --mode auto`."""
    shipped = library(actions=actions.registry())
    armed = RunbookSet(tuple(replace(r, mode="auto") for r in shipped))
    return Pipeline(pipeline_config(lab_settings("auto"), runbooks=armed))


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What came of one test of a runbook."""

    runbook: str
    path: str
    name: str
    lab: str
    expect: tuple[str, ...]
    came: tuple[Happening, ...]
    matched: Match
    lab_s: float
    """How long it ran, in the lab's time."""

    @property
    def passed(self) -> bool:
        return self.matched.complete

    def as_dict(self) -> dict[str, Any]:
        return {
            "type": "rehearsal", "runbook": self.runbook, "path": self.path, "name": self.name, "lab": self.lab,
            "passed": self.passed, "expect": list(self.expect), "missing": self.matched.missing,
            "unwanted": self.matched.unwanted, "lab_s": round(self.lab_s, 1),
            "came": [{"at_s": round(h.at, 1), "word": h.word, "reason": h.reason, "detail": h.detail} for h in self.came],
        }  # fmt: skip


def rehearse(runbook: Runbook, test: Rehearsal, warm: Warm, *, seed: int | None = None) -> Rehearsed:
    """Runs one test of a runbook in virtual time, with nothing but this runbook.

    Raises: ConfigError when the test's `lab` names what the lab has not.
    """
    where = f"{runbook.path}: tests"
    scenario = parse_scenario(test.lab, where)
    if seed is not None:
        scenario = replace(scenario, seed=seed)
    alone = RunbookSet((replace(runbook, mode=scenario.mode),))
    pipeline = Pipeline(pipeline_config(lab_settings(scenario.mode), runbooks=alone))
    warmup_s = _SLOW_TO_LEARN.get(scenario.fault, WARMUP_S)
    lab = warm.lab(pipeline, scenario.seed, scenario.rate, warmup_s)
    end_s = _set_up(lab, scenario, where)
    person = _Person(scenario.person)
    early = settles_early(test.expect)
    until_s = end_s + (LINGER_S if early else WATCH_S)
    came = _came(lab)
    while lab.now < until_s:
        lab.run(min(lab.now + SLICE_S, until_s))
        person.answer(lab, pipeline)
        came = _came(lab)
        if early and match(test.expect, came).complete:
            break
    return Rehearsed(
        runbook=runbook.name,
        path=runbook.path,
        name=test.name or test.lab,
        lab=test.lab,
        expect=tuple(test.expect),
        came=tuple(came),
        matched=match(test.expect, came),
        lab_s=lab.now,
    )


def _set_up(lab: Lab, scenario: Scenario, where: str) -> float:
    """Switches on what is wrong; returns when the last of it ends, in lab time."""
    try:
        lab.gateway(scenario.gateway).hook(scenario.hook)
        if scenario.target == "collapses":
            lab.at(0).targets_collapse()
        switch = SWITCHES[scenario.fault]
        switch(_others_fail(lab.at(0), scenario, scenario.lasts_s), scenario, scenario.lasts_s)
        if scenario.again_s:
            switch(lab.at(_end(lab) + scenario.again_s), scenario, scenario.lasts_s)
    except ConfigError as e:
        raise ConfigError(f"{scenario.fault}: {e.what}", where=where, code="RB122") from e
    if scenario.stopped:
        stop = StopChange(change="stop", scope=scenario.stopped, by="rehearsal", at=lab.sim.now)
        lab.order(stop)
    return max(_end(lab), scenario.lasts_s)


def _end(lab: Lab) -> float:
    """When the last fault ends, in lab time."""
    return max((f.end - lab.zero for f in lab.sim.faults if f.end < float("inf")), default=0.0)


@dataclass
class _Person:
    """Whoever is asked during a rehearsal; answers each question once, within seconds."""

    manner: str
    answered: set[str] = field(default_factory=set)

    def answer(self, lab: Lab, pipeline: Pipeline) -> None:
        if self.manner == "away":
            return
        for waiting in pipeline.waiting():
            if waiting.hash not in self.answered:
                self.answered.add(waiting.hash)
                approve = self.manner == "approves"
                lab.order(Approval(waiting=waiting.hash, approve=approve, by="rehearsal", at=lab.sim.now))


def _came(lab: Lab) -> list[Happening]:
    """Decisions, grants and outcomes in the order in which they were said; times are the lab's."""
    said: list[tuple[float, int, Happening]] = []
    sources: tuple[Sequence[tuple[float, Any]], ...] = (
        lab.seen.decisions,
        lab.seen.directives,
        lab.seen.outcomes,
    )
    for rank, source in enumerate(sources):
        for at, item in source:
            happening = happening_of(item, at - lab.zero)
            if happening is not None:
                said.append((at, rank, happening))
    return [h for _, _, h in sorted(said, key=lambda s: s[:2])]


# --- on recorded events ----------------------------------------------------------------------------------------------


@dataclass
class Backtest:
    """What a runbook would have done on recorded events, if it had been in mode auto."""

    runbook: str
    first: float | None = None
    last: float | None = None
    events: Counter[str] = field(default_factory=Counter)
    ran: list[Decision] = field(default_factory=list)
    held: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    acted_after_s: list[float] = field(default_factory=list)
    """From the beginning of the trouble to the decision, for each run."""
    incidents: int = 0
    """Incidents, whatever they were about."""
    late: int = 0
    rejected: int = 0

    @property
    def widest_traffic(self) -> float:
        return max((_figure(d, "traffic") for d in self.ran), default=0.0)

    @property
    def most_tenants(self) -> int:
        return int(max((_figure(d, "tenants") for d in self.ran), default=0.0))

    @property
    def mean_to_act_s(self) -> float | None:
        return sum(self.acted_after_s) / len(self.acted_after_s) if self.acted_after_s else None

    def as_dict(self) -> dict[str, Any]:
        mean = self.mean_to_act_s
        return {
            "type": "backtest", "runbook": self.runbook, "from": self.first, "to": self.last, "events": dict(self.events),
            "incidents": self.incidents, "ran": len(self.ran), "held": dict(self.held), "refused": dict(self.refused),
            "outcomes": dict(self.outcomes), "widest_traffic": round(self.widest_traffic, 4),
            "most_tenants": self.most_tenants, "mean_to_act_s": None if mean is None else round(mean, 1),
            "late": self.late, "rejected": self.rejected,
        }  # fmt: skip


def _figure(decision: Decision, name: str) -> float:
    value = decision.values.get(f"blast_{name}", 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def backtest(runbook: Runbook, settings: Settings, source: Source) -> Backtest:
    """Replays recorded events with this runbook alone, in mode auto and with a scripted executor.

    What it cannot know: traffic that was recorded does not move. Directives count as in force, the target's health is what it
    was without the redirected load, and an incident lasts as long as it did.
    """
    alone = RunbookSet((replace(runbook, mode="auto"),))
    config = pipeline_config(settings.model_copy(update={"mode": "auto"}), runbooks=alone, scripted=True)
    found = Backtest(runbook.name)
    since: dict[str, float] = {}
    pipeline = Pipeline(config)
    replay = Replay(pipeline)
    for said in replay.emissions(source):
        _note(found, since, said)
    found.first, found.last = replay.span
    found.events.update(pipeline.counters.events)
    found.late, found.rejected = pipeline.windows.stats.late, source.rejected.total()
    return found


def _note(found: Backtest, since: dict[str, float], said: Emissions) -> None:
    for change in said.changes:
        found.incidents += not change.old
        since[change.incident.id] = change.incident.since
    for d in said.decisions:
        if d.decision is Verdict.RUN:
            found.ran.append(d)
            found.acted_after_s.append(d.at - since.get(d.incident, d.at))
        elif d.decision is Verdict.HOLD:
            found.held[d.reason] += 1
        elif d.decision is Verdict.REFUSE:
            found.refused[d.reason] += 1
    found.outcomes.update(_words(said.outcomes))


def _words(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for o in outcomes:
        if o.values.get("plan_ended"):
            yield o.result
