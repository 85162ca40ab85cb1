"""The working papers of one incident: what correlation remembers of it beyond what is shown."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from flyball.core.anomaly import Anomaly
from flyball.core.incident import Incident
from flyball.incidents.signals import AFTERMATH, FAILED_FAMILIES, FAMILY_NAMES, error_family, group_of

_SILENT_S: Final = 60.0
_AFTERMATH_S: Final = 60.0


class Member(msgspec.Struct):
    """One anomaly of an incident. A consequence of our own action counts, but neither leads nor keeps the incident open."""

    anomaly: Anomaly
    on: bool
    consequence: bool = False


class Effect(msgspec.Struct):
    """One of our directives for this incident, while it lasts and for a while after: whose side effects are not news."""

    directive: str
    kind: str
    scope: dict[str, str]
    to: dict[str, str]
    granted_at: float
    changed_at: float
    live: bool = True
    runbook: str = ""


class Tally(msgspec.Struct):
    """What the windows since the start add up to. `apps` and `tenants`: name → [affected calls, its calls meanwhile]."""

    calls: int = 0
    failed: int = 0
    usd: float = 0.0
    minutes: float = 0.0
    apps: dict[str, list[int]] = {}
    tenants: dict[str, list[int]] = {}
    models: dict[str, int] = {}
    regions: dict[str, int] = {}
    calls_now: int = 0
    failed_now: int = 0
    usd_per_min_now: float = 0.0
    tokens_per_min_now: float = 0.0
    estate_ratio_now: float = 0.0
    worst_ratio: float = 0.0
    """Largest failed share of one window of at least ten calls."""


class Case(msgspec.Struct):
    """One incident and its papers. `incident` is replaced, never changed."""

    incident: Incident
    leader: str
    members: dict[str, Member] = {}
    n_anomalies: int = 0
    by_entity: dict[str, int] = {}
    tally: Tally = msgspec.field(default_factory=Tally)
    factor: float = 1.0
    """How many times the expected the root's calls are (time, tokens, cost, number); 1.0 where that says nothing."""
    base_ratio: float = 0.0
    base_usd_per_min: float = 0.0
    effects: dict[str, Effect] = {}
    quiet_since: float | None = None
    data_at: float = 0.0
    no_data_told: bool = False
    ignored: dict[str, None] = {}
    """Anomalies that a person resolved away: their `still` brings nothing back, a new episode does."""
    told_at: float = 0.0
    dirty: bool = False
    """Whether figures changed since they were last told."""
    notes: list[str] = []
    loud: bool = False
    opening: bool = False
    merged_into: str = ""

    @property
    def lead(self) -> Anomaly:
        return self.members[self.leader].anomaly

    @property
    def group(self) -> str:
        return group_of(self.incident.signal)

    @property
    def families(self) -> tuple[int, ...]:
        """Error families that count as failed calls of this incident; all of them where it is not about errors."""
        if self.group != "errors":
            return FAILED_FAMILIES
        wanted = {error_family(self.incident.klass)}
        for m in self.members.values():
            if m.anomaly.signal == self.incident.signal and not m.consequence:
                wanted.add(error_family(m.anomaly.klass))
        return (
            FAILED_FAMILIES
            if "any" in wanted
            else tuple(i for i in FAILED_FAMILIES if FAMILY_NAMES[i] in wanted)
        )

    def active(self) -> list[Anomaly]:
        """Anomalies that are on and not our own doing, in the order in which they joined."""
        return [m.anomaly for m in self.members.values() if m.on and not m.consequence]

    def holding(self) -> list[Anomaly]:
        """Active anomalies that keep the incident from being over. Two kinds do not, once another was heard to end: those
        that have said nothing for long (series without traffic), and aftermath (retries, cost, cold caches) a while
        after the last of what led to it."""
        ended = [m.anomaly for m in self.members.values() if not m.on and not m.consequence]
        last_end = max((a.at for a in ended), default=0.0)
        found = [a for a in self.active() if last_end - a.at <= _SILENT_S]
        if any(group_of(a.signal) not in AFTERMATH for a in found) or self.group in AFTERMATH:
            return found
        led_until = max((a.at for a in ended if group_of(a.signal) not in AFTERMATH), default=None)
        return found if led_until is None else [a for a in found if a.at - led_until <= _AFTERMATH_S]

    def primary(self) -> list[Anomaly]:
        return [m.anomaly for m in self.members.values() if not m.consequence]

    def live_effects(self) -> list[Effect]:
        return [e for e in self.effects.values() if e.live]


def copy_of(value: Any) -> Any:
    """A deep copy through the codec, so that two holders never share a dict."""
    return msgspec.convert(msgspec.to_builtins(value), type(value))
