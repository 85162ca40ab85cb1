"""What people decide: approvals, the kill switch, letting go; and what decisions are made of: runbooks, guards, the ledger."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel, Field

from flyball.app import views
from flyball.app.embedded import Embedded
from flyball.app.http.answers import json_response
from flyball.app.http.auth import Auth
from flyball.app.orders import Command, Order
from flyball.app.reload import RunbookWatch
from flyball.app.store import store
from flyball.app.text import refusal
from flyball.core.directives import Approval, Directive, Intervention, Release, StopChange
from flyball.core.errors import ConfigError
from flyball.core.stops import Stops, check_scope

ANSWER_S: Final = 2.0
"""How long a person's request waits for what came of it; after that it is taken, and its consequences follow."""


class CommandBody(BaseModel):
    """A person's word about an incident."""

    kind: Literal["ack", "resolve", "silence", "reopen"]
    for_s: float = Field(3600.0, gt=0, le=7 * 86_400, description="How long a silence lasts, seconds.")


class ApprovalBody(BaseModel):
    """A person's answer to what waits."""

    hash: str = Field(min_length=1, max_length=100, description="As in `GET /v1/approvals`.")
    approve: bool = Field(description="False denies it.")


class StopBody(BaseModel):
    """The kill switch."""

    scope: str = Field(
        "all", max_length=600, description="`all`, `tenant:NAME`, `runbook:NAME` or `action:KIND`."
    )
    change: Literal["stop", "resume", "reset"] = Field(
        "stop", description="`reset` closes the breaker of `runbook:NAME`."
    )
    reason: str = Field("", max_length=500)
    release: bool = Field(False, description="With `stop`: also let go of the leases that it forbids.")


async def say(runtime: Embedded, order: Order, wait_s: float = ANSWER_S) -> Intervention | None:
    """What came of a person's word; None when the stages have not reached it in time. It is taken in any case."""
    stored, answer = runtime.say(order)
    await asyncio.wrap_future(stored)
    waiting = asyncio.wrap_future(answer)
    done, _ = await asyncio.wait({waiting}, timeout=wait_s)
    return waiting.result() if done else None


def answered(said: Intervention | None, **more: Any) -> Response:
    """200 with what came of it, 202 while that is not known, 409 with why not."""
    if said is None:
        return json_response({"taken": True, "accepted": None, **more}, 202)
    body = {"accepted": said.accepted, "incident": said.incident, "runbook": said.runbook, **more}
    if said.values.get("outcome") == "not_accepted":
        return json_response(body | {"carried_out": False, "reason": said.values.get("why", "")})
    if said.accepted:
        return json_response(body)
    return json_response(body | {"reason": said.reason, "error": refusal(said)}, 409)


def router(runtime: Embedded, auth: Auth, watch: RunbookWatch) -> APIRouter:
    r = APIRouter()
    _incidents(r, runtime, auth)
    _people(r, runtime, auth)
    _reading(r, runtime, auth, watch)
    return r


def _incidents(r: APIRouter, runtime: Embedded, auth: Auth) -> None:
    @r.post("/v1/incidents/{incident_id}", summary="Acknowledge, resolve, silence or reopen")
    async def command(request: Request, incident_id: str, body: CommandBody) -> Response:
        who = auth.check(request, "operate")
        with runtime.reader.connect() as c:
            found = store.get_incident(c, incident_id)
        if found is None:
            raise HTTPException(404, f"no incident {incident_id!r}; `GET /v1/incidents` lists them")
        now = runtime.clock.now()
        until = now + body.for_s if body.kind == "silence" else None
        said = await say(runtime, Command(body.kind, incident_id, who, now, until))
        return answered(said, incident=incident_id, kind=body.kind)

    @r.get("/v1/incidents/{incident_id}/explain", summary="Every runbook's guards for an incident now")
    async def explain(request: Request, incident_id: str) -> Response:
        auth.check(request, "read")
        with runtime.reader.connect() as c:
            if store.get_incident(c, incident_id) is None:
                raise HTTPException(404, f"no incident {incident_id!r}; `GET /v1/incidents` lists them")
        found = await asyncio.wrap_future(runtime.ask(lambda p: p.explain(incident_id)))
        return json_response([views.explained(e) for e in found])


def _people(r: APIRouter, runtime: Embedded, auth: Auth) -> None:
    @r.get("/v1/approvals", summary="What waits for a person: plans, and steps that ask first")
    async def approvals(request: Request) -> Response:
        auth.check(request, "operate")
        now = runtime.clock.now()
        return json_response([views.waiting(w) for w in runtime.figures.waiting if w.until >= now])

    @r.post("/v1/approvals", summary="Approve or deny what waits, by its hash")
    async def approve(request: Request, body: ApprovalBody) -> Response:
        who = auth.check(request, "operate")
        order = Approval(waiting=body.hash, approve=body.approve, by=who, at=runtime.clock.now())
        return answered(await say(runtime, order), hash=body.hash)

    @r.get("/v1/stops", summary="What is stopped")
    async def stops(request: Request) -> Response:
        auth.check(request, "read")
        return json_response([views.stop(s) for s in runtime.switchboard.stops.live.values()])

    @r.post("/v1/stops", summary="The kill switch: stop, resume; or reset a breaker")
    async def switch(request: Request, body: StopBody) -> Response:
        who = auth.check(request, "operate")
        try:
            check_scope(body.scope)
        except ConfigError as e:
            raise HTTPException(422, str(e)) from e
        if body.change == "reset" and not body.scope.startswith("runbook:"):
            raise HTTPException(422, "only a runbook has a breaker; write runbook:NAME")
        if body.change == "resume" and body.scope not in runtime.switchboard.stops.live:
            live = ", ".join(runtime.switchboard.stops.live) or "nothing"
            raise HTTPException(409, f"{body.scope} is not stopped; stopped: {live}")
        now = runtime.clock.now()
        order = StopChange(change=body.change, scope=body.scope, by=who, at=now, reason=body.reason)
        # In force once it is stored: nobody waits here for the stages.
        await asyncio.wrap_future(runtime.order(order))
        released = []
        if body.release and body.change == "stop":
            released = sorted(d.id for d in runtime.board.live().values() if _under(order, d))
            for name in released:
                await asyncio.wrap_future(runtime.order(Release(subject=name, by=who, at=now)))
        stopped = [views.stop(s) for s in runtime.switchboard.stops.live.values()]
        return json_response({"accepted": True, "stopped": stopped, "released": released})

    @r.post("/v1/directives/{lease_id}/release", summary="Let go of a lease, an operation or a plan now")
    async def release(request: Request, lease_id: str) -> Response:
        who = auth.check(request, "operate")
        order = Release(subject="" if lease_id == "all" else lease_id, by=who, at=runtime.clock.now())
        return answered(await say(runtime, order), subject=lease_id)


def _reading(r: APIRouter, runtime: Embedded, auth: Auth, watch: RunbookWatch) -> None:
    @r.get("/v1/runbooks", summary="The runbooks that count, and why newer files are refused if they are")
    async def runbooks(request: Request) -> Response:
        auth.check(request, "read")
        figures = runtime.figures
        return json_response(
            {
                "ceiling": figures.ceiling,
                "since": watch.since,
                "refused": watch.refused,
                "runbooks": [views.runbook(b, figures.ceiling) for b in figures.runbooks],
            }
        )

    @r.get("/v1/runbooks/{name}", summary="One runbook as it is written")
    async def runbook(request: Request, name: str) -> Response:
        auth.check(request, "read")
        figures = runtime.figures
        found = figures.runbooks.by_name.get(name)
        if found is None:
            raise HTTPException(404, f"no runbook {name!r}; `GET /v1/runbooks` lists them")
        return json_response(views.runbook(found, figures.ceiling) | {"text": found.text})


def _under(stop: StopChange, directive: Directive) -> bool:
    alone = Stops({stop.scope: stop})
    return alone.against(directive.runbook, (directive.kind,), (directive.scope,)) is not None
