"""`flyball status`, `flyball incident …`: looking at what is and was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flyball.app.cli._common import (
    DEFAULT_URL,
    AsJson,
    Data,
    TokenOption,
    Url,
    client,
    database,
    get,
    print_json,
)
from flyball.core.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    app.command("status")(status)
    incident = typer.Typer(help="Incidents: list, show, ack, resolve, silence.", no_args_is_help=True)
    incident.command("list")(incident_list)
    incident.command("show")(incident_show)
    for kind, help_text in (
        ("ack", "Says that somebody looks after it."),
        ("resolve", "Ends it by a person's word."),
        ("reopen", "Takes a resolved one up again."),
    ):
        incident.command(kind, help=help_text + _examples(kind))(_commander(kind))
    incident.command("silence")(incident_silence)
    app.add_typer(incident, name="incident")


def _examples(kind: str) -> str:
    return f"\n\nExamples:\n\n  flyball incident {kind} INC-7QF3XK2A\n\n  flyball incident {kind} INC-7QF3XK2A --url http://127.0.0.1:4390"


def status(
    url: Url = DEFAULT_URL, token: TokenOption = "", data: Data = None, as_json: AsJson = False
) -> None:
    """What was read, found and done since the beginning.

    Examples:

      flyball status

      flyball status --data flyball-data --json
    """
    found = _offline_status(data) if data is not None else get(url, token, "/v1/status")
    if as_json:
        print_json(found)
        return
    events = ", ".join(f"{n:,} {kind}" for kind, n in sorted(found["events"].items())) or "none yet"
    rejected = ", ".join(f"{n:,} {reason}" for reason, n in sorted(found["rejected"].items())) or "none"
    incidents = ", ".join(f"{n} {state}" for state, n in found["incidents"].items() if n) or "none"
    print(f"events      {events}")
    print(f"not counted {found['duplicates']:,} copies, {found['late']:,} late; rejected: {rejected}")
    print(f"incidents   {incidents}; {found['pages']} pages")
    print(f"directives  {found['directives']} granted, {found['live_directives']} in force")
    if found["stopped"]:
        print(f"STOPPED     {', '.join(found['stopped'])}; take it back: flyball resume SCOPE")
    if found.get("waiting"):
        print(f"approvals   {found['waiting']} wait for a person: flyball approvals")
    if found.get("runbooks_refused"):
        print("runbooks    newer files are refused, the set before them runs: flyball doctor")
    if found["left_out"]:
        print(f"LEFT OUT    {found['left_out']} records that a stage failed over: flyball doctor")
    print(f"position    {found['position']}, {found['lag_bytes']:,} bytes unread")
    for kind, why in found["disabled_detectors"].items():
        print(f"detector {kind} is switched off: {why}")


def _offline_status(data: Path) -> dict[str, Any]:
    from flyball.app.clock import SystemClock
    from flyball.app.http.read import assemble_status
    from flyball.app.store import acts, store

    with database(data) as c:
        position = store.position(c)
        oldest = store.oldest_unread(c, position)
        lag_s = SystemClock().now() - oldest if oldest is not None else 0.0
        return assemble_status(
            store.counters(c), store.edge(c).rejected, store.incident_counts(c), position,
            lag_s, store.backlog_bytes(c, position), len(acts.live_directives(c)), acts.skipped_count(c),
            list(acts.live_stops(c).live),
        )  # fmt: skip


def incident_list(
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
    data: Data = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Incidents, newest first.

    Examples:

      flyball incident list

      flyball incident list --data flyball-data --limit 100 --json
    """
    from flyball.app.text import clock

    found = (
        _offline_incidents(data, limit) if data is not None else get(url, token, "/v1/incidents", limit=limit)
    )
    for i in found:
        if as_json:
            print_json(i)
        else:
            page = "PAGE" if i["page"] else "    "
            print(f"{i['id']}  {clock(i['at'])}  {page}  {i['state']:12}  {i['severity']:8}  {i['title']}")


def incident_show(
    incident: Annotated[str, typer.Argument(help="Id, as in the alert.")],
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
    data: Data = None,
    why: Annotated[bool, typer.Option("--why", help="Every figure with the evidence behind it.")] = False,
    as_json: AsJson = False,
) -> None:
    """One incident: what broke, for whom, why we think so, what was done.

    Examples:

      flyball incident show INC-7QF3XK2A

      flyball incident show INC-7QF3XK2A --why --data flyball-data
    """
    from flyball.app.text import incident_lines

    if data is not None:
        found = _offline_incident(data, incident)
    else:
        found = get(url, token, f"/v1/incidents/{incident}")
    if as_json:
        print_json(found)
        return
    for line in incident_lines(found, why=why):
        print(line)


def _offline_incidents(data: Path, limit: int) -> list[dict[str, Any]]:
    from flyball.app import views
    from flyball.app.store import store

    with database(data) as c:
        return [views.incident(i) for i in store.list_incidents(c, limit)]


def _offline_incident(data: Path, incident: str) -> dict[str, Any]:
    from flyball.app.http.history import assemble_incident

    with database(data) as c:
        found = assemble_incident(c, incident)
    if found is None:
        raise ConfigError(f"no incident {incident!r}; `flyball incident list --data {data}` lists them")
    return found


def _commander(kind: str) -> Any:
    def command(
        incident: Annotated[str, typer.Argument(help="Id, as in the alert.")],
        url: Url = DEFAULT_URL,
        token: TokenOption = "",
    ) -> None:
        _post_command(url, token, incident, {"kind": kind})

    return command


def incident_silence(
    incident: Annotated[str, typer.Argument(help="Id, as in the alert.")],
    for_s: Annotated[float, typer.Option("--for-s", min=1, help="Seconds of silence.")] = 3600.0,
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
) -> None:
    """Nobody hears of it for a while; it goes on being watched and acted on.

    Examples:

      flyball incident silence INC-7QF3XK2A

      flyball incident silence INC-7QF3XK2A --for-s 7200
    """
    _post_command(url, token, incident, {"kind": "silence", "for_s": for_s})


def _post_command(url: str, token: str, incident: str, body: dict[str, Any]) -> None:
    with client(url, token) as c:
        response = c.post(f"/v1/incidents/{incident}", json=body)
        response.raise_for_status()
    print(f"{incident}: {body['kind']} taken")
