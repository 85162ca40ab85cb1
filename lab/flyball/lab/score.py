"""How well a governor does in the lab: every fault over many seeds, and days in which nothing is wrong.

Each fault runs by itself: a warm-up of quiet traffic, the fault, its recovery. The ground truth is the simulator's own.
"Enough evidence" is when the fault has marked as many events as its `Truth` says: what makes it certain to the best test that
keeps the page budget (a dozen failed calls of two tenants for a provider, dozens of calls for a level that moved, six steps
of a loop, one sample of a GPU). The bar of the delay counts from there, as one window and the wait for the senders.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.incident import Incident
from flyball.lab._draws import mix_int, uniform_int
from flyball.lab.estate import default_estate
from flyball.lab.faults import Truth
from flyball.lab.rows import Row, Table, at_least, at_most, run_all, told
from flyball.lab.scenario import GovernorFactory, Lab
from flyball.lab.sim import START_AT

WINDOW_S: Final = 10.0
SENDER_WAIT_S: Final = 8.5
"""The gateway pods hold events for up to 5 s, lateness is 2 s, clocks and network differ by less than 1.5 s."""
SCRAPE_S: Final = 15.0
FAULT_RATE: Final = 10.0
QUIET_RATE: Final = 5.0
DAY_S: Final = 86_400.0
LENGTH_S: Final = {"prompt_inflation": 420.0}
"""How long a fault stays, where 240 s are too short for enough evidence: an app of one call a second with prompts of every
length shows a doubling after three minutes."""

Scenario = Callable[[Lab, int], object]


def _pick(seed: int, purpose: int, options: Sequence[str]) -> str:
    return options[int(uniform_int(mix_int(seed), purpose) * len(options))]


FAULTS: Final[dict[str, Scenario]] = {
    "provider_outage": lambda lab, s: lab.at(0).provider(_pick(s, 1, "abc")).fails(0.6),
    "partial_outage": lambda lab, s: lab.at(0).provider(_pick(s, 1, "abc")).fails(0.25),
    "quota_exhausted": lambda lab, s: lab.at(0).provider(_pick(s, 1, "abc")).quota_exhausted(),
    "bad_key": lambda lab, s: lab.at(0).tenant(_pick(s, 2, [f"t{i}" for i in range(2, 18)])).bad_key(),
    "prompt_inflation": lambda lab, s: (
        lab.at(0)
        .prompt(_pick(s, 3, ("checkout@4", "assistant@13", "search@8", "summarize@6")))
        .doubles_tokens()
    ),
    "agent_loop": lambda lab, s: (
        lab.at(0)
        .agent(_pick(s, 4, ("researcher", "coder", "concierge")))
        .loops(_pick(s, 5, ("repeat", "cycle")))
    ),
    "retry_storm": lambda lab, s: (
        lab.at(0).app(_pick(s, 6, ("checkout", "assistant", "search"))).retry_storm()
    ),
    "slow_provider": lambda lab, s: lab.at(0).provider(_pick(s, 1, "abc")).slow(3.0),
    "gpu_xid": lambda lab, s: lab.at(0).gpu(_gpu(s)).xid(int(_pick(s, 8, ("79", "95", "119", "48")))),
    "gpu_throttle": lambda lab, s: lab.at(0).gpu(_gpu(s)).overheats(),
    "serving_saturated": lambda lab, s: lab.at(0).deployment(_pick(s, 7, ("vllm-1", "vllm-2"))).saturates(),
    "all_providers_down": lambda lab, s: lab.at(0).all_providers().fail(),
    "square_wave": lambda lab, s: lab.at(0).provider(_pick(s, 1, "abc")).fails(0.6, on="20s", off="20s"),
}
"""What `score` can switch on: each takes a lab and a seed, and starts one fault at lab time 0."""


def _gpu(seed: int) -> str:
    return _pick(seed, 7, default_estate().gpu_names)


@dataclass(frozen=True)
class Job:
    """One simulation to run. `fault` is empty for a quiet day."""

    governor: str | GovernorFactory
    fault: str
    seed: int
    rate: float
    warmup_s: float
    length_s: float
    recovery_s: float
    tick_s: float


@dataclass
class Result:
    """What one simulation showed."""

    fault: str
    seed: int
    detected: bool = False
    root_right: bool = False
    class_right: bool = False
    delay_s: float | None = None
    """From enough evidence to the incident; None when not detected."""
    from_first_s: float | None = None
    """From the first event that shows the fault."""
    pages: int = 0
    pages_least: int = 1
    other_pages: int = 0
    """Pages about something else, while the fault was on or after."""
    early_pages: int = 0
    directives: int = 0
    seconds: float = 0.0
    calls: int = 0
    events: int = 0
    incidents: int = 0
    found: list[str] = field(default_factory=list)


def governor_factory(spec: str | GovernorFactory) -> GovernorFactory:
    """The factory that `module:function` names, or the callable itself.

    Raises: ConfigError when the text has no such form, or the module no such function.
    """
    if not isinstance(spec, str):
        return spec
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ConfigError(f"{spec!r} names no factory; write module:function", where="lab score")
    made = getattr(importlib.import_module(module), name, None)
    if not callable(made):
        raise ConfigError(f"{module} has no function {name!r}", where="lab score")
    factory: GovernorFactory = made
    return factory


def run_job(job: Job) -> Result:
    """Runs one simulation to its end and judges it."""
    lab = Lab(
        governor_factory(job.governor), seed=job.seed, estate=default_estate(job.rate), warmup=job.warmup_s,
        tick_s=job.tick_s, start_at=START_AT + 9_973.0 * job.seed,
    )  # fmt: skip
    if not job.fault:
        lab.run(job.length_s)
        result = Result("", job.seed, pages_least=0, other_pages=len(lab.pages()))
        result.found = [_described(i, lab.opened_at(i.id)) for i in lab.incidents()]
    else:
        FAULTS[job.fault](lab, job.seed)
        lab.run(job.length_s)
        lab.sim.end_fault(0, lab.sim.now)
        lab.run(job.length_s + job.recovery_s)
        result = judge(lab, job)
    result.directives = sum(c.change == "granted" for c in lab.directive_changes())
    result.incidents = len(lab.incidents())
    result.seconds, result.calls, result.events = lab.now, lab.sim.totals.calls, lab.sim.totals.events
    return result


def judge(lab: Lab, job: Job) -> Result:
    """Holds what a governor said against the ground truth of the lab's one fault."""
    truth = lab.sim.faults[0].truth()
    result = Result(job.fault, job.seed, pages_least=truth.pages_least)
    evidence, first = lab.sim.evidence_at(0), min((at for at, _ in lab.sim.shown[0].first), default=None)
    for said_at, change in lab.seen.changes:
        found = change.incident
        if change.old or said_at < truth.start or not _about(found, truth):
            continue
        result.detected = True
        if evidence is not None:
            result.delay_s = said_at - evidence
        if first is not None:
            result.from_first_s = said_at - first
        break
    mine = [i for i in lab.incidents() if i.at >= truth.start and _about(i, truth)]
    result.root_right = bool(mine) and (not truth.accepted or mine[0].root in truth.accepted)
    result.class_right = bool(mine) and (not truth.classes or mine[0].klass in truth.classes)
    ids = {i.id for i in mine}
    for at, page in lab.paged():
        if at < 0:
            result.early_pages += 1
        elif page.id in ids:
            result.pages += 1
        else:
            result.other_pages += 1
    result.found = [_described(i, lab.opened_at(i.id)) for i in lab.incidents() if i.at >= truth.start]
    return result


def _about(found: Incident, truth: Truth) -> bool:
    """Whether an incident is about the fault: its signal fits. Its root is judged apart."""
    return not truth.signals or found.signal in truth.signals


def _described(i: Incident, at: float) -> str:
    return f"{at:.0f}s {i.root} {i.signal} {i.klass} {i.severity.sev} page={i.page}"


@dataclass
class ScoreTable(Table):
    """The rows, what was simulated, and every single result behind them."""

    results: list[Result]


def jobs(
    governor: str | GovernorFactory,
    seeds: Sequence[int],
    faults: Sequence[str],
    days: int,
    *,
    fault_rate: float = FAULT_RATE,
    quiet_rate: float = QUIET_RATE,
) -> list[Job]:
    """What `score` will run. Raises: ConfigError for a fault that is not in FAULTS."""
    for name in faults:
        if name not in FAULTS:
            raise ConfigError(f"no fault {name!r}{did_you_mean(name, FAULTS)}", where="lab score")
    quiet = [Job(governor, "", 1000 + d, quiet_rate, 0.0, DAY_S, 0.0, 5.0) for d in range(days)]
    return quiet + [
        Job(governor, f, s, fault_rate, 720.0, LENGTH_S.get(f, 240.0), 180.0, 1.0)
        for f in faults
        for s in seeds
    ]


def score(
    governor: str | GovernorFactory,
    seeds: Sequence[int] = tuple(range(1, 21)),
    faults: Sequence[str] = tuple(FAULTS),
    days: int = 20,
    *,
    processes: int = 1,
    progress: Callable[[int, int, Result], None] | None = None,
    fault_rate: float = FAULT_RATE,
    quiet_rate: float = QUIET_RATE,
) -> ScoreTable:
    """Runs every fault with every seed, and quiet days, and puts the results in a table.

    Args:
        governor: a factory, or `module:function`, which is needed for more than one process.
        days: quiet days, a simulation of its own each, without warm-up: whatever pages in one is false.
        processes: how many run side by side; the results do not depend on it.
        progress: called after each simulation with (done, all, result).

    Raises: ConfigError for an unknown fault, or a callable with several processes.
    """
    if processes > 1 and not isinstance(governor, str):
        raise ConfigError("several processes need the governor as module:function", where="lab score")
    todo = jobs(governor, seeds, faults, days, fault_rate=fault_rate, quiet_rate=quiet_rate)
    results = []
    for done, result in enumerate(run_all(run_job, todo, processes), start=1):
        results.append(result)
        if progress is not None:
            progress(done, len(todo), result)
    return table(results)


def table(results: Sequence[Result]) -> ScoreTable:
    """The table of `results`, in the order of FAULTS, quiet days last."""
    rows: list[Row] = []
    by_fault: Mapping[str, list[Result]] = {
        f: [r for r in results if r.fault == f] for f in FAULTS if any(r.fault == f for r in results)
    }
    for fault, found in by_fault.items():
        rows += _fault_rows(fault, found)
    quiet = [r for r in results if not r.fault]
    if quiet:
        rows.append(at_most("lab.quiet.false_pages", sum(r.other_pages for r in quiet), "pages", 0.0))
        rows.append(at_most("lab.quiet.directives", sum(r.directives for r in quiet), "directives", 0.0))
        days = sum(r.seconds for r in quiet) / DAY_S
        unpaged = sum(r.incidents - r.other_pages for r in quiet) / days
        rows.append(told("lab.quiet.incidents_without_page", round(unpaged, 2), "per day"))
        rows.append(told("lab.quiet.days", round(sum(r.seconds for r in quiet) / DAY_S, 3), "d"))
    hours = sum(r.seconds for r in results if r.fault) / 3600
    simulated = (
        f"{sum(1 for r in results if r.fault)} faults ({len(by_fault)} kinds, {hours:.1f} h) and {len(quiet)} quiet days; "
        f"{sum(r.calls for r in results):,} calls, {sum(r.events for r in results):,} events"
    )
    return ScoreTable(rows, simulated, list(results))


def _fault_rows(fault: str, found: Sequence[Result]) -> list[Row]:
    scraped = fault in ("gpu_xid", "gpu_throttle", "serving_saturated")
    bar = WINDOW_S + SENDER_WAIT_S + (SCRAPE_S if scraped else 0.0)
    delays = [r.delay_s for r in found if r.delay_s is not None]
    firsts = [r.from_first_s for r in found if r.from_first_s is not None]
    name = f"lab.{fault}"
    return [
        at_least(f"{name}.detected", _share(found, lambda r: r.detected), "ratio", 1.0),
        at_most(f"{name}.delay_max", max(delays, default=None), "s", bar),
        told(f"{name}.delay_p50", _median(delays), "s"),
        told(f"{name}.delay_from_first_p50", _median(firsts), "s"),
        at_least(f"{name}.root_right", _share(found, lambda r: r.root_right), "ratio", 1.0),
        told(f"{name}.class_right", _share(found, lambda r: r.class_right), "ratio"),
        at_least(f"{name}.one_page", _share(found, lambda r: r.pages_least <= r.pages <= 1), "ratio", 1.0),
        at_most(
            f"{name}.other_pages", float(sum(r.other_pages + r.early_pages for r in found)), "pages", 0.0
        ),
        told(f"{name}.directives", float(sum(r.directives for r in found)), "directives"),
    ]


def _share(results: Sequence[Result], holds: Callable[[Result], bool]) -> float:
    return round(sum(1 for r in results if holds(r)) / len(results), 4)


def _median(values: Sequence[float]) -> float | None:
    return round(float(np.median(values)), 2) if values else None
