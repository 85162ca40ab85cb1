"""Telemetry in. A body is decoded at the edge (content ends here), appended, and answered once the commit is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Final, Generic, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from flyball.app.http.answers import json_response
from flyball.app.http.auth import Auth
from flyball.app.http.body import decompress, read_body
from flyball.app.intake import Intake
from flyball.app.scrub import scrub
from flyball.app.settings import Settings
from flyball.app.store.rows import DeadLetter
from flyball.core.events import Event
from flyball.core.ports import Decoded, Format, Rejected

_ON_LOOP_BYTES: Final = 64 << 10
"""Bodies up to this size are decoded on the event loop (well under a millisecond); larger ones in a thread."""
_LETTERS_PER_BODY: Final = 100
"""More bad events than this in one body become one dead letter per reason, which holds the bytes of as many of them."""


E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class _Edge(Generic[E]):
    """What the edge made of a body."""

    decoded: Decoded
    dead: list[DeadLetter]
    encoded: E


class Ingest(Generic[E]):
    """Decodes and appends; shared by the three ways in.

    Args:
        encode: makes of events what the intake appends; called in any thread.
    """

    def __init__(
        self, intake: Intake[E], encode: Callable[[list[Event]], E], formats: Mapping[str, Format],
        settings: Settings, auth: Auth,
    ) -> None:  # fmt: skip
        self.intake, self.encode = intake, encode
        self.formats, self.settings, self.auth = formats, settings, auth

    async def take(self, request: Request, kind: str, *, patient: bool = True) -> Decoded:
        """Raises: HTTPException 401/403, BodyError, Overloaded, Stopped; EffectError of the intake."""
        who = self.auth.check(request, "ingest")
        limit = self.settings.limits.body_bytes
        sender = f"{who}@{_peer(request)}"
        held = 0

        def grew(size: int) -> None:
            nonlocal held
            self.intake.admit(size, patient)
            self.intake.hold(size)
            held += size

        try:
            raw = await read_body(request, limit, grew)
            encoding = request.headers.get("content-encoding", "")
            content_type = request.headers.get("content-type", "")
            work = partial(self._decode, raw, encoding, content_type, kind, sender)
            on_loop = len(raw) <= _ON_LOOP_BYTES and not encoding
            edge = work() if on_loop else await to_thread.run_sync(work)
            if edge.decoded.events or edge.dead:
                stored = self.intake.ingest(
                    edge.decoded.events, sender, self.intake.clock.now(),
                    format=kind, dead=edge.dead, patient=patient, body=edge.encoded,
                )  # fmt: skip
                await asyncio.wrap_future(stored)
            return edge.decoded
        finally:
            self.intake.hold(-held)

    def _decode(self, raw: bytes, encoding: str, content_type: str, kind: str, sender: str) -> _Edge[E]:
        """All that costs time with a body; for large ones in a thread."""
        body = decompress(raw, encoding, self.settings.limits.body_bytes)
        decoded = self.formats[kind].decode(body, content_type)
        dead = self._dead_letters(decoded, sender, kind, self.intake.clock.now())
        return _Edge(decoded, dead, self.encode(decoded.events))

    def _dead_letters(self, decoded: Decoded, sender: str, kind: str, now: float) -> list[DeadLetter]:
        def letter(r: Rejected, data: bytes, n: int) -> DeadLetter:
            kept = scrub(data) if self.settings.retention.dead_letter_bytes else None
            return DeadLetter(now, sender, kind, r.reason, r.detail, len(data), kept, n)

        rejected = decoded.rejected
        if len(rejected) <= _LETTERS_PER_BODY:
            return [letter(r, r.data, 1) for r in rejected]
        letters = []
        for _, group in groupby(sorted(rejected, key=lambda r: r.reason), key=lambda r: r.reason):
            members = list(group)
            # The first ones show what is wrong with all.
            data = b"\n".join(scrub(m.data) for m in members[:_LETTERS_PER_BODY])
            letters.append(letter(members[0], data, len(members)))
        return letters


def _peer(request: Request) -> str:
    """Who sends, for its watermark: a name it gives itself (several exporters behind one address), else its address."""
    named = request.headers.get("x-flyball-sender", "")
    return named[:128] if named else request.client.host if request.client else "-"


def router(ingest: Ingest[Any]) -> APIRouter:
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
            return _otlp_error(request, 400, 3, whole[0].detail)
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
        return json_response(as_json)
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
    return json_response(body, 400 if decoded.rejected and not decoded.events else 200)


def _otlp_error(request: Request, status: int, code: int, what: str, retry_after_s: float = 0.0) -> Response:
    """A `google.rpc.Status` in the content type of the question: 400 tells an exporter that repeating will not help, 429 that it will."""
    headers = {"Retry-After": str(max(1, round(retry_after_s)))} if retry_after_s else {}
    if "json" in request.headers.get("content-type", ""):
        return json_response({"code": code, "message": what, "error": what}, status, headers)
    text = what.encode()
    message = b"\x08" + bytes([code]) + b"\x12" + _varint(len(text)) + text
    return Response(message, status, headers, media_type="application/x-protobuf")


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


_RPC_CODES: Final = {400: 3, 401: 16, 403: 7, 413: 3, 415: 3, 429: 8, 503: 14}
"""HTTP status → `google.rpc.Code`."""


def refused(request: Request, status: int, what: str, retry_after_s: float = 0.0) -> Response:
    """An answer to a request that is not granted, in the form that its sender reads."""
    if request.url.path in ("/v1/traces", "/v1/metrics", "/v1/logs"):
        return _otlp_error(request, status, _RPC_CODES.get(status, 2), what, retry_after_s)
    headers = {"Retry-After": str(max(1, round(retry_after_s)))} if retry_after_s else {}
    return json_response({"error": what}, status, headers)
