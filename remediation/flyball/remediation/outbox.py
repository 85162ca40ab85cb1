"""Sends what stands in the durable outbox: at least once, the newest state of an incident first, and it says why.

Notifications fail open: when it is not known whether a message arrived, it is sent again, and its key tells copies. The outbox
itself is the caller's (a table written in the same transaction as the incident); it is reached by the small port `OutboxStore`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import httpx
import msgspec
import structlog
from rich.console import Console

from flyball.core.errors import Ambiguous, EffectError, Failed, NotAccepted
from flyball.core.incident import IncidentChange
from flyball.core.ports import Clock
from flyball.remediation.http_guard import AddressRefused
from flyball.remediation.notifiers._base import Delivery, Gone, Notifier, Receipt
from flyball.remediation.notifiers._settings import Channel
from flyball.remediation.render import Audience, Renderer

_log = structlog.get_logger(__name__)

RETRY_S: Final[tuple[float, ...]] = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, *(3600.0,) * 22)
"""Waits between tries: quick while it may be a hiccup, then up to an hour; about a day in all."""
FAILED_RETRY_S: Final[tuple[float, ...]] = (30.0, 300.0)
"""Waits after the other side said no. It is tried again a little, because the no is often a proxy's in the middle of a roll-out."""
JITTER: Final = 0.25


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One message that waits for one channel.

    id: depends on incident, channel and revision only; it is the message's id for the other side.
    change: the incident's change as JSON (`msgspec.json.encode(change)`).
    why: the rule that chose the channel, for the alert's last line.
    attempts: tries so far.
    receipt: text of the last receipt with status `sent` for the same incident and channel, of any revision; empty when there is none.
    """

    id: str
    incident: str
    revision: int
    channel: str
    change: bytes
    why: str = ""
    attempts: int = 0
    receipt: str = ""


class OutboxStore(Protocol):
    """The durable outbox. Each call is one transaction."""

    async def due(self, now: float, limit: int) -> Sequence[OutboxRow]:
        """Rows whose time has come, oldest first."""
        ...

    async def done(self, id: str, receipt: Receipt) -> None:
        """The row is finished (sent, superseded or skipped).

        With `receipt.repeat_at`, it comes back from `due` at that time with `attempts` 0, unless there is a row of a higher
        revision by then.
        """
        ...

    async def retry(self, id: str, at: float, why: str) -> None:
        """The row is due again at `at`; counts one attempt."""
        ...

    async def dead(self, id: str, why: str) -> None:
        """The row is given up."""
        ...


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How hard it tries.

    concurrency: sends at once; per_channel: of them to one channel, so that a slow one does not hold up the rest.
    deadline_s: for one send, all in all.
    """

    concurrency: int = 16
    per_channel: int = 4
    deadline_s: float = 30.0
    poll_s: float = 1.0
    batch: int = 64


def build_notifiers(channels: Sequence[Channel], console: Console | None = None) -> dict[str, Notifier]:
    """The notifiers of the settings, by channel. `console` is where terminal channels print."""
    made: dict[str, Notifier] = {}
    for channel in channels:
        kind = channel.notifier_class
        made[channel.name] = (
            kind(channel.params, console) if channel.kind == "terminal" else kind(channel.params)
        )
    return made


class Dispatcher:
    """Takes due rows from the store and sends them.

    Of several unsent rows for one incident and channel only the newest is sent; the others are superseded once it is. Messages of one
    incident to one channel go one after another. Counts what happened in `counts`: `sent`, `superseded`, `retried`, `dead`, `faulty`.

    Args:
        notifiers: by channel (`build_notifiers`); rows of a channel that is not among them are given up.
        client: for all sends; `http_guard.guarded_client` in production.
        clock: wall time. rng: seeded by the caller, for jitter.
    """

    def __init__(
        self,
        store: OutboxStore,
        notifiers: Mapping[str, Notifier],
        renderer: Renderer,
        client: httpx.AsyncClient,
        *,
        clock: Clock,
        rng: random.Random,
        settings: DispatchSettings | None = None,
    ) -> None:
        self._store, self._notifiers, self._renderer, self._client = store, notifiers, renderer, client
        self._clock, self._rng = clock, rng
        self._settings = settings or DispatchSettings()
        self._busy: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._sizes: dict[tuple[str, str], int] = {}
        self._all = asyncio.Semaphore(self._settings.concurrency)
        self._of_channel = {name: asyncio.Semaphore(self._settings.per_channel) for name in notifiers}
        self._held_until: dict[str, float] = {}
        self._refusals: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self.counts: Counter[str] = Counter()

    def wake(self) -> None:
        """There is something new in the store."""
        self._wake.set()

    async def drain(self) -> None:
        """Sends everything that is due now, and returns when the last of it is done or put off."""
        while await self._start_due() or self._busy:
            await asyncio.wait(self._busy.values(), return_when=asyncio.FIRST_COMPLETED)
            self._reap()

    async def run(self, stop: asyncio.Event) -> None:
        """Goes on until `stop`; then lets what is being sent finish, within its deadline."""
        stopped = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                await self._start_due()
                woken = asyncio.create_task(self._wake.wait())
                await asyncio.wait(
                    {stopped, woken, *self._busy.values()},
                    timeout=self._settings.poll_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                woken.cancel()
                self._reap()
            if self._busy:
                await asyncio.wait(self._busy.values())
                self._reap()
        finally:
            stopped.cancel()
            for task in self._busy.values():
                task.cancel()

    async def _start_due(self) -> bool:
        now = self._clock.now()
        groups: dict[tuple[str, str], list[OutboxRow]] = {}
        for row in await self._store.due(now, self._settings.batch + sum(self._sizes.values())):
            key = (row.channel, row.incident)
            if key not in self._busy:
                groups.setdefault(key, []).append(row)
        for key, rows in groups.items():
            self._sizes[key] = len(rows)
            self._busy[key] = asyncio.create_task(self._deliver(rows), name=f"notify {key[0]} {key[1]}")
        return bool(groups)

    def _reap(self) -> None:
        for key, task in list(self._busy.items()):
            if task.done():
                del self._busy[key], self._sizes[key]
                # A store that fails is not ours to mend: it comes out here.
                task.result()

    async def _deliver(self, rows: list[OutboxRow]) -> None:
        """One incident on one channel: the newest of `rows` is sent for all of them."""
        rows = sorted(rows, key=lambda r: r.revision)
        newest = rows[-1]
        previous = Receipt.from_text(newest.receipt) if newest.receipt else None
        if newest.channel not in self._notifiers:
            await self._give_up(rows, f"channel {newest.channel!r} is not in the settings any more")
            return
        if previous is not None and newest.revision < previous.revision:
            # Its time came after a newer one had already gone out.
            await self._supersede(rows, previous)
            return
        now = self._clock.now()
        if (held := self._held_until.get(newest.channel, 0.0)) > now:
            for row in rows:
                await self._store.retry(row.id, held, "the channel asked to wait")
            return
        try:
            changes = [msgspec.json.decode(row.change, type=IncidentChange) for row in rows]
        except (msgspec.DecodeError, msgspec.ValidationError) as e:
            await self._give_up(rows, f"the row cannot be read: {e}")
            return
        # The channel's own turn first: a slow channel's queue must not sit on the places that all share.
        async with self._of_channel[newest.channel], self._all:
            await self._send(rows, changes, previous)

    async def _send(
        self, rows: list[OutboxRow], changes: list[IncidentChange], previous: Receipt | None
    ) -> None:
        newest = rows[-1]
        notifier = self._notifiers[newest.channel]
        audience = Audience(
            kind=notifier.kind,
            name=newest.channel,
            why=newest.why,
            first=previous is None,
            interactive=notifier.buttons,
        )
        message = self._renderer.render(changes[-1], audience)
        if message.fallback:
            _log.warning("notify.template_failed", channel=newest.channel, why=message.fallback)
        delivery = Delivery(
            id=newest.id,
            message=message,
            change=changes[-1],
            now=self._clock.now(),
            notify=any(c.notify for c in changes),
            previous=previous,
        )
        sending = asyncio.create_task(notifier.send(self._client, delivery))
        try:
            await asyncio.wait({sending}, timeout=self._settings.deadline_s)
        finally:
            sending.cancel()
        await asyncio.wait({sending})
        if sending.cancelled():
            await self._failed(rows, Ambiguous(f"no answer within {self._settings.deadline_s:g} s"))
            return
        error = sending.exception()
        if error is None:
            await self._sent(rows, sending.result(), message.reason)
        elif isinstance(error, EffectError):
            await self._failed(rows, error)
        elif isinstance(error, Exception):
            # A notifier of our own or somebody's with a fault in it: one channel's bug must not silence the others.
            self.counts["faulty"] += 1
            _log.error("notify.faulty", channel=newest.channel, kind=notifier.kind, error=repr(error)[:200])
            await self._failed(rows, Failed(f"the notifier has a fault: {type(error).__name__}"))
        else:
            raise error

    async def _sent(self, rows: list[OutboxRow], receipt: Receipt, reason: str) -> None:
        newest = rows[-1]
        await self._store.done(newest.id, receipt)
        self._refusals.pop(newest.id, None)
        self.counts["sent"] += 1
        _log.info(
            "notify.sent",
            channel=newest.channel,
            incident=newest.incident,
            revision=newest.revision,
            because=reason,
        )
        await self._supersede(rows[:-1], receipt)

    async def _supersede(self, rows: Sequence[OutboxRow], by: Receipt) -> None:
        for row in rows:
            await self._store.done(row.id, Receipt(status="superseded", at=by.at, revision=by.revision))
            self.counts["superseded"] += 1

    async def _give_up(self, rows: Sequence[OutboxRow], why: str) -> None:
        for row in rows:
            self._refusals.pop(row.id, None)
            await self._store.dead(row.id, why)
            self.counts["dead"] += 1
            _log.error(
                "notify.dead", channel=row.channel, incident=row.incident, revision=row.revision, why=why
            )

    async def _failed(self, rows: list[OutboxRow], error: EffectError) -> None:
        newest = rows[-1]
        waits, tried = RETRY_S, newest.attempts
        if isinstance(error, Failed):
            # Counted apart, in memory: a no after an hour's outage is a first no. A restart gives a few more tries, no fewer.
            waits, tried = FAILED_RETRY_S, self._refusals[newest.id]
            self._refusals[newest.id] += 1
        if isinstance(error, (Gone, AddressRefused)) or tried >= len(waits):
            await self._give_up(rows, f"{error} (try {newest.attempts + 1})")
            return
        now = self._clock.now()
        wait = waits[tried] * (1 + JITTER * self._rng.random())
        if isinstance(error, NotAccepted) and error.retry_after_s is not None:
            wait = max(wait, error.retry_after_s)
            self._held_until[newest.channel] = now + error.retry_after_s
        # All of them at the same time, so that they come back together and the older ones are superseded.
        for row in rows:
            await self._store.retry(row.id, now + wait, str(error))
        self.counts["retried"] += 1
        _log.warning(
            "notify.put_off",
            channel=newest.channel,
            incident=newest.incident,
            wait_s=round(wait, 1),
            why=str(error),
        )
