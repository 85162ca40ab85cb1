"""`flyball demo`: the embedded runtime and the lab at live speed, in one process, watched in the terminal."""

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
from pathlib import Path
from typing import Final

import uvicorn
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flyball.app.clock import SystemClock, monotonic
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
from flyball.lab.faults import AgentLoop, AnyFault, PromptInflation, ProviderOutage
from flyball.lab.live import LiveLab, Tick
from flyball.remediation import actions
from flyball.remediation.render import Audience, Renderer
from flyball.runbooks.loader import load_runbooks

_HISTORY_S: Final = 600.0
_RATE: Final = 45.0
"""Calls a second: recovery is judged on the 5 % that stay with the failing provider, and needs some ten of them in half a minute."""
_LOG_LINES: Final = 12


def faults(start: float, seconds: float) -> Sequence[AnyFault]:
    """Three faults, one after another, scaled to the length of the demo."""
    unit = seconds / 105.0
    return (
        ProviderOutage("b", 0.8, start + 6 * unit, start + 48 * unit),
        AgentLoop("researcher", start + 35 * unit, start + 75 * unit),
        PromptInflation("checkout@4", 2.5, start + 50 * unit, math.inf),
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
        self.verified = self.released = self.granted = 0
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
                self.released += m.change == "released"
                self._say(f"directive {m.change} {describe(m.directive)}: {m.reason}")
            for o in said.outcomes:
                self.verified += o.result == "verified"
                self._say(f"outcome   {o.action} {o.result}: {o.reason}")

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
            f"{tick.elapsed_s:4.0f} of {self._seconds:.0f} s   ",
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
    """Returns 0 when incidents were found and a lease was granted, verified and released; 1 when the demo did not show that."""
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
        None, data=folder, port=_free_port(), mode="auto", window_s=2.0, lateness_s=1.0, max_delay_s=24.0
    )
    watch = Watch()
    runtime = _runtime(settings, watch)
    runtime.start()
    background = Background(runtime, settings)
    app = create_app(runtime, make_formats(settings, hash_key(settings)), settings, background.run)
    config = uvicorn.Config(app, host=settings.host, port=settings.port, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    console.print(
        "Flyball demo: 3 providers, their apps, tenants, agents and GPUs, simulated; nothing leaves this machine.\n"
        f"{_HISTORY_S / 60:.0f} minutes of quiet traffic are sent ahead, then: provider b fails, an agent loops, a prompt version inflates."
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.02)
    lab = LiveLab(
        f"http://{settings.host}:{settings.port}",
        seed,
        faults=lambda start: _begin(watch, start, seconds),
        rate=_RATE,
    )
    try:
        with Screen(watch, runtime, console, seconds) as screen:
            last = await lab.run(seconds, screen.show, history_s=_HISTORY_S)
            screen.show(last)
    finally:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        runtime.stop()
    return _summary(watch, runtime, screen, console, last, folder if kept else None)


def _begin(watch: Watch, start: float, seconds: float) -> Sequence[AnyFault]:
    watch.restart()
    return faults(start, seconds)


def _runtime(settings: Settings, watch: Watch) -> Embedded:
    runbooks = load_runbooks([], actions=actions.registry(), mode_override={"provider-failover": "auto"})
    config = pipeline_config(settings, runbooks=runbooks)
    return Embedded(
        lambda: Pipeline(config, timer=monotonic),
        database_path(settings.data),
        SystemClock(),
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
        f"leases: {watch.granted} granted, {watch.verified} verified, {watch.released} released; "
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
    shown = bool(watch.incidents) and watch.granted > 0 and watch.verified > 0 and watch.released > 0
    if not shown:
        console.print(
            "the demo did not show everything it should have; that is a fault of Flyball, please report it"
        )
    return 0 if shown and not last.problem else 1


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
