"""Records of the log: what moves the pipeline, on its way in and as it is read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

from sqlalchemy import Connection

from flyball.app.orders import Order, decode_order
from flyball.app.store.rows import DeadLetter, LogRow
from flyball.core.codec import decode_events
from flyball.core.directives import Intervention
from flyball.core.events import Batch
from flyball.streams.portion import Portion, decode_portion

Payload: TypeAlias = "Batch | Portion | float | Order"
"""A batch of events, a portion of a source partition, the time of a tick, or what people, points and hooks say."""


@dataclass(slots=True)
class Append:
    """One record on its way into the log. `done` resolves to its position once it is durable."""

    kind: str
    sender: str
    received_at: float
    body: bytes
    payload: Payload
    n: int = 0
    format: str = ""
    dead: Sequence[DeadLetter] = ()
    done: Future[int] = field(default_factory=Future)
    answer: Future[Intervention] | None = None
    """What became of a person's word; resolved once that is durable too."""
    also: Callable[[Connection], object] | None = None
    """What is stored with it, in the same transaction."""


@dataclass(slots=True)
class Work:
    """Something to do on the writer's connection, in the transaction of whatever else is due."""

    run: Callable[[Connection], object]
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Record:
    """One durable record, decoded."""

    position: int
    received_at: float
    size: int
    n: int
    payload: Payload


def record_of(row: LogRow) -> Record:
    """A row of the log, read back."""
    return Record(row.id, row.received_at, len(row.body), row.n, _payload(row))


def _payload(row: LogRow) -> Payload:
    if row.kind == "events":
        return Batch(events=decode_events(row.body), sender=row.sender, received_at=row.received_at)
    if row.kind == "portion":
        return decode_portion(row.body)
    if row.kind == "tick":
        return row.received_at
    return decode_order(row.body)
