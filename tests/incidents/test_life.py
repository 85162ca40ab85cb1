"""From opening to resolution and back: time, people, directives."""

from __future__ import annotations

from typing import Literal

import pytest

from flyball.core.anomaly import Anomaly
from flyball.core.directives import Decision, Directive, DirectiveChange, Outcome, Verdict
from flyball.core.errors import ConfigError
from flyball.core.events import AgentStep, Batch, Change, LlmCall
from flyball.core.incident import Incident, Severity, State
from flyball.incidents.settings import IncidentSettings
from tests.incidents._estate import T0, Lab, anomaly, traffic

ILL = traffic(fails=0.6, where={"provider": "b"}, n=5)


def outage(lab: Lab) -> tuple[Anomaly, Incident]:
    """Two healthy minutes, then provider b fails."""
    lab.quiet(12)
    a = lab.on("llm.errors", "overloaded", provider="b")
    lab.step(ILL, a)
    return a, lab.only()


def directive(incident: str, at: float) -> Directive:
    return Directive(
        id="DIR-1", kind="redirect", scope={"provider": "b"}, params={"to": {"provider": "a"}, "share": 0.25},
        granted_at=at, expires_at=at + 3600, incident=incident, runbook="provider-failover", step="redirect",
    )  # fmt: skip


def granted(incident: str, at: float) -> DirectiveChange:
    return DirectiveChange(directive=directive(incident, at), at=at, change="granted", reason="when_matched")


def ended(incident: str, at: float, change: Literal["released", "expired"]) -> DirectiveChange:
    return DirectiveChange(directive=directive(incident, at - 60), at=at, change=change, reason="lease")


def test_quiet_with_data_resolves_and_says_so() -> None:
    lab = Lab()
    a, incident = outage(lab)
    lab.step(None, lab.again(a, "off"))
    lab.quiet(5)
    assert lab.only().state is State.OPEN
    lab.quiet(1)
    assert lab.open == []
    last = lab.changes[-1]
    assert (last.incident.id, last.new, last.notify) == (incident.id, "resolved", True)
    assert last.reason == "quiet for 60 s, with data"
    assert last.incident.title == "b: up to 60 % of calls failed (overloaded) from 22:15 to 22:15"


def test_missing_data_never_resolves() -> None:
    lab = Lab()
    outage(lab)
    without_b = traffic(without={"provider": "b"})
    lab.quiet(200, without_b)
    assert lab.only().state is State.OPEN
    assert "no data since 22:15" in lab.only().summary
    told = [c for c in lab.changes if "no data since" in c.reason]
    assert len(told) == 1
    assert not told[0].notify


def test_off_without_data_afterwards_does_not_resolve_either() -> None:
    lab = Lab()
    a, _ = outage(lab)
    lab.step(None, lab.again(a, "off"))
    lab.quiet(30, traffic(without={"provider": "b"}))
    assert lab.only().state is State.OPEN


def test_square_wave_stays_one_incident_and_one_page() -> None:
    lab = Lab()
    a, incident = outage(lab)
    for _ in range(20):
        lab.step(ILL, lab.again(a))
        lab.step(None, lab.again(a, "off"))
        lab.step(None)
        a = lab.on("llm.errors", "overloaded", provider="b")
        lab.step(ILL, a)
    assert lab.opened == lab.paged == [incident.id]
    assert lab.only().reopened == 0


def test_the_same_trouble_soon_after_reopens_and_later_is_new() -> None:
    lab = Lab()
    a, first = outage(lab)
    lab.step(None, lab.again(a, "off"))
    lab.quiet(30)
    assert lab.open == []
    a = lab.on("llm.errors", "overloaded", provider="b")
    lab.step(ILL, a)
    assert (lab.only().id, lab.only().reopened, lab.only().state) == (first.id, 1, State.OPEN)
    assert any(c.old == "resolved" and c.new == "open" and c.notify for c in lab.changes)
    lab.step(None, lab.again(a, "off"))
    lab.quiet(110)
    lab.step(ILL, lab.on("llm.errors", "overloaded", provider="b"))
    assert lab.only().id != first.id
    assert lab.only().seen_before == (first.id,)


def test_run_that_ended_resolves_with_that_reason_while_a_silent_provider_does_not() -> None:
    lab = Lab()
    lab.feed(Batch([AgentStep(at=T0 + 1, run="r1", agent="coder", app="bot")]))
    lab.step(None, anomaly("agent.loop", {"run": "r1", "agent": "coder"}, T0, klass="repeat"))
    assert lab.only().page
    lab.quiet(40)
    assert lab.open == []
    assert "nothing of run:r1 since" in lab.changes[-1].reason


def test_run_does_not_vanish_when_all_telemetry_does() -> None:
    lab = Lab()
    lab.step(None, anomaly("agent.loop", {"run": "r1", "agent": "coder"}, T0, klass="repeat"))
    for i in range(100):
        lab.changes += lab.correlator.tick(lab.now + 10 * i)
    assert lab.only().state is State.OPEN


def test_directive_moves_the_incident_and_its_end_moves_it_back() -> None:
    lab = Lab()
    a, incident = outage(lab)
    lab.feed(
        Decision(
            at=lab.now,
            incident=incident.id,
            runbook="provider-failover",
            decision=Verdict.RUN,
            reason="when_matched",
        )
    )
    lab.feed(granted(incident.id, lab.now))
    assert lab.only().state is State.MITIGATING
    lab.feed(
        Outcome(
            at=lab.now,
            incident=incident.id,
            runbook="provider-failover",
            step="redirect",
            action="redirect",
            result="verified",
            directive="DIR-1",
        )
    )
    assert lab.only().state is State.VERIFYING
    lab.step(ILL, lab.again(a))
    lab.feed(ended(incident.id, lab.now, "expired"))
    assert lab.only().state is State.OPEN
    notes = lab.only().actions
    assert [(n.decision, n.outcome) for n in notes] == [("run", ""), ("run", "expired")]
    assert notes[1].detail.startswith("redirect 25 % of provider=b to provider=a until")
    assert all(c.notify for c in lab.changes if c.old != c.new)


def test_recovery_under_a_lease_is_verified_before_it_is_resolved() -> None:
    lab = Lab()
    a, incident = outage(lab)
    lab.feed(granted(incident.id, lab.now))
    lab.step(None, lab.again(a, "off"))
    assert lab.only().state is State.VERIFYING
    back = lab.on("llm.errors", "overloaded", provider="b")
    lab.step(ILL, back)
    assert lab.only().state is State.MITIGATING
    lab.step(None, lab.again(back, "off"))
    lab.quiet(6)
    assert lab.open == []


def test_side_effects_of_our_own_redirect_open_nothing() -> None:
    lab = Lab()
    a, incident = outage(lab)
    lab.feed(granted(incident.id, lab.now))
    overrun = traffic(fails=0.3, klass="rate_limited", where={"provider": "a"}, times=2)
    lab.step(
        overrun,
        lab.again(a),
        lab.on("llm.errors", "rate_limited", provider="a"),
        anomaly("llm.cache", {"provider": "a"}, lab.now, observed=0.1, expected=0.6, impact=0.5),
        anomaly("llm.cost", {"app": "bot"}, lab.now, observed=9.0, expected=3.0, impact=0.5),
    )
    assert [i.id for i in lab.open] == [incident.id]
    assert any("consequence of our redirect: llm.errors of provider a" in c.reason for c in lab.changes)
    assert str(lab.only().root) == "provider:b"


def test_trouble_of_the_target_long_after_the_shift_is_its_own() -> None:
    lab = Lab()
    a, incident = outage(lab)
    lab.feed(granted(incident.id, lab.now))
    for _ in range(70):
        lab.step(ILL, lab.again(a))
    lab.step(
        traffic(fails=0.6, klass="auth", where={"provider": "a"}, n=5),
        lab.again(a),
        lab.on("llm.errors", "auth", provider="a"),
    )
    assert [str(i.root) for i in lab.open] == ["provider:b", "provider:a"]


def test_own_blocks_never_open_an_incident() -> None:
    lab = Lab()
    lab.quiet(12)
    out = lab.step(
        traffic(fails=0.9, klass="gateway_local", where={"app": "bot"}),
        lab.on("llm.errors", "gateway_local", app="bot"),
    )
    assert out == []
    assert lab.correlator.dropped == {"gateway_local": 1}


def test_silence_stops_the_page_and_not_the_incident() -> None:
    lab = Lab()
    lab.correlator.add_silence(["provider=~b|c", "signal=llm.errors"], at=T0, until=T0 + 150, by="ada")
    a, incident = outage(lab)
    assert (incident.severity, incident.page) == (Severity.HIGH, False)
    lab.step(ILL, lab.again(a))
    assert not lab.only().page
    lab.step(ILL, lab.again(a))
    assert lab.only().page, "the silence is over and the trouble is not"
    assert lab.paged == [incident.id]


def test_silence_without_matcher_or_end_is_refused() -> None:
    lab = Lab()
    with pytest.raises(ConfigError, match="at least one matcher"):
        lab.correlator.add_silence([], at=T0, until=T0 + 1, by="ada")
    with pytest.raises(ConfigError, match="not after now"):
        lab.correlator.add_silence(["a=b"], at=T0, until=T0, by="ada")
    with pytest.raises(ConfigError, match="not a regular expression"):
        lab.correlator.add_silence(["a=~("], at=T0, until=T0 + 1, by="ada")
    with pytest.raises(ConfigError, match="no matcher"):
        lab.correlator.add_silence(["nonsense"], at=T0, until=T0 + 1, by="ada")


def test_people_ack_resolve_and_reopen_and_the_table_says_no_with_a_reason() -> None:
    lab = Lab()
    a, incident = outage(lab)
    c = lab.correlator
    [change] = c.command("ack", incident.id, "ada", lab.now)
    assert (change.old, change.new, change.incident.acknowledged_by) == ("open", "acknowledged", "ada")
    with pytest.raises(ConfigError, match="acknowledged already"):
        c.command("ack", incident.id, "bob", lab.now)
    with pytest.raises(ConfigError, match="from where it can only: mitigate, resolve"):
        c.command("reopen", incident.id, "bob", lab.now)
    [change] = c.command("resolve", incident.id, "ada", lab.now)
    assert change.new == "resolved"
    lab.step(ILL, lab.again(a))
    assert lab.open == [], "what a person resolved away stays away while it is the same episode"
    with pytest.raises(ConfigError, match="resolved; reopen it first"):
        c.command("ack", incident.id, "ada", lab.now)
    [change] = c.command("reopen", incident.id, "ada", lab.now)
    assert (change.new, change.incident.reopened) == ("open", 1)
    [change] = c.command("silence", incident.id, "ada", lab.now, lab.now + 3600)
    assert change.incident.silenced_until == lab.now + 3600
    with pytest.raises(ConfigError, match="unknown incident"):
        c.command("ack", "INC-NONE", "ada", lab.now)
    with pytest.raises(ConfigError, match="did you mean 'resolve'"):
        c.command("resolv", incident.id, "ada", lab.now)


def test_changes_of_the_hour_are_shown_and_those_of_others_are_not() -> None:
    lab = Lab()
    lab.feed(
        Change(at=T0 + 60, kind="deploy", summary="gateway 1.2"),
        Change(at=T0 + 90, kind="provider_notice", summary="elevated errors", labels={"provider": "b"}),
        Change(at=T0 + 90, kind="deploy", summary="a only", labels={"provider": "a"}),
        Change(at=T0 + 90, kind="deploy", summary="app elsewhere", labels={"app": "unheard-of"}),
        Change(at=T0 - 7200, kind="deploy", summary="long ago"),
    )
    _, incident = outage(lab)
    assert [c.summary for c in incident.changes] == ["elevated errors", "gateway 1.2"]


def test_history_wakes_nobody() -> None:
    lab = Lab()
    lab.quiet(12)
    a = lab.on("llm.errors", "overloaded", provider="b")
    [change] = lab.step(ILL, a, live=False)
    assert not change.notify
    assert not change.incident.page
    lab.step(ILL, lab.again(a))
    assert lab.only().page, "still on when it is live again"


def test_noise_alone_is_an_incident_without_a_page() -> None:
    lab = Lab()
    lab.quiet(12)
    few = traffic(fails=0.05, where={"provider": "b", "app": "bot"}, n=20)
    lab.step(few, lab.on("llm.errors", "overloaded", provider="b"))
    assert lab.only().severity <= Severity.MEDIUM
    assert lab.paged == []


def test_severity_that_rises_pages_once() -> None:
    lab = Lab()
    lab.quiet(12)
    a = lab.on("llm.errors", "overloaded", provider="b")
    lab.step(traffic(fails=0.05, where={"provider": "b"}, n=20), a)
    assert lab.only().severity is Severity.MEDIUM
    lab.step(traffic(fails=0.5, where={"provider": "b"}, n=20), lab.again(a))
    assert lab.only().page
    told = lab.changes[-1]
    assert told.notify
    assert "SEV2 now, was SEV3: 50 % of its calls fail" in told.reason


def test_a_few_failures_more_than_usual_page_once_they_have_lasted_a_minute() -> None:
    lab = Lab()
    lab.quiet(12)
    few = traffic(fails=0.12, where={"provider": "b", "model": "b-large"}, n=9)
    a = lab.on("llm.errors", "overloaded", provider="b", model="b-large")
    lab.step(few, a)
    assert (lab.only().severity, lab.only().page) == (Severity.MEDIUM, False)
    assert "it may be a blip" in lab.only().severity_reason
    for _ in range(4):
        lab.step(few, lab.again(a))
    assert lab.paged == []
    lab.step(few, lab.again(a))
    assert lab.paged == [lab.only().id]


def test_cost_of_a_loop_is_told_from_its_run() -> None:
    lab = Lab()
    calls = [
        LlmCall(at=T0 + i, run="r1", app="bot", agent="coder", tenant="t1", cost_usd=0.5, input_tokens=1000)
        for i in range(9)
    ]
    lab.feed(Batch(calls, sender="gw"))
    lab.step(None, anomaly("agent.loop", {"run": "r1"}, T0, klass="repeat"))
    incident = lab.only()
    assert incident.impact.usd_since_start == 4.5
    assert incident.impact.apps == (("bot", 9, 1.0),)
    assert "runs in a loop (repeat)" in incident.title


def test_loop_pages_only_from_a_velocity_when_one_is_set() -> None:
    settings = IncidentSettings.model_validate({"severity": {"loop_usd_per_min_high": 1.0}})
    lab = Lab(settings)
    lab.step(None, anomaly("agent.loop", {"run": "r1"}, T0, klass="repeat"))
    assert (lab.only().severity, lab.only().page) == (Severity.MEDIUM, False)


def test_over_the_bound_of_open_incidents_anomalies_are_counted() -> None:
    lab = Lab(IncidentSettings(max_open=3))
    lab.step(
        None,
        *(anomaly("gpu.fault", {"gpu": f"g{i}", "node": f"n{i}"}, T0, klass="reset_gpu") for i in range(5)),
    )
    assert len(lab.open) == 3
    assert lab.correlator.dropped == {"max_open": 2}


def test_streak_of_failures_in_a_run_pages_only_when_it_lasts() -> None:
    lab = Lab()
    a = anomaly("agent.loop", {"run": "r1", "agent": "coder"}, T0, klass="failing")
    lab.step(None, a)
    assert (lab.only().severity, lab.only().page) == (Severity.MEDIUM, False)
    for _ in range(12):
        lab.step(None, lab.again(a))
    assert lab.paged == [lab.only().id]


def test_aftermath_neither_holds_an_incident_open_nor_reopens_it() -> None:
    lab = Lab()
    a, incident = outage(lab)
    retries = lab.on("llm.retries", "retry_storm", app="bot", provider="b")
    lab.step(ILL, lab.again(a), retries)
    lab.step(None, lab.again(a, "off"), lab.again(retries))
    for _ in range(13):
        lab.step(None, lab.again(retries))
    assert lab.open == []
    lab.step(None, lab.again(retries))
    lab.step(None, lab.on("llm.retries", "retry_storm", app="bot", provider="b"))
    assert lab.open == []
    assert lab.opened == [incident.id]
