"""The seams: small protocols that the parts of the house meet at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from flyball.core.anomaly import Anomaly
from flyball.core.columns import Window
from flyball.core.events import Event

In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)


class Stage(Protocol[In, Out]):
    """A pure step of the way of the data. The same input gives the same output, whatever the clock says.

    `snapshot` and `restore` at any point change nothing that comes after.
    """

    def feed(self, batch: Sequence[In]) -> Sequence[Out]: ...
    def tick(self, now: float) -> Sequence[Out]: ...
    def snapshot(self) -> bytes: ...
    def restore(self, state: bytes) -> None: ...


class Clock(Protocol):
    """Wall time. Only shells (app, streams.sources, remediation transports) hold one; pure parts get time as data."""

    def now(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Rejected:
    """One event (or a whole body) that could not be taken. Goes to the dead letters with its bytes."""

    reason: str
    """Low-cardinality word: `json`, `protobuf`, `type`, `negative`, `timestamp`, `missing_field`, …"""
    detail: str
    """One sentence for a person: what, where, and what would be right. Holds no content of the body."""
    data: bytes
    index: int = 0


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a format made of one body."""

    events: list[Event]
    rejected: list[Rejected] = field(default_factory=list)
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Understood and left out on purpose, by reason: roll-up spans, health probes, other signals."""


class Format(Protocol):
    """How bytes of one kind become events. Stateless; content never passes it."""

    kind: ClassVar[str]

    def decode(self, body: bytes, content_type: str = "") -> Decoded: ...


@runtime_checkable
class WindowDetector(Protocol):
    """Judges series over closed windows."""

    kind: ClassVar[str]
    reads: ClassVar[Literal["windows"]]

    def feed(self, batch: Sequence[Window]) -> Sequence[Anomaly]: ...
    def tick(self, now: float) -> Sequence[Anomaly]: ...
    def snapshot(self) -> bytes: ...
    def restore(self, state: bytes) -> None: ...


@runtime_checkable
class EventDetector(Protocol):
    """Judges single events as they come: agent runs, GPU samples. `types` are the event types it wants to see."""

    kind: ClassVar[str]
    reads: ClassVar[Literal["events"]]
    types: ClassVar[tuple[type, ...]]

    def feed(self, batch: Sequence[Event]) -> Sequence[Anomaly]: ...
    def tick(self, now: float) -> Sequence[Anomaly]: ...
    def snapshot(self) -> bytes: ...
    def restore(self, state: bytes) -> None: ...


Detector = WindowDetector | EventDetector
