"""Buttons of Slack's messages, both ways: what a button carries, and what a press says.

A button carries ids of our own making and nothing else; whatever a press is about is looked up when it is pressed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from flyball.core.errors import EffectError
from flyball.remediation.notifiers._base import dumps, post
from flyball.remediation.notifiers._text import fit, slack_mrkdwn
from flyball.remediation.render import Button, Message

_VALUE: Final = re.compile(
    r"v1\|(approve|deny|ack|undo|silence)\|([A-Za-z0-9_.:-]{1,64})\|(\d{1,9})\|([A-Za-z0-9_-]{0,64})"
)
_USER: Final = re.compile(r"[A-Z0-9]{1,32}")


@dataclass(frozen=True, slots=True)
class Press:
    """A button that somebody pressed. `subject`: hash of what an answer is bound to."""

    action: str
    incident: str
    revision: int
    subject: str
    user: str
    response_url: str = ""


def value_of(button: Button, message: Message) -> str:
    """What a button carries; at most some 160 characters, so that nothing of it is ever cut."""
    return f"v1|{button.action}|{message.incident}|{message.revision}|{button.subject[:64]}"


def read_press(payload: Mapping[str, Any]) -> Press | None:
    """The press in a `block_actions` payload; None for a link that was opened, and for whatever is not one of our buttons."""
    actions, user = payload.get("actions"), payload.get("user")
    if payload.get("type") != "block_actions" or not isinstance(actions, list) or not isinstance(user, dict):
        return None
    who, url = str(user.get("id", "")), payload.get("response_url")
    for action in actions[:1]:
        found = _VALUE.fullmatch(str(action.get("value", ""))) if isinstance(action, dict) else None
        if found is not None and _USER.fullmatch(who):
            return Press(
                found[1], found[2], int(found[3]), found[4], who, url if isinstance(url, str) else ""
            )
    return None


async def reply(client: httpx.AsyncClient, url: str, text: str, now: float) -> str:
    """Tells whoever pressed, and nobody else, what came of it. Why that did not work; empty when it did.

    Fails open: what was pressed is done or refused in any case, and stands in the alert.
    """
    body = {
        "response_type": "ephemeral",
        "replace_original": False,
        "text": fit(text, 1000, slack_mrkdwn),
    }
    try:
        await post(client, url, dumps(body), now=now, what="Slack's response_url")
    except EffectError as e:
        return str(e)
    return ""
