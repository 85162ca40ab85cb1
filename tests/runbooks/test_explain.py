"""`explain` asks every guard and changes nothing."""

from __future__ import annotations

from flyball.core.directives import Verdict
from flyball.core.incident import Severity
from flyball.runbooks.explain import Explained
from tests.runbooks._desk import TOUCH, YAML, Desk, book, one


def explained(desk: Desk, incident: str = "INC-1") -> dict[str, Explained]:
    before = desk.planner.snapshot()
    found = desk.planner.explain(incident, desk.world.estate, desk.world.now)
    assert desk.planner.snapshot() == before
    return {e.runbook: e for e in found}


def guards(e: Explained) -> dict[str, bool]:
    return {g.name: g.ok for g in e.guards}


def test_an_incident_that_is_not_open_has_nothing_to_explain() -> None:
    assert explained(Desk(), "INC-other") == {}


def test_every_guard_is_listed_with_its_value_also_after_the_first_that_says_no() -> None:
    desk = Desk(("traffic: 60%", "traffic: 30%"))
    desk.stop("runbook:failover")
    desk.news()
    e = explained(desk)["failover"]
    assert (e.verdict, e.reason, e.detail) == ("hold", "stopped", "ana stopped runbook:failover")
    assert guards(e) == {
        "when": True, "stale": True, "hold": True, "telemetry": True, "stopped": False, "breaker": True, "attempts": True,
        "denied": True, "runs": True, "targets": True, "stopped_tenant": True, "lock": True, "target_attempts": True,
        "hysteresis": True, "cooldown": True, "blast": False,
    }  # fmt: skip
    blast = e.guards[-1]
    assert blast.detail == "38% of the traffic; the limit is 30%"
    assert blast.values["blast_tenants"] == 1


def test_what_would_run_says_so_with_its_mode() -> None:
    desk = Desk(ceiling="observe")
    desk.news()
    e = explained(desk)["failover"]
    assert (e.verdict, e.reason) == ("hold", "mode_observe")
    assert e.guards[-1].name == "mode"
    assert e.guards[-1].values == {"runbook": "auto", "environment": "observe", "must_ask": ""}


def test_a_condition_that_is_not_true_is_the_whole_answer() -> None:
    desk = Desk()
    desk.news(desk.incident(severity=Severity.LOW))
    e = explained(desk)["failover"]
    assert (e.verdict, [g.name for g in e.guards]) == ("no_match", ["when"])
    assert "incident.severity >= HIGH" in str(e.guards[0].values["condition"])


def test_without_a_target_the_guards_that_need_one_are_not_asked() -> None:
    desk = Desk(YAML)
    desk.world.fails.update(a=0.6, c=0.6)
    desk.world.advance(windows=2)
    desk.news()
    e = explained(desk)["failover"]
    assert (e.verdict, e.reason, e.guards[-1].name) == ("refuse", "no_candidate", "targets")


def test_every_precondition_is_listed() -> None:
    checks = (
        "preconditions:\n  - {id: one, check: 'calls(incident.scope, duration(\"1m\")) > 1000000'}\n"
        "  - {id: two, check: 'calls(incident.scope, duration(\"1m\")) > 0'}\nsteps:"
    )
    desk = Desk(("steps:", checks))
    desk.news()
    e = explained(desk)["failover"]
    found = [(g.values["precondition"], g.ok) for g in e.guards if g.name == "precondition"]
    assert found == [("one", False), ("two", True)]
    assert (e.verdict, e.reason) == ("hold", "precondition")


def test_what_waits_names_its_hash_and_its_end() -> None:
    desk = Desk(ceiling="approve")
    _, plan = one(desk.news())
    assert plan is not None
    desk.tick()
    e = explained(desk)["failover"]
    assert (e.verdict, e.reason, e.plan_hash) == ("suggest", "mode_approve", plan.plan_hash)
    assert e.until == plan.at + 600.0


def test_what_is_being_carried_out_says_so_and_still_shows_its_guards() -> None:
    desk = Desk()
    _, plan = one(desk.news())
    assert plan is not None
    e = explained(desk)["failover"]
    assert (e.verdict, e.reason, e.plan_hash) == ("running", "running", plan.plan_hash)
    assert guards(e)["lock"] is False


def test_what_must_be_asked_is_named() -> None:
    desk = Desk(TOUCH, ("touch: {}", "touch: {must_ask: irreversible}"))
    desk.news()
    e = explained(desk)["touch"]
    assert (e.verdict, e.reason) == ("suggest", "must_ask")
    assert e.guards[-1].values["must_ask"] == "irreversible"


def test_explaining_and_deciding_give_the_same_reason() -> None:
    texts = [
        YAML,
        book(YAML, ("name: failover", "name: narrow"), ("traffic: 60%", "traffic: 1%")),
        book(YAML, ("name: failover", "name: slow"), ("mode: auto", "mode: auto\nhold: 1m")),
        book(TOUCH, ("touch: {}", "touch: {scope: {provider: ''}}")),
    ]
    desk = Desk(*texts, ceiling="suggest")
    said = {d.runbook: (d.decision, d.reason) for d, _ in desk.news()}
    assert len(said) == 4
    assert {e.runbook: (Verdict(e.verdict), e.reason) for e in explained(desk).values()} == said
    assert said["touch"] == (Verdict.REFUSE, "no_target")
