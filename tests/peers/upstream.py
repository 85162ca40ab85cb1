"""A small OpenAI-compatible upstream that answers as the model's name says, with bodies as the providers send them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from flyball.core.directives import Directive
from flyball.core.events import LlmCall
from flyball.streams.formats.litellm import LiteLlm
from tests.processes import free_port

FAILURES: dict[str, tuple[int, dict[str, Any]]] = {
    "rate-limited": (429, {"message": "Rate limit reached for requests", "type": "requests", "code": "rate_limit_exceeded"}),
    "overloaded-529": (529, {"message": "Overloaded", "type": "overloaded_error", "code": None}),
    "overloaded-503": (503, {"message": "The engine is currently overloaded, please try again later", "type": "server_error", "code": None}),
    "quota": (429, {"message": "You exceeded your current quota, please check your plan and billing details.", "type": "insufficient_quota", "code": "insufficient_quota"}),
    "too-long": (400, {"message": "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens.", "type": "invalid_request_error", "code": "context_length_exceeded"}),
    "bad-key": (401, {"message": "Incorrect API key provided", "type": "invalid_request_error", "code": "invalid_api_key"}),
}  # fmt: skip
"""Last part of the model's name → status and error."""


class Asked(NamedTuple):
    """One request as it arrived: under which first part of the path, for which model, with which limit of output."""

    place: str
    model: str
    max_tokens: int | None

    @classmethod
    def of(cls, place: str, body: dict[str, Any]) -> Asked:
        limits = (body.get(n) for n in ("max_tokens", "max_completion_tokens", "max_output_tokens"))
        return cls(place, str(body["model"]), next((n for n in limits if n is not None), None))


class Upstream:
    """Counts what it answered; `app` is the ASGI application, which answers at `/v1` and at any other first part of the path."""

    def __init__(self) -> None:
        self.answered: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self.broken: set[str] = set()
        """Places that are overloaded just now, whatever they are asked."""
        self.app = FastAPI()

        @self.app.post("/{place}/chat/completions")
        async def chat(place: str, request: Request) -> JSONResponse:
            body = await request.json()
            model = str(body["model"])
            self.answered[model] += 1
            self.asked.append(
                Asked(place, model, body.get("max_tokens") or body.get("max_completion_tokens"))
            )
            for name, (status, error) in FAILURES.items():
                if model.endswith(name) or (place in self.broken and name == "overloaded-503"):
                    return JSONResponse({"error": error}, status_code=status)
            return JSONResponse(
                {
                    "id": f"chatcmpl-{self.answered[model]:06d}-{model}", "object": "chat.completion", "created": int(time.time()), "model": f"{model}-2026",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "The lamp is green."}}],
                    "usage": {"prompt_tokens": 120, "completion_tokens": 34, "total_tokens": 154, "prompt_tokens_details": {"cached_tokens": 64}},
                }
            )  # fmt: skip

        @self.app.post("/{place}/{route:path}")
        async def other(place: str, route: str, request: Request) -> JSONResponse:
            """Other kinds of calls are noted, and answered with an error of theirs."""
            self.asked.append(Asked.of(place, await request.json()))
            return JSONResponse(
                {"error": {"message": "not served here", "type": "not_found"}}, status_code=404
            )


class Governor:
    """Stands in for Flyball: a set of directives that tests change, with ETag and long poll; reports on it; calls read as Flyball
    reads them."""

    def __init__(self) -> None:
        self.held: list[dict[str, Any]] = []
        self.version = 0
        self.reports: list[dict[str, Any]] = []
        self.calls: list[LlmCall] = []
        self._format = LiteLlm()
        self.app = FastAPI()

        @self.app.get("/v1/directives")
        async def directives(request: Request, wait: float = 0.0) -> Response:
            end = time.monotonic() + wait
            while request.headers.get("if-none-match") == f'"{self.version}"':
                if time.monotonic() >= end or await request.is_disconnected():
                    return Response(status_code=304)
                await asyncio.sleep(0.02)
            return JSONResponse(self.held, headers={"ETag": f'"{self.version}"'})

        @self.app.post("/v1/enforced")
        async def enforced(request: Request) -> Response:
            self.reports.append(await request.json())
            return Response(status_code=202)

        @self.app.post("/ingest/litellm")
        async def ingest(request: Request) -> Response:
            self.calls += [
                e for e in self._format.decode(await request.body()).events if isinstance(e, LlmCall)
            ]
            return Response(status_code=202)

    def hold(self, *directives: Directive) -> None:
        self.held = [msgspec.to_builtins(d) for d in directives]
        self.version += 1

    def is_held(self, *identities: str) -> bool:
        """Whether the newest report says that exactly these are in force."""
        return bool(self.reports) and sorted(self.reports[-1]["directives"]) == sorted(identities)

    def counted(self, identity: str) -> int:
        return sum(int(r["directives"].get(identity, 0)) for r in list(self.reports))


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The application on a free port of this process; gives its address."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
