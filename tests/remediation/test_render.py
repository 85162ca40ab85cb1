"""What a person reads at three in the morning."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from flyball.core.entities import Entity
from flyball.core.incident import ActionNote, Impact, IncidentChange, RelatedChange, RootCandidate, State
from flyball.remediation.notifiers._text import width
from flyball.remediation.render import (
    LINE_LIMIT,
    LONG_LIMIT,
    MAX_LINES,
    TITLE_LIMIT,
    Audience,
    Message,
    Renderer,
    dedup_key,
    safe_url,
)
from tests.remediation._incidents import AT, NASTY, incident_changes, opened, outage, resolved

BUILT_IN = Renderer()
ONCALL = Audience("slack", "oncall", "severity ≥ high on owner llm-platform", interactive=True)


def render(change: IncidentChange, audience: Audience = ONCALL, renderer: Renderer = BUILT_IN) -> Message:
    return renderer.render(change, audience)


def test_the_first_screen_is_the_one_of_the_documentation() -> None:
    assert render(opened()).lines == (
        "SEV2 · anthropic: 61 % of calls fail (overloaded) since 02:14 · INC-7QF3XK2P",
        "4 apps, 37 tenants, 1,912 failed calls, 61 % fail now, $6.80/min (usual $2.10), $34.00 since the start; "
        "checkout-bot worst (92 %)",
        "Root: provider anthropic, 0.94 · for: 3 models, 2 regions, 37 tenants · against: none of its 401s",
        'Changed: 02:11 status page says "elevated errors"',
        "Done: provider-failover (25 % to bedrock, verified)",
        "Refused: budget-throttle (guard: cooldown until 02:40)",
        "Next: [acknowledge] [undo now] [silence 1 h] flyball incident show INC-7QF3XK2P --why",
        "Why you: severity ≥ high on owner llm-platform; first notice",
    )


def test_the_picture_in_the_documentation_is_what_comes_out() -> None:
    page = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
    for line in render(opened()).lines:
        assert line in page


def test_lines_with_nothing_to_say_are_said_so_or_left_out() -> None:
    bare = outage(candidates=(), changes=(), actions=(), impact=Impact())
    lines = render(opened(bare)).lines
    assert lines[1] == "impact not measured"
    assert lines[3] == "Changed: nothing known in ±60 min"
    assert lines[4] == "Done: nothing"
    assert not any(line.startswith("Refused") for line in lines)


def test_buttons_are_shown_only_where_they_can_be_pressed() -> None:
    message = render(opened(), Audience("webhook"))
    assert message.buttons == ()
    assert message.lines[6] == "Next: flyball incident show INC-7QF3XK2P --why"


WAITS = ActionNote(
    AT + 20, "provider-failover", "suggest", "mode_suggest", detail="25 % to bedrock", plan="PLAN-7QF3XK2A4B",
    until=AT + 620,
)  # fmt: skip


def test_a_plan_that_waits_is_shown_with_its_hash_and_until_when_and_can_be_answered() -> None:
    message = render(opened(outage(actions=(WAITS,))))
    assert message.lines[4] == "Done: nothing · waits for you: provider-failover PLAN-7QF3XK2A4B until 02:25"
    assert [(b.action, b.subject) for b in message.buttons[:2]] == [
        ("approve", "PLAN-7QF3XK2A4B"),
        ("deny", "PLAN-7QF3XK2A4B"),
    ]
    assert message.buttons[0].confirm == "provider-failover PLAN-7QF3XK2A4B until 02:25: 25 % to bedrock"
    update = render(opened(outage(actions=(WAITS,))), Audience("slack", first=False)).update
    assert "waits for you: provider-failover PLAN-7QF3XK2A4B until 02:25" in update[-1]


def test_where_buttons_cannot_be_pressed_the_command_that_approves_is_named() -> None:
    message = render(opened(outage(actions=(WAITS,))), Audience("webhook"))
    assert "Next: flyball approve PLAN-7QF3XK2A4B · flyball incident show INC-7QF3XK2P --why" in message.lines


def test_a_plan_whose_time_is_over_can_no_longer_be_answered() -> None:
    late = msgspec.structs.replace(WAITS, until=AT - 1)
    message = render(opened(outage(actions=(late,))))
    assert "approve" not in {b.action for b in message.buttons}
    assert not any("waits for you" in line for line in message.lines)


def test_who_approved_is_said() -> None:
    done = ActionNote(
        AT + 30, "provider-failover", "run", "approved", "verified", "25 % to bedrock", "DIR-1", by="ann"
    )
    message = render(opened(outage(actions=(done,))))
    assert message.lines[4] == "Done: provider-failover (25 % to bedrock, verified, approved by ann)"


def test_of_two_plans_each_button_says_whose_it_is() -> None:
    other = msgspec.structs.replace(WAITS, runbook="rate-limit-shed", plan="PLAN-OTHER")
    message = render(opened(outage(actions=(WAITS, other))))
    assert [b.label for b in message.buttons[:4]] == [
        "approve provider-failover", "deny provider-failover", "approve rate-limit-shed", "deny rate-limit-shed",
    ]  # fmt: skip


def test_every_message_says_why_it_was_sent() -> None:
    later = Audience("slack", why="x", first=False)
    acted = opened(old="open", new="mitigating", reason="provider-failover started")
    back = opened(outage(reopened=1), old="resolved", new="open", reason="errors are back")
    figures = opened(old="open", notify=False)
    assert render(opened()).lines[-1].endswith("; first notice")
    assert render(acted, later).lines[-1].endswith("; update: provider-failover started")
    assert render(back, later).lines[-1].endswith("; reopened (1×): errors are back")
    assert render(figures, later).lines[-1].endswith("; figures brought up to date")
    assert render(resolved(), later).lines[-1].endswith("; resolved after 12 min")
    assert render(resolved()).lines[-1].endswith("; first notice, already resolved after 12 min")
    reasons = [render(c, later).reason for c in (acted, back, figures, resolved())]
    assert reasons == ["update", "reopened", "figures", "resolved"]


def test_a_refusal_that_was_followed_by_a_run_is_history() -> None:
    notes = (
        ActionNote(AT, "failover", "hold", "hold_30s"),
        ActionNote(AT + 30, "failover", "run", "when_matched", "granted", "10 %", "DIR-1"),
        ActionNote(AT + 60, "failover", "run", "step", "verified", "25 %", "DIR-1"),
    )
    lines = render(opened(outage(actions=notes))).lines
    assert "Done: failover (25 %, verified)" in lines
    assert not any(line.startswith("Refused") for line in lines)


def test_what_is_only_suggested_is_not_said_to_be_done() -> None:
    notes = (ActionNote(AT, "provider-failover", "suggest", "mode_suggest"),)
    assert "Done: nothing · suggested: provider-failover" in render(opened(outage(actions=notes))).lines


def test_changes_of_another_time_are_not_shown_as_related() -> None:
    old = RelatedChange(AT - 90_000, "deploy", "last week's")
    assert "Changed: nothing known in ±60 min" in render(opened(outage(changes=(old,)))).lines


def test_facts_for_and_against_are_those_of_the_root_and_not_of_another_candidate() -> None:
    other = RootCandidate(Entity("model", "m"), 0.99, ("wrong",), ())
    right = RootCandidate(outage().root, 0.5, ("right",), ())
    line = render(opened(outage(candidates=(other, right)))).lines[2]
    assert line == "Root: provider anthropic, 0.50 · for: right"


def test_long_texts_in_evidence_are_left_out() -> None:
    prompt = "You are a helpful assistant. " * 20
    incident = outage(evidence={"n": 5, "prompt": prompt, "texts": [prompt, "short"]})
    message = render(opened(incident))
    assert ("n", "5") in message.facts
    assert ("texts", "short") in message.facts
    assert "helpful assistant" not in repr(message)


def test_text_of_events_is_never_a_template() -> None:
    incident = outage(title="{{ 7 * 7 }} {% include 'x' %}", klass="{{ incident.id }}")
    message = render(opened(incident))
    assert message.lines[0].startswith("SEV2 · {{ 7 * 7 }} {% include 'x' %}")


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(incident_changes())
def test_any_incident_at_all_gives_its_lines_within_the_limits(change: IncidentChange) -> None:
    for audience in (ONCALL, Audience("webhook", first=False)):
        message = render(change, audience)
        assert 7 <= len(message.lines) <= MAX_LINES
        assert width(message.lines[0]) <= TITLE_LIMIT
        assert all(0 < width(line) <= LINE_LIMIT for line in message.lines)
        assert change.incident.severity.sev in message.lines[0]
        starts = ("Root: ", "Changed: ", "Done: ", "Next: ", "Why you: ")
        assert [s for s in starts if not any(line.startswith(s) for line in message.lines)] == []
        assert message.lines[-1].startswith("Why you: ")
        assert 1 <= len(message.update) <= 4
        assert width(message.long) <= LONG_LIMIT
        assert width(message.dedup_key) <= 80
        assert message.fallback == ""
        assert message == render(change, audience)
        for text in (*message.lines, *message.update, message.long.replace("\n", " ")):
            bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")]
            assert set(bad) <= {"\u200d", "\u200c"}


@pytest.mark.parametrize("value", [*NASTY, "x" * 1_000_000, "𝕏\u0301" * 500_000], ids=lambda v: repr(v[:12]))
def test_hostile_names_push_no_line_away(value: str) -> None:
    incident = outage(
        title=value, klass=value, root=Entity("provider", value), impact=Impact(n_apps=1, apps=((value, 1, 0.5),)),
        actions=(ActionNote(AT, value, "run", value, value, value), ActionNote(AT, value + "2", "hold", value)),
    )  # fmt: skip
    lines = render(opened(incident)).lines
    assert len(lines) == 8
    assert lines[0].endswith(" · INC-7QF3XK2P")


def test_keys_of_two_incidents_never_meet() -> None:
    assert dedup_key("INC-7QF3XK2P") == "flyball-INC-7QF3XK2P"
    assert dedup_key("x" * 65) != dedup_key("x" * 66)
    assert dedup_key("a b") != dedup_key("a_b")


def test_links_of_events_show_where_they_lead_or_are_left_out() -> None:
    message = Renderer(public_url="https://flyball.example/").render(opened(), ONCALL)
    assert [(x.text, x.url) for x in message.links] == [
        ("Incident", "https://flyball.example/v1/incidents/INC-7QF3XK2P"),
        ("Change at status.example", "https://status.example/1"),
    ]
    for bad in (
        "javascript:alert(1)",
        "https://ok@evil.example",
        "http://a b",
        "https://x/>",
        "//x",
        "http://x:99999/",
        "",
    ):
        assert safe_url(bad) == ""


# -- a person's own templates ---------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_one_line_can_be_changed_and_the_rest_stays(tmp_path: Path) -> None:
    write(
        tmp_path,
        "alert.j2",
        '{% extends "builtin/alert.j2" %}{% block why %}Why you: {{ why }}; ask in #llm-oncall{% endblock %}',
    )
    mine = Renderer(tmp_path)
    assert mine.problems == ()
    lines = render(opened(), renderer=mine).lines
    assert lines[-1] == "Why you: severity ≥ high on owner llm-platform; ask in #llm-oncall"
    assert lines[:-1] == render(opened()).lines[:-1]


def test_a_template_for_one_channel_is_used_only_there(tmp_path: Path) -> None:
    write(tmp_path, "alert.slack.j2", "{{ severity }} {{ id }}")
    mine = Renderer(tmp_path)
    assert render(opened(), renderer=mine).lines == ("SEV2 INC-7QF3XK2P",)
    assert len(render(opened(), Audience("webhook"), mine).lines) == 8


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("alert.j2", "{{ severity }}\n{% if %}", 2, "Expected an expression"),
        ("alert.j2", "{{ severity }}\n\n{{ incident.titel }}", 3, "titel"),
        ("alert.j2", "{{ sevrity }}", 1, "sevrity"),
        ("alert.j2", "ok\n{{ incident.candidates[0].entity }}", 2, "IndexError|out of range|no element|undefined"),
        ("alert.j2", "{{ ''.__class__.__mro__ }}", 1, "unsafe|mro|class"),
        ("alert.j2", "{{ 1 | shout }}", 1, "shout"),
        ("update.j2", "{{ incident.scope.update({'a': 'b'}) }}", 1, "not safely callable|unsafe"),
        ("alert.j2", "{% extends 'builtin/alrt.j2' %}", 1, "builtin/alrt.j2"),
        ("alert.j2", "x\n" * 9, None, "9 lines"),
        ("alert.j2", "\n \n", None, "0 lines"),
        ("alarm.j2", "x", None, "alert"),
    ],
)  # fmt: skip
def test_a_broken_template_is_refused_with_its_line_and_the_built_in_stays(
    tmp_path: Path, name: str, text: str, line: int | None, words: str
) -> None:
    path = write(tmp_path, name, text)
    mine = Renderer(tmp_path)
    (problem,) = mine.problems
    assert problem.where == (f"{path}:{line}" if line else str(path))
    assert any(word in str(problem) for word in words.split("|")), str(problem)
    assert render(opened(), renderer=mine) == render(opened())


def test_a_template_that_fails_on_one_incident_loses_no_alert(tmp_path: Path) -> None:
    write(
        tmp_path,
        "alert.j2",
        "{{ severity }} {{ 1 / (37 - incident.impact.n_tenants + 2 * (id != 'INC-7QF3XK2P')) }}",
    )
    mine = Renderer(tmp_path)
    assert mine.problems == ()
    message = render(opened(), renderer=mine)
    assert message.lines == render(opened()).lines
    assert "alert.j2:1" in message.fallback
    assert "ZeroDivisionError" in message.fallback


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    assert "is no folder" in str(Renderer(tmp_path / "none").problems[0])


def test_the_state_is_in_the_title_when_it_is_over() -> None:
    message = render(resolved())
    assert message.lines[0].startswith("RESOLVED SEV2 · ")
    assert message.state is State.RESOLVED
