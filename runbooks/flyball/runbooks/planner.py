"""The planner: which runbook runs for which incident now, and why or why not.

Pure and driven by events and ticks. Every guard that says no says so by name and with the values it was asked on; a
decision is given once per change of verdict, not once per tick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from flyball.core.codec import pack_state, unpack_state
from flyball.core.directives import (
    Approval,
    Decision,
    DirectiveChange,
    Operation,
    Outcome,
    StopChange,
    Verdict,
)
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.estate import Estate
from flyball.core.ids import short_id
from flyball.core.incident import IncidentChange, State
from flyball.core.plans import MODES, Mode, Plan, Waiting
from flyball.core.stops import Stops
from flyball.runbooks.answers import Refused, lapse, own_change, plan_changed, refusal, revive, withdraw
from flyball.runbooks.conditions import variables_of
from flyball.runbooks.explain import Explained, explain, verdict_of
from flyball.runbooks.guards import Check, Question, first_no
from flyball.runbooks.loader import Runbook, RunbookSet
from flyball.runbooks.resolve import hash_of
from flyball.runbooks.standing import (
    NEVER,
    Case,
    Known,
    PlannerSettings,
    Running,
    Standing,
    cooldown_keys,
    effort_keys,
    key_of,
    move_of,
)

_DEFAULTS: Final = PlannerSettings()
Planned = tuple[Decision, Plan | None]
Item = IncidentChange | Outcome | DirectiveChange | Operation | Approval | StopChange
"""What it is told; operations, which an executor's answer may hold, tell it nothing."""

_FAILED: Final = frozenset({"failed", "unverified", "ambiguous"})
_READS_TIME: Final = re.compile(r"\bincident\.(?:age_s|lasted_s)\b")
_READS_ESTATE: Final = re.compile(r"\bduration\s*\(")
"""Every question about live traffic names a span."""
_TIDY_EVERY_S: Final = 60.0
_MOST_RUNS: Final = 10_000
_STATE_VERSION: Final = 2


class Planner:
    """Decides for every pair of open incident and runbook whose condition is true.

    Guards in order: stale, hold, telemetry, stopped, breaker, attempts, denied, runs, targets; then of these targets: stops, lock,
    attempts, hysteresis, cooldown, preconditions, blast radius; then the mode. The first that says no is the decision's reason.

    What cannot have changed is not asked again: a verdict names the moment, or the closed window, that may change it.

    Args:
        runbooks: what may run.
        ceiling: mode of the environment; a runbook's own mode counts only up to it.
        dry_run: every plan is only for show (`Plan.dry_run`).

    Raises: ConfigError when `ceiling` is no mode.
    """

    def __init__(
        self,
        runbooks: RunbookSet,
        ceiling: Mode | str = "suggest",
        settings: PlannerSettings = _DEFAULTS,
        *,
        dry_run: bool = False,
    ) -> None:
        self._settings = settings
        self._dry_run = dry_run
        self._s = Standing()
        self._looks = 0
        """How many more pairs this call may look at."""
        self._variables: dict[str, dict[str, Any]] = {}
        self._ceiling: Mode = _mode(ceiling)
        self._use(runbooks)
        self._s.runbooks = self._id

    def _use(self, runbooks: RunbookSet) -> None:
        self._runbooks = runbooks
        self._books = {r.name: short_id("BOOK", r.name, r.mode, r.text) for r in runbooks}
        self._id = short_id("SET", self._ceiling, *self._books.values())
        self._by_time = [r for r in runbooks if _READS_TIME.search(r.condition.source)]
        self._by_window = [
            r for r in runbooks if r not in self._by_time and _READS_ESTATE.search(r.condition.source)
        ]

    # --- in -------------------------------------------------------------------------------------------------------

    def feed(self, items: Sequence[Item], estate: Estate, now: float) -> list[Planned]:
        """News. Incidents are judged at once (of very many, the rest in the next ticks); each answer of a person gets its one decision; the rest moves locks, limits and
        cooldowns, which the next tick heeds."""
        self._looks = self._settings.looks_per_tick
        touched: dict[str, None] = {}
        out: list[Planned] = []
        for item in items:
            if isinstance(item, IncidentChange):
                self._take(item, now)
                touched[item.incident.id] = None
            elif isinstance(item, Outcome):
                self._outcome(item, now)
            elif isinstance(item, DirectiveChange):
                self._directive(item)
            elif isinstance(item, Approval):
                out.append(self._answer(item, estate, now))
            elif isinstance(item, StopChange):
                self._stop(item, now)
        out += self._decide(list(touched), estate, now)
        return out

    def tick(self, now: float, estate: Estate) -> list[Planned]:
        """Time passes: holds, cooldowns and waits end, incidents go stale, windows close."""
        s = self._s
        self._looks = self._settings.looks_per_tick
        if now < s.now:  # the clock went back: no moment that was waited for means anything
            s.wake_all(now)
        if abs(now - s.tidied_at) >= _TIDY_EVERY_S:
            s.tidy(now)
        closed = estate.now() != s.window_at
        s.now, s.window_at = now, estate.now()
        if s.runbooks != self._id:
            s.runbooks = self._id
            self._drop_gone(now)
            s.wake_all(now)
            return self._decide(list(s.incidents), estate, now)
        return self._look(closed, estate, now)

    def reload(self, runbooks: RunbookSet, ceiling: Mode | str | None = None) -> None:
        """Another set of runbooks; what is running goes on under its own plan. The next tick judges every incident by it.

        Raises: ConfigError when `ceiling` is no mode.
        """
        if ceiling is not None:
            self._ceiling = _mode(ceiling)
        self._use(runbooks)

    # --- out ------------------------------------------------------------------------------------------------------

    @property
    def stops(self) -> Stops:
        """What is stopped now."""
        return self._s.stops

    def waiting(self, now: float) -> list[Waiting]:
        """Plans that a person may answer now, those that have waited longest first."""
        found = [w for w in self._s.waiting.values() if now <= w.until]
        return sorted(found, key=lambda w: (w.since, w.hash))

    def knows(self, hash_: str) -> bool:
        """Whether a hash is, or was, that of a plan which waits for an answer here."""
        return hash_ in self._s.waiting or hash_ in self._s.answered

    def explain(self, incident: str, estate: Estate, now: float) -> list[Explained]:
        """For every runbook: what it would do about an open incident now, and every guard with its value; empty where the
        incident is not open. Changes nothing."""
        known = self._s.incidents.get(incident)
        if known is None:
            return []
        variables = self._values(known, now)
        cases = self._s.cases.get(incident, {})
        return [
            explain(self._question(r, known, cases.get(r.name) or Case(), variables, estate, now))
            for r in self._runbooks
        ]

    def snapshot(self) -> bytes:
        return pack_state("planner", _STATE_VERSION, self._s)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another stage or version."""
        self._s = unpack_state(state, "planner", _STATE_VERSION, Standing)
        self._variables.clear()

    # --- news -----------------------------------------------------------------------------------------------------

    def _take(self, change: IncidentChange, now: float) -> None:
        incident, s = change.incident, self._s
        self._variables.pop(incident.id, None)
        if incident.state is State.RESOLVED:
            s.incidents.pop(incident.id, None)
            s.gone[incident.id] = change.at
            for case in s.cases.get(incident.id, {}).values():
                withdraw(s, case, "withdrawn", now)
                case.true_since = None
                case.said = None
                case.look_at, case.windowed = NEVER, False
            return
        s.gone.pop(incident.id, None)
        # Actions that are noted on an incident, and a person's word, are no news of the trouble itself.
        news = max(incident.updated_at, incident.at)
        s.incidents[incident.id] = Known(incident, news)

    def _outcome(self, outcome: Outcome, now: float) -> None:
        s = self._s
        running = s.plans.get(str(outcome.values.get("plan", "")))
        if running is None:
            return
        plan, ended = running.plan, bool(outcome.values.get("plan_ended"))
        step = next((step for step in plan.steps if step.id == outcome.step), None)
        if outcome.result == "verified":
            running.verified, running.doubtful = True, False
        elif outcome.result == "unverified" and step is not None and step.progress == "ladder" and not ended:
            running.doubtful = True
        failed = ended if running.doubtful else outcome.result in _FAILED
        if failed and not running.failed:
            running.failed = True
            s.breaker.failed(
                plan.runbook, [step.action for step in plan.steps], outcome.at,
                count=running.breaker_count, per_s=running.breaker_per_s,
            )  # fmt: skip
        if ended:
            self._over(running, outcome.at, now)

    def _over(self, running: Running, at: float, now: float) -> None:
        s, plan = self._s, running.plan
        del s.plans[plan.plan_hash]
        s.locks = {k: v for k, v in s.locks.items() if v != plan.plan_hash}
        for key in cooldown_keys(plan):
            s.ended[key] = max(s.ended.get(key, at), at)
        self._moved(plan, at)
        if running.failed:
            # What traffic was sent to in vain is left alone for a while: its trouble may well be ours.
            for step in plan.steps:
                if move_of(step) is not None:
                    s.ended[key_of(step.target)] = max(s.ended.get(key_of(step.target), at), at)
        case = s.cases.get(plan.incident, {}).get(plan.runbook)
        if case is not None and case.running == plan.plan_hash:
            case.running = ""
            case.said = None
            well = running.verified and not running.failed
            case.rests_until = at + running.cooldown_s if well else 0.0
        s.wake_all(now)  # what the lock held back

    def _moved(self, plan: Plan, at: float) -> None:
        for step in plan.steps:
            there = move_of(step)
            if there is not None:
                self._s.moved[there] = max(self._s.moved.get(there, at), at)

    def _directive(self, change: DirectiveChange) -> None:
        if change.change in ("granted", "renewed"):
            self._s.live[change.directive.id] = change.directive
        else:
            self._s.live.pop(change.directive.id, None)

    def _stop(self, change: StopChange, now: float) -> None:
        if change.change == "reset":
            self._s.breaker.reset(change.scope)
        else:
            self._s.stops.take(change)
        self._s.wake_all(now)

    def _drop_gone(self, now: float) -> None:
        """Nobody can answer for a runbook that is no more."""
        for cases in self._s.cases.values():
            for name, case in cases.items():
                if name not in self._runbooks.by_name:
                    withdraw(self._s, case, "withdrawn", now)
                    case.look_at, case.windowed = NEVER, False

    # --- a person's answer ----------------------------------------------------------------------------------------

    def _answer(self, approval: Approval, estate: Estate, now: float) -> Planned:
        """What spoke for the plan when it was offered must all speak for it now; what is carried out is what was read."""
        s = self._s
        now = max(now, approval.at)
        waiting = s.waiting.get(approval.waiting)
        refused = refusal(s, approval, waiting, now)
        if waiting is None or refused is not None:
            return self._refuse(approval, waiting, refused or _UNKNOWN, now), None
        plan = waiting.plan
        known, case = s.incidents[plan.incident], s.cases[plan.incident][plan.runbook]
        runbook = self._runbooks.by_name.get(plan.runbook)
        if runbook is None:
            withdraw(s, case, "withdrawn", now)
            return self._refuse(approval, waiting, _NO_RUNBOOK, now), None
        if not approval.approve:
            return self._deny(approval, waiting, runbook, case, now), None
        refused = own_change(approval, known.incident)
        if refused is not None:  # another person may still approve it
            return self._refuse(approval, waiting, refused, now), None
        q = self._question(runbook, known, case, self._values(known, now), estate, now)
        no = first_no(q) if runbook.condition.ask(q.variables, estate).true else _CLEARED
        refused = _refused(no) if no is not None else plan_changed(waiting, q, self._books[plan.runbook])
        if refused is None and q.mode == "observe":
            refused = Refused("mode_observe", "only observing now")
        if refused is not None:
            withdraw(s, case, "withdrawn", now)
            case.said = _said(no) if no is not None else None
            case.look_at = now
            return self._refuse(approval, waiting, refused, now), None
        approved = msgspec.structs.replace(plan, approved_by=approval.by, at=now)
        withdraw(s, case, "approved", now)
        self._begin(approved, runbook, case, now)
        case.said = (Verdict.RUN.value, "approved")
        text = f"{approval.by} approved what was offered; every guard passed again"
        values = {**q.figures, "asked_for_s": round(now - waiting.since, 3)}
        return _decision(approved, Verdict.RUN, "approved", text, now, values, by=approval.by), approved

    def _deny(
        self, approval: Approval, waiting: Waiting, runbook: Runbook, case: Case, now: float
    ) -> Decision:
        withdraw(self._s, case, "denied", now)
        case.denied_until = now + max(runbook.model.limits.cooldown, runbook.model.approval)
        case.denied_by = approval.by
        case.said = (Verdict.REFUSE.value, "denied")
        case.look_at, case.windowed = case.denied_until, False
        text = f"{approval.by} denied it; not offered again for this incident until then"
        return self._refuse(approval, waiting, Refused("denied", text, case.denied_until), now)

    def _refuse(self, approval: Approval, waiting: Waiting | None, why: Refused, now: float) -> Decision:
        over = self._s.answered.get(approval.waiting)
        incident, runbook = (over.incident, over.runbook) if over else ("", "")
        if waiting is not None:
            incident, runbook = waiting.plan.incident, waiting.plan.runbook
        return Decision(
            at=now, incident=incident, runbook=runbook, decision=Verdict.REFUSE, reason=why.reason, detail=why.detail,
            until=why.until, plan_hash=approval.waiting, by=approval.by or "flyball",
            values={**(waiting.values if waiting else {}), **why.values, "approve": approval.approve},
        )  # fmt: skip

    # --- deciding -------------------------------------------------------------------------------------------------

    def _decide(self, incidents: Sequence[str], estate: Estate, now: float) -> list[Planned]:
        """Every runbook for these incidents, because there is news of them."""
        out: list[Planned] = []
        for incident in incidents:
            known = self._s.incidents.get(incident)
            if known is None:
                continue
            variables = self._values(known, now)
            for runbook in self._runbooks:
                planned = self._one(known, runbook, variables, estate, now)
                if planned is not None:
                    out.append(planned)
        return out

    def _look(self, closed: bool, estate: Estate, now: float) -> list[Planned]:
        """Only what may have changed since it was last looked at; so many at once, those due for longest first."""
        s = self._s
        due: list[tuple[float, str, str]] = []
        for incident, cases in s.cases.items():
            if incident not in s.incidents:
                continue
            for name, case in cases.items():
                if closed and case.windowed and case.window_at != s.window_at:
                    case.wake(now)
                if case.look_at <= now:
                    due.append((case.look_at, incident, name))
        due += self._turned(closed, estate, now)
        due.sort(key=lambda entry: entry[0])
        out: list[Planned] = []
        for _, incident, name in due[: self._looks]:
            runbook, known = self._runbooks.by_name.get(name), s.incidents.get(incident)
            if runbook is None or known is None:
                continue
            planned = self._one(known, runbook, self._values(known, now), estate, now)
            if planned is not None:
                out.append(planned)
        return out

    def _turned(self, closed: bool, estate: Estate, now: float) -> list[tuple[float, str, str]]:
        """Pairs whose condition reads the time, or live traffic, and has another answer now."""
        found: list[tuple[float, str, str]] = []
        runbooks = [*self._by_time, *(self._by_window if closed else ())]
        if not runbooks:
            return found
        for incident, known in self._s.incidents.items():
            variables = self._values(known, now)
            cases = self._s.cases.get(incident, {})
            for runbook in runbooks:
                case = cases.get(runbook.name)
                was = case is not None and case.true_since is not None
                if (case is None or case.look_at > now) and runbook.condition.ask(
                    variables, estate
                ).true != was:
                    if case is not None:
                        case.wake(now)
                    found.append((now, incident, runbook.name))
        return found

    def _one(
        self, known: Known, runbook: Runbook, variables: Mapping[str, Any], estate: Estate, now: float
    ) -> Planned | None:
        incident, s = known.incident, self._s
        case = s.cases.get(incident.id, {}).get(runbook.name)
        if not runbook.condition.ask(variables, estate).true:
            return self._untrue(known, runbook, case, now) if case is not None else None
        if case is None:
            case = s.cases.setdefault(incident.id, {}).setdefault(runbook.name, Case(look_at=now))
        if case.true_since is None:
            case.true_since = now
        if case.running:
            case.look_at, case.windowed = NEVER, False
            return None
        waiting = s.waiting.get(case.waiting)
        if waiting is not None and now <= waiting.until and case.look_at > now:
            return None  # the guards are asked again from time to time, and when it is answered
        if self._looks <= 0:  # a storm: the next ticks look at the rest, those that waited longest first
            case.wake(now)
            return None
        self._looks -= 1
        case.window_at = estate.now()
        q = self._question(runbook, known, case, variables, estate, now)
        no = first_no(q)
        if no is not None:
            lapse(s, case, now)
            self._look_again(q, no, now)
            return self._say(incident.id, runbook, case, no, q.figures, now)
        return self._go(q, now)

    def _untrue(self, known: Known, runbook: Runbook, case: Case, now: float) -> Planned | None:
        was_waiting = case.true_since is not None and case.said is not None and not case.running
        case.true_since = None
        case.look_at, case.windowed = NEVER, False
        withdraw(self._s, case, "withdrawn", now)
        return self._say(known.incident.id, runbook, case, _CLEARED, {}, now) if was_waiting else None

    def _look_again(self, q: Question, no: Check, now: float) -> None:
        """A hold whose end is known is looked at then; one that gives no sign, from time to time; a refusal on news, or when
        a window closes, where that may change it. All of them once more when the incident goes stale."""
        case = q.case
        case.windowed = no.windowed
        if no.until is not None:
            case.look_at = no.until
        else:
            case.look_at = now + self._settings.relook_s if no.hold else NEVER
        if no.name != "stale":
            case.look_at = min(case.look_at, q.known.news_at + q.runbook.model.max_age)

    def _say(
        self, incident: str, runbook: Runbook, case: Case, no: Check, figures: Mapping[str, Any], now: float
    ) -> Planned | None:
        # Another lock or a longer cooldown is the same verdict; people need not hear of it again.
        if case.said == _said(no):
            return None
        case.said = _said(no)
        return Decision(
            at=now, incident=incident, runbook=runbook.name, decision=_verdict(no), reason=no.reason or no.name,
            detail=no.detail, until=no.until, values={**figures, **no.values},
        ), None  # fmt: skip

    def _go(self, q: Question, now: float) -> Planned | None:
        """Every guard passes: it runs, is offered to a person, or would have run."""
        s, case, runbook = self._s, q.case, q.runbook
        verdict, reason, detail = verdict_of(q)
        plan = msgspec.structs.replace(q.plan, mode=q.mode)
        case.windowed = False
        case.look_at = min(now + self._settings.relook_s, q.known.news_at + runbook.model.max_age)
        values = {**q.figures, "mode": runbook.mode, "environment": self._ceiling}
        if verdict is Verdict.RUN:
            withdraw(s, case, "withdrawn", now)
            self._begin(plan, runbook, case, now)
            case.said = (verdict.value, reason)
            return _decision(plan, verdict, reason, detail, now, values), plan
        if verdict is Verdict.HOLD:
            withdraw(s, case, "withdrawn", now)
            if case.said == (verdict.value, reason):
                return None
            case.said = (verdict.value, reason)
            return _decision(plan, verdict, reason, detail, now, values), None
        waiting = s.waiting.get(case.waiting)
        if waiting is not None and now <= waiting.until and case.said == (verdict.value, reason):
            case.look_at = min(case.look_at, waiting.until)
            return None
        return self._offer(q, plan, values, now)

    def _offer(self, q: Question, plan: Plan, values: dict[str, Any], now: float) -> Planned:
        """A plan waits for a person. One that nobody answered is offered again, under another hash, as it would be now."""
        s, case = self._s, q.case
        verdict, reason, detail = verdict_of(q)
        last, book = s.waiting.get(case.waiting), self._books[q.runbook.name]
        if last is not None:
            values = {**values, "instead_of": last.hash}
            if now > last.until:
                detail = f"{detail}; offered again, nobody answered the last time"
            withdraw(s, case, "expired" if now > last.until else "withdrawn", now)
            plan = msgspec.structs.replace(plan, plan_hash=hash_of(plan, case.offers))
        offer = revive(s, case, plan, book, now)
        if offer is None:
            until = now + q.runbook.model.approval
            offer = Waiting(hash=plan.plan_hash, plan=plan, since=now, until=until, values=values)
            s.waiting[offer.hash] = offer
            case.waiting, case.book = offer.hash, book
        case.said = (verdict.value, reason)
        case.look_at = min(case.look_at, offer.until)
        decision = _decision(offer.plan, verdict, reason, detail, now, values, until=offer.until)
        return decision, offer.plan

    def _begin(self, plan: Plan, runbook: Runbook, case: Case, now: float) -> None:
        """Takes the locks and counts the run; from here on the executor has it."""
        s, rate = self._s, runbook.model.limits.breaker
        case.attempts += 1
        case.running = plan.plan_hash
        case.offers = 0
        case.look_at, case.windowed = NEVER, False
        s.plans[plan.plan_hash] = Running(plan, now, rate.count, rate.per_s, runbook.model.limits.cooldown)
        s.locks.update(dict.fromkeys(plan.locks, plan.plan_hash))
        made = s.efforts.setdefault(plan.incident, {})
        for key in effort_keys(plan):
            made[key] = made.get(key, 0) + 1
        runs = s.runs.setdefault(plan.runbook, [])
        runs.append(now)
        del runs[: max(0, len(runs) - _MOST_RUNS)]
        for key in cooldown_keys(plan):
            s.ended[key] = now
        self._moved(plan, now)

    def _question(
        self,
        runbook: Runbook,
        known: Known,
        case: Case,
        variables: Mapping[str, Any],
        estate: Estate,
        now: float,
    ) -> Question:
        return Question(
            runbook,
            known,
            case,
            variables,
            estate,
            now,
            self._s,
            self._settings,
            self._ceiling,
            self._dry_run,
        )

    def _values(self, known: Known, now: float) -> dict[str, Any]:
        """What conditions read of an incident; only its ages change between two pieces of news."""
        incident = known.incident
        values = self._variables.get(incident.id)
        if values is None:
            if len(self._variables) > 2 * len(self._s.incidents) + 16:
                self._variables.clear()
            values = self._variables[incident.id] = variables_of(incident, now)
        values["incident.age_s"] = float(now - incident.at)
        values["incident.lasted_s"] = float(now - incident.since)
        return values


_CLEARED: Final = Check(
    "condition", False, "its condition is no longer true", reason="condition_cleared", hold=True
)
_UNKNOWN: Final = Refused("approval_unknown", "nothing with this hash waits here")
_NO_RUNBOOK: Final = Refused("approval_withdrawn", "its runbook is no more")


def _mode(word: str) -> Mode:
    known = [m for m in MODES if m == word]
    if not known:
        raise ConfigError(f"unknown mode {word!r}{did_you_mean(word, MODES)}", where="mode")
    return known[0]


def _verdict(no: Check) -> Verdict:
    return Verdict.HOLD if no.hold else Verdict.REFUSE


def _said(no: Check) -> tuple[str, str]:
    return _verdict(no).value, no.reason or no.name


def _refused(no: Check) -> Refused:
    return Refused(no.reason or no.name, no.detail, no.until, no.values)


def _decision(
    plan: Plan, verdict: Verdict, reason: str, detail: str, now: float, values: dict[str, Any],
    *, by: str = "flyball", until: float | None = None,
) -> Decision:  # fmt: skip
    return Decision(
        at=now, incident=plan.incident, runbook=plan.runbook, decision=verdict, reason=reason, detail=detail, until=until,
        plan_hash=plan.plan_hash, by=by, values=values,
    )  # fmt: skip
