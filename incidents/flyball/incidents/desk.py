"""What comes back to an incident: the word of people, and what planner and executor did or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flyball.core.directives import Decision, DirectiveChange, Outcome, Verdict
from flyball.core.errors import ConfigError
from flyball.core.events import Change
from flyball.core.incident import IncidentChange, State
from flyball.incidents import enrich
from flyball.incidents.book import Book
from flyball.incidents.case import Case, Effect
from flyball.incidents.lifecycle import Step, advance, allowed, command_step
from flyball.incidents.silences import Matcher, Silence
from flyball.incidents.text import clock


class Desk(Book):
    """Takes commands, decisions, directives and outcomes, and moves incidents by the table of `lifecycle`.

    Raises: ConfigError from `command` and `add_silence`.
    """

    # ---- people

    def command(
        self, kind: str, incident_id: str, by: str, at: float, until: float | None = None, reason: str = ""
    ) -> list[IncidentChange]:
        """What a person asks for: `ack`, `resolve`, `reopen`, or `silence` until a moment.

        Raises: ConfigError for an unknown command or incident, or a step that the lifecycle refuses.
        """
        step = command_step(kind)
        case = self._open.get(incident_id) or self._closed.get(incident_id)
        if case is None:
            raise ConfigError(
                f"unknown incident {incident_id!r}; it never was, or is forgotten", code="IN102"
            )
        self._now = max(self._now, at)
        why = f" ({reason})" if reason else ""
        if step is None:
            if case.incident.state is State.RESOLVED:
                raise ConfigError(f"cannot silence {incident_id}: it is resolved", code="IN101")
            if until is None or until <= at:
                raise ConfigError(
                    f"cannot silence {incident_id} without an end in the future; give until", code="IN103"
                )
            self._change(case, silenced_until=until)
            self._tell(case, f"silenced by {by} until {clock(until)}{why}", loud=False)
        else:
            advance(case.incident.state, step, incident_id)
            if step is Step.ACK:
                if case.incident.acknowledged_by:
                    raise ConfigError(
                        f"cannot ack {incident_id}: {case.incident.acknowledged_by} has it", code="IN101"
                    )
                self._change(case, acknowledged_by=by)
                self._step(case, step, f"acknowledged by {by}{why}", loud=True)
            elif step is Step.RESOLVE:
                case.ignored = {a.id: None for a in case.active()}
                self._resolve(case, f"resolved by {by}{why}")
            else:
                self._reopen(case, f"reopened by {by}{why}")
        return self._take()

    def add_silence(
        self, matchers: Iterable[Matcher | str], *, at: float, until: float, by: str, comment: str = ""
    ) -> Silence:
        """Nobody is woken by incidents whose labels match, until then. Matches on the scope and on `root`, `root_kind`,
        `signal`, `class` and `severity`. Raises: ConfigError (see `Silences.add`)."""
        return self._silences.add(matchers, at=at, until=until, by=by, comment=comment)

    def remove_silence(self, silence_id: str) -> bool:
        return self._silences.remove(silence_id)

    def silences(self) -> list[Silence]:
        return self._silences.all()

    def _note_change(self, change: Change) -> None:
        if change in self._changes:
            return
        self._changes.append(change)
        for case in list(self._open.values()):
            before = case.incident.changes
            self._enrich_changes(case)
            if case.incident.changes != before:
                self._tell(case, f"a change belongs to it: {change.kind} at {clock(change.at)}", loud=False)

    # ---- what planner and executor say

    def _decided(self, d: Decision) -> None:
        case = self._case(d.incident)
        if case is None:
            return
        before = case.incident.actions
        after = enrich.note_decision(case.incident, d)
        self._change(case, actions=after)
        what = d.detail or d.reason
        # Offered again it is the same line with another hash, which whoever answers needs.
        if len(after) > len(before) or {n.plan for n in after} != {n.plan for n in before}:
            self._tell(
                case,
                f"{d.runbook}: {d.decision} ({what})",
                loud=d.decision in (Verdict.SUGGEST, Verdict.REFUSE),
            )

    def _directed(self, change: DirectiveChange) -> None:
        d = change.directive
        case = self._case(d.incident)
        if case is None:
            return
        self._now = max(self._now, change.at)
        self._change(case, actions=enrich.note_directive(case.incident, change))
        to = d.params.get("to")
        effect = case.effects.get(d.id)
        if effect is None:
            target = {k: str(v) for k, v in to.items()} if isinstance(to, Mapping) else {}
            effect = case.effects[d.id] = Effect(
                d.id, d.kind, dict(d.scope), target, d.granted_at, change.at, runbook=d.runbook
            )
        effect.changed_at = change.at
        effect.live = change.change in ("granted", "renewed")
        text = f"{change.change}: {enrich.describe(d)} ({change.reason})"
        state = case.incident.state
        if state is State.RESOLVED:
            self._tell(case, text, loud=False)
        elif effect.live:
            if allowed(state, Step.MITIGATE):
                self._step(case, Step.MITIGATE, text, loud=True)
            else:
                self._tell(case, text, loud=True)
        else:
            self._let_go(case, text, recovered=change.reason == "recovered")

    def _let_go(self, case: Case, text: str, *, recovered: bool) -> None:
        """The last directive ended. While detectors still hold the incident it is open again, and people should know."""
        if not case.live_effects() and case.holding() and allowed(case.incident.state, Step.EASE):
            goes_on = "open until its signals are quiet" if recovered else "the trouble goes on"
            self._step(case, Step.EASE, f"{text}; {goes_on}", loud=True)
        else:
            self._tell(case, text, loud=True)

    def _came_out(self, o: Outcome) -> None:
        case = self._case(o.incident)
        if case is None:
            return
        self._now = max(self._now, o.at)
        self._change(case, actions=enrich.note_outcome(case.incident, o))
        text = f"{o.runbook} {o.step}: {o.result}" + (f" ({o.reason})" if o.reason else "")
        state = case.incident.state
        if state is State.RESOLVED:
            self._tell(case, text, loud=False)
        elif o.result == "applied" and allowed(state, Step.MITIGATE):
            self._step(case, Step.MITIGATE, text, loud=True)
        elif o.result == "verified" and allowed(state, Step.VERIFY):
            self._step(case, Step.VERIFY, text, loud=True)
        elif o.result in ("unverified", "failed", "undone") and state is State.VERIFYING:
            self._step(case, Step.DOUBT if case.live_effects() else Step.EASE, text, loud=True)
        elif (
            o.result in ("failed", "undone", "unverified")
            and state is State.MITIGATING
            and not case.live_effects()
        ):
            self._step(case, Step.EASE, text, loud=True)
        else:
            self._tell(case, text, loud=o.result != "applied")
