"""`flyball database …`: the schema of the database, and how to bring it to this version's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flyball.app.cli._common import AsJson, Config, print_json

Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="PostgreSQL: postgresql://USER:PASSWORD@HOST:PORT/NAME; else FLYBALL_DATABASE, which lists of processes do not show.",
        show_default=False,
    ),
]
_Folder = Annotated[
    Path | None, typer.Option("--data", help="Data folder, where the database is SQLite.", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(
        help="The database's schema: which it is, and the step to this version's.", no_args_is_help=True
    )
    group.command("upgrade")(upgrade)
    group.command("current")(current)
    app.add_typer(group, name="database")


def upgrade(database: Database = None, data: _Folder = None, config: Config = None) -> None:
    """Makes the tables, or changes those of an older Flyball; all or nothing, and nothing when all is as it should be.

    Stop the Flyball that uses the database, and make a copy of it, before you change one that holds anything.

    Examples:

      flyball database upgrade --database postgresql://flyball:PASSWORD@db.example.com/flyball

      flyball database upgrade --data /var/lib/flyball
    """
    from flyball.app.store import migrate

    before, after = migrate.upgrade(_meant(database, data, config))
    if before == after:
        print(f"schema {after} already")
    else:
        print(f"schema {before} → {after}" if before else f"tables made, schema {after}")


def current(
    database: Database = None, data: _Folder = None, config: Config = None, as_json: AsJson = False
) -> None:
    """Which schema the database has, and which this Flyball needs. Exit code 1 when they differ.

    Examples:

      flyball database current --database postgresql://flyball:PASSWORD@db.example.com/flyball

      flyball database current --data /var/lib/flyball
    """
    from flyball.app.store import migrate
    from flyball.app.store.sqlite import SCHEMA_VERSION

    found = migrate.current(_meant(database, data, config))
    if as_json:
        print_json({"schema": found, "needed": SCHEMA_VERSION})
    elif found == SCHEMA_VERSION:
        print(f"schema {found}, as this Flyball needs it")
    else:
        had = f"schema {found}" if found else "no tables of Flyball"
        print(f"{had}; this Flyball needs schema {SCHEMA_VERSION}: `flyball database upgrade`")
    if found != SCHEMA_VERSION:
        raise typer.Exit(1)


def _meant(database: str | None, data: Path | None, config: Path | None) -> Path | str:
    from flyball.app.settings import load
    from flyball.app.wiring import database_of, database_path

    if data is not None and database is None:
        return database_path(data)
    return database_of(load(config, database=database, data=data))
