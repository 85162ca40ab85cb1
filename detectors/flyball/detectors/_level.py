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
)  # fmt: skip

Singles = NDArray[np.float32]

_FIELDS: Final = (
    "windows", "mean", "between", "within", "lag", "mass", "last", "cov", "recent", "run_calls", "run_windows", "m0", "m1",
    "later_between", "later_lag", "later_mass", "run_above",
)  # fmt: skip
_AT: Final = {name: i for i, name in enumerate(_FIELDS)}
_OF_A_RUN: Final = np.array([_AT[n] for n in ("m0", "m1", "run_calls", "run_windows", "run_above", "recent")])
"""Fields that hold what a departure has gathered so far."""
_PRIOR_WINDOWS: Final = 20.0
"""Weight of what is believed about the scatter between windows before any was seen."""
_PRIOR_WITHIN: Final = 2.0
"""Weight, in windows, of what is believed about the variance among the calls of a window (1.0) before any was seen."""
_FRESH_WINDOWS: Final = 6
"""Windows up to which a departure has just begun."""
_MEMORY: Final = np.float32(360.0)
"""Windows that a learned scatter rests on at most: 360 windows of 10 s are the default half-life."""


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
        young_effect_times: levels wander over tens of minutes, which what was learned in a few cannot tell: until a series was
            learned from 360 windows, a departure must be farther above normal, at first so many times `effect_log`.
        patience_windows: windows of a departure until they count as scatter of the series after all. Earlier they do not: what
            lasts would pass for scatter that lasts, and hide itself.
        calm_halves: a window less than half the effect above normal halves what was gathered (less evidence than allowed is
            always sound): for volumes, where rare bursts would otherwise add up over hours.
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
    young_effect_times: float = 1.0
    patience_windows: int = 60
    calm_halves: bool = False
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
            "patience_windows >= 1": self.patience_windows >= 1,
            "young_effect_times >= 1": self.young_effect_times >= 1,
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
    """One window's judgement, by the rows of its reading; levels in ln units."""

    slots: Ints
    score: Floats
    mean: Floats
    """Normal level."""
    recent: Floats
    """How far above normal the level is now, smoothed over about `blend_calls` calls; where an episode opens, since it began."""
    since: Floats
    """How far above normal it was on average since the departure began."""
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
        s = self.table["s"]
        nats = np.maximum(s[slots, _AT["m0"]], s[slots, _AT["m1"]])
        return np.asarray((nats > 5.0) | self.episodes.active(slots))

    def mean(self, slots: Ints) -> Singles:
        return np.asarray(self.table["s"][slots, _AT["mean"]])

    def inherit(self, slot: int, donor: Level, donor_slot: int, extra_variance: float = 0.0) -> None:
        """A series that has just been born starts with the normal of another, believed less by `extra_variance`."""
        row = donor.table["s"][donor_slot].copy()
        row[_OF_A_RUN] = 0.0
        for name in ("last", "later_between", "later_lag", "later_mass"):
            row[_AT[name]] = 0.0
        known, trusted = min(float(row[_AT["windows"]]), float(_MEMORY)), float(self.params.warmup_windows)
        # Sums over windows become what `warmup_windows` windows would have made of them.
        for name in ("between", "lag", "mass"):
            row[_AT[name]] *= trusted / max(known, 1.0)
        row[_AT["between"]] += extra_variance * (float(row[_AT["mass"]]) + _PRIOR_WINDOWS)
        row[_AT["windows"]] = trusted
        self.table["s"][slot] = row

    def head_start(self, slot: int, nats: float, at: float) -> None:
        """A series that has just been born is suspected from the start, with `nats` of evidence: in its first windows an alarm is
        e^nats times as likely by chance, and later as for every series, because what is normal wears it off."""
        self.table["s"][slot, [_AT["m0"], _AT["m1"]]] = nats
        self.table["onset"][slot] = at

    def begin_anew(self, slots: Ints) -> None:
        """Forgets the evidence so far; what was learned stays."""
        self.table["s"][np.ix_(slots, _OF_A_RUN)] = 0.0

    def step(self, slots: Ints, alarm: Bools, away: Bools, onset: Floats, calls: Floats) -> Step:
        """Moves the episodes on; a series that is not away is quiet."""
        if not self.episodes.n_open and not alarm.any():
            return _NOTHING
        return self.episodes.step(slots, alarm, away, ~away, onset, calls)

    def close(self, judged: Judged) -> None:
        """To be called once the anomalies of `judged` are made, which still need `since`."""
        ended = judged.slots[np.concatenate([judged.step.off, judged.accepted])]
        if len(ended):
            self.episodes.close(ended)

    def since(self, slot: int) -> float:
        return float(self.episodes.since[slot])

    def pack(self) -> dict[str, Any]:
        return {"by": list(self.by), "table": self.table.pack(), "episodes": self.episodes.pack()}

    def load(self, state: dict[str, Any]) -> None:
        self.table.load(state["table"])
        self.episodes.load(state["episodes"])
        self.episodes.grow(len(self.table.born))


@dataclass(frozen=True, slots=True)
class Watch:
    """One signal over one roll-up."""

    signal: str
    by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a window says about a watch. `rows` are indices into the roll-up, and all arrays have these rows; each has data.

    Args:
        x: float64[n], mean of ln(value) per call, less `offset`.
        calls: float64[n], calls that x is the mean of; > 0.
        within: float64[n], variance of ln(value) among the window's calls; None where x is no mean of calls.
        cov, elasticity: x falls by `elasticity` * (cov - its own normal) before it is judged; NaN = not told.
        may_alarm: bool[n], rows that meet whatever else the detector asks for.
        extra_nats: float64[n], further evidence, independent of x.
        other_nats: float64[n], what another statistic has gathered about the same departure, however it depends on x: the score
            is the mixture of both.
        offset: float64[n], what was taken off ln(value): added again to what is shown.
    """

    rows: Ints
    x: Floats
    calls: Floats
    within: Floats | None = None
    cov: Floats | None = None
    elasticity: float = 0.0
    may_alarm: Bools | None = None
    extra_nats: Floats | None = None
    other_nats: Floats | None = None
    offset: Floats | None = None


_NOTHING: Final = Step(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
Part = tuple[Level, Ints, Reading]


def judge_parts(
    parts: Sequence[Part], params: LevelParams, start: float, end: float, threshold: float
) -> list[Judged]:
    """Scores, then learns, one window of several levels of equal parameters: joined, because a call of numpy costs more
    than the few rows of a small estate.

    Args:
        parts: each level with the slots (int64[n], each at most once) of its reading's rows.
        start, end: of the window, seconds since the epoch.
        threshold: nats.
    """
    cuts = np.cumsum([len(slots) for _, slots, _ in parts])[:-1]
    s = np.ascontiguousarray(np.concatenate([level.table["s"][slots] for level, slots, _ in parts]).T)
    onset = np.concatenate([level.table["onset"][slots] for level, slots, _ in parts])
    open_ = np.concatenate([level.episodes.active(slots) for level, slots, _ in parts])
    c = np.concatenate([r.calls for _, _, r in parts]).astype(np.float32)
    x = np.concatenate([r.x for _, _, r in parts]).astype(np.float32)
    within = _joined([r.within for _, _, r in parts])
    cov = _covariate([r for _, _, r in parts])

    windows, mean = s[_AT["windows"]], s[_AT["mean"]]
    warm = windows >= params.warmup_windows
    first = windows == 0
    mean[first] = x[first]
    if cov is not None:
        x = x - cov[1] * _told(s, cov[0], first)
    variance, between = _variance(s, c, within is not None, params)
    d = x - mean

    begins = (s[_AT["m0"]] <= 0) & (s[_AT["m1"]] <= 0)
    score = _gather(s, d, variance, warm, threshold, [r.extra_nats for _, _, r in parts], params)
    others = _joined([r.other_nats for _, _, r in parts])
    if others is not None:
        score = np.logaddexp(score, others) - np.log(2.0)
    blend = c / (c + np.float32(params.blend_calls))
    recent = s[_AT["recent"]]
    recent += blend * (d - recent)
    s[_AT["run_above"]] = np.where(begins, 0, s[_AT["run_above"]]) + c * d
    s[_AT["run_calls"]] = np.where(begins, 0, s[_AT["run_calls"]]) + c
    s[_AT["run_windows"]] = np.where(begins, 0, s[_AT["run_windows"]]) + 1
    onset = np.where(begins, start, onset)

    away = recent > params.effect_log / 2
    # At first the recent level still holds what was before the departure; the departure's own mean does not.
    of_run = s[_AT["run_above"]] / s[_AT["run_calls"]]
    above = np.maximum(recent, of_run)
    alarm = warm & (score >= threshold) & (above >= params.effect_log) & (d >= params.effect_log / 2)
    if alarm.any():
        alarm &= (s[_AT["run_calls"]] >= params.min_calls) & (s[_AT["run_windows"]] >= params.min_windows)
        if params.young_effect_times > 1:
            # Sooner or later a departure that lasts has one window that is far up by chance: then the one before must be up as well.
            lasts = s[_AT["run_windows"]] > _FRESH_WINDOWS
            least = np.where(lasts, np.minimum(np.minimum(d, 2 * s[_AT["last"]]), above), above)
            alarm &= least >= _young_effect(windows, params)
        allowed = [
            np.ones(len(r.rows), np.bool_) if r.may_alarm is None else r.may_alarm for _, _, r in parts
        ]
        alarm &= np.concatenate(allowed)
    spans = [slice(a, b) for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(c)], strict=True)]
    steps = [
        level.step(slots, alarm[at], away[at], onset[at], r.calls)
        for (level, slots, r), at in zip(parts, spans, strict=True)
    ]
    out = [
        _judged(part, step, s[:, at], above[at], score[at], end, params)
        for part, step, at in zip(parts, steps, spans, strict=True)
    ]
    for step, at in zip(steps, spans, strict=True):
        if len(step.on):
            open_[step.on + at.start] = True

    weight = np.where(warm & ((score > 0.4 * threshold) | (recent >= params.effect_log)), 0.1, 1.0)
    weight[open_] = 0.0
    slow = 1 - half_life_weight(end - start, params.half_life_s)
    # The plain mean at first, exponential forgetting later.
    gain = np.maximum(np.float32(slow), 1 / (windows + 1)) * weight.astype(np.float32)
    _learn(s, d, c, within, between, variance, gain, params)
    if cov is not None:
        told = np.isfinite(cov[0])
        s[_AT["cov"]] += np.where(told, gain * (np.where(told, cov[0], 0) - s[_AT["cov"]]), 0)
    for (level, slots, _), at, judged in zip(parts, spans, out, strict=True):
        ended = np.concatenate([judged.step.off, judged.accepted])
        if len(ended):
            _restart(s[:, at], ended, judged.accepted, judged.mean + judged.recent, params)
        level.table["s"][slots] = s[:, at].T
        level.table["onset"][slots] = onset[at]
    return out


def _joined(columns: Sequence[Floats | None]) -> Singles | None:
    told = [column for column in columns if column is not None]
    return np.concatenate(told).astype(np.float32) if told else None


def _covariate(readings: Sequence[Reading]) -> tuple[Singles, Singles] | None:
    """Covariate and elasticity of all rows; None where no reading has one."""
    if all(r.cov is None for r in readings):
        return None
    cov = np.concatenate([np.full(len(r.rows), np.nan) if r.cov is None else r.cov for r in readings])
    elasticity = np.concatenate([np.full(len(r.rows), r.elasticity) for r in readings])
    return cov.astype(np.float32), elasticity.astype(np.float32)


def _told(s: Singles, cov: Singles, first: Bools) -> Singles:
    """How far the covariate is from its own normal, which follows it at the pace of the mean; 0 where it was not told."""
    normal = s[_AT["cov"]]
    told = np.isfinite(cov)
    unknown = told & (first | (normal == 0))
    normal[unknown] = cov[unknown]
    return np.where(told, cov - normal, np.float32(0))


def _variance(s: Singles, c: Singles, is_mean: bool, params: LevelParams) -> tuple[Singles, Singles]:
    """Of x under the null; and the part of it that is scatter between windows."""
    floor = np.float32(params.floor_sd_log**2)
    known = np.minimum(s[_AT["windows"]], _MEMORY)
    mass = s[_AT["mass"]] + np.float32(_PRIOR_WINDOWS)
    between = np.maximum((s[_AT["between"]] + floor * np.float32(_PRIOR_WINDOWS)) / mass, floor)
    prior = np.float32(_PRIOR_WITHIN)
    within = (s[_AT["within"]] * known + prior) / (known + prior) / c if is_mean else np.float32(0)
    # The scatter of few calls is independent from window to window; what lasts belongs to `between` alone.
    r = np.minimum(np.maximum(s[_AT["lag"]] / mass / between, 0), np.float32(0.85))
    lasting = between * (1 + r) / (1 - r)
    return (within + lasting) * (1 + 1 / (known + 1)), between


def _young_effect(windows: Singles, params: LevelParams) -> Singles:
    """How far above normal a departure must be, by how many windows a series was learned from; 0 for an old one."""
    young = 1 - np.minimum(windows, _MEMORY) / _MEMORY
    return np.where(young > 0, params.effect_log * (1 + (params.young_effect_times - 1) * young), 0)


def _gather(
    s: Singles, d: Singles, variance: Singles, warm: Bools, threshold: float, extra: Sequence[Floats | None],
    params: LevelParams,
) -> Floats:  # fmt: skip
    """Adds one window's evidence; returns the score of the mixture."""
    most = np.float32(1.2 * threshold / params.min_windows)
    m0, m1 = s[_AT["m0"]], s[_AT["m1"]]
    more = _joined(extra)
    for m, shift in zip((m0, m1), params.shifts_log, strict=True):
        gain = (np.float32(shift) * d - np.float32(shift * shift / 2)) / variance
        if more is not None:
            gain += more
        before = m / 2
        m += np.minimum(gain, most) - np.float32(params.drift_nats)
        if params.calm_halves:
            m[:] = np.where(d < params.effect_log / 2, np.minimum(m, before), m)
    score: Floats = np.logaddexp(m0.astype(np.float64), m1.astype(np.float64)) - np.log(2.0)
    for m in (m0, m1):
        m[:] = np.where(warm, np.minimum(np.maximum(m, 0), np.float32(2 * threshold)), 0)
    return score


def _judged(
    part: Part, step: Step, s: Singles, above: Singles, score: Floats, end: float, params: LevelParams
) -> Judged:
    level, slots, _ = part
    accepted, still = _NOTHING.off, step.still
    if len(still):
        accepted = still[end - level.episodes.since[slots[still]] > params.accept_after_s]
        still = np.setdiff1d(still, accepted, assume_unique=True)
    shown = s[_AT["recent"]].astype(np.float64)
    shown[step.on] = above[step.on]
    since = s[_AT["run_above"]].astype(np.float64) / np.maximum(s[_AT["run_calls"]], 1e-9)
    return Judged(
        slots, score, s[_AT["mean"]].astype(np.float64), shown, since,
        s[_AT["run_calls"]].astype(np.float64), s[_AT["run_windows"]].astype(np.int64), Step(step.on, still, step.off),
        accepted,
    )  # fmt: skip


def _learn(
    s: Singles, d: Singles, c: Singles, within: Singles | None, between: Singles, variance: Singles, gain: Singles,
    params: LevelParams,
) -> None:  # fmt: skip
    # Held at four standard deviations: one monster moves the mean like a large window, not like a monster.
    far = 4 * np.sqrt(variance)
    held = np.minimum(np.maximum(d, -far), far)
    s[_AT["mean"]] += gain * held
    noise: Singles = np.zeros_like(d)
    if within is not None:
        s[_AT["within"]] += np.where(c >= 2, gain, 0) * (within - s[_AT["within"]])
        noise = s[_AT["within"]] / c
    teaches = gain > 0
    # Suspect windows that become no episode teach the scatter in full: without them it would be that of calm hours only.
    # Windows of few calls say little about it.
    worth = np.where(teaches, between / (between + noise), 0)
    fade = np.where(teaches, np.float32(1 - 1 / _MEMORY), 1)
    # A departure teaches once it is over, or has lasted so long without an alarm that it belongs to the series.
    waits = (
        teaches
        & ((s[_AT["m0"]] > 0) | (s[_AT["m1"]] > 0))
        & (s[_AT["run_windows"]] <= params.patience_windows)
    )
    news = (worth * (held * held - noise), worth * held * s[_AT["last"]], worth)
    for name, new in zip(("between", "lag", "mass"), news, strict=True):
        now, later = s[_AT[name]], s[_AT[f"later_{name}"]]
        later += new
        now *= fade
        now += np.where(teaches & ~waits, later, 0)
        later[~waits] = 0.0
    s[_AT["last"]] = np.where(teaches, held, s[_AT["last"]])
    s[_AT["windows"]] += teaches


def _restart(s: Singles, ended: Ints, accepted: Ints, level: Floats, params: LevelParams) -> None:
    s[np.ix_(_OF_A_RUN, ended)] = 0.0
    s[_AT["mean"], accepted] = level[accepted]
    s[_AT["windows"], accepted] = np.float32(params.warmup_windows)


def mean_and_variance(rollup: Rollup, name: str, rows: Ints) -> tuple[Floats, Floats, Floats]:
    """Calls, mean of ln(x) and variance of ln(x) among the calls of each row; rows must have counts[name] > 0."""
    n = rollup.counts[name][rows].astype(np.float64)
    mean = rollup.sums[f"log_{name}"][rows] / n
    return n, mean, variance_of(n, mean, rollup.sums[f"log2_{name}"][rows])


def variance_of(n: Floats, mean: Floats, squares: Floats) -> Floats:
    """Unbiased variance from a count, a mean and a sum of squares; 0 where n < 2."""
    return np.maximum(squares - n * mean**2, 0.0) / np.maximum(n - 1, 1.0)


Evidence = dict[str, float | int | str | list[str]]


class LevelDetector:
    """The frame of a detector made of levels: subclasses say what they watch, read it from a roll-up, and add their facts."""

    kind: ClassVar[str]
    reads: ClassVar[Literal["windows"]] = "windows"
    klass: ClassVar[str]
    unit: ClassVar[str]
    version: ClassVar[int] = 3

    def __init__(self, watches: Sequence[Watch], params: LevelParams, budget: PageBudget | None) -> None:
        self.budget = budget if budget is not None else PageBudget()
        self._params = params
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
            read: list[tuple[Watch, Rollup, Part]] = []
            for watch, level, rollup in present:
                reading = self.read(watch, rollup, window)
                if reading is not None and len(reading.rows):
                    read.append((watch, rollup, (level, rollup.ids[reading.rows], reading)))
            if read:
                start = window.end - self.period_s(window)
                judged = judge_parts(
                    [part for _, _, part in read], self._params, start, window.end, threshold
                )
                for (watch, rollup, (level, _, reading)), j in zip(read, judged, strict=True):
                    if len(j.step.on) or len(j.step.still) or len(j.step.off) or len(j.accepted):
                        self._say(watch, level, rollup, window, reading, j, threshold, out)
            self.learned(window)
        return out

    def tick(self, now: float) -> list[Anomaly]:
        return []

    def _register(self) -> None:
        self.budget.register(self.kind, sum(level.table.seen for level in self.levels.values()))

    def _say(
        self, watch: Watch, level: Level, rollup: Rollup, window: Window, reading: Reading, j: Judged, threshold: float,
        out: list[Anomaly],
    ) -> None:  # fmt: skip
        phases: tuple[tuple[Phase, Ints, bool], ...] = (
            ("on", j.step.on, False), ("still", j.step.still, False), ("off", j.step.off, False), ("off", j.accepted, True),
        )  # fmt: skip
        for phase, which, accepted in phases:
            for i in which.tolist():
                row = int(reading.rows[i])
                labels = rollup.row_labels(row)
                since = level.since(int(j.slots[i]))
                mean, recent = float(j.mean[i]), float(j.recent[i])
                if reading.offset is not None:
                    mean += float(reading.offset[i])
                evidence: Evidence = {
                    "multiple": round(float(np.exp(recent)), 4),
                    "multiple_since": round(float(np.exp(j.since[i])), 4),
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
