"""What hooks say of themselves: signed callbacks about operations."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response

from flyball.app.embedded import Embedded
from flyball.app.hooks import called_back
from flyball.app.http.answers import json_response
from flyball.app.settings import Settings
from flyball.app.store import operations
from flyball.core.errors import DecodeError
from flyball.remediation.hooks import verify_callback
from flyball.remediation.signing import SignatureRefused


def router(runtime: Embedded, settings: Settings) -> APIRouter:
    r = APIRouter()
    secrets = {hook.name: hook.secrets for hook in settings.hooks}

    @r.post("/v1/operations/{operation_id}", summary="A hook says what became of an operation; signed")
    async def callback(request: Request, operation_id: str) -> Response:
        body = await request.body()
        with runtime.reader.connect() as c:
            hook = operations.hook_of(c, operation_id)
        # An unknown operation and a wrong signature are one answer: nobody learns here which ids there are.
        try:
            report = verify_callback(request.headers, body, secrets.get(hook, []), at=runtime.clock.now())
        except SignatureRefused as e:
            raise HTTPException(
                401, f"not signed by the hook that operation {operation_id[:60]!r} went to: {e}"
            ) from e
        except DecodeError as e:
            raise HTTPException(422, str(e)) from e
        if report.id != operation_id:
            raise HTTPException(422, f"the callback is about {report.id[:60]!r}, not {operation_id[:60]!r}")
        await called_back(runtime, report)
        return json_response({"accepted": True}, 202)

    return r
