"""One line of text for each thing that `--json` prints as an object."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any


def clock(at: float | None) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S") if at is not None else "-"


def labels(scope: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in scope.items())


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
        return f"{at}        {line['incident']}  {line['change']} {line['kind']} {labels(line['scope'])} until {clock(line['expires_at'])}"
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
