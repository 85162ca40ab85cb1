"""Share of failing calls against each series' own normal, by class of failure and by whose fault the class usually is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, CLASSES, NOT_ATTEMPTS, PROVIDER_HEALTH
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors._episodes import Episodes
from flyball.detectors._state import (
    Array,
    Bools,
    Column,
    Floats,
    Ints,
    Table,
    find_rollup,
    half_life_weight,
    log_mean_exp,
)  # fmt: skip

_VERSION: Final = 1
_ALTERNATIVES: Final = (0.0, 0.3, 0.6, 0.95)
"""Ratios that the evidence looks for; each is raised to the least ratio that matters for the series."""
_SAMPLED: Final = 50
"""Openings per window that get sample ids: finding them walks all samples of the window."""


@dataclass(frozen=True, slots=True)
class Group:
    """Classes that are judged together.

    `prior_ratio` is believed before anything was seen; a series that warms up is judged as if `Params.cold_attempts` calls had
    failed at `cold_ratio` before its own, so that at first only what would be trouble anywhere is said.
    """

    name: str
    classes: tuple[str, ...]
    prior_ratio: float
    cold_ratio: float


HEALTH: Final = Group("health", tuple(c for c in CLASSES if c in PROVIDER_HEALTH), 0.005, 0.05)
AUTH: Final = Group("auth", ("auth",), 0.001, 0.05)
QUOTA: Final = Group("quota", ("quota_exhausted",), 0.001, 0.05)
RATE: Final = Group("rate", ("rate_limited",), 0.005, 0.20)
CONTEXT: Final = Group("context", ("context_too_long",), 0.005, 0.20)
FILTER: Final = Group("filter", ("content_filter",), 0.005, 0.20)
REQUEST: Final = Group("request", ("bad_request",), 0.005, 0.20)
MISSING: Final = Group("missing", ("not_found",), 0.001, 0.10)
UNKNOWN: Final = Group("unknown", ("unknown",), 0.005, 0.20)

_APP: Final = (CONTEXT, FILTER, REQUEST, MISSING, UNKNOWN)
SCOPES: Final[dict[tuple[str, ...], tuple[Group, ...]]] = {
    ("provider",): (HEALTH, AUTH, QUOTA, RATE, UNKNOWN),
    ("provider", "model"): (HEALTH, MISSING, UNKNOWN),
    ("provider", "region"): (HEALTH,),
    ("deployment",): (HEALTH,),
    ("model",): (CONTEXT, FILTER, REQUEST, MISSING),
    ("provider", "tenant"): (AUTH, QUOTA, RATE),
    ("provider", "app"): (QUOTA, RATE),
    ("tenant",): (AUTH,),
    ("app",): _APP,
    ("app", "prompt"): _APP,
}
"""Which groups are judged over which labels: where the fault of a class usually lies, and one step around it."""

_BLAMES_MANY: Final = frozenset({"provider", "model", "region", "deployment"})
"""Scopes made of these only serve many tenants: one tenant's failures say nothing about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """How a share of failures becomes an alarm. Ratios are in [0, 1].

    Args:
        min_attempts: calls that a blamed ratio must rest on, counted since the trouble began.
        min_failing_tenants: distinct tenants that must fail before a provider, model, region or deployment is blamed;
            waived where a series' calls name no tenant at all, and where the whole estate never had more than one.
        effect_times, effect_points: the ratio must reach max(times * normal, normal + points) (for a high normal: half of what
            is left to 1), whatever the evidence.
        warmup_attempts: calls until a series' own normal counts fully; until then `Group.cold_ratio` is part of it.
        cold_attempts: weight of `Group.cold_ratio` until then, in calls; > 0.
        prior_attempts: weight of `Group.prior_ratio`, in calls.
        half_life_s: age at which what was learned counts half, in time with data.
        min_rho, max_rho: bounds on the learned correlation of calls within a window: n calls tell as much as
            n / (1 + (n - 1) * rho) independent ones.
        one_window_ratio: a smaller ratio must last: one window of it gives at most 0.6 of the evidence an alarm needs.
        off_after, off_attempts: quiet windows in a row, and calls in them, that end an episode.
        accept_after_s: an episode that lasts longer ends, and what it shows becomes the new normal.

    Raises: ConfigError for values out of range.
    """

    min_attempts: int = 10
    min_failing_tenants: int = 2
    effect_times: float = 3.0
    effect_points: float = 0.05
    warmup_attempts: float = 200.0
    cold_attempts: float = 20.0
    prior_attempts: float = 200.0
    half_life_s: float = 14_400.0
    min_rho: float = 0.02
    one_window_ratio: float = 0.3
    max_rho: float = 0.5
    off_after: int = 3
    off_attempts: float = 10.0
    accept_after_s: float = 86_400.0

    def __post_init__(self) -> None:
        checks = {
            "min_attempts >= 1": self.min_attempts >= 1,
            "min_failing_tenants >= 1": self.min_failing_tenants >= 1,
            "effect_times > 1": self.effect_times > 1,
            "0 < effect_points < 1": 0 < self.effect_points < 1,
            "warmup_attempts >= 0": self.warmup_attempts >= 0,
            "cold_attempts > 0": self.cold_attempts > 0,
            "prior_attempts > 0": self.prior_attempts > 0,
            "half_life_s > 0": self.half_life_s > 0,
            "0 <= min_rho <= max_rho < 1": 0 <= self.min_rho <= self.max_rho < 1,
            "0 <= one_window_ratio <= 1": 0 <= self.one_window_ratio <= 1,
            "off_after >= 1": self.off_after >= 1,
            "accept_after_s > 0": self.accept_after_s > 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ConfigError(f"error_ratio needs {rule}")


_PRIOR_PAIRS: Final = 2_000.0
"""Weight of `min_rho`, in pairs of calls: one wild window of 20 calls shall not make a series over-dispersed for hours."""


class _Scope:
    """State of one roll-up: groups are columns, series are rows."""

    def __init__(self, by: tuple[str, ...], groups: tuple[Group, ...], params: Params) -> None:
        self.by = by
        self.groups = groups
        self.shared_by_many = set(by) <= _BLAMES_MANY
        g = len(groups)
        self.table = Table({
            "n": Column(), "pairs": Column(), "k": Column(width=g), "over": Column(width=g),
            "m": Column(width=g * len(_ALTERNATIVES)), "run_n": Column(width=g), "run_k": Column(width=g),
            "onset": Column("<f8", g), "tenants": Column("<i2", g), "klass": Column("<i1", g), "hot": Column("|b1", g),
        })  # fmt: skip
        self.episodes = [Episodes(params.off_after, params.off_attempts) for _ in groups]
        self.columns = [np.array([CLASS_INDEX[c] for c in group.classes]) for group in groups]
        self.matrix = np.zeros((len(CLASSES), g + 1), np.float32)
        for i, group in enumerate(groups):
            self.matrix[[CLASS_INDEX[c] for c in group.classes], i] = 1.0
        attempts = [i for i, c in enumerate(CLASSES) if c not in NOT_ATTEMPTS]
        self.matrix[attempts, g] = 1.0

    def align(self, rollup: Rollup) -> None:
        fresh = self.table.align(rollup)
        for episodes in self.episodes:
            episodes.grow(rollup.capacity)
            if len(fresh):
                episodes.forget(fresh)


@dataclass(slots=True)
class _Judged:
    """What one group's judgement of the rows that show anything came to; all arrays by those rows."""

    rows: Ints
    n: Floats
    ratio: Floats
    run_n: Floats
    run_ratio: Floats
    p: Floats
    score: Floats
    failing: Ints
    alarm: Bools
    away: Bools
    over_gate: Bools


class ErrorRatio:
    """Too many calls fail, against what is normal for this series: signal `llm.errors`.

    Per series and group of classes, k failures among n attempts are compared with the learned ratio p. The evidence is a
    mixture of e-CUSUMs, one per alternative ratio (the least that matters, 30 %, 60 %, 95 %), of binomial log-likelihood ratios at
    the effective sample size n / (1 + (n - 1) * rho), because calls of one window fail together. Blocks of our own and
    calls that the client left (NOT_ATTEMPTS) are in neither k nor n.

    A total outage is said in the first window that holds `min_attempts` calls; a fault that comes and goes faster than
    `off_after` windows is one episode. `klass` is the class with most failures when the episode opened.

    When it misleads: failures that concentrate in a few calls of a large series stay below `effect_points`; a slow rise below
    the effect size is learned, at a tenth of the speed.

    Source: Shin, Ramdas & Rinaldo (2022) for the e-CUSUM; Kish (1965), "Survey Sampling", for the effective size.
    """

    kind: ClassVar[str] = "error_ratio"
    reads: ClassVar[Literal["windows"]] = "windows"
    signal: Final = "llm.errors"

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params if params is not None else Params()
        self.budget = budget if budget is not None else PageBudget()
        self._scopes = [_Scope(by, groups, self.params) for by, groups in SCOPES.items()]
        self._most_tenants = 0
        """Most tenants that ever called in one window: with a single one, nobody could bear it out that it is not the tenant's."""

    def feed(self, batch: Sequence[Window]) -> list[Anomaly]:
        out: list[Anomaly] = []
        for window in batch:
            present = []
            for scope in self._scopes:
                rollup = find_rollup(window, scope.by)
                if rollup is not None and len(rollup):
                    scope.align(rollup)
                    present.append((scope, rollup))
            self._register()
            threshold = self.budget.nats(window.end - window.start)
            total = window.rollups.get(())
            if total is not None and len(total):
                self._most_tenants = max(self._most_tenants, int(total.tenants[0]))
            for scope, rollup in present:
                self._judge_scope(scope, rollup, window, threshold, out)
        return out

    def tick(self, now: float) -> list[Anomaly]:
        return []

    def _register(self) -> None:
        self.budget.register(self.kind, sum(s.table.seen * len(s.groups) for s in self._scopes))

    # --- one window ----------------------------------------------------------------------------------------------

    def _judge_scope(
        self, scope: _Scope, rollup: Rollup, window: Window, threshold: float, out: list[Anomaly]
    ) -> None:
        counts = rollup.by_class.astype(np.float32) @ scope.matrix
        attempts = counts[:, -1]
        weight = np.ones(len(rollup), np.float32)
        weight[attempts == 0] = 0.0
        open_ = np.zeros(counts[:, :-1].shape, np.bool_)
        for g in range(len(scope.groups)):
            shows = (counts[:, g] > 0) | scope.table["hot"][rollup.ids, g]
            rows = np.flatnonzero(shows & (attempts > 0))
            if len(rows):
                judged = self._judge_group(scope, g, rollup, rows, counts, window, threshold)
                self._speak(scope, g, judged, rollup, window, threshold, weight, out)
                open_[rows, g] = scope.episodes[g].active(rollup.ids[rows])
        self._learn(scope, rollup.ids, counts, weight, open_, window.end - window.start)

    def _normal(self, scope: _Scope, g: int, slots: Ints) -> tuple[Floats, Floats]:
        """float64[m] each: the ratio to judge against, and rho."""
        t, group, params = scope.table, scope.groups[g], self.params
        n = t["n"][slots].astype(np.float64)
        p = (t["k"][slots, g] + group.prior_ratio * params.prior_attempts) / (n + params.prior_attempts)
        # What a young series has shown counts at once: a hundred calls without a failure are no reason to expect a tenth to fail.
        young = (t["k"][slots, g] + group.cold_ratio * params.cold_attempts) / (n + params.cold_attempts)
        p = np.where(n < params.warmup_attempts, np.maximum(p, young), p)
        rho = (t["over"][slots, g] + params.min_rho * _PRIOR_PAIRS) / (t["pairs"][slots] + _PRIOR_PAIRS)
        return np.clip(p, 1e-4, 0.95), np.clip(rho.astype(np.float64), params.min_rho, params.max_rho)

    def _judge_group(
        self,
        scope: _Scope,
        g: int,
        rollup: Rollup,
        rows: Ints,
        counts: Array,
        window: Window,
        threshold: float,
    ) -> _Judged:
        t, params = scope.table, self.params
        slots = rollup.ids[rows]
        n = counts[rows, -1].astype(np.float64)
        ratio = counts[rows, g] / n
        p, rho = self._normal(scope, g, slots)
        gate = np.minimum(np.maximum(params.effect_times * p, p + params.effect_points), (1 + p) / 2)

        q = np.minimum(np.maximum(gate[:, None], np.array(_ALTERNATIVES)), 0.98)
        effective = n / (1 + (n - 1) * rho)
        gain = ratio[:, None] * np.log(q / p[:, None]) + (1 - ratio)[:, None] * np.log(
            (1 - q) / (1 - p)[:, None]
        )
        span = slice(g * len(_ALTERNATIVES), (g + 1) * len(_ALTERNATIVES))
        before = t["m"][slots, span]
        # A blip of ten seconds wakes nobody unless it is an outage: half-failing windows must repeat.
        most_gain = np.where(ratio >= params.one_window_ratio, np.inf, 0.6 * threshold)
        m = before + np.minimum(effective[:, None] * gain, most_gain[:, None])
        # A quiet window of full size halves what was gathered (less evidence than allowed is always sound): where windows scatter
        # much, each weighs little, and rare blips would otherwise add up over hours.
        calm = (n >= params.min_attempts) & (ratio <= (p + gate) / 2)
        m = np.where(calm[:, None], np.minimum(m, before / 2), m)
        score = log_mean_exp(m)
        # Held at twice the threshold, so that what comes after a long trouble is not judged by it for hours.
        t["m"][slots, span] = np.clip(m, 0.0, 2 * threshold)

        begins = before.max(axis=1) <= 0
        by_class = rollup.failing_tenants[rows][:, scope.columns[g]]
        failing = by_class.max(axis=1)
        run_n = np.where(begins, 0, t["run_n"][slots, g]) + n
        run_k = np.where(begins, 0, t["run_k"][slots, g]) + counts[rows, g]
        most = np.maximum(np.where(begins, 0, t["tenants"][slots, g]), np.minimum(failing, 32_000))
        t["run_n"][slots, g], t["run_k"][slots, g], t["tenants"][slots, g] = run_n, run_k, most
        t["onset"][slots, g] = np.where(begins, window.start, t["onset"][slots, g])
        t["hot"][slots, g] = (m.max(axis=1) > 0) | scope.episodes[g].active(slots)

        run_ratio = run_k / run_n
        over_gate = (n >= params.min_attempts) & (ratio >= gate)
        enough = over_gate | ((run_n >= params.min_attempts) & (run_ratio >= gate))
        away = ratio > (p + gate) / 2
        alarm = (score >= threshold) & enough & away
        if scope.shared_by_many:
            blamable = (most >= params.min_failing_tenants) | (rollup.tenants[rows] == 0)
            if self._most_tenants == 1:
                blamable[:] = True
            # Tenants are counted by class; where a mix of classes leaves it open how many fail, the cells know.
            unsure = alarm & ~blamable & (by_class.sum(axis=1) >= params.min_failing_tenants)
            for i in np.flatnonzero(unsure).tolist():
                told = _failing_tenants(window, rollup.row_labels(int(rows[i])), scope.columns[g])
                most[i] = max(int(most[i]), told)
                t["tenants"][slots[i], g] = most[i]
                blamable[i] = most[i] >= params.min_failing_tenants
            alarm &= blamable
        return _Judged(rows, n, ratio, run_n, run_ratio, p, score, most, alarm, away, over_gate)

    def _speak(
        self,
        scope: _Scope,
        g: int,
        j: _Judged,
        rollup: Rollup,
        window: Window,
        threshold: float,
        weight: NDArray[np.float32],
        out: list[Anomaly],
    ) -> None:
        """Moves the episodes on, says what there is to say, and keeps what is anomalous from teaching."""
        t, episodes, params = scope.table, scope.episodes[g], self.params
        slots = rollup.ids[j.rows]
        step = episodes.step(slots, j.alarm, j.away, ~j.away, t["onset"][slots, g], j.n)
        if len(step.on):
            columns = scope.columns[g]
            worst = rollup.by_class[j.rows[step.on]][:, columns].argmax(axis=1)
            t["klass"][slots[step.on], g] = columns[worst]
        accepted = step.still[window.end - episodes.since[slots[step.still]] > params.accept_after_s]
        still = np.setdiff1d(step.still, accepted, assume_unique=True)
        phases: tuple[tuple[Phase, Ints, bool], ...] = (
            ("on", step.on, False), ("still", still, False), ("off", step.off, False), ("off", accepted, True),
        )  # fmt: skip
        for phase, which, is_accepted in phases:
            for i in which.tolist():
                out.append(self._anomaly(scope, g, j, i, rollup, window, threshold, phase, is_accepted))

        suspect = j.over_gate | (j.score > 0.4 * threshold)
        cold = t["n"][slots] < params.warmup_attempts
        kept = np.where(suspect & ~cold, 0.1, 1.0)
        kept[j.over_gate | episodes.active(slots)] = 0.0
        weight[j.rows] = np.minimum(weight[j.rows], kept)

        ended = slots[np.concatenate([step.off, accepted])]
        if len(ended):
            episodes.close(ended)
            t["m"][ended, g * len(_ALTERNATIVES) : (g + 1) * len(_ALTERNATIVES)] = 0.0
            t["hot"][ended, g] = False
        if len(step.on):
            t["hot"][slots[step.on], g] = True
        if len(accepted):
            new = slots[accepted]
            t["n"][new] = np.maximum(t["n"][new], params.warmup_attempts)
            t["k"][new, g] = j.run_ratio[accepted] * t["n"][new]

    def _learn(
        self,
        scope: _Scope,
        ids: Ints,
        counts: Array,
        weight: NDArray[np.float32],
        open_: Bools,
        window_s: float,
    ) -> None:
        """Exponentially weighted counts, and by how much more they scatter than a binomial would.

        Windows that are high but part of no episode teach the scatter in full (held at rho = 0.2 each): left out, the learned
        scatter would be that of the calm windows only, and the next burst of the same series would look impossible.
        """
        t, params = scope.table, self.params
        keep = 1 - (1 - half_life_weight(window_s, params.half_life_s)) * weight
        keep = keep.astype(np.float32)
        n, k = t["n"][ids], t["k"][ids]
        attempts = counts[:, -1]
        prior = np.array([g.prior_ratio for g in scope.groups], np.float32)
        weight_of_prior = np.float32(params.prior_attempts)
        p = np.clip((k + prior * weight_of_prior) / (n + weight_of_prior)[:, None], 0.002, 0.9)
        expected = attempts[:, None] * p
        variance = np.maximum(expected * (1 - p), np.float32(1e-6))
        excess = np.minimum((counts[:, :-1] - expected) ** 2 / variance - 1, 50 + 0.2 * attempts[:, None])
        excess[(attempts < 2)[:, None] | open_] = 0.0
        fade = np.float32(half_life_weight(window_s, params.half_life_s))
        t["over"][ids] = t["over"][ids] * fade + excess
        t["pairs"][ids] = t["pairs"][ids] * fade + np.where(open_.any(axis=1), 0, np.maximum(attempts - 1, 0))
        t["n"][ids] = n * keep + attempts * weight
        t["k"][ids] = k * keep[:, None] + counts[:, :-1] * weight[:, None]

    def _anomaly(
        self,
        scope: _Scope,
        g: int,
        j: _Judged,
        i: int,
        rollup: Rollup,
        window: Window,
        threshold: float,
        phase: Phase,
        accepted: bool,
    ) -> Anomaly:
        row = int(j.rows[i])
        slot = int(rollup.ids[row])
        labels = rollup.row_labels(row)
        klass = CLASSES[int(scope.table["klass"][slot, g])]
        since = float(scope.episodes[g].since[slot])
        alone = bool(j.n[i] >= self.params.min_attempts)
        observed = float(j.ratio[i] if alone else j.run_ratio[i]) if phase != "off" else float(j.ratio[i])
        by_class = rollup.by_class[row]
        evidence: dict[str, float | int | str | list[str]] = {
            "attempts": int(j.n[i]),
            "failed": round(float(j.ratio[i] * j.n[i])),
            "attempts_since": int(j.run_n[i]),
            "ratio_since": round(float(j.run_ratio[i]), 6),
            "baseline_ratio": round(float(j.p[i]), 6),
            "tenants": int(rollup.tenants[row]),
            "failing_tenants": int(j.failing[i]),
            "group": scope.groups[g].name,
        }
        for index in np.flatnonzero(by_class[1:]).tolist():
            evidence[f"class_{CLASSES[index + 1]}"] = int(by_class[index + 1])
        if accepted:
            evidence["accepted_as_normal"] = 1
        wanted = phase == "on" and int(np.count_nonzero(j.alarm)) <= _SAMPLED
        samples = tuple(window.sample_ids(labels, CLASS_INDEX[klass])) if wanted else ()
        return Anomaly(
            id=anomaly_id(self.kind, self.signal, klass, labels, since),
            detector=self.kind,
            signal=self.signal,
            klass=klass,
            labels=labels,
            at=window.end,
            since=since,
            phase=phase,
            observed=observed,
            expected=float(j.p[i]),
            unit="ratio",
            score=round(float(j.score[i]), 6),
            threshold=threshold,
            n=int(j.n[i] if alone else j.run_n[i]),
            impact=min(1.0, max(0.0, observed)) if phase != "off" else 0.0,
            evidence=evidence,
            samples=samples,
        )

    # --- state ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        state: list[Any] = [
            {"by": list(s.by), "table": s.table.pack(), "episodes": [e.pack() for e in s.episodes]}
            for s in self._scopes
        ]
        return pack_state(self.kind, _VERSION, {"scopes": state, "most_tenants": self._most_tenants})

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another detector or version, or damaged."""
        saved_state = unpack_state(state, self.kind, _VERSION)
        self._most_tenants = saved_state["most_tenants"]
        found = {tuple(s["by"]): s for s in saved_state["scopes"]}
        for scope in self._scopes:
            saved = found[scope.by]
            scope.table.load(saved["table"])
            for episodes, packed in zip(scope.episodes, saved["episodes"], strict=True):
                episodes.load(packed)
                episodes.grow(len(scope.table.born))
        self._register()


def _failing_tenants(window: Window, labels: dict[str, str], columns: Ints) -> int:
    """Distinct tenants with a failure of one of the classes, among the cells that carry all `labels`; 0 where cells name none."""
    cells = window.cells
    if "tenant" not in cells.by or any(name not in cells.by for name in labels):
        return 0
    wanted = [(cells.by.index(name), value) for name, value in labels.items()]
    tenant_at = cells.by.index("tenant")
    failing = np.flatnonzero(cells.by_class[:, columns].any(axis=1))
    told = (cells.labels[slot] for slot in cells.ids[failing].tolist())
    found = {one[tenant_at] for one in told if all(one[at] == value for at, value in wanted)}
    return len(found - {""})
