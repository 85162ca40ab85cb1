"""From incident changes to messages sent: which channels hear of a change, and the durable outbox between the two."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
from rich.console import Console

from flyball.app.embedded import Embedded
from flyball.app.settings import Settings
from flyball.app.store import outbox
from flyball.app.store.rows import OutboxRow as StoredRow
from flyball.core.ids import short_id
from flyball.core.incident import IncidentChange
from flyball.remediation.http_guard import guarded_client
from flyball.remediation.notifiers import NotifySettings
from flyball.remediation.notifiers._base import Receipt
from flyball.remediation.outbox import Dispatcher, OutboxRow, build_notifiers
from flyball.remediation.render import Renderer


class AlertRouter:
    """Turns an incident's change into rows of the outbox. Remembers which channels were told of an incident, to tell them how it goes on."""

    def __init__(self, settings: NotifySettings) -> None:
        self._settings = settings
        self.told: dict[str, set[str]] = {}

    def __call__(self, change: IncidentChange) -> list[StoredRow]:
        i = change.incident
        told = self.told.get(i.id, set())
        routes = self._settings.routes(change, told)
        if not routes:
            return []
        self.told.setdefault(i.id, set()).update(r.channel for r in routes)
        body = msgspec.json.encode(change)
        return [
            StoredRow(
                id=short_id("MSG", i.id, i.revision, route.channel, length=14),
                incident=i.id,
                revision=i.revision,
                channel=route.channel,
                created_at=change.at,
                due_at=0.0,
                why=route.why,
                body=body,
            )
            for route in routes
        ]


class StoredOutbox:
    """The dispatcher's outbox on the runtime's database."""

    def __init__(self, runtime: Embedded) -> None:
        self._runtime = runtime

    async def due(self, now: float, limit: int) -> Sequence[OutboxRow]:
        with self._runtime.reader.connect() as c:
            found = outbox.due_outbox(c, now, limit)
        return [
            OutboxRow(r.id, r.incident, r.revision, r.channel, r.body, r.why, r.attempts, receipt)
            for r, receipt in found
        ]

    async def done(self, id: str, receipt: Receipt) -> None:
        text = receipt.to_text() if receipt.status == "sent" else ""
        repeat_at = receipt.repeat_at if receipt.status == "sent" else None
        await self._write(
            partial(outbox.finish_outbox, row_id=id, state=receipt.status, receipt=text, repeat_at=repeat_at)
        )

    async def retry(self, id: str, at: float, why: str) -> None:
        await self._write(partial(outbox.postpone_outbox, row_id=id, at=at))

    async def dead(self, id: str, why: str) -> None:
        await self._write(partial(outbox.finish_outbox, row_id=id, state="dead"))

    async def _write(self, work: Any) -> None:
        await asyncio.wrap_future(self._runtime.write(work))


def notifications(runtime: Embedded, settings: Settings) -> Iterator[Coroutine[None, None, None]]:
    """The dispatcher, where any channel is set."""
    if settings.notify.channels:
        yield _dispatch(runtime, settings)


async def _dispatch(runtime: Embedded, settings: Settings) -> None:
    notify = settings.notify
    url = settings.public_url or f"http://{settings.host}:{settings.port}"
    async with guarded_client(notify.egress.allowed()) as client:
        dispatcher = Dispatcher(
            StoredOutbox(runtime),
            build_notifiers(notify.channels, Console(stderr=True)),
            Renderer(notify.templates, public_url=url),
            client,
            clock=runtime.clock,
            rng=random.Random(),
        )
        await dispatcher.run(asyncio.Event())
