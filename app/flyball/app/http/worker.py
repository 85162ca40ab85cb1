"""The HTTP interface of `flyball worker` while it does not own the database: as a standby for control, or without that role."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from fastapi import FastAPI
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from flyball.app.http.auth import Auth
from flyball.app.http.kafka import INGEST_FIGURES, elsewhere, health, status, taking
from flyball.app.http.read import assemble_status
from flyball.app.http.server import assemble
from flyball.app.kafka_ingest import KafkaIngest
from flyball.app.metrics import Figure, FigureCollector
from flyball.app.settings import Settings
from flyball.core.ports import Format
from flyball.streams.kafka.windows_role import RoleFigures

Metrics = Callable[[], Iterable[Collector]]


class Site:
    """The application that answers now; another takes its place while the server runs.

    `closing` is called once the server is told to stop: lets go of long polls.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.closing: Callable[[], None] = _nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


WINDOWS_FIGURES: Final[tuple[Figure[RoleFigures], ...]] = (
    Figure("flyball_window_stage_records", "Records that the window stage has read.", lambda f: f.records),
    Figure("flyball_window_stage_events", "Events in them, copies included.", lambda f: f.events),
    Figure("flyball_window_stage_rejected", "Lines and records that could not be taken; they are in the dead letters.", lambda f: f.rejected, label="reason"),
    Figure("flyball_window_stage_late", "Events whose window was closed; they are in the topic `late`.", lambda f: f.late),
    Figure("flyball_window_stage_portions", "Portions that were sent to control.", lambda f: f.portions),
    Figure("flyball_window_stage_portion_bytes", "Their bytes before compression.", lambda f: f.portion_bytes),
    Figure("flyball_window_stage_snapshots", "Snapshots of partitions that were stored.", lambda f: f.snapshots),
    Figure("flyball_window_stage_snapshot_bytes", "Their bytes before compression.", lambda f: f.snapshot_bytes),
    Figure("flyball_window_stage_rebalances", "How often partitions were shared out anew.", lambda f: f.rebalances),
    Figure("flyball_window_stage_stops", "How often a partition came to stand, because too much of it was bad.", lambda f: f.stopped),
    Figure("flyball_partitions", "Partitions that this process has.", lambda f: len(f.owned), "gauge"),
    Figure("flyball_partitions_standing", "Of these, those that stand because too much of them was bad.", lambda f: len(f.halts), "gauge"),
    Figure("flyball_partition_lag", "Records at the brokers that were not read.", lambda f: f.lag, "gauge", "partition"),
    Figure("flyball_partition_state_bytes", "Size of the newest snapshot.", lambda f: f.state_bytes, "gauge", "partition"),
)  # fmt: skip
"""What the role `windows` shows of itself, wherever it is hosted."""


def create_standby_app(
    intake: KafkaIngest, formats: Mapping[str, Format], settings: Settings, waiting_for: Callable[[], str], metrics: Metrics
) -> FastAPI:  # fmt: skip
    """Of a process that would take control over: it takes telemetry in meanwhile, and shows what stands in the database.

    Args:
        waiting_for: why it does not have control yet, for people.
        metrics: what other roles of the process show.
    """
    auth = Auth(settings.tokens)
    shown = health(
        auth,
        lambda: intake.failure,
        lambda: {"ready": False, "role": "standby", "why": waiting_for()},
        lambda: [FigureCollector(intake, INGEST_FIGURES), *metrics()],
        lambda: status(intake) | {"role": "standby", "ready": False},
    )
    return assemble([*taking(intake, formats, settings, auth), shown, elsewhere()])


def create_worker_app(settings: Settings, ready: Callable[[], bool], metrics: Metrics) -> FastAPI:
    """Of a process that only shares in the window stage."""
    auth = Auth(settings.tokens)
    shown = health(
        auth,
        lambda: None,  # when the role dies, so does the process
        lambda: {"ready": ready(), "role": "windows"},
        metrics,
        lambda: assemble_status({}, {}, {}, 0, 0.0, 0, 0, 0, []) | {"role": "windows", "ready": ready()},
    )
    return assemble([shown, elsewhere()])


def _nothing() -> None:
    """Until somebody has long polls to let go of."""
