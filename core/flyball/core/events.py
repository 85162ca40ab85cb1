"""What Flyball reads: one LLM call, agent step, GPU sample, change or evaluation.

Frozen msgspec structs, because decoding is the hot path. `at` is when the outcome was known (a call's end), seconds
since the epoch, UTC. Missing is not zero: what a source did not say is None and counts in no average. Labels
that a source did not say are the empty string. No event holds prompt or completion text, tool arguments or results.

Fields are only ever added, with defaults; `flyball schema events` exports the JSON Schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

EARLIEST: Final = 1_262_304_000.0
"""2010-01-01: an event from before it is a broken clock (1970), not a late event."""
LATEST: Final = 4_102_444_800.0
"""2100-01-01: an event from this moment on is a broken clock."""

At: TypeAlias = Annotated[float, Meta(description="seconds since the epoch, UTC; when the outcome was known")]
Label: TypeAlias = Annotated[str, Meta(max_length=512)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000_000_000)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0.0)]


class LlmCall(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag_field="type", tag="llm_call"
):
    """One attempt to call a model, finished: by success, failure or the client's leaving.

    `input_tokens` includes cached tokens, `output_tokens` includes reasoning tokens. `error` is a canonical class
    (`flyball.core.errorclass`) or empty. `model` is the model as asked for, `model_served` as answered.
    """

    at: At
    id: Annotated[
        str, Meta(max_length=512, description="provider's response id; identifies the call across its copies")
    ] = ""
    provider: Label = ""
    model: Label = ""
    model_served: Label = ""
    deployment: Label = ""
    region: Label = ""
    app: Label = ""
    prompt: Annotated[str, Meta(max_length=512, description="prompt version, `name@version`")] = ""
    team: Label = ""
    tenant: Label = ""
    key: Annotated[
        str, Meta(max_length=512, description="alias or hash of the credential, never the credential")
    ] = ""
    agent: Label = ""
    run: Label = ""
    operation: Annotated[str, Meta(max_length=64, description="chat, embeddings, …; empty means chat")] = ""
    error: Annotated[str, Meta(max_length=64, description="canonical error class; empty = success")] = ""
    error_code: Annotated[str, Meta(max_length=128, description="status or code as the provider gave it")] = (
        ""
    )
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_tokens: Count | None = None
    cache_write_tokens: Count | None = None
    reasoning_tokens: Count | None = None
    cost_usd: Annotated[float, Meta(ge=0.0)] | None = None
    latency_s: Seconds | None = None
    ttft_s: Seconds | None = None
    finish: Label = ""
    stream: bool = False
    retries: Count | None = None
    trace: Label = ""
    span: Label = ""
    parent: Label = ""
    scope: Annotated[
        str, Meta(max_length=512, description="who reported it: instrumentation scope or gateway")
    ] = ""


class AgentStep(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    gc=False,
    tag_field="type",
    tag="agent_step",
):
    """One step of an agent run that is not itself an LLM call: a tool call, a hand-off, a user's turn.

    `args_hash` and `result_hash` are keyed hashes: equal means the same content, and nothing else can be read off them.
    """

    at: At
    run: Label = ""
    app: Label = ""
    agent: Label = ""
    team: Label = ""
    tenant: Label = ""
    kind: Annotated[str, Meta(max_length=32, description="tool, agent, handoff, user, message, other")] = (
        "tool"
    )
    tool: Label = ""
    step: Count | None = None
    args_hash: Label = ""
    result_hash: Label = ""
    result_bytes: Count | None = None
    error: Label = ""
    latency_s: Seconds | None = None
    parent_run: Label = ""
    id: Label = ""
    trace: Label = ""
    span: Label = ""
    parent: Label = ""
    scope: Label = ""


class GpuSample(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    gc=False,
    tag_field="type",
    tag="gpu_sample",
):
    """What one GPU, or one inference server, said at one scrape.

    `values` maps canonical metric names (units in the name, counters end in `_total`) to numbers; a metric that the
    exporter does not support is absent. See `flyball.core.gpu_metrics` for the names.
    """

    at: At
    node: Label = ""
    gpu: Annotated[
        str, Meta(max_length=512, description="GPU UUID, else index; empty for an inference server")
    ] = ""
    hardware: Label = ""
    pod: Label = ""
    namespace: Label = ""
    deployment: Annotated[str, Meta(max_length=512, description="inference server (address or name)")] = ""
    model: Label = ""
    app: Label = ""
    team: Label = ""
    values: dict[str, float] = {}


class Change(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="change"):
    """Something a person or pipeline changed: what every on-call engineer asks for first."""

    at: At
    kind: Annotated[
        str,
        Meta(max_length=64, description="deploy, prompt, model, route, config, driver, provider_notice, …"),
    ]
    summary: Annotated[str, Meta(max_length=2000)] = ""
    labels: dict[str, str] = {}
    version: Label = ""
    actor: Label = ""
    url: Annotated[str, Meta(max_length=3000)] = ""
    id: Label = ""


class Evaluation(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    gc=False,
    tag_field="type",
    tag="evaluation",
):
    """One quality score of one answer."""

    at: At
    name: Label
    score: float
    app: Label = ""
    prompt: Label = ""
    model: Label = ""
    tenant: Label = ""
    run: Label = ""
    label: Label = ""
    id: Label = ""


Event: TypeAlias = LlmCall | AgentStep | GpuSample | Change | Evaluation

EVENT_TYPES: Final[tuple[type[msgspec.Struct], ...]] = (LlmCall, AgentStep, GpuSample, Change, Evaluation)
TYPE_NAMES: Final[dict[type, str]] = {t: str(t.__struct_config__.tag) for t in EVENT_TYPES}


class Batch(msgspec.Struct, frozen=True):
    """Events that arrived together from one sender: the unit of the log and of every stage.

    `received_at` is when the body arrived by our clock; None in a replay, where event time is all there is.
    """

    events: Sequence[Event]
    sender: str = ""
    received_at: float | None = None
