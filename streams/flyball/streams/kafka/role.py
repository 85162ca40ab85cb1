"""How the role `windows` is set, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flyball.streams.kafka.breaker import PoisonSettings
from flyball.streams.portion import Halt


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """Args:
    cut_s: how often a portion is sent.
    snapshot_s: how often changed state is stored, at most.
    idle_s: a partition read to its end that had nothing for so long is told to be idle.
    stuck_s: without progress for so long while there is something to read, or out of the group, the role ends.
    most: records read at once, where they hold few events each.
    poison: when a partition stands because too much of it is bad.
    """

    cut_s: float = 0.5
    snapshot_s: float = 5.0
    idle_s: float = 2.0
    stuck_s: float = 60.0
    most: int = 5000
    poison: PoisonSettings = field(default_factory=PoisonSettings)


@dataclass(frozen=True, slots=True)
class RoleFigures:
    """How the role stands; counters are since the process began.

    By partition: `lag` (records that wait), `halts` (those that stand, and why), `state_bytes` (newest snapshot of each).
    """

    records: int
    events: int
    rejected: Mapping[str, int]
    """By reason."""
    late: int
    portions: int
    portion_bytes: int
    snapshots: int
    snapshot_bytes: int
    rebalances: int
    stopped: int
    """How often a partition came to stand."""
    owned: Sequence[str]
    lag: Mapping[str, int]
    halts: Mapping[str, Halt]
    state_bytes: Mapping[str, int]


__all__ = ["RoleFigures", "RoleSettings"]
