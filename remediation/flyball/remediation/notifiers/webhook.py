"""Alerts to any receiver, as Standard Webhooks: a small signed JSON body that says what, when, and about which incident."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import httpx
import msgspec
from pydantic import BaseModel, ConfigDict, Field

from flyball.core.incident import Impact, Incident, IncidentChange
from flyball.remediation.http_guard import HttpUrl
from flyball.remediation.notifiers._base import Delivery, Receipt, dumps, finite, iso, post
from flyball.remediation.notifiers._text import fit, forwarded
from flyball.remediation.render import Message
from flyball.remediation.signing import SigningSecret, signed_headers

BODY_BYTES: Final = 20_000
LINE: Final = 400


class Webhook:
    """Standard Webhooks 1.0. `webhook-id` is the same for every try: receivers tell copies by it.

    Signed with every secret given, newest first, so that secrets can be changed without a gap.
    """

    kind: ClassVar[str] = "webhook"
    wakes: ClassVar[bool] = False

    class Params(BaseModel):
        """Where to, and the secrets to sign with."""

        model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

        url: HttpUrl = Field(description="Address of the receiver.")
        secrets: list[SigningSecret] = Field(
            min_length=1,
            max_length=4,
            description="`whsec_` and 24 to 64 bytes in base64; the body is signed with each.",
        )

    def __init__(self, params: Params) -> None:
        self._params = params

    @classmethod
    def edits(cls, params: Any) -> bool:
        return False

    @property
    def buttons(self) -> bool:
        return False

    def payload(
        self, message: Message, incident: Incident, change: IncidentChange, *, now: float
    ) -> dict[str, Any]:
        """`{type, timestamp, data}` in less than 20,000 bytes; what does not fit is left out and named in `data.left_out`."""
        data: dict[str, Any] = {
            "id": message.incident,
            "dedup_key": message.dedup_key,
            "revision": message.revision,
            "state": incident.state.value,
            "severity": message.severity.name.lower(),
            "page": message.page,
            "title": fit(message.title, LINE, forwarded),
            "lines": [fit(line, LINE, forwarded) for line in message.lines],
            "at": finite(incident.at),
            "since": finite(incident.since),
            "root": {"kind": fit(incident.root.kind, 80), "name": fit(incident.root.name, 200)},
            "signal": fit(incident.signal, 120),
            "class": fit(incident.klass, 120),
            "sent_because": message.reason,
            "why": fit(message.why, LINE),
            "change": {
                "from": fit(change.old, 40),
                "to": fit(change.new, 40),
                "reason": fit(change.reason, 200),
                "at": finite(change.at),
            },
            "left_out": [],
            "links": [{"text": link.text, "url": link.url} for link in message.links],
            "scope": {fit(k, 80): fit(v, 200) for k, v in sorted(incident.scope.items())[:16]},
            "impact": _impact(incident.impact),
            "facts": {fit(k, 80): fit(v, 200) for k, v in message.facts},
            "details": [fit(line, LINE) for line in message.long.split("\n")],
        }
        body = {"type": event_type(message, change), "timestamp": iso(now), "data": data}
        for name in ("details", "facts", "scope", "links", "impact"):
            if len(dumps(body)) < BODY_BYTES:
                break
            del data[name]
            data["left_out"].append(name)
        return body

    async def send(self, client: httpx.AsyncClient, delivery: Delivery) -> Receipt:
        body = dumps(
            self.payload(delivery.message, delivery.incident, delivery.change, now=delivery.now)
        ).decode()
        headers = signed_headers(self._params.secrets, delivery.id, body, delivery.now)
        await post(
            client, self._params.url, body.encode(), now=delivery.now, what="the webhook", headers=headers
        )
        return delivery.receipt(delivery.id)


def event_type(message: Message, change: IncidentChange) -> str:
    """`incident.opened`, `incident.resolved`, `incident.reopened`, `incident.acknowledged` or `incident.updated`."""
    if message.reason in ("resolved", "reopened"):
        return f"incident.{message.reason}"
    if not change.old:
        return "incident.opened"
    return (
        "incident.acknowledged"
        if change.new == "acknowledged" and change.old != change.new
        else "incident.updated"
    )


def _impact(impact: Impact) -> dict[str, Any]:
    plain = msgspec.to_builtins(impact)
    shown: dict[str, Any] = {k: finite(v) for k, v in plain.items() if isinstance(v, (int, float))}
    for name in ("apps", "tenants"):
        rows = getattr(impact, name)[:10]
        shown[name] = [
            {"name": fit(n, 80), "calls": calls, "share": finite(share)} for n, calls, share in rows
        ]
    return shown
