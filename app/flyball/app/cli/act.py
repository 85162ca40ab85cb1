"""`flyball approve`, `deny`, `stop`, `resume`, `release`, `approvals`, `stops`, and what a runbook makes of an incident: a person's hand."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flyball.app.cli._common import (
    DEFAULT_URL,
    AsJson,
    TokenOption,
    Url,
    get,
    post,
    print_json,
)
from flyball.app.cli.runbook import group as runbook_group

_Hash = Annotated[
    str, typer.Argument(help="Of the plan or step, as in the alert and in `flyball approvals`.")
]
_Scope = Annotated[str, typer.Argument(help="all, tenant:NAME, runbook:NAME or action:KIND.")]


def add_to(app: typer.Typer) -> None:
    for command in (approvals, approve, deny, stops, stop, resume, release):
        app.command(command.__name__)(command)
    runbook_group.command("explain")(explain)
    runbook_group.command("reset")(reset)


def approvals(url: Url = DEFAULT_URL, token: TokenOption = "", as_json: AsJson = False) -> None:
    """What waits for a person: plans, and steps of running plans that ask first.

    Examples:

      flyball approvals

      flyball approvals --json
    """
    from flyball.app.text import waiting_lines

    waiting = get(url, token, "/v1/approvals")
    if not waiting and not as_json:
        print("nothing waits for a person")
    for w in waiting:
        if as_json:
            print_json(w)
            continue
        for line in waiting_lines(w):
            print(line)


def approve(hash: _Hash, url: Url = DEFAULT_URL, token: TokenOption = "", as_json: AsJson = False) -> None:
    """Says yes to what waits under this hash. It is looked at once more, and carried out only as it was read.

    Examples:

      flyball approve PLAN-7QF3XK2A4B

      flyball approve PLAN-7QF3XK2A4B --url https://flyball.example --token $TOKEN
    """
    _say(url, token, "/v1/approvals", {"hash": hash, "approve": True}, f"{hash}: approved", as_json)


def deny(hash: _Hash, url: Url = DEFAULT_URL, token: TokenOption = "", as_json: AsJson = False) -> None:
    """Says no. The runbook does not offer it again for this incident until its cooldown is over.

    Examples:

      flyball deny PLAN-7QF3XK2A4B

      flyball deny PLAN-7QF3XK2A4B --json
    """
    _say(url, token, "/v1/approvals", {"hash": hash, "approve": False}, f"{hash}: denied", as_json)


def stops(url: Url = DEFAULT_URL, token: TokenOption = "", as_json: AsJson = False) -> None:
    """What is stopped, by whom and why.

    Examples:

      flyball stops

      flyball stops --json
    """
    from flyball.app.text import clock

    live = get(url, token, "/v1/stops")
    if not live and not as_json:
        print("nothing is stopped")
    for s in live:
        if as_json:
            print_json(s)
        else:
            print(f"{clock(s['at'])}  {s['scope']}  by {s['by']}{': ' + s['reason'] if s['reason'] else ''}")


def stop(
    scope: _Scope = "all",
    reason: Annotated[str, typer.Option(help="Why; it stands in the ledger.")] = "",
    release: Annotated[
        bool, typer.Option("--release", help="Also let go of the leases that this forbids.")
    ] = False,
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
    as_json: AsJson = False,
) -> None:
    """The kill switch: from now on nothing new is done, widened or renewed. What lets go always works. Survives a restart.

    Examples:

      flyball stop

      flyball stop tenant:acme --reason "migration tonight" --release
    """
    body = {"scope": scope, "change": "stop", "reason": reason, "release": release}
    answer = post(url, token, "/v1/stops", body)
    if as_json:
        print_json(answer)
        return
    let_go = f"; {len(answer['released'])} leases let go" if release else ""
    print(f"stopped: {scope}{let_go}. Take it back with: flyball resume {scope}")


def resume(
    scope: _Scope = "all", url: Url = DEFAULT_URL, token: TokenOption = "", as_json: AsJson = False
) -> None:
    """Takes a stop back.

    Examples:

      flyball resume

      flyball resume tenant:acme
    """
    answer = post(url, token, "/v1/stops", {"scope": scope, "change": "resume"})
    if as_json:
        print_json(answer)
        return
    rest = ", ".join(s["scope"] for s in answer["stopped"])
    print(f"goes on: {scope}" + (f"; still stopped: {rest}" if rest else ""))


def release(
    subject: Annotated[
        str, typer.Argument(help="Id of a lease or operation, hash of a plan, or `all`.", metavar="ID")
    ],
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
    as_json: AsJson = False,
) -> None:
    """Lets go now, whatever else holds: traffic goes back to where it went before. The plan behind it ends.

    Examples:

      flyball release DIR-7QF3XK2A4B

      flyball release all
    """
    _say(url, token, f"/v1/directives/{subject}/release", {}, f"{subject}: let go", as_json)


def _say(url: str, token: str, path: str, body: dict[str, Any], done: str, as_json: bool) -> None:
    answer = post(url, token, path, body)
    if as_json:
        print_json(answer)
    elif answer["accepted"] is None:
        print(f"{done.partition(':')[0]}: taken; Flyball is behind, what follows stands in the ledger")
    elif answer.get("carried_out") is False:
        print(f"{done}, but not carried out: {answer['reason']}")
    else:
        print(done)


def explain(
    incident: Annotated[str, typer.Argument(help="Id, as in the alert.")],
    runbook: Annotated[str, typer.Option("--runbook", help="Only this one.")] = "",
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
    as_json: AsJson = False,
) -> None:
    """For an incident now: what each runbook would do, and which guard has which value.

    Examples:

      flyball runbook explain INC-7QF3XK2A

      flyball runbook explain INC-7QF3XK2A --runbook provider-failover --json
    """
    from flyball.app.text import explained_lines

    for e in get(url, token, f"/v1/incidents/{incident}/explain"):
        if runbook and e["runbook"] != runbook:
            continue
        if as_json:
            print_json(e)
            continue
        for line in explained_lines(e):
            print(line)


def reset(
    name: Annotated[str, typer.Argument(help="Name of the runbook.")],
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
) -> None:
    """Closes the breaker of a runbook that failed too often. Only a person can.

    Examples:

      flyball runbook reset provider-failover

      flyball runbook reset provider-failover --url https://flyball.example
    """
    post(url, token, "/v1/stops", {"scope": f"runbook:{name}", "change": "reset"})
    print(f"{name}: its breaker is closed")
