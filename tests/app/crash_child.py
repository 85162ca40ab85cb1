"""The embedded runtime on a script of records in virtual time: what `kill -9` tests kill and start again.

    python -m tests.app.crash_child DATABASE SCRIPT SNAPSHOT_EVERY_S

DATABASE is a file, or the address of a PostgreSQL: of several processes on one, one works and the others stand by.

The script is a list of steps, each one record of the log: a batch that arrived, a tick of the clock, or a person's word. How far an earlier life came is
read off the log itself, as the sender of an acknowledged batch would know it. After each commit the position goes to standard output.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import msgspec

from flyball.app.embedded import Embedded
from flyball.app.logs import configure_logging
from flyball.app.notify import AlertRouter
from flyball.app.orders import decode_order
from flyball.app.pipeline import Pipeline
from flyball.app.settings import Settings
from flyball.app.store.database import Database, wait_for_ownership
from flyball.app.wiring import pipeline_config
from flyball.core.codec import decode_events, encode_events
from flyball.core.events import Event
from flyball.remediation import actions
from flyball.remediation.notifiers import NotifySettings
from flyball.runbooks.loader import load_runbooks


class Step(msgspec.Struct):
    """One record: events of a sender, an order, or a tick when both are None."""

    at: float
    sender: str = ""
    events: bytes | None = None
    order: bytes | None = None

    @classmethod
    def of(cls, at: float, sender: str, events: list[Event]) -> Step:
        return cls(at, sender, encode_events(events))


class ScriptClock:
    """Says the time of the step that is being fed."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at


def settings() -> Settings:
    channels = [
        {
            "kind": "webhook",
            "url": "https://alerts.example.com/flyball",
            "secrets": ["whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        }
    ]
    return Settings(mode="auto", notify=NotifySettings.model_validate({"channels": channels}))


def pipeline() -> Pipeline:
    """As shipped: plans are suggested, and the script's people approve them."""
    runbooks = load_runbooks([], actions=actions.registry())
    return Pipeline(pipeline_config(settings(), runbooks=runbooks))


def build(database: Path | str | Database, clock: ScriptClock, snapshot_every_s: float = 20.0) -> Embedded:
    configured = settings()
    return Embedded(
        pipeline,
        database,
        clock,
        alerts=AlertRouter(configured.notify),
        snapshot_every_s=snapshot_every_s,
    )


def play(runtime: Embedded, clock: ScriptClock, steps: list[Step], after: int, *, speak: bool) -> None:
    """Feeds what is not yet in the log; one commit at a time, so that a kill can fall between any two."""
    for number, step in enumerate(steps[after:], after + 1):
        clock.at = step.at
        if step.order is not None:
            stored = runtime.order(decode_order(step.order))
        elif step.events is None:
            stored = runtime.tick()
        else:
            stored = runtime.ingest(decode_events(step.events), step.sender, step.at)
        position = stored.result(30)
        if position != number:
            raise AssertionError(f"step {number} became record {position}")
        if speak:
            print(position, flush=True)


def main() -> None:
    configure_logging()  # to standard error: standard output is for positions
    steps = msgspec.msgpack.decode(Path(sys.argv[2]).read_bytes(), type=list[Step])
    clock = ScriptClock()
    database: Path | Database = Path(sys.argv[1])
    if "://" in sys.argv[1]:
        print("waiting", flush=True)
        owned = wait_for_ownership(sys.argv[1], threading.Event())
        assert owned is not None
        database = owned
    runtime = build(database, clock, float(sys.argv[3]))
    runtime.start()
    play(runtime, clock, steps, runtime.appended, speak=True)
    if not runtime.stop(60):
        raise SystemExit("did not drain")


if __name__ == "__main__":
    main()
