"""Telemetry in. A body is decoded at the edge (content ends here), appended, and answered once the commit is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import groupby
from typing import Any, Final

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from flyball.app.embedded import Embedded, Overloaded
from flyball.app.http.auth import Auth
from flyball.app.http.body import BodyError, decompress, read_body
from flyball.app.scrub import scrub
from flyball.app.settings import Settings
from flyball.app.store.store import DeadLetter
from flyball.core.ports import Decoded, Format, Rejected

_ON_LOOP_BYTES: Final = 64 << 10
"""Bodies up to this size are decoded on the event loop (well under a millisecond); larger ones in a thread."""
_LETTERS_PER_BODY: Final = 100
"""More bad events than this in one body become one dead letter per reason, which holds the bytes of all."""


class Ingest:
    """Decodes and appends; shared by the three ways in."""

    def __init__(
        self, runtime: Embedded, formats: Mapping[str, Format], settings: Settings, auth: Auth
    ) -> None:
        self.runtime, self.formats, self.settings, self.auth = runtime, formats, settings, auth

    async def take(self, request: Request, kind: str, *, patient: bool = True) -> Decoded:
        """Raises: HTTPException 401/403, BodyError, Overloaded."""
        who = self.auth.check(request, "ingest")
        limit = self.settings.limits.body_bytes
        raw = await read_body(request, limit)
        encoding, content_type = (
            request.headers.get("content-encoding", ""),
            request.headers.get("content-type", ""),
        )

        def decode() -> tuple[bytes, Decoded]:
            body = decompress(raw, encoding, limit)
            return body, self.formats[kind].decode(body, content_type)

        body, decoded = (
            decode() if len(raw) <= _ON_LOOP_BYTES and not encoding else await to_thread.run_sync(decode)
        )
        if decoded.events or decoded.rejected:
            now = self.runtime.clock.now()
            sender = f"{who}@{_peer(request)}"
            stored = self.runtime.ingest(
                decoded.events,
                sender,
                now,
                format=kind,
                dead=self._dead_letters(decoded, body, sender, kind, now),
                patient=patient,
            )
            await asyncio.wrap_future(stored)
        return decoded

    def _dead_letters(
        self, decoded: Decoded, body: bytes, sender: str, kind: str, now: float
    ) -> list[DeadLetter]:
        def letter(r: Rejected, data: bytes, n: int) -> DeadLetter:
            kept = scrub(data) if self.settings.retention.dead_letter_bytes else None
            return DeadLetter(now, sender, kind, r.reason, r.detail, len(data), kept, n)

        rejected = decoded.rejected
        if len(rejected) <= _LETTERS_PER_BODY:
            return [letter(r, r.data, 1) for r in rejected]
        letters = []
        for _, group in groupby(sorted(rejected, key=lambda r: r.reason), key=lambda r: r.reason):
            members = list(group)
            letters.append(letter(members[0], b"\n".join(scrub(m.data) for m in members), len(members)))
        return letters


def _peer(request: Request) -> str:
    """Who sends, for its watermark: a name it gives itself (several exporters behind one address), else its address."""
    named = request.headers.get("x-flyball-sender", "")
    return named[:128] if named else request.client.host if request.client else "-"


def router(ingest: Ingest) -> APIRouter:
    r = APIRouter()

    @r.post("/v1/events", summary="Native events, one JSON a line")
    async def events(request: Request) -> Response:
        return _answer(await ingest.take(request, "native"))

    @r.post("/ingest/litellm", summary="LiteLLM's generic_api callback: json_array, ndjson or single")
    async def litellm(request: Request) -> Response:
        return _answer(await ingest.take(request, "litellm", patient=False))

    @r.post("/v1/traces", summary="OTLP traces, protobuf or JSON")
    async def traces(request: Request) -> Response:
        decoded = await ingest.take(request, "otlp")
        whole = [x for x in decoded.rejected if x.reason in ("protobuf", "json", "too_large")]
        if whole and not decoded.events:
            # 400 tells an exporter that repeating will not help (OTLP 1.9).
            return JSONResponse({"code": 3, "message": whole[0].detail}, status_code=400)
        message = ExportTraceServiceResponse()
        if decoded.rejected:
            message.partial_success.rejected_spans = len(decoded.rejected)
            message.partial_success.error_message = decoded.rejected[0].detail
        return _otlp(request, message, {"partialSuccess": _partial(decoded)} if decoded.rejected else {})

    # Exporters that are given one endpoint send metrics and logs too; saying 404 would fill their logs with errors.
    @r.post("/v1/metrics", summary="OTLP metrics: answered, not read")
    async def metrics(request: Request) -> Response:
        ingest.auth.check(request, "ingest")
        return _otlp(request, ExportMetricsServiceResponse(), {})

    @r.post("/v1/logs", summary="OTLP logs: answered, not read")
    async def logs(request: Request) -> Response:
        ingest.auth.check(request, "ingest")
        return _otlp(request, ExportLogsServiceResponse(), {})

    return r


def _partial(decoded: Decoded) -> dict[str, Any]:
    return {"rejectedSpans": str(len(decoded.rejected)), "errorMessage": decoded.rejected[0].detail}


def _otlp(request: Request, message: Any, as_json: dict[str, Any]) -> Response:
    """The answer in the content type of the question, as OTLP demands."""
    if "json" in request.headers.get("content-type", ""):
        return JSONResponse(as_json)
    return Response(message.SerializeToString(), media_type="application/x-protobuf")


def _answer(decoded: Decoded) -> Response:
    body: dict[str, Any] = {"accepted": len(decoded.events), "rejected": len(decoded.rejected)}
    if decoded.ignored:
        body["ignored"] = dict(decoded.ignored)
    if decoded.rejected:
        body["errors"] = [
            {"index": r.index, "reason": r.reason, "detail": r.detail} for r in decoded.rejected[:10]
        ]
    # Good lines are in; only a body with nothing good is an error of its sender.
    return JSONResponse(body, status_code=400 if decoded.rejected and not decoded.events else 200)


def overloaded(e: Overloaded) -> Response:
    return JSONResponse(
        {"error": f"{e}; come back in {e.retry_after_s:g} s"},
        status_code=429,
        headers={"Retry-After": str(max(1, round(e.retry_after_s)))},
    )


def refused(e: BodyError) -> Response:
    return JSONResponse({"error": e.what}, status_code=e.status)
