"""The port that telemetry goes in by: the log of this process, or Kafka's topics. The HTTP interface does not know which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client.registry import Collector

from flyball.app.store.rows import DeadLetter
from flyball.core.events import Event
from flyball.core.ports import Clock

E = TypeVar("E")
E_contra = TypeVar("E_contra", contravariant=True)
"""What the edge makes of events before they are appended, in a thread where they are many: bytes of the log, lines of Kafka's records."""


class Intake(Protocol[E_contra]):
    """Takes what one body held, and says when it is durable.

    Raises: Overloaded when a budget is spent; Stopped or NotAccepted when nothing is taken. The future raises what became of
    the body otherwise: it resolves only when all of it is durable.
    """

    @property
    def clock(self) -> Clock: ...

    def admit(self, size: int, patient: bool = True) -> None:
        """Whether `size` more bytes may come in; senders that lose what they cannot send at once are turned away last."""

    def hold(self, size: int) -> None:
        """Counts bytes of a body that is being read against the budget; the same with a minus when it was handed over."""

    def ingest(
        self, events: list[Event], sender: str, received_at: float, *, format: str = "native",
        dead: Sequence[DeadLetter] = (), patient: bool = True, body: E_contra | None = None,
    ) -> Future[int]:  # fmt: skip
        """`body`: the events as the edge encoded them, where it has."""


@dataclass(frozen=True, slots=True)
class Edge(Generic[E]):
    """The way in of a process that has a runtime but does not append to its log, and what that adds to its pages.

    Args:
        encode: makes of events what the intake appends; called in any thread.
        received: events that are in, by format.
        rejected: events that could not be taken, by reason.
        ready: whether events are taken.
        status: what `GET /v1/status` shows beside the totals.
        metrics: what `/metrics` shows beside those of the runtime.
    """

    intake: Intake[E]
    encode: Callable[[list[Event]], E]
    received: Counter[str]
    rejected: Counter[str]
    ready: Callable[[], bool]
    status: Callable[[], dict[str, Any]]
    metrics: Callable[[], Iterable[Collector]]
