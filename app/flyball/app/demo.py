"""`flyball demo`: the embedded runtime and the lab, faster than life, in one process, watched in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import socket
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import uvicorn
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flyball.app.clock import FastClock, monotonic
from flyball.app.embedded import Embedded
from flyball.app.http.server import create_app
from flyball.app.logs import configure_logging
from flyball.app.pipeline import Pipeline
from flyball.app.serve import Background
from flyball.app.settings import Settings, load
from flyball.app.wiring import database_path, hash_key, make_formats, pipeline_config
from flyball.core.directives import Directive
from flyball.core.estate import Emissions
from flyball.core.incident import IncidentChange, State
from flyball.lab.faults import AgentLoop, AnyFault, BudgetBurn, ProviderOutage
from flyball.lab.live import LiveLab, Tick
from flyball.remediation.render import Audience, Renderer

SPEED: Final = 8.0
"""Seconds of the demo's clock to one of yours: what takes an on-call engineer nine minutes is seen in one."""
_BEGIN: Final = datetime(2026, 11, 21, 22, 47, tzinfo=UTC).timestamp()
"""Always the same: traffic depends on the moment, and a tenant as small as the one that burns money is not at every moment heard of enough
to be judged within the minute that a demo has for it."""
_HISTORY_S: Final = 2280.0
"""What a tenant spends is known after half an hour."""
_RATE: Final = 9.0
"""Calls a second: few enough that the history is sent within seconds."""
_PAUSE: Final = 0.4
"""Of the lab's usual pause: four seconds of the demo's clock at a time would be coarse."""
_LOG_LINES: Final = 12
SHOWN: Final = {
    "provider-failover": "provider failover",
    "budget-throttle": "budget throttling",
    "runaway-agent": "a stopped loop",
}
"""What the demo must show, verified and released: runbook, and what people call it."""


def faults(start: float) -> Sequence[AnyFault]:
    """What goes wrong, by the demo's clock. The burn begins within the history: spend is judged over minutes, and once the provider
    fails, what a tenant spends may be taken for a part of that."""
    return (
        BudgetBurn("t3", 20.0, start - 180.0, start + 260.0),
        ProviderOutage("b", 0.8, start + 90.0, start + 210.0),
        AgentLoop("researcher", start + 130.0, start + 310.0),
    )


class Watch:
    """What was seen so far; written by the stages thread, read by the screen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start = monotonic()
        self.lines: deque[str] = deque(maxlen=400)
        self.unprinted: deque[str] = deque()
        self.incidents: dict[str, IncidentChange] = {}
        self.order: list[str] = []
        self.granted = 0
        self.verified: Counter[str] = Counter()
        self.released: Counter[str] = Counter()
        """By runbook."""
        self.anomalies: Counter[str] = Counter()
        self.first_incident_s: float | None = None
        self.live = False

    def restart(self) -> None:
        """From now on counts: what was before is the history that the demo sends ahead."""
        self._start, self.live = monotonic(), True

    def hear(self, said: Emissions) -> None:
        with self._lock:
            for a in said.anomalies:
                if a.phase == "on":
                    self.anomalies[a.signal] += 1
                    scope = " ".join(f"{k}={v}" for k, v in a.labels.items() if v)
                    self._say(
                        f"anomaly   {a.signal} {a.klass} {scope}: {a.observed:.3g} {a.unit}, expected {a.expected:.3g}"
                    )
            for c in said.changes:
                self._change(c)
            for d in said.decisions:
                self._say(f"decision  {d.runbook}: {d.decision.value} ({d.reason}) {d.detail}")
            for m in said.directives:
                self.granted += m.change == "granted"
                if m.change == "released":
                    self.released[m.directive.runbook] += 1
                self._say(f"directive {m.change} {describe(m.directive)}: {m.reason}")
            for o in said.outcomes:
                if o.result == "verified":
                    self.verified[o.runbook] += 1
                self._say(f"outcome   {o.runbook} {o.action} {o.result}: {o.reason}")

    @property
    def missing(self) -> list[str]:
        """What of SHOWN was not both verified and released."""
        with self._lock:
            return [what for name, what in SHOWN.items() if not (self.verified[name] and self.released[name])]

    def _change(self, change: IncidentChange) -> None:
        i = change.incident
        if i.id not in self.incidents:
            self.order.append(i.id)
            if self.first_incident_s is None and self.live:
                self.first_incident_s = monotonic() - self._start
        self.incidents[i.id] = change
        if not change.old:
            self._say(f"INCIDENT  {i.id} {i.severity.sev}{' PAGE' if i.page else ''} {i.title}")
        elif change.old != change.new:
            self._say(f"incident  {i.id} {change.old} -> {change.new}: {change.reason}")

    def _say(self, line: str) -> None:
        stamped = f"{monotonic() - self._start:5.1f}s  {line}"
        self.lines.append(stamped)
        self.unprinted.append(stamped)

    def newest(self) -> list[IncidentChange]:
        with self._lock:
            return [self.incidents[i] for i in reversed(self.order)]


def describe(d: Directive) -> str:
    scope = " ".join(f"{k}={v}" for k, v in d.scope.items())
    to = d.params.get("to")
    share = d.params.get("share")
    return (
        f"{d.kind} {scope}"
        + (f" -> {' '.join(map(str, to.values()))}" if isinstance(to, dict) else "")
        + (f" {share:.0%}" if isinstance(share, float) else "")
        + "".join(f" {k}={v:g}" for k, v in d.params.items() if k != "share" and isinstance(v, int | float))
        + (f" model={d.params['model']}" if "model" in d.params else "")
    )


class Screen:
    """Draws on a terminal; elsewhere prints each line once."""

    def __init__(self, watch: Watch, runtime: Embedded, console: Console, seconds: float) -> None:
        self._watch, self._runtime, self._console, self._seconds = watch, runtime, console, seconds
        self._renderer = Renderer()
        self._live = (
            Live(console=console, refresh_per_second=4, screen=False) if console.is_terminal else None
        )

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, tick: Tick) -> None:
        if self._live is not None:
            self._live.update(self._draw(tick))
            return
        while self._watch.unprinted:
            self._console.print(
                self._watch.unprinted.popleft(), markup=False, highlight=False, soft_wrap=True
            )

    def alert(self, change: IncidentChange) -> list[str]:
        message = self._renderer.render(
            change, Audience(kind="terminal", name="demo", why="you started the demo")
        )
        return list(message.lines)

    def _draw(self, tick: Tick) -> RenderableType:
        counters = self._runtime.figures.totals
        head = Text.assemble(
            ("Flyball demo ", "bold"),
            f"{tick.elapsed_s / SPEED:4.0f} of {self._seconds:.0f} s   ",
            f"{sum(counters['events'].values()):,} events   {counters['windows']} windows   {counters['anomalies']} anomalies   "
            f"{counters['incidents']} incidents   {counters['pages']} pages",
        )
        parts: list[RenderableType] = [head]
        changes = self._watch.newest()
        if changes:
            shown = next((c for c in changes if c.incident.state is not State.RESOLVED), changes[0])
            lines = self.alert(shown)
            style = "green" if shown.incident.state is State.RESOLVED else "red"
            parts.append(
                Panel(
                    Text("\n".join(lines)), title=f"alert ({shown.incident.state.value})", border_style=style
                )
            )
        leases = Table(box=None, pad_edge=False, show_header=False)
        for d in tick.directives:
            leases.add_row(
                "lease",
                describe(d),
                f"{d.expires_at - self._runtime.clock.now():.0f} s left",
                f"{tick.applied.get(d.id, 0)} calls",
            )
        parts.append(leases if tick.directives else Text("no lease in force", style="dim"))
        parts.append(
            Text("\n".join(list(self._watch.lines)[-_LOG_LINES:]), no_wrap=True, overflow="ellipsis")
        )
        if tick.problem:
            parts.append(Text(tick.problem, style="yellow"))
        return Group(*parts)


def run_demo(seconds: float, seed: int, keep: Path | None) -> int:
    """Returns 0 when all of SHOWN was done, verified and released; 1 when the demo did not show that."""
    configure_logging(quiet=True)
    sys.setswitchinterval(0.001)
    folder = keep or Path(tempfile.mkdtemp(prefix="flyball-demo-"))
    console = Console()
    try:
        return asyncio.run(_demo(seconds, seed, folder, console, kept=keep is not None))
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


async def _demo(seconds: float, seed: int, folder: Path, console: Console, *, kept: bool) -> int:
    settings = load(
        None,
        data=folder,
        port=_free_port(),
        mode="auto",
        modes=dict.fromkeys(SHOWN, "auto"),
    )
    watch, clock = Watch(), FastClock(SPEED, _BEGIN)
    runtime = _runtime(settings, watch, clock)
    runtime.start()
    background = Background(runtime, settings)
    app = create_app(runtime, make_formats(settings, hash_key(settings)), settings, background.run)
    config = uvicorn.Config(app, host=settings.host, port=settings.port, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    console.print(
        "Flyball demo: 3 providers, their apps, tenants, agents and GPUs, simulated; nothing leaves this machine.\n"
        f"{_HISTORY_S / 60:.0f} minutes of traffic are sent ahead, of an evening in November. Then, {SPEED:g} times as fast as life: tenant t3 burns money, "
        "provider b fails, a run of an agent loops."
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.02)
    lab = LiveLab(
        f"http://{settings.host}:{settings.port}",
        seed,
        faults=faults,
        rate=_RATE,
        clock=clock.now,
        pause=lambda s: asyncio.sleep(s * _PAUSE),
        on_live=partial(_go_live, clock, watch),
    )
    try:
        with Screen(watch, runtime, console, seconds) as screen:
            last = await lab.run(seconds * SPEED, screen.show, history_s=_HISTORY_S)
            screen.show(last)
    finally:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        runtime.stop()
    return _summary(watch, runtime, screen, console, last, folder if kept else None)


def _go_live(clock: FastClock, watch: Watch) -> None:
    clock.go()
    watch.restart()


def _runtime(settings: Settings, watch: Watch, clock: FastClock) -> Embedded:
    config = pipeline_config(settings)
    return Embedded(
        lambda: Pipeline(config, timer=monotonic),
        database_path(settings.data),
        clock,
        listener=watch.hear,
    )


def _summary(
    watch: Watch, runtime: Embedded, screen: Screen, console: Console, last: Tick, folder: Path | None
) -> int:
    counters = runtime.figures.totals
    console.print()
    for change in reversed(watch.newest()):
        _print_incident(console, change, screen.alert(change))
    console.print(
        f"\n{sum(counters['events'].values()):,} events, {len(watch.incidents)} incidents, {counters['pages']} pages; "
        f"leases: {watch.granted} granted, {watch.verified.total()} verified, {watch.released.total()} released; "
        f"first incident after {watch.first_incident_s or math.nan:.0f} s",
        highlight=False,
    )
    data = f" --data {folder}" if folder else ""
    console.print(
        "\nLook around:\n"
        + (
            f"  flyball status{data}\n  flyball ledger list{data}\n"
            if folder
            else "  flyball demo --keep demo-data    keeps what it wrote\n"
        )
        + "  flyball init                     settings and a first runbook\n  flyball run                      the same for your own traffic",
        highlight=False,
    )
    for name, what in SHOWN.items():
        done = "verified and released" if what not in watch.missing else "not shown"
        console.print(f"  {what:<20} {done}  ({name})", highlight=False)
    if watch.missing:
        console.print(
            f"the demo did not show {' and '.join(watch.missing)}; on a busy machine try --seconds 120, else please report it"
        )
    return 0 if not watch.missing and not last.problem else 1


def _print_incident(console: Console, change: IncidentChange, alert: Sequence[str]) -> None:
    """A paging incident as its alert reads at the end of the demo; the others in one line."""
    i = change.incident
    state = f"{i.state.value}, {(i.resolved_at or i.updated_at) - i.since:.0f} s"
    lines = alert if i.page else [f"{i.severity.sev} · {i.title} · {i.id}"]
    for n, line in enumerate(lines):
        text = f"{line}  [{state}]" if n == 0 else f"    {line}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
