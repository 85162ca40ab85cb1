"""One request to a hook: what is sent, and that no word is said about it that is not certain."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from standardwebhooks import Webhook

from flyball.core.directives import Operation, OperationReport
from flyball.core.errors import DecodeError
from flyball.remediation.hooks import HookClient, HookSettings, hooks_client, is_terminal, verify_callback
from flyball.remediation.hooks.wire import ANSWER_BYTES
from flyball.remediation.signing import SignatureRefused, signed_headers
from tests.processes import free_port
from tests.remediation._hooks import AT, OTHER_SECRET, SECRET, Platform, Time, hook, operation, respond
from tests.remediation._receiver import Answer, Received, Receiver, receiver


def answer(status: str = "accepted", http: int = 200, **more: Any) -> Answer:
    return Answer(http, json.dumps({"status": status, **more}).encode())


def send(
    *answers: Answer, op: Operation | None = None, ask: bool = False, otherwise: Answer | None = None, **changes: Any
) -> tuple[OperationReport, list[Received]]:  # fmt: skip
    """Sends one operation over loopback to a receiver that answers like this."""

    async def main() -> tuple[OperationReport, list[Received]]:
        async with receiver(*answers, otherwise=otherwise or Answer(500)) as box:
            return await send_to(box, op or operation(), ask, **changes), box.requests

    return asyncio.run(main())


async def send_to(box: Receiver, op: Operation, ask: bool = False, **changes: Any) -> OperationReport:
    there = hook(box.url, **changes)
    async with hooks_client([there]) as client:
        sender = HookClient([there], client, Time(time.time()))
        return await (sender.ask(op) if ask else sender.send(op))


def send_over(platform: httpx.AsyncBaseTransport, op: Operation) -> OperationReport:
    async def main() -> OperationReport:
        async with httpx.AsyncClient(transport=platform, trust_env=False) as client:
            return await HookClient([hook()], client, Time()).send(op)

    return asyncio.run(main())


# --- the request ---------------------------------------------------------------------------------------------------


def test_a_request_holds_what_the_contract_names() -> None:
    _, (request,) = send(answer(), op=operation(undo_ref="u-1", epoch=3, attempt=2))
    assert (request.method, request.path) == ("POST", "/")
    assert request.json == {
        "verb": "start", "operation_id": "OP-1", "attempt": 2, "plan_hash": "PLAN-1", "incident": "INC-1",
        "runbook": "gpu-fault", "step": "drain", "action": "drain", "targets": ["node-1"], "params": {"grace_s": 30},
        "dry_run": False, "deadline": AT + 600, "fencing_token": 3, "undo_ref": "u-1",
    }  # fmt: skip


def test_a_request_is_signed_with_every_secret() -> None:
    _, (request,) = send(answer(), secrets=[SECRET, OTHER_SECRET])
    for secret in (SECRET, OTHER_SECRET):
        Webhook(secret.get_secret_value()).verify(request.body, dict(request.headers))


def test_a_question_is_signed_as_well() -> None:
    _, (request,) = send(answer("succeeded"), ask=True)
    assert (request.method, request.path) == ("GET", "/operations/OP-1?verb=start")
    Webhook(SECRET.get_secret_value()).verify(b"", dict(request.headers), json_parse=False)


def test_tries_of_one_attempt_have_one_webhook_id_and_other_requests_have_others() -> None:
    async def main() -> list[str]:
        async with receiver(otherwise=answer()) as box:
            for op in (
                operation(), operation(), operation(attempt=2), operation(verb="cancel"), operation(verb="undo"),
                operation(dry_run=True), operation("OP-2"),
            ):  # fmt: skip
                await send_to(box, op)
            return [r.headers["webhook-id"] for r in box.requests]

    first, second, *others = asyncio.run(main())
    assert first == second
    assert len({first, *others}) == 6


def test_a_request_that_is_too_large_is_not_sent() -> None:
    report, requests = send(answer(), op=operation(params={"filler": "x" * 70_000}))
    assert (report.status, report.transient, report.code, requests) == ("rejected", False, "too_large", [])


def test_an_operation_of_a_hook_that_is_not_in_the_settings_is_not_sent() -> None:
    report, requests = send(answer(), op=operation(hook="elsewhere"))
    assert (report.status, report.code, requests) == ("rejected", "no_hook", [])


# --- answers -------------------------------------------------------------------------------------------------------


def test_an_answer_is_reported_as_it_was_given() -> None:
    body = answer(
        "succeeded", undo_ref="u-9", before={"node-1": "ready"}, targets=["node-1"], detail="as it was said",
        operation_id="OP-1", verb="start", attempt=1, extra={"not": "known"},
    )  # fmt: skip
    report, _ = send(body, op=operation(attempt=1))
    assert (report.id, report.verb, report.attempt, report.status) == ("OP-1", "start", 1, "succeeded")
    assert (report.undo_ref, report.before, report.targets) == ("u-9", {"node-1": "ready"}, ("node-1",))
    assert report.detail == "as it was said"


@pytest.mark.parametrize(
    ("reply", "status", "transient"),
    [
        pytest.param(answer("accepted"), "accepted", False, id="accepted"),
        pytest.param(answer("rejected", code="busy", transient=True), "rejected", True, id="rejected for now"),
        pytest.param(answer("rejected", code="never"), "rejected", False, id="rejected for good"),
        pytest.param(answer("rejected", 422, code="bad"), "rejected", False, id="rejected with a 422"),
        pytest.param(answer("rejected", 409, transient=True), "rejected", True, id="a 409 for now"),
        pytest.param(answer("unsupported"), "unsupported", False, id="unsupported"),
        pytest.param(answer("unsupported", 400), "unsupported", False, id="unsupported with a 400"),
        pytest.param(answer("superseded", by="OP-9"), "superseded", False, id="superseded"),
        pytest.param(answer("failed_applied"), "failed_applied", False, id="failed_applied"),
        pytest.param(answer("ambiguous"), "ambiguous", False, id="its own ambiguous"),
        pytest.param(answer("fine"), "ambiguous", False, id="a word that is not known"),
        pytest.param(answer("not_reached"), "ambiguous", False, id="a word of ours"),
        pytest.param(answer("accepted", transient=True), "accepted", False, id="transient without rejected"),
        pytest.param(answer("accepted", operation_id="OP-2"), "ambiguous", False, id="about another operation"),
        pytest.param(answer("accepted", verb="undo"), "ambiguous", False, id="about another verb"),
        pytest.param(answer("accepted", 400), "ambiguous", False, id="a refusal that accepts"),
        pytest.param(answer("succeeded", 500), "ambiguous", False, id="a failure that succeeds"),
        pytest.param(answer("accepted", undo_ref="x" * 2000), "ambiguous", False, id="a long undo_ref"),
        pytest.param(Answer(200, b""), "ambiguous", False, id="nothing"),
        pytest.param(Answer(200, b"ok"), "ambiguous", False, id="no JSON"),
        pytest.param(Answer(200, b'{"status": 1}'), "ambiguous", False, id="no word"),
        pytest.param(Answer(200, b"x" * (ANSWER_BYTES + 10)), "ambiguous", False, id="far too long"),
        pytest.param(Answer(302, b"", {"location": "http://127.0.0.1/"}), "rejected", False, id="a redirect"),
        pytest.param(Answer(401, b""), "rejected", False, id="401"),
        pytest.param(Answer(404, b"no"), "rejected", False, id="404"),
        pytest.param(Answer(408, b""), "ambiguous", False, id="408"),
        pytest.param(Answer(425, b""), "rejected", True, id="425"),
        pytest.param(Answer(429, b""), "rejected", True, id="429"),
        pytest.param(Answer(503, b"", {"retry-after": "30"}), "rejected", True, id="503 with Retry-After"),
        pytest.param(Answer(503, b""), "ambiguous", False, id="503"),
        pytest.param(Answer(500, b""), "ambiguous", False, id="500"),
        pytest.param(Answer(504, b""), "ambiguous", False, id="504"),
    ],
)  # fmt: skip
def test_an_answer_means_what_is_certain_of_it(reply: Answer, status: str, transient: bool) -> None:
    report, _ = send(reply)
    assert (report.status, report.transient) == (status, transient)


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(Answer(503, b"", {"retry-after": "30"}), id="with a 503"),
        pytest.param(Answer(200, answer("rejected", transient=True).body, {"retry-after": "30"}), id="with its own word"),
        pytest.param(Answer(409, answer("rejected", transient=True).body, {"retry-after": "30"}), id="with a 409"),
    ],
)  # fmt: skip
def test_how_long_to_wait_is_passed_on(reply: Answer) -> None:
    report, _ = send(reply)
    assert (report.status, report.transient, report.retry_after_s) == ("rejected", True, 30.0)


def test_who_superseded_an_operation_is_passed_on() -> None:
    report, _ = send(answer("superseded", by="OP-9"))
    assert report.superseded_by == "OP-9"


def test_a_hooks_words_come_through_on_one_line_and_bounded() -> None:
    report, _ = send(answer("rejected", code="a\nb" * 50, detail="\x1b[31mred\n" * 200))
    assert "\n" not in report.code + report.detail
    assert "\x1b" not in report.detail
    assert (len(report.code) <= 80, len(report.detail) <= 500) == (True, True)


# --- the wire ------------------------------------------------------------------------------------------------------


def test_an_answer_that_never_comes_is_ambiguous() -> None:
    report, requests = send(Answer(hang=True), timeout_s=0.2)
    assert (report.status, len(requests)) == ("ambiguous", 1)


def test_a_connection_that_is_closed_after_the_request_is_ambiguous() -> None:
    report, requests = send(Answer(drop=True))
    assert (report.status, len(requests)) == ("ambiguous", 1)


def test_an_answer_that_dribbles_in_is_cut_off_after_the_time_out() -> None:
    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        try:
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            return
        finally:
            writer.close()

    async def main() -> OperationReport:
        server = await asyncio.start_server(dribble, "127.0.0.1", 0)
        box = Receiver(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return await send_to(box, operation(), timeout_s=0.3)
        finally:
            server.close()

    report = asyncio.run(main())
    assert (report.status, report.code) == ("ambiguous", "timeout")


def test_a_port_that_nobody_listens_on_is_not_reached() -> None:
    report = asyncio.run(send_to(Receiver(f"http://127.0.0.1:{free_port()}"), operation()))
    assert (report.status, report.code) == ("not_reached", "not_connected")


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["no TLS", "nothing"])
def test_a_handshake_that_fails_is_not_reached(says: bytes) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(says)
        if says:
            writer.close()

    async def main() -> OperationReport:
        server = await asyncio.start_server(plain, "127.0.0.1", 0)
        box = Receiver(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return await send_to(box, operation(), timeout_s=0.3)
        finally:
            server.close()

    assert asyncio.run(main()).status == "not_reached"


def test_a_name_that_does_not_exist_is_not_reached() -> None:
    report = asyncio.run(send_to(Receiver("http://hook.invalid"), operation()))
    assert (report.status, report.code) == ("not_reached", "no_address")


def test_a_name_server_that_does_not_answer_is_not_reached_because_nothing_was_sent() -> None:
    class Silent(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError

    async def main() -> OperationReport:
        async with httpx.AsyncClient(transport=Silent()) as client:
            return await HookClient([hook(timeout_s=0.05)], client, Time()).send(operation())

    report = asyncio.run(main())
    assert (report.status, report.code) == ("not_reached", "timeout")


def test_an_address_inside_is_refused_when_it_was_not_meant() -> None:
    """A public name that leads inside; the setting itself could not tell."""

    async def main() -> tuple[OperationReport, list[Received]]:
        async with receiver(answer()) as box:
            port = box.url.rpartition(":")[2]
            there = HookSettings.model_validate({"name": "nodes", "url": f"http://hook.example.com:{port}", "secrets": [SECRET]})  # fmt: skip

            class Inside:
                async def resolve(self, host: str, port: int) -> Sequence[str]:
                    return ["127.0.0.1"]

            async with hooks_client([there], Inside()) as client:
                return await HookClient([there], client, Time()).send(operation()), box.requests

    report, requests = asyncio.run(main())
    assert (report.status, report.transient, report.code, requests) == (
        "rejected",
        False,
        "address_refused",
        [],
    )


@given(st.binary(max_size=300), st.integers(200, 599))
@example(b'{"status": "accepted"}', 200)
@example(b'{"status": "succeeded", "before": {"a": NaN}}', 200)
def test_whatever_a_hook_answers_is_reported_and_only_certain_refusals_may_be_sent_again(
    body: bytes, http: int
) -> None:
    class Odd(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return respond(http, body)

    report = send_over(Odd(), operation())
    assert report.status != "not_reached"
    if report.transient:
        assert http in (425, 429, 503) or b"transient" in body


@given(st.text(max_size=20), st.sampled_from(["start", "cancel", "undo"]))
def test_a_word_that_is_not_known_is_never_taken_for_one_that_is(word: str, verb: Any) -> None:
    class Says(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return respond(200, json.dumps({"status": word}).encode())

    report = send_over(Says(), operation(verb=verb))
    assert report.status in ("ambiguous", word)


# --- dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done() -> None:
    platform = Platform()
    report = send_over(platform, operation(dry_run=True))
    assert (report.status, report.dry_run, report.targets) == ("accepted", True, ("node-1",))
    assert report.predicted == {"nodes": 1}
    assert platform.done == {}


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        pytest.param(answer("accepted"), "dry_run_incomplete", id="says nothing"),
        pytest.param(answer("accepted", targets=["node-1"]), "dry_run_incomplete", id="predicts nothing"),
        pytest.param(answer("accepted", targets=["node-1", "node-2"], predicted={"nodes": 2}), "targets_differ", id="more targets"),
        pytest.param(answer("succeeded", targets=["node-1"], predicted={"nodes": 1}), "dry_run_status", id="did it"),
    ],
)  # fmt: skip
def test_a_dry_run_that_does_not_tell_is_a_no(reply: Answer, code: str) -> None:
    report, _ = send(reply, op=operation(dry_run=True))
    assert (report.status, report.transient, report.code) == ("rejected", False, code)


# --- asking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        pytest.param(answer("succeeded"), "succeeded", "", id="succeeded"),
        pytest.param(answer("accepted"), "accepted", "", id="accepted"),
        pytest.param(Answer(404, b""), "ambiguous", "not_known", id="never heard of"),
        pytest.param(Answer(500, b""), "not_reached", "http_500", id="500"),
        pytest.param(Answer(200, b"x"), "not_reached", "json", id="no JSON"),
        pytest.param(Answer(drop=True), "not_reached", "no_status", id="no answer"),
    ],
)
def test_a_question_gives_a_status_or_nothing(reply: Answer, status: str, code: str) -> None:
    report, _ = send(reply, ask=True)
    assert (report.status, report.code) == (status, code)


# --- callbacks -----------------------------------------------------------------------------------------------------


def callback(**changes: Any) -> bytes:
    return json.dumps({"operation_id": "OP-1", "status": "succeeded", **changes}).encode()


def signed(body: bytes, now: float | None = None) -> dict[str, str]:
    return signed_headers([SECRET], "OP-1.ended", body.decode(), time.time() if now is None else now)


def test_a_signed_callback_is_a_report() -> None:
    body = callback(verb="undo", attempt=2, before={"node-1": "ready"}, undo_ref="u")
    report = verify_callback(signed(body), body, [OTHER_SECRET, SECRET], at=AT)
    assert (report.id, report.verb, report.attempt, report.status) == ("OP-1", "undo", 2, "succeeded")
    assert (report.at, report.undo_ref, report.before) == (AT, "u", {"node-1": "ready"})


def test_a_callback_with_a_word_that_is_not_known_is_ambiguous() -> None:
    body = callback(status="done-ish")
    assert verify_callback(signed(body), body, [SECRET], at=AT).status == "ambiguous"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="none"),
        pytest.param(signed(callback(status="failed_applied")), id="of another body"),
        pytest.param(signed(callback(), time.time() - 600), id="old"),
        pytest.param({**signed(callback()), "webhook-signature": "v1"}, id="no signature at all"),
        pytest.param({**signed(callback()), "webhook-signature": "v1,%%%"}, id="no base64"),
        pytest.param({**signed(callback()), "webhook-timestamp": "nan"}, id="no time"),
        pytest.param({**signed(callback()), "webhook-id": "other"}, id="of another message"),
    ],
)
def test_a_callback_that_is_not_signed_is_not_believed(headers: dict[str, str]) -> None:
    with pytest.raises(SignatureRefused):
        verify_callback(headers, callback(), [SECRET], at=AT)


def test_a_callback_signed_with_another_hooks_secret_is_not_believed() -> None:
    with pytest.raises(SignatureRefused):
        verify_callback(signed(callback()), callback(), [OTHER_SECRET], at=AT)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xff", id="no text"),
        pytest.param(b"{}", id="no status"),
        pytest.param(b'{"status": "succeeded"}', id="no operation"),
        pytest.param(callback(verb="explode"), id="no verb"),
        pytest.param(callback(before=[1]), id="before is no object"),
        pytest.param(callback(detail="x" * ANSWER_BYTES), id="too long"),
    ],
)
def test_a_signed_callback_that_is_no_status_is_refused_in_words(body: bytes) -> None:
    with pytest.raises((DecodeError, SignatureRefused)):
        verify_callback(signed(body) if body != b"\xff" else {}, body, [SECRET], at=AT)


def test_a_request_of_ours_that_is_sent_back_is_no_callback() -> None:
    _, (request,) = send(answer())
    with pytest.raises(DecodeError):
        verify_callback(request.headers, request.body, [SECRET], at=AT)


def test_what_was_accepted_is_not_over() -> None:
    assert [is_terminal(s) for s in ("accepted", "succeeded", "rejected", "not_reached")] == [
        False,
        True,
        True,
        True,
    ]


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"url": "ftp://x/"}, "http", id="not http"),
        pytest.param({"url": "https://x/?a=1"}, "no `?`", id="query"),
        pytest.param({"url": "https://me:pass@x/"}, "no user", id="user"),
        pytest.param({"url": "http://127.0.0.1/", "allow_private": False}, "allow_private: true", id="loopback"),
        pytest.param({"url": "http://169.254.169.254/"}, "allow_private", id="link-local, though private is allowed"),
        pytest.param({"name": "A b"}, "pattern", id="name"),
        pytest.param({"secrets": []}, "at least 1", id="no secret"),
        pytest.param({"secrets": ["whsec_QUJDQUJD"]}, "24 to 64", id="short secret"),
        pytest.param({"timeout_s": 0}, "greater than 0", id="no time"),
        pytest.param({"timeout": 3}, "Extra inputs", id="unknown setting"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_words_without_the_secret(changes: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"name": "nodes", "url": "https://x/", "secrets": [SECRET.get_secret_value()], "allow_private": True}  # fmt: skip
    with pytest.raises(ValidationError) as e:
        HookSettings.model_validate(good | changes)
    assert says in str(e.value)
    assert "QUJD" not in str(e.value)
