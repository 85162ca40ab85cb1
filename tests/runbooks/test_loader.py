"""A runbook cannot be armed wrong: each mistake is refused with its code, at its line and column; nothing crashes the loader."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyball.core.errors import ConfigError
from flyball.remediation.actions import registry
from flyball.runbooks.loader import (
    Runbook,
    RunbookErrors,
    RunbookSet,
    check_runbook,
    library,
    load_runbooks,
    load_texts,
)

ACTIONS = registry()

GOOD = """\
runbook: v1
name: provider-failover
owner: llm-platform
when: incident.root.kind == "provider" && incident.signal == "llm.errors" && incident.severity >= HIGH
hold: 30s
mode: suggest
params: {enough: 20, spare: c}
preconditions:
  - id: enough_calls
    check: 'calls({"provider": incident.root.name}, duration("2m")) >= params.enough'
limits: {cooldown: 30m, runs: 3/1h, blast: {traffic: 25%, tenants: 20}}
steps:
  - redirect: {from: $incident.root, to: best_healthy, share: [10%, 25%, 50%, 100%], for: 1h}
    verify: {within: 3m, expect: errors("to") < 0.02, against: untouched}
on_failure: undo_and_page
tests:
  - lab: outage(provider="b", fails=0.6)
    expect: [run, verified, released]
  - {lab: outage(all_providers), expect: [refuse(no_candidate)]}
"""


def errors_of(text: str | bytes) -> list[str]:
    runbook, errors = check_runbook(text, "f.yaml", ACTIONS)
    assert (runbook is None) == bool(errors)
    return [str(e) for e in errors]


def test_a_right_runbook_is_read_with_its_values() -> None:
    runbook, errors = check_runbook(GOOD, "f.yaml", ACTIONS)
    assert errors == []
    assert isinstance(runbook, Runbook)
    assert runbook.model.hold == 30.0
    assert (runbook.model.limits.runs.count, runbook.model.limits.runs.per_s) == (3, 3600.0)
    assert runbook.model.limits.blast.traffic == 0.25
    assert runbook.steps[0].verify.within_s == 180.0
    assert runbook.model.tests[0].lab == 'outage(provider="b", fails=0.6)'


MISTAKES = [
    # what is replaced, by what, expected error (where, code, text)
    ("incident.signal ==", "incident.sigal ==", "f.yaml:4:43: RB104 unknown name 'incident.sigal'", "did you mean 'incident.signal'?"),
    ("HIGH", "HIHG", "f.yaml:4:99: RB104 unknown name 'HIHG'", "'HIGH'"),
    ("HIGH", "high", "f.yaml:4:99: RB104 unknown name 'high'", "'HIGH'"),
    ('"llm.errors"', '"llm.eror"', "f.yaml:4:63: RB107 unknown signal 'llm.eror'", "'llm.errors'"),
    ('"provider" &&', '"providr" &&', "f.yaml:4:30: RB107 unknown root kind 'providr'", "'provider'"),
    ('"provider" &&', "3 &&", "f.yaml:4:26: RB105 == does not take (string, int)", ""),
    (">= HIGH", "", "f.yaml:4:", "RB105"),
    (">= HIGH", ">=", "f.yaml:4:98: RB103", "cannot be read"),
    (' && incident.signal == "llm.errors" && incident.severity >= HIGH', ' && {{ x }}', "f.yaml:4:43: RB114", "template"),
    ("calls({", "cals({", "f.yaml:10:13: RB104 unknown function 'cals'", "'calls'"),
    (">= params.enough", ">= params.enuf", "RB104 unknown name 'params.enuf'", "'params.enough'"),
    (">= params.enough", ">= 20.0", "RB105", "(int, double)"),
    (">= params.enough", "", "f.yaml:10:13: RB106 the condition is a whole number", "compare"),
    ("owner: llm-platform\n", "", "RB102 'owner' is missing", ""),
    ("owner:", "onwer:", "f.yaml:3:1: RB101 unknown field 'onwer'", "'owner'"),
    ("hold: 30s", "hold: 30", "f.yaml:5:7: RB108", "30 has no unit; write for example 30s"),
    ("hold: 30s", "hold: 1:30", "f.yaml:5:7: RB006", "write a duration such as 90s"),
    ("hold: 30s", "hold: 10m", "f.yaml:5:7: RB115", "max_age"),
    ("hold: 30s", "hold: 30s\nhold: 40s", "f.yaml:6:1: RB002 'hold' stands here a second time", "line 5"),
    ("mode: suggest", "mode: full", "f.yaml:6:7: RB108", "approve or auto"),
    ("mode: suggest", "mode: NO", "f.yaml:6:7: RB006 'NO'", ""),
    ("when:", "on:", "f.yaml:4:1: RB006 'on'", "write `when:`"),
    ("name: provider-failover", "name: Provider Failover", "f.yaml:2:7: RB108", "lower case words joined by -"),
    ("runbook: v1", "runbook: v2", "f.yaml:1:10: RB108", "write v1"),
    ("runs: 3/1h", "runs: 3", "f.yaml:11:31: RB108", "write for example 3/1h"),
    ("runs: 3/1h", "runs: 0/1h", "f.yaml:11:31: RB108", "not a rate"),
    ("cooldown: 30m", "cooldwn: 30m", "f.yaml:11:10: RB101", "'cooldown'"),
    ("traffic: 25%", "traffic: 0.25", "f.yaml:11:", "write a percentage"),
    ("traffic: 25%", "traffic: 250%", "f.yaml:11:", "over 0% and up to 100%"),
    ("tenants: 20", "tenants: 0", "RB108", "write at least 1"),
    ("redirect:", "redirct:", "f.yaml:13:5: RB109", "'redirect'"),
    ("  - redirect: {from: $incident.root, to: best_healthy, share: [10%, 25%, 50%, 100%], for: 1h}\n    verify", "  - verify", "f.yaml:13:5: RB112", "one action"),
    ("to: best_healthy", "to: '{{ x }}'", "f.yaml:13:42: RB114", "template"),
    ("to: best_healthy", "to: $incident.tenant", "f.yaml:13:42: RB113", "'$incident.root'"),
    ("to: best_healthy", "to: $params.spar", "f.yaml:13:42: RB113", "'$params.spare'"),
    ("to: best_healthy", "to: ''", "f.yaml:13:42: RB108", "never read as all"),
    ("to: best_healthy", "too: best_healthy", "f.yaml:13:38: RB101", "'to'"),
    ("[10%, 25%, 50%, 100%]", "[50%, 25%]", "f.yaml:13:15: RB108", "rise"),
    ("for: 1h", "for: 60s, lease: 30s", "f.yaml:13:", "RB115"),
    ("for: 1h", "for: 1h, lease: 2h", "f.yaml:13:15: RB108", "lease"),
    ('errors("to") < 0.02', 'erors("to") < 0.02', "f.yaml:14:34: RB110", "did you mean 'errors'?"),
    ('errors("to") < 0.02', '(errors("to") > 0.02)', "f.yaml:14:34: RB110", "cannot read"),
    ('errors("to") < 0.02', 'errors("to") < 2', "f.yaml:14:34: RB110", "write 0.02 or 2%"),
    ("against: untouched", "agaist: untouched", "f.yaml:14:", "'against'"),
    ("on_failure: undo_and_page", "on_failure: ignore", "f.yaml:15:13: RB108", "undo or page"),
    ("outage(provider=\"b\", fails=0.6)", "rm -rf /", "f.yaml:17:10: RB108", "no fault of the lab"),
    ("[run, verified, released]", "[ran]", "f.yaml:18:", "no outcome"),
    ("{lab: outage(all_providers), expect", "{lab: outage(a=1, b=2), expect", "RB101", "quote text that contains a comma"),
    ("mode: suggest", "mode: &m suggest", "f.yaml:6:7: RB003", "anchors"),
    ("mode: suggest", "mode: !!python/name:os.system suggest", "f.yaml:6:7: RB003", "tag"),
    ("check: 'calls", "check: calls", "f.yaml:10:", "quote text that contains `: `"),
    ("tests:", "---\ntests:", "f.yaml:16:1: RB003", "second document"),
    ("id: enough_calls", "id: [a]", "f.yaml:9:9: RB108", ""),
    ("params: {enough: 20, spare: c}", "params: {1: 2}", "f.yaml:7:10: RB005", "quote it"),
    ("steps:", "steps: []\nx:", "RB108", ""),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "start", "part"), MISTAKES)
def test_a_mistake_is_refused_with_its_code_at_its_place(old: str, new: str, start: str, part: str) -> None:
    assert old in GOOD
    said = errors_of(GOOD.replace(old, new, 1))
    assert any(start in e and part in e for e in said), "\n".join(said)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "RB001"),
        ("# only a comment", "RB001"),
        ("just text", "RB108"),
        ("[1, 2]", "RB108"),
        (b"\xff\xfe\x00", "RB001"),
        ("a: \x07", "RB001"),
        ('a: "\\UFFFFFFFF"', "RB001"),
        ("[" * 5000, "RB004"),
        ("{a: " * 100 + "1" + "}" * 100, "RB004"),
        ("a: &x [1]\nb: *x", "RB003"),
        ("? [a]\n: 1", "RB005"),
        ("x" * 70_000, "RB001"),
        ("%YAML 9.9\n---\na: 1", "RB001"),
    ],
)
def test_what_is_no_runbook_at_all_is_refused_in_one_sentence(text: str | bytes, code: str) -> None:
    assert [e.split(" ")[1] for e in errors_of(text)] == [code]


def test_all_mistakes_are_told_at_once_in_the_order_they_are_found() -> None:
    said = errors_of(GOOD.replace("HIGH", "HIHG").replace('errors("to")', 'eror("to")'))
    assert [e.split(" ")[1] for e in said] == ["RB104", "RB110"]


@pytest.mark.parametrize("style", ["when: >-\n  {0} &&\n  {1}", "when: |\n  {0}\n    && {1}", "when: '{0} && {1}'", "when:\n  {0} &&\n  {1}"])  # fmt: skip
def test_the_place_inside_a_condition_is_right_in_every_style_of_text(style: str) -> None:
    first, wrong = 'incident.root.kind == "provider"', "incident.sevrity >= HIGH"
    lines = GOOD.split("\n")
    text = "\n".join([*lines[:3], style.format(first, wrong), *lines[4:]])
    offset = text.index("incident.sevrity")
    line = text.count("\n", 0, offset) + 1
    column = offset - text.rfind("\n", 0, offset)
    assert errors_of(text)[0].startswith(f"f.yaml:{line}:{column}: RB104")


def test_places_count_characters_and_not_bytes() -> None:
    text = GOOD.replace("llm-platform", "équipe-plateforme-été")
    text = text.replace(
        'incident.root.kind == "provider"', 'incident.root.name != "é" && incident.sgnal == "ö"'
    )
    offset = text.index("incident.sgnal")
    column = offset - text.rfind("\n", 0, offset)
    assert errors_of(text)[0].startswith(f"f.yaml:4:{column}: RB104")


def test_the_shipped_runbooks_are_right_have_a_refusal_test_and_only_suggest() -> None:
    shipped = library(actions=ACTIONS)
    assert "provider-failover" in shipped.by_name
    for runbook in shipped:
        assert runbook.mode == "suggest"
        words = [word for test in runbook.model.tests for word in test.expect]
        assert any(w.startswith(("refuse", "hold")) for w in words)
        assert "verified" in words


def test_a_file_of_the_same_name_replaces_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(GOOD.replace("mode: suggest", "mode: auto"))
    loaded = load_runbooks([tmp_path], actions=ACTIONS)
    assert loaded.by_name["provider-failover"].mode == "auto"
    assert loaded.by_name["provider-failover"].source == "directory"


def test_the_mode_can_be_overridden_by_name() -> None:
    loaded = load_runbooks(actions=ACTIONS, mode_override={"provider-failover": "auto"})
    assert loaded.by_name["provider-failover"].mode == "auto"
    with pytest.raises(ConfigError, match="provider-failover"):
        load_runbooks(actions=ACTIONS, mode_override={"provider-failovr": "auto"})


def test_one_wrong_runbook_refuses_the_whole_set(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text(GOOD.replace("HIGH", "HIHG").replace("provider-failover", "other"))
    with pytest.raises(RunbookErrors) as caught:
        load_runbooks([tmp_path], actions=ACTIONS)
    assert [e.code for e in caught.value.errors] == ["RB104"]


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(RunbookErrors, match=r"b\.yaml:1:1: RB111 'provider-failover' is taken by a\.yaml"):
        load_texts({"a.yaml": GOOD, "b.yaml": GOOD}, actions=ACTIONS)


def test_a_path_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunbookErrors, match="RB120 cannot be read"):
        load_runbooks([tmp_path / "gone.yaml"], actions=ACTIONS)


def test_an_empty_set_is_a_set() -> None:
    assert len(RunbookSet()) == 0
