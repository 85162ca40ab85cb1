"""`flyball ledger …`: the durable record of every decision and action, read from the database."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from flyball.app.cli._common import AsJson, database, print_json
from flyball.app.cli.database import Database
from flyball.core.errors import ConfigError

_Folder = Annotated[Path, typer.Option("--data", help="Data folder.")]
_DATA = Path("flyball-data")


def add_to(app: typer.Typer) -> None:
    ledger = typer.Typer(help="The durable record of every decision and action.", no_args_is_help=True)
    ledger.command("list")(list_)
    ledger.command("show")(show)
    ledger.command("verify")(verify)
    app.add_typer(ledger, name="ledger")


def _where(data: Path, postgres: str | None) -> Path | str:
    return postgres or (os.environ.get("FLYBALL_DATABASE", "") if data == _DATA else "") or data


def list_(
    data: _Folder = _DATA,
    postgres: Database = None,
    incident: Annotated[str, typer.Option(help="Only of this incident.")] = "",
    runbook: Annotated[str, typer.Option(help="Only of this runbook.")] = "",
    kind: Annotated[str, typer.Option(help="Only decision, directive, outcome, operation or person.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many at most: the newest.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Every decision and action, refusals included, oldest first.

    Examples:

      flyball ledger list --data flyball-data

      flyball ledger list --incident INC-7QF3XK2A --json
    """
    from flyball.app.store.ledger import list_ledger

    with database(_where(data, postgres)) as c:
        entries = list_ledger(c, incident, limit, runbook=runbook, kind=kind, newest=True)
    for e in entries:
        if as_json:
            print_json(e)
        else:
            print(_line(e))


def _line(e: dict[str, Any]) -> str:
    from flyball.app.text import clock, ledger_text

    return f"{clock(e['at'])}  {e['key']}  {e['incident']}  {e['runbook']}  {ledger_text(e)}"


def show(
    key: Annotated[str, typer.Argument(help="Key or number of the line, as `flyball ledger list` shows it.")],
    data: _Folder = _DATA,
    postgres: Database = None,
    as_json: AsJson = False,
) -> None:
    """One line of the ledger in full: who, what, why, and the values it was decided on.

    Examples:

      flyball ledger show DEC-7QF3XK2A4B6C8D

      flyball ledger show 17 --data flyball-data --json
    """
    from flyball.app.store.ledger import get_entry
    from flyball.app.text import entry_lines

    with database(_where(data, postgres)) as c:
        found = get_entry(c, key)
    if found is None:
        raise ConfigError(f"the ledger has no line {key[:100]!r}; `flyball ledger list` lists them")
    if as_json:
        print_json(found)
        return
    for line in entry_lines(found):
        print(line)


def verify(data: _Folder = _DATA, postgres: Database = None) -> None:
    """Checks the chain of hashes: every line seals all before it. Exit code 1 when one was changed or removed.

    Examples:

      flyball ledger verify

      flyball ledger verify --data /var/lib/flyball
    """
    from flyball.app.store.ledger import verify_ledger

    with database(_where(data, postgres)) as c:
        broken = verify_ledger(c)
    if broken is not None:
        print(f"the ledger was changed at or before line {broken}")
        raise typer.Exit(1)
    print("the ledger is whole")
