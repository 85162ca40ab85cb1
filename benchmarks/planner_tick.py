"""What a second of the planner costs with 1,000 open incidents and 20 runbooks, against evaluating their conditions alone.

The planner ticks every second, and a window closes every tenth; what is owed after it is spread over the ticks. Two of the
runbooks' conditions are true for each incident: one plan waits for a person, and one is refused because its target has too much
traffic. Asking every guard again each second would cost several times what the conditions alone do. Processor time, because the
machine may be busy with other things.

    python -m benchmarks planner_tick
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from flyball.core.columns import BASE_LABELS, COUNTED, SUMS, Rollup, Window
from flyball.core.entities import Entity
from flyball.core.errorclass import CLASSES
from flyball.core.incident import Incident, IncidentChange, Severity
from flyball.remediation.actions import registry
from flyball.runbooks.conditions import variables_of
from flyball.runbooks.estate import LiveEstate
from flyball.runbooks.loader import RunbookSet, load_texts
from flyball.runbooks.planner import Planner

INCIDENTS: Final = 1000
RUNBOOKS: Final = 20
TENANTS: Final = 1000
CELLS: Final = 5000
SECONDS: Final = 60
START: Final = 1_760_000_000.0
_SIGNALS: Final = ("llm.cost", "llm.errors", "llm.latency", "llm.retries")

_TEXT: Final = """
runbook: v1
name: book-{i}
owner: bench
when: incident.root.kind == "tenant" && incident.signal == "{signal}" && incident.severity >= {severity}
max_age: 12h
mode: approve
approval: 12h
preconditions: [{{id: busy, check: 'calls(incident.scope, duration("1m")) > 0'}}]
limits: {{cooldown: 30m, runs: 3/1h, blast: {{traffic: {traffic}}}}}
steps:
  - limit: {{scope: $incident.root, requests_per_min: [50%, 25%], for: 30m}}
"""


def books() -> RunbookSet:
    texts = {}
    for i in range(RUNBOOKS):
        signal = _SIGNALS[i % len(_SIGNALS)]
        severity = "LOW" if i < 2 * len(_SIGNALS) else "CRITICAL"
        traffic = "25%" if i < len(_SIGNALS) else "0.01%"
        texts[f"{i}.yaml"] = _TEXT.format(i=i, signal=signal, severity=severity, traffic=traffic)
    return load_texts(texts, actions=registry())


def window(start: float) -> Window:
    n = CELLS
    by_class = np.zeros((n, len(CLASSES)), np.int64)
    by_class[:, 0] = 20
    calls = by_class.sum(axis=1)
    told = {name: calls.copy() for name in set(COUNTED.values())}
    labels = []
    for i in range(n):
        known = {
            "provider": f"p{i % 5}",
            "model": f"m{i % 7}",
            "app": f"a{i % 11}",
            "tenant": f"t{i % TENANTS}",
        }
        labels.append(tuple(known.get(name, "") for name in BASE_LABELS))
    cells = Rollup(
        by=BASE_LABELS, ids=np.arange(n, dtype=np.int64), capacity=n, born=np.full(n, START), labels=labels, calls=calls,
        by_class=by_class, tenants=np.ones(n, np.int64), failing_tenants=np.zeros((n, len(CLASSES)), np.int64),
        sums={name: np.ones(n) for name in SUMS}, counts=told, histograms={},
    )  # fmt: skip
    return Window(start, start + 10.0, cells, {}, {})


def incident(i: int, at: float) -> Incident:
    return Incident(
        id=f"INC-{i}", at=at, since=at, updated_at=at, root=Entity("tenant", f"t{i % TENANTS}"),
        signal=_SIGNALS[i % len(_SIGNALS)], severity=Severity.HIGH, scope={"tenant": f"t{i % TENANTS}"},
    )  # fmt: skip


def conditions_alone(
    runbooks: RunbookSet, incidents: list[Incident], estate: LiveEstate, now: float
) -> float:
    """Seconds for asking every condition of every incident once."""
    began = time.process_time()
    for one in incidents:
        values = variables_of(one, now)
        for runbook in runbooks:
            runbook.condition.ask(values, estate)
    return time.process_time() - began


def run() -> list[dict[str, Any]]:
    runbooks, estate = books(), LiveEstate()
    now = START
    for _ in range(12):
        estate.feed([window(now)])
        now += 10.0
    incidents = [incident(i, now) for i in range(INCIDENTS)]
    planner = Planner(runbooks, "auto")
    opened = [IncidentChange(incident=one, at=now, old="", new="open", reason="bench") for one in incidents]
    began = time.process_time()
    said = planner.feed(opened, estate, now)
    opening_s = time.process_time() - began
    alone_s = min(conditions_alone(runbooks, incidents, estate, now) for _ in range(3))
    ticks: list[float] = []
    for second in range(1, SECONDS + 1):
        if second % 10 == 0:
            estate.feed([window(now + second - 10.0)])
        began = time.process_time()
        said += planner.tick(now + second, estate)
        ticks.append(time.process_time() - began)
    news = [
        replace(c, incident=replace(c.incident, updated_at=now + SECONDS), old="open", at=now + SECONDS)
        for c in opened
    ]
    began = time.process_time()
    planner.feed(news, estate, now + SECONDS)
    news_s = time.process_time() - began
    for second in range(SECONDS, SECONDS + 25):  # the looks that the news was owed, and then nothing
        began = time.process_time()
        planner.tick(float(now + second), estate)
        quiet_s = time.process_time() - began
    waiting = len(planner.waiting(now + SECONDS + 25))
    if waiting != INCIDENTS:
        raise RuntimeError(f"{waiting} plans wait; each of {INCIDENTS} incidents should have one")
    mean_s = sum(ticks) / len(ticks)
    return [
        _row("planner.conditions_alone", alone_s * 1000.0, "ms", None, None),
        _row("planner.tick_mean", mean_s * 1000.0, "ms", alone_s * 1000.0, 0.5),
        _row("planner.tick_worst", max(ticks) * 1000.0, "ms", alone_s * 1000.0, 1.0),
        _row("planner.tick_quiet", quiet_s * 1000.0, "ms", alone_s * 1000.0, 0.05),
        _row("planner.news_of_all", news_s * 1000.0, "ms", alone_s * 1000.0, 2.0),
        _row("planner.opening_of_all", opening_s * 1000.0, "ms", alone_s * 1000.0, 3.0),
    ]  # fmt: skip


def _row(name: str, value: float, unit: str, baseline: float | None, bar: float | None) -> dict[str, Any]:
    """`bar` is the highest ratio to the conditions alone."""
    ratio = value / baseline if baseline else None
    return {
        "name": name, "value": round(value, 3), "unit": unit, "baseline": None if baseline is None else round(baseline, 3),
        "ratio": None if ratio is None else round(ratio, 3), "bar": bar,
        "holds": None if bar is None or ratio is None else ratio <= bar,
    }  # fmt: skip


if __name__ == "__main__":
    for row in run():
        print(row)
