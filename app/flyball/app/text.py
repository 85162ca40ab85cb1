"""One line of text for each thing that `--json` prints as an object."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from flyball.core.directives import Intervention
from flyball.core.plans import format_duration


def clock(at: float | None) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S") if at is not None else "-"


def labels(scope: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in scope.items())


_REFUSALS: Final = {
    "approval_unknown": "nothing waits under this hash; `flyball approvals` lists what does",
    "approval_used": "it was answered already; an answer counts once",
    "approval_expired": "the time for an answer is over; what is right now is offered again",
    "approval_withdrawn": "it no longer waits: its incident or a guard changed",
    "approval_unsigned": "nobody's name is on the answer",
    "own_change": "who made a change that belongs to the incident does not approve what answers it; another person has to",
    "plan_changed": "its targets are others now; read what is offered again",
    "not_stopped": "it is not stopped; `flyball stops` lists what is",
    "nothing_in_force": "nothing of that name is in force",
    "stage_raised": "Flyball failed over it and left it out; see `flyball doctor`",
}


def refusal(said: Intervention) -> str:
    """Why a person's word was not taken, in words; what the reason does not say, its detail does."""
    detail = str(said.values.get("detail", ""))
    return detail or _REFUSALS.get(said.reason, said.reason.replace("_", " "))


def replay_line(line: dict[str, Any]) -> str:
    at = clock(line["at"])
    kind = line["type"]
    if kind == "incident":
        page = "PAGE  " if line["page"] else "      "
        return f"{at}  {page}{line['id']}  {line.get('title') or line['summary']}  (root {line['root']['kind']}:{line['root']['name']})"
    if kind == "incident_change":
        return f"{at}        {line['id']}  {line['from'] or 'new'} -> {line['to']}: {line['reason']}"
    if kind == "decision":
        detail = f"; {line['detail']}" if line["detail"] else ""
        return f"{at}        {line['incident']}  {line['runbook']}: {line['decision']} ({line['reason']}{detail})"
    if kind == "directive":
        return f"{at}        {line['incident']}  {line['change']} {line['kind']} {labels(line['scope'])}: {_params_text(line['params'])}, until {clock(line['expires_at'])}"
    if kind == "operation":
        return f"{at}        {line['incident']}  {line['verb']} {line['hook']}/{line['action']} on {', '.join(line['targets'])}"
    return f"{at}        {line['incident']}  {line.get('action', '')}: {line.get('result', '')} {line.get('reason', '')}".rstrip()


def incident_lines(i: dict[str, Any], *, why: bool) -> list[str]:
    """An incident as its page says it; with `why`, also the evidence behind each figure."""
    lines = [
        f"{i['id']}  {i['severity'].upper()}  {i['state']}  since {clock(i['since'])}",
        i["title"],
        i["summary"],
        "",
    ]
    for c in i["candidates"][: None if why else 1]:
        lines.append(f"root {c['root']['kind']}:{c['root']['name']}, {c['confidence']:.2f}")
        lines += [f"    for: {fact}" for fact in c["for"]]
        lines += [f"    against: {fact}" for fact in c["against"]]
    lines += [f"changed {clock(c['at'])}  {c['kind']}: {c['summary']}" for c in i["changes"]]
    lines += [
        f"{clock(a['at'])}  {a['runbook']}: {a['decision']} {a['outcome']} ({a['reason']}{'; ' + a['detail'] if a['detail'] else ''})"
        for a in i["actions"]
    ]
    lines += [f"{clock(h['at'])}  {h['from'] or 'new'} -> {h['to']}: {h['reason']}" for h in i["history"]]
    if i["seen_before"]:
        lines.append(f"seen before: {', '.join(i['seen_before'])}")
    if why:
        lines.append("evidence")
        lines += [f"    {k} = {v}" for k, v in sorted(i["evidence"].items())]
        lines += [f"    impact.{k} = {v}" for k, v in i["impact"].items() if v]
        lines += [f"    severity: {i['severity_reason']}"] if i["severity_reason"] else []
        lines += [f"    sample events: {', '.join(i['samples'])}"] if i["samples"] else []
    return lines


def ledger_text(e: dict[str, Any]) -> str:
    """What a line of the ledger says, in a few words: `decision refuse: cooldown`."""
    b = e["body"]
    if e["kind"] == "person":
        taken = "" if b["accepted"] else "refused, "
        return f"person {b['by']} {b['kind']} {b['subject']}: {taken}{b['reason'] or 'taken'}"
    if e["kind"] == "operation":
        return f"operation {b['verb']} {b['hook']}/{b['action']} attempt {b['attempt']}: {', '.join(b['targets'])}"
    what = b.get("decision") or b.get("change") or b.get("result") or ""
    by = f" by {b['by']}" if b.get("by", "flyball") != "flyball" else ""
    return f"{e['kind']} {what}{by}: {b.get('reason', '')}"


def entry_lines(e: dict[str, Any]) -> list[str]:
    """A line of the ledger in full, one value a line."""
    lines = [f"{e['key']}  line {e['seq']}  {clock(e['at'])}  {ledger_text(e)}"]
    lines += [f"    {name} = {value}" for name, value in _flat(e["body"]) if value not in ("", None)]
    return [*lines, f"    sealed by {e['hash']}"]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [
        item
        for name, inner in value.items()
        for item in _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    ]


def waiting_lines(w: dict[str, Any]) -> list[str]:
    """What a person is asked, as it would be carried out."""
    which = f" step {w['step']}" if w["step"] else ""
    head = f"{w['hash']}  {w['runbook']}{which} for {w['incident']}, until {clock(w['until'])}"
    steps = w["plan"]["steps"]
    return [head, *(f"    {_step_text(s)}" for s in steps if not w["step"] or s["id"] == w["step"])]


def _step_text(s: dict[str, Any]) -> str:
    if s["hook"] is not None:
        what = f"{s['hook']['hook']}/{s['hook']['action']} on {', '.join(s['hook']['targets'])}"
    else:
        stages = " then ".join(_params_text(stage) for stage in s["stages"])
        what = f"{labels(s['scope'])}: {stages}"
    return f"{s['id']}: {s['action']} {what}, for {format_duration(s['hold_s'])} at most"


def _params_text(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {labels(v) if isinstance(v, dict) else format(v, 'g') if isinstance(v, float) else v}"
        for k, v in sorted(params.items())
    )


def explained_lines(e: dict[str, Any]) -> list[str]:
    until = f" until {clock(e['until'])}" if e["until"] is not None else ""
    lines = [f"{e['runbook']}: {e['verdict']} ({e['reason']}{until}); {e['detail']}"]
    for g in e["guards"]:
        values = ", ".join(f"{k} = {_value_text(v)}" for k, v in g["values"].items())
        lines.append(
            f"    {'ok' if g['ok'] else 'NO':2}  {g['name']}: {g['detail']}{f'  ({values})' if values else ''}"
        )
    return lines


def _value_text(value: Any) -> str:
    return format(value, "g") if isinstance(value, float) else str(value)
