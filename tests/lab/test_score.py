"""The score: judged against the ground truth, the same whatever the number of processes."""

from __future__ import annotations

import pytest

from flyball.core.errors import ConfigError
from flyball.lab.scenario import Lab
from flyball.lab.score import FAULTS, Job, Result, governor_factory, jobs, run_job, score, table
from tests.lab.simple_governor import watching

SPEC = "tests.lab.simple_governor:watching"


def short(fault: str, seed: int = 1) -> Result:
    return run_job(Job(watching, fault, seed, 15.0, 120.0, 90.0, 30.0, 1.0))


def test_a_fault_that_is_found_scores_its_delay_from_the_evidence() -> None:
    result = short("provider_outage")
    assert result.detected
    assert result.root_right
    assert result.class_right
    assert result.pages == 1
    assert result.delay_s is not None
    assert -5.0 < result.delay_s < 20.0
    assert result.from_first_s is not None
    assert result.from_first_s > result.delay_s


def test_a_fault_that_is_missed_scores_as_missed() -> None:
    result = short("slow_provider")
    assert not result.detected
    assert result.delay_s is None
    assert result.pages == 0


def test_a_fault_without_a_root_takes_any_root_and_one_page() -> None:
    """This governor pages for each provider when all fail together: that is not one page."""
    result = short("all_providers_down")
    assert result.detected
    assert result.root_right
    assert result.pages > result.pages_least == 1


def test_quiet_days_are_judged_by_pages_and_directives() -> None:
    result = run_job(Job(watching, "", 1000, 5.0, 0.0, 900.0, 0.0, 5.0))
    assert (result.other_pages, result.directives) == (0, 0)
    rows = {r.name: r for r in table([result]).rows}
    assert rows["lab.quiet.false_pages"].holds is True
    assert rows["lab.quiet.days"].value == pytest.approx(900 / 86400, abs=1e-3)


def test_rows_have_the_shape_that_bench_and_score_share() -> None:
    rows = table([short("provider_outage"), short("slow_provider")]).as_dicts()
    assert all(set(r) == {"name", "value", "unit", "baseline", "ratio", "bar", "holds"} for r in rows)
    by_name = {r["name"]: r for r in rows}
    assert by_name["lab.provider_outage.detected"]["holds"] is True
    assert by_name["lab.slow_provider.detected"]["holds"] is False
    assert by_name["lab.slow_provider.delay_max"]["value"] is None
    assert by_name["lab.slow_provider.delay_max"]["holds"] is False


def test_every_fault_can_be_switched_on_for_any_seed() -> None:
    for name, scenario in FAULTS.items():
        for seed in (1, 2, 3):
            lab = Lab(watching, seed=seed, warmup="0s", rate=2.0)
            scenario(lab, seed)
            assert lab.sim.faults[0].start == lab.zero, name


def test_the_plan_says_what_will_run_and_refuses_what_it_does_not_know() -> None:
    plan = jobs(SPEC, range(20), tuple(FAULTS), 20)
    assert len(plan) == 20 + 20 * len(FAULTS)
    with pytest.raises(ConfigError, match="did you mean 'square_wave'"):
        jobs(SPEC, [1], ["square_waves"], 0)


def test_a_governor_is_named_as_module_and_function() -> None:
    assert governor_factory(SPEC)() is not None
    for wrong in ("tests.lab.simple_governor", "tests.lab.simple_governor:nothing"):
        with pytest.raises(ConfigError):
            governor_factory(wrong)
    with pytest.raises(ConfigError, match="module:function"):
        score(watching, [1], ["bad_key"], 0, processes=2)


def test_progress_is_told_after_each_simulation() -> None:
    told: list[tuple[int, int]] = []
    score(
        watching, [1], ["square_wave"], 0, fault_rate=2.0, progress=lambda done, n, _: told.append((done, n))
    )
    assert told == [(1, 1)]
