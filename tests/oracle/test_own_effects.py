"""Invariant 11: what Flyball does is no cause of its own next incident. Its effects belong to the incident that they answer.

The whole pipeline against the lab, whose gateway obeys: refused, capped and redirected calls come back as telemetry.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec

from flyball.app.pipeline import Pipeline
from flyball.app.wiring import lab_governor
from flyball.core.directives import Directive, DirectiveChange, Enforced
from flyball.core.estate import Emissions
from flyball.core.events import Batch, LlmCall
from flyball.core.incident import Incident
from flyball.lab import Lab
from flyball.lab.sim import Simulator


def acting(tmp_path: Path, runbook: str, seed: int) -> Lab:
    """A lab whose governor may carry out one shipped runbook by itself."""
    text = files("flyball.runbooks").joinpath(f"library/{runbook}.yaml").read_text("utf-8")
    (tmp_path / f"{runbook}.yaml").write_text(text.replace("mode: suggest", "mode: auto"), "utf-8")
    return Lab(lambda: lab_governor(mode="auto", runbooks=[tmp_path]), seed=seed, rate=20.0, warmup="10m")


def told(lab: Lab) -> tuple[list[Incident], list[DirectiveChange]]:
    opened = [i for i in lab.incidents() if i.at >= lab.zero]
    return opened, [d for d in lab.directive_changes() if d.change == "granted"]


def test_calls_that_a_block_refuses_are_no_second_incident(tmp_path: Path) -> None:
    lab = acting(tmp_path, "runaway-agent", seed=3)
    lab.at(0).agent("researcher").loops("repeat")
    lab.run("5m")
    opened, granted = told(lab)
    assert [d.directive.kind for d in granted] == ["block"]
    assert [i.root.kind for i in opened] == ["run"], lab.report()
    assert len(lab.pages()) == 1


def test_the_load_that_a_redirect_brings_is_no_second_incident(tmp_path: Path) -> None:
    lab = acting(tmp_path, "provider-failover", seed=1)
    lab.at(0).provider("b").fails(0.6)
    lab.run("5m")
    opened, granted = told(lab)
    assert granted
    assert len(lab.pages()) == 1
    assert {str(i.root) for i in opened} == {"provider:b"}, lab.report()


STRICT = """
runbook: v1
name: strict
owner: finance
when: incident.root.kind == "tenant" && incident.signal == "llm.cost"
mode: auto
limits: {blast: {traffic: 60%, tenants: 1}}
steps:
  - limit: {scope: $incident.root, requests_per_min: 6, for: 30m}
    verify: {within: 2m, expect: 'usd_per_hour("from") < 50% * before', against: nothing}
"""


class Mistaken:
    """A governor that is told the gateway's refusals as if the provider had failed."""

    def __init__(self, governor: Pipeline) -> None:
        self._governor = governor

    def feed(self, batch: Batch) -> Emissions:
        events = [
            msgspec.structs.replace(e, error="server_error") if isinstance(e, LlmCall) and e.error == "gateway_local" else e
            for e in batch.events
        ]  # fmt: skip
        return self._governor.feed(msgspec.structs.replace(batch, events=events))

    def tick(self, now: float) -> Emissions:
        return self._governor.tick(now)

    def directives(self) -> Sequence[Directive]:
        return self._governor.directives()

    def enforced(self, report: Enforced) -> Emissions:
        return self._governor.enforced(report)


def throttled(tmp_path: Path, *, mistaken: bool, warm: list[tuple[Simulator, bytes]]) -> list[Incident]:
    """What is told of a tenant whose burn is limited to a trickle, so that nearly all its calls are refused.

    `warm` keeps the estate after its first half hour, in which it is learned what a tenant spends.
    """
    (tmp_path / "strict.yaml").write_text(STRICT, "utf-8")
    governor = lab_governor(mode="auto", runbooks=[tmp_path])
    if not warm:
        quiet = Lab(lambda: governor, seed=5, rate=20.0, warmup="36m").run(0)
        warm.append((quiet.sim.copy(), governor.snapshot()))
    governor.restore(warm[0][1])
    lab = Lab(lambda: governor, seed=5, sim=warm[0][0].copy())
    if mistaken:
        lab.governor = Mistaken(governor)
    lab.at(0).tenant("t3").burns(12.0)
    lab.run("10m")
    opened, granted = told(lab)
    assert [d.directive.kind for d in granted][:1] == ["limit"], lab.report()
    return opened


def failed(incidents: Sequence[Incident]) -> int:
    return max(i.impact.failed_calls for i in incidents)


def test_calls_that_a_limit_refuses_are_neither_failures_nor_a_second_incident(tmp_path: Path) -> None:
    warm: list[tuple[Simulator, bytes]] = []
    right = throttled(tmp_path, mistaken=False, warm=warm)
    assert {i.signal for i in right} == {"llm.cost"}
    # The same with a governor that is told otherwise: there the refusals show, so this test can fail.
    wrong = throttled(tmp_path, mistaken=True, warm=warm)
    assert failed(wrong) > 10 * max(failed(right), 10), (failed(right), failed(wrong))
