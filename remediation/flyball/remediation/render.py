"""Turns an incident into text for people: the first screen, a short update, and the long form, from Jinja2 templates.

No sentence here was written by a model, and no text of an event is ever a template: events give values, people give
templates. Every value is cleaned and shortened where it is put in; each notifier escapes for its channel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flyball.core.entities import Entity
from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.ids import digest
from flyball.core.incident import (
    ActionNote,
    Impact,
    Incident,
    IncidentChange,
    RelatedChange,
    RootCandidate,
    Severity,
    State,
)
from flyball.remediation.figures import (
    Fitted,
    clock,
    confidence,
    count,
    duration,
    limit,
    listed,
    money,
    ratio,
    text_of,
)
from flyball.remediation.notifiers._text import clean, fit

MAX_LINES: Final = 8
TITLE_LIMIT: Final = 146
LINE_LIMIT: Final = 400
VALUE_LIMIT: Final = 160
LONG_LINE_LIMIT: Final = 800
LONG_LIMIT: Final = 12_000
FACT_LIMIT: Final = 120
"""A fact longer than this is not a fact but somebody's text: it is left out, so that no content of a prompt slips through."""
CHANGE_SPAN_S: Final = 3600.0
TEMPLATES: Final = ("alert", "update", "long")

_TEMPLATE_FAULTS: Final = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
)
"""What a person's template can raise when it meets data that its author did not think of."""


@dataclass(frozen=True, slots=True)
class Audience:
    """For whom a message is rendered.

    kind, name: of the channel; `alert.<kind>.j2` is used before `alert.j2`.
    why: the routing rule that chose it, e.g. `severity ≥ high on owner llm-platform`.
    first: whether nothing of this incident was sent here before.
    interactive: whether buttons can be pressed there.
    """

    kind: str
    name: str = ""
    why: str = ""
    first: bool = True
    interactive: bool = False


@dataclass(frozen=True, slots=True)
class Button:
    """Something a person can do from the message. `action` is a stable word; what it acts on is the incident, never text of it.

    subject: hash of what an answer is bound to; empty where it is the incident.
    """

    action: Literal["approve", "deny", "ack", "undo", "silence"]
    label: str
    style: Literal["", "primary", "danger"] = ""
    confirm: str = ""
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    text: str
    url: str


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent, before a channel puts it into its own form. All text is clean; nothing is escaped yet.

    lines: the first screen, 1 to 8 lines, the title first.
    update: the same incident in at most 4 lines, for a message that follows another.
    reason: why this was sent: `first`, `update`, `figures`, `resolved`, `reopened`.
    dedup_key: the same for all messages of an incident.
    fallback: empty, or why a person's template was not used for this one.
    """

    incident: str
    revision: int
    title: str
    lines: tuple[str, ...]
    update: tuple[str, ...]
    long: str
    facts: tuple[tuple[str, str], ...]
    links: tuple[Link, ...]
    buttons: tuple[Button, ...]
    severity: Severity
    state: State
    dedup_key: str
    reason: str
    why: str
    page: bool
    at: float
    fallback: str = ""


def _finalize(value: object) -> str:
    # StrictUndefined raises here, by str(): a misspelt name is an error, never an empty place in an alert.
    return value if isinstance(value, Fitted) else fit(text_of(value), VALUE_LIMIT)


class Renderer:
    """Renders alerts.

    Args:
        overrides: a folder with a person's templates: `alert.j2`, `update.j2`, `long.j2`, or for one channel `alert.slack.j2`.
            Each is compiled and tried on sample incidents; a broken one is refused, stands in `problems` with file and line,
            and the built-in one is used in its place.
        public_url: address of this Flyball; alerts link to the incident there. Without it they name the command.
    """

    def __init__(self, overrides: Path | None = None, *, public_url: str = "") -> None:
        self._public_url = public_url.rstrip("/")
        self._built_in = {
            f"{name}.j2": (files("flyball.remediation") / "templates" / f"{name}.j2").read_text("utf-8")
            for name in TEMPLATES
        }
        self._own: dict[str, tuple[str, str]] = {}
        self.problems: tuple[ConfigError, ...] = ()
        self._env = self._environment()
        if overrides is not None:
            self.problems = tuple(self._load(overrides))

    def _environment(self) -> ImmutableSandboxedEnvironment:
        env = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined,
            autoescape=False,
            finalize=_finalize,
            loader=jinja2.FunctionLoader(self._source),
            keep_trailing_newline=False,
        )
        own: tuple[Callable[..., str], ...] = (
            duration, money, ratio, count, clock, confidence, limit, listed,
        )  # fmt: skip
        env.filters.update({f.__name__: f for f in own})
        return env

    def _source(self, name: str) -> tuple[str, str | None, Callable[[], bool]] | None:
        if name in self._own:
            text, filename = self._own[name]
            return text, filename, lambda: True
        built_in = self._built_in.get(name.removeprefix("builtin/"))
        return None if built_in is None else (built_in, f"builtin/{name}", lambda: True)

    def _load(self, folder: Path) -> Iterable[ConfigError]:
        if not folder.is_dir():
            yield ConfigError("is no folder; name a folder with templates", where=str(folder))
            return
        for path in sorted(folder.glob("*.j2")):
            base = path.name.split(".")[0]
            if base not in TEMPLATES or path.name.count(".") > 2:
                yield ConfigError(f"no template is called so{did_you_mean(base, TEMPLATES)}", where=str(path))
                continue
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as e:
                yield ConfigError(f"cannot be read ({e})", where=str(path))
                continue
            self._own[path.name] = (text, str(path))
            if problem := self._try(path, base):
                del self._own[path.name]
                yield problem
            # A refused template may have been compiled into the cache under its name.
            self._env = self._environment()

    def _try(self, path: Path, base: str) -> ConfigError | None:
        for change in _sample_changes():
            for first in (True, False):
                audience = Audience(kind="sample", why="a sample", first=first, interactive=True)
                try:
                    lines = self._lines(self._env.get_template(path.name), self._context(change, audience))
                except _TEMPLATE_FAULTS as e:
                    return _problem(e, path)
                if not lines or (base == "alert" and len(lines) > MAX_LINES):
                    what = f"gives {len(lines)} lines; an alert has 1 to {MAX_LINES}, empty ones not counted"
                    return ConfigError(what, where=str(path))
        return None

    def render(self, change: IncidentChange, audience: Audience) -> Message:
        """The message for one channel. The same arguments give the same message.

        A person's template that fails on this incident is left aside for it: an alert is never lost over its looks.
        """
        context = self._context(change, audience)
        fallback: list[str] = []
        alert = self._pick("alert", audience.kind, context, fallback)[:MAX_LINES]
        update = self._pick("update", audience.kind, context, fallback)[:4]
        long = self._pick("long", audience.kind, context, fallback)
        incident = change.incident
        lines = (fit(alert[0], TITLE_LIMIT), *(fit(x, LINE_LIMIT) for x in alert[1:]))
        return Message(
            incident=fit(incident.id, 64),
            revision=incident.revision,
            title=lines[0],
            lines=lines,
            update=(fit(update[0], TITLE_LIMIT), *(fit(x, LINE_LIMIT) for x in update[1:])),
            long=_joined(long, LONG_LIMIT),
            facts=context["facts"],
            links=self._links(incident),
            buttons=context["buttons"],
            severity=incident.severity,
            state=incident.state,
            dedup_key=dedup_key(incident.id),
            reason=_reason(change, audience.first),
            why=fit(audience.why, VALUE_LIMIT),
            page=incident.page,
            at=change.at if math.isfinite(change.at) else 0.0,
            fallback="; ".join(fallback),
        )

    def _pick(self, base: str, kind: str, context: Mapping[str, Any], fallback: list[str]) -> list[str]:
        for name in (f"{base}.{kind}.j2", f"{base}.j2"):
            if name not in self._own:
                continue
            try:
                if lines := self._lines(self._env.get_template(name), context):
                    return lines
                fallback.append(f"{name} gave no line")
            except _TEMPLATE_FAULTS as e:
                fallback.append(str(_problem(e, Path(self._own[name][1]))))
        return self._lines(self._env.get_template(f"builtin/{base}.j2"), context)

    @staticmethod
    def _lines(template: jinja2.Template, context: Mapping[str, Any]) -> list[str]:
        return [x for line in template.render(context).split("\n") if (x := fit(line, LONG_LINE_LIMIT))]

    def _context(self, change: IncidentChange, audience: Audience) -> dict[str, Any]:
        incident, at = change.incident, change.at
        latest = _latest(incident.actions[-200:])
        done = [a for a in latest if a.decision == "run"]
        live = any(a.directive and a.outcome in _IN_FORCE for a in done)
        waiting = [a for a in incident.actions[-200:] if a.plan and (a.until is None or a.until > at)]
        return {
            "incident": incident,
            "change": change,
            "audience": audience,
            "at": at,
            "id": incident.id,
            "state": incident.state.value,
            "severity": incident.severity.sev,
            "headline": headline(incident, at),
            "impact": impact_parts(incident.impact),
            "worst": _worst(incident.impact),
            "apps": incident.impact.apps[:20],
            "tenants": incident.impact.tenants[:20],
            "root": _root(incident),
            "candidates": incident.candidates[:5],
            "changed": [_change_text(c, at) for c in _near(incident)],
            "changes": incident.changes[:20],
            "actions": incident.actions[-20:],
            "done": [_action_text(a) for a in done],
            "suggested": [a.runbook for a in latest if a.decision == "suggest" and not a.plan],
            "waiting": [_waiting_text(a, at) for a in waiting],
            "answer": f"flyball approve {fit(waiting[-1].plan, 40)}" if waiting else "",
            "refused": [_action_text(a) for a in latest if a.decision in ("refuse", "hold")],
            "buttons": _buttons(incident, live, waiting, at) if audience.interactive else (),
            "details": self._details(incident),
            "why": audience.why or "every incident goes here",
            "notice": notice(change, audience.first),
            "facts": _facts(incident),
            "members": [f"{name} ({n})" for name, n in incident.members[:21]],
        }

    def _details(self, incident: Incident) -> str:
        return f"flyball incident show {fit(incident.id, 64)} --why"

    def _links(self, incident: Incident) -> tuple[Link, ...]:
        links = []
        if self._public_url:
            # Only an id of our own making belongs into an address; anything else is quoted and short.
            links.append(
                Link("Incident", f"{self._public_url}/v1/incidents/{quote(fit(incident.id, 64), safe='')}")
            )
        for change in incident.changes[:3]:
            if url := safe_url(change.url):
                # The label names the host: a link from an event must show where it leads.
                links.append(Link(fit(f"Change at {urlsplit(url).hostname}", 75), url))
        return tuple(links)


def dedup_key(incident_id: str) -> str:
    """One key per incident for every side that tells copies by a key; at most 80 units, safe in addresses and logs."""
    if re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", incident_id):
        return f"flyball-{incident_id}"
    return f"flyball-{digest(incident_id.encode('utf-8', 'replace')).hex()}"


def safe_url(url: str) -> str:
    """The address if it is a plain http(s) one that is fit to show as a link, else the empty text."""
    if not 0 < len(url) <= 1000 or not url.isascii() or re.search(r"[\s<>\"'`|\\^{}\x00-\x1f\x7f]", url):
        return ""
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        return ""
    # Someone else's name and password in front of the host make an address look like what it is not.
    plain = parts.scheme in ("http", "https") and parts.hostname and not parts.username and port_ok
    return url if plain else ""


def headline(incident: Incident, at: float) -> str:
    """What broke, for whom, since when: the incident's own title, else one made of its parts."""
    if incident.title.strip():
        return incident.title
    what = incident.klass or incident.signal
    return f"{incident.root.name}: {what} since {clock(incident.since, at)}"


def impact_parts(impact: Impact) -> list[str]:
    """For whom and how much, as short phrases; what is not known leaves none."""
    parts = []
    for n, word in ((impact.n_apps, "app"), (impact.n_tenants, "tenant")):
        if n > 0:
            parts.append(f"{count(n)} {word}{'s' if n != 1 else ''}")
    if impact.failed_calls > 0:
        parts.append(f"{count(impact.failed_calls)} failed call{'s' if impact.failed_calls != 1 else ''}")
    elif impact.calls > 0:
        parts.append(f"{count(impact.calls)} call{'s' if impact.calls != 1 else ''}")
    if impact.failed_ratio_now > 0:
        parts.append(f"{ratio(impact.failed_ratio_now)} fail now")
    if impact.usd_per_min_now > 0 or impact.usd_per_min_baseline > 0:
        usual = f" (usual {money(impact.usd_per_min_baseline)})" if impact.usd_per_min_baseline > 0 else ""
        parts.append(f"{money(impact.usd_per_min_now)}/min{usual}")
    if impact.usd_wasted > 0:
        parts.append(f"{money(impact.usd_wasted)} wasted")
    elif impact.usd_since_start > 0:
        parts.append(f"{money(impact.usd_since_start)} since the start")
    return parts


def _worst(impact: Impact) -> str:
    if not impact.apps:
        return ""
    name, _, share = impact.apps[0]
    return (
        f"{fit(name, 40)} worst ({ratio(share)})"
        if impact.n_apps > 1
        else f"{fit(name, 40)} ({ratio(share)})"
    )


def _root(incident: Incident) -> RootCandidate:
    for candidate in incident.candidates:
        if candidate.entity == incident.root:
            return candidate
    return RootCandidate(entity=incident.root, confidence=incident.confidence)


def _near(incident: Incident) -> list[RelatedChange]:
    """Changes within an hour of the beginning, the nearest first."""
    near = [c for c in incident.changes[:1000] if abs(c.at - incident.since) <= CHANGE_SPAN_S]
    return sorted(near, key=lambda c: (abs(c.at - incident.since), c.at))


def _change_text(change: RelatedChange, at: float) -> str:
    return f"{clock(change.at, at)} {fit(change.summary, 60) or fit(change.kind, 60)}"


def _latest(actions: Sequence[ActionNote]) -> list[ActionNote]:
    """The last note of each runbook and directive, oldest first; a refusal that was followed by a run is history."""
    last: dict[tuple[str, str], ActionNote] = {}
    for note in actions:
        last.pop((note.runbook, ""), None)
        key = (note.runbook, note.directive)
        last.pop(key, None)
        last[key] = note
    return list(last.values())


_IN_FORCE: Final = ("granted", "in_force", "applied", "verified")


def _action_text(note: ActionNote) -> str:
    what = fit(note.detail, 60) or fit(note.reason, 60)
    outcome = f", {note.outcome.replace('_', ' ')}" if note.outcome else ""
    by = f", approved by {fit(note.by, 30)}" if note.by and note.decision == "run" else ""
    by = by or (f", by {fit(note.by, 30)}" if note.by else "")
    return f"{fit(note.runbook, 40)} ({what}{outcome}{by})" if what or outcome else fit(note.runbook, 40)


def _waiting_text(note: ActionNote, at: float) -> str:
    """`provider-failover PLAN-7QF3XK2A4B until 10:42`: what an answer is bound to, and how long it counts."""
    until = f" until {clock(note.until, at)}" if note.until is not None else ""
    return f"{fit(note.runbook, 40)} {fit(note.plan, 24)}{until}"


_MOST_ANSWERS: Final = 2


def _buttons(incident: Incident, live: bool, waiting: Sequence[ActionNote], at: float) -> tuple[Button, ...]:
    if incident.state is State.RESOLVED:
        return ()
    buttons = []
    for note in waiting[-_MOST_ANSWERS:]:
        which = f" {fit(note.runbook, 40)}" if len(waiting) > 1 else ""
        what = f"{_waiting_text(note, at)}: {fit(note.detail, 120)}"
        buttons.append(Button("approve", f"approve{which}", "primary", what, note.plan))
        buttons.append(Button("deny", f"deny{which}", "", "", note.plan))
    if not incident.acknowledged_by:
        buttons.append(Button("ack", "acknowledge", "" if waiting else "primary"))
    if live:
        buttons.append(Button("undo", "undo now", "danger", "Traffic goes back to where it went before."))
    return (*buttons, Button("silence", "silence 1 h"))


def _reason(change: IncidentChange, first: bool) -> str:
    if change.new == State.RESOLVED:
        return "resolved"
    if first:
        return "first"
    if change.old == State.RESOLVED:
        return "reopened"
    return "update" if change.notify else "figures"


def notice(change: IncidentChange, first: bool) -> str:
    """Why this message was sent now, in words."""
    incident, reason = change.incident, _reason(change, first)
    if reason == "resolved":
        took = duration((incident.resolved_at or change.at) - incident.since)
        return f"{'first notice, already ' if first else ''}resolved after {took}"
    if reason == "first":
        return "first notice"
    if reason == "reopened":
        return f"reopened ({incident.reopened}×): {fit(change.reason, 80)}"
    return f"update: {fit(change.reason, 100)}" if reason == "update" else "figures brought up to date"


def _facts(incident: Incident) -> tuple[tuple[str, str], ...]:
    """Names and values behind the incident; long texts are left out (see FACT_LIMIT)."""
    facts: list[tuple[str, str]] = [("signal", fit(incident.signal, 80))]
    if incident.klass:
        facts.append(("class", fit(incident.klass, 80)))
    facts.extend((fit(k, 40), fit(v, 80)) for k, v in list(incident.scope.items())[:12])
    for name, value in list(incident.evidence.items())[:24]:
        if isinstance(value, list):
            short = [v for v in value[:5] if len(v) <= FACT_LIMIT]
            facts.append((fit(name, 40), str(listed(short, 5, 40))))
        elif isinstance(value, str):
            if len(value) <= FACT_LIMIT:
                facts.append((fit(name, 40), fit(value, FACT_LIMIT)))
        else:
            facts.append((fit(name, 40), f"{value:.6g}" if isinstance(value, float) else str(value)[:40]))
    return tuple((k, v) for k, v in facts if k and v)


def _joined(lines: Sequence[str], most: int) -> str:
    """Whole lines up to `most` units; never a part of one."""
    out, used = [], 0
    for line in lines:
        used += len(line.encode("utf-16-le")) // 2 + 1
        if used > most:
            break
        out.append(line)
    return "\n".join(out)


def _problem(error: Exception, path: Path) -> ConfigError:
    line: int | None = None
    if isinstance(error, jinja2.TemplateSyntaxError):
        line = error.lineno
    else:
        line = _line_in(error.__traceback__, str(path))
    what = clean(
        str(error.message or "")
        if isinstance(error, jinja2.TemplateError)
        else f"{type(error).__name__}: {error}"
    )
    if isinstance(error, jinja2.TemplateNotFound):
        what = (
            f"extends or includes {error.name!r}, which does not exist; built-in ones are builtin/<name>.j2"
        )
    return ConfigError(
        f"{what}; the built-in template is used", where=f"{path}:{line}" if line else str(path)
    )


def _line_in(traceback: TracebackType | None, filename: str) -> int | None:
    found = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == filename:
            found = traceback.tb_lineno
        traceback = traceback.tb_next
    return found


def _sample_changes() -> list[IncidentChange]:
    """A full incident and a bare one: what a person's template is tried on when it is read."""
    at, root = 1_700_000_000.0, Entity("provider", "b")
    bare = Incident(id="INC-SAMPLE00", at=at, since=at, updated_at=at, root=root, signal="llm.errors")
    full = Incident(
        id="INC-SAMPLE01", at=at, since=at - 20, updated_at=at + 60, root=root, signal="llm.errors", klass="overloaded",
        severity=Severity.HIGH, severity_reason="61 % of calls fail", state=State.RESOLVED, scope={"provider": "b"},
        page=True, title="b: 61 % of calls fail (overloaded) since 22:13", summary="61 % of calls to b fail.",
        confidence=0.9, candidates=(RootCandidate(root, 0.9, ("3 models",), ("none of its 401s",)),), n_anomalies=2,
        members=(("provider:b", 2),),
        impact=Impact(
            calls=100, failed_calls=61, failed_ratio_now=0.61, usd_per_min_now=6.8, usd_per_min_baseline=2.0,
            usd_since_start=10.0, usd_wasted=2.0, apps=(("checkout", 61, 0.92),), tenants=(("t1", 3, 0.5),), n_apps=4,
            n_tenants=37,
        ),
        evidence={"observed": 0.61, "n": 100, "classes": ["overloaded"], "pattern": "x"}, samples=("e1",),
        changes=(RelatedChange(at - 60, "deploy", "router 1.2"),),
        actions=(
            ActionNote(at + 5, "failover", "run", "when_matched", "verified", "25 % to a", "DIR-1"),
            ActionNote(at + 5, "throttle", "refuse", "cooldown"),
            ActionNote(at + 5, "shed", "suggest", "mode_suggest", plan="PLAN-1", until=at + 600),
            ActionNote(at + 6, "cap", "run", "approved", "verified", "to small", "DIR-2", by="ann"),
        ),
        seen_before=("INC-OLD",), reopened=1, resolved_at=at + 60, acknowledged_by="ann", revision=3,
    )  # fmt: skip
    return [
        IncidentChange(incident=bare, at=at, old="", new="open", reason="opened", notify=True),
        IncidentChange(
            incident=full, at=at + 60, old="verifying", new="resolved", reason="back to normal", notify=True
        ),
        IncidentChange(incident=full, at=at + 60, old="open", new="open", reason="new figures"),
    ]
