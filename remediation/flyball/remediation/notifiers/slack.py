"""Alerts in Slack, by an incoming webhook (also of what is compatible with it) or by a bot token.

A bot edits its one message per incident in place and tells news in the thread below it. An incoming webhook can do neither: it
gives no id back. There a later notice is a new, short message that names the incident, and figures alone are not sent.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Final

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from flyball.core.errors import Ambiguous, Failed, NotAccepted
from flyball.core.incident import Incident
from flyball.remediation.http_guard import HttpUrl
from flyball.remediation.notifiers._base import Delivery, Receipt, dumps, post
from flyball.remediation.notifiers._slack_actions import value_of
from flyball.remediation.notifiers._text import fit, slack_mrkdwn, slack_plain
from flyball.remediation.render import Message

HEADER: Final = 150
SECTION: Final = 3000
CONTEXT: Final = 2000
BUTTON_TEXT: Final = 75
BUTTON_URL: Final = 3000
CONFIRM_TEXT: Final = 300
ELEMENTS: Final = 25
TEXT: Final = 4000
"""Slack shortens the fallback text above this."""

_LABEL: Final = re.compile(r"([A-Z][A-Za-z ]{1,18}): ")
_TRANSIENT: Final = {"ratelimited", "rate_limited", "service_unavailable", "accesslimited"}
_UNKNOWN: Final = {"internal_error", "fatal_error", "request_timeout"}
_CANNOT_EDIT: Final = {"message_not_found", "cant_update_message", "edit_window_closed", "channel_not_found"}


class Slack:
    """Block Kit messages.

    No text of an event becomes a mention, a link or formatting. Button values hold an action, the incident's id and its revision,
    nothing else: what a button acts on is looked up when it is pressed, and cannot grow by cutting.
    """

    kind: ClassVar[str] = "slack"
    wakes: ClassVar[bool] = False

    class Params(BaseModel):
        """Either `url` of an incoming webhook, or `bot_token` and `channel`."""

        model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

        url: SecretStr | None = Field(None, description="Address of the incoming webhook; a secret.")
        bot_token: SecretStr | None = Field(None, description="Token of a bot with the scope `chat:write`.")
        channel: str = Field("", description="Id of the channel that the bot writes to, e.g. `C0123456789`.")
        api_url: HttpUrl = Field("https://slack.com/api", description="Where the Web API is.")
        interactive: bool = Field(
            False, description="Show buttons: only where the app's interactivity leads to this Flyball."
        )

        @model_validator(mode="after")
        def _one_way(self) -> Slack.Params:
            if (self.url is None) == (self.bot_token is None):
                raise ValueError("give either url (an incoming webhook) or bot_token with channel")
            if self.bot_token is not None and not self.channel:
                raise ValueError("bot_token needs channel, the id of the channel to write to")
            if self.url is not None and not re.match(r"https?://\S+$", self.url.get_secret_value()):
                raise ValueError("url is the address of the webhook, https://…")
            return self

    def __init__(self, params: Params) -> None:
        self._params = params

    @classmethod
    def edits(cls, params: Slack.Params) -> bool:
        return params.bot_token is not None

    @property
    def buttons(self) -> bool:
        return self._params.interactive

    def payload(self, message: Message, incident: Incident, *, short: bool = False) -> dict[str, Any]:
        """The message as Slack takes it: `text` for phones and compatible receivers, `blocks` for the rest.

        Args:
            short: the news only, for a message that follows another.
        """
        lines = message.update if short else message.lines
        each = (SECTION - 16) // max(len(lines) - 1, 1) - 4
        blocks: list[dict[str, Any]] = [
            {
                "type": "header",
                "text": {"type": "plain_text", "text": fit(lines[0], HEADER, slack_plain), "emoji": False},
            }
        ]
        if len(lines) > 1:
            text = "\n".join(_line(line, each) for line in lines[1:])
            blocks.append({"type": "section", "text": {"type": "mrkdwn", "text": text, "verbatim": True}})
        if not short:
            blocks.extend(self._actions(message))
        each = TEXT // len(lines) - 1
        return {
            "text": "\n".join(fit(line, each, slack_mrkdwn) for line in lines),
            "blocks": blocks,
            "unfurl_links": False,
            "unfurl_media": False,
        }

    def _actions(self, message: Message) -> list[dict[str, Any]]:
        elements: list[dict[str, Any]] = []
        for n, button in enumerate(message.buttons if self._params.interactive else ()):
            element: dict[str, Any] = {
                "type": "button",
                "action_id": f"flyball.{button.action}.{n}",
                "text": {
                    "type": "plain_text",
                    "text": fit(button.label, BUTTON_TEXT, slack_plain),
                    "emoji": False,
                },
                "value": value_of(button, message),
            }
            if button.style:
                element["style"] = button.style
            if button.confirm:
                element["confirm"] = {
                    "title": {
                        "type": "plain_text",
                        "text": fit(button.label.capitalize() + "?", 100, slack_plain),
                    },
                    "text": {"type": "plain_text", "text": fit(button.confirm, CONFIRM_TEXT, slack_plain)},
                    "confirm": {"type": "plain_text", "text": "Yes"},
                    "deny": {"type": "plain_text", "text": "No"},
                }
            elements.append(element)
        for i, link in enumerate(message.links):
            if len(link.url) <= BUTTON_URL:
                text = {
                    "type": "plain_text",
                    "text": fit(link.text, BUTTON_TEXT, slack_plain),
                    "emoji": False,
                }
                elements.append(
                    {"type": "button", "action_id": f"flyball.link.{i}", "text": text, "url": link.url}
                )
        return [{"type": "actions", "elements": elements[:ELEMENTS]}] if elements else []

    async def send(self, client: httpx.AsyncClient, delivery: Delivery) -> Receipt:
        first = delivery.previous is None
        if self._params.url is not None:
            body = self.payload(delivery.message, delivery.incident, short=not first)
            url = self._params.url.get_secret_value()
            await post(client, url, dumps(body), now=delivery.now, what="Slack's webhook")
            return delivery.receipt()
        previous = delivery.previous
        if previous is None or ":" not in previous.ref:
            return await self._post_new(client, delivery)
        channel, _, ts = previous.ref.partition(":")
        whole = self.payload(delivery.message, delivery.incident)
        answer = await self._call(
            client, "chat.update", {"channel": channel, "ts": ts, **whole}, delivery.now
        )
        if answer.get("error") in _CANNOT_EDIT:
            return await self._post_new(client, delivery)
        _raise_unless_ok(answer, "chat.update")
        # An edit reaches nobody's phone: news go into the thread as well. What was superseded unsent counts, too.
        news = delivery.notify or previous.state != delivery.incident.state
        if news or previous.severity < delivery.incident.severity:
            short = self.payload(delivery.message, delivery.incident, short=True)
            reply = {"channel": channel, "thread_ts": ts, **short}
            _raise_unless_ok(
                await self._call(client, "chat.postMessage", reply, delivery.now), "chat.postMessage"
            )
        return delivery.receipt(previous.ref)

    async def _post_new(self, client: httpx.AsyncClient, delivery: Delivery) -> Receipt:
        body = {"channel": self._params.channel, **self.payload(delivery.message, delivery.incident)}
        answer = await self._call(client, "chat.postMessage", body, delivery.now)
        _raise_unless_ok(answer, "chat.postMessage")
        return delivery.receipt(f"{answer.get('channel', self._params.channel)}:{answer.get('ts', '')}")

    async def _call(
        self, client: httpx.AsyncClient, method: str, body: dict[str, Any], now: float
    ) -> dict[str, Any]:
        token = self._params.bot_token
        assert token is not None, "only bots call methods; Params allows nothing else"
        answer = await post(
            client,
            f"{self._params.api_url.rstrip('/')}/{method}",
            dumps(body),
            now=now,
            what=f"Slack's {method}",
            headers={
                "authorization": f"Bearer {token.get_secret_value()}",
                "content-type": "application/json; charset=utf-8",
            },
        )
        try:
            found = json.loads(answer)
        except ValueError as e:
            raise Ambiguous(f"Slack's {method} answered with what is not JSON") from e
        return found if isinstance(found, dict) else {}


def _line(line: str, limit: int) -> str:
    """A line of the section, its label in bold: labels come from templates, everything behind them is escaped."""
    if label := _LABEL.match(line):
        return f"*{label[1]}:* {fit(line[label.end() :], limit - len(label[0]) - 2, slack_mrkdwn)}"
    return fit(line, limit, slack_mrkdwn)


def _raise_unless_ok(answer: dict[str, Any], method: str) -> None:
    """Slack says 200 also when it refuses; what became of it stands in the body."""
    if answer.get("ok") is True:
        return
    error = str(answer.get("error", "no reason given"))[:80]
    if error in _TRANSIENT:
        raise NotAccepted(f"Slack's {method}: {error}")
    if error in _UNKNOWN:
        raise Ambiguous(f"Slack's {method}: {error}")
    raise Failed(f"Slack's {method}: {error}")
