"""LiteLLM's StandardLoggingPayload, as its `generic_api` callback posts it: a JSON array, NDJSON, or one object.

Only the fields that an event needs are decoded; messages and the answer's text are skipped inside the JSON parser and
never become objects. LiteLLM leaves fields null, empty or of another type in places, so every field is taken
leniently: what cannot be read is missing, except what would make the event wrong (no time, negative counts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, ClassVar, Final

import msgspec

from flyball.core.errorclass import ErrorClass
from flyball.core.events import EARLIEST, LATEST, Event, LlmCall
from flyball.core.ports import Decoded, Rejected
from flyball.streams.formats._names import (
    MAX_COUNT,
    MAX_LABEL,
    finish_of,
    identity,
    label,
    model_name,
    provider_name,
)
from flyball.streams.formats._options import FormatOptions
from flyball.streams.formats.native import spans_lines
from flyball.streams.labels import LABELS, Rules

SCOPE: Final = "litellm"

_OPERATIONS: Final[dict[str, str]] = {
    "completion": "chat", "text_completion": "text_completion", "embedding": "embeddings", "responses": "chat",
    "anthropic_messages": "chat", "generate_content": "generate_content", "": "chat",
}  # fmt: skip
_CONTENT: Final[frozenset[str]] = frozenset(
    {
        "messages",
        "response",
        "error_str",
        "model_parameters",
        "model_map_information",
        "standard_built_in_tools_params",
    }
)
"""Fields that a dead letter loses."""

# What is decoded of a record, by path. Leaves are of any type, and coerced below.
_PATHS: Final[tuple[str, ...]] = (
    "id", "litellm_call_id", "call_type", "stream", "status", "custom_llm_provider", "prompt_tokens", "completion_tokens",
    "startTime", "endTime", "completionStartTime", "model", "model_id", "model_group", "response_cost", "cache_hit",
    "request_tags", "error_str", "trace_id",
    "error_information.error_code", "error_information.error_class", "error_information.error_message",
    "error_information.normalized_error", "error_information.error_rate_limit_category",
    "hidden_params.additional_headers.x-litellm-attempted-retries",
    "response.id", "response.model", "response.choices",
    "metadata.usage_object.prompt_tokens_details.cached_tokens",
    "metadata.usage_object.prompt_tokens_details.cache_creation_tokens",
    "metadata.usage_object.prompt_tokens_details.cache_write_tokens",
    "metadata.usage_object.input_tokens_details.cached_tokens",
    "metadata.usage_object.cache_read_input_tokens", "metadata.usage_object.cache_creation_input_tokens",
    "metadata.usage_object.completion_tokens_details.reasoning_tokens",
    "metadata.usage_object.output_tokens_details.reasoning_tokens",
    "metadata.user_api_key_request_route",
)  # fmt: skip


class _Choice(msgspec.Struct, gc=False):
    finish_reason: Any = None


class _Bad(Exception):
    """One record that cannot be an event."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class LiteLlm:
    """StandardLoggingPayload → `LlmCall`.

    One record is one attempt: a fallback gives two (a failure on one model group, a success on the next), both kept;
    retries inside a group are one record and cannot be seen. Failures of the gateway's own making (budgets, blocks,
    cooldowns, wrong proxy keys) become `gateway_local`; answers to health probes are left out.
    """

    kind: ClassVar[str] = "litellm"

    def __init__(self, options: FormatOptions | None = None) -> None:
        self._options = options or FormatOptions()
        rules = self._options.labels.litellm
        record = _record_type(_PATHS + _label_paths(rules))
        self._record = msgspec.json.Decoder(record)
        self._records = msgspec.json.Decoder(list[record])  # type: ignore[valid-type]
        self._type = record
        self._raws = msgspec.json.Decoder(list[msgspec.Raw])
        owners = _Owners()
        self._labels = [
            (name, [_source(s, owners) for s in rules[name]]) for name in LABELS if rules.get(name)
        ]
        self._owners = owners.steps
        self._reads_tags = any(isinstance(s, _Tag) for _, sources in self._labels for s in sources)

    def decode(self, body: bytes, content_type: str = "") -> Decoded:
        array = body.lstrip()[:1] == b"["
        try:
            records: list[Any] = self._records.decode(body) if array else self._record.decode_lines(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return self._one_by_one(body, array)
        out = Decoded([], [], {})
        for index, record in enumerate(records):
            self._take(record, None, index, out)
        if out.rejected:
            self._fill_data(out, self._pieces(body, array))
        return out

    def _pieces(self, body: bytes, array: bool) -> list[bytes]:
        if array:
            try:
                return [bytes(raw) for raw in self._raws.decode(body)]
            except RecursionError:
                return [body]
            except (msgspec.DecodeError, UnicodeDecodeError):
                pass  # no list after all: lines, of which the first is damaged
        lines = [line for line in body.splitlines() if line.strip()]
        return [body] if len(lines) > 1 and spans_lines(body) else lines

    def _fill_data(self, out: Decoded, pieces: list[bytes]) -> None:
        """Bytes for the dead letters, looked up only when something was rejected."""
        for i, bad in enumerate(out.rejected):
            if bad.index < len(pieces):
                out.rejected[i] = Rejected(
                    bad.reason, bad.detail, _without_content(pieces[bad.index]), bad.index
                )

    def _one_by_one(self, body: bytes, array: bool) -> Decoded:
        out = Decoded([], [], {})
        for index, piece in enumerate(self._pieces(body, array)):
            try:
                record = self._record.decode(piece)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
                record = self._mended(piece, e)
            if record is None:
                detail = "not a JSON object; LiteLLM's generic_api sends a list of objects, or one a line."
                out.rejected.append(Rejected("json", detail, piece, index))
            else:
                self._take(record, piece, index, out)
        return out

    def _mended(self, piece: bytes, error: Exception) -> Any | None:
        """A record in which a string or list stands where an object should: read without those fields."""
        if not isinstance(error, msgspec.ValidationError):
            return None
        try:
            loose = msgspec.json.decode(piece)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None
        return msgspec.convert(_shaped(loose, self._type), self._type) if isinstance(loose, dict) else None

    def _take(self, record: Any, piece: bytes | None, index: int, out: Decoded) -> None:
        if _is_probe(record):
            _count_up(out, "health_probe")
            return
        try:
            out.events.append(self._event(record))
        except _Bad as e:
            data = _without_content(piece) if piece is not None else b""
            out.rejected.append(Rejected(e.reason, e.detail, data, index))

    def _event(self, r: Any) -> Event:
        at = _time(r.endTime)
        if at is None:
            raise _Bad(
                "missing_field", "endTime is missing or no time; seconds since the epoch are expected."
            )
        if not EARLIEST <= at < LATEST:
            raise _Bad(
                "timestamp", f"endTime is {at:.0f}; must be seconds since the epoch, UTC, from 2010 to 2099."
            )
        failed = r.status == "failure" or (r.status != "success" and bool(r.error_str))
        start, first = _time(r.startTime), _time(r.completionStartTime)
        stream = r.stream is True
        usage = r.metadata.usage_object if r.metadata is not None else None
        tokens = _tokens(r, usage, failed)
        labels = self._labels_of(r)
        provider = provider_name(r.custom_llm_provider) if isinstance(r.custom_llm_provider, str) else ""
        error, code = self._error(r, provider) if failed else ("", "")
        raw_model = _text(r.model)
        group = label(_text(r.model_group))
        cost = _number(r.response_cost, "response_cost")
        retries = r.hidden_params.additional_headers if r.hidden_params is not None else None
        # By a dict: msgspec takes many keyword arguments one by one, in quadratic time.
        told: dict[str, Any] = {
            **labels,
            "at": at,
            "id": self._id(r, failed, at),
            "provider": provider,
            "model": model_name(raw_model) or group,
            "model_served": "" if failed else _served(r.response, group),
            "deployment": _deployment(group, _text(r.model_id)),
            "operation": _operation(r.call_type),
            "error": error,
            "error_code": code,
            "input_tokens": tokens[0],
            "output_tokens": tokens[1],
            "cache_read_tokens": tokens[2],
            "cache_write_tokens": tokens[3],
            "reasoning_tokens": tokens[4],
            # A failed call reports a cost of 0 whatever happened: not said, rather than free.
            "cost_usd": None if failed and not cost else cost,
            "finish": "" if failed else _finish(r.response),
            "stream": stream,
            "retries": _count(getattr(retries, "x_litellm_attempted_retries", None), "attempted-retries"),
            "scope": SCOPE,
        }
        if start is not None and at >= start:
            told["latency_s"] = at - start
            if stream and first is not None and start <= first < at:
                told["ttft_s"] = first - start
        return LlmCall(**told)

    def _id(self, r: Any, failed: bool, at: float) -> str:
        """The provider's response id; else an id of this attempt: a fallback's attempts share LiteLLM's call id."""
        own = _text(r.response.id) if r.response is not None and not isinstance(r.response, str) else ""
        if own and not failed and r.cache_hit is not True:
            return identity(own)
        call = _text(r.litellm_call_id) or _text(r.id)
        return identity(f"{call}/{at:.6f}") if call else ""

    def _error(self, r: Any, provider: str) -> tuple[str, str]:
        info = r.error_information
        code = _text(info.error_code) if info is not None else ""
        if info is not None and _text(info.error_rate_limit_category).startswith("litellm"):
            return ErrorClass.GATEWAY_LOCAL.value, code[:128]
        klass = self._options.classifier.classify(
            provider=provider,
            code=code,
            type=_text(info.error_class) if info is not None else "",
            message=(_text(info.error_message) if info is not None else "") or _text(r.error_str),
            normalized=_text(info.normalized_error) if info is not None else "",
        )
        return klass, code[:128]

    def _labels_of(self, r: Any) -> dict[str, str]:
        owners: list[Any] = [r]
        for above, step in self._owners:
            owner = owners[above]
            owners.append(None if owner is None or owner.__class__ is str else step(owner))
        tags = _tags(r.request_tags) if self._reads_tags and r.request_tags else None
        found: dict[str, str] = {}
        for name, sources in self._labels:
            for source in sources:
                value = source.read(owners, tags, found)
                if value:
                    found[name] = value if len(value) <= MAX_LABEL else value[:MAX_LABEL]
                    break
        return found


class _Owners:
    """The objects inside a record that label paths lead into, each stepped into once a record."""

    def __init__(self) -> None:
        self.index: dict[tuple[str, ...], int] = {(): 0}
        self.steps: list[tuple[int, Callable[[Any], Any]]] = []

    def of(self, path: tuple[str, ...]) -> int:
        if path not in self.index:
            above = self.of(path[:-1])
            self.steps.append((above, attrgetter(_field_name(path[-1]))))
            self.index[path] = len(self.steps)
        return self.index[path]


class _Field:
    """A path into the record."""

    __slots__ = ("_get", "_owner")

    def __init__(self, path: str, owners: _Owners) -> None:
        *above, last = path.split(".")
        self._owner = owners.of(tuple(above))
        self._get = attrgetter(_field_name(last))

    def read(self, owners: list[Any], tags: Mapping[str, str] | None, found: Mapping[str, str]) -> str:
        owner = owners[self._owner]
        if owner is None or owner.__class__ is str:
            return ""
        value = self._get(owner)
        if value is None:
            return ""
        return value if value.__class__ is str else _text(value)


class _Versioned:
    """Two paths, joined as `name@version`."""

    __slots__ = ("_name", "_version")

    def __init__(self, name: _Field, version: _Field) -> None:
        self._name, self._version = name, version

    def read(self, owners: list[Any], tags: Mapping[str, str] | None, found: Mapping[str, str]) -> str:
        name = self._name.read(owners, tags, found)
        version = self._version.read(owners, tags, found) if name else ""
        return f"{name}@{version}" if version else name


class _Tag:
    __slots__ = ("_key",)

    def __init__(self, key: str) -> None:
        self._key = key

    def read(self, owners: list[Any], tags: Mapping[str, str] | None, found: Mapping[str, str]) -> str:
        return tags.get(self._key, "") if tags else ""


class _Other:
    """What another label was found to be."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def read(self, owners: list[Any], tags: Mapping[str, str] | None, found: Mapping[str, str]) -> str:
        return found.get(self._name, "")


_Source = _Field | _Versioned | _Tag | _Other


def _source(text: str, owners: _Owners) -> _Source:
    if text.startswith("="):
        return _Other(text[1:])
    if text.startswith("tag:"):
        return _Tag(text.removeprefix("tag:"))
    name, _, version = text.partition("@")
    return _Versioned(_Field(name, owners), _Field(version, owners)) if version else _Field(name, owners)


def _tags(tags: Any) -> dict[str, str]:
    """`["app:shop", …]` as a mapping; the first of equal names counts."""
    found: dict[str, str] = {}
    if isinstance(tags, list):
        for tag in tags:
            if isinstance(tag, str):
                name, _, value = tag.partition(":")
                found.setdefault(name, value.strip())
    return found


def _label_paths(rules: Rules) -> tuple[str, ...]:
    return tuple(
        path
        for sources in rules.values()
        for source in sources
        if not source.startswith(("=", "tag:"))
        for path in source.split("@")
        if path
    )


def _field_name(part: str) -> str:
    name = "".join(c if c.isalnum() and c.isascii() else "_" for c in part)
    return f"f{name}" if name[:1].isdigit() or name.startswith("_") else name


def _record_type(paths: tuple[str, ...]) -> Any:
    """A struct that holds exactly what the paths name; everything else is skipped while parsing."""
    tree: dict[str, Any] = {}
    for path in paths:
        node = tree
        for part in path.split("."):
            node = node.setdefault(part, {})
    return _struct("LiteLlmRecord", tree, top=True)


def _struct(name: str, tree: dict[str, Any], top: bool = False) -> Any:
    fields: list[tuple[str, Any, Any]] = []
    rename: dict[str, str] = {}
    for part, below in tree.items():
        field = _field_name(part)
        if field != part:
            rename[field] = part
        if part == "choices":
            fields.append((field, list[_Choice] | None, None))
        elif part == "response":
            # Some settings make it a plain string; it is skipped as content either way.
            fields.append((field, _struct(f"{name}_{field}", below) | str | None, None))
        elif below:
            fields.append((field, _struct(f"{name}_{field}", below) | None, None))
        else:
            fields.append((field, Any, None))
    return msgspec.defstruct(name, fields, rename=rename or None, gc=False, module=__name__)


def _shaped(value: dict[str, Any], struct: Any) -> dict[str, Any]:
    """The object without members whose shape the struct cannot take."""
    shaped: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        if field.encode_name not in value:
            continue
        inner = value[field.encode_name]
        structs = [
            t
            for t in getattr(field.type, "__args__", ())
            if isinstance(t, type) and issubclass(t, msgspec.Struct)
        ]
        if structs:
            if isinstance(inner, dict):
                shaped[field.encode_name] = _shaped(inner, structs[0])
        elif field.name == "choices":
            if isinstance(inner, list):
                shaped[field.encode_name] = [c for c in inner if isinstance(c, dict)]
        else:
            shaped[field.encode_name] = inner
    return shaped


def _without_content(piece: bytes) -> bytes:
    try:
        record = msgspec.json.decode(piece)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return piece
    if not isinstance(record, dict):
        return piece
    return msgspec.json.encode({k: v for k, v in record.items() if k not in _CONTENT})


def _is_probe(r: Any) -> bool:
    if r.call_type in (None, "") and r.model_group in (None, "") and r.status == "success":
        return True
    route = r.metadata.user_api_key_request_route if r.metadata is not None else None
    return isinstance(route, str) and route.startswith("/health")


def _count_up(out: Decoded, reason: str) -> None:
    assert isinstance(out.ignored, dict)
    out.ignored[reason] = out.ignored.get(reason, 0) + 1


def _operation(call_type: Any) -> str:
    if not isinstance(call_type, str):
        return "chat"
    return _OPERATIONS.get(call_type) or _OPERATIONS.get(call_type.removeprefix("a")) or call_type[:64]


def _text(value: Any) -> str:
    if value.__class__ is str:
        return value
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    return str(value)


def _time(value: Any) -> float | None:
    """Seconds since the epoch; ISO text (without a zone it is UTC) is taken too."""
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return float(value) if -1e15 < value < 1e15 else None
    if isinstance(value, str) and value:
        try:
            parsed = datetime.fromisoformat(value)
        except ValueError:
            return None
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    return None


def _count(value: Any, name: str) -> int | None:
    if type(value) is not int:
        if (isinstance(value, float) and math.isfinite(value)) or (
            isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 13
        ):
            value = int(value)
        else:
            return None
    if value < 0:
        raise _Bad("negative", f"{name} is {value}; counts are zero or more.")
    if value > MAX_COUNT:
        raise _Bad("too_large", f"{name} is beyond {MAX_COUNT:,}.")
    return int(value)


def _number(value: Any, name: str) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        return None
    if value < 0:
        raise _Bad("negative", f"{name} is negative; costs are zero or more.")
    return float(value)


def _tokens(
    r: Any, usage: Any, failed: bool
) -> tuple[int | None, int | None, int | None, int | None, int | None]:
    """Input, output, cache read, cache write, reasoning. Missing is not zero: a failed call or a stream without
    usage reports 0, and a stream that broke reports LiteLLM's own estimate."""
    prompt = _count(r.prompt_tokens, "prompt_tokens")
    completion = _count(r.completion_tokens, "completion_tokens")
    if failed or (not prompt and not completion):
        return None, None, None, None, None
    if not prompt:
        prompt = None  # no call has an empty prompt: the source did not say
    if usage is None:
        return prompt, completion, None, None, None
    details, answer = usage.prompt_tokens_details, usage.completion_tokens_details
    read = _first(usage.cache_read_input_tokens, details and details.cached_tokens)
    if read is None and usage.input_tokens_details is not None:
        read = _first(usage.input_tokens_details.cached_tokens)
    write = _first(
        usage.cache_creation_input_tokens,
        details and details.cache_creation_tokens,
        details and details.cache_write_tokens,
    )
    reasoning = _first(answer and answer.reasoning_tokens)
    if reasoning is None and usage.output_tokens_details is not None:
        reasoning = _first(usage.output_tokens_details.reasoning_tokens)
    cached = (read or 0) + (write or 0)
    if prompt is not None and cached > prompt:
        prompt += cached  # the source left the cache out of its input
    return prompt, completion, read, write, reasoning


def _first(*values: Any) -> int | None:
    for value in values:
        found = _count(value, "cached or reasoning tokens")
        if found is not None:
            return found
    return None


def _served(response: Any, group: str) -> str:
    """The model that answered; through the proxy the answer mostly names the group again, which says nothing."""
    if response is None or isinstance(response, str):
        return ""
    answered = _text(response.model)
    return model_name(answered) if answered != group else ""


def _deployment(group: str, model_id: str) -> str:
    """`group/id`: the group is what callers ask for and what the gateway is steered by; ids are hashes by default."""
    short = model_id if len(model_id) <= 40 else model_id[:12]
    return label(f"{group}/{short}" if group and short else group or short)


def _finish(response: Any) -> str:
    if response is None or isinstance(response, str) or not response.choices:
        return ""
    return finish_of([c.finish_reason for c in response.choices if isinstance(c.finish_reason, str)])
