"""What Flyball says about recorded agent runs, and which of them the runbook `runaway-agent` would have stopped in mode `auto`.

The recordings (ReAct runs on HotpotQA, mini-swe-agent runs, tau-bench airline runs) are not part of the repository. Give their
folder as the argument or in FLYBALL_RECORDINGS; without it this says so and ends well. `convert` turns them into native
NDJSON events, which `flyball replay` reads too. All runs are replayed together as they were recorded; those that a detector
says anything about are replayed again, each by itself, because what runs beside a run decides whether it or its agent is blamed.
The HotpotQA recordings hold no model calls: how much of the traffic a run has is unknown there, so the runbook only asks a person.

    python benchmarks/agent_runs.py FOLDER
    python benchmarks/agent_runs.py FOLDER --convert agents.ndjson
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import msgspec

from flyball.app.replay import Replay, Source
from flyball.app.settings import Settings
from flyball.app.tables import print_rows
from flyball.app.wiring import make_formats, make_pipeline
from flyball.core.events import AgentStep, Event, LlmCall

FILES: Final = ("hotpot_react", "mini_swe", "tau_airline")
RUNBOOK: Final = "runaway-agent"
GOOD: Final = ("mini_swe", "tau_airline reward 0", "tau_airline reward 1")
"""Labels of runs that came to their end by themselves: none of them may be stopped."""
HALTED: Final = "hotpot HALTED"
"""Runs that were stopped at their limit of steps: the runaway ones."""
NO_FOLDER: Final = (
    "no recordings: give their folder as the argument or in FLYBALL_RECORDINGS; nothing measured"
)
EPOCH: Final = 1_760_000_000.0
"""Where runs that were recorded without times begin."""
STEP_S: Final = 4.0
"""Seconds between the steps of such runs: about the median of the recorded coding runs."""


def folder_of(argument: str | None) -> Path | None:
    """The folder with the recordings, or None when none is named or it holds no recording."""
    name = argument or os.environ.get("FLYBALL_RECORDINGS", "")
    if not name:
        return None
    for folder in (Path(name), Path(name) / "agents"):
        if any((folder / f"{f}.jsonl.gz").is_file() for f in FILES):
            return folder
    return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _hotpot(folder: Path) -> Iterator[tuple[str, str, list[Event]]]:
    for i, run in enumerate(_lines(folder / "hotpot_react.jsonl.gz")):
        name, events = f"hotpot/{i}", list[Event]()
        for k, s in enumerate(run["steps"]):
            events.append(
                AgentStep(
                    at=EPOCH + 40.0 * i + STEP_S * (k + 1), run=name, app="hotpot", agent="react", tool=s["name"], step=s["i"],
                    args_hash=s["act"], result_hash=s["res"], result_bytes=s["rlen"],
                    error="unsuccessful" if s["err"] else "", id=f"{name}/{k}",
                )
            )  # fmt: skip
        yield name, f"hotpot {run['label']}", events


def _mini_swe(folder: Path) -> Iterator[tuple[str, str, list[Event]]]:
    for i, run in enumerate(_lines(folder / "mini_swe.jsonl.gz")):
        name, events = f"swe/{i}/{run['run']}", list[Event]()
        for k, s in enumerate(run["steps"]):
            at = float(s["ts"])
            events.append(
                LlmCall(
                    at=at, id=f"{name}/{k}", provider=s["prov"] or "", app="mini_swe", agent="mini-swe-agent", run=name,
                    input_tokens=s["pt"], output_tokens=s["ct"], reasoning_tokens=s["rt"], cache_read_tokens=s["cached"],
                    cost_usd=s["cost"],
                )
            )  # fmt: skip
            code = s.get("rc")
            events.append(
                AgentStep(
                    at=at, run=name, app="mini_swe", agent="mini-swe-agent", tool=s["verb"] or "bash", step=k + 1,
                    args_hash=s["act"] or "", result_hash=s["res"] or "", result_bytes=s["rlen"],
                    error=f"exit_{code}" if code else "", id=f"{name}/{k}/tool",
                )
            )  # fmt: skip
        yield name, "mini_swe", events


def _tau(folder: Path) -> Iterator[tuple[str, str, list[Event]]]:
    kinds = {"user": "user", "msg": "message", "tool": "tool"}
    for i, run in enumerate(_lines(folder / "tau_airline.jsonl.gz")):
        name, events = f"tau/{i}/{run['run']}", list[Event]()
        for s in run["steps"]:
            tool = s["kind"] == "tool"
            events.append(
                AgentStep(
                    at=EPOCH + 300.0 * i + STEP_S * s["i"], run=name, app="tau_airline", agent="airline", kind=kinds[s["kind"]],
                    tool=s["name"] if tool else "", step=s["i"], args_hash=s["act"], result_hash=s.get("res", ""),
                    result_bytes=s["rlen"], error="unsuccessful" if s.get("err") else "", id=f"{name}/{s['i']}",
                )
            )  # fmt: skip
        yield name, f"tau_airline reward {run['reward']:.0f}", events


def runs(folder: Path) -> Iterator[tuple[str, str, list[Event]]]:
    """(run id, label, events in order) of every recorded run."""
    yield from _hotpot(folder)
    yield from _mini_swe(folder)
    yield from _tau(folder)


def convert(folder: str | Path, out: str | Path) -> int:
    """Writes every recorded run as native NDJSON, in event-time order; returns the number of events.

    Raises: FileNotFoundError when the folder holds no recording.
    """
    found = folder_of(str(folder))
    if found is None:
        raise FileNotFoundError(f"{folder}: no {', '.join(f'{f}.jsonl.gz' for f in FILES)} here")
    events = [event for _, _, of_run in runs(found) for event in of_run]
    events.sort(key=lambda e: e.at)
    write(events, Path(out))
    return len(events)


def write(events: Sequence[Event], out: Path) -> None:
    encode = msgspec.json.Encoder().encode
    with out.open("wb") as lines:
        for event in events:
            lines.write(encode(event) + b"\n")


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """Per label: runs, runs flagged by each event detector, the patterns of the loops, and runs that were blocked."""
    from flyball.detectors.agent_inflation import AgentInflation
    from flyball.detectors.runaway_loop import RunawayLoop

    label_of: dict[str, str] = {}
    events_of: dict[str, list[Event]] = {}
    for name, label, of_run in runs(folder):
        label_of[name], events_of[name] = label, of_run
    events = sorted((e for of_run in events_of.values() for e in of_run), key=lambda e: e.at)
    table: dict[str, dict[str, Any]] = {
        label: {"runs": n, "flagged": Counter[str](), "patterns": Counter[str](), "blocked": 0}
        for label, n in Counter(label_of.values()).items()
    }
    flagged: dict[str, set[str]] = defaultdict(set)
    for detector in (RunawayLoop(), AgentInflation()):
        for anomaly in detector.feed(events):
            if anomaly.phase != "on":
                continue
            run = anomaly.labels["run"]
            if run not in flagged[anomaly.signal]:
                flagged[anomaly.signal].add(run)
                table[label_of[run]]["flagged"][anomaly.signal] += 1
            if anomaly.signal == "agent.loop":
                table[label_of[run]]["patterns"][anomaly.klass] += 1
    with tempfile.TemporaryDirectory() as scratch:
        blocked = _blocked(events, Path(scratch))
        for name in sorted(set().union(*flagged.values())):
            blocked |= _blocked(events_of[name], Path(scratch))
    for run in blocked:
        table[label_of[run]]["blocked"] += 1
    return table


def _blocked(events: Sequence[Event], scratch: Path) -> set[str]:
    """Runs that the library's runbook blocks when its mode and the environment's are `auto`; replayed as `flyball replay` does."""
    book, recorded = scratch / f"{RUNBOOK}.yaml", scratch / "runs.ndjson"
    text = files("flyball.runbooks").joinpath(f"library/{RUNBOOK}.yaml").read_text()
    book.write_text(text.replace("mode: suggest", "mode: auto"))
    write(events, recorded)
    settings = Settings.model_construct(mode="auto", runbooks=[book])
    source = Source([recorded], make_formats(settings, b"flyball replay"), "native")
    said = Replay(make_pipeline(settings, scripted=True)).run(source)
    return {
        x["scope"]["run"]
        for x in said
        if x["type"] == "directive" and x["kind"] == "block" and x["scope"].get("run")
    }


def _row(name: str, value: float, unit: str, bar: float | None = None) -> dict[str, Any]:
    holds = None if bar is None else value <= bar
    return {
        "name": f"agents.{name}", "value": round(value, 4), "unit": unit, "baseline": None, "ratio": None, "bar": bar,
        "holds": holds,
    }  # fmt: skip


def rows_of(table: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures for the collector. Labels that are not in the folder count as no runs."""
    none: dict[str, Any] = {"runs": 0, "flagged": Counter(), "blocked": 0}
    halted, good = table.get(HALTED, none), [table.get(label, none) for label in GOOD]
    well = table.get("hotpot CORRECT", none)
    return [
        _row("halted_found", halted["flagged"]["agent.loop"] / max(halted["runs"], 1), "ratio"),
        _row("halted_blocked", halted["blocked"] / max(halted["runs"], 1), "ratio"),
        _row("correct_blocked", well["blocked"], "runs", 0.0),
        _row("good_runs", sum(g["runs"] for g in good), "runs"),
        _row("good_runs_flagged", sum(g["flagged"]["agent.loop"] for g in good), "runs", 0.0),
        _row("good_runs_blocked", sum(g["blocked"] for g in good), "runs", 0.0),
    ]


def run() -> list[dict[str, Any]]:
    folder = folder_of(None)
    if folder is None:
        print(NO_FOLDER, file=sys.stderr)
        return []
    return rows_of(measure(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="folder with the recordings (else FLYBALL_RECORDINGS)")
    parser.add_argument("--convert", metavar="OUT", help="write native NDJSON here and stop")
    options = parser.parse_args(arguments)
    folder = folder_of(options.folder)
    if folder is None:
        print(NO_FOLDER, file=sys.stderr)
        return 0
    if options.convert:
        print(f"{convert(folder, options.convert)} events written to {options.convert}", file=sys.stderr)
        return 0
    signals = ("agent.loop", "agent.context", "agent.spend", "agent.fan_out")
    print(f"{'label':24}{'runs':>6}" + "".join(f"{s:>16}" for s in signals) + f"{'blocked':>9}  patterns")
    table = measure(folder)
    for label, row in sorted(table.items()):
        cells = "".join(f"{row['flagged'][s]:>7} {row['flagged'][s] / row['runs']:>7.1%} " for s in signals)
        print(f"{label:24}{row['runs']:>6}{cells}{row['blocked']:>8}  {dict(row['patterns'].most_common())}")
    print_rows(rows_of(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
