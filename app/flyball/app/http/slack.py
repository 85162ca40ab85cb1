"""Buttons in Slack: a press becomes a person's word, once it is certain that Slack says so and who pressed."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs

import structlog
from fastapi import APIRouter, HTTPException, Request, Response
from slack_sdk.signature import SignatureVerifier

from flyball.app.embedded import Embedded
from flyball.app.http.act import say
from flyball.app.http.answers import json_response
from flyball.app.orders import Command, Order
from flyball.app.settings import Settings, SlackSettings
from flyball.app.store import store
from flyball.app.text import refusal
from flyball.core.directives import Approval, Intervention, Release
from flyball.core.incident import Incident
from flyball.core.ports import Clock
from flyball.remediation.http_guard import guarded_client
from flyball.remediation.notifiers._slack_actions import Press, read_press, reply

_log = structlog.get_logger(__name__)
_REMEMBERED: Final = 10_000
_WINDOW_S: Final = 300
_ANSWER_S: Final = 1.5
"""Slack shows an error to whoever pressed when an answer takes three seconds."""
_SILENCE_S: Final = 3600.0


class Doorman:
    """Lets in what Slack signed, less than five minutes ago, once.

    A request is remembered by its signature for as long as it would be valid: a copy of it is refused.
    """

    def __init__(self, secret: str, clock: Clock) -> None:
        self._verifier = SignatureVerifier(secret, clock)  # type: ignore[arg-type]
        self._clock = clock
        self._seen: OrderedDict[str, float] = OrderedDict()

    def check(self, body: bytes, timestamp: str, signature: str) -> None:
        """Raises: HTTPException 401 for what is not from Slack, is stale or was there before."""
        now = self._clock.now()
        if not timestamp.isascii() or not timestamp.isdecimal() or len(timestamp) > 12:
            raise HTTPException(401, "X-Slack-Request-Timestamp is no time")
        if abs(now - int(timestamp)) > _WINDOW_S:
            raise HTTPException(
                401, f"X-Slack-Request-Timestamp is {now - int(timestamp):+.0f} s off; 300 s are allowed"
            )
        try:
            text = body.decode()
        except UnicodeDecodeError as e:
            raise HTTPException(401, "the body is not UTF-8, so Slack did not send it") from e
        if not signature.isascii() or not self._verifier.is_valid(text, timestamp, signature):
            raise HTTPException(
                401, "X-Slack-Signature is not of the signing secret in `slack.signing_secret`"
            )
        while self._seen and (
            len(self._seen) >= _REMEMBERED or next(iter(self._seen.values())) < now - 2 * _WINDOW_S
        ):
            self._seen.popitem(last=False)
        if signature in self._seen:
            raise HTTPException(401, "this request was taken before")
        self._seen[signature] = now


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a press asks for, in the order in which it is done."""

    orders: tuple[Order, ...]
    why_not: str = ""


def router(runtime: Embedded, settings: Settings) -> APIRouter:
    r = APIRouter()
    slack_settings = settings.slack
    doorman = (
        Doorman(slack_settings.signing_secret.get_secret_value(), runtime.clock) if slack_settings else None
    )
    busy: set[asyncio.Task[None]] = set()

    @r.post("/v1/slack", summary="Buttons in Slack; signed")
    async def slack(request: Request) -> Response:
        if slack_settings is None or doorman is None:
            raise HTTPException(404, "buttons in Slack are not set up; set `slack.signing_secret`")
        body = await request.body()
        headers = request.headers
        doorman.check(
            body, headers.get("x-slack-request-timestamp", ""), headers.get("x-slack-signature", "")
        )
        press = _press_of(body)
        if press is None:
            return json_response({})  # a link was opened, or a kind of interaction that we have none of
        text = await _carry_out(runtime, slack_settings, press)
        _log.info("slack.pressed", user=press.user, action=press.action, incident=press.incident, said=text)
        if press.response_url:
            task = asyncio.create_task(_tell(runtime, settings, press.response_url, text))
            busy.add(task)
            task.add_done_callback(busy.discard)
        return json_response({"response_type": "ephemeral", "replace_original": False, "text": text})

    return r


async def _tell(runtime: Embedded, settings: Settings, url: str, text: str) -> None:
    async with guarded_client(settings.notify.egress.allowed()) as client:
        why = await reply(client, url, text, runtime.clock.now())
    if why:
        _log.warning("slack.not_told", why=why)


def _press_of(body: bytes) -> Press | None:
    """Raises: HTTPException 422 for what is no interaction of Slack."""
    try:
        payload = json.loads(parse_qs(body.decode(), max_num_fields=20)["payload"][0])
    except (ValueError, KeyError, IndexError) as e:
        raise HTTPException(
            422, "the body has no `payload` that is JSON; give Slack this address for interactivity"
        ) from e
    return read_press(payload) if isinstance(payload, dict) else None


async def _carry_out(runtime: Embedded, settings: SlackSettings, press: Press) -> str:
    """One sentence for whoever pressed."""
    who = settings.users.get(press.user) or (f"slack:{press.user}" if settings.anyone else "")
    if not who:
        return f"Refused: Flyball does not know the Slack user {press.user}; add it to `slack.users`."
    with runtime.reader.connect() as c:
        incident = store.get_incident(c, press.incident)
    if incident is None:
        return f"Refused: there is no incident {press.incident}."
    asked = _asked(press, incident, who, runtime.clock.now())
    if asked.why_not:
        return asked.why_not
    said: Intervention | None = None
    for order in asked.orders:
        said = await say(runtime, order, _ANSWER_S / len(asked.orders))
    return _sentence(press, who, said)


def _asked(press: Press, incident: Incident, who: str, now: float) -> _Asked:
    if press.action in ("approve", "deny"):
        if not press.subject:
            return _Asked((), "Refused: the button names no plan.")
        return _Asked((Approval(waiting=press.subject, approve=press.action == "approve", by=who, at=now),))
    if press.action == "undo":
        live = [a.directive for a in incident.actions if a.directive and a.outcome in _LIVE]
        if not live:
            return _Asked((), "Nothing of this incident is in force any more.")
        return _Asked(tuple(Release(subject=d, by=who, at=now) for d in dict.fromkeys(live)))
    if press.action == "ack":
        return _Asked((Command("ack", incident.id, who, now),))
    if press.action == "silence":
        return _Asked((Command("silence", incident.id, who, now, now + _SILENCE_S),))
    return _Asked((), f"Refused: this Flyball has no button {press.action!r}.")


_LIVE: Final = ("granted", "in_force", "applied", "verified")


def _sentence(press: Press, who: str, said: Intervention | None) -> str:
    if said is None:
        return f"Taken, by {who}: {press.action} {press.incident}. Flyball is behind; what follows is told in the alert."
    if not said.accepted:
        return f"Refused: {refusal(said)}."
    if said.values.get("outcome") == "not_accepted":
        return f"Approved by {who}, but not carried out: {said.values.get('why', '')}."
    done = {
        "approve": "approved",
        "deny": "denied",
        "undo": "let go",
        "ack": "acknowledged",
        "silence": "silenced for 1 h",
    }
    return f"{press.incident}: {done.get(press.action, press.action)} by {who}."
