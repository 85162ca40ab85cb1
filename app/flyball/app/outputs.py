"""What control tells other systems: topics of anomalies, incidents, outcomes and directives.

The first three are histories. Each of their records is stored as a row in the transaction of what it tells of, sent, and removed once the brokers
have it: none is missing, and after a crash some come again, with the same id. Directives are a state: the compacted topic is held against the
leases that enforcement points may see, and what differs is sent. So a crash, a stop or a take-over loses nothing there either.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Final

import msgspec
import structlog

from flyball.app import views
from flyball.app.embedded import Embedded
from flyball.app.store import publications
from flyball.app.store.rows import Publication
from flyball.core.anomaly import Anomaly
from flyball.core.directives import Directive, LedgerEntry
from flyball.core.incident import IncidentChange
from flyball.streams.kafka.client import KafkaError, Place, Writer, read_all
from flyball.streams.kafka.config import KafkaConfig

WRITTEN: Final = ("anomalies", "incidents", "outcomes", "directives")
"""Topics without prefix."""
_MOST: Final = 500
_AGAIN_S: Final = 1.0
_LOOK_S: Final = 5.0
"""Between two looks at what is not announced: nothing should be found then."""
_FLUSH_S: Final = 8.0
_json: Final = msgspec.json.Encoder(order="sorted")
_log = structlog.get_logger(__name__)


def publications_of(
    anomalies: Sequence[Anomaly], changes: Sequence[IncidentChange], entries: Sequence[LedgerEntry]
) -> list[Publication]:
    """The records that tell of these, each with the id that it has in every replay."""
    found = [
        Publication("anomalies", _scope(a), f"{a.id}/{a.phase}/{a.at:.3f}", _json.encode(a))
        for a in anomalies
    ]
    for c in changes:
        body = views.incident_change(c) | {
            "revision": c.incident.revision,
            "notify": c.notify,
            "incident": views.incident(c.incident),
        }
        found.append(
            Publication("incidents", c.incident.id, f"{c.incident.id}/{c.incident.revision}", _json.encode(body))
        )  # fmt: skip
    found += [Publication("outcomes", e.incident or e.key, e.key, _json.encode(e)) for e in entries]
    return found


def _scope(a: Anomaly) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(a.labels.items()))


def directive_record(d: Directive, owner: int) -> bytes:
    """As `GET /v1/directives` shows it, and the epoch of the database's owner: a record of a lower one than seen before is void."""
    return _json.encode(views.directive(d) | {"owner": owner})


class Outputs:
    """Publishes what a runtime has stored, and what leases are in force.

    A broker that is away is waited for: nothing is lost meanwhile, it waits in the database.
    """

    def __init__(self, config: KafkaConfig, runtime: Embedded) -> None:
        self._config, self._runtime = config, runtime
        self._writer: Writer | None = None
        self._news = asyncio.Event()
        self._held: dict[str, bytes] | None = None
        """What the topic of directives holds, by id; None while that is not known."""
        self._failing = False
        self.published: Counter[str] = Counter()
        """Records that the brokers have acknowledged since the start, by topic."""
        self.waiting = 0
        """Records that are stored and were not acknowledged when last looked at."""

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; then publishes what is stored by then, if the brokers take it in time.

        Raises: Stopped when the runtime has ended.
        """
        loop = asyncio.get_running_loop()
        self._runtime.on_publications = partial(loop.call_soon_threadsafe, self._news.set)
        publishing, stopping = loop.create_task(self._publish(stop)), loop.create_task(stop.wait())
        try:
            await asyncio.wait({publishing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            # What is on its way is waited for: cut off here, it would come twice.
            await asyncio.wait({publishing}, timeout=_FLUSH_S)
            if publishing.done():
                publishing.result()
                await self._flush()
        finally:
            self._runtime.on_publications = _deaf
            for task in (publishing, stopping):
                task.cancel()
            await asyncio.gather(publishing, stopping, return_exceptions=True)
            await self._close()

    async def _publish(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._news.clear()
            if await self._tried(self._step()):
                continue
            # Whatever changes the leases is also a line of the ledger, and so news.
            waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self._news.wait())]
            try:
                await asyncio.wait(waits, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for w in waits:
                    w.cancel()

    async def _step(self) -> int:
        """Leases first: traffic waits for them."""
        return await self._hold() + await self._relay()

    async def _flush(self) -> None:
        """The stages may still be at what came last: what they say of it is published too."""
        try:
            async with asyncio.timeout(_FLUSH_S):
                await asyncio.to_thread(self._runtime.wait_for, self._runtime.appended, _FLUSH_S)
                while await self._step():
                    pass
        except (KafkaError, TimeoutError) as e:
            _log.warning("outputs.left", why=f"{type(e).__name__}: {e}", then="published by the next owner")

    # --- histories --------------------------------------------------------------------------------------------------

    async def _relay(self) -> int:
        """Sends what has waited longest; its number."""
        with self._runtime.reader.connect() as c:
            rows = publications.waiting(c, _MOST)
            self.waiting = publications.count(c) if len(rows) == _MOST else len(rows)
        if not rows:
            return 0
        writer = await self._open()
        sent = [
            await writer.send(
                p.topic, p.body, key=p.key.encode(), headers=[*_headers(owner), ("id", p.id.encode())]
            )
            for _, p, owner in rows
        ]
        for one in sent:
            await one
        until = rows[-1][0]
        await asyncio.wrap_future(self._runtime.write(partial(publications.remove, until=until)))
        self.published.update(p.topic for _, p, _ in rows)
        self.waiting -= len(rows)
        return len(rows)

    # --- the state --------------------------------------------------------------------------------------------------

    async def _hold(self) -> int:
        """Makes the topic hold what is in force; the number of records that were sent."""
        owner = self._runtime.database.epoch
        if self._held is None:
            self._held = await self._held_before()
        _, live = self._runtime.board.read()
        wanted = {d.id: directive_record(d, owner) for d in live}
        changed: list[tuple[str, bytes | None]] = [(d, None) for d in self._held if d not in wanted]
        changed += [(d, body) for d, body in wanted.items() if self._held.get(d) != body]
        if changed:
            # Who has been fenced off, and does not know yet, must not say what is in force.
            await asyncio.wrap_future(self._runtime.write(_nothing))
            writer = await self._open()
            sent = [
                await writer.send("directives", body, key=d.encode(), headers=_headers(owner))
                for d, body in changed
            ]
            for one in sent:
                await one
            self.published["directives"] += len(changed)
        self._held = wanted
        return len(changed)

    async def _held_before(self) -> dict[str, bytes]:
        records = await read_all(self._config, [Place(self._config.topic("directives"), 0)])
        held: dict[str, bytes] = {}
        for r in records:
            name = (r.key or b"").decode("utf-8", "replace")
            if r.value is None:
                held.pop(name, None)
            else:
                held[name] = r.value
        return held

    # --- the client -------------------------------------------------------------------------------------------------

    async def _tried(self, work: Awaitable[int]) -> int:
        """What `work` gives; 0, a little later, where the brokers did not take it."""
        try:
            found = await work
        except KafkaError as e:
            if not self._failing:
                _log.warning("outputs.waiting", why=f"{type(e).__name__}: {e}")
            self._failing, self._held = True, None
            await self._close()
            await asyncio.sleep(_AGAIN_S)
            return 0
        if self._failing:
            _log.info("outputs.going_on")
        self._failing = False
        return found

    async def _open(self) -> Writer:
        if self._writer is None:
            self._writer = Writer(self._config)
            await self._writer.start()
        return self._writer

    async def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                async with asyncio.timeout(_AGAIN_S):
                    await writer.stop()
            except (KafkaError, TimeoutError) as e:
                _log.info("outputs.closed", why=f"{type(e).__name__}: {e}")


def _headers(owner: int) -> list[tuple[str, bytes]]:
    return [("content-type", b"application/json"), ("owner", str(owner).encode())]


def _deaf() -> None:
    """Nobody waits for news any more."""


def _nothing(_connection: object) -> None:
    """An empty transaction still asks whether this process owns the database."""


__all__ = ["WRITTEN", "Outputs", "directive_record", "publications_of"]
