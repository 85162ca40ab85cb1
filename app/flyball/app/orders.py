"""What moves the pipeline beside events and time, each as a record of the log: the word of people, reports, runbooks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, TypeAlias

import msgspec

from flyball.core.directives import Approval, Enforced, OperationReport, Release, StopChange
from flyball.core.plans import Actions, Mode
from flyball.runbooks.loader import Runbook, RunbookErrors, RunbookSet, check_runbook


class Command(msgspec.Struct, frozen=True, tag_field="type", tag="command"):
    """A person's word about an incident: `ack`, `resolve`, `silence`, `reopen`."""

    kind: str
    incident: str
    by: str
    at: float
    until: float | None = None


class RunbookText(msgspec.Struct, frozen=True):
    """One runbook as it is written, and the mode that it has here."""

    path: str
    text: str
    source: Literal["packaged", "directory"]
    mode: Mode


class RunbookTexts(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="runbooks"):
    """The runbooks that count from here on. In the log, so that whoever reads it again decides with the same ones."""

    at: float
    runbooks: tuple[RunbookText, ...]
    ceiling: Mode
    by: str = "flyball"

    @classmethod
    def of(cls, runbooks: Iterable[Runbook], ceiling: Mode, at: float) -> RunbookTexts:
        texts = (RunbookText(r.path, r.text, r.source, r.mode) for r in runbooks)
        return cls(at=at, ceiling=ceiling, runbooks=tuple(texts))

    def load(self, actions: Actions) -> RunbookSet:
        """Raises: RunbookErrors when this version refuses any of them."""
        loaded, wrong = [], []
        for item in self.runbooks:
            runbook, errors = check_runbook(item.text, item.path, actions, item.source)
            wrong += errors
            if runbook is not None:
                loaded.append(replace(runbook, mode=item.mode))
        if wrong:
            raise RunbookErrors(wrong)
        return RunbookSet(tuple(loaded))


class Fault(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="fault"):
    """A record that made a stage raise was left out. What Flyball says about itself."""

    at: float
    position: int
    kind: str
    """Of the record: `events`, `tick`, `order`."""
    reason: str


Order: TypeAlias = (
    Command | Enforced | Approval | StopChange | Release | OperationReport | RunbookTexts | Fault
)
"""All of them are told apart by their tag `type`."""

_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


def decode_order(body: bytes) -> Order:
    """The inverse of `encode_order`. Raises: msgspec.DecodeError on damaged bytes."""
    return _decoder.decode(body)


def encode_order(order: Order) -> bytes:
    return msgspec.msgpack.encode(order)


def author_of(order: Order) -> str:
    """Who gave it: a person, an enforcement point, a hook's operation, Flyball."""
    if isinstance(order, Enforced):
        return order.point
    if isinstance(order, OperationReport):
        return order.id
    if isinstance(order, Fault):
        return "flyball"
    return order.by
