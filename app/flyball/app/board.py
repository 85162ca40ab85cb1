"""The set of live directives as enforcement points read it: with an ETag, and a long poll that wakes on change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from hashlib import blake2b

import msgspec

from flyball.app.switchboard import Draft, Switchboard, exempted
from flyball.core.directives import Directive
from flyball.core.ports import Clock


class DirectiveBoard:
    """Written by the runtime after a commit, read by the HTTP interface. What has expired is never shown, whatever else happens.

    It knows two things of a lease: as the stages have it, and as enforcement points see it. They differ while a stop holds:
    see `switchboard`.
    """

    def __init__(self, clock: Clock, switchboard: Switchboard | None = None) -> None:
        self._clock = clock
        self._switchboard = switchboard or Switchboard()
        self._live: dict[str, Directive] = {}
        self._shown: dict[str, Directive] = {}
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._closed = False

    def put(self, directives: Iterable[Directive], shown: Mapping[str, Directive] | None = None) -> None:
        """All live leases, and what enforcement points saw of them before a restart (without it: all)."""
        live = {d.id: d for d in directives}
        seen = live if shown is None else shown
        self._live, self._shown = live, {d: seen[d] for d in live if d in seen}
        self._wake()

    def live(self) -> dict[str, Directive]:
        """The leases as the stages have them, by id."""
        return self._live

    def draft(self) -> Draft:
        """A copy of what is shown, to be changed within a transaction."""
        return Draft(self._switchboard.stops, dict(self._live), dict(self._shown))

    def publish(self, draft: Draft) -> None:
        """What the draft holds is durable: enforcement points see it from now on."""
        self._switchboard.set(draft.stops)
        self._live, self._shown = draft.live, draft.shown
        self._wake()

    def read(self) -> tuple[str, list[Directive]]:
        """The ETag and the directives in force now, ordered by id."""
        now, stops = self._clock.now(), self._switchboard.stops
        live = sorted(
            (exempted(d, stops) for d in self._shown.values() if d.expires_at > now), key=lambda d: d.id
        )
        tag = blake2b(msgspec.json.encode(live), digest_size=10).hexdigest()
        return f'"{tag}"', live

    async def wait(self, etag: str, wait_s: float) -> tuple[str, list[Directive]]:
        """As `read`, but while it still has this ETag waits up to `wait_s` seconds for another."""
        event = asyncio.Event()
        waiter = (asyncio.get_running_loop(), event)
        self._waiters.add(waiter)
        try:
            found = self.read()
            if found[0] != etag or wait_s <= 0 or self._closed:
                return found
            # An expiry is a change too, and nobody announces it.
            first = min((d.expires_at for d in found[1]), default=float("inf")) - self._clock.now()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), max(0.0, min(wait_s, first + 0.01)))
            return self.read()
        finally:
            self._waiters.discard(waiter)

    @property
    def waiting(self) -> int:
        """How many long polls wait for a change."""
        return len(self._waiters)

    def close(self) -> None:
        """Ends every wait, and lets none begin: the process is stopping."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for loop, event in list(self._waiters):
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(event.set)
