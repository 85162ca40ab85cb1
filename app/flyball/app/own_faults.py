"""What Flyball says about itself, as anomalies that open incidents like any other."""

from __future__ import annotations

from flyball.app.orders import Fault
from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.streams.portion import Halt


def own_fault(fault: Fault) -> Anomaly:
    """A record had to be left out."""
    labels = {"sender": "flyball"}
    return Anomaly(
        id=anomaly_id("flyball", "stream.poison", "fault", labels, fault.at), detector="flyball", signal="stream.poison",
        klass="fault", labels=labels, at=fault.at, since=fault.at, observed=1.0, threshold=1.0, score=1.0, n=1, unit="records",
        evidence={"record": fault.position, "kind": fault.kind, "reason": fault.reason},
    )  # fmt: skip


def standing(source: str, halt: Halt, at: float, phase: Phase) -> Anomaly:
    """A source of portions stands (`on`, `still`), or goes on again (`off`)."""
    return Anomaly(
        id=anomaly_id("flyball", "stream.poison", "stands", {"source": source}, halt.at), detector="flyball",
        signal="stream.poison", klass="stands", labels={"sender": "flyball"}, at=at, since=min(halt.at, at), phase=phase,
        observed=halt.share, threshold=halt.limit, score=halt.share, n=halt.of, unit="ratio", impact=halt.share,
        evidence={"source": source, "record": halt.offset, "reason": halt.reason, "bad": halt.bad, "of": halt.of},
    )  # fmt: skip
