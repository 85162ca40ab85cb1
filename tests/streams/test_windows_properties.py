"""Windows against a naive reading of their definition, and what must not change a result."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.columns import BASE_LABELS, COUNTED, SUMS, Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, CLASSES
from flyball.core.events import AgentStep, Batch, Event, LlmCall
from flyball.streams.cells import HISTOGRAMS, CodeOfHash
from flyball.streams.histogram import buckets
from flyball.streams.windows import Windows, WindowSettings, merge_windows

WIDE = WindowSettings(lateness_s=1e6, max_delay_s=1e6, max_cells=500)
"""Nothing closes before the end, so that the order of arrival cannot matter."""

label = st.sampled_from(["", "x", "y"])
tokens = st.none() | st.integers(0, 5000)
# Sixteenths: their sums are exact, whatever the order.
sixteenths = st.none() | st.integers(0, 100_000).map(lambda n: n / 16)
calls = st.builds(
    LlmCall, at=st.integers(0, 240).map(lambda n: 1000 + n / 4), id=st.uuids().map(str), provider=label, model=label,
    model_served=label, app=label, prompt=label, team=label, tenant=st.sampled_from(["", *"abcdefgh"]), agent=label,
    error=st.sampled_from(["", "", "", "timeout", "auth", "gremlins"]), input_tokens=tokens, output_tokens=tokens,
    cache_read_tokens=tokens, reasoning_tokens=st.none(), cost_usd=sixteenths, latency_s=sixteenths, ttft_s=sixteenths,
)  # fmt: skip
streams = st.lists(calls, max_size=40)
Key = tuple[float, tuple[str, ...]]


def labels_of(call: LlmCall) -> dict[str, str]:
    return {
        name: getattr(call, name) or (call.model_served if name == "model" else "") for name in BASE_LABELS
    }


def naive(
    events: Iterable[LlmCall], by: tuple[str, ...], may_lack: bool = False
) -> dict[Key, dict[Any, Any]]:
    """The roll-up `by` of all windows, one call at a time."""
    found: dict[Key, dict[Any, Any]] = {}
    for c in events:
        told = labels_of(c)
        labels = tuple(told[name] for name in by)
        if not may_lack and not all(labels):
            continue
        row = found.setdefault((math.floor(c.at / 10.0) * 10.0, labels), defaultdict(float))
        klass = CLASS_INDEX.get(c.error, CLASS_INDEX["unknown"])
        who = told["tenant"] or told["team"]
        row["calls"] += 1
        row["class", klass] += 1
        # Who tells neither tenant nor team is nobody.
        row.setdefault("who", set()).update({who} - {""})
        if klass:
            row.setdefault(("failing", klass), set()).update({who} - {""})
        for name in set(COUNTED.values()):
            value = getattr(c, name)
            if value is not None:
                row["n", name] += 1
                row["sum", name] += value
                if value > 0 and f"log_{name}" in SUMS:
                    row["sum", f"log_{name}"] += math.log(value)
                    row["sum", f"log2_{name}"] += math.log(value) ** 2
                if name in HISTOGRAMS and not klass:
                    row["histogram", name, int(buckets(np.array([float(value)]))[0])] += 1
    return found


def as_naive(rollup: Rollup, start: float) -> dict[Key, dict[Any, Any]]:
    found: dict[Key, dict[Any, Any]] = {}
    for i in range(len(rollup)):
        row = found[start, rollup.labels[int(rollup.ids[i])]] = {
            "calls": rollup.calls[i],
            "who": rollup.tenants[i],
        }
        for k in range(len(CLASSES)):
            row["class", k], row["failing", k] = rollup.by_class[i, k], rollup.failing_tenants[i, k]
        row |= {("sum", name): rollup.sums[name][i] for name in SUMS}
        row |= {("n", name): rollup.counts[name][i] for name in set(COUNTED.values())}
    for name in HISTOGRAMS:
        h = rollup.histograms[name]
        for r, b, n in zip(h.rows.tolist(), h.buckets.tolist(), h.counts.tolist(), strict=True):
            found[start, rollup.labels[int(rollup.ids[r])]]["histogram", name, b] = n
    return found


def check(windows: Sequence[Window], events: Sequence[LlmCall]) -> None:
    """Every roll-up of every window is what the naive reading says."""
    for by in [BASE_LABELS, *windows[0].rollups] if windows else []:
        fine = by == BASE_LABELS
        found: dict[Key, dict[Any, Any]] = {}
        for w in windows:
            found |= as_naive(w.cells if fine else w.rollups[by], w.start)
        expected = naive(events, by, may_lack=fine)
        assert found.keys() == expected.keys()
        for key, row in found.items():
            told = {k: len(v) if isinstance(v, set) else v for k, v in expected[key].items()}
            left = {k: v for k, v in row.items() if v or k in told}
            assert left.keys() == told.keys() | {k for k, v in left.items() if v}
            for k, v in left.items():
                exact = not (isinstance(k, tuple) and str(k[1]).startswith("log"))
                assert v == told.get(k, 0) if exact else v == pytest.approx(told.get(k, 0))


def signature(windows: Iterable[Window]) -> list[Any]:
    """Everything that a window says, bit for bit."""
    return [
        (
            w.start,
            w.end,
            w.live,
            dict(w.samples),
            [_rollup_signature(r) for r in (w.cells, *w.rollups.values())],
        )
        for w in windows
    ]


def _rollup_signature(r: Rollup) -> tuple[Any, ...]:
    arrays = [
        r.ids,
        r.born,
        r.calls,
        r.by_class,
        r.tenants,
        r.failing_tenants,
        *r.sums.values(),
        *r.counts.values(),
    ]
    arrays += [part for h in r.histograms.values() for part in (h.rows, h.buckets, h.counts)]
    return (
        r.by,
        r.capacity,
        [r.labels[i] for i in r.ids.tolist()],
        [(a.dtype.str, a.tobytes()) for a in arrays],
    )


def split(events: Sequence[Event], cuts: Iterable[int], sender: str = "a") -> list[Batch]:
    edges = sorted({0, len(events), *(c for c in cuts if c < len(events))})
    return [Batch(events=list(events[a:b]), sender=sender) for a, b in pairwise(edges)]


def run(batches: Iterable[Batch], windows: Windows) -> list[Window]:
    return [w for b in batches for w in windows.feed(b)] + windows.flush()


@settings(max_examples=60, deadline=None)
@given(streams, st.sets(st.integers(1, 39)), st.integers(1, 50), st.integers(1, 50))
def test_windows_hold_what_a_naive_reading_says(
    events: list[LlmCall], cuts: set[int], chunk: int, rows: int
) -> None:
    check(run(split(events, cuts), Windows(WIDE, chunk_calls=chunk, compact_rows=rows)), events)


@settings(max_examples=60, deadline=None)
@given(streams, st.sets(st.integers(1, 39)), st.integers(1, 50))
def test_how_events_are_cut_into_batches_and_chunks_changes_nothing(
    events: list[LlmCall], cuts: set[int], chunk: int
) -> None:
    events = sorted(events, key=lambda e: e.at)
    tenths = [replace_cost(e, 0.1 * i) for i, e in enumerate(events)]  # sums of these depend on their order
    whole = run(split(tenths, ()), Windows(WIDE))
    parts = run(split(tenths, cuts), Windows(WIDE, chunk_calls=chunk, compact_rows=chunk))
    assert signature(whole) == signature(parts)


def replace_cost(call: LlmCall, cost_usd: float) -> LlmCall:
    fields = {name: getattr(call, name) for name in call.__struct_fields__}
    return LlmCall(**(fields | {"cost_usd": cost_usd}))


@settings(max_examples=60, deadline=None)
@given(streams, st.data())
def test_partitions_merged_equal_one_stream(events: list[LlmCall], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    of = [data.draw(st.integers(0, n - 1)) for _ in events]
    starts: dict[float, list[Window]] = defaultdict(list)
    for k in range(n):
        mine = [e for e, p in zip(events, of, strict=True) if p == k]
        for w in run(split(mine, (7, 20)), Windows(WIDE)):
            starts[w.start].append(w)
    check([merge_windows(starts[start]) for start in sorted(starts)], events)


feeds = st.lists(
    st.tuples(st.lists(calls, min_size=1, max_size=6), st.sampled_from("ab"), st.none() | st.integers(1000, 1080), st.booleans()),
    max_size=14,
)  # fmt: skip
TIGHT = WindowSettings(lateness_s=1.0, max_delay_s=5.0, max_cells=12)


def shell(
    feeds: Sequence[tuple[list[LlmCall], str, int | None, bool]], restart_at: frozenset[int] = frozenset()
) -> list[Any]:
    """Feed and tick; at some points go on in a new stage that was restored from a snapshot."""
    w, out = Windows(TIGHT, chunk_calls=5, compact_rows=9), list[Window]()
    for i, (events, sender, received_at, tick) in enumerate(feeds):
        if i in restart_at:
            state = w.snapshot()
            w = Windows(TIGHT, chunk_calls=5, compact_rows=9)
            w.restore(state)
            assert w.snapshot() == state
        out += w.feed(
            Batch(events=[*events, AgentStep(at=events[0].at)], sender=sender, received_at=received_at)
        )
        if tick:
            out += w.tick(events[-1].at + 3.0)
    out += w.flush()
    return [signature(out), w.stats, w.watermark, w.newest]


@settings(deadline=None)
@given(feeds, st.frozensets(st.integers(0, 13)))
def test_a_restart_at_any_point_changes_nothing(
    body: list[tuple[list[LlmCall], str, int | None, bool]], restart_at: frozenset[int]
) -> None:
    assert shell(body, restart_at) == shell(body)


@settings(max_examples=60, deadline=None)
@given(feeds)
def test_every_call_is_in_one_window_or_counted_as_late_and_windows_come_in_order(
    body: list[tuple[list[LlmCall], str, int | None, bool]],
) -> None:
    w, out = Windows(TIGHT), list[Window]()
    for events, sender, received_at, tick in body:
        out += w.feed(Batch(events=events, sender=sender, received_at=received_at))
        assert all(x.end <= w.watermark for x in out)
        if tick:
            out += w.tick(events[-1].at + 3.0)
    out += w.flush()
    assert [x.start for x in out] == sorted({x.start for x in out})
    assert sum(int(x.cells.calls.sum()) for x in out) + w.stats.late == sum(
        len(events) for events, *_ in body
    )
    assert sum(w.stats.late_by_sender.values()) == w.stats.late


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_table_under_pressure_loses_no_call_and_restarts_exactly(seed: int) -> None:
    random = np.random.default_rng(seed)
    small = replace(TIGHT, max_cells=int(random.integers(2, 40)))

    def go(restart_every: int) -> list[Any]:
        draw = np.random.default_rng(seed)
        w, out = Windows(small, chunk_calls=16, compact_rows=64), list[Window]()
        for k in range(30):
            who = draw.zipf(1.4, 60) + k // 3
            out += w.feed(
                Batch(events=[LlmCall(at=1000.0 + 3 * k, provider="p", tenant=str(t)) for t in who])
            )
            if k % restart_every == 0:
                state = w.snapshot()
                w = Windows(small, chunk_calls=16, compact_rows=64)
                w.restore(state)
        out += w.flush()
        return [signature(out), w.stats]

    one = go(1000)
    assert one == go(int(random.integers(1, 6)))
    stats = one[1]
    assert stats.cells <= small.max_cells
    assert sum(np.frombuffer(w[4][0][3][2][1], np.int64).sum() for w in one[0]) == 30 * 60


# Few distinct low bits, so that many hashes want the same place.
hashes = st.builds(
    lambda high, low: high << 20 | low, st.integers(-(2**42), 2**42), st.sampled_from([0, 1, 4095])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(hashes, unique=True, max_size=80), st.lists(hashes, max_size=20), st.integers(0, 80))
def test_codes_are_found_by_their_hash_and_by_no_other(
    known: list[int], asked: list[int], at_once: int
) -> None:
    first = np.array(known[:at_once], np.int64)
    table = CodeOfHash(first, np.arange(len(first)))
    for code, key in list(enumerate(known))[at_once:]:
        table.put(key, code)
    expected = [known.index(key) if key in known else -1 for key in known + asked]
    assert table.find(np.array(known + asked, np.int64)).tolist() == expected
    assert len(table) == len(known)


def test_a_table_of_codes_grows_with_what_is_put_into_it() -> None:
    table = CodeOfHash()
    keys = np.arange(20_000, dtype=np.int64) * 7919
    for code, key in enumerate(keys.tolist()):
        table.put(key, code)
    assert table.find(keys).tolist() == list(range(20_000))
