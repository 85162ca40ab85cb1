"""The ASGI application: routes, errors as JSON, nothing about the host it runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flyball.app.embedded import Embedded, Overloaded, Stopped
from flyball.app.http import act, history, hooks, ingest, read, slack
from flyball.app.http.answers import json_response
from flyball.app.http.auth import Auth
from flyball.app.http.body import BodyError
from flyball.app.intake import Edge
from flyball.app.reload import RunbookWatch
from flyball.app.settings import Settings
from flyball.core.codec import encode_events
from flyball.core.errors import Ambiguous, Failed, NotAccepted
from flyball.core.ports import Format

Background = Callable[[], AbstractAsyncContextManager[None]]

_INGEST_PATHS: Final = frozenset({"/v1/events", "/ingest/litellm", "/v1/traces", "/v1/metrics", "/v1/logs"})
"""Bodies that are read with a limit of their own."""
_SMALL_BODY: Final = 1 << 20


def create_app(
    runtime: Embedded, formats: Mapping[str, Format], settings: Settings, background: Background | None = None,
    watch: RunbookWatch | None = None, edge: Edge[Any] | None = None,
) -> FastAPI:  # fmt: skip
    """Of a process that holds the database.

    Args:
        watch: of the files with runbooks, for what is wrong with them.
        background: what runs beside the server (ticks, scrapes, notifications) for as long as it is entered.
        edge: where telemetry goes to; None: into the runtime's own log.
    """
    auth = Auth(settings.tokens)
    watch = watch or RunbookWatch(runtime, settings)
    way_in: ingest.Ingest[Any] = (
        ingest.Ingest(runtime, encode_events, formats, settings, auth)
        if edge is None
        else ingest.Ingest(edge.intake, edge.encode, formats, settings, auth)
    )
    return assemble(
        [
            ingest.router(way_in),
            read.router(runtime, auth, watch, edge),
            history.router(runtime.reader.connect, auth),
            act.router(runtime, auth, watch),
            hooks.router(runtime, settings),
            slack.router(runtime, settings),
        ],
        background,
    )


def assemble(routers: Iterable[APIRouter], background: Background | None = None) -> FastAPI:
    """The application of these routes."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if background is None:
            yield
        else:
            async with background():
                yield

    app = FastAPI(title="Flyball", summary="The governor for AI in production", lifespan=lifespan)
    for router in routers:
        app.include_router(router)
    app.add_middleware(SmallBodies)
    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(Overloaded)
    async def _overloaded(request: Request, e: Overloaded) -> Response:
        what = f"{e}; come back in {e.retry_after_s:g} s"
        return ingest.refused(request, 429, what, e.retry_after_s)

    @app.exception_handler(Stopped)
    async def _stopped(request: Request, e: Stopped) -> Response:
        return ingest.refused(request, 503, f"{e}; nothing was taken, send it again", 1.0)

    @app.exception_handler(NotAccepted)
    async def _not_accepted(request: Request, e: NotAccepted) -> Response:
        return ingest.refused(request, 503, f"{e}; send it again", e.retry_after_s or 1.0)

    @app.exception_handler(Ambiguous)
    async def _ambiguous(request: Request, e: Ambiguous) -> Response:
        # Sent again, calls and steps are known by their ids and count once.
        return ingest.refused(request, 503, f"{e}; send it again", 1.0)

    @app.exception_handler(Failed)
    async def _never(request: Request, e: Failed) -> Response:
        return ingest.refused(request, 413, str(e))

    @app.exception_handler(BodyError)
    async def _refused(request: Request, e: BodyError) -> Response:
        return ingest.refused(request, e.status, e.what)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, e: HTTPException) -> Response:
        response = ingest.refused(request, e.status_code, _said(request, e))
        response.headers.update(e.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, e: RequestValidationError) -> Response:
        wrong = [{"where": ".".join(map(str, x["loc"])), "what": x["msg"]} for x in e.errors()[:10]]
        text = "; ".join(f"{w['where']}: {w['what']}" for w in wrong)
        return json_response({"error": text, "wrong": wrong}, 422)

    @app.exception_handler(ClientDisconnect)
    async def _gone(_request: Request, _e: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; a body that ended early is not our error


def _said(request: Request, e: HTTPException) -> str:
    """The router's own two words, as sentences."""
    if e.status_code == 404 and e.detail == "Not Found":
        return f"no such path {request.url.path[:200]!r}; /docs lists them"
    if e.status_code == 405 and e.detail == "Method Not Allowed":
        return f"{request.method} is not for {request.url.path[:200]!r}; /docs lists what is"
    return str(e.detail)


class SmallBodies:
    """Ends the reading of bodies that people and enforcement points send at 1 MiB: the framework reads them whole before we see them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _INGEST_PATHS:
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > _SMALL_BODY:
            await _too_large(scope, receive, send)
            return
        size, answered = 0, False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > _SMALL_BODY:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLarge:
            if not answered:
                await _too_large(scope, receive, send)


class _TooLarge(BaseException):
    """Not an Exception, because the framework turns every Exception while it reads a body into a 400."""


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    await json_response({"error": f"body of more than {_SMALL_BODY} bytes"}, 413)(scope, receive, send)
