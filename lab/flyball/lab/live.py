"""Drives a running Flyball over HTTP at live speed, for the demo and for trying things out.

Every simulated sender posts its own batches; the simulated gateway reads the leases in force back and obeys them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import msgspec

from flyball.core.directives import Directive
from flyball.core.errors import ConfigError
from flyball.lab.estate import default_estate
from flyball.lab.export import to_ndjson
from flyball.lab.faults import AnyFault
from flyball.lab.scenario import REPORT_S
from flyball.lab.sim import Simulator

SENDER_HEADER: Final = "X-Flyball-Sender"
TICK_S: Final = 0.5
HISTORY_STEP_S: Final = 15.0
_directives = msgspec.json.Decoder(list[dict[str, Any]])


@dataclass
class Tick:
    """Where a live run stands; handed to `on_tick` about twice a second."""

    elapsed_s: float
    events_sent: int
    events_refused: int
    calls: int
    directives: Sequence[Directive]
    applied: dict[str, int]
    """Directive id → calls it was applied to so far."""
    problem: str = ""
    """What went wrong with the last request, if anything; the run goes on."""


@dataclass
class LiveLab:
    """The estate at live speed against `base_url`.

    Args:
        base_url: of a running Flyball, e.g. `http://127.0.0.1:4390`.
        faults: a function of the moment the run starts, so that their times can be given relative to it.
        rate: logical calls a second.
        token: bearer token, where the server wants one.
        controls: where leases are read and reported to, when not at `base_url`: on Kafka, the workers that may own the database.
        transport: for tests; httpx's own otherwise.
        clock: seconds since the epoch.
    """

    base_url: str
    seed: int = 1
    faults: Callable[[float], Sequence[AnyFault]] = lambda start: ()
    rate: float = 20.0
    token: str = ""
    controls: Sequence[str] = ()
    transport: httpx.AsyncBaseTransport | None = None
    clock: Callable[[], float] = time.time
    pause: Callable[[float], Any] = asyncio.sleep
    on_live: Callable[[], object] = lambda: None
    """Called once, when the history is sent."""
    directives: list[Directive] = field(default_factory=list)
    applied: dict[str, int] = field(default_factory=dict)
    _etag: str = ""
    _sent: int = 0
    _refused: int = 0
    _reported: float = 0.0

    async def run(
        self, duration_s: float, on_tick: Callable[[Tick], None] | None = None, *, history_s: float = 0.0
    ) -> Tick:
        """Sends what arrives in the next `duration_s` of real time; returns how it stood at the end.

        `history_s` of quiet traffic before now is sent first, as fast as the server takes it: it lets the server know what
        is normal, where the server is ready to take old events.

        Raises: ConfigError when the server cannot be reached at the start.
        """
        start = self.clock()
        sim = Simulator(default_estate(self.rate), self.seed, start - history_s)
        for fault in self.faults(start):
            sim.add_fault(fault)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        async with httpx.AsyncClient(
            base_url=self.base_url, headers=headers, timeout=5.0, transport=self.transport
        ) as client:
            try:
                await client.get("/healthz")
            except httpx.TransportError as e:
                raise ConfigError(
                    f"no Flyball at {self.base_url} ({e}); start one with `flyball run`", where="lab"
                ) from e
            problem = ""
            while sim.now < start:
                # In slices, so that the senders' bodies interleave as they would have.
                problem = await self._post(client, sim, min(sim.now + HISTORY_STEP_S, start))
            self.on_live()
            while True:
                now = min(self.clock(), start + duration_s)
                problem = (
                    await self._post(client, sim, now)
                    or await self._read_directives(client, sim, now)
                    or await self._report(client, sim)
                )
                tick = self._tick(sim, now - start, problem)
                if on_tick is not None:
                    on_tick(tick)
                if now >= start + duration_s:
                    return tick
                await self.pause(TICK_S)

    async def _report(self, client: httpx.AsyncClient, sim: Simulator) -> str:
        """Tells what the gateway applied since the last report, as an enforcement point does."""
        if not self.directives or sim.now - self._reported < REPORT_S:
            return ""
        self._reported = sim.now
        report = sim.enforced()
        if report is None:
            return ""
        for name, hits in report.directives.items():
            self.applied[name] = self.applied.get(name, 0) + hits
        try:
            told = {"point": report.point, "directives": report.directives}
            answer = await self._ask_control(client, "POST", "/v1/enforced", json=told)
        except httpx.TransportError as e:
            return f"report not delivered: {type(e).__name__}"
        return "" if answer.is_success else f"POST /v1/enforced answered {answer.status_code}"

    async def _ask_control(
        self, client: httpx.AsyncClient, method: str, path: str, **more: Any
    ) -> httpx.Response:
        """What the first says that is in charge: one that stands by answers 503, or not at all."""
        *others, last = self.controls or (self.base_url,)
        for url in others:
            with contextlib.suppress(httpx.TransportError):
                answer = await client.request(method, url.rstrip("/") + path, **more)
                if answer.status_code != 503:
                    return answer
        return await client.request(method, last.rstrip("/") + path, **more)

    def _tick(self, sim: Simulator, elapsed_s: float, problem: str) -> Tick:
        return Tick(
            elapsed_s,
            self._sent,
            self._refused,
            sim.totals.calls,
            tuple(self.directives),
            dict(self.applied),
            problem,
        )

    async def _post(self, client: httpx.AsyncClient, sim: Simulator, until: float) -> str:
        """Posts every batch that is due, each sender's in its own order; returns what went wrong, if anything."""
        problem = ""
        by_sender: dict[str, list[bytes]] = {}
        counts: dict[str, int] = {}
        for batch in sim.step(until):
            by_sender.setdefault(batch.sender, []).append(to_ndjson(batch))
            counts[batch.sender] = counts.get(batch.sender, 0) + len(batch.events)
        for sender, bodies in by_sender.items():
            headers = {SENDER_HEADER: sender, "Content-Type": "application/x-ndjson"}
            try:
                answer = await client.post("/v1/events", content=b"".join(bodies), headers=headers)
            except httpx.TransportError as e:
                # As a real exporter would, the lab drops what it cannot deliver and goes on.
                problem = f"events not delivered: {type(e).__name__}"
                self._refused += counts[sender]
                continue
            if answer.is_success:
                self._sent += counts[sender]
            else:
                self._refused += counts[sender]
                problem = f"POST /v1/events answered {answer.status_code}"
        return problem

    async def _read_directives(self, client: httpx.AsyncClient, sim: Simulator, now: float) -> str:
        """Reads the leases in force; on any trouble the last ones stay, until each expires by itself."""
        try:
            known = {"If-None-Match": self._etag} if self._etag else {}
            answer = await self._ask_control(client, "GET", "/v1/directives", headers=known)
        except httpx.TransportError as e:
            return f"directives not read: {type(e).__name__}"
        if answer.status_code == 304:
            return ""
        if not answer.is_success:
            return f"GET /v1/directives answered {answer.status_code}"
        try:
            told = _directives.decode(answer.content)
            self.directives = [msgspec.convert(d, Directive, strict=False) for d in told]
        except (msgspec.DecodeError, msgspec.ValidationError) as e:
            return f"directives not understood: {e}"
        self._etag = answer.headers.get("ETag", "")
        sim.set_directives(self.directives)
        return ""
