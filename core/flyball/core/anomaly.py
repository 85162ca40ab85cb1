"""An anomaly: a series that departed from its normal, with the evidence. Detectors never return a bare bool."""

from __future__ import annotations

from typing import Literal

import msgspec

from flyball.core.ids import short_id

Phase = Literal["on", "still", "off"]


class Anomaly(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="anomaly"):
    """One statement about one series.

    `phase`: `on` when it departs, `still` in every later window in which it stays away from normal, `off` once it is
    back to normal *with data*; silence of the series yields nothing at all.
    `score` is in nats of evidence (log of an e-value, or an equivalent stated by the detector) and `threshold` what it
    had to reach under the page budget; for rules without probability (an XID, a repeated call) both are stated by the rule.
    `observed` and `expected` share the unit that `unit` names. `id` is the same for on, still and off of one episode.
    """

    id: str
    detector: str
    signal: str
    """What departed: `llm.errors`, `llm.input_tokens`, `llm.output_tokens`, `llm.latency`, `llm.ttft`, `llm.cost`, `llm.cache`, `llm.retries`,
    `agent.loop`, `agent.spend`, `agent.context`, `agent.fan_out`, `gpu.fault`, `gpu.throttle`, `serving.queue`, `serving.kv_cache`,
    `serving.preemptions`, `serving.ttft`, `stream.silent`, `stream.poison`."""
    labels: dict[str, str]
    at: float
    """Event time of the statement: the window's end, or the event's `at`."""
    since: float
    """When the departure began: start of the first window (or first event) that shows it."""
    phase: Phase = "on"
    klass: str = ""
    """What kind of departure: a canonical error class, a loop pattern (`repeat`, `cycle`, …), an XID bucket, …"""
    observed: float = 0.0
    expected: float = 0.0
    unit: str = ""
    score: float = 0.0
    threshold: float = 0.0
    n: int = 0
    """How many events the observed value rests on."""
    impact: float = 0.0
    """Size in [0, 1] for severity: share of calls that fail, share of tokens in excess, …"""
    evidence: dict[str, float | int | str | list[str]] = {}
    """Named facts behind it, for people; every figure shown in an alert is found here or in the incident."""
    samples: tuple[str, ...] = ()
    """Ids of a few events that show it."""


def anomaly_id(detector: str, signal: str, klass: str, labels: dict[str, str], since: float) -> str:
    return short_id("ANO", detector, signal, klass, sorted(labels.items()), since, length=10)
