"""Every way in and out over HTTP, as others build on it: shapes, roles, refusals, content types."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zstandard
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from flyball.app.embedded import Limits
from flyball.core.events import Event
from tests.app._http import TOKENS, bearer, served
from tests.app._runtime import NOW, SetClock, calls, incident, outage, take
from tests.app.test_runtime import Gate, OutOfMemory
from tests.processes import eventually

OTLP = "application/x-protobuf"


def ndjson(events: list[Event]) -> bytes:
    return msgspec.json.Encoder().encode_lines(events)


def litellm(n: int, at: float = NOW) -> list[dict[str, Any]]:
    return [
        {
            "id": f"resp-{i}", "trace_id": f"trace-{i}", "call_type": "acompletion", "status": "success", "model": "gpt-4o",
            "custom_llm_provider": "openai", "startTime": at - 1, "endTime": at, "prompt_tokens": 10, "completion_tokens": 5,
            "total_tokens": 15, "response_cost": 0.001, "metadata": {"user_api_key_alias": "shop"}, "end_user": "t1",
            "messages": [{"role": "user", "content": "secret words"}], "response": {"choices": []},
        }
        for i in range(n)
    ]  # fmt: skip


def otlp_body(n: int = 2) -> bytes:
    request = ExportTraceServiceRequest()
    resource = request.resource_spans.add()
    attribute = resource.resource.attributes.add()
    attribute.key, attribute.value.string_value = "service.name", "shop"
    spans = resource.scope_spans.add()
    for i in range(n):
        span = spans.spans.add()
        span.name, span.kind = "chat gpt-4o", 3
        span.trace_id, span.span_id = bytes([1] * 15 + [i]), bytes([2] * 7 + [i])
        span.start_time_unix_nano = int((NOW - 1) * 1e9)
        span.end_time_unix_nano = int(NOW * 1e9)
        for key, value in (
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.provider.name", "openai"),
            ("gen_ai.request.model", "gpt-4o"),
            ("gen_ai.response.id", f"resp-{i}"),
        ):
            attribute = span.attributes.add()
            attribute.key, attribute.value.string_value = key, value
    body: bytes = request.SerializeToString()
    return body


def otlp_json() -> dict[str, Any]:
    attributes = [
        {"key": k, "value": {"stringValue": v}}
        for k, v in (
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.provider.name", "openai"),
            ("gen_ai.request.model", "m"),
        )
    ]
    span = {
        "traceId": "01" * 16, "spanId": "02" * 8, "name": "chat", "kind": 3, "startTimeUnixNano": str(int((NOW - 1) * 1e9)),
        "endTimeUnixNano": str(int(NOW * 1e9)), "attributes": attributes,
    }  # fmt: skip
    return {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}


# --- in -------------------------------------------------------------------------------------------------------------


def test_native_events_are_taken_and_counted_once(tmp_path: Path) -> None:
    with served(tmp_path) as (client, runtime):
        body = ndjson(calls(5))
        assert client.post("/v1/events", content=body).json() == {"accepted": 5, "rejected": 0}
        assert client.post("/v1/events", content=body).json() == {"accepted": 5, "rejected": 0}
        assert runtime.wait_for(2)
        found = client.get("/v1/status").json()
        assert (found["events"], found["duplicates"], found["position"]) == ({"llm_call": 5}, 5, 2)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
def test_compressed_bodies_are_taken(tmp_path: Path, encoding: str) -> None:
    body = ndjson(calls(5))
    packed = {
        "gzip": gzip.compress(body),
        "deflate": zlib.compress(body),
        "zstd": zstandard.compress(body),
    }[encoding]
    with served(tmp_path) as (client, _):
        answer = client.post("/v1/events", content=packed, headers={"content-encoding": encoding})
        assert answer.json() == {"accepted": 5, "rejected": 0}


def test_a_body_with_good_and_bad_lines_counts_the_good_and_says_what_is_wrong_with_the_bad(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as (client, _):
        body = ndjson(calls(1)) + b'{"type": "llm_call"}\nnonsense\n'
        answer = client.post("/v1/events", content=body)
        assert answer.status_code == 200
        found = answer.json()
        assert (found["accepted"], found["rejected"]) == (1, 2)
        assert [e["index"] for e in found["errors"]] == [1, 2]
        assert all(e["reason"] and e["detail"] for e in found["errors"])


def test_a_body_with_nothing_good_is_its_senders_error(tmp_path: Path) -> None:
    with served(tmp_path) as (client, _):
        assert client.post("/v1/events", content=b"nonsense").status_code == 400
        assert client.post("/ingest/litellm", content=b"[{]").status_code == 400


@pytest.mark.parametrize("shape", ["json_array", "ndjson", "single"])
def test_litellm_is_taken_in_each_of_its_shapes(tmp_path: Path, shape: str) -> None:
    payloads = litellm(1 if shape == "single" else 3)
    body = {
        "json_array": json.dumps(payloads),
        "ndjson": "\n".join(map(json.dumps, payloads)),
        "single": json.dumps(payloads[0]),
    }[shape]
    with served(tmp_path) as (client, runtime):
        answer = client.post("/ingest/litellm", content=body)
        assert answer.json()["accepted"] == len(payloads)
        assert runtime.wait_for(1)
        assert client.get("/v1/status").json()["events"] == {"llm_call": len(payloads)}
    # What was said never reaches the disk.
    assert b"secret words" not in b"".join(f.read_bytes() for f in tmp_path.iterdir())


def test_otlp_answers_in_the_content_type_of_the_question(tmp_path: Path) -> None:
    with served(tmp_path) as (client, runtime):
        as_protobuf = client.post("/v1/traces", content=otlp_body(), headers={"content-type": OTLP})
        assert (as_protobuf.status_code, as_protobuf.headers["content-type"]) == (200, OTLP)
        assert ExportTraceServiceResponse.FromString(as_protobuf.content) == ExportTraceServiceResponse()
        as_json = client.post("/v1/traces", json=otlp_json())
        assert as_json.status_code == 200
        assert as_json.headers["content-type"].startswith("application/json")
        assert as_json.json() == {}
        assert runtime.wait_for(2)
        assert client.get("/v1/status").json()["events"] == {"llm_call": 3}


def test_otlp_that_is_no_otlp_is_refused_in_the_content_type_of_the_question(tmp_path: Path) -> None:
    with served(tmp_path) as (client, _):
        damaged = client.post("/v1/traces", content=otlp_body()[:-3], headers={"content-type": OTLP})
        assert (damaged.status_code, damaged.headers["content-type"]) == (400, OTLP)
        assert damaged.content[:2] == b"\x08\x03"  # google.rpc.Status, code 3
        as_json = client.post(
            "/v1/traces", content=b"{nonsense", headers={"content-type": "application/json"}
        )
        assert as_json.status_code == 400
        assert as_json.json()["code"] == 3


@pytest.mark.parametrize("path", ["/v1/metrics", "/v1/logs"])
def test_other_signals_of_otlp_are_answered_so_that_exporters_stay_quiet(tmp_path: Path, path: str) -> None:
    with served(tmp_path) as (client, _):
        answer = client.post(path, content=b"", headers={"content-type": OTLP})
        assert (answer.status_code, answer.headers["content-type"]) == (200, OTLP)


def test_too_large_bodies_are_refused_before_they_are_read_and_while_they_are_read(tmp_path: Path) -> None:
    with served(tmp_path, given={"limits": {"body_bytes": 1000}}) as (client, _):
        declared = client.post("/v1/events", content=b"x" * 1001)
        chunked = client.post("/v1/events", content=(b"x" * 600 for _ in range(2)))
        packed = client.post(
            "/v1/events", content=gzip.compress(b" " * 100_000), headers={"content-encoding": "gzip"}
        )
        for answer in (declared, chunked, packed):
            assert answer.status_code == 413
            assert "limits.body_bytes" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/v1/enforced", "/v1/incidents/INC-1"])
def test_bodies_of_people_are_limited_too(tmp_path: Path, path: str) -> None:
    with served(tmp_path) as (client, _):
        assert client.post(path, content=b"x" * (2 << 20)).status_code == 413
        assert client.post(path, content=(b"x" * 65536 for _ in range(40))).status_code == 413


def test_an_unknown_encoding_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with served(tmp_path) as (client, _):
        answer = client.post("/v1/events", content=b"x", headers={"content-encoding": "br"})
        assert answer.status_code == 415
        assert "gzip" in answer.json()["error"]


def test_overload_answers_429_with_retry_after_and_litellm_is_turned_away_last(tmp_path: Path) -> None:
    gate = Gate()
    limits = Limits(backlog_bytes=10_000)
    with served(tmp_path, pipeline=gate.pipeline, limits=limits) as (client, _):
        answers = [client.post("/v1/events", content=ndjson(calls(20, prefix=str(i)))) for i in range(20)]
        last = answers[-1]
        assert (answers[0].status_code, last.status_code) == (200, 429)
        assert int(last.headers["retry-after"]) >= 1
        assert "come back" in last.json()["error"]
        traces = client.post("/v1/traces", content=otlp_body(100), headers={"content-type": OTLP})
        assert (traces.status_code, traces.headers["content-type"]) == (429, OTLP)
        assert traces.headers["retry-after"]
        assert client.post("/ingest/litellm", json=litellm(3)).status_code == 200
        gate.open.set()


# --- out ------------------------------------------------------------------------------------------------------------


def test_status_has_the_fields_that_others_build_on(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock) as (client, runtime):
        incident(runtime, clock)
        client.post("/v1/events", content=b"nonsense")
        found = client.get("/v1/status").json()
        assert found["events"] == {"llm_call": 2400}
        assert found["rejected"] == {"json": 1}
        assert found["incidents"] == {
            "open": 0, "acknowledged": 0, "mitigating": 1, "verifying": 0, "resolved": 0,
        }  # fmt: skip
        assert (found["pages"], found["directives"], found["duplicates"], found["late"]) == (1, 1, 0, 0)
        assert found["position"] >= 80
        assert found["lag_s"] >= 0


def test_incidents_are_listed_newest_first_in_pages(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock) as (client, runtime):
        first = incident(runtime, clock)
        clock.at += 1.0
        assert runtime.wait_for(runtime.tick().result(30))
        listed = client.get("/v1/incidents").json()
        assert [i["id"] for i in listed] == [first]
        one = listed[0]
        fixed = {"type", "id", "at", "root", "signal", "class", "severity", "scope", "page", "summary"}
        assert fixed <= set(one)
        assert (one["type"], one["root"]) == ("incident", {"kind": "provider", "name": "a"})
        assert (one["signal"], one["class"], one["page"]) == ("llm.errors", "overloaded", True)
        assert one["severity"] in ("high", "critical")
        assert one["scope"]["provider"] == "a"
        assert client.get("/v1/incidents", params={"limit": 1}).json() == listed
        assert client.get("/v1/incidents", params={"after": first}).json() == []
        assert client.get("/v1/incidents", params={"limit": 0}).status_code == 422
        found = client.get(f"/v1/incidents/{first}").json()
        assert found["history"][0]["to"] == "open"
        assert any(e["kind"] == "decision" for e in found["ledger"])


def test_directives_carry_an_etag_and_a_known_one_is_answered_304(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock) as (client, runtime):
        before = client.get("/v1/directives")
        assert before.json() == []
        incident(runtime, clock)
        answer = client.get("/v1/directives")
        (lease,) = answer.json()
        assert {"id", "kind", "scope", "params", "expires_at", "incident", "runbook"} <= set(lease)
        assert (lease["kind"], lease["scope"]) == ("redirect", {"provider": "a"})
        etag = answer.headers["etag"]
        assert etag != before.headers["etag"]
        for known in (etag, f"W/{etag}"):
            same = client.get("/v1/directives", headers={"if-none-match": known})
            assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
        other = client.get("/v1/directives", headers={"if-none-match": before.headers["etag"]})
        assert other.json() == answer.json()
        assert client.get("/v1/directives", params={"wait": 61}).status_code == 422


def test_a_long_poll_ends_when_a_directive_is_granted(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock) as (client, runtime):
        known = client.get("/v1/directives").headers["etag"]
        answers: list[httpx.Response] = []

        def poll() -> None:
            with httpx.Client(base_url=client.base_url, timeout=60.0) as waiting:
                answers.append(
                    waiting.get("/v1/directives", params={"wait": 50}, headers={"if-none-match": known})
                )

        poller = threading.Thread(target=poll)
        poller.start()
        incident(runtime, clock)
        poller.join(30)
        assert len(answers[0].json()) == 1


def test_a_long_poll_ends_without_change_when_flyball_stops(tmp_path: Path) -> None:
    with served(tmp_path) as (client, runtime):
        known = client.get("/v1/directives").headers["etag"]
        answers: list[int] = []

        def poll() -> None:
            with httpx.Client(base_url=client.base_url, timeout=60.0) as waiting:
                answers.append(
                    waiting.get(
                        "/v1/directives", params={"wait": 50}, headers={"if-none-match": known}
                    ).status_code
                )

        poller = threading.Thread(target=poll)
        poller.start()
        eventually(lambda: runtime.board.waiting)
        runtime.board.close()
        poller.join(30)
        assert answers == [304]


def test_reports_of_enforcement_points_go_through_the_log(tmp_path: Path) -> None:
    with served(tmp_path) as (client, runtime):
        answer = client.post("/v1/enforced", json={"point": "gw-1", "directives": {"d1": 3}})
        assert answer.status_code == 202
        assert runtime.appended == 1
        wrong = client.post("/v1/enforced", json={"point": "", "directives": {"d1": "many"}})
        assert wrong.status_code == 422
        assert {w["where"] for w in wrong.json()["wrong"]} == {"body.point", "body.directives.d1"}


def test_people_acknowledge_silence_resolve_and_reopen(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock) as (client, runtime):
        found = incident(runtime, clock)
        path = f"/v1/incidents/{found}"
        for kind in ("ack", "silence", "resolve", "reopen"):
            clock.at += 1.0
            answer = client.post(path, json={"kind": kind})
            assert (answer.status_code, answer.json()["accepted"]) == (200, True)
        states = [h["to"] for h in client.get(path).json()["history"]]
        assert states[-2:] == ["resolved", "open"]


def test_what_an_incident_does_not_allow_is_refused_with_what_it_does(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock) as (client, runtime):
        found = incident(runtime, clock)
        early = client.post(f"/v1/incidents/{found}", json={"kind": "reopen"})
        assert early.status_code == 409
        assert "from where it can only" in early.json()["error"]
        missing = client.post("/v1/incidents/INC-NONE", json={"kind": "ack"})
        assert missing.status_code == 404
        assert "GET /v1/incidents" in missing.json()["error"]
        assert client.get("/v1/incidents/INC-NONE").status_code == 404
        unknown = client.post(f"/v1/incidents/{found}", json={"kind": "delete"})
        assert unknown.status_code == 422
        assert "body.kind" in unknown.json()["error"]


def test_plans_that_wait_for_a_person_are_listed(tmp_path: Path) -> None:
    from flyball.app.wiring import make_pipeline
    from tests.app.crash_child import settings

    clock = SetClock()
    with served(tmp_path, clock, pipeline=lambda: make_pipeline(settings())) as (client, runtime):
        assert client.get("/v1/approvals").json() == []
        found = incident(runtime, clock)
        (plan,) = client.get("/v1/approvals").json()
        assert (plan["incident"], plan["runbook"]) == (found, "provider-failover")
        assert plan["hash"] == plan["plan"]["plan_hash"]
        assert plan["hash"].startswith("PLAN-")
        assert plan["until"] > clock.at


def test_dead_letters_show_reason_and_bytes_without_content(tmp_path: Path) -> None:
    with served(tmp_path) as (client, _):
        bad = {"type": "llm_call", "at": "yesterday", "model": "m", "messages": [{"content": "secret words"}]}
        client.post("/v1/events", json=bad)
        (letter,) = client.get("/v1/dead-letters").json()
        assert (letter["format"], letter["reason"]) == ("native", "type")
        import base64

        kept = base64.b64decode(letter["body"])
        assert b"secret" not in kept
        assert json.loads(kept)["model"] == "m"


def test_dead_letters_may_keep_no_bytes(tmp_path: Path) -> None:
    with served(tmp_path, given={"retention": {"dead_letter_bytes": False}}) as (client, _):
        client.post("/v1/events", content=b"nonsense")
        client.post("/v1/events", content=b"nonsense\n" * 500)
        letters = client.get("/v1/dead-letters").json()
        assert {(x["reason"], x["body"]) for x in letters} == {("json", None)}
        assert client.get("/v1/status").json()["rejected"] == {"json": 501}


def test_health_and_readiness(tmp_path: Path) -> None:
    with served(tmp_path) as (client, runtime):
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").json() == {"ready": True}
        runtime.ready = False
        assert client.get("/readyz").status_code == 503


def test_a_failed_thread_shows_in_healthz_and_senders_are_told_to_come_back(tmp_path: Path) -> None:
    from tests.app._runtime import make_pipeline

    with served(tmp_path, pipeline=lambda: OutOfMemory(make_pipeline().config)) as (client, runtime):
        client.post("/v1/events", content=ndjson(calls(1)))
        assert eventually(lambda: runtime.failure is not None)
        sick = client.get("/healthz")
        assert sick.status_code == 500
        assert "no memory" in sick.json()["why"]
        assert client.get("/readyz").status_code == 503


def test_after_the_log_failed_senders_are_answered_503_and_told_to_repeat(tmp_path: Path) -> None:
    from sqlalchemy import text

    with served(tmp_path) as (client, runtime):
        runtime.write(lambda c: c.execute(text("drop table log"))).result(30)
        answer = client.post("/v1/events", content=ndjson(calls(1)))
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert "send it again" in answer.json()["error"]
        traces = client.post("/v1/traces", content=otlp_body(), headers={"content-type": OTLP})
        assert (traces.status_code, traces.headers["content-type"]) == (503, OTLP)


# --- who may --------------------------------------------------------------------------------------------------------

ROLE_OF = {
    ("POST", "/v1/events"): "ingest", ("POST", "/ingest/litellm"): "ingest", ("POST", "/v1/traces"): "ingest",
    ("POST", "/v1/metrics"): "ingest", ("POST", "/v1/logs"): "ingest", ("GET", "/v1/status"): "read",
    ("GET", "/v1/incidents"): "read", ("GET", "/v1/incidents/INC-1"): "read", ("GET", "/metrics"): "read",
    ("GET", "/v1/directives"): "enforce", ("GET", "/v1/approvals"): "operate", ("GET", "/v1/dead-letters"): "admin",
    ("POST", "/v1/enforced"): "enforce", ("POST", "/v1/incidents/INC-1"): "operate",
}  # fmt: skip
BODIES: dict[str, Any] = {
    "/v1/enforced": {"point": "p", "directives": {}},
    "/v1/incidents/INC-1": {"kind": "ack"},
}


def test_each_way_in_and_out_asks_for_its_role(tmp_path: Path) -> None:
    with served(tmp_path, given={"tokens": TOKENS}) as (client, _):
        for (method, path), role in ROLE_OF.items():
            body = BODIES.get(path, {})

            def ask(
                headers: dict[str, str], method: str = method, path: str = path, body: Any = body
            ) -> httpx.Response:
                return client.request(method, path, headers=headers, json=body if method == "POST" else None)

            nobody = ask({})
            assert nobody.status_code == 401, path
            assert nobody.headers["www-authenticate"] == "Bearer"
            assert ask({"authorization": "Bearer wrong"}).status_code == 401, path
            for other in ("ingest", "read", "enforce", "operate", "admin"):
                allowed = other in (role, "admin")
                code = ask(bearer(other)).status_code
                assert (code != 403) == allowed, (path, other, code)
                assert code != 401, (path, other)


def test_health_needs_no_token(tmp_path: Path) -> None:
    with served(tmp_path, given={"tokens": TOKENS}) as (client, _):
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:4390", "[::2]", ""])
def test_without_tokens_other_host_names_are_refused(tmp_path: Path, host: str) -> None:
    """A web page whose name was rebound to this machine."""
    with served(tmp_path) as (client, _):
        answer = client.get("/v1/status", headers={"host": host})
        assert answer.status_code == (200 if host == "" else 403)


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "127.0.0.1", "[::1]:4390", "[::1]"])
def test_without_tokens_names_of_this_machine_are_served(tmp_path: Path, host: str) -> None:
    with served(tmp_path) as (client, _):
        assert client.get("/v1/status", headers={"host": host}).status_code == 200


def test_without_tokens_a_page_of_another_site_cannot_post(tmp_path: Path) -> None:
    with served(tmp_path) as (client, _):
        foreign = {"origin": "https://evil.example"}
        assert client.post("/v1/events", content=b"{}", headers=foreign).status_code == 403
        assert client.get("/v1/status", headers={"origin": "http://localhost:3000"}).status_code == 200


# --- errors ---------------------------------------------------------------------------------------------------------


def test_every_error_is_json_with_a_sentence(tmp_path: Path) -> None:
    with served(tmp_path) as (client, _):
        for method, path in (("GET", "/nothing"), ("PUT", "/v1/events"), ("GET", "/v1/incidents?limit=x")):
            answer = client.request(method, path)
            assert 400 <= answer.status_code < 500
            assert len(answer.json()["error"]) > 10
        assert "/nothing" in client.get("/nothing").json()["error"]


def test_an_open_outage_is_told_in_text_of_the_events_not_as_markup(tmp_path: Path) -> None:
    """The status of a page is JSON, never HTML, whatever stands in a label."""
    clock = SetClock()
    with served(tmp_path, clock) as (client, runtime):
        take(runtime, outage(clock.at))
        answer = client.get("/v1/status")
        assert answer.headers["content-type"] == "application/json"
