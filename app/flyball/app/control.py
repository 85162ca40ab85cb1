"""The role `control` of `flyball worker`: whoever owns the database reads portions, and is otherwise `flyball run`.

    stand by until the database is ours → recover → portions, HTTP, ticks, outputs → stop: read no more, publish what is stored, drain

Telemetry that comes in over HTTP, or is scraped, goes to Kafka's topics like that of everybody else: a way past the window stage would count
copies twice.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from prometheus_client.registry import Collector

from flyball.app.embedded import Embedded
from flyball.app.http.kafka import KAFKA_FIGURES, written
from flyball.app.http.server import create_app
from flyball.app.http.worker import Metrics, Site, create_standby_app
from flyball.app.intake import Edge
from flyball.app.kafka_ingest import KafkaIngest
from flyball.app.metrics import Figure, FigureCollector
from flyball.app.outputs import Outputs, publications_of
from flyball.app.portions import PortionFeed
from flyball.app.reload import RunbookWatch
from flyball.app.serve import Background, make_runtime
from flyball.app.settings import Settings
from flyball.app.store import owner
from flyball.app.store.database import Database, open_database, reading, wait_for_ownership
from flyball.app.store.owner import DatabaseLost
from flyball.app.wiring import database_of, runbooks_of
from flyball.app.writer import Stopped
from flyball.core.errors import ConfigError
from flyball.core.ports import Format

_WHY_S: Final = 5.0
_log = structlog.get_logger(__name__)


def look_before(settings: Settings) -> Database | None:
    """What can be told before anything is begun: whether runbooks and database will do. Gives the database where nobody stands by for it.

    Raises: ConfigError; DatabaseLost.
    """
    runbooks_of(settings)
    where = database_of(settings)
    if isinstance(where, Path):
        return open_database(where, settings.synchronous)
    with reading(where):
        return None


class Control:
    """See the module.

    Args:
        site: shows the pages of what this process is at the moment.
        database: where it is ours already.
        metrics: what other roles of the process show.
    """

    def __init__(
        self, settings: Settings, intake: KafkaIngest, formats: Mapping[str, Format], site: Site, database: Database | None,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self._settings, self._intake, self._formats = settings, intake, formats
        self._site, self._database, self._metrics = site, database, metrics
        self.runtime: Embedded | None = None
        self.feed: PortionFeed | None = None
        self.outputs: Outputs | None = None
        site.app = create_standby_app(intake, formats, settings, self._waiting_for, metrics)
        site.closing = self._let_go

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Raises: what ended the runtime; NeedsUpgrade, ConfigError of a database; Stalled."""
        database = self._database or await self._owned(stop)
        self._database = database
        if database is None or stop.is_set():
            return
        runtime = await asyncio.to_thread(make_runtime, self._settings, database, publications_of)
        self.runtime = runtime
        loop, failed = asyncio.get_running_loop(), asyncio.Event()
        runtime.on_failure = partial(loop.call_soon_threadsafe, failed.set)
        await asyncio.to_thread(runtime.start)
        _log.info("control.taken", database=database.name, epoch=database.epoch, position=runtime.position)
        try:
            await self._govern(runtime, stop, failed)
        except Stopped:
            # Who waits is told a moment before it is known why.
            await asyncio.to_thread(runtime.wait_for, runtime.appended + 1, _WHY_S)
            if runtime.failure is None:
                raise
        if runtime.failure is not None:
            raise runtime.failure

    async def _owned(self, stop: asyncio.Event) -> Database | None:
        """Waits until nobody else owns the database; None once `stop` is set."""
        stopped = threading.Event()
        where = str(database_of(self._settings))
        waiting = asyncio.create_task(
            asyncio.to_thread(wait_for_ownership, where, stopped, self._settings.synchronous)
        )
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopped.set()
            return await waiting
        finally:
            stopped.set()
            stopping.cancel()

    async def _govern(self, runtime: Embedded, stop: asyncio.Event, failed: asyncio.Event) -> None:
        settings, intake = self._settings, self._intake
        feed = self.feed = PortionFeed(runtime, intake.config, settings.kafka.stuck_s)
        outputs = self.outputs = Outputs(intake.config, runtime)
        watch = RunbookWatch(runtime, settings)
        background = Background(runtime, settings, watch, feed.now, intake)
        background.on_failure = failed.set
        read_to_end = asyncio.Event()
        async with background.run():
            self._site.app = create_app(runtime, self._formats, settings, None, watch, self._edge(runtime))
            feeding = asyncio.create_task(feed.run(stop))
            telling = asyncio.create_task(outputs.run(read_to_end))
            failing = asyncio.create_task(failed.wait())
            tasks = {feeding, telling, failing}
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                if feeding in done:
                    read_to_end.set()
                    await telling
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if background.failure is not None:
            raise background.failure

    def close(self) -> bool:
        """Lets the stages finish what is in the log, and gives the database back. False when not all of it was finished."""
        if self.runtime is None:
            if self._database is not None:
                self._database.close()
            return True
        self.runtime.on_failure = _nothing
        return self.runtime.stop()

    # --- what is shown ----------------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        if self.runtime is not None:
            self.runtime.board.close()

    def _waiting_for(self) -> str:
        where = database_of(self._settings)
        if self._database is not None or isinstance(where, Path):
            return "the log is being read again"
        try:
            with reading(where) as c:
                epoch, who = owner.current(c)
        except (ConfigError, DatabaseLost) as e:
            return str(e)
        return f"{who} has control (epoch {epoch})"

    def _edge(self, runtime: Embedded) -> Edge[Any]:
        intake = self._intake
        return Edge(
            intake, intake.encode, intake.received, intake.rejected,
            ready=lambda: intake.ready and self.feed is not None and self.feed.reading,
            status=lambda: {"role": "control", "epoch": runtime.database.epoch, "kafka": written(intake)},
            metrics=self._collectors,
        )  # fmt: skip

    def _collectors(self) -> Iterable[Collector]:
        yield FigureCollector(self._intake, KAFKA_FIGURES)
        yield FigureCollector(self, CONTROL_FIGURES)
        yield from self._metrics()


def _of_feed(read: Callable[[PortionFeed], int]) -> Callable[[Control], int]:
    return lambda control: read(control.feed) if control.feed is not None else 0


CONTROL_FIGURES: Final[tuple[Figure[Control], ...]] = (
    Figure("flyball_portions", "Portions of the window stage that were taken.", _of_feed(lambda f: f.taken)),
    Figure("flyball_unreadable_portions", "Records that are no portions; they are in the dead letters.", _of_feed(lambda f: f.unreadable)),
    Figure("flyball_portions_lag", "Portions at the brokers that were not read.", _of_feed(lambda f: f.lag), "gauge"),
    Figure("flyball_published_records", "Records of output topics that Kafka has acknowledged.", lambda c: c.outputs.published if c.outputs is not None else {}, label="topic"),
    Figure("flyball_publications_waiting", "Records of output topics that are stored and not acknowledged.", lambda c: c.outputs.waiting if c.outputs is not None else 0, "gauge"),
    Figure("flyball_owner_epoch", "Grows with each process that takes control over.", lambda c: c.runtime.database.epoch if c.runtime is not None else 0, "gauge"),
)  # fmt: skip
"""What the control role shows of itself."""


def _nothing() -> None:
    """The process ends already."""


__all__ = ["CONTROL_FIGURES", "Control", "look_before"]
