"""The ASGI application: routes, errors as JSON, nothing about the host it runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from flyball.app.embedded import Embedded, Overloaded
from flyball.app.http import ingest, read
from flyball.app.http.auth import Auth
from flyball.app.http.body import BodyError
from flyball.app.settings import Settings
from flyball.core.ports import Format

Background = Callable[[], AbstractAsyncContextManager[None]]


def create_app(
    runtime: Embedded, formats: Mapping[str, Format], settings: Settings, background: Background | None = None
) -> FastAPI:
    """Args:
    background: what runs beside the server (ticks, scrapes, notifications) for as long as it is entered.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if background is None:
            yield
        else:
            async with background():
                yield

    app = FastAPI(title="Flyball", summary="The governor for AI in production", lifespan=lifespan)
    auth = Auth(settings.tokens)
    app.include_router(ingest.router(ingest.Ingest(runtime, formats, settings, auth)))
    app.include_router(read.router(runtime, auth))

    @app.exception_handler(Overloaded)
    async def _overloaded(_request: Request, e: Overloaded) -> Response:
        return ingest.overloaded(e)

    @app.exception_handler(BodyError)
    async def _refused(_request: Request, e: BodyError) -> Response:
        return ingest.refused(e)

    @app.exception_handler(ClientDisconnect)
    async def _gone(_request: Request, _e: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; a body that ended early is not our error

    return app
