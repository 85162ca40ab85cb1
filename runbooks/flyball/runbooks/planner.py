"""The planner: which runbook runs for which incident now, and why or why not.

Pure and driven by events and ticks. Every guard that says no says so by name and with the values it was asked on; a
decision is given once per change of verdict, not once per tick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from flyball.core.codec import pack_state, unpack_state
from flyball.core.directives import Decision, Directive, DirectiveChange, Outcome, Verdict
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.estate import Estate
from flyball.core.incident import Incident, IncidentChange, State
from flyball.core.plans import (
    MODES,
    Candidate,
    Frozen,
    Mode,
    Plan,
    PlanContext,
    PlanStep,
    Refusal,
    format_duration,
    lower_mode,
    plan_hash,
)
from flyball.runbooks.candidates import CandidateSettings, best_healthy
from flyball.runbooks.conditions import variables_of
from flyball.runbooks.loader import Runbook, RunbookSet

Planned = tuple[Decision, Plan | None]

_REMEMBER_S: Final = 7 * 86400.0
"""How long runs, cooldowns and attempts of incidents that are gone are remembered; longer than any sane limit's span."""


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """silent_after_s: without a closed window for this long, telemetry is down and nothing may act.
    measure_s: span over which blast radius is measured."""

    silent_after_s: float = 60.0
    measure_s: float = 120.0
    candidates: CandidateSettings = field(default_factory=CandidateSettings)


class _Case(msgspec.Struct):
    """One runbook's standing towards one incident."""

    true_since: float | None = None
    said: tuple[str, str] | None = None
    attempts: int = 0
    running: str = ""


class _Known(msgspec.Struct):
    """An open incident, with the time of its last news."""

    incident: Incident
    news_at: float


class _State(msgspec.Struct):
    incidents: dict[str, _Known] = {}
    cases: dict[str, dict[str, _Case]] = {}
    """incident → runbook → case."""
    locks: dict[str, str] = {}
    """entity → plan hash."""
    ended: dict[str, float] = {}
    """runbook's scope key → when the last run about it began or ended."""
    runs: dict[str, list[float]] = {}
    plans: dict[str, Plan] = {}
    live: dict[str, Directive] = {}
    gone: dict[str, float] = {}
    """incident → when it was resolved."""
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class _No:
    """A guard's refusal. `hold` means that it may pass by itself."""

    hold: bool
    reason: str
    detail: str
    until: float | None
    values: Mapping[str, Any]


class Planner:
    """Decides for every pair of open incident and runbook whose condition is true.

    Guards in order: stale, hold, telemetry, kill switch, attempts, targets, preconditions, lock, cooldown, runs, blast
    radius, mode. The first that fails is the decision's reason.

    Args:
        runbooks: what may run.
        ceiling: mode of the environment; a runbook's own mode counts only up to it.

    Raises: ConfigError when `ceiling` is no mode.
    """

    def __init__(
        self,
        runbooks: RunbookSet,
        ceiling: Mode | str = "suggest",
        settings: PlannerSettings = PlannerSettings(),
    ) -> None:
        known = [m for m in MODES if m == ceiling]
        if not known:
            raise ConfigError(f"unknown mode {ceiling!r}{did_you_mean(ceiling, MODES)}", where="mode")
        self._ceiling: Mode = known[0]
        self._runbooks = runbooks
        self._settings = settings
        self._s = _State()

    # --- in -------------------------------------------------------------------------------------------------------

    def feed(
        self, items: Sequence[IncidentChange | Outcome | DirectiveChange], estate: Estate, now: float
    ) -> list[Planned]:
        """News. Plans come only from news of incidents; outcomes and directives move locks, limits and cooldowns."""
        touched: dict[str, None] = {}
        for item in items:
            if isinstance(item, IncidentChange):
                self._take(item)
                touched[item.incident.id] = None
            elif isinstance(item, Outcome):
                self._outcome(item)
            elif isinstance(item, DirectiveChange):
                self._directive(item)
        return self._decide(list(touched), estate, now)

    def tick(self, now: float, estate: Estate) -> list[Planned]:
        """Time passes: holds and cooldowns end, incidents go stale."""
        self._forget(now)
        return self._decide(list(self._s.incidents), estate, now)

    def freeze(self, frozen: bool) -> None:
        """The kill switch: while on, nothing is planned to run."""
        self._s.frozen = frozen

    def reload(self, runbooks: RunbookSet) -> None:
        """Another set of runbooks; what is running goes on under its own plan."""
        self._runbooks = runbooks

    def _take(self, change: IncidentChange) -> None:
        incident = change.incident
        if incident.state is State.RESOLVED:
            self._s.incidents.pop(incident.id, None)
            self._s.gone[incident.id] = change.at
            for case in self._s.cases.get(incident.id, {}).values():
                case.true_since = None
                case.said = None
            return
        self._s.gone.pop(incident.id, None)
        # Actions that are noted on an incident, and a person's word, are no news of the trouble itself.
        news = max(incident.updated_at, incident.at)
        self._s.incidents[incident.id] = _Known(incident, news)

    def _outcome(self, outcome: Outcome) -> None:
        plan = self._s.plans.get(str(outcome.values.get("plan", "")))
        if plan is None or not outcome.values.get("plan_ended"):
            return
        del self._s.plans[plan.plan_hash]
        self._s.locks = {k: v for k, v in self._s.locks.items() if v != plan.plan_hash}
        for key in _cooldown_keys(plan):
            self._s.ended[key] = max(self._s.ended.get(key, outcome.at), outcome.at)
        case = self._s.cases.get(plan.incident, {}).get(plan.runbook)
        if case is not None and case.running == plan.plan_hash:
            case.running = ""
            case.said = None

    def _directive(self, change: DirectiveChange) -> None:
        if change.change in ("granted", "renewed"):
            self._s.live[change.directive.id] = change.directive
        else:
            self._s.live.pop(change.directive.id, None)

    def _forget(self, now: float) -> None:
        for incident, at in list(self._s.gone.items()):
            if now - at > _REMEMBER_S:
                del self._s.gone[incident]
                self._s.cases.pop(incident, None)
        self._s.ended = {k: at for k, at in self._s.ended.items() if now - at <= _REMEMBER_S}
        self._s.live = {k: d for k, d in self._s.live.items() if d.expires_at > now}

    # --- deciding -------------------------------------------------------------------------------------------------

    def _decide(self, incidents: Sequence[str], estate: Estate, now: float) -> list[Planned]:
        out: list[Planned] = []
        for incident_id in incidents:
            known = self._s.incidents.get(incident_id)
            if known is None:
                continue
            values = variables_of(known.incident, now)
            for runbook in self._runbooks:
                planned = self._one(known, runbook, values, estate, now)
                if planned is not None:
                    out.append(planned)
        return out

    def _one(
        self, known: _Known, runbook: Runbook, values: dict[str, Any], estate: Estate, now: float
    ) -> Planned | None:
        incident = known.incident
        case = self._s.cases.get(incident.id, {}).get(runbook.name)
        answer = runbook.condition.ask(values, estate)
        if not answer.true:
            if case is None:
                return None
            was_waiting = case.true_since is not None and case.said is not None and not case.running
            case.true_since = None
            if was_waiting:
                no = _No(True, "condition_cleared", "its condition is no longer true", None, {})
                return self._say(incident, runbook, case, no, now)
            return None
        if case is None:
            case = self._s.cases.setdefault(incident.id, {}).setdefault(runbook.name, _Case())
        if case.true_since is None:
            case.true_since = now
        if case.running:
            return None
        result = self._guard(known, runbook, case, values, estate, now)
        if isinstance(result, _No):
            return self._say(incident, runbook, case, result, now)
        return self._grant(incident, runbook, case, *result, now)

    def _guard(
        self, known: _Known, runbook: Runbook, case: _Case, values: dict[str, Any], estate: Estate, now: float
    ) -> _No | tuple[Plan, dict[str, Any]]:
        model = runbook.model
        age = now - known.news_at
        if age > model.max_age:
            text = f"no news for {format_duration(age)}; max_age is {format_duration(model.max_age)}"
            return _No(False, "stale", text, None, {"age_s": age, "max_age_s": model.max_age})
        since = case.true_since if case.true_since is not None else now
        if now - since < model.hold:
            return _No(
                True,
                "hold",
                f"must stay true for {format_duration(model.hold)}",
                since + model.hold,
                {"since": since},
            )
        silent = now - estate.now()
        if estate.now() <= 0.0 or silent > self._settings.silent_after_s:
            return _No(
                True,
                "no_telemetry",
                "no closed window lately: blind, so nothing acts",
                None,
                {"silent_s": silent},
            )
        if self._s.frozen:
            return _No(True, "frozen", "the kill switch is on", None, {})
        if case.attempts >= model.limits.attempts:
            text = f"{case.attempts} attempts for this incident; a person has to look"
            return _No(False, "attempts", text, None, {"attempts": case.attempts})
        frozen = self._freeze(known.incident, runbook, estate)
        if isinstance(frozen, Refusal):
            return _No(False, frozen.reason, frozen.detail, None, dict(frozen.values))
        plan = self._plan(known.incident, runbook, case, frozen, now)
        figures = self._figures(plan, estate)
        for check in (
            self._preconditions(runbook, values, estate),
            self._locked(plan),
            self._cooling(runbook, plan, now),
            self._rate(runbook, now),
            self._blast(runbook, plan, frozen, estate, figures),
        ):
            if check is not None:
                return _No(check.hold, check.reason, check.detail, check.until, {**figures, **check.values})
        return plan, figures

    def _freeze(self, incident: Incident, runbook: Runbook, estate: Estate) -> list[Frozen] | Refusal:
        left = {
            d.scope["provider"]
            for d in self._s.live.values()
            if d.kind == "redirect" and "provider" in d.scope
        }
        excluded = sorted(left)

        def candidates(source: Mapping[str, str]) -> Sequence[Candidate]:
            return best_healthy(estate, source, exclude=excluded, settings=self._settings.candidates)

        context = PlanContext(incident, estate, candidates)
        out: list[Frozen] = []
        for step in runbook.steps:
            frozen = step.implementation.freeze(step.params, context)
            if isinstance(frozen, Refusal):
                return frozen
            if not frozen.scope or not all(frozen.scope.values()) or not frozen.stages:
                return Refusal(
                    "no_target", f"step {step.id} selects nothing; an empty target is never all", {}
                )
            out.append(frozen)
        return out

    def _plan(
        self, incident: Incident, runbook: Runbook, case: _Case, frozen: Sequence[Frozen], now: float
    ) -> Plan:
        steps = tuple(
            PlanStep(
                id=step.id,
                action=step.action,
                kind=step.implementation.effect,
                scope=f.scope,
                stages=f.stages,
                source=f.source,
                target=f.target,
                hold_s=f.hold_s,
                lease_s=f.lease_s,
                timeout_s=step.timeout_s or len(f.stages) * step.verify.within_s,
                verify=step.verify,
            )
            for step, f in zip(runbook.steps, frozen, strict=True)
        )
        attempt = case.attempts + 1
        locks = tuple(dict.fromkeys(lock for f in frozen for lock in f.locks))
        return Plan(
            at=now,
            incident=incident.id,
            runbook=runbook.name,
            mode=lower_mode(runbook.mode, self._ceiling),
            steps=steps,
            root=incident.root,
            attempt=attempt,
            locks=locks,
            max_age_s=runbook.model.max_age,
            on_failure=runbook.model.on_failure,
            plan_hash=plan_hash(incident.id, runbook.name, attempt, steps),
        )

    # --- guards ---------------------------------------------------------------------------------------------------

    def _figures(self, plan: Plan, estate: Estate) -> dict[str, Any]:
        """What the decision was made on, for people and the ledger."""
        span = self._settings.measure_s
        figures: dict[str, Any] = {"root": str(plan.root), "attempt": plan.attempt}
        for step in plan.steps:
            for name, scope in (("from", step.source), ("to", step.target)):
                seen = estate.errors(scope, span)
                figures[name] = ",".join(f"{k}={v}" for k, v in sorted(scope.items()))
                figures[f"{name}_calls"] = seen.n
                if seen.n:
                    figures[f"{name}_errors"] = round(seen.value, 4)
        return figures

    def _preconditions(self, runbook: Runbook, values: dict[str, Any], estate: Estate) -> _No | None:
        for name, condition in runbook.preconditions:
            answer = condition.ask(values, estate)
            if not answer.true:
                why = f" ({answer.error})" if answer.error else ""
                return _No(False, "precondition", f"{name} is not met{why}", None, {"precondition": name})
        return None

    def _locked(self, plan: Plan) -> _No | None:
        for lock in plan.locks:
            holder = self._s.plans.get(self._s.locks.get(lock, ""))
            if holder is not None:
                text = f"{lock} is in the hands of {holder.runbook} for {holder.incident}"
                return _No(True, "lock", text, None, {"lock": lock, "held_by": holder.plan_hash})
        return None

    def _cooling(self, runbook: Runbook, plan: Plan, now: float) -> _No | None:
        cooldown = runbook.model.limits.cooldown
        for key in _cooldown_keys(plan):
            last = self._s.ended.get(key)
            if last is not None and now - last < cooldown:
                text = f"{key} was acted on {format_duration(now - last)} ago; cooldown is {format_duration(cooldown)}"
                return _No(True, "cooldown", text, last + cooldown, {"last": last})
        return None

    def _rate(self, runbook: Runbook, now: float) -> _No | None:
        rate = runbook.model.limits.runs
        recent = [at for at in self._s.runs.get(runbook.name, []) if now - at < rate.per_s]
        if len(recent) >= rate.count:
            text = f"{len(recent)} runs in {format_duration(rate.per_s)}; the limit is {rate.count}"
            return _No(True, "runs", text, recent[-rate.count] + rate.per_s, {"runs": len(recent)})
        return None

    def _blast(
        self, runbook: Runbook, plan: Plan, frozen: Sequence[Frozen], estate: Estate, figures: dict[str, Any]
    ) -> _No | None:
        """Measured on live traffic, over all steps together; what cannot be measured is refused."""
        limit, span = runbook.model.limits.blast, self._settings.measure_s
        total = estate.calls({}, span)
        shares: dict[tuple[tuple[str, str], ...], float] = {}
        for f in frozen:
            key = tuple(sorted(f.scope.items()))
            shares[key] = max(shares.get(key, 0.0), f.max_share)
        touched = sum(estate.calls(dict(key), span) * share for key, share in shares.items())
        if total <= 0 or touched <= 0:
            return _No(False, "blast_radius", "unknown: no traffic in scope to measure it on", None, {})
        traffic = touched / total
        tenants = len({t for key in shares for t in estate.values("tenant", dict(key), span)})
        figures.update(blast_traffic=round(traffic, 4), blast_tenants=tenants)
        if traffic > limit.traffic:
            text = f"{traffic:.0%} of the traffic; the limit is {limit.traffic:.0%}"
            return _No(False, "blast_radius", text, None, {})
        if limit.tenants is not None and tenants > limit.tenants:
            return _No(False, "blast_radius", f"{tenants} tenants; the limit is {limit.tenants}", None, {})
        if limit.usd_per_hour is not None:
            costs = [estate.usd_per_hour(dict(key), span) for key in shares]
            known = [c for c in costs if c is not None]
            if len(known) < len(costs):
                return _No(False, "blast_radius", "cost of the touched traffic is unknown", None, {})
            usd = sum(c * share for c, share in zip(known, shares.values(), strict=True))
            figures["blast_usd_per_hour"] = round(usd, 2)
            if usd > limit.usd_per_hour:
                text = f"${usd:.0f}/h; the limit is ${limit.usd_per_hour:.0f}/h"
                return _No(False, "blast_radius", text, None, {})
        return None

    # --- out ------------------------------------------------------------------------------------------------------

    def _say(self, incident: Incident, runbook: Runbook, case: _Case, no: _No, now: float) -> Planned | None:
        verdict = Verdict.HOLD if no.hold else Verdict.REFUSE
        # Another lock or a longer cooldown is the same verdict; people need not hear of it again.
        if case.said == (verdict.value, no.reason):
            return None
        case.said = (verdict.value, no.reason)
        decision = Decision(
            at=now,
            incident=incident.id,
            runbook=runbook.name,
            decision=verdict,
            reason=no.reason,
            detail=no.detail,
            until=no.until,
            values=dict(no.values),
        )
        return decision, None

    def _grant(
        self,
        incident: Incident,
        runbook: Runbook,
        case: _Case,
        plan: Plan,
        figures: dict[str, Any],
        now: float,
    ) -> Planned | None:
        verdict, reason, detail = _VERDICTS[plan.mode]
        if plan.mode != "auto" and case.said == (verdict.value, reason):
            return None
        case.said = (verdict.value, reason)
        if plan.mode == "auto":
            self._begin(plan, case, now)
        if plan.mode == "suggest" and runbook.mode != "suggest":
            detail = f"the environment's mode is {self._ceiling}; the runbook's is {runbook.mode}"
        decision = Decision(
            at=now,
            incident=incident.id,
            runbook=runbook.name,
            decision=verdict,
            reason=reason,
            detail=detail,
            plan_hash=plan.plan_hash,
            values=figures,
        )
        return decision, plan if verdict is not Verdict.HOLD else None

    def _begin(self, plan: Plan, case: _Case, now: float) -> None:
        case.attempts += 1
        case.running = plan.plan_hash
        self._s.plans[plan.plan_hash] = plan
        self._s.locks.update(dict.fromkeys(plan.locks, plan.plan_hash))
        runs = self._s.runs.setdefault(plan.runbook, [])
        runs.append(now)
        del runs[: max(0, len(runs) - 10_000)]
        for key in _cooldown_keys(plan):
            self._s.ended[key] = now

    def approved(self, plan: Plan, now: float) -> bool:
        """A person approved a plan of mode `suggest` or `approve`: takes its locks and counts the run.

        Returns: False when it may no longer run: its incident is over, something else runs, or a lock is taken.
        """
        known = self._s.incidents.get(plan.incident)
        case = self._s.cases.get(plan.incident, {}).get(plan.runbook)
        if known is None or case is None or case.running or self._s.frozen or self._locked(plan) is not None:
            return False
        self._begin(plan, case, now)
        return True

    def snapshot(self) -> bytes:
        return pack_state("planner", 1, self._s)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another stage or version."""
        self._s = unpack_state(state, "planner", 1, _State)


_VERDICTS: Final[dict[Mode, tuple[Verdict, str, str]]] = {
    "observe": (Verdict.HOLD, "mode_observe", "it would have run; observing only"),
    "suggest": (Verdict.SUGGEST, "mode_suggest", "every guard passes; a person decides"),
    "approve": (Verdict.SUGGEST, "mode_approve", "every guard passes; waits for approval"),
    "auto": (Verdict.RUN, "when_matched", "condition true, every guard passed"),
}


def _cooldown_keys(plan: Plan) -> list[str]:
    """Targets that cool down after a run: the sources, whoever acted on them."""
    return [",".join(f"{k}={v}" for k, v in sorted(step.scope.items())) for step in plan.steps]
