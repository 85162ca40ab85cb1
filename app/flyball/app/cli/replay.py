"""`flyball replay`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flyball.app.cli._common import AsJson, Config, Runbooks, plain_terminal, print_json

if TYPE_CHECKING:
    from collections.abc import Iterator


def add_to(app: typer.Typer) -> None:
    app.command("replay")(replay)


def replay(
    files: Annotated[list[Path], typer.Argument(help="Recorded bodies; plain, gzip or zstd.", exists=False)],
    format: Annotated[str, typer.Option(help="auto, native, litellm, otlp or prometheus.")] = "auto",
    runbooks: Runbooks = None,
    mode: Annotated[
        str | None, typer.Option(help="observe, suggest, approve or auto.", show_default="suggest")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Runs recorded events through the same stages in event time, and prints what would have been paged and done.

    Nothing is changed in the world. Twice the same input gives the same output, byte for byte.

    Examples:

      flyball replay march.ndjson.zst

      flyball replay traces/*.pb.gz --format otlp --mode auto --json
    """
    from flyball.app.replay import Replay, Source
    from flyball.app.settings import load
    from flyball.app.wiring import make_formats, make_pipeline

    settings = load(config, runbooks=runbooks or None, mode=mode)
    # A fixed key: hashes of content must not make two replays of one file differ.
    formats = make_formats(settings, b"flyball replay")
    total = sum(f.stat().st_size for f in files if f.is_file())
    with _progress(total) as advance:
        source = Source(files, formats, format, advance)
        for line in Replay(make_pipeline(settings, scripted=True)).run(source):
            if as_json:
                print_json(line)
            else:
                _print(line)
    for error in source.errors:
        print(f"rejected: {error}", file=sys.stderr)


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on the terminal for long input only."""
    if plain_terminal() or total_bytes < 4 << 20:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = ("replay", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replay", total=total_bytes)
        yield lambda done: bar.update(task, completed=done)


def _print(line: dict[str, Any]) -> None:
    from flyball.app.text import clock, replay_line

    if line["type"] == "summary":
        events = ", ".join(f"{n:,} {kind}" for kind, n in sorted(line["events"].items())) or "no events"
        span = f" from {clock(line['from'])} to {clock(line['to'])}" if line["from"] is not None else ""
        rejected = sum(line["rejected"].values())
        print(f"\n{events}{span}; {line['duplicates']} copies, {line['late']} late, {rejected} rejected")
        print(
            f"{line['incidents']} incidents, {line['pages']} pages, {line['directives']} directives "
            f"({line['windows']} windows, {line['anomalies']} anomalies)"
        )
        return
    print(replay_line(line))
