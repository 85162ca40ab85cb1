"""Records of the log: what moves the pipeline, on its way in and as it is read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
from sqlalchemy import Connection

from flyball.app.store.store import DeadLetter, LogRow
from flyball.core.codec import decode_events
from flyball.core.directives import Enforced
from flyball.core.events import Batch


class Command(msgspec.Struct, frozen=True):
    """A person's word about an incident, as a record of the log."""

    kind: str
    incident: str
    by: str
    at: float
    until: float | None = None


Payload: TypeAlias = "Batch | float | Command | Enforced"
"""A batch of events, the time of a tick, a person's command, an enforcement point's report."""


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
    if row.kind == "tick":
        return row.received_at
    if row.kind == "command":
        return msgspec.msgpack.decode(row.body, type=Command)
    return msgspec.msgpack.decode(row.body, type=Enforced)
