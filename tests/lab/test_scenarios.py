"""The whole pipeline against the lab: one scenario for each fault, and a quiet half hour. `flyball lab score` does it by the hundred."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from flyball.app.wiring import lab_governor
from flyball.core.incident import Incident
from flyball.lab import Lab, incident

QUIET_BEFORE = "10m"


def lab(seed: int, rate: float = 10.0) -> Lab:
    return Lab(lab_governor, seed=seed, rate=rate, warmup=QUIET_BEFORE)


def one_page(lab: Lab) -> Incident:
    (page,) = lab.pages()
    assert lab.governor.disabled == {}  # type: ignore[attr-defined]
    return page


def test_outage_of_a_provider_is_one_page_within_half_a_minute() -> None:
    outage = lab(101)
    outage.at("0s").provider("b").fails(0.6)
    outage.expect("30s", incident(root="provider:b", signal="llm.errors", klass="overloaded", page=True))
    outage.at("90s").provider("b").recovers()
    outage.run("6m")
    assert one_page(outage).root.name == "b"
    assert [i.state for i in outage.incidents() if i.page] == ["resolved"]


def test_a_quarter_of_the_calls_failing_is_the_provider() -> None:
    partial = lab(102)
    partial.at("0s").provider("b").fails(0.25)
    partial.expect("50s", incident(root="provider:b", signal="llm.errors", page=True))
    one_page(partial)


def test_exhausted_quota_is_not_taken_for_an_outage() -> None:
    quota = lab(103)
    quota.at("0s").provider("a").quota_exhausted()
    quota.expect("30s", incident(root="provider:a", klass="quota_exhausted", page=True))
    one_page(quota)


def test_one_tenants_revoked_key_blames_the_tenant_and_no_provider() -> None:
    key = lab(104)
    key.at("0s").tenant("t3").bad_key()
    key.expect("90s", incident(root="tenant:t3", klass="auth", page=True))
    one_page(key)


def test_prompt_version_that_doubles_the_tokens_is_the_root_and_its_deploy_is_told() -> None:
    prompt = lab(105)
    prompt.at("0s").prompt("checkout@4").doubles_tokens()
    found = prompt.expect("60s", incident(root="prompt_version:checkout@4", page=True))
    assert found.signal == "llm.input_tokens"
    assert any(c.kind == "deploy" for c in found.changes)
    one_page(prompt)


@pytest.mark.parametrize("pattern", ["repeat", "cycle"])
def test_looping_run_is_told_by_its_run(pattern: str) -> None:
    loop = lab(106)
    loop.at("0s").agent("coder").loops(pattern)
    found = loop.expect("50s", incident(root="run", signal="agent.loop", klass=pattern, page=True))
    assert found.root.name == loop.sim.faults[0].run  # type: ignore[union-attr]
    one_page(loop)


def test_app_that_hammers_is_the_root_of_its_refusals() -> None:
    storm = lab(107)
    storm.at("0s").app("checkout").retry_storm()
    storm.expect("40s", incident(root="app:checkout", page=True))
    one_page(storm)


def test_slow_provider_is_blamed_for_slow_calls() -> None:
    slow = lab(108)
    slow.at("0s").provider("a").slow(3.0)
    slow.expect("70s", incident(root="provider:a", page=True))
    one_page(slow)


def test_failed_gpu_is_told_at_its_next_sample() -> None:
    gpu = lab(109)
    gpu.at("0s").gpu("node-1/gpu-2").xid(79)
    gpu.expect("40s", incident(root="gpu:node-1/gpu-2", signal="gpu.fault", page=True))
    gpu.run("2m")
    one_page(gpu)


def test_hot_gpu_is_the_root_of_what_its_server_shows() -> None:
    hot = lab(110)
    hot.at("0s").gpu("node-2/gpu-0").overheats()
    hot.run("3m")
    (found,) = (i for i in hot.incidents() if i.at >= hot.zero)
    assert str(found.root) == "gpu:node-2/gpu-0"


def test_full_server_is_the_root_of_slow_first_tokens() -> None:
    full = lab(111)
    full.at("0s").deployment("vllm-1").saturates()
    full.expect("100s", incident(root="deployment:vllm-1"))


def test_every_provider_failing_at_once_is_our_own_way_out() -> None:
    down = lab(112)
    down.at("0s").all_providers().fail()
    found = down.expect("30s", incident(root="stream:egress", page=True))
    assert found.severity.sev == "SEV1"
    down.run("60s")
    one_page(down)


def test_outage_that_comes_and_goes_is_one_incident_and_one_page() -> None:
    wave = lab(113)
    wave.at("0s").provider("b").fails(0.6, on="20s", off="20s")
    wave.run("4m")
    assert str(one_page(wave).root) == "provider:b"
    assert len([i for i in wave.incidents() if i.signal == "llm.errors"]) == 1


def test_what_follows_our_redirect_changes_no_root(tmp_path: Path) -> None:
    text = files("flyball.runbooks").joinpath("library/provider-failover.yaml").read_text()
    (tmp_path / "failover.yaml").write_text(text.replace("mode: suggest", "mode: auto"))
    moved = Lab(
        lambda: lab_governor(mode="auto", runbooks=[tmp_path]), seed=1, rate=20.0, warmup=QUIET_BEFORE
    )
    moved.at("0s").provider("b").fails(0.6)
    moved.run("2m")
    assert {d.directive.kind for d in moved.directive_changes()} == {"redirect"}
    page = one_page(moved)
    (now,) = (i for i in moved.incidents() if i.id == page.id)
    assert (str(now.root), now.signal) == ("provider:b", "llm.errors")


def test_quiet_half_hour_wakes_nobody_and_moves_nothing() -> None:
    quiet = Lab(lab_governor, seed=114, rate=5.0, warmup=0, tick_s=5.0)
    quiet.run("30m")
    quiet.no_pages()
    assert quiet.directive_changes() == []
