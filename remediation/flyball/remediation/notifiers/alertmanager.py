"""Alerts into Prometheus Alertmanager (API v2), for those whose routes and silences already stand there.

Alertmanager forgets an alert that is not sent again, so an open incident is repeated, each time with an end a few repeats ahead:
when Flyball dies, its alerts end by themselves.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Final

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from flyball.core.incident import Incident, State
from flyball.remediation.http_guard import HttpUrl
from flyball.remediation.notifiers._base import Delivery, Receipt, dumps, finite, iso, post
from flyball.remediation.notifiers._text import fit, forwarded
from flyball.remediation.render import Message

LABELS: Final = 24
LABEL_VALUE: Final = 256
ANNOTATION: Final = 8000
_RESERVED: Final = frozenset({"alertname", "incident", "severity", "root_kind", "root", "signal", "class"})


class Alertmanager:
    """One alert per incident.

    An alert's labels are its identity there. When one of ours changes (severity rises, the root is found elsewhere), the alert under the
    old labels is ended in the same request; the receipt remembers them.
    """

    kind: ClassVar[str] = "alertmanager"
    wakes: ClassVar[bool] = False

    class Params(BaseModel):
        """Where Alertmanager is. It usually has a private address, which `egress` must allow."""

        model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

        url: HttpUrl = Field(
            description="Address without the path of the API, e.g. `http://alertmanager:9093`."
        )
        repeat_s: float = Field(
            60.0, ge=5, le=3600, description="Seconds between repeats while an incident is open."
        )
        labels: dict[str, str] = Field(
            default_factory=dict,
            max_length=10,
            description="Labels put on every alert, e.g. `{team: llm-platform}`.",
        )
        bearer_token: SecretStr | None = Field(None, description="Sent as `Authorization: Bearer …`.")

    def __init__(self, params: Params) -> None:
        self._params = params

    @classmethod
    def edits(cls, params: Any) -> bool:
        return True

    @property
    def buttons(self) -> bool:
        return False

    def payload(self, message: Message, incident: Incident, *, now: float) -> dict[str, Any]:
        """The alert; `now` is wall time, from which its end is counted."""
        resolved = incident.state is State.RESOLVED
        over_at = finite(incident.resolved_at or 0.0) or now
        ends = min(over_at, now) if resolved else now + 4 * self._params.repeat_s
        alert: dict[str, Any] = {
            "labels": self._labels(message, incident),
            "annotations": {
                "summary": fit(message.title, ANNOTATION, forwarded),
                "description": "\n".join(fit(line, ANNOTATION // 8, forwarded) for line in message.lines[1:]),
                "details": "\n".join(fit(line, 400, forwarded) for line in message.long.split("\n")[:16]),
                "why": fit(message.why, 400, forwarded),
            },
            # A start behind the end is refused as a whole, and event time may run ahead of ours.
            "startsAt": iso(min(finite(incident.since), ends)),
            "endsAt": iso(ends),
        }
        alert["annotations"] = {k: v for k, v in alert["annotations"].items() if v}
        if message.links:
            alert["generatorURL"] = message.links[0].url
        return alert

    def _labels(self, message: Message, incident: Incident) -> dict[str, str]:
        labels = {
            "alertname": "FlyballIncident",
            "incident": message.incident,
            "severity": message.severity.name.lower(),
            "root_kind": incident.root.kind,
            "root": incident.root.name,
            "signal": incident.signal,
            "class": incident.klass,
        }
        for name, value in [*self._params.labels.items(), *sorted(incident.scope.items())]:
            name = label_name(name)
            if name not in _RESERVED and len(labels) < LABELS:
                labels.setdefault(name, value)
        # An empty value means no label there.
        fitted = {k: fit(v, LABEL_VALUE, forwarded) for k, v in labels.items()}
        return {k: v for k, v in fitted.items() if v}

    async def send(self, client: httpx.AsyncClient, delivery: Delivery) -> Receipt:
        alert = self.payload(delivery.message, delivery.incident, now=delivery.now)
        alerts = [alert]
        if (old := _labels_of(delivery.previous)) and old != alert["labels"]:
            ends = iso(delivery.now)
            alerts.insert(
                0,
                {
                    "labels": old,
                    "annotations": {"summary": "goes on under other labels"},
                    "startsAt": iso(min(delivery.incident.since, delivery.now)),
                    "endsAt": ends,
                },
            )
        token = self._params.bearer_token
        headers = {"authorization": f"Bearer {token.get_secret_value()}"} if token else {}
        url = f"{self._params.url.rstrip('/')}/api/v2/alerts"
        await post(client, url, dumps(alerts), now=delivery.now, what="Alertmanager", headers=headers)
        again = None if delivery.incident.state is State.RESOLVED else delivery.now + self._params.repeat_s
        return delivery.receipt(json.dumps(alert["labels"], sort_keys=True), repeat_at=again)


def label_name(name: str) -> str:
    """A name as Prometheus allows it.

    >>> label_name("k8s.node"), label_name("9x"), label_name("")
    ('k8s_node', '_9x', '_')
    """
    name = re.sub(r"[^a-zA-Z0-9_]", "_", name[:64])
    # Two underscores in front are kept for Prometheus itself.
    name = re.sub(r"^__+", "_", name)
    return name if re.match(r"[a-zA-Z_]", name) else f"_{name}"


def _labels_of(previous: Receipt | None) -> dict[str, str]:
    if previous is None or not previous.ref or previous.state == State.RESOLVED:
        return {}
    try:
        found = json.loads(previous.ref)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
