"""How well a governor acts in the lab: every fault with the runbooks in mode auto, also with Flyball's own actions failing.

Each simulation runs twice with the same seed: once with the governor, once with nobody doing anything. Calls keep their number
and their fate, so that what actions changed is counted call by call and dollar by dollar.

- harmful: effects aimed at something that is not at fault; and simulations in which actions lost more calls than they won, the
  first minute of each stage aside (that is what trying costs).
- missed recoveries: effects still in force ten minutes after the trouble was over.
- false proofs: actions that stand as verified although the gateway did nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from flyball.core.directives import Operation
from flyball.core.entities import Entity
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.events import Batch, LlmCall
from flyball.lab.faults import Truth
from flyball.lab.rows import Row, Table, at_least, at_most, run_all, told
from flyball.lab.scenario import Commanded, Lab
from flyball.lab.score import FAULTS, Scenario, _pick, governor_factory
from flyball.lab.sim import START_AT, Simulator
from flyball.lab.warm import Copied, Warm

RATE: Final = 12.0
WARMUP_S: Final = 720.0
LENGTH_S: Final = 300.0
AFTER_S: Final = 600.0
"""How long after the trouble everything must have been let go."""
TRIAL_S: Final = 60.0
"""What an effect does in its first minute is the price of trying it."""
_SLOW_TO_LEARN: Final = {"budget_burn": (2160.0, 600.0)}
"""Warm-up and length of a fault that takes longer to be known."""

ACTED_ON: Final[dict[str, Scenario]] = {
    **{
        name: FAULTS[name]
        for name in (
            "provider_outage", "quota_exhausted", "slow_provider", "prompt_inflation", "agent_loop", "retry_storm",
            "gpu_xid",
        )
    },
    "rate_limited": lambda lab, s: lab.at(0).provider(_pick(s, 1, "abc")).fails(0.5, fails_with={"429": 1.0}),
    "budget_burn": lambda lab, s: lab.at(0).tenant(_pick(s, 2, [f"t{i}" for i in range(3, 9)])).burns(8.0),
}  # fmt: skip
"""Faults that a runbook of the library is for."""
LEFT_ALONE: Final[dict[str, Scenario]] = {
    "all_providers_down": FAULTS["all_providers_down"],
    "bad_key": FAULTS["bad_key"],
    "look_alikes": lambda lab, s: [
        lab.at(0).agent(agent).goes_on_rightly(pattern)
        for agent, pattern in (("researcher", "pages"), ("researcher", "polls"), ("coder", "retests"))
    ],
    "quiet": lambda lab, s: None,
}
"""Where nothing is to be done."""
FAILING: Final[dict[str, tuple[str, Callable[[Lab], object]]]] = {
    "deaf": ("provider_outage", lambda lab: lab.gateway("deaf")),
    "half_deaf": ("provider_outage", lambda lab: lab.gateway("half_deaf")),
    "late": ("provider_outage", lambda lab: lab.gateway("late")),
    "hollow": ("provider_outage", lambda lab: lab.gateway("hollow")),
    "collapse": ("provider_outage", lambda lab: lab.at(0).targets_collapse()),
    "deaf_burn": ("budget_burn", lambda lab: lab.gateway("deaf")),
    "half_deaf_burn": ("budget_burn", lambda lab: lab.gateway("half_deaf")),
    "hook_fails": ("gpu_xid", lambda lab: lab.hook("fails")),
    "hook_half_done": ("gpu_xid", lambda lab: lab.hook("half_done")),
    "hook_silent": ("gpu_xid", lambda lab: lab.hook("silent")),
}
"""What goes wrong with Flyball's own actions, and the fault that they are tried on."""
_DOES_NOTHING: Final = frozenset({"deaf", "hollow", "deaf_burn"})
SCENARIOS: Final[dict[str, Scenario]] = {**ACTED_ON, **LEFT_ALONE}


@dataclass(slots=True)
class _Fate:
    start: float
    answered: bool
    local: bool
    tenant: str
    usd: float


@dataclass
class Tally:
    """What became of every logical call that began after lab time 0, and what it cost."""

    since: float
    fates: dict[str, _Fate] = field(default_factory=dict)

    def hear(self, batch: Batch) -> None:
        for e in batch.events:
            if not isinstance(e, LlmCall) or e.scope != "lab.gateway":
                continue
            start = e.at - (e.latency_s or 0.0)
            if start < self.since:
                continue
            name, local = e.id[:16], e.error == "gateway_local"
            fate = self.fates.get(name)
            if fate is None:
                self.fates[name] = _Fate(start, not e.error, local, e.tenant, e.cost_usd or 0.0)
            else:
                fate.usd += e.cost_usd or 0.0
                fate.answered, fate.local = fate.answered or not e.error, local


@dataclass(frozen=True)
class ActJob:
    """One simulation to run, and judge against the same one with nobody acting. `failing` names one of FAILING, or is empty."""

    governor: str
    quiet: str
    fault: str
    seed: int
    failing: str = ""


@dataclass
class Acted:
    """What one simulation showed."""

    fault: str
    seed: int
    failing: str
    incidents: int = 0
    pages: int = 0
    runs: int = 0
    verified: int = 0
    effects: int = 0
    harmful: int = 0
    missed_recoveries: int = 0
    false_proofs: int = 0
    won: int = 0
    """Calls that were answered because of what was done."""
    lost: int = 0
    """Calls that were not answered because of it, refusals on purpose aside."""
    innocent_refused: int = 0
    """Calls that were refused although they were none of the trouble's."""
    usd_saved: float = 0.0
    """What calls cost less; what was paid for answers that nobody would have got is no loss, and left out."""
    act_s: float | None = None
    """From the beginning of the trouble to the first effect."""
    seconds: float = 0.0
    calls: int = 0
    found: list[str] = field(default_factory=list)


@lru_cache(maxsize=4)
def _warm(quiet: str) -> Warm:
    factory = governor_factory(quiet)

    def make() -> Copied:
        made = factory()
        if not isinstance(made, Commanded):
            raise TypeError(f"{quiet} makes no governor that can be copied")
        return made  # type: ignore[return-value]

    return Warm(make, keep=2)


def run_act_job(job: ActJob) -> Acted:
    """Runs one simulation and its counterpart to their ends, and judges it."""
    warmup_s, length_s = _SLOW_TO_LEARN.get(job.fault, (WARMUP_S, LENGTH_S))
    start_at = START_AT + 9_973.0 * job.seed
    warm = _warm(job.quiet)
    tally, without = Tally(start_at + warmup_s), Tally(start_at + warmup_s)
    governor: Copied = governor_factory(job.governor)()  # type: ignore[assignment]
    lab = warm.lab(governor, job.seed, RATE, warmup_s, start_at=start_at, hear=tally.hear)
    if job.failing:
        FAILING[job.failing][1](lab)
    collapses = len(lab.sim.faults)
    SCENARIOS[job.fault](lab, job.seed)
    lab.run(length_s)
    for number in range(collapses, len(lab.sim.faults)):
        lab.sim.end_fault(number, lab.sim.now)
    lab.run(length_s + AFTER_S)
    _undisturbed(warm.simulator(job.seed, RATE, warmup_s, start_at=start_at), lab, without)
    truths = [f.truth() for f in lab.sim.faults[collapses:]]
    return _judged(lab, job, truths, tally, without, length_s)


def _undisturbed(sim: Simulator, lab: Lab, tally: Tally) -> None:
    """The same faults with nobody acting."""
    for fault in lab.sim.faults:
        sim.add_fault(fault)
    while sim.now < lab.sim.now:
        for batch in sim.step(min(sim.now + 10.0, lab.sim.now)):
            tally.hear(batch)


def _judged(
    lab: Lab, job: ActJob, truths: Sequence[Truth], tally: Tally, without: Tally, length_s: float
) -> Acted:
    granted = [(at, c.directive) for at, c in lab.seen.directives if c.change == "granted"]
    started = [(at, o) for at, o in lab.seen.operations if o.verb == "start" and not o.dry_run]
    result = Acted(job.fault, job.seed, job.failing)
    result.incidents, result.pages = len(lab.incidents()), len(lab.pages())
    result.runs = sum(d.decision.value == "run" for _, d in lab.seen.decisions)
    result.verified = sum(o.result == "verified" for _, o in lab.seen.outcomes)
    result.effects = len(granted) + len(started)
    first = min((at for at, _ in (*granted, *started)), default=math.inf)
    result.act_s = first - lab.zero if first < math.inf else None
    aimed = [_aimed(d.scope, truths) for _, d in granted] + [_aimed_at(o, truths) for _, o in started]
    result.harmful = aimed.count(False)
    undone = any(o.result in ("unverified", "failed", "undone") for _, o in lab.seen.outcomes)
    result.false_proofs = int(job.failing in _DOES_NOTHING and result.verified > 0 and not undone)
    _compare(lab, result, truths, tally, without)
    result.missed_recoveries = len(lab.directives()) + _not_undone(lab)
    result.seconds, result.calls = lab.now, len(tally.fates)
    result.found = [
        f"{at - lab.zero:.0f}s {d.runbook} {d.decision.value}({d.reason})" for at, d in lab.seen.decisions
    ] + [f"{at - lab.zero:.0f}s {o.runbook} {o.result}({o.reason})" for at, o in lab.seen.outcomes]
    return result


def _compare(lab: Lab, result: Acted, truths: Sequence[Truth], tally: Tally, without: Tally) -> None:
    """Call by call: what was won and lost, and who was refused."""
    trials = [
        at for at, c in lab.seen.directives if c.change in ("granted", "renewed") and "stage" in c.reason
    ]
    guilty = {t for truth in truths for t in _tenants(truth)}
    lost_for_good = 0
    for name, fate in tally.fates.items():
        other = without.fates.get(name)
        if other is None or not fate.answered or other.answered:
            result.usd_saved += (other.usd if other is not None else 0.0) - fate.usd
        if fate.local and guilty and fate.tenant not in guilty:
            result.innocent_refused += 1
        if other is None or fate.answered == other.answered:
            continue
        if fate.answered:
            result.won += 1
        elif not fate.local:
            result.lost += 1
            lost_for_good += not any(at <= fate.start < at + TRIAL_S for at in trials)
    result.usd_saved += sum(f.usd for name, f in without.fates.items() if name not in tally.fates)
    # A few calls more or less fail wherever they are sent: that is no harm.
    result.harmful += lost_for_good - result.won > max(20, 0.005 * len(tally.fates))


def _tenants(truth: Truth) -> list[str]:
    return [e.name for e in truth.accepted if e.kind == "tenant"]


def _aimed(scope: Mapping[str, str], truths: Sequence[Truth]) -> bool:
    """Whether an effect is about what is at fault."""
    return any(e.matches(scope) for truth in truths for e in _at_fault(truth))


def _at_fault(truth: Truth) -> list[Entity]:
    return list(truth.accepted) or ([truth.root] if truth.root is not None else [])


def _aimed_at(operation: Operation, truths: Sequence[Truth]) -> bool:
    names = {str(e) for truth in truths for e in _at_fault(truth)}
    return bool(operation.targets) and names.issuperset(operation.targets)


def _not_undone(lab: Lab) -> int:
    """Operations that changed something and were not taken back."""
    done = [op for op in lab.hooks.done if op.verb == "start"]
    undone = {op.id for op in lab.hooks.done if op.verb == "undo"}
    return sum(op.id not in undone for op in done)


def act_jobs(
    governor: str, quiet: str, seeds: Sequence[int], faults: Sequence[str] = (), failing: bool = True
) -> list[ActJob]:
    """What to run: each fault with each seed, and what fails of Flyball's own; by seed, so that warm-ups are shared."""
    names = [f for f in SCENARIOS if not faults or f in faults]
    modes = [(f, name) for name, (f, _) in FAILING.items() if failing and f in names]
    return [
        ActJob(governor, quiet, fault, seed, mode)
        for seed in seeds
        for fault, mode in sorted([*((f, "") for f in names), *modes], key=lambda m: m[0] in _SLOW_TO_LEARN)
    ]


def act_score(
    governor: str,
    quiet: str,
    seeds: Sequence[int],
    faults: Sequence[str] = (),
    *,
    processes: int = 1,
    progress: Callable[[int, int, Acted], None] | None = None,
) -> Table:
    """Runs every scenario with every seed and puts the results in a table.

    Args:
        governor, quiet: `module:function` of a governor that acts, and of one that only follows the warm-up.
        faults: of SCENARIOS; all when empty. Others are left to the score of detection.

    Raises: ConfigError for a fault that neither score knows.
    """
    for name in faults:
        if name not in SCENARIOS and name not in FAULTS:
            raise ConfigError(f"no fault {name!r}{did_you_mean(name, SCENARIOS)}", where="lab score")
    todo = act_jobs(governor, quiet, seeds, faults) if not faults or set(faults) & set(SCENARIOS) else []
    per_seed = max(1, len(todo) // max(len(seeds), 1))
    results = []
    for done, result in enumerate(run_all(run_act_job, todo, processes, per_seed), start=1):
        results.append(result)
        if progress is not None:
            progress(done, len(todo), result)
    hours = sum(r.seconds for r in results) / 3600
    simulated = (
        f"{len(results)} simulations with the runbooks in mode auto ({hours:.1f} h, "
        f"{sum(r.calls for r in results):,} calls), each also with nobody acting"
    )
    return Table(act_rows(results), simulated)


def act_rows(results: Sequence[Acted]) -> list[Row]:
    """Per fault, then per way in which Flyball's own actions fail, then over all."""
    rows: list[Row] = []
    for fault in SCENARIOS:
        found = [r for r in results if r.fault == fault and not r.failing]
        if found:
            rows += _rows(f"lab.act.{fault}", found, acts=fault in ACTED_ON)
    for failing in FAILING:
        found = [r for r in results if r.failing == failing]
        if found:
            rows += _rows(f"lab.act.failing.{failing}", found, acts=True, failing=failing)
    true = [r for r in results if r.fault in ACTED_ON and not r.failing]
    if true:
        rows.append(at_most("lab.act.pages_per_true_incident", _mean([r.pages for r in true]), "pages", 1.0))
        rows.append(told("lab.act.usd_saved", round(sum(r.usd_saved for r in true), 2), "USD"))
    if results:
        rows.append(
            at_most("lab.act.harmful_actions", float(sum(r.harmful for r in results)), "actions", 0.0)
        )
        rows.append(
            at_most(
                "lab.act.missed_recoveries", float(sum(r.missed_recoveries for r in results)), "effects", 0.0
            )
        )
    return rows


def _rows(name: str, found: Sequence[Acted], *, acts: bool, failing: str = "") -> list[Row]:
    rows = [
        at_most(f"{name}.harmful_actions", float(sum(r.harmful for r in found)), "actions", 0.0),
        at_most(f"{name}.missed_recoveries", float(sum(r.missed_recoveries for r in found)), "effects", 0.0),
        at_most(f"{name}.innocent_refused", float(sum(r.innocent_refused for r in found)), "calls", 0.0),
    ]
    if not acts:
        rows.append(at_most(f"{name}.effects", float(sum(r.effects for r in found)), "effects", 0.0))
        rows.append(told(f"{name}.pages", _mean([r.pages for r in found]), "pages"))
        return rows
    rows.append(at_most(f"{name}.pages_per_incident", _mean([r.pages for r in found]), "pages", 1.0))
    if failing in _DOES_NOTHING:
        rows.append(
            at_most(f"{name}.false_proofs", float(sum(r.false_proofs for r in found)), "actions", 0.0)
        )
    if not failing:
        rows.append(at_least(f"{name}.acted", _mean([float(r.runs > 0) for r in found]), "ratio", 1.0))
        rows.append(at_least(f"{name}.verified", _mean([float(r.verified > 0) for r in found]), "ratio", 1.0))
        times = [r.act_s for r in found if r.act_s is not None]
        rows.append(told(f"{name}.act_after_mean", _mean(times) if times else None, "s"))
    rows.append(told(f"{name}.calls_saved", float(sum(r.won - r.lost for r in found)), "calls"))
    rows.append(told(f"{name}.usd_saved", round(sum(r.usd_saved for r in found), 2), "USD"))
    return rows


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
