"""Buttons in Slack: who is believed, and what a press does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from slack_sdk.signature import Clock as SlackClock
from slack_sdk.signature import SignatureVerifier

from flyball.app.embedded import Embedded
from flyball.app.store import store
from flyball.app.wiring import make_pipeline
from flyball.core.incident import IncidentChange
from flyball.remediation.notifiers.slack import Slack
from flyball.remediation.render import Audience, Renderer
from tests.app._http import served
from tests.app._runtime import SetClock, incident
from tests.app.crash_child import settings

SECRET = "8f742231b10e8888abcd99yyyzzz85a5"
GIVEN = {"slack": {"signing_secret": SECRET, "users": {"U0ANN": "ann", "U0BOB": "bob"}}}


class _At(SlackClock):
    def __init__(self, at: float) -> None:
        self.at = at

    def now(self) -> float:
        return self.at


def signed(body: str, at: float, secret: str = SECRET) -> dict[str, str]:
    stamp = str(int(at))
    signature = SignatureVerifier(secret, _At(at)).generate_signature(timestamp=stamp, body=body)
    assert signature is not None
    return {
        "x-slack-request-timestamp": stamp,
        "x-slack-signature": signature,
        "content-type": "application/x-www-form-urlencoded",
    }


def press_body(value: str, user: str = "U0ANN") -> str:
    payload = {
        "type": "block_actions", "user": {"id": user, "username": "x"}, "trigger_id": "1",
        "actions": [{"type": "button", "action_id": "flyball.approve.0", "value": value}],
    }  # fmt: skip
    return urlencode({"payload": json.dumps(payload)})


def press(client: httpx.Client, clock: SetClock, value: str, user: str = "U0ANN") -> str:
    """What the one who pressed is told. Each press is another moment, as in life."""
    clock.at += 1.0
    body = press_body(value, user)
    said = client.post("/v1/slack", content=body, headers=signed(body, clock.at))
    assert said.status_code == 200, said.text
    return str(said.json()["text"])


Served = tuple[httpx.Client, Embedded, SetClock, str]


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Served]:
    """A served Flyball with an incident and a plan that waits."""
    clock = SetClock()
    with served(tmp_path, clock, given=GIVEN, pipeline=lambda: make_pipeline(settings())) as (
        client,
        runtime,
    ):
        yield client, runtime, clock, incident(runtime, clock)


def buttons(runtime: Embedded, found: str) -> dict[str, str]:
    """The values of the buttons as the message in Slack has them, by action."""
    with runtime.reader.connect() as c:
        kept = store.get_incident(c, found)
    assert kept is not None
    change = IncidentChange(
        incident=kept, at=kept.updated_at, old="open", new=kept.state, reason="r", notify=True
    )
    message = Renderer().render(change, Audience("slack", interactive=True))
    slack = Slack(Slack.Params.model_validate({"url": "https://hooks.example.com/x", "interactive": True}))
    elements = [
        e
        for block in slack.payload(message, kept)["blocks"]
        if block["type"] == "actions"
        for e in block["elements"]
    ]
    return {e["value"].split("|")[1]: e["value"] for e in elements if "value" in e}


def test_the_approve_button_of_the_alert_carries_out_the_plan_it_shows(waiting: Served) -> None:
    client, runtime, clock, found = waiting
    (plan,) = client.get("/v1/approvals").json()
    value = buttons(runtime, found)["approve"]
    assert value.split("|")[-1] == plan["hash"]
    assert press(client, clock, value) == f"{found}: approved by ann."
    (lease,) = client.get("/v1/directives").json()
    assert lease["incident"] == found
    (person,) = client.get("/v1/ledger", params={"kind": "person"}).json()
    assert (person["body"]["by"], person["body"]["kind"]) == ("ann", "approve")
    assert {"undo", "ack", "silence"} <= set(buttons(runtime, found))
    assert "approve" not in buttons(runtime, found)


def test_an_old_button_pressed_again_is_refused(waiting: Served) -> None:
    client, runtime, clock, found = waiting
    value = buttons(runtime, found)["approve"]
    press(client, clock, value)
    assert press(client, clock, value, "U0BOB").startswith("Refused: it was approved already")
    assert len(client.get("/v1/directives").json()) == 1


def test_deny_undo_acknowledge_and_silence_do_what_they_say(waiting: Served) -> None:
    client, runtime, clock, found = waiting
    assert press(client, clock, f"v1|undo|{found}|1|") == "Nothing of this incident is in force any more."
    press(client, clock, buttons(runtime, found)["approve"])
    assert press(client, clock, buttons(runtime, found)["undo"]) == f"{found}: let go by ann."
    assert client.get("/v1/directives").json() == []
    assert press(client, clock, buttons(runtime, found)["ack"]) == f"{found}: acknowledged by ann."
    assert press(client, clock, buttons(runtime, found)["silence"]) == f"{found}: silenced for 1 h by ann."
    kept = client.get(f"/v1/incidents/{found}").json()
    assert (kept["acknowledged_by"], kept["silenced_until"] > clock.at) == ("ann", True)


def test_deny_is_a_no(waiting: Served) -> None:
    client, runtime, clock, found = waiting
    assert press(client, clock, buttons(runtime, found)["deny"]) == f"{found}: denied by ann."
    assert client.get("/v1/approvals").json() == []
    assert client.get("/v1/directives").json() == []


def test_a_user_who_is_not_listed_decides_nothing(waiting: Served) -> None:
    client, runtime, clock, found = waiting
    told = press(client, clock, buttons(runtime, found)["approve"], "U0EVE")
    assert told == "Refused: Flyball does not know the Slack user U0EVE; add it to `slack.users`."
    assert client.get("/v1/directives").json() == []
    assert client.get("/v1/ledger", params={"kind": "person"}).json() == []


def test_anyone_may_be_allowed_and_is_named_by_the_id(tmp_path: Path) -> None:
    clock = SetClock()
    given = {"slack": {"signing_secret": SECRET, "anyone": True}}
    with served(tmp_path, clock, given=given) as (client, runtime):
        found = incident(runtime, clock)
        assert press(client, clock, f"v1|ack|{found}|1|", "U0EVE") == f"{found}: acknowledged by slack:U0EVE."


# --- who is believed ------------------------------------------------------------------------------------------------


def refused(client: httpx.Client, body: str | bytes, headers: dict[str, str]) -> str:
    said = client.post("/v1/slack", content=body, headers=headers)
    assert said.status_code == 401
    return str(said.json()["error"])


def test_what_slack_did_not_sign_is_refused(waiting: Served) -> None:
    client, runtime, clock, found = waiting
    body = press_body(buttons(runtime, found)["approve"])
    good = signed(body, clock.at)
    position = runtime.appended
    assert "X-Slack-Signature" in refused(client, body, signed(body, clock.at, "another secret 1234"))
    assert "X-Slack-Signature" in refused(client, body.replace("approve", "deny"), good)
    assert "X-Slack-Signature" in refused(client, body, good | {"x-slack-signature": ""})
    assert "X-Slack-Signature" in refused(client, body, good | {"x-slack-signature": "v0=" + "0" * 64})
    assert "no time" in refused(client, body, good | {"x-slack-request-timestamp": "soon"})
    assert "no time" in refused(client, body, good | {"x-slack-request-timestamp": "-5"})
    assert "no time" in refused(client, body, {})
    assert "not UTF-8" in refused(client, b"\xff\xfe", good)
    assert runtime.appended == position


@pytest.mark.parametrize("off_s", [-301.0, 301.0], ids=["old", "from-the-future"])
def test_a_stale_request_is_refused_though_its_signature_is_right(waiting: Served, off_s: float) -> None:
    client, runtime, clock, found = waiting
    body = press_body(buttons(runtime, found)["approve"])
    assert "300 s are allowed" in refused(client, body, signed(body, clock.at + off_s))


def test_a_copy_of_a_request_is_refused(waiting: Served) -> None:
    client, _, clock, found = waiting
    body = press_body(f"v1|silence|{found}|1|")
    headers = signed(body, clock.at)
    assert client.post("/v1/slack", content=body, headers=headers).status_code == 200
    clock.at += 60.0
    assert "taken before" in refused(client, body, headers)


BAD_VALUES = {
    "another-version": "v2|approve|INC-1|1|PLAN-1",
    "unknown-action": "v1|delete|INC-1|1|PLAN-1",
    "more-fields": "v1|approve|INC-1|1|PLAN-1|x",
    "text-of-an-event": "v1|approve|INC-1; drop table|1|PLAN-1",
    "nothing": "",
}


@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_button_that_is_none_of_ours_does_nothing(waiting: Served, value: str) -> None:
    client, runtime, clock, _ = waiting
    body = press_body(value)
    position = runtime.appended
    said = client.post("/v1/slack", content=body, headers=signed(body, clock.at))
    assert (said.status_code, said.json()) == (200, {})
    assert runtime.appended == position


BAD_BODIES = {
    "no-payload": "a=b", "not-json": "payload=nonsense", "empty": "", "a-list": urlencode({"payload": "[]"}),
    "many-fields": "&".join(f"a{i}=1" for i in range(100)),
}  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_signed_body_that_is_no_interaction_is_answered(waiting: Served, body: str) -> None:
    client, runtime, clock, _ = waiting
    position = runtime.appended
    said = client.post("/v1/slack", content=body, headers=signed(body, clock.at))
    assert said.status_code in (200, 422)
    assert runtime.appended == position


def test_without_a_signing_secret_there_is_no_such_way_in(tmp_path: Path) -> None:
    with served(tmp_path) as (client, _):
        assert client.post("/v1/slack", content="payload={}").status_code == 404


def test_the_settings_never_show_the_signing_secret() -> None:
    from flyball.app.settings import Settings

    shown: Any = Settings.model_validate(GIVEN)
    assert SECRET not in repr(shown)
