"""The command line. Answers go to standard output, progress and logs to standard error; exit codes: 0 fine, 1 found something,
2 wrong use, 3 could not reach.
"""

from __future__ import annotations

import os
import signal
import sys

import typer
from typer.exceptions import TyperException

from flyball.app.cli import (
    act,
    database,
    hook,
    lab,
    ledger,
    letters,
    look,
    rehearse,
    replay,
    run,
    runbook,
    setup,
    topics,
    worker,
)
from flyball.app.cli._common import Unreachable
from flyball.app.logs import configure_logging
from flyball.core.errors import FlyballError

FIVE_THINGS = """Flyball: the governor for AI in production.

  flyball demo              see the main job in your terminal, in under two minutes
  flyball init              write flyball.yaml and a first runbook, and see how to send your traffic
  flyball run               take telemetry, find incidents, act within bounds
  flyball status            what was read, found and done
  flyball replay FILE...    what would have been paged and done on recorded events

`flyball --help` lists every command; `flyball COMMAND --help` explains one, with examples."""

app = typer.Typer(
    name="flyball",
    help="The governor for AI in production.",
    invoke_without_command=True,
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _first(context: typer.Context) -> None:
    """The governor for AI in production: reads LLM calls, agent steps and GPU samples, explains what departs from normal, and acts.

    Examples:

      flyball demo

      flyball run --port 4390 --runbooks runbooks/
    """
    if context.invoked_subcommand is None:
        typer.echo(FIVE_THINGS)


run.add_to(app)
worker.add_to(app)
replay.add_to(app)
look.add_to(app)
letters.add_to(app)
topics.add_to(app)
ledger.add_to(app)
act.add_to(app)
setup.add_to(app)
lab.add_to(app)
hook.add_to(app)
database.add_to(app)
rehearse.add_to(runbook.group)
app.add_typer(runbook.group, name="runbook")


def main() -> None:
    """Entry point of the `flyball` command."""
    if os.getpid() == 1:
        # The first process of a container is not ended by a signal that it does not handle: a stop during the start would be lost.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    configure_logging()
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)
    except typer.Exit as e:
        code = e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Unreachable as e:
        code = _say(e, 3)
    except FlyballError as e:
        code = _say(e, e.exit_code)
    except BrokenPipeError:
        code = 0  # `flyball ... | head` is no error
    except TyperException as e:
        show = getattr(e, "show", None)
        if show is not None:
            show()
        code = 2
    return code if isinstance(code, int) else 0


def _say(e: FlyballError, code: int) -> int:
    print(f"flyball: {e}", file=sys.stderr)
    return code
