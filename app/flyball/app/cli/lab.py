"""`flyball demo` and `flyball lab …`: the simulator."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from flyball.app.cli._common import DEFAULT_URL, AsJson, TokenOption, Url, plain_terminal, print_json
from flyball.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from flyball.lab.faults import AnyFault
    from flyball.lab.live import Tick
    from flyball.lab.rows import Table

_REPORT_S: Final = 10.0
_FAILS_AFTER_S: Final = 300.0
"""Of quiet traffic, so that it is known what is normal."""


def add_to(app: typer.Typer) -> None:
    app.command("demo")(demo)
    lab = typer.Typer(
        help="The simulator: an AI estate with faults and their ground truth.", no_args_is_help=True
    )
    lab.command("score")(score)
    lab.command("export")(export)
    lab.command("load")(load)
    app.add_typer(lab, name="lab")


def demo(
    seconds: Annotated[
        float, typer.Option(min=60, help="How long it runs after its history is sent, of your time.")
    ] = 70.0,
    seed: Annotated[int, typer.Option(help="Another seed is another day.")] = 1,
    keep: Annotated[Path | None, typer.Option(help="Keep the data in this folder.", show_default="")] = None,
) -> None:
    """The main job, live: a simulated estate and three troubles: a provider fails, a tenant burns money, an agent loops. Each becomes an
    incident with its evidence, is acted on, verified and let go. Exit code 0 when all of it was shown.

    Examples:

      flyball demo

      flyball demo --seconds 120 --keep demo-data
    """
    from flyball.app.demo import run_demo

    raise typer.Exit(run_demo(seconds, seed, keep))


def score(
    seeds: Annotated[int, typer.Option(min=1, help="Simulations of each fault.")] = 20,
    days: Annotated[int, typer.Option(min=0, help="Quiet days: whatever pages in them is false.")] = 20,
    fault: Annotated[
        list[str] | None, typer.Option(help="Only this fault; may be repeated.", show_default="all")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="observe: detection; auto: the runbooks act; both.", show_default="both")
    ] = "both",
    processes: Annotated[int, typer.Option(min=1, help="Simulations side by side.")] = os.cpu_count() or 1,
    as_json: AsJson = False,
) -> None:
    """Measures detection and false pages in simulations; and what the shipped runbooks do in mode auto, also when Flyball's own
    actions fail. Exit code 1 when a bar does not hold.

    Examples:

      flyball lab score

      flyball lab score --mode auto --seeds 3 --fault provider_outage --json
    """
    modes = ("observe", "auto", "both")
    if mode not in modes:
        raise ConfigError(f"no mode {mode!r}{did_you_mean(mode, modes)}", where="lab score")
    holds = True
    if mode != "auto":
        holds = _score_detection(seeds, days, fault, processes, as_json=as_json)
    if mode != "observe":
        holds = _score_actions(seeds, fault, processes, as_json=as_json) and holds
    if not holds:
        raise typer.Exit(1)


def _score_actions(seeds: int, faults: list[str] | None, processes: int, *, as_json: bool) -> bool:
    from flyball.lab.acting import Acted, act_score

    def progress(done: int, total: int, acted: Acted) -> None:
        problem = " harmful" * acted.harmful + " not let go" * acted.missed_recoveries
        name = " ".join(n for n in (acted.fault, acted.failing) if n)
        end = "\n" if plain_terminal() else "\r"
        print(f"{done}/{total} acting on {name} seed {acted.seed}{problem}", file=sys.stderr, end=end)

    made = ("flyball.app.rehearse:acting_pipeline", "flyball.app.rehearse:quiet_pipeline")
    table = act_score(*made, range(1, seeds + 1), faults or (), processes=processes, progress=progress)
    _show(table, as_json=as_json)
    return table.holds()


def _score_detection(
    seeds: int, days: int, fault: list[str] | None, processes: int, *, as_json: bool
) -> bool:
    from flyball.lab.acting import SCENARIOS
    from flyball.lab.score import FAULTS, Result
    from flyball.lab.score import score as run_score

    # Some faults are only acted on: the other score knows them.
    chosen = [f for f in fault or FAULTS if f in FAULTS or f not in SCENARIOS]
    if not chosen:
        return True

    def progress(done: int, total: int, result: Result) -> None:
        name = result.fault or "quiet day"
        problem = "" if result.detected or not result.fault else " not detected"
        extra = f" {result.other_pages} other pages" if result.other_pages else ""
        print(
            f"{done}/{total} {name} seed {result.seed}{problem}{extra}",
            file=sys.stderr,
            end="\n" if plain_terminal() else "\r",
        )

    table = run_score(
        "flyball.app.wiring:lab_governor",
        range(1, seeds + 1),
        chosen,
        days,
        processes=processes,
        progress=progress,
    )
    _show(table, as_json=as_json)
    return table.holds()


def _show(table: Table, *, as_json: bool) -> None:
    if as_json:
        for row in table.as_dicts():
            print_json(row)
        return
    from flyball.app.tables import print_rows

    print(table.simulated)
    print_rows(table.as_dicts())


def export(
    out: Annotated[Path, typer.Argument(help="File to write, one event a line.")],
    seconds: Annotated[float, typer.Option(min=1, help="Length in simulated time.")] = 600.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Logical calls a second.")] = 20.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same events.")] = 1,
    outage: Annotated[
        str, typer.Option(help="Provider (a, b or c) that fails for five minutes in the middle.")
    ] = "",
) -> None:
    """Writes simulated traffic as native events, for `flyball replay` and for trying things out.

    Examples:

      flyball lab export traffic.ndjson

      flyball lab export outage.ndjson --seconds 1200 --outage b
    """
    from flyball.lab import Simulator, default_estate, write_ndjson
    from flyball.lab.faults import ProviderOutage
    from flyball.lab.sim import START_AT

    simulator = Simulator(default_estate(rate), seed)
    if outage:
        middle = START_AT + seconds / 2
        simulator.add_fault(ProviderOutage(outage, 0.6, middle, min(middle + 300, START_AT + seconds)))
    written = write_ndjson(simulator, out, seconds)
    print(f"wrote {written:,} events to {out}", file=sys.stderr)


def load(
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="Where leases are read, if not at --url: a worker with the role control; may be repeated.",
            metavar="URL",
            show_default="--url",
        ),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.1, help="Logical calls a second.")] = 20.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long.", show_default="until Ctrl-C")] = math.inf,
    seed: Annotated[int, typer.Option(help="Another seed is another day.")] = 1,
    outage: Annotated[
        str, typer.Option(help="Provider (a, b or c) that fails from the sixth to the tenth minute.")
    ] = "",
) -> None:
    """Sends the simulated estate's telemetry to a running Flyball at live speed, and obeys its leases as a gateway does.

    Examples:

      flyball lab load --url http://127.0.0.1:4390

      flyball lab load --url http://127.0.0.1:4390 --control http://127.0.0.1:4391 --rate 50 --outage b
    """
    from flyball.lab.faults import ProviderOutage
    from flyball.lab.live import LiveLab

    def faults(start: float) -> Sequence[AnyFault]:
        fails_at = start + _FAILS_AFTER_S
        return [ProviderOutage(outage, 0.6, fails_at, fails_at + 300.0)] if outage else []

    report_at = 0.0

    def report(tick: Tick) -> None:
        nonlocal report_at
        if tick.elapsed_s >= report_at:
            report_at = tick.elapsed_s + _REPORT_S
            refused = f", {tick.events_refused:,} refused" if tick.events_refused else ""
            leases = f", {len(tick.directives)} leases in force" if tick.directives else ""
            problem = f"; {tick.problem}" if tick.problem else ""
            print(
                f"{tick.elapsed_s:5.0f} s  {tick.events_sent:,} events{refused}{leases}{problem}", flush=True
            )

    lab = LiveLab(url, seed, faults, rate, token, control or ())
    try:
        asyncio.run(lab.run(seconds, report))
    except KeyboardInterrupt:
        print("stopped")
