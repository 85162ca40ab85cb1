"""`flyball runbook …`: writing runbooks, looking at them, and finding what is wrong with them before they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flyball.app.cli._common import AsJson, Config, Runbooks, print_json
from flyball.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from flyball.runbooks.loader import RunbookSet

group = typer.Typer(help="Runbooks: what may be done, when, and how it is proved.", no_args_is_help=True)


@group.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Its name: lower case words joined by -.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where to write NAME.yaml.")] = Path("runbooks"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Writes a first runbook: commented, tested, right as it stands. Change it from there.

    Examples:

      flyball runbook new my-failover

      flyball runbook new my-failover --folder more-runbooks
    """
    from flyball.remediation.actions import registry
    from flyball.runbooks.loader import library
    from flyball.runbooks.template import new_runbook

    text = new_runbook(name)
    path = folder / f"{name}.yaml"
    if path.exists() and not force:
        raise ConfigError("exists already; choose another name, or overwrite with --force", where=str(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as e:
        raise ConfigError(f"cannot be written ({e.strerror}); name another folder", where=str(path)) from e
    print(f"wrote {path}")
    if name in library(actions=registry()).by_name:
        print(f"note: it replaces the shipped runbook {name}", file=sys.stderr)
    print(f"look it over with `flyball runbook lint {path}`", file=sys.stderr)


@group.command("lint")
def lint(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders with *.yaml.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Says what is wrong, one line each: `path:line:column: CODE what; what would be right`. Exit code 1 when anything is.

    Examples:

      flyball runbook lint runbooks/

      flyball runbook lint runbooks/ --json
    """
    from flyball.remediation.actions import registry
    from flyball.runbooks.lint import lint_paths

    count, errors = lint_paths(paths, actions=registry())
    for e in errors:
        if as_json:
            path, line, column = e.where.rsplit(":", 2)
            print_json(
                {"path": path, "line": int(line), "column": int(column), "code": e.code, "message": e.what}
            )
        else:
            print(e)
    if errors:
        raise typer.Exit(1)
    print(f"{count} runbook{'' if count == 1 else 's'}, nothing wrong", file=sys.stderr)


@group.command("list")
def list_runbooks(config: Config = None, runbooks: Runbooks = None, as_json: AsJson = False) -> None:
    """The runbooks that `flyball run` would have with these settings, and where each comes from.

    Examples:

      flyball runbook list

      flyball runbook list --runbooks runbooks/ --json
    """
    rows = [
        {"name": r.name, "path": r.path, "mode": r.mode, "source": r.source}
        for r in _loaded(config, runbooks)
    ]
    if as_json:
        for row in rows:
            print_json(row)
        return
    widths = {key: max(len(row[key]) for row in rows) for key in ("name", "mode", "source")}
    for row in rows:
        print("  ".join([*(row[key].ljust(widths[key]) for key in widths), row["path"]]))


@group.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name of a runbook.")],
    config: Config = None,
    runbooks: Runbooks = None,
) -> None:
    """Prints a runbook as it is written, comments and all: the way to a copy of a shipped one.

    Examples:

      flyball runbook show provider-failover

      flyball runbook show provider-failover > runbooks/provider-failover.yaml
    """
    loaded = _loaded(config, runbooks).by_name
    if name not in loaded:
        raise ConfigError(f"no runbook is called {name!r}{did_you_mean(name, loaded)}")
    sys.stdout.write(loaded[name].text)


@group.command("schema")
def schema() -> None:
    """JSON Schema of a runbook, with the parameters of every action: editors complete and check by it.

    Examples:

      flyball runbook schema

      flyball runbook schema > runbook.schema.json
    """
    from flyball.app.schemas import runbook_schema

    print(json.dumps(runbook_schema(), indent=2, ensure_ascii=False))


def _loaded(config: Path | None, runbooks: list[Path] | None) -> RunbookSet:
    from flyball.app.settings import load
    from flyball.remediation.actions import registry
    from flyball.runbooks.loader import load_runbooks

    settings = load(config, runbooks=runbooks or None)
    return load_runbooks(settings.runbooks, actions=registry())
