"""Pages by PagerDuty's Events API v2: one alert per incident, triggered, acknowledged and resolved by its dedup key."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Final

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from flyball.core.incident import Incident, Severity, State
from flyball.remediation.http_guard import HttpUrl
from flyball.remediation.notifiers._base import Delivery, Receipt, dumps, iso, post
from flyball.remediation.notifiers._text import fit, forwarded
from flyball.remediation.render import Message

EVENT_BYTES: Final = 512_000
SUMMARY: Final = 1024
DEDUP_KEY: Final = 255
FIELD: Final = 255

_SEVERITY: Final = {
    Severity.CRITICAL: "critical",
    Severity.HIGH: "error",
    Severity.MEDIUM: "warning",
    Severity.LOW: "info",
}


class PagerDuty:
    """Events v2. A trigger with a known key adds to the open alert and wakes nobody again."""

    kind: ClassVar[str] = "pagerduty"
    wakes: ClassVar[bool] = True

    class Params(BaseModel):
        """A service's integration key."""

        model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

        routing_key: SecretStr = Field(description="Integration key of the service: 32 letters and digits.")
        url: HttpUrl = Field("https://events.pagerduty.com/v2/enqueue", description="Where events go.")
        source: str = Field("flyball", max_length=FIELD, description="Shown as the source of the alert.")
        client_url: HttpUrl | None = Field(
            None, description="Address of this Flyball, for the link on the alert."
        )

        @field_validator("routing_key")
        @classmethod
        def _looks_like_a_key(cls, value: SecretStr) -> SecretStr:
            key = value.get_secret_value()
            if len(key) != 32 or not (key.isascii() and key.isalnum()):
                raise ValueError(
                    f"an integration key has 32 letters and digits; this has {len(key)} characters"
                )
            return value

    def __init__(self, params: Params) -> None:
        self._params = params

    @classmethod
    def edits(cls, params: Any) -> bool:
        return False

    @property
    def buttons(self) -> bool:
        return False

    def payload(self, message: Message, incident: Incident) -> dict[str, Any]:
        """The event. Over 512,000 bytes its details are dropped: a page without details is better than none."""
        action = event_action(incident)
        event: dict[str, Any] = {
            "routing_key": self._params.routing_key.get_secret_value(),
            "event_action": action,
            "dedup_key": message.dedup_key[:DEDUP_KEY],
        }
        if action != "trigger":
            return event
        event["client"] = "Flyball"
        if self._params.client_url:
            event["client_url"] = self._params.client_url
        event["links"] = [
            {"href": link.url, "text": fit(link.text, FIELD, forwarded)} for link in message.links
        ]
        event["payload"] = {
            "summary": fit(message.title, SUMMARY, forwarded),
            "source": fit(self._params.source, FIELD) or "flyball",
            "severity": _SEVERITY[message.severity],
            "timestamp": iso(incident.at),
            "component": fit(str(incident.root), FIELD, forwarded),
            "group": fit(incident.root.kind, FIELD, forwarded),
            "class": fit(incident.klass or incident.signal, FIELD, forwarded),
            "custom_details": {
                "first_screen": [fit(line, SUMMARY, forwarded) for line in message.lines],
                "why": message.why,
                "facts": {fit(k, FIELD, forwarded): fit(v, SUMMARY, forwarded) for k, v in message.facts},
                "details": [fit(line, SUMMARY, forwarded) for line in message.long.split("\n")],
            },
        }
        if len(dumps(event)) > EVENT_BYTES:
            event["payload"]["custom_details"] = {"left_out": "the details were larger than PagerDuty takes"}
            event["links"] = event["links"][:1]
        return event

    async def send(self, client: httpx.AsyncClient, delivery: Delivery) -> Receipt:
        body = dumps(self.payload(delivery.message, delivery.incident))
        answer = await post(client, self._params.url, body, now=delivery.now, what="PagerDuty")
        try:
            found = json.loads(answer)
        except ValueError:
            # Accepted is said by the status; the body only repeats the key.
            found = {}
        key = found.get("dedup_key") if isinstance(found, dict) else None
        return delivery.receipt(str(key or delivery.message.dedup_key)[:DEDUP_KEY])


def event_action(incident: Incident) -> str:
    """`resolve` when it is over, `acknowledge` when somebody has it, else `trigger`.

    Taken from the incident, not from the single change: when an acknowledgement was superseded unsent by what came after it, PagerDuty
    must hear of it all the same, or it goes on calling people.
    """
    if incident.state is State.RESOLVED:
        return "resolve"
    return "acknowledge" if incident.acknowledged_by or incident.state is State.ACKNOWLEDGED else "trigger"
