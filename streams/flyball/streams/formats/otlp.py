"""OTLP traces, protobuf and JSON: model calls become `LlmCall`, tool calls and agent invocations `AgentStep`.

Only spans of model calls are counted: parents that carry their children's usage again (AI SDK, pydantic-ai), HTTP spans
and LiteLLM's raw child are left out and counted under `ignored`. A model call inside a model call (an SDK that
traces itself under an instrumentation) is one call; telling that is the deduplicator's, since the copies may
come in different bodies; here such a span only learns who its nearest calling ancestor is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final

import msgspec
from google.protobuf.message import DecodeError as ProtobufError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from flyball.core.events import EARLIEST, LATEST, AgentStep, Event, LlmCall
from flyball.core.ports import Decoded, Rejected
from flyball.streams.formats import _otlp_json as js
from flyball.streams.formats._names import (
    MAX_COUNT,
    MAX_LABEL,
    finish_name,
    finish_of,
    identity,
    label,
    model_name,
    provider_name,
)
from flyball.streams.formats._options import FormatOptions
from flyball.streams.formats._otlp_keys import INDEX, INFERENCE, STEPS, KeyMap

_OP, _OI, _AI, _TL = INDEX["operation"], INDEX["oi_kind"], INDEX["ai_operation"], INDEX["tl_kind"]
_REQUEST_TYPE, _ATTEMPT = INDEX["request_type"], INDEX["attempt"]
_PROVIDER, _MODEL, _SERVED, _PARAMETERS, _ID = (
    INDEX[n] for n in ("provider", "model", "served", "parameters", "id")
)
_INPUT, _OUTPUT, _READ, _WRITE, _REASONING, _COST = (
    INDEX[n] for n in ("input", "output", "cache_read", "cache_write", "reasoning", "cost")
)
_FINISH, _ERROR, _STATUS, _CODE, _TTFT, _TTFT_MS = (
    INDEX[n] for n in ("finish", "error", "status", "code", "ttft_s", "ttft_ms")
)
_STREAM, _RETRIES, _TOOL, _ARGUMENTS, _RESULT = (
    INDEX[n] for n in ("stream", "retries", "tool", "arguments", "result")
)
_HOPS: Final = 32
"""How far up a trace the search for a calling ancestor goes."""
_PLAIN, _ROLL_UP, _RAW_CHILD, _OTHER = "other_span", "roll_up", "raw_child", "not_inference"
_OI_STEPS: Final = {"TOOL": "tool", "AGENT": "agent"}


class _Bad(Exception):
    """One span that cannot be an event."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Parameters(msgspec.Struct, gc=False):
    """OpenInference's invocation parameters: the only place where a failed call names its model."""

    model: Any = None
    stream: Any = None


_parameters = msgspec.json.Decoder(_Parameters)
_words = msgspec.json.Decoder(list[str])


class _Body:
    """What one body has given so far."""

    __slots__ = ("calls", "events", "ignored", "parents", "plain", "rejected", "scopes", "seen")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.rejected: list[Rejected] = []
        self.ignored: dict[str, int] = {}
        self.plain: dict[Any, Any] = {}
        """Spans that are neither call nor step: id → parent's id, to find a calling ancestor through them."""
        self.calls: dict[Any, int] = {}
        self.parents: dict[int, Any] = {}
        self.scopes: set[str] = set()
        self.seen = 0


class Otlp:
    """OTLP trace export requests. Misleads where the source does: a stream that the client dropped mostly reads as a
    success without tokens, and a failed Responses call of some instrumentations names no model."""

    kind: ClassVar[str] = "otlp"

    def __init__(self, options: FormatOptions | None = None) -> None:
        self._options = options or FormatOptions()
        self._keys = KeyMap(self._options.labels.otlp)
        self._hash = self._options.hasher()

    def decode(self, body: bytes, content_type: str = "") -> Decoded:
        if body[:1] == b"{":
            return self._json(body)
        request = ExportTraceServiceRequest()
        try:
            request.ParseFromString(body)
        except ProtobufError:
            if body.lstrip()[:1] == b"{":
                return self._json(body)
            detail = "not a protobuf traces export request: truncated or of another type."
            return Decoded([], [Rejected("protobuf", detail, body)])
        if body and not request.resource_spans:
            if body.lstrip()[:1] == b"{":
                return self._json(body)
            detail = "holds no resource spans: is this a traces export request?"
            return Decoded([], [Rejected("protobuf", detail, body)])
        out = _Body()
        for resource_spans in request.resource_spans:
            template, labels = self._resource(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                scope = label(scope_spans.scope.name)
                self._spans(scope_spans.spans, template, labels, scope, bytes.hex, out)
        return self._finished(out)

    def _json(self, body: bytes) -> Decoded:
        out = _Body()
        try:
            self._json_request(js.decode_request(body), out)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            self._json_carefully(body, out)
        return self._finished(out)

    def _json_request(self, request: js.Request, out: _Body) -> None:
        for resource_spans in request.resource_spans or ():
            template, labels = self._resource(
                (resource_spans.resource and resource_spans.resource.attributes) or ()
            )
            for scope_spans in resource_spans.scope_spans or ():
                scope = label((scope_spans.scope and scope_spans.scope.name) or "")
                self._spans(scope_spans.spans or (), template, labels, scope, js.hex_id, out)

    def _json_carefully(self, body: bytes, out: _Body) -> None:
        """A body with damaged spans, or several requests, one a line."""
        lines = [line for line in body.splitlines() if line.strip()]
        for line in lines if len(lines) > 1 and all(line.lstrip()[:1] == b"{" for line in lines) else [body]:
            try:
                request = js.decode_raw_request(line)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                detail = (
                    "not an OTLP/JSON traces export request: `resourceSpans` with `scopeSpans` with `spans`."
                )
                out.rejected.append(Rejected("json", detail, line, out.seen))
                continue
            for resource_spans in request.resource_spans or ():
                attributes = (resource_spans.resource and resource_spans.resource.attributes) or ()
                template, labels = self._resource(attributes)
                for scope_spans in resource_spans.scope_spans or ():
                    scope = label((scope_spans.scope and scope_spans.scope.name) or "")
                    for raw in scope_spans.spans or ():
                        try:
                            span = js.decode_span(raw)
                        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                            detail = "a span with a field of a wrong type."
                            out.rejected.append(Rejected("type", detail, b"", out.seen))
                            out.seen += 1
                            continue
                        self._spans((span,), template, labels, scope, js.hex_id, out)

    def _resource(self, attributes: Iterable[Any]) -> tuple[list[Any], dict[str, str]]:
        """The slots that every span of a resource starts from, and the labels when the span adds none."""
        template: list[Any] = [None] * self._keys.size
        slots = self._keys.label_slots
        for attribute in attributes:
            slot = slots.get(attribute.key)
            if slot is not None and attribute.value is not None:
                template[slot] = attribute.value
        return template, self._labels(template)

    def _spans(
        self,
        spans: Iterable[Any],
        template: list[Any],
        labels: dict[str, str],
        scope: str,
        hex_id: Callable[[Any], str],
        out: _Body,
    ) -> None:
        code_of = self._keys.codes.get
        size, first_label = self._keys.size, self._keys.first_label
        for span in spans:
            slots = template[:]
            stand_ins: list[tuple[int, Any]] | None = None
            labelled = False
            for attribute in span.attributes or ():
                code = code_of(attribute.key)
                if code is None:
                    continue
                if code < first_label:
                    slots[code] = attribute.value
                elif code < size:
                    slots[code] = attribute.value
                    labelled = True
                elif stand_ins is None:
                    stand_ins = [(code, attribute.value)]
                else:
                    stand_ins.append((code, attribute.value))
            if stand_ins is not None:
                labelled = self._stand_in(slots, stand_ins) or labelled
            out.seen += 1
            kind, operation = _kind(span, slots)
            if kind != "call" and kind != "tool" and kind != "agent":
                out.ignored[kind] = out.ignored.get(kind, 0) + 1
                if kind != _ROLL_UP and span.parent_span_id:
                    out.plain[span.span_id] = span.parent_span_id
                continue
            try:
                found = self._labels(slots) if labelled else labels
                if kind == "call":
                    out.calls[span.span_id] = len(out.events)
                    if span.parent_span_id:
                        out.parents[len(out.events)] = span.parent_span_id
                    out.events.append(self._call(span, slots, operation, found, scope, hex_id))
                    out.scopes.add(scope)
                else:
                    out.events.append(self._step(span, slots, kind, found, scope, hex_id))
            except _Bad as e:
                out.rejected.append(Rejected(e.reason, e.detail, self._remains(span, hex_id), out.seen - 1))

    def _stand_in(self, slots: list[Any], stand_ins: list[tuple[int, Any]]) -> bool:
        """Older and foreign names fill the slots that the modern name left empty, the preferred one first."""
        table, size = self._keys.stand_ins, self._keys.size
        ranked = stand_ins if len(stand_ins) == 1 else sorted(stand_ins, key=lambda s: table[s[0] - size][1])
        labelled = False
        for code, value in ranked:
            slot, rank, label_slot = table[code - size]
            if label_slot >= 0:
                slots[label_slot] = value
                labelled = True
            if slots[slot] is None or (slot == _PROVIDER and not provider_name(_text(slots[slot]))):
                slots[slot] = value
        return labelled

    def _labels(self, slots: list[Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, sources in self._keys.labels:
            for slot, version_slot, other in sources:
                if slot < 0:
                    value = found.get(other, "")
                elif slots[slot] is None:
                    continue
                else:
                    value = _text(slots[slot])
                    if value and version_slot >= 0 and slots[version_slot] is not None:
                        value = f"{value}@{_text(slots[version_slot])}"
                if value:
                    found[name] = value if len(value) <= MAX_LABEL else value[:MAX_LABEL]
                    break
        return found

    def _call(
        self,
        span: Any,
        slots: list[Any],
        operation: str,
        labels: dict[str, str],
        scope: str,
        hex_id: Callable[[Any], str],
    ) -> LlmCall:
        start, at = _times(span)
        trace = hex_id(span.trace_id)
        provider, model, served = slots[_PROVIDER], slots[_MODEL], slots[_SERVED]
        provider_label = provider_name(provider.string_value) if provider is not None else ""
        stream_value = slots[_STREAM]
        stream = stream_value is not None and stream_value.bool_value
        model_label = model.string_value if model is not None else ""
        if slots[_PARAMETERS] is not None:
            named, streams = _from_parameters(slots[_PARAMETERS])
            model_label = model_label or named
            stream = stream or streams
        error, code = "", ""
        status = span.status
        if (status is not None and status.code in (2, "STATUS_CODE_ERROR")) or slots[_ERROR] is not None:
            error, code = self._error(span, slots, provider_label)
        served_label = served.string_value if served is not None else ""
        if error and not model_label:
            model_label = served_label
        input_, output, read, write, reasoning = _tokens(slots, failed=bool(error))
        ttft = _ttft(span, slots, start)
        finish = slots[_FINISH]
        response_id = slots[_ID]
        if "run" not in labels and trace:
            labels = {**labels, "run": trace}
        return LlmCall(
            at=at,
            id=identity(response_id.string_value) if response_id is not None else "",
            provider=provider_label,
            model=model_name(model_label or served_label),
            model_served=model_name(served_label),
            operation=operation,
            error=error,
            error_code=code,
            input_tokens=input_,
            output_tokens=output,
            cache_read_tokens=read,
            cache_write_tokens=write,
            reasoning_tokens=reasoning,
            cost_usd=_cost(slots[_COST], error) if slots[_COST] is not None else None,
            latency_s=at - start if 0.0 < start <= at else None,
            ttft_s=ttft,
            finish=_finish(finish) if finish is not None else "",
            stream=stream or ttft is not None or operation == "stream",
            retries=_count(slots[_RETRIES], "retries") if slots[_RETRIES] is not None else None,
            trace=trace,
            span=hex_id(span.span_id),
            parent=hex_id(span.parent_span_id),
            scope=scope,
            **labels,
        )

    def _error(self, span: Any, slots: list[Any], provider: str) -> tuple[str, str]:
        """Class and code. The exception event's message is preferred: a status message may hold a whole traceback,
        whose lines name errors that were only handled on the way."""
        kind = _text(slots[_ERROR]) if slots[_ERROR] is not None else ""
        raised, message = _exception(span)
        if not message and span.status is not None:
            message = (span.status.message or "").partition("Traceback (most recent call last)")[0]
        if not kind or kind == "_OTHER":
            kind = raised
        http = _maybe_count(slots[_STATUS])
        own = _text(slots[_CODE]) if slots[_CODE] is not None else ""
        klass = self._options.classifier.classify(
            provider=provider, status=http, code=own, type=kind, message=message
        )
        code = own or (str(http) if http is not None and http >= 400 else kind.rpartition(".")[2])
        return klass, code[:128]

    def _step(
        self,
        span: Any,
        slots: list[Any],
        kind: str,
        labels: dict[str, str],
        scope: str,
        hex_id: Callable[[Any], str],
    ) -> AgentStep:
        start, at = _times(span)
        trace, own = hex_id(span.trace_id), hex_id(span.span_id)
        status = span.status
        failed = (status is not None and status.code in (2, "STATUS_CODE_ERROR")) or slots[_ERROR] is not None
        tool = label(_text(slots[_TOOL]) or span.name) if kind == "tool" else ""
        error, message = "", ""
        if failed:
            raised, message = _exception(span)
            error = label((_text(slots[_ERROR]) or raised or "error").rpartition(".")[2])
        arguments, result = (
            (_content(slots[_ARGUMENTS]), _content(slots[_RESULT])) if kind == "tool" else (None, None)
        )
        if result is None and message:
            result = message  # what the agent sees of a tool that failed
        return AgentStep(
            at=at,
            run=labels.get("run", "") or trace,
            app=labels.get("app", ""),
            agent=labels.get("agent", "") or (label(span.name) if kind == "agent" else ""),
            team=labels.get("team", ""),
            tenant=labels.get("tenant", ""),
            kind=kind,
            tool=tool,
            args_hash=self._hash.of(arguments, tool) if arguments is not None else "",
            result_hash=self._hash.of(result, tool) if result is not None else "",
            result_bytes=_size(result) if result is not None else None,
            error=error,
            latency_s=at - start if 0.0 < start <= at else None,
            id=own,
            trace=trace,
            span=own,
            parent=hex_id(span.parent_span_id),
            scope=scope,
        )

    def _remains(self, span: Any, hex_id: Callable[[Any], str]) -> bytes:
        """What a dead letter keeps of a span: who, when, and which attributes it had; no value of any."""
        return msgspec.json.encode(
            {
                "traceId": hex_id(span.trace_id),
                "spanId": hex_id(span.span_id),
                "startTimeUnixNano": str(span.start_time_unix_nano),
                "endTimeUnixNano": str(span.end_time_unix_nano),
                "attributes": sorted(label(a.key) for a in span.attributes or ()),
            }
        )

    def _finished(self, out: _Body) -> Decoded:
        """Where several instrumentations wrote into one body, a call's parent becomes its nearest calling ancestor."""
        if len(out.scopes) > 1 and out.plain:
            own_ids = {index: own for own, index in out.calls.items()}
            for index, parent in out.parents.items():
                if index >= len(out.events) or not isinstance(out.events[index], LlmCall):
                    continue
                above, hops = parent, 0
                while above in out.plain and hops < _HOPS:
                    above, hops = out.plain[above], hops + 1
                if hops and above in out.calls and above != own_ids.get(index):
                    ancestor = out.events[out.calls[above]]
                    if isinstance(ancestor, LlmCall):
                        out.events[index] = msgspec.structs.replace(out.events[index], parent=ancestor.span)
        return Decoded(out.events, out.rejected, out.ignored)


def _kind(span: Any, slots: list[Any]) -> tuple[str, str]:
    """`call`, `tool` or `agent`, and the operation; else the reason for which the span is left out."""
    value = slots[_OP]
    if value is not None:
        name = value.string_value
        operation = INFERENCE.get(name)
        if operation is not None:
            return "call", operation
        if name:
            return STEPS.get(name, _OTHER), ""
    value = slots[_OI]
    if value is not None:
        kind = value.string_value.upper()
        if kind == "LLM":
            return "call", "chat"
        if kind == "EMBEDDING":
            return "call", "embeddings"
        return _OI_STEPS.get(kind, _OTHER), ""
    value = slots[_AI]
    if value is not None:
        return _ai_sdk_kind(value.string_value)
    value = slots[_TL]
    if value is not None and value.string_value in ("tool", "agent"):
        return value.string_value, ""
    value = slots[_REQUEST_TYPE]
    if value is not None:
        return "call", INFERENCE.get(value.string_value, "chat")
    if slots[_ATTEMPT] is not None:
        return "call", "chat"
    if slots[_MODEL] is None or slots[_PROVIDER] is None:
        return _PLAIN, ""
    if span.name == "raw_gen_ai_request":
        return _RAW_CHILD, ""
    # No operation, but a model, a provider and an outcome: an older instrumentation of a model call.
    return ("call", "chat") if slots[_INPUT] is not None or slots[_ID] is not None else (_PLAIN, "")


def _ai_sdk_kind(operation: str) -> tuple[str, str]:
    """AI SDK up to 6: the call proper is `ai.….doX`; its parent repeats the usage of all its children."""
    if operation.endswith((".doGenerate", ".doStream")):
        return "call", "chat"
    if operation.endswith(".doEmbed"):
        return "call", "embeddings"
    return ("tool", "") if operation == "ai.toolCall" else (_ROLL_UP, "")


def _times(span: Any) -> tuple[float, float]:
    """Start and end, seconds since the epoch. Raises: _Bad when there is no credible end."""
    try:
        start, end = int(span.start_time_unix_nano) / 1e9, int(span.end_time_unix_nano) / 1e9
    except ValueError as e:
        raise _Bad("type", "a span's time is no whole number of nanoseconds.") from e
    at = end or start
    if not EARLIEST <= at < LATEST:
        raise _Bad(
            "timestamp", f"a span ends at {at:.0f}; must be seconds since the epoch, UTC, from 2010 to 2099."
        )
    return start, at


def _text(value: Any) -> str:
    if value is None:
        return ""
    text: str = value.string_value
    if text:
        return text
    kind = value.WhichOneof("value")
    if kind == "int_value":
        return str(value.int_value)
    if kind == "double_value":
        return str(value.double_value)
    return ""


def _maybe_count(value: Any) -> int | None:
    """A whole number, negative ones too; None when the value is none."""
    number = value.int_value if value is not None else None
    if not number:
        kind = value.WhichOneof("value") if value is not None else None
        if kind == "int_value":
            return 0
        if kind == "double_value":
            number = value.double_value
        elif kind == "string_value":
            number = value.string_value
        else:
            return None
    if type(number) is int:
        return number
    try:
        return int(number) if isinstance(number, str) or math.isfinite(number) else None
    except ValueError:
        return None


def _count(value: Any, name: str) -> int | None:
    number = _maybe_count(value)
    if number is None:
        return None
    if number < 0:
        raise _Bad("negative", f"{name} is {number}; counts are zero or more.")
    if number > MAX_COUNT:
        raise _Bad("too_large", f"{name} is beyond {MAX_COUNT:,}.")
    return number


def _seconds(value: Any) -> float | None:
    number = value.double_value
    if not number:
        number = _maybe_count(value)
    try:
        seconds = float(number) if number is not None else -1.0
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < 1e6 else None


def _cost(value: Any, error: str) -> float | None:
    """A failed call, or one without usage, says 0 for its cost: not said, rather than free."""
    cost = _seconds(value)
    return None if not cost else cost


def _tokens(
    slots: list[Any], failed: bool
) -> tuple[int | None, int | None, int | None, int | None, int | None]:
    """Input, output, cache read, cache write, reasoning. Missing is not zero, and no prompt is empty: an input of 0
    means that the source did not know."""
    value = slots[_INPUT]
    input_ = _count(value, "input tokens") if value is not None else None
    value = slots[_OUTPUT]
    output = _count(value, "output tokens") if value is not None else None
    if not input_:
        input_ = None
        if not output:
            return None, None, None, None, None
    value = slots[_READ]
    read = _count(value, "cache-read tokens") if value is not None else None
    value = slots[_WRITE]
    write = _count(value, "cache-write tokens") if value is not None else None
    value = slots[_REASONING]
    reasoning = _count(value, "reasoning tokens") if value is not None else None
    if input_ is not None and (read or write):
        cached = (read or 0) + (write or 0)
        if cached > input_:
            input_ += cached  # the source left the cache out of its input
    return input_, output, read, write, reasoning


def _finish(value: Any) -> str:
    text = value.string_value
    if text:
        if text[0] == "[":  # LiteLLM writes the list as JSON text
            try:
                return finish_of(_words.decode(text))
            except (msgspec.DecodeError, RecursionError):
                return ""
        return finish_name(text)
    array = value.array_value
    if array is None:
        return ""
    values = array.values
    if len(values) == 1:
        return finish_name(values[0].string_value)
    return finish_of([v.string_value for v in values])


def _from_parameters(value: Any) -> tuple[str, bool]:
    try:
        found = _parameters.decode(value.string_value)
    except (msgspec.DecodeError, RecursionError):
        return "", False
    return found.model if isinstance(found.model, str) else "", found.stream is True


def _ttft(span: Any, slots: list[Any], start: float) -> float | None:
    value = slots[_TTFT]
    if value is not None:
        return _seconds(value)
    value = slots[_TTFT_MS]
    if value is not None:
        milliseconds = _seconds(value)
        return milliseconds / 1e3 if milliseconds is not None else None
    if slots[_OI] is not None:
        for event in span.events or ():
            if event.name == "First Token Stream Event":
                try:
                    after = int(event.time_unix_nano) / 1e9 - start
                except ValueError:
                    return None
                return after if 0.0 <= after < 1e6 else None
    return None


def _exception(span: Any) -> tuple[str, str]:
    """Type and message of the last exception event: the one that left the call."""
    kind, message = "", ""
    for event in span.events or ():
        if event.name == "exception" or event.name == "gen_ai.client.operation.exception":
            for attribute in event.attributes or ():
                if attribute.key == "exception.type":
                    kind = _text(attribute.value)
                elif attribute.key == "exception.message":
                    message = _text(attribute.value)
    return kind, message


def _content(value: Any, depth: int = 0) -> object | None:
    """An attribute's value as plain data, to be hashed at once and dropped."""
    if value is None or depth > 40:
        return None
    kind = value.WhichOneof("value")
    if kind == "kvlist_value":
        return {entry.key: _content(entry.value, depth + 1) for entry in value.kvlist_value.values}
    if kind == "array_value":
        return [_content(entry, depth + 1) for entry in value.array_value.values]
    return getattr(value, kind) if kind is not None else None


def _size(content: object) -> int:
    if isinstance(content, str):
        return len(content.encode("utf-8", "surrogatepass"))
    return len(content) if isinstance(content, bytes) else len(repr(content))
