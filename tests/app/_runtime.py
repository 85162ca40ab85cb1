"""What the runtime's tests share: a clock that is set, events, a runtime on a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flyball.app.embedded import Embedded
from flyball.app.pipeline import Pipeline
from flyball.app.store.database import Database
from flyball.app.wiring import pipeline_config
from flyball.core.events import Event, LlmCall
from flyball.remediation import actions
from flyball.runbooks.loader import load_runbooks
from tests.app.crash_child import settings

NOW = 1_790_000_000.0


class SetClock:
    """Says what it was told."""

    def __init__(self, at: float = NOW) -> None:
        self.at = at

    def now(self) -> float:
        return self.at


def make_pipeline() -> Pipeline:
    runbooks = load_runbooks([], actions=actions.registry(), mode_override={"provider-failover": "auto"})
    return Pipeline(pipeline_config(settings(), runbooks=runbooks))


def calls(n: int, at: float = NOW, **fields: Any) -> list[Event]:
    """Calls with ids of their own, so that none is a copy of another."""
    prefix = fields.pop("prefix", f"{at:.3f}")
    given: dict[str, Any] = {"provider": "a", "model": "m", "app": "shop", "tenant": "t"} | fields
    return [LlmCall(at=at, id=f"{prefix}-{i}", **given) for i in range(n)]


def outage(at: float, n: int = 60) -> list[Event]:
    """Calls of one moment, most of which fail in a way that a provider is blamed for, from several tenants."""
    return [
        LlmCall(
            at=at, id=f"{at:.3f}-{i}", provider="a", model=f"m{i % 2}", app=f"app{i % 3}", tenant=f"t{i % 5}",
            error="overloaded" if i % 5 else "", error_code="529" if i % 5 else "", latency_s=1.0,
            input_tokens=100, output_tokens=0 if i % 5 else 50,
        )
        for i in range(n)
    ]  # fmt: skip


def well(at: float, n: int = 60) -> list[Event]:
    return [
        LlmCall(
            at=at, id=f"{at:.3f}-{i}", provider="ab"[i % 2], model=f"m{i % 2}", app=f"app{i % 3}", tenant=f"t{i % 5}",
            latency_s=1.0, input_tokens=100, output_tokens=50,
        )
        for i in range(n)
    ]  # fmt: skip


@contextlib.contextmanager
def started(
    place: Path | str | Database,
    clock: SetClock | None = None,
    pipeline: Callable[[], Pipeline] = make_pipeline,
    **more: Any,
) -> Iterator[Embedded]:
    """A runtime for as long as the block lasts; drained at its end. `place`: a folder, a database file or an address."""
    where = place / "flyball.sqlite3" if isinstance(place, Path) and place.is_dir() else place
    runtime = Embedded(pipeline, where, clock or SetClock(), **more)
    runtime.start()
    try:
        yield runtime
    finally:
        runtime.stop()


def take(runtime: Embedded, events: list[Event], sender: str = "gateway") -> int:
    """Ingests and waits until the stages have read it."""
    position = runtime.ingest(events, sender, runtime.clock.now()).result(30)
    assert runtime.wait_for(position)
    return position


def incident(runtime: Embedded, clock: SetClock) -> str:
    """Lets an outage pass through until an incident is open; its id."""
    for second in range(40):
        clock.at = NOW + second
        take(runtime, well(clock.at) if second < 20 else outage(clock.at))
        runtime.wait_for(runtime.tick().result(30))
    with runtime.reader.connect() as c:
        from flyball.app.store import store

        found = store.list_incidents(c)
    assert len(found) == 1, [str(i.root) for i in found]
    return found[0].id
