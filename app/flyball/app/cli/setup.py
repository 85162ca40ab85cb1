"""`flyball init`, `flyball doctor`, `flyball schema …`: getting it to run, and to go on running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flyball.app.cli._common import DEFAULT_URL, AsJson, Config, TokenOption, Url, print_json
from flyball.core.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    app.command("init")(init)
    app.command("doctor")(doctor)
    schema = typer.Typer(help="JSON Schemas of what people and programs write.", no_args_is_help=True)
    schema.command("events")(schema_events)
    app.add_typer(schema, name="schema")


def init(
    folder: Annotated[Path, typer.Argument(help="Where to write.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Writes a commented flyball.yaml and a first runbook, and says how to send your traffic.

    Examples:

      flyball init

      flyball init /etc/flyball --force
    """
    from flyball.app.starter import NEXT_STEPS, files

    wanted = {folder / name: text for name, text in files().items()}
    there = [str(p) for p in wanted if p.exists()]
    if there and not force:
        raise ConfigError("exists already; remove it, or overwrite with --force", where=", ".join(there))
    for path, text in wanted.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as e:
            raise ConfigError(
                f"cannot be written ({e.strerror}); name another folder", where=str(path)
            ) from e
        print(f"wrote {path}")
    print(NEXT_STEPS.format(config=folder / "flyball.yaml"))


def doctor(
    config: Config = None,
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
    as_json: AsJson = False,
) -> None:
    """Says line by line what is well, what is not, and the command or setting that mends it. Exit code 1 when something is not.

    Examples:

      flyball doctor

      flyball doctor --config flyball.yaml --json
    """
    from flyball.app.doctor import examine

    findings = examine(config, url, token)
    for f in findings:
        if as_json:
            print_json({"check": f.check, "level": f.level, "what": f.what, "mend": f.mend})
        else:
            print(f"{f.level:5} {f.check}: {f.what}" + (f"\n      mend: {f.mend}" if f.mend else ""))
    if any(f.level == "bad" for f in findings):
        raise typer.Exit(1)


def schema_events() -> None:
    """JSON Schema of the native events: one object a line at POST /v1/events.

    Examples:

      flyball schema events

      flyball schema events > events.schema.json
    """
    import json

    from flyball.app.schemas import events_schema

    schema: dict[str, Any] = events_schema()
    print(json.dumps(schema, indent=2))
