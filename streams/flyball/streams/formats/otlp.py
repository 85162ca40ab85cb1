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

from flyball.core.events import EARLIEST, LATEST, AgentStep, Event, LlmCall
from flyball.core.ports import Decoded, Rejected
from flyball.streams.formats import _otlp_json as js
from flyball.streams.formats import _otlp_wire as wire
from flyball.streams.formats._names import (
    MAX_COUNT,
    MAX_LABEL,
    finish_name,
    finish_names,
    finish_of,
    identity,
    label,
    model_name,
    provider_name,
    provider_names,
)
from flyball.streams.formats._options import FormatOptions
from flyball.streams.formats._otlp_gather import Gatherer, Layout, Layouts
from flyball.streams.formats._otlp_keys import (
    FIELDS,
    INDEX,
    INFERENCE,
    STEPS,
    KeyMap,
)
from flyball.streams.labels import LABELS

(_OP, _OI, _AI, _TL, _REQUEST_TYPE, _PROVIDER, _MODEL, _SERVED, _FINISH, _STREAM, _ATTEMPT, _PARAMETERS, _ID, _INPUT, _OUTPUT, _READ, _WRITE, _REASONING, _COST, _ERROR, _STATUS, _CODE, _TTFT, _TTFT_MS, _RETRIES, _TOOL, _ARGUMENTS, _RESULT) = (INDEX[name] for name in FIELDS)  # fmt: skip

_HOPS: Final = 32
"""How far up a trace the search for a calling ancestor goes."""
_EARLIEST_NS, _LATEST_NS = int(EARLIEST * 1e9), int(LATEST * 1e9)
_COUNTS: Final[frozenset[Any]] = frozenset({int, type(None)})
_LABEL_BITS: Final = (1 << len(LABELS)) - 1
_PLAIN, _ROLL_UP, _RAW_CHILD, _OTHER = "other_span", "roll_up", "raw_child", "not_inference"
_OI_STEPS: Final = {"TOOL": "tool", "AGENT": "agent"}
_MESSAGE: Final = 4000

Labels = dict[str, str]
"""Label → value; those that are not said are not in it."""


class _Bad(Exception):
    """One span that cannot be an event."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Parameters(msgspec.Struct, gc=False):
    """OpenInference's invocation parameters: the only place where a failed call names its model."""

    model: Any = None
    stream: Any = None


_providers, _finishes = provider_names, finish_names
_parameters = msgspec.json.Decoder(_Parameters)
_words = msgspec.json.Decoder(list[str])


class _Plan:
    """What holds for every span of a layout: who called what, and which labels are still to be looked up."""

    __slots__ = ("varying", "who")

    def __init__(self, who: dict[str, Any], varying: int) -> None:
        self.who, self.varying = who, varying


_NO_PLAN: Final = _Plan({}, 0)


class _Group:
    """Spans of one resource and scope, and how they are read."""

    __slots__ = ("labels", "read", "scope", "template")

    def __init__(self, template: list[Any], labels: Labels, scope: str, read: Any) -> None:
        self.template, self.labels, self.scope, self.read = template, labels, label(scope), read


class _Body:
    """What one body has given so far."""

    __slots__ = ("events", "ignored", "plain", "rejected", "seen")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.rejected: list[Rejected] = []
        self.ignored: dict[str, int] = {}
        self.plain: list[tuple[Any, Any, Callable[[Any], str]]] = []
        """Spans that are neither call nor step (id, parent's id), to find a calling ancestor through them."""
        self.seen = 0


class Otlp:
    """OTLP trace export requests. Misleads where the source does: a stream that the client dropped mostly reads as a
    success without tokens, and a failed Responses call of some instrumentations names no model."""

    kind: ClassVar[str] = "otlp"

    def __init__(self, options: FormatOptions | None = None) -> None:
        self._options = options or FormatOptions()
        self._keys = KeyMap(self._options.labels.otlp)
        self._hash = self._options.hasher()
        self._gatherer = Gatherer(self._keys, _simplified)
        telling = (
            _OP,
            _OI,
            _AI,
            _TL,
            _REQUEST_TYPE,
            _ATTEMPT,
            _PROVIDER,
            _MODEL,
            _SERVED,
            _PARAMETERS,
            _STREAM,
        )
        self._who_slots = {s for field in telling for s in (field, *self._keys.stand_ins[field])}

    def decode(self, body: bytes, content_type: str = "") -> Decoded:
        if body[:1] == b"{":
            return self._json(body)
        try:
            request = wire.Request.FromString(body)
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
            template, labels = self._resource(_wire_attributes(resource_spans.resource.attributes))
            for scope_spans in resource_spans.scope_spans:
                group = _Group(template, labels, wire.text(scope_spans.scope.name), wire.WireSpan)
                self._wire_spans(scope_spans.spans, group, out)
        return self._finished(out)

    def _wire_spans(self, spans: Iterable[Any], group: _Group, out: _Body) -> None:
        gather, take = self._gatherer.gather, self._take
        layouts = Layouts(group.template)
        for span in spans:
            try:
                slots, touched, layout = gather(list(span.attributes), layouts)
                if touched > _LABEL_BITS:
                    self._stand_in(slots, touched)
            except (wire.WireError, IndexError, UnicodeDecodeError):
                try:
                    pairs = [(wire.text(key), value) for key, value in map(wire.attribute, span.attributes)]
                except wire.WireError:
                    out.rejected.append(
                        Rejected("protobuf", "a span with a damaged attribute.", b"", out.seen)
                    )
                    out.seen += 1
                    continue
                slots, touched = self._gatherer.carefully(pairs, group.template)
                self._stand_in(slots, touched)
                layout = None
            take(span, slots, touched, group, out, layout)

    def _json(self, body: bytes) -> Decoded:
        out = _Body()
        try:
            request = js.decode_request(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            self._json_carefully(body, out)
        else:
            for resource_spans in request.resource_spans:
                for scope_spans, group in self._json_groups(resource_spans):
                    for span in scope_spans.spans or ():
                        self._json_span(span, group, out)
        return self._finished(out)

    def _json_groups(self, resource_spans: Any) -> Iterable[tuple[Any, _Group]]:
        attributes = (resource_spans.resource and resource_spans.resource.attributes) or ()
        template, labels = self._resource((a.key, js.plain(a.value)) for a in attributes)
        for scope_spans in resource_spans.scope_spans or ():
            scope = (scope_spans.scope and scope_spans.scope.name) or ""
            yield scope_spans, _Group(template, labels, scope, js.JsonSpan)

    def _json_span(self, span: js.Span, group: _Group, out: _Body) -> None:
        codes = self._keys.codes
        pairs = ((a.key, js.plain(a.value)) for a in span.attributes or () if a.key in codes)
        slots, touched = self._gatherer.carefully(pairs, group.template)
        self._stand_in(slots, touched)
        self._take(span, slots, touched, group, out)

    def _json_carefully(self, body: bytes, out: _Body) -> None:
        """A body with damaged spans, or several requests, one a line."""
        lines = [line for line in body.splitlines() if line.strip()]
        several = len(lines) > 1 and all(line.lstrip()[:1] == b"{" for line in lines)
        for line in lines if several else [body]:
            try:
                request = js.decode_raw_request(line)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                detail = (
                    "not an OTLP/JSON traces export request: `resourceSpans` with `scopeSpans` with `spans`."
                )
                out.rejected.append(Rejected("json", detail, line, out.seen))
                continue
            for resource_spans in request.resource_spans:
                for scope_spans, group in self._json_groups(resource_spans):
                    for raw in scope_spans.spans or ():
                        try:
                            span = js.decode_span(raw)
                        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                            detail = "a span with a field of a wrong type."
                            out.rejected.append(Rejected("type", detail, b"", out.seen))
                            out.seen += 1
                        else:
                            self._json_span(span, group, out)

    def _resource(self, attributes: Iterable[tuple[str, Any]]) -> tuple[list[Any], Labels]:
        """The slots that every span of a resource starts from, and the labels when the span adds none."""
        template: list[Any] = [None] * self._keys.size
        for key, value in attributes:
            slot = self._keys.codes.get(key)
            if slot is not None and self._keys.bits[slot] & _LABEL_BITS:
                template[slot] = value
        return template, self._labels(template, -1, {})

    def _stand_in(self, slots: list[Any], touched: int) -> None:
        """Older and foreign names fill the slots that the modern name left empty, the preferred one first."""
        for field, stand_ins in self._keys.fields_of(touched):
            if slots[field] is None:
                for slot in stand_ins:
                    value = slots[slot]
                    if value is not None:
                        unread = value.__class__ is bytes and not self._keys.content[slot]
                        slots[field] = wire.value_in(value, value[1] + 2) if unread else value
                        break

    def _labels(self, slots: list[Any], touched: int, base: dict[str, Any]) -> dict[str, Any]:
        """`base` with the labels looked up anew that `touched` names: those that an attribute of the span has a say in."""
        found = base.copy()
        for name, sources in self._keys.labels_of(touched):
            for slot, version_slot, other in sources:
                value = slots[slot]
                if value is None:
                    if not other or other not in found:
                        continue
                    value = found[other]
                elif value.__class__ is not str:
                    value = _text(value)
                if value:
                    if version_slot >= 0 and slots[version_slot] is not None:
                        value = f"{value}@{_text(slots[version_slot])}"
                    found[name] = value if len(value) <= MAX_LABEL else value[:MAX_LABEL]
                    break
        return found

    def _take(
        self,
        span: Any,
        slots: list[Any],
        touched: int,
        group: _Group,
        out: _Body,
        layout: Layout | None = None,
    ) -> None:
        """One span whose attributes have been gathered: an event, or the reason why it is none."""
        out.seen += 1
        try:
            if layout is not None:
                plan = layout.plan
                if plan is None:
                    plan = layout.plan = self._plan(layout, span, slots, group)
                if plan is not _NO_PLAN:
                    who = self._labels(slots, plan.varying, plan.who) if plan.varying else plan.who.copy()
                    out.events.append(self._call(span, slots, who, group))
                    return
            kind, operation = _kind(span, slots, group.read)
            if kind != "call" and kind != "tool" and kind != "agent":
                out.ignored[kind] = out.ignored.get(kind, 0) + 1
                if kind != _ROLL_UP and span.parent_span_id:
                    out.plain.append((span.span_id, span.parent_span_id, group.read.hex))
                return
            labels = self._labels(slots, touched & _LABEL_BITS, group.labels)
            if kind == "call":
                out.events.append(self._call(span, slots, self._who(slots, operation, labels, group), group))
            else:
                out.events.append(self._step(span, slots, kind, labels, group))
        except _Bad as e:
            out.rejected.append(Rejected(e.reason, e.detail, _remains(span, group.read), out.seen - 1))
        except wire.WireError:
            detail = "a span with a damaged status or event."
            out.rejected.append(Rejected("protobuf", detail, _remains(span, group.read), out.seen - 1))

    def _plan(self, layout: Layout, span: Any, slots: list[Any], group: _Group) -> _Plan:
        """What holds for every span of a layout; `_NO_PLAN` when that is not settled by what repeats, or it is no call."""
        varying = {*layout.lazy, *(code for _, code, _ in layout.reads)}
        named = (_OP, _OI, _AI, _TL, _REQUEST_TYPE, _ATTEMPT)
        if not varying.isdisjoint(self._who_slots) or all(slots[s] is None for s in named):
            return _NO_PLAN  # without any of those names a span's own name has a say in what it is
        kind, operation = _kind(span, slots, group.read)
        if kind != "call":
            return _NO_PLAN
        bits = 0
        for code in varying:
            bits |= self._keys.bits[code]
        bits &= _LABEL_BITS
        labels = self._labels(slots, layout.touched & _LABEL_BITS & ~bits, group.labels)
        return _Plan(self._who(slots, operation, labels, group), bits)

    def _who(self, slots: list[Any], operation: str, labels: Labels, group: _Group) -> dict[str, Any]:
        """The part of a call that says who called what: the same for many calls."""
        provider = slots[_PROVIDER]
        if provider is not None:
            provider = _providers.get(provider) if provider.__class__ is str else ""
            if not provider:
                provider = self._provider(slots)
        model, served = slots[_MODEL], slots[_SERVED]
        model = model if model.__class__ is str else ""
        served = model_name(served) if served.__class__ is str else ""
        who: dict[str, Any] = {
            **labels,
            "operation": operation,
            "scope": group.scope,
            "provider": provider or "",
        }
        if slots[_PARAMETERS] is not None:
            named, streams = _from_parameters(slots[_PARAMETERS])
            model = model or named
            if streams:
                who["stream"] = True
        if slots[_STREAM] is True:
            who["stream"] = True
        who["model"] = model_name(model) if model else served
        who["model_served"] = served
        return who

    def _call(self, span: Any, slots: list[Any], told: dict[str, Any], group: _Group) -> LlmCall:
        """The call's event. `told` holds who called what already; only what was said goes in, by one dict: msgspec takes
        many keyword arguments one by one, in quadratic time."""
        start, at = span.start_time_unix_nano, span.end_time_unix_nano
        if start.__class__ is int and at.__class__ is int and _EARLIEST_NS < at < _LATEST_NS:
            start, at = start / 1e9, at / 1e9
        else:
            start, at = _times(span)
        hex_id = group.read.hex
        trace, own, parent = hex_id(span.trace_id), hex_id(span.span_id), span.parent_span_id
        parent = hex_id(parent) if parent else ""
        if len(trace) > 64 or len(own) > 64 or len(parent) > 64:
            trace, own, parent = trace[:64], own[:64], parent[:64]  # no ids of OTLP's
        told["at"], told["trace"], told["span"], told["parent"] = at, trace, own, parent
        if "run" not in told:
            told["run"] = trace
        error = code = ""
        status = span.status
        if (status and status != wire.STATUS_OK) or slots[_ERROR] is not None:
            error, code = self._error(span, slots, told["provider"], group.read)
        counts: list[Any] = slots[_INPUT : _REASONING + 1]
        input_, output, read, write, reasoning = counts
        if not (
            input_.__class__ is output.__class__ is int
            and read.__class__ in _COUNTS
            and write.__class__ in _COUNTS
            and reasoning.__class__ in _COUNTS
            and 0 < input_ < MAX_COUNT > output >= 0
            and (read or 0) >= 0 <= (write or 0)
            and (read or 0) + (write or 0) <= input_
            and 0 <= (reasoning or 0) < MAX_COUNT
        ):  # anything but plain, sensible numbers goes the long way
            input_, output, read, write, reasoning = _tokens(input_, output, read, write, reasoning)
        ttft = None
        if slots[_TTFT] is not None or slots[_OI] is not None or slots[_TTFT_MS] is not None:
            ttft = _ttft(span, slots, start, group.read)
        if input_ is not None:
            told["input_tokens"] = input_
        if output is not None:
            told["output_tokens"] = output
        if read is not None:
            told["cache_read_tokens"] = read
        if write is not None:
            told["cache_write_tokens"] = write
        if reasoning is not None:
            told["reasoning_tokens"] = reasoning
        if 0.0 < start <= at:
            told["latency_s"] = at - start
        if ttft is not None:
            told["ttft_s"] = ttft
            told["stream"] = True
        if error:
            told["error"] = error
            told["error_code"] = code
        value = slots[_ID]
        if value.__class__ is str:
            told["id"] = value if len(value) <= MAX_LABEL else identity(value)
        value = slots[_FINISH]
        if value is not None:
            told["finish"] = (_finishes.get(value) if value.__class__ is str else None) or _finish(value)
        value = slots[_COST]
        if value is not None:
            told["cost_usd"] = _seconds(value) or None  # a failed call says 0: not said, rather than free
        value = slots[_RETRIES]
        if value is not None:
            told["retries"] = _count(value, "retries")
        return LlmCall(**told)

    def _provider(self, slots: list[Any]) -> str:
        """The first name that says anything: frameworks put their own (`langchain`) where the provider's should be."""
        for slot in (_PROVIDER, *self._keys.stand_ins[_PROVIDER]):
            value = slots[slot]
            if value.__class__ is bytes:
                value = wire.value_in(value, value[1] + 2)
            name = provider_name(_text(value))
            if name:
                return name
        return ""

    def _error(self, span: Any, slots: list[Any], provider: str, read: Any) -> tuple[str, str]:
        """Class and code; both empty when the call went well.

        The exception event's message is preferred: a status message may hold a whole traceback, whose lines name
        errors that were only handled on the way."""
        failed, status_message = read.status(span)
        if not failed and slots[_ERROR] is None:
            return "", ""
        kind = _text(slots[_ERROR])
        raised, message = _exception(span, read)
        message = message or status_message.partition("Traceback (most recent call last)")[0]
        if not kind or kind == "_OTHER":
            kind = raised
        http = _maybe_count(slots[_STATUS])
        own = _text(slots[_CODE])
        klass = self._options.classifier.classify(
            provider=provider, status=http, code=own, type=kind, message=message[:_MESSAGE]
        )
        code = own or (str(http) if http is not None and http >= 400 else kind.rpartition(".")[2])
        return klass, code[:128]

    def _step(self, span: Any, slots: list[Any], kind: str, labels: Labels, group: _Group) -> AgentStep:
        start, at = _times(span)
        read = group.read
        trace, own = read.hex(span.trace_id), read.hex(span.span_id)
        failed = read.status(span)[0] or slots[_ERROR] is not None
        is_tool = kind == "tool"
        tool = label(_text(slots[_TOOL]) or read.name(span)) if is_tool else ""
        error = message = ""
        if failed:
            raised, message = _exception(span, read)
            error = label((_text(slots[_ERROR]) or raised or "error").rpartition(".")[2])
        arguments = _content(slots[_ARGUMENTS]) if is_tool else None
        result = _content(slots[_RESULT]) if is_tool else None
        if result is None and message:
            result = message  # what the agent sees of a tool that failed
        return AgentStep(
            at=at,
            run=labels.get("run") or trace,
            app=labels.get("app", ""),
            agent=labels.get("agent") or ("" if is_tool else label(read.name(span))),
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
            parent=read.hex(span.parent_span_id) if span.parent_span_id else "",
            scope=group.scope,
        )

    def _finished(self, out: _Body) -> Decoded:
        """Where several instrumentations wrote into one body, a call's parent becomes its nearest calling ancestor."""
        if out.plain:
            calls = {e.span: i for i, e in enumerate(out.events) if type(e) is LlmCall}
            if len({out.events[i].scope for i in calls.values()}) > 1:  # type: ignore[union-attr]
                _climb(out, calls)
        return Decoded(out.events, out.rejected, out.ignored)


def _climb(out: _Body, calls: dict[str, int]) -> None:
    above_of = {hex_id(own): hex_id(parent) for own, parent, hex_id in out.plain}
    for span, index in calls.items():
        call = out.events[index]
        assert isinstance(call, LlmCall)
        above, hops = call.parent, 0
        while above in above_of and hops < _HOPS:
            above, hops = above_of[above], hops + 1
        if hops and above in calls and above != span:
            out.events[index] = msgspec.structs.replace(call, parent=above)


def _wire_attributes(attributes: Iterable[bytes]) -> Iterable[tuple[str, Any]]:
    for data in attributes:
        try:
            key, value = wire.attribute(data)
        except wire.WireError:
            continue  # a resource with a damaged attribute is still the resource of its spans
        yield wire.text(key), value


def _kind(span: Any, slots: list[Any], read: Any) -> tuple[str, str]:
    """`call`, `tool` or `agent`, and the operation; else the reason for which the span is left out."""
    name = slots[_OP]
    if name.__class__ is str and name:
        operation = INFERENCE.get(name)
        return ("call", operation) if operation is not None else (STEPS.get(name, _OTHER), "")
    kind = slots[_OI]
    if kind.__class__ is str:
        kind = kind.upper()
        if kind == "LLM":
            return "call", "chat"
        if kind == "EMBEDDING":
            return "call", "embeddings"
        return _OI_STEPS.get(kind, _OTHER), ""
    if slots[_AI].__class__ is str:
        return _ai_sdk_kind(slots[_AI])
    if slots[_TL] in ("tool", "agent"):
        return str(slots[_TL]), ""
    if slots[_REQUEST_TYPE].__class__ is str:
        return "call", INFERENCE.get(slots[_REQUEST_TYPE], "chat")
    if slots[_ATTEMPT] is not None:
        return "call", "chat"
    if slots[_MODEL] is None or slots[_PROVIDER] is None:
        return _PLAIN, ""
    if read.name(span) == "raw_gen_ai_request":
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
    start, end = span.start_time_unix_nano, span.end_time_unix_nano
    if start.__class__ is not int or end.__class__ is not int:
        try:
            start, end = int(start or 0), int(end or 0)
        except ValueError as e:
            raise _Bad("type", "a span's time is no whole number of nanoseconds.") from e
    at = (end or start) / 1e9
    if not EARLIEST <= at < LATEST:
        raise _Bad(
            "timestamp", f"a span ends at {at:.0f}; must be seconds since the epoch, UTC, from 2010 to 2099."
        )
    return start / 1e9, at


def _text(value: Any) -> str:
    if value.__class__ is str:
        return value
    if value.__class__ is int or value.__class__ is float:
        return str(value)
    return ""


def _maybe_count(value: Any) -> int | None:
    """A whole number, negative ones too; None when the value is none."""
    if value.__class__ is int:
        return value
    if value.__class__ is float:
        return int(value) if math.isfinite(value) else None
    if value.__class__ is str and value.isascii() and len(value) <= 20 and value.lstrip("-").isdigit():
        return int(value)
    return None


def _count(value: Any, name: str) -> int | None:
    number = value if value.__class__ is int else _maybe_count(value)
    if number is None or 0 <= number <= MAX_COUNT:
        return number
    if number < 0:
        raise _Bad("negative", f"{name} is {number}; counts are zero or more.")
    raise _Bad("too_large", f"{name} is beyond {MAX_COUNT:,}.")


def _seconds(value: Any) -> float | None:
    """A finite number of zero or more, also for dollars; None when the value is none."""
    if value.__class__ is str:
        try:
            value = float(value)
        except ValueError:
            return None
    if value.__class__ is float or value.__class__ is int:
        return float(value) if 0.0 <= value < 1e9 else None
    return None


def _tokens(
    input_: Any, output: Any, read: Any, write: Any, reasoning: Any
) -> tuple[int | None, int | None, int | None, int | None, int | None]:
    """The five counts. Missing is not zero, and no prompt is empty: an input of 0 means that the source did not know."""
    if input_ is not None:
        input_ = _count(input_, "input tokens")
    if output is not None:
        output = _count(output, "output tokens")
    if not input_:
        if not output:
            return None, None, None, None, None
        input_ = None
    if read is not None:
        read = _count(read, "cache-read tokens")
    if write is not None:
        write = _count(write, "cache-write tokens")
    if reasoning is not None:
        reasoning = _count(reasoning, "reasoning tokens")
    if input_ is not None and (read or write):
        cached = (read or 0) + (write or 0)
        if cached > input_:
            input_ += cached  # the source left the cache out of its input
    return input_, output, read, write, reasoning


def _finish(value: Any) -> str:
    if value.__class__ is list:
        if len(value) == 1 and value[0].__class__ is str:
            return finish_name(value[0])
        return finish_of([v for v in value if v.__class__ is str])
    if value.__class__ is not str:
        return ""
    if value[:1] == "[":  # LiteLLM writes the list as JSON text
        try:
            return finish_of(_words.decode(value))
        except (msgspec.DecodeError, RecursionError):
            return ""
    return finish_name(value)


def _simplified(slot: int, value: Any) -> Any:
    """A remembered value, once and for all in the spelling of events."""
    return _finish(value) if slot == _FINISH else value


def _from_parameters(value: Any) -> tuple[str, bool]:
    if value.__class__ is not str:
        return "", False
    try:
        found = _parameters.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return "", False
    return found.model if isinstance(found.model, str) else "", found.stream is True


def _ttft(span: Any, slots: list[Any], start: float, read: Any) -> float | None:
    if slots[_TTFT] is not None:
        return _seconds(slots[_TTFT])
    if slots[_TTFT_MS] is not None:
        milliseconds = _seconds(slots[_TTFT_MS])
        return milliseconds / 1e3 if milliseconds is not None else None
    if span.events:
        for name, at, _ in read.events(span):
            if name == "First Token Stream Event":
                after = at / 1e9 - start
                return after if 0.0 <= after < 1e6 else None
    return None


def _exception(span: Any, read: Any) -> tuple[str, str]:
    """Type and message of the last exception event: the one that left the call."""
    kind = message = ""
    for name, _, attributes in read.events(span):
        if name in ("exception", "gen_ai.client.operation.exception"):
            kind = _text(attributes.get("exception.type")) or kind
            message = _text(attributes.get("exception.message")) or message
    return kind, message


def _content(value: Any) -> Any:
    """A content attribute, left unread until here, as plain data: to be hashed at once and dropped."""
    return wire.attribute(value)[1] if value.__class__ is bytes else value


def _size(content: Any) -> int:
    if isinstance(content, str):
        return len(content.encode("utf-8", "surrogatepass"))
    return len(content) if isinstance(content, bytes) else len(repr(content))


def _remains(span: Any, read: Any) -> bytes:
    """What a dead letter keeps of a span: who, when, and which attributes it had; no value of any."""
    return msgspec.json.encode(
        {
            "traceId": read.hex(span.trace_id),
            "spanId": read.hex(span.span_id),
            "startTimeUnixNano": str(span.start_time_unix_nano),
            "endTimeUnixNano": str(span.end_time_unix_nano),
            "attributes": sorted(label(key) for key in read.keys(span)),
        }
    )
