"""Departures of a level (a mean of logarithms) from each series' own normal: what tokens, latency, spend and cache share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import Rollup, Window
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors._episodes import Episodes, Step
from flyball.detectors._state import (
    Bools,
    Column,
    Floats,
    Ints,
    Table,
    find_rollup,
    half_life_weight,
    log_mean_exp,
)  # fmt: skip

Singles = NDArray[np.float32]

_FIELDS: Final = (
    "windows", "mean", "between", "within", "lag", "mass", "last", "cov", "recent", "run_calls", "run_windows", "m0", "m1",
)  # fmt: skip
_AT: Final = {name: i for i, name in enumerate(_FIELDS)}
_PRIOR_WINDOWS: Final = 10.0
"""Weight of what is believed about the scatter between windows before any was seen."""
_PRIOR_CALLS: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelParams:
    """How a level is learned and judged. Levels are in ln units: 0.69 is a doubling.

    Args:
        shifts_log: the two shifts that evidence is gathered for; both > 0.
        effect_log: the recent level must be this far above normal, whatever the evidence.
        floor_sd_log: scatter between windows that is always allowed for, whatever was learned.
        min_calls: calls that an alarm must rest on, counted since the departure began.
        min_windows: windows that it must have lasted; 2 or more keeps one giant call or one odd batch from waking anyone.
        warmup_windows: windows with data before a series is judged.
        half_life_s: age at which what was learned counts half, in time with data.
        blend_calls: the recent level is smoothed over about so many calls.
        drift_nats: taken off the evidence in every window, so that small errors of the learned normal do not add up for hours.
        off_after, off_calls: quiet windows in a row, and calls in them, that end an episode.
        accept_after_s: an episode that lasts longer ends, and its level becomes the new normal.

    Raises: ConfigError for values out of range.
    """

    shifts_log: tuple[float, float] = (0.55, 1.2)
    effect_log: float = 0.336
    floor_sd_log: float = 0.13
    min_calls: int = 20
    min_windows: int = 2
    warmup_windows: int = 30
    half_life_s: float = 3_600.0
    blend_calls: float = 20.0
    drift_nats: float = 0.1
    off_after: int = 3
    off_calls: float = 10.0
    accept_after_s: float = 86_400.0

    def __post_init__(self) -> None:
        checks = {
            "shifts_log > 0": min(self.shifts_log) > 0,
            "effect_log > 0": self.effect_log > 0,
            "floor_sd_log > 0": self.floor_sd_log > 0,
            "min_calls >= 1": self.min_calls >= 1,
            "min_windows >= 1": self.min_windows >= 1,
            "warmup_windows >= 2": self.warmup_windows >= 2,
            "half_life_s > 0": self.half_life_s > 0,
            "blend_calls >= 0": self.blend_calls >= 0,
            "off_after >= 1": self.off_after >= 1,
            "accept_after_s > 0": self.accept_after_s > 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ConfigError(
                    f"{type(self).__name__} of {type(self).__module__.rpartition('.')[2]} needs {rule}"
                )


@dataclass(frozen=True, slots=True)
class Judged:
    """One window's judgement, by the rows handed to `Level.judge`; levels in ln units."""

    slots: Ints
    score: Floats
    mean: Floats
    """Normal level."""
    recent: Floats
    """How far above normal the level is now, smoothed over about `blend_calls` calls."""
    run_calls: Floats
    run_windows: Ints
    step: Step
    accepted: Ints
    """Rows whose episode ended because it lasted too long to be called abnormal; among neither `still` nor `off`."""


class Level:
    """State of one signal over one roll-up.

    Per series, x is the mean of ln(value) over the c calls of a window. Under the null it is normal around a slowly
    moving mean with variance within / c + between * (1 + r) / (1 - r) + that of the mean itself; r is the learned lag-1
    correlation of what scatters between windows. Evidence is a mixture of two e-CUSUMs for upward shifts; one window adds at most
    1.2 / `min_windows` of the threshold, so heavy tails cannot make an alarm of one window.

    Misleads when a series changes in steps by nature (a batch job each night): the first nights alarm, until `between` has
    learned them or they are accepted.
    """

    def __init__(self, by: tuple[str, ...], params: LevelParams) -> None:
        self.by = by
        self.params = params
        self.table = Table({"s": Column(width=len(_FIELDS)), "onset": Column("<f8")})
        self.episodes = Episodes(params.off_after, params.off_calls)

    def align(self, rollup: Rollup) -> Ints:
        """Returns the slots that came to mean new series."""
        fresh = self.table.align(rollup)
        self.episodes.grow(rollup.capacity)
        if len(fresh):
            self.episodes.forget(fresh)
        return fresh

    def warm(self, slots: Ints) -> Bools:
        return np.asarray(self.table["s"][slots, _AT["windows"]] >= self.params.warmup_windows)

    def suspect(self, slots: Ints) -> Bools:
        """In an episode, or with more evidence than one window in a hundred has by chance."""
        nats = self.table["s"][slots][:, [_AT["m0"], _AT["m1"]]].max(axis=1)
        return np.asarray((nats > 5.0) | self.episodes.active(slots))

    def mean(self, slots: Ints) -> Singles:
        return np.asarray(self.table["s"][slots, _AT["mean"]])

    def inherit(self, slot: int, donor: Level, donor_slot: int, extra_variance: float = 0.0) -> None:
        """A series that has just been born starts with the normal of another, believed less by `extra_variance`."""
        row = donor.table["s"][donor_slot].copy()
        for name in ("recent", "run_calls", "run_windows", "m0", "m1", "last"):
            row[_AT[name]] = 0.0
        known, trusted = min(float(row[_AT["windows"]]), self._memory), float(self.params.warmup_windows)
        # Sums over windows become what `warmup_windows` windows would have made of them.
        for name in ("between", "lag", "mass"):
            row[_AT[name]] *= trusted / max(known, 1.0)
        row[_AT["between"]] += extra_variance * (float(row[_AT["mass"]]) + _PRIOR_WINDOWS)
        row[_AT["windows"]] = trusted
        self.table["s"][slot] = row

    def judge(
        self,
        slots: Ints,
        x: Floats,
        calls: Floats,
        within: Floats | None,
        start: float,
        end: float,
        threshold: float,
        *,
        cov: Floats | None = None,
        elasticity: float = 0.0,
        may_alarm: Bools | None = None,
        extra_nats: Floats | None = None,
    ) -> Judged:
        """Scores, then learns, one window.

        Args:
            slots: int64[n], each at most once; all arrays have these rows, and every row has data.
            x: float64[n], mean of ln(value) per call.
            calls: float64[n], calls that x is the mean of; > 0.
            within: float64[n], variance of ln(value) among the window's calls; None where x is no mean of calls.
            start, end: of the window, seconds since the epoch.
            threshold: nats.
            cov, elasticity: x falls by `elasticity` * (cov - its own normal) before it is judged; NaN = not told.
            may_alarm: bool[n], rows that meet whatever else the detector asks for.
            extra_nats: float64[n], further evidence, independent of x.
        """
        params = self.params
        s = np.ascontiguousarray(self.table["s"][slots].T)
        windows, mean = s[_AT["windows"]], s[_AT["mean"]]
        x32, c = x.astype(np.float32), calls.astype(np.float32)
        warm = windows >= params.warmup_windows
        first = windows == 0
        mean[first] = x32[first]
        if cov is not None:
            x32 = x32 - np.float32(elasticity) * self._told(s, cov, first)
        variance, between = self._variance(s, c, within is not None)
        d = x32 - mean

        before0, before1 = s[_AT["m0"]].copy(), s[_AT["m1"]].copy()
        begins = (before0 <= 0) & (before1 <= 0)
        most = np.float32(1.2 * threshold / params.min_windows)
        extra = np.float32(0) if extra_nats is None else extra_nats.astype(np.float32)
        for name, shift in (("m0", params.shifts_log[0]), ("m1", params.shifts_log[1])):
            gain = (np.float32(shift) * d - np.float32(shift * shift / 2)) / variance + extra
            s[_AT[name]] += np.minimum(gain, most) - np.float32(params.drift_nats)
        score = log_mean_exp(np.stack([s[_AT["m0"]], s[_AT["m1"]]], axis=1).astype(np.float64))
        for name in ("m0", "m1"):
            s[_AT[name]] = np.where(warm, np.clip(s[_AT[name]], 0, np.float32(2 * threshold)), 0)

        blend = c / (c + np.float32(params.blend_calls))
        recent = s[_AT["recent"]]
        recent += blend * (d - recent)
        s[_AT["run_calls"]] = np.where(begins, 0, s[_AT["run_calls"]]) + c
        s[_AT["run_windows"]] = np.where(begins, 0, s[_AT["run_windows"]]) + 1
        onset = np.where(begins, start, self.table["onset"][slots])
        self.table["onset"][slots] = onset

        away = recent > params.effect_log / 2
        alarm = warm & (score >= threshold) & (recent >= params.effect_log) & (d >= params.effect_log / 2)
        alarm &= (s[_AT["run_calls"]] >= params.min_calls) & (s[_AT["run_windows"]] >= params.min_windows)
        if may_alarm is not None:
            alarm &= may_alarm
        step = self.episodes.step(slots, alarm, away, ~away, onset, calls)
        accepted = step.still[end - self.episodes.since[slots[step.still]] > params.accept_after_s]
        still = np.setdiff1d(step.still, accepted, assume_unique=True)
        judged = Judged(
            slots, score, mean.astype(np.float64), recent.astype(np.float64), s[_AT["run_calls"]].astype(np.float64),
            s[_AT["run_windows"]].astype(np.int64), Step(step.on, still, step.off), accepted,
        )  # fmt: skip

        weight = np.where(warm & ((score > 0.4 * threshold) | (recent >= params.effect_log)), 0.1, 1.0)
        weight[self.episodes.active(slots)] = 0.0
        self._learn(s, d, c, within, between, variance, weight.astype(np.float32), end - start)
        if cov is not None:
            gain = self._gain(windows, end - start) * weight.astype(np.float32)
            s[_AT["cov"]] += np.where(np.isfinite(cov), gain * (cov.astype(np.float32) - s[_AT["cov"]]), 0)
        self._restart(s, np.concatenate([step.off, accepted]), accepted, judged.mean + judged.recent)
        self.table["s"][slots] = s.T
        return judged

    def close(self, judged: Judged) -> None:
        """To be called once the anomalies of `judged` are made, which still need `since`."""
        ended = judged.slots[np.concatenate([judged.step.off, judged.accepted])]
        if len(ended):
            self.episodes.close(ended)

    def since(self, slot: int) -> float:
        return float(self.episodes.since[slot])

    def _told(self, s: Singles, cov: Floats, first: Bools) -> Singles:
        """How far the covariate is from its own normal, which follows it at the pace of the mean; 0 where it was not told."""
        normal, c = s[_AT["cov"]], cov.astype(np.float32)
        told = np.isfinite(c)
        unknown = told & (first | (normal == 0))
        normal[unknown] = c[unknown]
        return np.where(told, c - normal, np.float32(0))

    def _variance(self, s: Singles, c: Singles, is_mean: bool) -> tuple[Singles, Singles]:
        """Of x under the null; and the part of it that is scatter between windows."""
        params = self.params
        floor = np.float32(params.floor_sd_log**2)
        known = np.minimum(s[_AT["windows"]], self._memory)
        mass = s[_AT["mass"]] + np.float32(_PRIOR_WINDOWS)
        between = np.maximum((s[_AT["between"]] + floor * np.float32(_PRIOR_WINDOWS)) / mass, floor)
        within = (
            (s[_AT["within"]] * known + _PRIOR_CALLS) / (known + _PRIOR_CALLS) / c
            if is_mean
            else np.float32(0)
        )
        # The scatter of few calls is independent from window to window; what lasts belongs to `between` alone.
        r = np.clip(s[_AT["lag"]] / mass / between, 0, np.float32(0.85))
        lasting = between * (1 + r) / (1 - r)
        return within + lasting + (within + lasting) / (known + 1), between

    _memory: float = 360.0
    """Windows that a learned scatter rests on at most: 360 windows of 10 s are the default half-life."""

    def _gain(self, windows: Singles, window_s: float) -> Singles:
        """The plain mean at first, exponential forgetting later."""
        slow = np.float32(1 - half_life_weight(window_s, self.params.half_life_s))
        return np.maximum(slow, 1 / (windows + 1))

    def _learn(
        self,
        s: Singles,
        d: Singles,
        c: Singles,
        within: Floats | None,
        between: Singles,
        variance: Singles,
        weight: Singles,
        window_s: float,
    ) -> None:
        windows = s[_AT["windows"]]
        gain = self._gain(windows, window_s) * weight
        # Held at four standard deviations: one monster moves the mean like a large window, not like a monster.
        far = 4 * np.sqrt(variance)
        held = np.clip(d, -far, far)
        s[_AT["mean"]] += gain * held
        noise = np.zeros_like(d)
        if within is not None:
            told = c >= 2
            s[_AT["within"]] += np.where(told, gain, 0) * (within.astype(np.float32) - s[_AT["within"]])
            noise = s[_AT["within"]] / c
        # Suspect windows that became no episode teach the scatter in full: without them it would be that of calm hours only. Windows
        # of few calls say little about it.
        worth = np.where(weight > 0, between / (between + noise), 0)
        fade = np.where(weight > 0, np.float32(1 - 1 / self._memory), 1)
        s[_AT["between"]] = s[_AT["between"]] * fade + worth * (held * held - noise)
        s[_AT["lag"]] = s[_AT["lag"]] * fade + worth * held * s[_AT["last"]]
        s[_AT["mass"]] = s[_AT["mass"]] * fade + worth
        s[_AT["last"]] = np.where(weight > 0, held, s[_AT["last"]])
        windows += (weight > 0).astype(np.float32)

    def _restart(self, s: Singles, ended: Ints, accepted: Ints, level: Floats) -> None:
        for name in ("m0", "m1", "run_calls", "run_windows", "recent"):
            s[_AT[name]][ended] = 0.0
        s[_AT["mean"]][accepted] = level[accepted]
        s[_AT["windows"]][accepted] = np.float32(self.params.warmup_windows)

    def pack(self) -> dict[str, Any]:
        return {"by": list(self.by), "table": self.table.pack(), "episodes": self.episodes.pack()}

    def load(self, state: dict[str, Any]) -> None:
        self.table.load(state["table"])
        self.episodes.load(state["episodes"])
        self.episodes.grow(len(self.table.born))


def mean_and_variance(rollup: Rollup, name: str, rows: Ints) -> tuple[Floats, Floats, Floats]:
    """Calls, mean of ln(x) and variance of ln(x) among the calls of each row; rows must have counts[name] > 0."""
    n = rollup.counts[name][rows].astype(np.float64)
    mean = rollup.sums[f"log_{name}"][rows] / n
    return n, mean, variance_of(n, mean, rollup.sums[f"log2_{name}"][rows])


def variance_of(n: Floats, mean: Floats, squares: Floats) -> Floats:
    """Unbiased variance from a count, a mean and a sum of squares; 0 where n < 2."""
    return np.maximum(squares - n * mean**2, 0.0) / np.maximum(n - 1, 1.0)


Evidence = dict[str, float | int | str | list[str]]


@dataclass(frozen=True, slots=True)
class Watch:
    """One signal over one roll-up."""

    signal: str
    by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a window says about a watch; see `Level.judge`. `rows` are indices into the roll-up."""

    rows: Ints
    x: Floats
    calls: Floats
    within: Floats | None = None
    cov: Floats | None = None
    elasticity: float = 0.0
    may_alarm: Bools | None = None
    extra_nats: Floats | None = None


class LevelDetector:
    """The frame of a detector made of levels: subclasses say what they watch, read it from a roll-up, and add their facts."""

    kind: ClassVar[str]
    reads: ClassVar[Literal["windows"]] = "windows"
    klass: ClassVar[str]
    unit: ClassVar[str]
    version: ClassVar[int] = 1

    def __init__(self, watches: Sequence[Watch], params: LevelParams, budget: PageBudget | None) -> None:
        self.budget = budget if budget is not None else PageBudget()
        self.levels: dict[Watch, Level] = {watch: Level(watch.by, params) for watch in watches}

    # --- what subclasses say ------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, watch: Watch, rollup: Rollup, window: Window) -> Reading | None: ...

    @abstractmethod
    def facts(self, watch: Watch, rollup: Rollup, row: int, window: Window, phase: Phase) -> Evidence: ...

    def born(self, watch: Watch, rollup: Rollup, slots: Ints, window: Window) -> None:
        """Slots that came to mean new series; before anything is judged."""

    def learned(self, window: Window) -> None:
        """After all watches of a window were judged."""

    def period_s(self, window: Window) -> float:
        """How often a series is judged."""
        return window.end - window.start

    def observed(self, level_log: float) -> float:
        return float(np.exp(min(level_log, 700.0)))

    def impact(self, watch: Watch, above_log: float) -> float:
        """Share of the whole that is in excess."""
        return float(1 - np.exp(-max(above_log, 0.0)))

    # --- the stage ----------------------------------------------------------------------------------------------

    def feed(self, batch: Sequence[Window]) -> list[Anomaly]:
        out: list[Anomaly] = []
        for window in batch:
            present = []
            for watch, level in self.levels.items():
                rollup = find_rollup(window, watch.by)
                if rollup is not None and len(rollup):
                    fresh = level.align(rollup)
                    if len(fresh):
                        self.born(watch, rollup, fresh, window)
                    present.append((watch, level, rollup))
            self._register()
            threshold = self.budget.nats(self.period_s(window))
            for watch, level, rollup in present:
                reading = self.read(watch, rollup, window)
                if reading is not None and len(reading.rows):
                    self._judge(watch, level, rollup, window, reading, threshold, out)
            self.learned(window)
        return out

    def tick(self, now: float) -> list[Anomaly]:
        return []

    def _register(self) -> None:
        self.budget.register(self.kind, sum(level.table.seen for level in self.levels.values()))

    def _judge(
        self,
        watch: Watch,
        level: Level,
        rollup: Rollup,
        window: Window,
        reading: Reading,
        threshold: float,
        out: list[Anomaly],
    ) -> None:
        j = level.judge(
            rollup.ids[reading.rows], reading.x, reading.calls, reading.within, window.end - self.period_s(window),
            window.end, threshold, cov=reading.cov, elasticity=reading.elasticity, may_alarm=reading.may_alarm,
            extra_nats=reading.extra_nats,
        )  # fmt: skip
        phases: tuple[tuple[Phase, Ints, bool], ...] = (
            ("on", j.step.on, False), ("still", j.step.still, False), ("off", j.step.off, False), ("off", j.accepted, True),
        )  # fmt: skip
        for phase, which, accepted in phases:
            for i in which.tolist():
                row = int(reading.rows[i])
                labels = rollup.row_labels(row)
                since = level.since(int(j.slots[i]))
                mean, recent = float(j.mean[i]), float(j.recent[i])
                evidence: Evidence = {
                    "multiple": round(float(np.exp(recent)), 4),
                    "windows": int(j.run_windows[i]),
                }
                evidence |= self.facts(watch, rollup, row, window, phase)
                if accepted:
                    evidence["accepted_as_normal"] = 1
                found = Anomaly(
                    id=anomaly_id(self.kind, watch.signal, self.klass, labels, since), detector=self.kind,
                    signal=watch.signal, klass=self.klass, labels=labels, at=window.end, since=since, phase=phase,
                    observed=self.observed(mean + recent), expected=self.observed(mean), unit=self.unit,
                    score=round(float(j.score[i]), 6), threshold=threshold, n=int(j.run_calls[i]),
                    impact=0.0 if phase == "off" else self.impact(watch, recent), evidence=evidence,
                )  # fmt: skip
                out.append(found)
        level.close(j)

    # --- state --------------------------------------------------------------------------------------------------

    def pack_more(self) -> Any:
        """State beyond the levels."""
        return None

    def load_more(self, state: Any) -> None: ...

    def snapshot(self) -> bytes:
        levels = [{"signal": watch.signal, **level.pack()} for watch, level in self.levels.items()]
        return pack_state(self.kind, self.version, {"levels": levels, "more": self.pack_more()})

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another detector or version, or damaged."""
        found = unpack_state(state, self.kind, self.version)
        saved = {(s["signal"], tuple(s["by"])): s for s in found["levels"]}
        for watch, level in self.levels.items():
            level.load(saved[watch.signal, watch.by])
        self.load_more(found["more"])
        self._register()
