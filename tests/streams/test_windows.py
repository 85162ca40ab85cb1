"""Windows close as time passes, late calls stay out, and labels that explode do not exhaust memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flyball.core.codec import SnapshotError
from flyball.core.columns import BASE_LABELS, Rollup, Window
from flyball.core.errorclass import CLASS_INDEX
from flyball.core.errors import ConfigError
from flyball.core.events import AgentStep, Batch, Change, Event, LlmCall
from flyball.core.quantiles import quantile
from flyball.streams.cells import labels_of
from flyball.streams.windows import WindowMerger, Windows, WindowSettings, merge_windows


def call(at: float, **fields: Any) -> LlmCall:
    return LlmCall(**{"at": at, "provider": "p", "model": "m", "tenant": "t", **fields})


def feed(
    windows: Windows, *events: Event, sender: str = "a", received_at: float | None = None
) -> list[Window]:
    return windows.feed(Batch(events=list(events), sender=sender, received_at=received_at))


def by_label(rollup: Rollup) -> dict[tuple[str, ...], int]:
    return {rollup.labels[slot]: int(n) for slot, n in zip(rollup.ids.tolist(), rollup.calls, strict=True)}


def test_a_window_closes_when_the_watermark_passes_its_end() -> None:
    w = Windows()
    assert feed(w, call(100.0), call(109.9)) == []
    assert feed(w, call(111.9)) == []
    (closed,) = feed(w, call(112.0))
    assert (closed.start, closed.end, int(closed.rollups[()].calls[0])) == (100.0, 110.0, 2)
    assert w.watermark == 110.0
    assert w.newest == 112.0


def test_a_call_whose_window_has_closed_is_counted_and_in_no_window() -> None:
    w = Windows()
    closed = feed(w, call(100.0)) + feed(w, call(115.0)) + feed(w, call(101.0), call(116.0), sender="b")
    closed += w.flush()
    assert [int(x.rollups[()].calls[0]) for x in closed] == [1, 2]
    assert w.stats.late == 1
    assert w.stats.late_by_sender == {"b": 1}


def test_a_call_behind_the_watermark_still_counts_while_its_window_is_open() -> None:
    w = Windows()
    feed(w, call(109.0))
    feed(w, call(100.5))
    assert [int(x.rollups[()].calls[0]) for x in w.flush()] == [2]
    assert w.stats.late == 0


def test_a_gap_gives_no_empty_windows_and_what_comes_for_it_is_late() -> None:
    w = Windows()
    closed = feed(w, call(100.0)) + feed(w, call(200.0)) + feed(w, call(150.0)) + w.flush()
    assert [x.start for x in closed] == [100.0, 200.0]
    assert w.stats.late == 1


def test_one_batch_over_many_windows_closes_them_in_order() -> None:
    w = Windows()
    closed = feed(w, *(call(at) for at in (135.0, 104.0, 128.0, 101.0, 117.0))) + w.flush()
    assert [(x.start, int(x.rollups[()].calls[0])) for x in closed] == [
        (100.0, 2),
        (110.0, 1),
        (120.0, 1),
        (130.0, 1),
    ]


def test_ticks_close_the_last_window_when_nothing_more_arrives() -> None:
    w = Windows()
    feed(w, call(105.0), received_at=106.0)
    assert w.tick(124.9) == []
    (closed,) = w.tick(125.0)
    assert closed.end == 110.0


def test_other_events_only_move_time_on() -> None:
    w = Windows()
    feed(w, call(100.0), AgentStep(at=101.0), Change(at=102.0, kind="deploy"))
    (closed,) = feed(w, AgentStep(at=140.0))
    assert int(closed.rollups[()].calls[0]) == 1
    assert w.flush() == []
    assert w.stats.events == {"llm_call": 1, "agent_step": 2, "change": 1}


def test_an_absurd_time_is_counted_and_breaks_nothing() -> None:
    w = Windows()
    feed(w, call(100.0), call(float("inf")), call(float("nan")), call(1e300))
    assert feed(w, call(float("nan"))) == []
    assert [int(x.rollups[()].calls[0]) for x in w.flush()] == [1]
    assert w.stats.damaged_time == 4


def test_a_skewed_sender_is_corrected_and_reported_and_a_late_one_is_not_taken_for_it() -> None:
    w = Windows()
    for now in range(1000, 1060):
        feed(w, call(float(now)), sender="good", received_at=now + 0.5)
        feed(w, call(now - 600.0), sender="slow clock", received_at=now + 0.5)
        feed(w, call(now + 45.0), sender="fast clock", received_at=now + 0.5)
        if now % 20 == 19:
            feed(w, *(call(now - age) for age in (60.0, 50.0, 40.0)), sender="late", received_at=now + 0.5)
    assert w.stats.skew_s == {"slow clock": -600.5, "fast clock": 44.5}
    assert w.stats.late_by_sender == {"slow clock": 4, "late": 9}
    assert w.stats.clamped_future == 4
    assert w.newest <= 1060.0


def test_roll_ups_leave_out_cells_that_lack_a_label() -> None:
    w = Windows()
    feed(w, call(100.0, app="x"), call(100.0, app=""), call(100.0, app="x", provider=""))
    (closed,) = w.flush()
    assert by_label(closed.rollups[()]) == {(): 3}
    assert by_label(closed.rollups[("app",)]) == {("x",): 2}
    assert by_label(closed.rollups[("app", "provider")]) == {("x", "p"): 1}
    assert len(closed.rollups[("app", "agent")]) == 0
    assert len(closed.cells) == 3


def test_the_model_served_stands_in_for_a_model_that_was_not_told() -> None:
    w = Windows()
    feed(w, call(100.0, model="", model_served="m"), call(100.0, model="m", model_served="m-2024"))
    (closed,) = w.flush()
    assert by_label(closed.rollups[("provider", "model")]) == {("p", "m"): 2}


def test_labels_of_a_call_stand_in_the_order_of_the_base_labels() -> None:
    told = LlmCall(at=0.0, **{name: name for name in BASE_LABELS})  # type: ignore[arg-type]
    assert labels_of(told) == BASE_LABELS


def test_missing_is_not_zero() -> None:
    w = Windows()
    feed(
        w,
        call(100.0, input_tokens=10, cost_usd=0.0),
        call(100.0, input_tokens=None),
        call(100.0, output_tokens=0),
    )
    total = w.flush()[0].rollups[()]
    assert {k: int(v[0]) for k, v in total.counts.items() if v[0]} == {
        "input_tokens": 1,
        "output_tokens": 1,
        "cost_usd": 1,
    }
    assert total.sums["input_tokens"].tolist() == [10.0]
    assert total.sums["log_input_tokens"].tolist() == [np.log(10.0)]
    assert total.sums["log_output_tokens"].tolist() == [0.0]


def test_histograms_hold_successful_calls_only() -> None:
    w = Windows()
    feed(w, *(call(100.0, latency_s=1.0) for _ in range(9)), call(100.0, latency_s=60.0, error="timeout"))
    total = w.flush()[0].rollups[()]
    assert quantile(total.histograms["latency_s"], 1, 1.0)[0] == pytest.approx(1.0, rel=0.05)
    assert int(total.counts["latency_s"][0]) == 10


def test_tenants_and_failing_tenants_are_counted_once() -> None:
    w = Windows()
    feed(
        w,
        call(100.0, tenant="a", app="x"), call(100.0, tenant="a", app="y", error="timeout"),
        call(100.0, tenant="a", app="z", error="timeout"), call(100.0, tenant="b", error="auth"),
        call(100.0, tenant="", team="c", error="timeout"), call(100.0, tenant="", team=""),
    )  # fmt: skip
    total = w.flush()[0].rollups[("provider",)]
    assert total.tenants.tolist() == [3]  # who names neither tenant nor team is nobody
    told = {
        name: int(total.failing_tenants[0, CLASS_INDEX[name]])
        for name in ("", "timeout", "auth", "overloaded")
    }
    assert told == {"": 0, "timeout": 2, "auth": 1, "overloaded": 0}


def test_a_class_that_is_not_canonical_counts_as_unknown() -> None:
    w = Windows()
    feed(w, call(100.0, error="gremlins"))
    assert w.flush()[0].cells.by_class[0, CLASS_INDEX["unknown"]] == 1


def test_three_failed_calls_of_each_cell_and_class_are_kept_as_samples() -> None:
    w = Windows()
    feed(w, *(call(100.0 + i, id=f"f{i}", error="timeout") for i in range(9)), call(100.0, id="fine"))
    feed(w, call(101.0, trace="tr", span="sp", error="auth"))
    (closed,) = w.flush()
    assert closed.sample_ids({"provider": "p"}, CLASS_INDEX["timeout"]) == ["f0", "f1", "f2"]
    assert closed.sample_ids({"provider": "p"}, CLASS_INDEX["auth"]) == ["tr/sp"]


def test_windows_say_whether_they_are_live() -> None:
    w = Windows()
    w.live = False
    feed(w, call(100.0))
    assert not w.flush()[0].live


def explode(n: int, settings: WindowSettings, start: float = 1000.0) -> tuple[Windows, list[Window]]:
    """`n` tenants that call once each, over ten windows; the big one calls all the time."""
    w, closed = Windows(settings), list[Window]()
    per_window = n // 10
    for k in range(10):
        at = start + 10.0 * k
        tenants = [f"tenant-{k}-{i}" for i in range(per_window)]
        events: list[Event] = [call(at, tenant=t, app="shop", agent=t) for t in tenants]
        events += [call(at, tenant="big", app="shop") for _ in range(100 if k else 0)]
        closed += w.feed(Batch(events=events))
    return w, closed + w.flush()


def test_exploding_labels_stay_bounded_and_are_counted() -> None:
    settings = WindowSettings(max_cells=200)
    w, closed = explode(60_000, settings)
    assert w.stats.cells <= 200
    assert w.stats.overflowed > 55_000
    assert all(len(x.cells) <= 200 and x.cells.capacity <= 200 for x in closed)
    assert all(r.capacity <= 200 and len(r.labels) <= 200 for x in closed for r in x.rollups.values())
    assert sum(int(x.rollups[()].calls[0]) for x in closed) == 60_000 + 9 * 100
    assert [by_label(x.rollups[("app",)]) for x in closed[1:]] == [{("shop",): 6100}] * 9
    assert len(w.snapshot()) < 400_000


def test_what_is_over_the_limit_keeps_its_coarse_labels() -> None:
    _, closed = explode(5_000, WindowSettings(max_cells=200))
    last = closed[-1]
    assert by_label(last.rollups[("app",)]) == {("shop",): 600}
    assert by_label(last.rollups[("provider", "model")]) == {("p", "m"): 600}
    assert by_label(last.rollups[("tenant",)])[("other",)] > 300


def test_a_newcomer_with_real_traffic_gets_a_cell_of_its_own_and_keeps_it() -> None:
    _, closed = explode(20_000, WindowSettings(max_cells=200))
    assert [by_label(x.rollups[("tenant",)]).get(("big",), 0) for x in closed[2:]] == [100] * 8
    slots = {
        x.cells.ids[i]
        for x in closed[2:]
        for i in range(len(x.cells))
        if x.cells.row_labels(i)["tenant"] == "big"
    }
    assert len(slots) == 1


def test_when_even_coarse_labels_explode_one_cell_takes_the_rest() -> None:
    w = Windows(WindowSettings(max_cells=50))
    feed(w, *(call(100.0, app=f"app-{i}", region=f"r-{i}") for i in range(500)))
    (closed,) = w.flush()
    assert len(closed.cells) <= 50
    assert by_label(closed.rollups[("app",)])[("other",)] == w.stats.overflowed - 4
    assert int(closed.rollups[()].calls[0]) == 500


def test_a_slot_that_means_another_series_says_since_when() -> None:
    w = Windows(WindowSettings(max_cells=200))
    closed = []
    for k in range(20):
        closed += feed(w, *(call(1000.0 + 10 * k, tenant=f"tenant-{k}-{i % 150}") for i in range(600)))
    closed += w.flush()
    since: dict[tuple[str, int], tuple[float, tuple[str, ...]]] = {}
    reused = 0
    for window in closed:
        for name, rollup in (("cells", window.cells), ("tenant", window.rollups[("tenant",)])):
            for slot, born in zip(rollup.ids.tolist(), rollup.born.tolist(), strict=True):
                before = since.get((name, slot))
                now = (born, rollup.labels[slot])
                if before is not None and before[1] != now[1]:
                    reused += 1
                    assert born == window.start
                elif before is not None:
                    assert before == now
                since[name, slot] = now
    assert reused > 50


def test_a_closed_window_keeps_its_labels_when_slots_are_reused() -> None:
    w = Windows(WindowSettings(max_cells=20))
    feed(w, *(call(100.0, tenant=f"old-{i}") for i in range(40)))
    (closed,) = feed(w, call(130.0))
    before = sorted(by_label(closed.cells))
    for k in range(5):
        feed(w, *(call(140.0 + 10 * k, tenant=f"new-{k}-{i}") for i in range(40)))
    assert sorted(by_label(closed.cells)) == before


def test_a_series_silent_for_a_day_gives_its_slot_up() -> None:
    w = Windows(WindowSettings(window_s=3600.0, rollups=(("tenant",),)))
    feed(w, call(0.0, tenant="gone"))
    for hour in range(1, 130):
        feed(w, call(3600.0 * hour, tenant="here"))
    feed(w, call(3600.0 * 130, tenant="new"), call(3600.0 * 130, tenant="here"))
    last = w.flush()[-1].rollups[("tenant",)]
    assert {last.labels[i] for i in last.ids.tolist()} == {("new",), ("here",)}
    assert last.ids.tolist() == [0, 1]
    assert last.born.tolist() == [3600.0 * 130, 3600.0]


def test_merging_partial_windows_counts_tenants_once() -> None:
    parts = []
    for app in "xy":
        w = Windows()
        feed(w, call(100.0, app=app, error="timeout", id=f"{app}1"), call(100.0, app="both", latency_s=1.0))
        parts += w.flush()
    merged = merge_windows(parts)
    total = merged.rollups[()]
    assert by_label(merged.rollups[("app",)]) == {("x",): 1, ("both",): 2, ("y",): 1}
    assert total.tenants.tolist() == [1]
    assert int(total.failing_tenants[0, CLASS_INDEX["timeout"]]) == 1
    assert total.histograms["latency_s"].counts.tolist() == [2]
    assert sorted(merged.sample_ids({})) == ["x1", "y1"]


def test_a_merger_keeps_slots_over_windows_and_restarts() -> None:
    def part(at: float, *tenants: str) -> Window:
        w = Windows()
        feed(w, *(call(at, tenant=t) for t in tenants))
        return w.flush()[0]

    merger = WindowMerger()
    merger.merge([part(100.0, "a"), part(100.0, "b")])
    again = WindowMerger()
    again.restore(merger.snapshot())
    merged = again.merge([part(110.0, "c", "b")]).rollups[("tenant",)]
    assert merged.ids.tolist() == [1, 2]
    assert merged.born.tolist() == [100.0, 110.0]


def test_parts_of_different_spans_are_not_merged() -> None:
    w = Windows()
    feed(w, call(100.0), call(110.0))
    with pytest.raises(ValueError, match="one span"):
        merge_windows(w.flush())
    with pytest.raises(ValueError, match="one span"):
        merge_windows([])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("window_s", 0), ("window_s", float("nan")), ("lateness_s", -1), ("max_delay_s", 1.0), ("max_cells", 1),
     ("rollups", (("tennant",),))],
)  # fmt: skip
def test_settings_without_meaning_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        WindowSettings(**{setting: value})


def test_a_snapshot_taken_with_other_settings_is_refused() -> None:
    state = Windows().snapshot()
    with pytest.raises(ConfigError, match="rebuild"):
        Windows(WindowSettings(window_s=5.0)).restore(state)
    with pytest.raises(SnapshotError):
        Windows().restore(state[:-7])
