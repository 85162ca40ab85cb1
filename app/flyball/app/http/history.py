"""What is read from the database alone: incidents and the ledger. For whoever owns it, and for those beside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from sqlalchemy import Connection

from flyball.app import views
from flyball.app.http.answers import json_response
from flyball.app.http.auth import Auth
from flyball.app.store import ledger, store


def assemble_incident(c: Connection, incident_id: str) -> dict[str, Any] | None:
    """One incident with its history and its lines of the ledger; None when there is none."""
    found = store.get_incident(c, incident_id)
    if found is None:
        return None
    history, entries = store.changes_of(c, incident_id), ledger.list_ledger(c, incident_id)
    return views.incident(found) | {"history": history, "ledger": entries}


def router(connect: Callable[[], AbstractContextManager[Connection]], auth: Auth) -> APIRouter:
    r = APIRouter()

    @r.get("/v1/incidents", summary="Incidents, newest first")
    def incidents(
        request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: str = ""
    ) -> Response:
        auth.check(request, "read")
        with connect() as c:
            return json_response([views.incident(i) for i in store.list_incidents(c, limit, after)])

    @r.get("/v1/incidents/{incident_id}", summary="One incident with its history and ledger")
    def incident(request: Request, incident_id: str) -> Response:
        auth.check(request, "read")
        with connect() as c:
            found = assemble_incident(c, incident_id)
        if found is None:
            raise HTTPException(404, f"no incident {incident_id!r}; `GET /v1/incidents` lists them")
        return json_response(found)

    @r.get("/v1/ledger", summary="Every decision and action, refusals included, in order")
    def ledger_lines(
        request: Request, incident: str = "", runbook: str = "",
        kind: Annotated[str, Query(pattern="^(decision|directive|outcome|operation|person)?$")] = "",
        after: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        newest: bool = False,
    ) -> Response:  # fmt: skip
        auth.check(request, "read")
        with connect() as c:
            return json_response(
                ledger.list_ledger(c, incident, limit, runbook=runbook, kind=kind, after=after, newest=newest)
            )

    @r.get("/v1/ledger/{key}", summary="One line of the ledger, by its key or number")
    def ledger_line(request: Request, key: str) -> Response:
        auth.check(request, "read")
        with connect() as c:
            found = ledger.get_entry(c, key)
        if found is None:
            raise HTTPException(404, f"the ledger has no line {key[:100]!r}; `GET /v1/ledger` lists them")
        return json_response(found)

    return r
