"""The live estate counts what its windows hold, forgets what is old, and is the same after a restart."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.columns import Window
from flyball.core.events import AgentStep, GpuSample, LlmCall
from flyball.runbooks.activity import MAX_RUNS, NEWEST
from flyball.runbooks.candidates import best_healthy
from flyball.runbooks.estate import LiveEstate
from tests.remediation._estate import T0, Row, World, window


def row(provider: str, calls: int, bad: int = 0, tenant: str = "t1", **more: object) -> Row:
    labels = {"provider": provider, "model": str(more.pop("model", "m")), "app": "shop", "tenant": tenant}
    return Row(calls, bad, labels=labels, **more)  # type: ignore[arg-type]


def estate_of(*windows: list[Row]) -> LiveEstate:
    estate = LiveEstate()
    estate.feed([window(T0 + 10.0 * i, rows) for i, rows in enumerate(windows)])
    return estate


def test_before_the_first_window_there_is_no_data() -> None:
    estate = LiveEstate()
    assert estate.now() == 0.0
    seen = estate.errors({"provider": "a"}, 60.0)
    assert (seen.k, seen.n) == (0, 0)
    assert math.isnan(seen.value)


def test_errors_are_counted_of_attempts_without_what_never_reached_the_provider() -> None:
    estate = estate_of([row("a", 100, 10, local=40)])
    seen = estate.errors({"provider": "a"}, 60.0)
    assert (seen.k, seen.n) == (10, 60)
    assert estate.calls({"provider": "a"}, 60.0) == 100


def test_only_windows_that_begin_within_the_span_count() -> None:
    estate = estate_of([row("a", 1)], [row("a", 10)], [row("a", 100)])
    assert estate.calls({}, 10.0) == 100
    assert estate.calls({}, 20.0) == 110
    assert estate.calls({}, 25.0) == 110
    assert estate.calls({}, 3.0) == 100, "a span below one window is the newest window"


def test_a_span_after_silence_holds_nothing() -> None:
    estate = estate_of([row("a", 5)], [], [], [])
    assert estate.now() == T0 + 40.0
    assert estate.calls({}, 20.0) == 0


def test_a_label_that_no_cell_carries_selects_nothing_and_never_everything() -> None:
    estate = estate_of([row("a", 5)])
    assert estate.calls({"run": "r1"}, 60.0) == 0
    assert estate.calls({"provider": "nobody"}, 60.0) == 0
    assert estate.errors({"provider": "nobody"}, 60.0).n == 0


def test_values_come_with_the_most_calls_first_then_by_name() -> None:
    estate = estate_of([row("b", 5), row("a", 5), row("c", 9), row("", 50)])
    assert estate.values("provider", {}, 60.0) == ["c", "a", "b"]


def test_cost_that_nobody_told_is_unknown_and_not_zero() -> None:
    estate = estate_of([row("a", 5), row("b", 5, usd=1.0)])
    assert estate.usd_per_hour({"provider": "a"}, 60.0) is None
    assert estate.usd_per_hour({"provider": "b"}, 10.0) == 360.0


def test_a_slot_that_came_to_mean_another_series_is_not_taken_for_the_old_one() -> None:
    estate = estate_of([row("a", 5)], [row("b", 7)])
    assert estate.calls({"provider": "a"}, 60.0) == 5
    assert estate.calls({"provider": "b"}, 60.0) == 7


def test_a_stream_of_new_labels_does_not_grow_it_for_ever() -> None:
    estate = LiveEstate(keep_s=20.0)
    for i in range(20):
        rows = [row("a", 1, tenant=f"t{i}-{j}") for j in range(1000)]
        estate.feed([window(T0 + 10.0 * i, rows)])
    assert len(estate._cells) < 8192
    assert estate.calls({"provider": "a"}, 20.0) == 2000
    assert estate.calls({"tenant": "t19-5"}, 20.0) == 1


ROWS = st.lists(
    st.builds(row, st.sampled_from("abc"), st.integers(1, 50), st.just(0), st.sampled_from(["t1", "t2"]), usd=st.none() | st.just(0.5)),
    max_size=6, unique_by=lambda r: tuple(sorted(r.labels.items())),
)  # fmt: skip


@given(st.lists(ROWS, max_size=12), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_snapshot_and_restore_anywhere_change_no_answer(windows: list[list[Row]], cut: int) -> None:
    made: list[Window] = [window(T0 + 10.0 * i, rows) for i, rows in enumerate(windows)]
    straight, first = LiveEstate(keep_s=60.0), LiveEstate(keep_s=60.0)
    straight.feed(made)
    first.feed(made[:cut])
    second = LiveEstate(keep_s=60.0)
    second.restore(first.snapshot())
    second.feed(made[cut:])
    assert second.snapshot() == straight.snapshot()
    for scope in ({}, {"provider": "a"}, {"provider": "b", "tenant": "t2"}):
        for span in (10.0, 30.0, 600.0):
            assert straight.errors(scope, span) == second.errors(scope, span)
            assert straight.usd_per_hour(scope, span) == second.usd_per_hour(scope, span)
            assert straight.values("tenant", scope, span) == second.values("tenant", scope, span)


def test_the_healthy_provider_with_the_same_models_is_preferred() -> None:
    estate = estate_of(
        [row("b", 100, 60, model="m1"), row("a", 500, model="m2"), row("c", 50, model="m1"), row("d", 90, 9, model="m1")]
    )  # fmt: skip
    assert [c.scope["provider"] for c in best_healthy(estate, {"provider": "b"})] == ["c", "a"]


def test_a_provider_with_too_few_calls_is_no_candidate() -> None:
    assert best_healthy(estate_of([row("b", 100, 60), row("a", 19)]), {"provider": "b"}) == []


def test_a_provider_that_is_itself_being_left_is_no_candidate() -> None:
    estate = estate_of([row("b", 100, 60), row("a", 100), row("c", 90)])
    found = best_healthy(estate, {"provider": "b"}, exclude=["a"])
    assert [c.scope["provider"] for c in found] == ["c"]


def test_the_cell_of_the_rest_is_no_candidate() -> None:
    assert best_healthy(estate_of([row("b", 100, 60), row("other", 500)]), {"provider": "b"}) == []


def test_the_order_of_candidates_does_not_depend_on_the_order_of_cells() -> None:
    rows = [row("b", 100, 60), row("a", 100), row("c", 100)]
    assert best_healthy(estate_of(rows), {"provider": "b"}) == best_healthy(
        estate_of(rows[::-1]), {"provider": "b"}
    )


def test_the_world_of_these_tests_moves_what_directives_say() -> None:
    world = World({"a": 100, "b": 100})
    world.advance()
    assert world.estate.calls({"provider": "a"}, 10.0) == 100


# --- tokens, latency, attempts ----------------------------------------------------------------------------------------------


def test_attempts_leave_out_what_was_refused_on_the_way() -> None:
    estate = estate_of([row("a", 100, 10, local=40)])
    assert (estate.calls({"provider": "a"}, 10.0), estate.attempts({"provider": "a"}, 10.0)) == (100, 60)


def test_tokens_per_minute_that_nobody_told_are_unknown() -> None:
    estate = estate_of([row("a", 5), row("b", 5, tokens=600.0)])
    assert estate.tokens_per_min({"provider": "a"}, 10.0) is None
    assert estate.tokens_per_min({"provider": "b"}, 10.0) == 3600.0
    assert estate.tokens_per_min({"provider": "b"}, 600.0) == 3600.0


def test_latency_is_the_mean_over_calls_and_not_over_cells() -> None:
    estate = estate_of(
        [row("a", 30, latency_s=30.0), row("a", 10, tenant="t2", latency_s=50.0)], [row("b", 5)]
    )
    assert estate.latency_s({"provider": "a"}, 60.0) == 2.0
    assert estate.latency_s({"provider": "b"}, 60.0) is None
    assert estate.latency_s({"provider": "nobody"}, 60.0) is None


# --- runs -------------------------------------------------------------------------------------------------------------------


def test_a_run_is_counted_by_its_steps_and_calls_and_what_was_refused_apart() -> None:
    estate = LiveEstate()
    estate.feed([window(T0, [row("a", 1)])])
    estate.observe(
        [
            AgentStep(at=T0 + 1, run="r"),
            LlmCall(at=T0 + 2, run="r"),
            AgentStep(at=T0 + 3, run="r", error="timeout"),
        ]
    )
    estate.observe(
        [LlmCall(at=T0 + 4, run="r", error="gateway_local"), LlmCall(at=T0 + 5), AgentStep(at=T0 + 5)]
    )
    assert (estate.calls({"run": "r"}, 60.0), estate.attempts({"run": "r"}, 60.0)) == (4, 3)
    assert estate.calls({"run": "r"}, 7.5) == 2
    assert estate.calls({"run": "other"}, 60.0) == 0
    assert estate.calls({"run": "r", "app": "shop"}, 60.0) == 0, "nobody could say whose run it is"


def test_active_runs_are_listed_with_the_busiest_first() -> None:
    estate = LiveEstate()
    estate.observe([AgentStep(at=T0 + i, run="b") for i in range(3)])
    assert estate.values("run", {}, 600.0) == ["b"]
    estate.observe([AgentStep(at=T0 + 2.0, run="c"), *(AgentStep(at=T0 + i, run="a") for i in range(3))])
    assert estate.values("run", {}, 600.0) == ["a", "b", "c"]
    assert estate.values("run", {"app": "shop"}, 600.0) == []


def test_of_a_busy_run_only_the_newest_steps_are_known() -> None:
    estate = LiveEstate()
    estate.observe([AgentStep(at=T0 + i, run="r") for i in range(500)])
    assert estate.calls({"run": "r"}, 10_000.0) == NEWEST


def test_a_stream_of_new_runs_does_not_grow_it_for_ever() -> None:
    estate = LiveEstate()
    for i in range(40):
        estate.observe([AgentStep(at=T0 + i, run=f"r{i}-{j}") for j in range(1000)])
    assert len(estate._runs._runs) < 2 * MAX_RUNS
    assert estate.calls({"run": "r39-999"}, 600.0) == 1


def test_where_only_runs_are_watched_they_keep_the_time() -> None:
    estate = LiveEstate()
    estate.observe([AgentStep(at=T0 + 100.0, run="r")])
    assert T0 + 60.0 <= estate.now() <= T0 + 70.0
    estate.feed([window(T0 + 90.0, [row("a", 1)])])
    assert estate.now() == T0 + 100.0
    estate.observe([AgentStep(at=T0 + 120.0, run="r")])
    assert estate.now() == T0 + 100.0, "windows that are still open are not overtaken"


def test_a_clock_that_is_ahead_does_not_carry_the_time_away() -> None:
    estate = LiveEstate()
    estate.observe([AgentStep(at=T0 + 1e6, run="r"), GpuSample(at=T0 + 1e6, node="n", gpu="0")], now=T0)
    assert estate.now() < T0
    assert estate.calls({"run": "r"}, 60.0) == 1


# --- GPUs -------------------------------------------------------------------------------------------------------------------


def sample(node: str, gpu: str, at: float, deployment: str = "") -> GpuSample:
    return GpuSample(at=at, node=node, gpu=gpu, deployment=deployment)


def test_gpus_that_reported_lately_are_listed_by_node_gpu_and_deployment() -> None:
    estate = LiveEstate()
    estate.feed([window(T0, [row("a", 1)])])
    estate.observe(
        [sample("n1", "1", T0 + 5, "vllm"), sample("n1", "0", T0 + 5), sample("n2", "0", T0 - 200)]
    )
    estate.observe([GpuSample(at=T0 + 5, node="n3", deployment="vllm")])
    assert estate.gpus({}, 300.0) == ["n1/0", "n1/1", "n2/0"]
    assert estate.gpus({}, 60.0) == ["n1/0", "n1/1"]
    assert estate.gpus({"node": "n2"}, 300.0) == ["n2/0"]
    assert estate.gpus({"gpu": "n1/1"}, 300.0) == estate.gpus({"gpu": "1"}, 300.0) == ["n1/1"]
    assert estate.gpus({"deployment": "vllm"}, 300.0) == ["n1/1"]
    assert estate.gpus({"tenant": "t"}, 300.0) == []


EVENTS = st.lists(
    st.builds(AgentStep, at=st.integers(0, 900).map(lambda s: T0 + s), run=st.sampled_from(["", "r1", "r2"]), error=st.sampled_from(["", "gateway_local"]))
    | st.builds(sample, st.sampled_from(["n1", "n2"]), st.sampled_from("01"), st.integers(0, 900).map(lambda s: T0 + s)),
    max_size=120,
)  # fmt: skip


@given(EVENTS, st.integers(0, 120))
@settings(max_examples=60, deadline=None)
def test_a_restart_changes_nothing_about_runs_and_gpus(events: list[AgentStep | GpuSample], cut: int) -> None:
    straight, first = LiveEstate(), LiveEstate()
    for e in events:
        straight.observe([e])
    first.observe(events[:cut])
    second = LiveEstate()
    second.restore(first.snapshot())
    second.observe(events[cut:])
    assert second.snapshot() == straight.snapshot()
    for span in (10.0, 60.0, 600.0):
        assert second.gpus({}, span) == straight.gpus({}, span)
        assert second.calls({"run": "r1"}, span) == straight.calls({"run": "r1"}, span)
