"""Lint of 1,000 runbooks on one core, against reading the same files with PyYAML's safe loader in the same run.

Each runbook has conditions and params of its own, so that nothing is compiled once for many; one in ten has a mistake.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from flyball.remediation.actions import registry
from flyball.runbooks import loader
from flyball.runbooks.lint import lint_texts
from flyball.runbooks.template import new_runbook

COUNT = 1000
ROUNDS = 3
BAR_S = 5.0


def texts(count: int = COUNT) -> dict[str, bytes]:
    """The shipped runbooks and the one that `new` writes, in turns, each with another name, condition and param."""
    folder = Path(loader.__file__).parent / "library"
    shipped = [p.read_text() for p in sorted(folder.glob("*.yaml"))]
    made = {}
    for i in range(count):
        text = [*shipped, new_runbook("first-steps")][i % (len(shipped) + 1)]
        name = yaml.safe_load(text)["name"]
        text = text.replace(f"name: {name}", f"name: {name}-{i}", 1)
        text = text.replace(
            "when: >-\n", f'when: >-\n  incident.root.name != "{i}" && params.own_{i} > 0 &&\n', 1
        )
        own = f"own_{i}: {i + 1}"
        text = (
            text.replace("params:\n", f"params:\n  {own}\n", 1)
            if "params:\n" in text
            else f"{text}params: {{{own}}}\n"
        )
        if i % 10 == 9:
            text = text.replace("incident.signal", "incident.sgnal", 1)
        made[f"{i}.yaml"] = text.encode()
    return made


def timed(what: Callable[[], object]) -> float:
    began = time.process_time()
    what()
    return time.process_time() - began


def run() -> list[dict[str, Any]]:
    made, actions = texts(), registry()
    found = lint_texts(made, actions=actions)
    assert {e.code for e in found} == {"RB104"}
    assert len(found) == COUNT // 10
    ours = min(timed(lambda: lint_texts(made, actions=actions)) for _ in range(ROUNDS))
    theirs = timed(lambda: [yaml.load(text, Loader=yaml.SafeLoader) for text in made.values()])
    native = timed(lambda: [yaml.load(text, Loader=yaml.CSafeLoader) for text in made.values()])
    return [
        {
            "name": name, "value": round(ours, 3), "unit": "s of one core", "baseline": round(baseline, 3),
            "ratio": round(ours / baseline, 2), "bar": bar, "holds": None if bar is None else ours <= bar,
        }
        for name, baseline, bar in (
            ("lint_1000_runbooks (against yaml.SafeLoader)", theirs, BAR_S),
            ("lint_1000_runbooks (against yaml.CSafeLoader)", native, None),
        )
    ]  # fmt: skip


if __name__ == "__main__":
    for row in run():
        print(row)
