"""`flyball demo` and `flyball lab …`: the simulator."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flyball.app.cli._common import AsJson, plain_terminal, print_json


def add_to(app: typer.Typer) -> None:
    app.command("demo")(demo)
    lab = typer.Typer(
        help="The simulator: an AI estate with faults and their ground truth.", no_args_is_help=True
    )
    lab.command("score")(score)
    lab.command("export")(export)
    app.add_typer(lab, name="lab")


def demo(
    seconds: Annotated[float, typer.Option(min=40, help="How long it runs.")] = 105.0,
    seed: Annotated[int, typer.Option(help="Another seed is another day.")] = 1,
    keep: Annotated[Path | None, typer.Option(help="Keep the data in this folder.", show_default="")] = None,
) -> None:
    """The main job, live: a simulated estate, three faults, incidents with their evidence, a lease granted, verified and released.

    Examples:

      flyball demo

      flyball demo --seconds 60 --keep demo-data
    """
    from flyball.app.demo import run_demo

    raise typer.Exit(run_demo(seconds, seed, keep))


def score(
    seeds: Annotated[int, typer.Option(min=1, help="Simulations of each fault.")] = 20,
    days: Annotated[int, typer.Option(min=0, help="Quiet days: whatever pages in them is false.")] = 20,
    fault: Annotated[
        list[str] | None, typer.Option(help="Only this fault; may be repeated.", show_default="all")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Simulations side by side.")] = os.cpu_count() or 1,
    as_json: AsJson = False,
) -> None:
    """Measures detection on simulated faults, and false pages on simulated quiet days. Exit code 1 when a bar does not hold.

    Examples:

      flyball lab score

      flyball lab score --seeds 3 --days 1 --fault provider_outage --json
    """
    from flyball.lab.score import FAULTS, Result
    from flyball.lab.score import score as run_score

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
        fault or tuple(FAULTS),
        days,
        processes=processes,
        progress=progress,
    )
    if as_json:
        for row in table.as_dicts():
            print_json(row)
    else:
        from flyball.app.tables import print_rows

        print(table.simulated)
        print_rows(table.as_dicts())
    if not table.holds():
        raise typer.Exit(1)


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
