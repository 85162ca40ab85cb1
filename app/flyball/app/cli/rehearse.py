"""`flyball runbook test` and `flyball runbook backtest`: what runbooks would do, in the lab and on recorded events."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flyball.app.cli._common import AsJson, Config, plain_terminal, print_json
from flyball.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from flyball.app.rehearse import Backtest, Rehearsed
    from flyball.runbooks.loader import Runbook


def add_to(group: typer.Typer) -> None:
    """Adds both to `flyball runbook`."""
    group.command("test")(run_tests)
    group.command("backtest")(backtest)


def run_tests(
    paths: Annotated[
        list[str], typer.Argument(help="Files, folders with *.yaml, or names of shipped runbooks.")
    ],
    only: Annotated[
        str, typer.Option("--only", help="Only tests whose name or lab contains this.", show_default="all")
    ] = "",
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Each test on so many simulated days; 1: on its own seed.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Rehearses runbooks: runs the `tests:` in each of them in the lab, with nothing but that runbook. Exit code 1 when one fails.

    Examples:

      flyball runbook test runbooks/

      flyball runbook test provider-failover --only outage --seeds 5
    """
    from flyball.app.rehearse import quiet_pipeline, rehearse
    from flyball.lab.warm import Warm

    warm, failed, count = Warm(quiet_pipeline), 0, 0
    for runbook in _named(paths):
        if not as_json:
            print(f"{runbook.path}  {runbook.name}")
        chosen = [t for t in runbook.model.tests if only in t.name or only in t.lab]
        for one in chosen:
            for seed in [None] if seeds == 1 else range(1, seeds + 1):
                if not plain_terminal():
                    print(f"  …     {one.name or one.lab}", file=sys.stderr, end="\r")
                found = rehearse(runbook, one, warm, seed=seed)
                count += 1
                failed += not found.passed
                if as_json:
                    print_json(found.as_dict() | ({"seed": seed} if seed is not None else {}))
                else:
                    _print_rehearsed(found, seed)
        if not runbook.model.tests and not as_json:
            print("  no tests: write some; see `flyball runbook lint`")
    tests = "1 test" if count == 1 else f"{count} tests"
    print(f"{tests}, {failed} failed" if failed else f"{tests} passed", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _print_rehearsed(found: Rehearsed, seed: int | None) -> None:
    mark = "ok   " if found.passed else "FAIL "
    on = f"  [seed {seed}]" if seed is not None else ""
    print(f"  {mark} {found.name}{on}")
    if found.passed:
        shown = found.matched.used or found.came
        print(f"        {', '.join(f'{h.at:.0f}s {h}' for h in shown[:8]) or 'nothing came'}")
        return
    print(f"        lab       {found.lab}")
    print(f"        expected  {', '.join(found.expect)}")
    for i, h in enumerate(found.came[:40]):
        print(
            f"        {'came    ' if not i else '        '}  {h.at:.0f}s {h}{': ' + h.detail if h.detail else ''}"
        )
    if not found.came:
        print(f"        came      nothing in {found.lab_s:.0f} s of the lab")
    if found.matched.missing:
        print(f"        missing   {found.matched.missing}")
    if found.matched.unwanted:
        print(f"        unwanted  {found.matched.unwanted}")


def backtest(
    runbook: Annotated[str, typer.Argument(help="File of the runbook, or the name of a shipped one.")],
    events: Annotated[list[Path], typer.Argument(help="Recorded bodies; plain, gzip or zstd.")],
    format: Annotated[str, typer.Option(help="auto, native, litellm, otlp or prometheus.")] = "auto",
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Says how often a runbook would have run on recorded events, what held it back, and how wide and how fast it would have been.

    Nothing is changed in the world. Recorded traffic does not move: how the target would have fared is not known.

    Examples:

      flyball runbook backtest runbooks/failover.yaml march.ndjson.zst

      flyball runbook backtest provider-failover traces/*.pb.gz --format otlp --json
    """
    from flyball.app.cli.replay import _progress
    from flyball.app.rehearse import backtest as run_backtest
    from flyball.app.replay import Source
    from flyball.app.settings import load
    from flyball.app.wiring import make_formats

    found_runbooks = _named([runbook])
    if len(found_runbooks) != 1:
        raise ConfigError(f"holds {len(found_runbooks)} runbooks; name one", where=runbook)
    settings = load(config)
    formats = make_formats(settings, b"flyball replay")
    with _progress(sum(f.stat().st_size for f in events if f.is_file())) as advance:
        source = Source(events, formats, format, advance)
        found = run_backtest(found_runbooks[0], settings, source)
    for error in source.errors:
        print(f"rejected: {error}", file=sys.stderr)
    if as_json:
        print_json(found.as_dict())
    else:
        print("\n".join(backtest_lines(found)))


def backtest_lines(found: Backtest) -> list[str]:
    """The answer as people read it, one fact after the other.

    `14 d, 61.2 M calls: would have run 3 times, held 1 (cooldown), refused 0; widest blast 22 % of traffic, 18 tenants; …`
    """
    calls = found.events.get("llm_call", 0)
    told = f"{_amount(calls)} calls" if calls else f"{_amount(sum(found.events.values()))} events"
    ran = len(found.ran)
    line = (
        f"{_span((found.last or 0.0) - (found.first or 0.0))}, {told}: "
        f"would have run {ran} time{'' if ran == 1 else 's'}, held {_reasons(found.held)}, refused {_reasons(found.refused)}"
    )
    if found.ran:
        line += f"; widest blast {found.widest_traffic:.0%} of traffic, {found.most_tenants} tenants"
        line += f"; mean {found.mean_to_act_s or 0.0:.0f} s to act"
    lines = [line]
    lines += [
        f"  {_when(d.at)}  ran for {d.incident}: {d.values.get('root', '')} {d.detail}".rstrip()
        for d in found.ran[:20]
    ]
    if found.outcomes:
        lines.append("  ended: " + ", ".join(f"{n} {word}" for word, n in sorted(found.outcomes.items())))
    lines.append(
        f"  {found.incidents} incidents of any kind; recorded traffic does not move: how the target would have fared is not known"
    )
    return lines


def _when(at: float) -> str:
    from flyball.app.text import clock

    return clock(at)


def _reasons(found: Mapping[str, int]) -> str:
    total = Counter(found).total()
    words = ", ".join(f"{name} {n}" if len(found) > 1 else name for name, n in sorted(found.items()))
    return f"{total} ({words})" if total else "0"


def _span(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _amount(n: int) -> str:
    if n >= 1_000_000:
        return f"{n / 1e6:.1f} M"
    return f"{n:,}"


def _named(paths: Sequence[str]) -> list[Runbook]:
    """Runbooks of files and folders, and shipped ones by their name. Raises: ConfigError for what is neither."""
    from flyball.remediation import actions
    from flyball.runbooks.loader import library, load_runbooks

    shipped = library(actions=actions.registry()).by_name
    found: list[Runbook] = []
    files: list[str] = []
    for path in paths:
        if not Path(path).exists() and path in shipped:
            found.append(shipped[path])
        elif not Path(path).exists():
            hint = did_you_mean(path, shipped)
            raise ConfigError(f"is neither a file nor a folder nor a shipped runbook{hint}", where=path)
        else:
            files.append(path)
    if files:
        found += load_runbooks(files, actions=actions.registry(), packaged=False)
    return found
