"""Incidents for the tests of alerts: one as in the documentation, and hypothesis' worst."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from flyball.core.entities import Entity
from flyball.core.incident import (
    ActionNote,
    Impact,
    Incident,
    IncidentChange,
    RelatedChange,
    RootCandidate,
    Severity,
    State,
)

AT = 1_772_676_900.0  # 2026-03-05 02:15:00 UTC
ANTHROPIC = Entity("provider", "anthropic")


def outage(**changes: Any) -> Incident:
    """The incident that the documentation shows."""
    values: dict[str, Any] = {
        "id": "INC-7QF3XK2P",
        "at": AT,
        "since": AT - 60,
        "updated_at": AT + 300,
        "root": ANTHROPIC,
        "signal": "llm.errors",
        "klass": "overloaded",
        "severity": Severity.HIGH,
        "severity_reason": "61 % of calls fail for 37 tenants",
        "page": True,
        "scope": {"provider": "anthropic"},
        "title": "anthropic: 61 % of calls fail (overloaded) since 02:14",
        "summary": "61 % of calls to anthropic fail; normal is 0.4 %.",
        "confidence": 0.94,
        "candidates": (
            RootCandidate(ANTHROPIC, 0.94, ("3 models", "2 regions", "37 tenants"), ("none of its 401s",)),
        ),
        "n_anomalies": 7,
        "members": (("provider:anthropic", 3), ("app:checkout-bot", 2)),
        "impact": Impact(
            calls=3140, failed_calls=1912, failed_ratio_now=0.61, failed_ratio_baseline=0.004, usd_per_min_now=6.8,
            usd_per_min_baseline=2.1, usd_since_start=34.0, apps=(("checkout-bot", 900, 0.92),),
            tenants=(("acme", 120, 0.7),), n_apps=4, n_tenants=37,
        ),
        "evidence": {"observed": 0.61, "expected": 0.004, "n": 3140},
        "samples": ("call-1", "call-2"),
        "changes": (RelatedChange(AT - 240, "notice", 'status page says "elevated errors"', url="https://status.example/1"),),
        "actions": (
            ActionNote(AT + 20, "provider-failover", "run", "when_matched", "verified", "25 % to bedrock", "DIR-1"),
            ActionNote(AT + 20, "budget-throttle", "refuse", "cooldown", "", "guard: cooldown until 02:40"),
        ),
    }  # fmt: skip
    return Incident(**(values | changes))


def opened(incident: Incident | None = None, **changes: Any) -> IncidentChange:
    values: dict[str, Any] = {"at": AT, "old": "", "new": "open", "reason": "opened", "notify": True}
    return IncidentChange(incident=incident or outage(), **(values | changes))


def resolved(incident: Incident | None = None) -> IncidentChange:
    incident = incident or outage(state=State.RESOLVED, resolved_at=AT + 660, revision=9)
    return IncidentChange(
        incident=incident, at=AT + 660, old="verifying", new="resolved", reason="back to normal", notify=True
    )


NASTY = (
    "<!channel> <@U0123> <https://evil.example|click> *b* _i_ ~s~ `c` > quote",
    "[text](https://evil.example) ![x](https://evil.example/p.png) @here @everyone",
    "{{ 7 * 7 }} {% for x in range(9) %}x{% endfor %} ${jndi:x} $(rm -rf /) `id`",
    "\x1b[31mred\x1b]8;;https://evil.example\x07link\x00\x9b2J\r\n\r\nInjected: header",
    "\u202eesrever\u202c \u2066iso\u2069 \u200b\ufeff\u2028line\u2029para",
    "مرحبا بالعالم שלום",
    "e" + "\u0301" * 300,
    "👩‍👩‍👧‍👦" * 40,
    "👩" + "\u200d👩" * 400,
    "🇩🇪🇫🇷" * 60,
    "각" * 30 + "क्ष्म" * 60,
    "\ud800 lone \udfff",
    "&&&&<<<<>>>>" * 200,
    '"\\' * 3000,
    "𝕏" * 3000,
)

text = st.one_of(
    st.text(max_size=60), st.sampled_from(NASTY), st.text(st.sampled_from("&<>*_`~@|\\\"'\u0301\u200d👩🇩"))
)
number = st.one_of(
    st.floats(),
    st.floats(0, 1),
    st.floats(0, 1e12),
    st.sampled_from([1e308, -1e308, float("nan"), float("inf")]),
)
when = st.one_of(st.floats(AT - 1e5, AT + 1e5), number)
whole = st.integers(0, 10**15)


@st.composite
def incidents(draw: st.DrawFn) -> Incident:
    """Any incident at all, up to 100,000 members."""

    def some(s: st.SearchStrategy[Any], most: int = 4) -> tuple[Any, ...]:
        return tuple(draw(st.lists(s, max_size=most)))

    entity = st.builds(Entity, text, text)
    row = st.tuples(text, whole, number)
    many = draw(st.sampled_from([0, 1, 20, 100_000]))
    return Incident(
        id=draw(st.one_of(text, st.just("INC-7QF3XK2P"))), at=draw(when), since=draw(when), updated_at=draw(when),
        root=draw(entity), signal=draw(text), klass=draw(text), severity=draw(st.sampled_from(Severity)),
        severity_reason=draw(text), state=draw(st.sampled_from(State)),
        scope=draw(st.dictionaries(text, text, max_size=4)), page=draw(st.booleans()), title=draw(text),
        summary=draw(text), confidence=draw(number),
        candidates=some(st.builds(RootCandidate, entity, number, st.tuples(text, text), st.tuples(text))),
        anomalies=("ANO-1",) * many, n_anomalies=many, members=((draw(text), 1),) * many,
        impact=Impact(
            calls=draw(whole), failed_calls=draw(whole), failed_ratio_now=draw(number), usd_per_min_now=draw(number),
            usd_per_min_baseline=draw(number), usd_since_start=draw(number), usd_wasted=draw(number),
            apps=some(row) * draw(st.sampled_from([1, 5])), tenants=some(row), n_apps=draw(whole), n_tenants=draw(whole),
        ),
        evidence=draw(st.dictionaries(text, st.one_of(number, whole, text, st.lists(text, max_size=3)), max_size=4)),
        samples=some(text), seen_before=some(text),
        changes=some(st.builds(RelatedChange, when, text, text, st.just({}), st.one_of(text, st.just("https://ci.example/1")))),
        actions=some(
            st.builds(
                ActionNote, when, text, st.sampled_from(["run", "suggest", "hold", "refuse", "?"]), text,
                st.sampled_from(["", "granted", "in_force", "failed"]), text, text,
            )
        ),
        reopened=draw(st.integers(0, 9)), resolved_at=draw(st.one_of(st.none(), when)), acknowledged_by=draw(text),
        revision=draw(st.integers(1, 10**6)),
    )  # fmt: skip


@st.composite
def incident_changes(draw: st.DrawFn) -> IncidentChange:
    incident = draw(incidents())
    old = draw(st.sampled_from(["", *(s.value for s in State)]))
    return IncidentChange(
        incident=incident,
        at=draw(when),
        old=old,
        new=incident.state.value,
        reason=draw(text),
        notify=draw(st.booleans()),
    )
