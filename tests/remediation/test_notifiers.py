"""What goes over the wire, for each channel: within the other side's limits, and read as what it was meant."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import BaseModel, ValidationError
from rich.console import Console
from standardwebhooks import Webhook as Verifier

from flyball.core.errors import Ambiguous, EffectError, Failed, NotAccepted
from flyball.core.incident import Impact, Incident, IncidentChange, Severity, State
from flyball.remediation.http_guard import Allowed, guarded_client
from flyball.remediation.notifiers._base import Delivery, Gone, Notifier, Receipt, dumps, retry_after_s
from flyball.remediation.notifiers._settings import NotifySettings, registry, with_secrets
from flyball.remediation.notifiers._text import width
from flyball.remediation.notifiers.alertmanager import Alertmanager
from flyball.remediation.notifiers.pagerduty import PagerDuty
from flyball.remediation.notifiers.slack import Slack
from flyball.remediation.notifiers.terminal import Terminal
from flyball.remediation.notifiers.webhook import Webhook
from flyball.remediation.render import Audience, Message, Renderer
from tests.conftest import require_server
from tests.remediation._incidents import AT, NASTY, incident_changes, opened, outage, resolved
from tests.remediation._receiver import Answer, offline_client, receiver

RENDERER = Renderer(public_url="https://flyball.example")
KEY = "R" * 32
SECRET = "whsec_" + "A" * 32
LOOPBACK = Allowed.of(["127.0.0.0/8"])

hostile = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def message_for(
    change: IncidentChange, kind: str, *, first: bool = True, interactive: bool = True
) -> Message:
    return RENDERER.render(change, Audience(kind, "oncall", "severity ≥ high", first, interactive))


def delivery(
    change: IncidentChange,
    kind: str,
    *,
    now: float = AT,
    previous: Receipt | None = None,
    notify: bool = True,
) -> Delivery:
    message = message_for(change, kind, first=previous is None, interactive=False)
    return Delivery("MSG-1", message, change, now, notify, previous)


def run(work: Callable[[httpx.AsyncClient], Awaitable[Any]], timeout_s: float = 5.0) -> Any:
    async def main() -> Any:
        async with guarded_client(LOOPBACK, timeout_s=timeout_s) as client:
            return await work(client)

    return asyncio.run(main())


def slack_hook(url: str = "https://hooks.example/x", **more: Any) -> Slack:
    return Slack(Slack.Params.model_validate({"url": url, **more}))


def slack_bot(api_url: str = "https://slack.example/api") -> Slack:
    return Slack(Slack.Params.model_validate({"bot_token": "xoxb-1", "channel": "C1", "api_url": api_url}))


def pagerduty(url: str = "https://events.example/v2/enqueue") -> PagerDuty:
    return PagerDuty(PagerDuty.Params.model_validate({"routing_key": KEY, "url": url}))


def alertmanager(url: str = "http://am.example:9093", **more: Any) -> Alertmanager:
    return Alertmanager(Alertmanager.Params.model_validate({"url": url, **more}))


def webhook(url: str = "https://hooks.example/x", secrets: list[str] | None = None) -> Webhook:
    return Webhook(Webhook.Params.model_validate({"url": url, "secrets": secrets or [SECRET]}))


# -- limits, whatever the incident ------------------------------------------------------------------------------------


def check_slack(payload: dict[str, Any], lines: int) -> None:
    assert 0 < width(payload["text"]) <= 4000
    assert len(payload["text"].split("\n")) == lines
    blocks = payload["blocks"]
    assert len(blocks) <= 50
    header, section = blocks[:2]
    assert header["text"]["type"] == "plain_text"
    assert 0 < width(header["text"]["text"]) <= 150
    assert not set("<>") & set(header["text"]["text"])
    assert section["text"]["verbatim"] is True
    assert 0 < width(section["text"]["text"]) <= 3000
    assert len(section["text"]["text"].split("\n")) == lines - 1
    for text in (payload["text"], section["text"]["text"]):
        assert not re.search(r"[<>]|&(?!(amp|lt|gt);)|\]\(|(?<!\w)@", text)
    for block in blocks[2:]:
        assert block["type"] == "actions"
        assert 1 <= len(block["elements"]) <= 25
        ids = [e["action_id"] for e in block["elements"]]
        assert len(set(ids)) == len(ids)
        for element in block["elements"]:
            assert 0 < width(element["text"]["text"]) <= 75
            assert len(element.get("value", "")) <= 2000
            assert len(element.get("url", "")) <= 3000
            assert len(element["action_id"]) <= 255
            if confirm := element.get("confirm"):
                assert width(confirm["title"]["text"]) <= 100
                assert width(confirm["text"]["text"]) <= 300


@hostile
@given(incident_changes())
def test_slack_payloads_stay_within_their_limits_and_keep_every_line(change: IncidentChange) -> None:
    message = message_for(change, "slack")
    slack = slack_hook(interactive=True)
    check_slack(slack.payload(message, change.incident), len(message.lines))
    check_slack(slack.payload(message, change.incident, short=True), len(message.update))
    dumps(slack.payload(message, change.incident))


@hostile
@given(incident_changes())
def test_pagerduty_payloads_stay_within_their_limits_and_keep_every_line(change: IncidentChange) -> None:
    message = message_for(change, "pagerduty")
    event = pagerduty().payload(message, change.incident)
    assert len(dumps(event)) <= 512_000
    assert 0 < width(event["dedup_key"]) <= 255
    assert event["event_action"] in ("trigger", "acknowledge", "resolve")
    if event["event_action"] == "trigger":
        payload = event["payload"]
        assert 0 < width(payload["summary"]) <= 1024
        assert payload["severity"] in ("critical", "error", "warning", "info")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", payload["timestamp"])
        assert len(payload["custom_details"]["first_screen"]) == len(message.lines)
        assert all(
            payload[k] is not None and width(payload[k]) <= 255
            for k in ("component", "group", "class", "source")
        )


@hostile
@given(incident_changes())
def test_alertmanager_alerts_are_valid_whatever_the_incident(change: IncidentChange) -> None:
    message = message_for(change, "alertmanager")
    alert = alertmanager(labels={"team": "x"}).payload(message, change.incident, now=AT)
    assert alert["labels"]["alertname"] == "FlyballIncident"
    assert len(alert["labels"]) <= 24
    for name, value in alert["labels"].items():
        assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name)
        assert 0 < width(value) <= 256
    assert alert["startsAt"] <= alert["endsAt"]
    assert len(alert["annotations"]["description"].split("\n")) == len(message.lines) - 1
    assert len(dumps(alert)) < 100_000
    for text in alert["annotations"].values():
        assert not set("<>") & set(text)


@hostile
@given(incident_changes())
def test_webhook_bodies_stay_below_20_kb_and_keep_every_line(change: IncidentChange) -> None:
    message = message_for(change, "webhook")
    body = webhook().payload(message, change.incident, change, now=AT)
    assert len(dumps(body)) < 20_000
    assert body.keys() == {"type", "timestamp", "data"}
    assert re.fullmatch(r"incident\.(opened|acknowledged|updated|resolved|reopened)", body["type"])
    assert len(body["data"]["lines"]) == len(message.lines)
    assert set(body["data"]["left_out"]).isdisjoint(body["data"])
    assert {"id", "state", "severity", "title", "root", "dedup_key", "sent_because"} <= body["data"].keys()


@hostile
@given(incident_changes())
def test_the_terminal_prints_no_escape_of_an_event(change: IncidentChange) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=120, color_system=None)

    async def main() -> None:
        async with offline_client() as client:
            await Terminal(Terminal.Params(), console).send(client, delivery(change, "terminal"))

    asyncio.run(main())
    assert "\x1b" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert change.incident.severity.sev in out.getvalue()


@pytest.mark.parametrize("value", NASTY, ids=lambda v: repr(v[:12]))
def test_a_hundred_thousand_members_and_hostile_names_fit_everywhere(value: str) -> None:
    incident = outage(
        title=value, members=((value, 3),) * 100_000, anomalies=("ANO-1",) * 100_000, samples=(value,) * 100_000,
        impact=Impact(apps=((value, 1, 0.1),) * 100_000, n_apps=100_000),
        scope={f"{value[:50]}{i}": value for i in range(200)}, evidence={f"{value[:50]}{i}": 1 for i in range(2000)},
    )  # fmt: skip
    change = opened(incident)
    assert len(dumps(slack_hook().payload(message_for(change, "slack"), incident))) < 40_000
    assert len(dumps(pagerduty().payload(message_for(change, "pagerduty"), incident))) <= 512_000
    assert len(dumps(webhook().payload(message_for(change, "webhook"), incident, change, now=AT))) < 20_000
    assert len(alertmanager().payload(message_for(change, "alertmanager"), incident, now=AT)["labels"]) <= 24


def test_an_event_too_large_for_pagerduty_goes_without_its_details() -> None:
    change = opened()
    message = message_for(change, "pagerduty")
    large = Message(
        **{f: getattr(message, f) for f in message.__slots__}
        | {"facts": tuple((f"k{i}", "v" * 900) for i in range(900))}
    )
    event = pagerduty().payload(large, change.incident)
    assert event["payload"]["custom_details"] == {"left_out": "the details were larger than PagerDuty takes"}
    assert event["payload"]["summary"] == message.title
    assert len(dumps(event)) <= 512_000


# -- slack ------------------------------------------------------------------------------------------------------------


def test_slack_shows_the_first_screen_with_labels_in_bold_and_text_escaped() -> None:
    change = opened(outage(title="<!channel> & *all* @here", klass="overloaded"))
    payload = slack_hook().payload(message_for(change, "slack", interactive=False), change.incident)
    assert payload["blocks"][0]["text"]["text"] == "SEV2 · ‹!channel› & *all* @here · INC-7QF3XK2P"
    section = payload["blocks"][1]["text"]["text"].split("\n")
    assert section[1].startswith("*Root:* provider anthropic, 0.94 · for: 3 models")
    assert payload["text"].startswith("SEV2 · &lt;!channel&gt; &amp; ∗all∗ ＠here · INC-7QF3XK2P\n")


def test_slack_buttons_carry_nothing_that_could_widen_their_target() -> None:
    change = opened()
    slack = slack_hook(interactive=True)
    elements = slack.payload(message_for(change, "slack"), change.incident)["blocks"][-1]["elements"]
    values = [e["value"] for e in elements if "value" in e]
    assert values == [f"v1|{a}|INC-7QF3XK2P|1|" for a in ("ack", "undo", "silence")]
    assert [e["url"] for e in elements if "url" in e] == [
        "https://flyball.example/v1/incidents/INC-7QF3XK2P",
        "https://status.example/1",
    ]


def test_an_incoming_webhook_gets_the_whole_first_and_short_messages_after() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async with receiver() as box:
            slack = slack_hook(box.url + "/services/T/B/x")
            first = await slack.send(client, delivery(opened(), "slack"))
            await slack.send(client, delivery(resolved(), "slack", previous=first))
            a, b = box.requests
            assert a.path == "/services/T/B/x"
            assert a.headers["content-type"] == "application/json"
            check_slack(a.json, 8)
            check_slack(b.json, 4)
            assert b.json["text"].startswith("RESOLVED SEV2")

    run(work)


def test_a_bot_edits_its_message_in_place_and_tells_news_in_the_thread() -> None:
    posted = Answer(body=b'{"ok":true,"channel":"C1","ts":"171.5"}')
    ok = Answer(body=b'{"ok":true}')

    async def work(client: httpx.AsyncClient) -> None:
        async with receiver(posted, otherwise=ok) as box:
            bot = slack_bot(box.url + "/api")
            first = await bot.send(client, delivery(opened(), "slack"))
            assert first.ref == "C1:171.5"
            figures = opened(outage(revision=2), old="open", notify=False)
            second = await bot.send(client, delivery(figures, "slack", previous=first, notify=False))
            third = await bot.send(client, delivery(resolved(), "slack", previous=second))
            assert third.ref == "C1:171.5"
            calls = [(r.path, r.json.get("ts"), r.json.get("thread_ts")) for r in box.requests]
            assert calls == [
                ("/api/chat.postMessage", None, None),
                ("/api/chat.update", "171.5", None),
                ("/api/chat.update", "171.5", None),
                ("/api/chat.postMessage", None, "171.5"),
            ]
            assert all(r.headers["authorization"] == "Bearer xoxb-1" for r in box.requests)

    run(work)


def test_a_bot_whose_message_was_deleted_writes_a_new_one() -> None:
    gone = Answer(body=b'{"ok":false,"error":"message_not_found"}')
    posted = Answer(body=b'{"ok":true,"channel":"C1","ts":"999.1"}')

    async def work(client: httpx.AsyncClient) -> None:
        async with receiver(gone, posted) as box:
            receipt = await slack_bot(box.url).send(
                client, delivery(resolved(), "slack", previous=Receipt(ref="C1:171.5"))
            )
            assert receipt.ref == "C1:999.1"

    run(work)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [("ratelimited", NotAccepted), ("internal_error", Ambiguous), ("invalid_auth", Failed), ("", Failed)],
)
def test_a_refusal_that_slack_answers_with_200_is_one(error: str, becomes: type[EffectError]) -> None:
    answer = Answer(body=json.dumps({"ok": False, "error": error}).encode())

    async def work(client: httpx.AsyncClient) -> None:
        async with receiver(answer) as box:
            with pytest.raises(becomes):
                await slack_bot(box.url).send(client, delivery(opened(), "slack"))

    run(work)


# -- pagerduty ----------------------------------------------------------------------------------------------------------


def test_pagerduty_gets_trigger_acknowledge_and_resolve_under_one_key() -> None:
    accepted = Answer(
        202, b'{"status":"success","message":"Event processed","dedup_key":"flyball-INC-7QF3XK2P"}'
    )
    taken = opened(
        outage(state=State.MITIGATING, acknowledged_by="ann"), old="acknowledged", new="mitigating"
    )

    async def work(client: httpx.AsyncClient) -> None:
        async with receiver(otherwise=accepted) as box:
            pd = pagerduty(box.url + "/v2/enqueue")
            for change in (opened(), taken, resolved()):
                receipt = await pd.send(client, delivery(change, "pagerduty"))
                assert receipt.ref == "flyball-INC-7QF3XK2P"
            events = [r.json for r in box.requests]
        assert [e["event_action"] for e in events] == ["trigger", "acknowledge", "resolve"]
        assert {e["dedup_key"] for e in events} == {"flyball-INC-7QF3XK2P"}
        assert {e["routing_key"] for e in events} == {KEY}
        payload = events[0]["payload"]
        assert payload["severity"] == "error"
        assert payload["timestamp"] == "2026-03-05T02:15:00.000Z"
        assert (payload["component"], payload["group"], payload["class"]) == (
            "provider:anthropic",
            "provider",
            "overloaded",
        )
        assert payload["custom_details"]["facts"]["observed"] == "0.61"
        assert events[0]["links"][0] == {
            "href": "https://flyball.example/v1/incidents/INC-7QF3XK2P",
            "text": "Incident",
        }

    run(work)


# -- alertmanager -------------------------------------------------------------------------------------------------------


def test_alertmanager_gets_the_alert_again_and_again_while_it_is_open_and_its_end_once() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async with receiver() as box:
            am = alertmanager(box.url + "/", repeat_s=60, bearer_token="tok")
            first = await am.send(client, delivery(opened(), "alertmanager", now=AT))
            last = await am.send(client, delivery(resolved(), "alertmanager", now=AT + 700, previous=first))
            assert (first.repeat_at, last.repeat_at) == (AT + 60, None)
            assert [r.path for r in box.requests] == ["/api/v2/alerts"] * 2
            assert box.requests[0].headers["authorization"] == "Bearer tok"
            (alert,), (ended,) = (r.json for r in box.requests)
        assert alert["labels"] == {
            "alertname": "FlyballIncident", "incident": "INC-7QF3XK2P", "severity": "high", "root_kind": "provider",
            "root": "anthropic", "signal": "llm.errors", "class": "overloaded", "provider": "anthropic",
        }  # fmt: skip
        assert alert["startsAt"] == "2026-03-05T02:14:00.000Z"
        assert alert["endsAt"] == "2026-03-05T02:19:00.000Z"
        assert alert["generatorURL"] == "https://flyball.example/v1/incidents/INC-7QF3XK2P"
        assert ended["labels"] == alert["labels"]
        assert ended["endsAt"] == "2026-03-05T02:26:00.000Z"

    run(work)


def test_an_alert_whose_labels_change_is_ended_under_the_old_ones() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async with receiver() as box:
            am = alertmanager(box.url)
            first = await am.send(client, delivery(opened(), "alertmanager"))
            worse = opened(outage(severity=Severity.CRITICAL, revision=2), old="open", reason="worse")
            await am.send(client, delivery(worse, "alertmanager", now=AT + 30, previous=first))
            old, new = box.requests[1].json
        assert (old["labels"]["severity"], new["labels"]["severity"]) == ("high", "critical")
        assert old["endsAt"] == "2026-03-05T02:15:30.000Z"
        assert new["endsAt"] > old["endsAt"]

    run(work)


def test_a_scope_label_never_replaces_one_of_ours() -> None:
    incident = outage(scope={"incident": "forged", "k8s.node": "n1", "": "x", "severity": "low", "empty": ""})
    alert = alertmanager(labels={"alertname": "x"}).payload(
        message_for(opened(incident), "alertmanager"), incident, now=AT
    )
    labels = alert["labels"]
    assert (labels["incident"], labels["severity"], labels["alertname"]) == (
        "INC-7QF3XK2P",
        "high",
        "FlyballIncident",
    )
    assert labels["k8s_node"] == "n1"
    assert "empty" not in labels


@pytest.mark.server("alertmanager")
def test_a_real_alertmanager_takes_our_alert_and_shows_it(tmp_path: Any) -> None:
    binary = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if binary is None:
        require_server("alertmanager", "neither prometheus-alertmanager nor alertmanager is installed")
    config = tmp_path / "alertmanager.yml"
    config.write_text("route: {receiver: none}\nreceivers: [{name: none}]\n")

    async def main() -> None:
        port = await free_port()
        process = await asyncio.create_subprocess_exec(
            str(binary), f"--config.file={config}", f"--storage.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            async with guarded_client(LOOPBACK) as client:
                await ready(client, f"{url}/-/ready", process)
                now = json.loads((await client.get(f"{url}/api/v2/status")).content)["uptime"]
                at = seconds_of(now)
                incident = outage(since=at - 60, at=at - 50)
                am = alertmanager(url)
                first = await am.send(client, delivery(opened(incident, at=at), "alertmanager", now=at + 1))
                (shown,) = json.loads((await client.get(f"{url}/api/v2/alerts")).content)
                assert shown["labels"]["incident"] == "INC-7QF3XK2P"
                assert shown["annotations"]["summary"].startswith("SEV2 · anthropic")
                assert shown["status"]["state"] in ("active", "unprocessed")
                over = outage(since=at - 60, at=at - 50, state=State.RESOLVED, resolved_at=at)
                await am.send(client, delivery(resolved(over), "alertmanager", now=at + 1, previous=first))
                assert json.loads((await client.get(f"{url}/api/v2/alerts")).content) == []
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()

    asyncio.run(main())


async def free_port() -> int:
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = int(server.sockets[0].getsockname()[1])
    server.close()
    await server.wait_closed()
    return port


async def ready(client: httpx.AsyncClient, url: str, process: asyncio.subprocess.Process) -> None:
    for _ in range(100):
        assert process.returncode is None, f"alertmanager ended with {process.returncode} at its start"
        try:
            if (await client.get(url)).status_code == 200:
                return
        except httpx.ConnectError:
            pass
        await asyncio.sleep(0.1)  # Another program starts up: there is nothing of ours to wait on.
    raise AssertionError("alertmanager did not get ready within 10 s")


def seconds_of(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# -- webhook ------------------------------------------------------------------------------------------------------------


def test_webhooks_are_signed_so_that_the_reference_library_verifies_them() -> None:
    now = datetime.now(UTC).timestamp()  # The library compares with the real clock.
    new = "whsec_" + "B" * 40

    async def work(client: httpx.AsyncClient) -> None:
        async with receiver() as box:
            receipt = await webhook(box.url + "/hook", [new, SECRET]).send(
                client, delivery(opened(), "webhook", now=now)
            )
            (got,) = box.requests
        assert receipt.ref == got.headers["webhook-id"] == "MSG-1"
        for secret in (new, SECRET):
            event = Verifier(secret).verify(got.body, dict(got.headers))
            assert event["type"] == "incident.opened"
        assert event["data"]["title"].startswith("SEV2 · anthropic: 61 %")
        assert event["data"]["impact"]["failed_calls"] == 1912
        assert event["data"]["left_out"] == []

    run(work)


# -- answers become our errors --------------------------------------------------------------------------------------------


def every_notifier(url: str) -> list[Notifier]:
    return [slack_hook(url), slack_bot(url), pagerduty(url), alertmanager(url), webhook(url)]


@pytest.mark.parametrize(
    ("answer", "becomes"),
    [
        (Answer(429, headers={"retry-after": "7"}), NotAccepted),
        (Answer(503, headers={"retry-after": "7"}), NotAccepted),
        (Answer(503), Ambiguous),
        (Answer(500, b"oops"), Ambiguous),
        (Answer(400, b"bad"), Failed),
        (Answer(404), Failed),
        (Answer(410), Gone),
        (Answer(302, headers={"location": "http://169.254.169.254/"}), Failed),
        (Answer(drop=True), Ambiguous),
        (Answer(hang=True), Ambiguous),
    ],
    ids=lambda x: str(getattr(x, "status", x)),
)  # fmt: skip
def test_what_the_other_side_answers_becomes_one_of_our_errors(
    answer: Answer, becomes: type[EffectError]
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async with receiver(otherwise=answer) as box:
            for notifier in every_notifier(box.url):
                box.requests.clear()
                with pytest.raises(EffectError) as caught:
                    await notifier.send(client, delivery(opened(), notifier.kind))
                assert type(caught.value) is becomes
                assert len(box.requests) == 1, "redirects are not followed, and nothing is tried twice here"
                if isinstance(caught.value, NotAccepted):
                    assert caught.value.retry_after_s == 7

    run(work, timeout_s=0.2)


def test_nothing_listening_means_nothing_was_sent() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        url = f"http://127.0.0.1:{await free_port()}"
        for notifier in every_notifier(url):
            with pytest.raises(NotAccepted):
                await notifier.send(client, delivery(opened(), notifier.kind))

    run(work)


def test_errors_name_no_address_because_it_can_be_a_secret() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async with receiver(otherwise=Answer(403, b"invalid_token")) as box:
            with pytest.raises(Failed) as caught:
                await slack_hook(box.url + "/services/SECRET").send(client, delivery(opened(), "slack"))
        assert "SECRET" not in str(caught.value)
        assert "403: invalid_token" in str(caught.value)

    run(work)


def test_an_answer_without_end_is_not_read_to_its_end() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async with receiver(Answer(200, b"x" * 5_000_000)) as box:
            await slack_hook(box.url).send(client, delivery(opened(), "slack"))

    run(work)


def test_retry_after_is_understood_as_seconds_or_date_and_is_bounded() -> None:
    assert retry_after_s("999999999", 0.0) == 3600
    assert retry_after_s("Thu, 01 Jan 1970 00:00:10 GMT", 60.0) == 0
    assert retry_after_s("-5", 0.0) is None


# -- settings -------------------------------------------------------------------------------------------------------------


def notify(*channels: dict[str, Any], **more: Any) -> NotifySettings:
    return NotifySettings.model_validate({"channels": list(channels), **more})


TERMINAL = {"kind": "terminal"}
PAGER = {"kind": "pagerduty", "name": "oncall", "min_severity": "high", "params": {"routing_key": KEY}}


def names(settings: NotifySettings, change: IncidentChange, *already: str) -> list[str]:
    return [r.channel for r in settings.routes(change, already)]


def test_every_notifier_in_the_folder_has_what_a_notifier_needs() -> None:
    kinds = registry().kinds()
    assert {"alertmanager", "pagerduty", "slack", "terminal", "webhook"} <= set(kinds)
    for kind in kinds:
        found = registry().get(kind)
        assert found.kind == kind
        assert isinstance(found.wakes, bool)
        assert issubclass(found.Params, BaseModel)
        assert found.Params.model_config.get("extra") == "forbid"
        assert found.__doc__


def test_only_what_may_wake_a_person_goes_to_what_wakes_people() -> None:
    s = notify(TERMINAL, PAGER)
    assert names(s, opened()) == ["terminal", "oncall"]
    assert names(s, opened(outage(page=False))) == ["terminal"]
    assert names(s, opened(outage(severity=Severity.MEDIUM))) == ["terminal"]
    assert s.channels[1].wants(opened(), "anyone")


def test_owners_come_from_the_first_rule_that_matches_and_stand_in_the_reason() -> None:
    s = notify(
        {**PAGER, "owners": ["llm-platform"]},
        {"kind": "terminal", "match": {"provider": "open*"}},
        owners=[{"owner": "checkout", "match": {"app": "checkout*"}}, {"owner": "llm-platform"}],
    )
    (route,) = s.routes(opened())
    assert (route.channel, route.owner) == ("oncall", "llm-platform")
    assert route.why == "severity ≥ high, pages on owner llm-platform (channel oncall)"
    assert names(s, opened(outage(scope={"app": "checkout-bot"}))) == []


def test_figures_alone_go_only_where_a_message_is_brought_up_to_date() -> None:
    bot = {"kind": "slack", "bot_token": "xoxb-1", "channel": "C1"}
    s = notify(TERMINAL, bot)
    figures = opened(old="open", notify=False)
    assert names(s, figures) == []
    assert names(s, figures, "terminal", "slack") == ["slack"]


def test_who_was_told_of_an_incident_is_told_of_its_end() -> None:
    s = notify(PAGER)
    over = resolved(outage(state=State.RESOLVED, severity=Severity.LOW, page=False))
    assert names(s, over) == []
    assert names(s, over, "oncall") == ["oncall"]


def test_a_silenced_incident_wakes_nobody_but_its_end_is_told() -> None:
    s = notify(PAGER)
    assert names(s, opened(outage(silenced_until=AT + 3600))) == []
    assert names(s, opened(outage(silenced_until=AT - 1))) == ["oncall"]
    assert names(s, resolved(outage(state=State.RESOLVED, silenced_until=AT + 3600)), "oncall") == ["oncall"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"channels": [{"kind": "slak", "url": "x"}]}, "unknown notifier 'slak'; did you mean 'slack'?"),
        ({"channels": [{"kind": "slack", "urll": "https://hooks.example/SECRET"}]}, "urll: no such setting; did you mean 'url'?"),
        ({"channels": [{"kind": "slack"}]}, "give either url (an incoming webhook) or bot_token"),
        ({"channels": [{"kind": "slack", "bot_token": "SECRET"}]}, "bot_token needs channel"),
        ({"channels": [{"kind": "slack", "url": "hooks/SECRET"}]}, "url is the address of the webhook"),
        ({"channels": [{"kind": "pagerduty", "routing_key": "SECRET"}]}, "has 32 letters and digits; this has 6"),
        ({"channels": [{"kind": "webhook", "url": "https://x", "secrets": ["whsec_SECRET!"]}]}, "not base64"),
        ({"channels": [{"kind": "webhook", "url": "https://x", "secrets": ["whsec_U0VDUkVU"]}]}, "24 to 64 bytes; this one has 6"),
        ({"channels": [{"kind": "webhook", "url": "ftp://x", "secrets": [SECRET]}]}, "only http and https"),
        ({"channels": [TERMINAL, TERMINAL]}, "two channels are called 'terminal'"),
        ({"channels": [{**TERMINAL, "owners": ["x"]}]}, "no rule under `owners` names that owner"),
        ({"channels": [{**TERMINAL, "min_severity": "urgent"}]}, "'urgent' is no severity"),
        ({"channels": [{**TERMINAL, "x": 1, "params": {"x": 2}}]}, "stands both under `params` and beside it"),
        ({"egress": {"networks": ["ten"]}}, "'ten' is no network"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_what_would_be_right_and_show_no_secret(
    raw: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        NotifySettings.model_validate(raw)
    assert words in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_secrets_come_from_variables_and_never_show() -> None:
    raw = {"channels": [{"kind": "slack", "url": {"env": "HOOK"}}]}
    s = NotifySettings.model_validate(with_secrets(raw, {"HOOK": "https://hooks.example/SECRET"}))
    assert "SECRET" not in repr(s)
    assert "SECRET" not in s.model_dump_json()
    with pytest.raises(Exception, match=r"notify\.channels\[0\]\.url: the variable HOOK is not set"):
        with_secrets(raw, {})


def test_incident_type_is_all_a_notifier_needs_to_say_what_to_do() -> None:
    def action(incident: Incident) -> Any:
        return pagerduty().payload(message_for(opened(incident), "pagerduty"), incident)["event_action"]

    assert action(outage(state=State.ACKNOWLEDGED)) == "acknowledge"
    assert action(outage(state=State.VERIFYING)) == "trigger"
