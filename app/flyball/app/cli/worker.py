"""`flyball worker`."""

from __future__ import annotations

from typing import Annotated

import typer

from flyball.app.cli._common import Config, Runbooks
from flyball.app.cli.database import Database
from flyball.app.cli.topics import Kafka


def add_to(app: typer.Typer) -> None:
    app.command("worker")(worker)


def worker(
    kafka: Kafka = None,
    database: Database = None,
    roles: Annotated[
        str | None,
        typer.Option(help="windows, detect, control: any of them, between commas.", show_default="all"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="4390")] = None,
    runbooks: Runbooks = None,
    config: Config = None,
) -> None:
    """Reads telemetry from Kafka's topics, finds incidents, and acts: alone, or as one of many.

    Examples:

      flyball worker --kafka kafka-1:9092 --database postgresql://flyball:PASSWORD@db.example.com/flyball

      flyball worker --kafka kafka-1:9092 --roles windows
    """
    from flyball.app.settings import load
    from flyball.core.errors import ConfigError
    from flyball.streams.kafka import require_clients

    settings = load(
        config, kafka=kafka or None, database=database, host=host, port=port, runbooks=runbooks or None
    )
    if not settings.kafka.bootstrap:
        raise ConfigError("no Kafka cluster is named; give --kafka host:port, or set FLYBALL_KAFKA")
    require_clients()
    from flyball.app.worker import roles_of, work

    raise typer.Exit(work(settings, roles_of(roles or "")))
