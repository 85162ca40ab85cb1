"""For an incident now: what each runbook would do, and which guard has which value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flyball.core.directives import Verdict
from flyball.core.plans import Mode
from flyball.runbooks.guards import Question, checks

VERDICTS: Final[dict[Mode, tuple[Verdict, str, str]]] = {
    "observe": (Verdict.HOLD, "mode_observe", "it would have run; observing only"),
    "suggest": (Verdict.SUGGEST, "mode_suggest", "every guard passes; a person decides"),
    "approve": (Verdict.SUGGEST, "mode_approve", "every guard passes; waits for approval"),
    "auto": (Verdict.RUN, "when_matched", "condition true, every guard passed"),
}
MUST_ASK: Final[dict[str, str]] = {
    "irreversible": "it cannot be undone, so a person decides",
    "small_fleet": "its share of so few rounds down to none, so a person decides",
}


@dataclass(frozen=True, slots=True)
class GuardView:
    """One guard: whether it lets the runbook run now, why, and the values that it was asked on."""

    name: str
    ok: bool
    detail: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Explained:
    """How one runbook stands towards an incident.

    verdict: `run`, `suggest`, `hold` or `refuse` as it would be decided now; `running`; `no_match` where its condition is not
        true. guards: every one that can be asked, also after the first that says no.
    """

    runbook: str
    verdict: str
    reason: str
    detail: str
    guards: tuple[GuardView, ...]
    until: float | None = None
    plan_hash: str = ""


def verdict_of(q: Question) -> tuple[Verdict, str, str]:
    """What follows where every guard passes: verdict, reason, detail."""
    verdict, reason, detail = VERDICTS[q.mode]
    if q.must_ask and q.mode != "observe":
        return Verdict.SUGGEST, "must_ask", MUST_ASK.get(q.must_ask, q.must_ask)
    if q.mode == "suggest" and q.runbook.mode != "suggest":
        detail = f"the environment's mode is {q.ceiling}; the runbook's is {q.runbook.mode}"
    return verdict, reason, detail


def explain(q: Question) -> Explained:
    """Asks the condition and every guard; changes nothing."""
    name = q.runbook.name
    answer = q.runbook.condition.ask(q.variables, q.estate)
    said = "true" if answer.true else f"not true{f' ({answer.error})' if answer.error else ''}"
    when = GuardView("when", answer.true, said, {"condition": q.runbook.condition.source})
    if not answer.true:
        return Explained(name, "no_match", "condition", f"its condition is {said}", (when,))
    asked = list(checks(q))
    guards = (when, *(GuardView(c.name, c.ok, c.detail, dict(c.values)) for c in asked))
    no = next((c for c in asked if not c.ok), None)
    if q.case.running:
        text = "its plan is being carried out"
        return Explained(name, "running", "running", text, guards, plan_hash=q.case.running)
    if no is not None:
        verdict = Verdict.HOLD if no.hold else Verdict.REFUSE
        return Explained(name, verdict.value, no.reason or no.name, no.detail, guards, until=no.until)
    verdict, reason, detail = verdict_of(q)
    mode = GuardView(
        "mode", q.mode == "auto", detail,
        {"runbook": q.runbook.mode, "environment": q.ceiling, "must_ask": q.must_ask},
    )  # fmt: skip
    waiting = q.standing.waiting.get(q.case.waiting)
    return Explained(
        name, verdict.value, reason, detail, (*guards, mode),
        until=waiting.until if waiting else None, plan_hash=q.case.waiting or q.plan.plan_hash,
    )  # fmt: skip
