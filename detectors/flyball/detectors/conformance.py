"""What every detector must keep to, as checks with names. Shipped, so that detectors of third parties can be tried too.

    from flyball.detectors.conformance import check_detector
    import pytest

    @pytest.mark.parametrize("check", check_detector(MyDetector), ids=str)
    def test_my_detector(check):
        check()

`check()` returns nothing when the rule holds and raises `Nonconformity` with what was seen when it does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from flyball.core.anomaly import Anomaly
from flyball.core.columns import BASE_LABELS, Rollup, Window
from flyball.core.errors import FlyballError
from flyball.core.events import AgentStep, Event, GpuSample, LlmCall
from flyball.detectors import _traffic as traffic

KNOWN_LABELS: Final = frozenset(
    {*BASE_LABELS, "run", "tool", "gpu", "node", "pod", "namespace", "hardware", "key", "sender"}
)
KNOWN_SIGNALS: Final = frozenset({
    "llm.errors", "llm.input_tokens", "llm.output_tokens", "llm.latency", "llm.ttft", "llm.cost", "llm.cache", "llm.calls", "llm.retries",
    "agent.loop", "agent.spend", "agent.context", "agent.fan_out", "gpu.fault", "gpu.throttle", "serving.queue",
    "serving.kv_cache", "serving.preemptions", "serving.ttft", "stream.silent", "stream.poison",
})  # fmt: skip
SNAPSHOT_BYTES_PER_SERIES: Final = 20_000

Make = Callable[[], Any]
Items = Sequence[Any]


class Nonconformity(FlyballError, AssertionError):
    """A detector broke a rule; the text says which and what was seen."""


@dataclass(frozen=True, slots=True)
class Check:
    """One rule, to be called; `str()` is its name."""

    name: str
    rule: str
    """The rule in one sentence."""
    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return self.name


def check_detector(
    make: Make, *, trouble: Items | None = None, quiet: Items | None = None
) -> Iterator[Check]:
    """The checks for one detector, cheap ones first.

    Args:
        make: makes a fresh one: the class, or a function where its defaults watch something else than the suite's traffic
            (labels `app`, `provider`, …; see `_traffic`).
        trouble: input in order with something that the detector must tell and that ends; the suite's own when None.
        quiet: input in order without anything to tell; the suite's own when None.
    """
    inputs = _Inputs(make, trouble, quiet)
    for rule in _RULES:
        text = (rule.__doc__ or "").strip()
        yield Check(rule.__name__.lstrip("_"), text, lambda rule=rule: rule(make, inputs))  # type: ignore[misc]


class _Inputs:
    """The suite's traffic of the type that the detector reads; made once."""

    def __init__(self, make: Make, trouble: Items | None, quiet: Items | None) -> None:
        self.windows = make().reads == "windows"
        self._trouble, self._quiet = trouble, quiet

    @property
    def trouble(self) -> Items:
        if self._trouble is None:
            self._trouble = _cached("trouble", self.windows)
        return self._trouble

    @property
    def quiet(self) -> Items:
        if self._quiet is None:
            self._quiet = _cached("quiet", self.windows)
        return self._quiet


_CACHE: dict[tuple[str, bool], Items] = {}


def _cached(which: str, windows: bool) -> Items:
    """The suite's traffic, made when first asked for: several detectors are tried on the same."""
    key = (which, windows)
    if key not in _CACHE:
        _CACHE[key] = (_WINDOWS if windows else _EVENTS)[which]()
    return _CACHE[key]


def _constant_windows() -> Items:
    made = traffic.Windows()
    return [made.next(traffic.quiet_cells(0, noisy=False)) for _ in range(_QUIET_WINDOWS)]


def _new_windows() -> Items:
    made = traffic.Windows()
    return [made.next(traffic.quiet_cells(i, tokens=4.0)) for i in range(60)]


def _new_events() -> Items:
    runs = [
        traffic.agent_run(f"run-{r}", traffic.START + 50.0 * r, 10, inflate=8.0, usd=0.2) for r in range(3)
    ]
    return sorted((e for run in runs for e in run), key=_at)


def _patchy_windows() -> Items:
    """One application after the other is away for seven windows; now and then there is nothing at all."""
    made = traffic.Windows()
    out: list[Window] = []
    for i in range(_QUIET_WINDOWS):
        out.append(made.next([c for c in traffic.quiet_cells(i) if c.labels["app"] != f"app{(i // 7) % 3}"]))
        if i % 50 == 49:
            out.append(made.next([]))
    return out


def _patchy_events() -> Items:
    names = ("run-2", "run-5", "GPU-0000-0001")
    return [
        e
        for e in traffic.quiet_events()
        if getattr(e, "run", "") not in names and getattr(e, "gpu", "") not in names
    ]


def _recycled_windows() -> Items:
    """Quiet, trouble, and then other series with another normal in the same slots."""
    made = traffic.Windows()
    out = [made.next(traffic.quiet_cells(i) if i < 220 else traffic.troubled_cells(i)) for i in range(250)]
    made.recycle()
    return out + [made.next(traffic.quiet_cells(i, suffix="-new", tokens=5.0)) for i in range(250, 270)]


_QUIET_WINDOWS: Final = 260
_WINDOWS: Final[Mapping[str, Callable[[], Items]]] = {
    "trouble": traffic.windows, "long trouble": lambda: traffic.windows(window_s=600.0), "quiet": lambda: traffic.windows(_QUIET_WINDOWS, 0, 0), "constant": _constant_windows,
    "new": _new_windows, "patchy": _patchy_windows, "recycled": _recycled_windows,
}  # fmt: skip
_EVENTS: Final[Mapping[str, Callable[[], Items]]] = {
    "trouble": traffic.events, "quiet": traffic.quiet_events, "constant": traffic.constant_events, "new": _new_events,
    "patchy": _patchy_events,
}  # fmt: skip


# --- how a detector is driven -------------------------------------------------------------------------------------------


def _at(item: Any) -> float:
    return float(item.end if isinstance(item, Window) else item.at)


def _batches(items: Items, size: int) -> Iterator[Items]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def _drive(detector: Any, items: Items, size: int) -> list[Anomaly]:
    """Feeds batches, ticks after each with the newest time seen."""
    out: list[Anomaly] = []
    newest = 0.0
    for batch in _batches(items, size):
        out += detector.feed(batch)
        newest = max(newest, *(_at(item) for item in batch))
        out += detector.tick(newest)
    return out


def _size(inputs: _Inputs) -> int:
    return 1 if inputs.windows else 16


def _encoded(anomalies: Sequence[Anomaly]) -> list[bytes]:
    return [msgspec.json.encode(a) for a in anomalies]


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise Nonconformity(what)


# --- the rules ----------------------------------------------------------------------------------------------------------


def _names_itself(make: Make, inputs: _Inputs) -> None:
    """`kind` is a word, `reads` is windows or events, and an event detector says which types it wants."""
    d = make()
    _need(isinstance(d.kind, str) and d.kind.isidentifier(), f"kind {d.kind!r} is no identifier")
    _need(d.reads in ("windows", "events"), f"reads {d.reads!r}; must be 'windows' or 'events'")
    if d.reads == "events":
        _need(isinstance(d.types, tuple) and len(d.types) > 0, f"types {d.types!r}; must name event types")
    params = getattr(d, "params", None)
    if dataclasses.is_dataclass(params):
        _need(bool(getattr(type(params), "__dataclass_params__").frozen), "params are not frozen")  # noqa: B009


def _silent_on_empty_input(make: Make, inputs: _Inputs) -> None:
    """Nothing in, nothing out; time alone makes no anomaly."""
    d = make()
    _need(list(d.feed([])) == [], "feed([]) said something")
    _need(list(d.tick(traffic.START)) == [], "tick said something before the first event")


def _speaks_in_trouble(make: Make, inputs: _Inputs) -> None:
    """The trouble it is for is told, and told to be over."""
    said = _drive(make(), inputs.trouble, _size(inputs))
    if inputs.windows and not said:
        said = _drive(make(), _cached("long trouble", True), 1)  # some think in quarters of an hour
    _need(any(a.phase == "on" for a in said), "no anomaly in trouble")
    ended = {a.id for a in said if a.phase == "off"}
    _need(bool(ended), "nothing was told to be over, though it was")


def _deterministic(make: Make, inputs: _Inputs) -> None:
    """The same input gives the same anomalies, byte for byte."""
    first, second = (_encoded(_drive(make(), inputs.trouble, _size(inputs))) for _ in range(2))
    _need(first == second, f"two runs differ: {_difference(first, second)}")


def _batches_do_not_matter(make: Make, inputs: _Inputs) -> None:
    """Where a batch ends changes nothing."""
    one, many = make(), make()
    ones = [a for item in inputs.trouble for a in one.feed([item])]
    manys = [a for batch in _batches(inputs.trouble, 37) for a in many.feed(batch)]
    _need(
        _encoded(ones) == _encoded(manys),
        f"batches of 1 and 37 differ: {_difference(_encoded(ones), _encoded(manys))}",
    )


def _snapshot_and_restore_change_nothing(make: Make, inputs: _Inputs) -> None:
    """A detector restored from a snapshot, taken at any point, goes on as the one that was never stopped."""
    size = _size(inputs)
    items = inputs.trouble
    whole = make()
    cuts = sorted({size * (len(items) * k // 5 // size) for k in range(1, 5)} | {size})
    copies: list[tuple[Any, list[Anomaly]]] = []
    said: list[Anomaly] = []
    ends: list[int] = []
    done, newest = 0, 0.0
    for batch in _batches(items, size):
        newest = max(newest, *(_at(item) for item in batch))
        for d, into in [(whole, said), *copies]:
            into += d.feed(batch)
            into += d.tick(newest)
        done += len(batch)
        if done in cuts:
            copy = make()
            copy.restore(whole.snapshot())
            copies.append((copy, []))
            ends.append(len(said))
    for cut, end, (_, into) in zip(cuts, ends, copies, strict=False):
        a, b = _encoded(said[end:]), _encoded(into)
        _need(a == b, f"restored after {cut} items it differs: {_difference(a, b)}")


def _foreign_snapshots_are_refused(make: Make, inputs: _Inputs) -> None:
    """Bytes that are no snapshot of this detector are refused with an error of ours."""
    d = make()
    for data in (b"", b"\x00" * 20, msgspec.msgpack.encode(("flyball", "another", 1, None))):
        try:
            d.restore(data)
        except FlyballError:
            continue
        raise Nonconformity(f"restore took {data[:12]!r}")


def _inputs_are_not_changed(make: Make, inputs: _Inputs) -> None:
    """What is fed is only read."""
    items = inputs.trouble[-120:] if inputs.windows else inputs.trouble
    if inputs.windows:
        items = [_frozen(w) for w in items]
        before = [_bytes_of(w) for w in items]
        try:
            _drive(make(), items, 1)
        except ValueError as e:
            raise Nonconformity(f"it writes into arrays of the window: {e}") from e
        _need(before == [_bytes_of(w) for w in items], "a window's arrays changed")
        return
    encoded = [msgspec.msgpack.encode(e) for e in items]
    _drive(make(), items, 16)
    _need(encoded == [msgspec.msgpack.encode(e) for e in items], "an event changed")


def _phases_follow_each_other(make: Make, inputs: _Inputs) -> None:
    """`on`, then any number of `still`, then `off`; never `off` before `on`, never `on` twice."""
    open_: dict[str, Anomaly] = {}
    closed: dict[str, None] = {}
    for a in _drive(make(), inputs.trouble, _size(inputs)):
        if a.phase == "on":
            _need(a.id not in open_ and a.id not in closed, f"{a.id} is on twice")
            open_[a.id] = a
        else:
            _need(a.id in open_, f"{a.id} is {a.phase} without being on")
            _need(a.at >= open_[a.id].at, f"{a.id}: time goes backwards")
        if a.phase == "off":
            closed[a.id] = None
            del open_[a.id]


def _ids_are_stable_within_an_episode(make: Make, inputs: _Inputs) -> None:
    """All statements of an episode share id, signal, since and the labels that name the series."""
    first: dict[str, Anomaly] = {}
    for a in _drive(make(), inputs.trouble, _size(inputs)):
        on = first.setdefault(a.id, a)
        same = (a.signal, a.since, a.detector) == (on.signal, on.since, on.detector)
        _need(same, f"{a.id}: {a.phase} differs from on in signal, since or detector")


def _evidence_is_given(make: Make, inputs: _Inputs) -> None:
    """Every anomaly carries evidence, known labels and signal, finite figures, and times in order."""
    kind = make().kind
    for a in _drive(make(), inputs.trouble, _size(inputs)):
        _well_formed(a, kind)


def _well_formed(a: Anomaly, kind: str) -> None:
    _need(a.detector == kind, f"{a.id}: detector is {a.detector!r}, not {kind!r}")
    _need(bool(a.evidence), f"{a.id} ({a.signal}, {a.phase}): no evidence")
    _need(bool(a.labels), f"{a.id} ({a.signal}): no labels")
    unknown = sorted(set(a.labels) - KNOWN_LABELS)
    _need(not unknown, f"{a.id}: unknown labels {unknown}")
    _need(all(a.labels.values()), f"{a.id}: an empty label; leave it out: {a.labels}")
    _need(a.signal in KNOWN_SIGNALS, f"{a.id}: unknown signal {a.signal!r}")
    _need(a.since <= a.at, f"{a.id}: since {a.since} is after at {a.at}")
    _need(0.0 <= a.impact <= 1.0, f"{a.id}: impact {a.impact} is outside [0, 1]")
    figures = {"observed": a.observed, "expected": a.expected, "score": a.score, "threshold": a.threshold}
    figures |= {k: v for k, v in a.evidence.items() if isinstance(v, float)}
    for name, value in figures.items():
        _need(math.isfinite(value), f"{a.id}: {name} is {value}")
    if a.phase == "on":
        _need(a.score >= a.threshold, f"{a.id}: on with score {a.score} below threshold {a.threshold}")


def _quiet_on_quiet_data(make: Make, inputs: _Inputs) -> None:
    """An hour of ordinary traffic makes no anomaly."""
    said = _drive(make(), inputs.quiet, _size(inputs))
    _need(not said, f"said {len(said)} things on quiet data, first {_short(said)}")


def _quiet_on_constant_data(make: Make, inputs: _Inputs) -> None:
    """Data that never change make no anomaly, whatever their level; what was so before the start is no event."""
    said = _drive(make(), _cached("constant", inputs.windows), _size(inputs))
    _need(not said, f"said {len(said)} things on constant data, first {_short(said)}")


def _warm_up_is_respected(make: Make, inputs: _Inputs) -> None:
    """A level that nobody has seen otherwise is no departure: from the start four times the tokens is this estate's normal."""
    said = _drive(make(), _cached("new", inputs.windows), _size(inputs))
    _need(not said, f"said {_short(said)} before it could know what is normal")


def _survives_odd_values(make: Make, inputs: _Inputs) -> None:
    """NaN, infinities, columns that nobody reported and missing histograms make no crash and no figure that is not finite."""
    d = make()
    items = (
        [_odd(w, i) for i, w in enumerate(inputs.trouble)] if inputs.windows else _odd_events(inputs.trouble)
    )
    with np.errstate(all="ignore"):
        for a in _drive(d, items, _size(inputs)):
            _well_formed(a, d.kind)
    copy = make()
    copy.restore(d.snapshot())


def _survives_series_that_come_and_go(make: Make, inputs: _Inputs) -> None:
    """Series may appear, vanish and come back; absence is no departure and no recovery."""
    said = _drive(make(), _cached("patchy", inputs.windows), _size(inputs))
    _need(not said, f"said {_short(said)} about series that only come and go")


def _slots_may_change_hands(make: Make, inputs: _Inputs) -> None:
    """A slot that means another series from some window on (`born`) brings nothing of the old one with it."""
    if not inputs.windows:
        return
    said = _drive(make(), _cached("recycled", True), 1)
    new = [a for a in said if a.phase == "on" and any(v.endswith("-new") for v in a.labels.values())]
    _need(not new, f"a new series is judged by the old one's normal: {_short(new)}")
    mixed = [a for a in said if a.phase != "on" and any(v.endswith("-new") for v in a.labels.values())]
    _need(not mixed, f"the old series' episode goes on under the new one's labels: {_short(mixed)}")


def _memory_is_bounded(make: Make, inputs: _Inputs) -> None:
    """State does not grow with series that are gone, and is small per series."""
    d = make()
    sizes: list[int] = []
    if inputs.windows:
        made = traffic.Windows()
        for round_ in range(6):
            for i in range(4):
                _drive(d, [made.next(traffic.quiet_cells(i, suffix=f"-{round_}"))], 1)
            sizes.append(len(d.snapshot()))
            made.recycle()
        _need(sizes[-1] <= 1.5 * sizes[1] + 4096, f"snapshots grow with recycled slots: {sizes} bytes")
        return
    limited = _limited(d)
    if limited is not None:
        d = limited
    at = traffic.START
    for round_ in range(6):
        items: list[Event] = []
        for r in range(100):
            items += traffic.agent_run(f"run-{round_}-{r}", at + r, 2, app=f"app-{round_}-{r}")
            items.append(
                GpuSample(
                    at=at + r, node=f"n{round_}-{r}", gpu=f"GPU-{round_:06d}-{r:06d}", values={"xid": 0.0}
                )
            )
            items.append(
                GpuSample(
                    at=at + r,
                    deployment=f"d{round_}-{r}",
                    values={"requests_waiting": 0.0, "requests_running": 1.0},
                )
            )
        _drive(d, sorted(items, key=_at), 16)
        sizes.append(len(d.snapshot()))
        at += 7200.0
    per_series = sizes[0] / 100
    _need(per_series <= SNAPSHOT_BYTES_PER_SERIES, f"{per_series:.0f} bytes a series in a snapshot")
    if limited is not None:
        _need(sizes[-1] <= 1.5 * sizes[1] + 4096, f"snapshots grow past the limits of params: {sizes} bytes")


_RULES: Final[tuple[Callable[[Make, _Inputs], None], ...]] = (
    _names_itself, _silent_on_empty_input, _foreign_snapshots_are_refused, _speaks_in_trouble, _deterministic,
    _batches_do_not_matter, _snapshot_and_restore_change_nothing, _inputs_are_not_changed, _phases_follow_each_other,
    _ids_are_stable_within_an_episode, _evidence_is_given, _quiet_on_quiet_data, _quiet_on_constant_data,
    _warm_up_is_respected, _survives_odd_values, _survives_series_that_come_and_go, _slots_may_change_hands, _memory_is_bounded,
)  # fmt: skip


# --- odd input ----------------------------------------------------------------------------------------------------------


def _limited(detector: Any) -> Any:
    """The same detector with every `max_…` setting at 50, if it has such settings."""
    params = getattr(detector, "params", None)
    if params is None or not dataclasses.is_dataclass(params) or isinstance(params, type):
        return None
    limits = {
        f.name: 50
        for f in dataclasses.fields(params)
        if f.name.startswith("max_") and isinstance(getattr(params, f.name), int)
    }
    return type(detector)(dataclasses.replace(params, **limits)) if limits else None


def _odd(window: Window, i: int) -> Window:
    """Every third window has NaN or infinite sums, every fifth columns that nobody reported, every seventh no roll-up at all."""

    def spoil(r: Rollup) -> Rollup:
        if i % 3 == 0 and len(r):
            bad = math.nan if i % 2 else math.inf
            sums = {k: np.where(np.arange(len(r)) == i % len(r), bad, v) for k, v in r.sums.items()}
            r = dataclasses.replace(r, sums=sums)
        if i % 5 == 0:
            zero = np.zeros(len(r), np.int64)
            r = dataclasses.replace(
                r,
                sums={k: np.zeros(len(r)) for k in r.sums},
                counts=dict.fromkeys(r.counts, zero),
                histograms={},
            )
        return r

    rollups = {} if i % 7 == 0 else {by: spoil(r) for by, r in window.rollups.items()}
    return dataclasses.replace(window, cells=spoil(window.cells), rollups=rollups)


def _odd_events(items: Items) -> list[Event]:
    out: list[Event] = []
    for i, event in enumerate(items):
        out.append(event)
        at = event.at
        if i % 10 == 0:
            out += [
                AgentStep(at=at),
                AgentStep(at=at, run="odd"),
                AgentStep(at=at - 500.0, run="odd", tool="x", args_hash="a"),
            ]
            out += [LlmCall(at=at), LlmCall(at=at, run="odd", agent="a", input_tokens=0, cost_usd=0.0)]
            values = {
                "xid": math.nan,
                "kv_cache_ratio": math.inf,
                "ecc_dbe_total": 9.3e18,
                "ttft_s_sum": -1.0,
                "requests_waiting": math.nan,
            }
            out += [
                GpuSample(at=at, gpu="GPU-odd-0001", values=values),
                GpuSample(at=at, deployment="odd", values=values),
            ]
            out += [
                GpuSample(at=at),
                GpuSample(at=at, gpu="GPU-odd-0001"),
                GpuSample(at=at - 500.0, gpu="GPU-odd-0001", values={"xid": 79.0}),
            ]
    return out


def _frozen(window: Window) -> Window:
    """A copy whose arrays refuse to be written to."""

    def lock(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            copy = value.copy()
            copy.flags.writeable = False
            return copy
        if isinstance(value, Mapping):
            return {k: lock(v) for k, v in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{f.name: lock(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        return value

    locked: Window = lock(window)
    return locked


def _bytes_of(window: Window) -> list[bytes]:
    arrays: list[bytes] = []
    for rollup in (window.cells, *window.rollups.values()):
        arrays += [
            rollup.ids.tobytes(),
            rollup.calls.tobytes(),
            rollup.by_class.tobytes(),
            rollup.born.tobytes(),
        ]
        arrays += [v.tobytes() for v in (*rollup.sums.values(), *rollup.counts.values())]
    return arrays


def _difference(a: Sequence[bytes], b: Sequence[bytes]) -> str:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return f"at {i}: {x.decode()[:400]} and {y.decode()[:400]}"
    return f"{len(a)} and {len(b)} anomalies"


def _short(said: Sequence[Anomaly]) -> str:
    if not said:
        return "nothing"
    a = said[0]
    return f"{a.signal} {a.phase} for {a.labels} at {a.at:.0f}: observed {a.observed:.4g}, expected {a.expected:.4g}, {a.evidence}"


__all__ = ["KNOWN_LABELS", "KNOWN_SIGNALS", "Check", "Nonconformity", "check_detector"]
