"""`flyball run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flyball.app.cli._common import Config, Runbooks
from flyball.app.cli.database import Database


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="4390")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the database.", show_default="flyball-data")
    ] = None,
    database: Database = None,
    runbooks: Runbooks = None,
    kafka: Annotated[
        str | None,
        typer.Option(
            help="`HOST:PORT` of an Apache Kafka cluster: events are written to its topics, and workers do the rest.",
            metavar="ADDRESS",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="observe, suggest, approve or auto: ceiling on the runbooks.", show_default="suggest"
        ),
    ] = None,
    config: Config = None,
) -> None:
    """Takes telemetry, finds incidents, tells people, and acts within bounds.

    Examples:

      flyball run

      flyball run --port 4390 --data /var/lib/flyball --config flyball.yaml --mode auto

      flyball run --database postgresql://flyball:PASSWORD@db.example.com/flyball

      flyball run --kafka kafka-1:9092,kafka-2:9092
    """
    from flyball.app.serve import serve
    from flyball.app.settings import load

    settings = load(
        config,
        host=host,
        port=port,
        data=data,
        database=database,
        runbooks=runbooks or None,
        mode=mode,
        kafka=kafka,
    )
    raise typer.Exit(serve(settings))
