"""Any river model, one per series, by name: `drift.ADWIN`, `anomaly.HalfSpaceTrees`, `anomaly.GaussianScorer`, …"""

from __future__ import annotations

import importlib
import inspect
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.core.codec import pack_state, unpack_state
from flyball.core.columns import BASE_LABELS, SUMS, Rollup, Window
from flyball.core.errorclass import CLASS_INDEX, NOT_ATTEMPTS
from flyball.core.errors import ConfigError, did_you_mean
from flyball.detectors._budget import PageBudget
from flyball.detectors._gates import Level
from flyball.detectors._state import find_rollup

_VERSION: Final = 1
_SIGNALS: Final = {
    "error_ratio": "llm.errors", "calls": "llm.calls", "input_tokens": "llm.input_tokens", "output_tokens": "llm.output_tokens",
    "reasoning_tokens": "llm.output_tokens", "cache_read_tokens": "llm.cache", "cost_usd": "llm.cost",
    "latency_s": "llm.latency", "ttft_s": "llm.ttft",
}  # fmt: skip
COLUMNS: Final = tuple(sorted({*_SIGNALS} & {*SUMS, "error_ratio", "calls"}))
"""What a model can be shown: a mean per call, the number of calls, or the share of failed attempts."""
_BET: Final = 0.2  # exponent of the wager on small p-values; below ~0.3 it grows fastest where p is as small as it can be


@dataclass(frozen=True, slots=True)
class Params:
    """Settings of `river`.

    Args:
        model: name below `river`, e.g. `drift.ADWIN` or `anomaly.HalfSpaceTrees`.
        arguments: of its constructor; `seed` is 0 unless it stands here.
        by: labels of the roll-up whose series are watched; it must be among those that windows make.
        column: one of COLUMNS. Everything but `error_ratio` is shown to the model as its logarithm.
        direction: `up`, `down` or `both`: where a departure counts.
        min_calls: windows with fewer calls of a series say nothing.
        warmup: windows of a series before it is judged.
        memory: values that a model is rebuilt from, and scores that a new one is ranked among. Evidence of one window is at
            most about 0.8 * ln(memory) nats.
        protect_nats: from so much evidence on, what comes does not teach.
        off_after: quiet windows that end an episode.
        accept_after: windows after which a departure is the new normal: the series learns anew.
        max_series: series watched; the one silent longest is forgotten first.

    Raises: ConfigError for values out of range or unknown names.
    """

    model: str = "anomaly.GaussianScorer"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    by: tuple[str, ...] = ("app",)
    column: str = "input_tokens"
    direction: str = "up"
    min_calls: int = 5
    warmup: int = 60
    memory: int = 256
    protect_nats: float = 3.0
    off_after: int = 3
    accept_after: int = 8_640
    max_series: int = 2_000

    def __post_init__(self) -> None:
        where = "river"
        if self.column not in COLUMNS:
            raise ConfigError(
                f"unknown column {self.column!r}{did_you_mean(self.column, COLUMNS)}", where=where
            )
        for label in self.by:
            if label not in BASE_LABELS:
                raise ConfigError(f"unknown label {label!r}{did_you_mean(label, BASE_LABELS)}", where=where)
        if not self.by:
            raise ConfigError("by must name at least one label", where=where)
        if self.direction not in ("up", "down", "both"):
            raise ConfigError(f"direction must be up, down or both, not {self.direction!r}", where=where)
        for name, least in (
            ("min_calls", 1),
            ("warmup", 2),
            ("memory", 32),
            ("off_after", 1),
            ("accept_after", 2),
            ("max_series", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}", where=where)


class _Model:
    """One family of river models behind one shape: shown a number, gives a score (anomaly) or a flag (drift)."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        module_name, _, class_name = name.rpartition(".")
        try:
            # Loaded only here: the import takes seconds, and most never ask for it.
            module = importlib.import_module(f"river.{module_name}" if module_name else "river")
        except ModuleNotFoundError as e:
            if e.name == "river":
                raise ConfigError(
                    "river is not installed; install flyball[river]", where=f"river model {name}"
                ) from e
            raise ConfigError(
                f"river has no module {module_name!r}; a model reads like drift.ADWIN", where="river"
            ) from e
        cls = getattr(module, class_name, None)
        if not isinstance(cls, type):
            known = [n for n in getattr(module, "__all__", dir(module)) if n[:1].isupper()]
            raise ConfigError(
                f"river.{module_name} has no {class_name!r}{did_you_mean(class_name, known)}", where="river"
            )
        self._cls: Any = cls
        accepted = inspect.signature(cls).parameters
        unknown = sorted(set(arguments) - set(accepted))
        if unknown:
            raise ConfigError(
                f"{name} takes no {unknown[0]!r}{did_you_mean(unknown[0], accepted)}", where="river"
            )
        self._arguments = {**({"seed": 0} if "seed" in accepted else {}), **arguments}
        try:
            made = self.make()
        except (TypeError, ValueError) as e:
            raise ConfigError(f"{name} cannot be made from {dict(arguments)}: {e}", where="river") from e
        self.drift = hasattr(made, "drift_detected") and hasattr(made, "update")
        if not self.drift and not (hasattr(made, "score_one") and hasattr(made, "learn_one")):
            raise ConfigError(f"{name} is neither an anomaly model nor a drift detector", where="river")
        self._supervised = not self.drift and "y" in inspect.signature(made.learn_one).parameters

    def make(self) -> Any:
        return self._cls(**self._arguments)

    def score(self, made: Any, x: float) -> float:
        score = made.score_one({}, x) if self._supervised else made.score_one({"x": x})
        value = float(score)
        return value if math.isfinite(value) else 0.0

    def learn(self, made: Any, x: float) -> bool:
        """Shows it one value; True when a drift detector calls it a drift."""
        if self.drift:
            made.update(x)
            return bool(made.drift_detected)
        if self._supervised:
            made.learn_one({}, x)
        else:
            made.learn_one({"x": x})
        return False


class _Series:
    __slots__ = (
        "away", "begin", "born", "evidence", "id", "labels", "level", "made", "n", "quiet", "ranked", "scores", "since",
        "taught",
    )  # fmt: skip

    def __init__(self, labels: tuple[str, ...], born: float, made: Any) -> None:
        self.labels = labels
        self.born = born
        self.made = made
        self.taught: list[float] = []
        """What `made` was shown, in order, and nothing else: `made` can always be rebuilt from it."""
        self.scores: deque[float] = deque()
        self.ranked: list[float] = []
        """The same, sorted: the rank of a new score is a binary search."""
        self.level = Level()
        self.evidence = 0.0
        self.begin = 0.0
        self.n = 0
        self.id = ""
        self.since = 0.0
        self.quiet = 0
        self.away = 0


class RiverDetector:
    """Runs one river model per series of a roll-up, under Flyball's protection instead of river's own filters.

    An anomaly model's score is ranked among the series' own past scores: p = (1 + how many were at least as high) / (1 + how many).
    While the series is exchangeable p is uniform or larger, so e = 0.2 * p**-0.8 is an e-value and M = max(M, 1) * e an
    e-CUSUM, which alarms at the page budget's threshold: several extreme windows in a row, never one. A drift
    detector's flag alarms by itself; single values are clipped to six standard deviations before it sees them.
    From `protect_nats` of evidence on nothing teaches: neither the model, nor the scores, nor the level.

    When it misleads: a series that swings with the hour is not exchangeable, and a slow swing looks like a departure; `warmup`
    should cover what is usual, or use a detector that knows the hour. After a drift, river's detectors forget: the
    episode ends when they fall silent, not when the old level is back.

    Cost: river models cannot be copied or pickled safely, so a snapshot holds the last `memory` to 2 * `memory` values and `restore`
    shows them to new models: 2 * `memory` updates a series (13 µs each for half-space trees: 7 s for 1,000 series). To be
    equal to its restored copy, a live model is rebuilt every `memory` values, which doubles the learning. About 16 kB a series.

    Args:
        params: see `Params`.
        budget: sets the threshold of anomaly models.

    Raises: ConfigError when river is missing or params name what does not exist.
    Source: Vovk, Nouretdinov & Gammerman (2003), "Testing exchangeability on-line"; Shin, Ramdas & Rinaldo (2022).
    """

    kind: ClassVar[str] = "river"
    reads: ClassVar[Literal["windows"]] = "windows"

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params or Params()
        self.budget = budget or PageBudget()
        self._model = _Model(self.params.model, self.params.arguments)
        self._series: OrderedDict[int, _Series] = OrderedDict()
        # The least scatter that is believed: 5 points of a ratio, 2 % of anything else (its logarithm).
        self._floor_sd = 0.05 if self.params.column == "error_ratio" else 0.02

    @property
    def signal(self) -> str:
        return _SIGNALS[self.params.column]

    def feed(self, batch: Sequence[Window]) -> list[Anomaly]:
        out: list[Anomaly] = []
        for window in batch:
            rollup = find_rollup(window, self.params.by)
            if rollup is None:
                continue
            for row in range(len(rollup)):
                self._row(window, rollup, row, out)
            self.budget.register(self.kind, len(self._series))
        return out

    def tick(self, now: float) -> list[Anomaly]:
        return []

    def _value(self, rollup: Rollup, row: int) -> tuple[float, int] | None:
        """(value, calls that it rests on) of one row; None where there is too little."""
        column = self.params.column
        n = int(rollup.calls[row])
        if column == "error_ratio":
            by_class = rollup.by_class[row]
            n -= sum(int(by_class[CLASS_INDEX[c]]) for c in sorted(NOT_ATTEMPTS))
            failed = n - int(by_class[0])
            return (failed / n, n) if n >= self.params.min_calls else None
        if column == "calls":
            return (math.log(n), n) if n >= self.params.min_calls else None
        if column not in rollup.sums or column not in rollup.counts:
            return None
        n = int(rollup.counts[column][row])
        total = float(rollup.sums[column][row])
        if n < self.params.min_calls or not math.isfinite(total) or total <= 0:
            return None
        return math.log(total / n), n

    def _row(self, window: Window, rollup: Rollup, row: int, out: list[Anomaly]) -> None:
        found = self._value(rollup, row)
        if found is None:
            return
        slot, born = int(rollup.ids[row]), float(rollup.born[row])
        series = self._series.get(slot)
        if series is None or series.born != born:
            # The slot means another series now; whatever was open in it ended with its series.
            self._series.pop(slot, None)
            series = self._series[slot] = _Series(tuple(rollup.labels[slot]), born, self._model.make())
            while len(self._series) > self.params.max_series:
                self._series.popitem(last=False)
        else:
            self._series.move_to_end(slot)
        self._judge(window, rollup, series, *found, out)

    def _judge(
        self, window: Window, rollup: Rollup, s: _Series, value: float, n: int, out: list[Anomaly]
    ) -> None:
        p = self.params
        threshold = self.budget.nats(window.end - window.start)
        s.n += 1
        ready = s.n > p.warmup
        z = s.level.z(value, self._floor_sd) if s.level.n > 1 else 0.0
        # A model that scores a value at the series' own level as odd is in its grace period or wrong; neither wakes anybody.
        wrong_way = abs(z) < 1.0 or (p.direction == "up" and z < 0) or (p.direction == "down" and z > 0)
        away = alarm = False
        score, rank = 0.0, 1.0
        x = self._shown(s, value)
        if self._model.drift:
            teach = True
            flagged = self._learn(s, x)
            alarm = away = flagged and ready and not wrong_way
            gathered, threshold = (1.0 if alarm else 0.0), 1.0
            if alarm:
                s.begin = window.start
        else:
            score = self._model.score(s.made, x)
            if len(s.ranked) > 7 and s.ranked[0] == s.ranked[-1] != score and s.level.var > 1e-12:
                # Different values had equal scores: the model was still in its own grace period and wakes only now.
                s.scores.clear()
                s.ranked = []
                s.n = 1
                ready = False
            rank = (1 + len(s.ranked) - bisect_left(s.ranked, score)) / (1 + len(s.ranked))
            if ready:
                before = s.evidence
                gain = math.log(_BET) + (_BET - 1.0) * math.log(1.0 if wrong_way else rank)
                s.evidence = min(2 * threshold, max(0.0, before + gain))
                if before == 0.0 and s.evidence > 0.0:
                    s.begin = window.start
            away = ready and not wrong_way and rank <= 0.05
            alarm = s.evidence >= threshold and away
            gathered = s.evidence
            teach = not s.id and not alarm and s.evidence < p.protect_nats
            if teach:
                self._learn(s, x)
                self._rank(s, score)
        expected = s.level.mean
        if teach and (not self._model.drift or abs(z) < 6 or s.level.n < p.warmup):
            s.level.learn(value, p.memory)
        phase = self._phase(s, alarm, away)
        if phase is not None:
            facts = {"model": p.model, "column": p.column, "z": round(z, 2), "windows_learned": s.level.n}
            if not self._model.drift:
                facts |= {"model_score": round(score, 6), "rank_among_own": round(rank, 6)}
            out.append(self._say(window, rollup, s, phase, value, expected, n, gathered, threshold, facts))
        if phase == "off":
            s.id, s.evidence = "", 0.0
            if s.away >= p.accept_after:
                self._forget(s)
            s.away = 0

    def _shown(self, s: _Series, value: float) -> float:
        """What the model sees: clipped for drift detectors, squeezed into (0, 1) for the others.

        Half-space trees split [0, 1]; the squeeze depends on the level *when the value is shown* and the result is what the series
        keeps, so a rebuilt model sees the same numbers.
        """
        sd, mean = s.level.sd(self._floor_sd), s.level.mean
        if self._model.drift:
            return value if s.level.n < self.params.warmup else min(mean + 6 * sd, max(mean - 6 * sd, value))
        if s.level.n < 2:
            return 0.5
        return 1.0 / (1.0 + math.exp(-min(30.0, max(-30.0, (value - mean) / (2 * sd)))))

    def _learn(self, s: _Series, x: float) -> bool:
        if len(s.taught) >= 2 * self.params.memory:
            s.taught = s.taught[-self.params.memory :]
            s.made = self._rebuilt(s.taught)
        s.taught.append(x)
        return self._model.learn(s.made, x)

    def _rebuilt(self, taught: Sequence[float]) -> Any:
        made = self._model.make()
        for x in taught:
            self._model.learn(made, x)
        return made

    def _rank(self, s: _Series, score: float) -> None:
        s.scores.append(score)
        insort(s.ranked, score)
        if len(s.scores) > self.params.memory:
            oldest = s.scores.popleft()
            del s.ranked[bisect_left(s.ranked, oldest)]

    def _forget(self, s: _Series) -> None:
        s.taught, s.ranked = [], []
        s.scores.clear()
        s.made, s.level, s.n = self._model.make(), Level(), 0

    def _phase(self, s: _Series, alarm: bool, away: bool) -> Phase | None:
        if not s.id:
            return "on" if alarm else None
        s.away += 1
        s.quiet = 0 if away else s.quiet + 1
        if s.quiet >= self.params.off_after or s.away >= self.params.accept_after:
            return "off"
        return "still" if away else None

    def _say(
        self, window: Window, rollup: Rollup, s: _Series, phase: Phase, value: float, expected: float, n: int, gathered: float,
        threshold: float, facts: dict[str, Any],
    ) -> Anomaly:  # fmt: skip
        labels = dict(zip(rollup.by, s.labels, strict=True))
        if phase == "on":
            s.since, s.quiet, s.away = s.begin, 0, 0
            s.id = anomaly_id(self.kind, self.signal, self.params.model, labels, s.since)
        ratio = self.params.column == "error_ratio"
        observed, usual = (value, expected) if ratio else (math.exp(value), math.exp(expected))
        unit = "ratio" if ratio else self.params.column
        if phase == "off" and s.away >= self.params.accept_after:
            facts["over"] = f"away for {s.away} windows: taken as the new normal"
        impact = abs(observed - usual) / max(abs(observed), abs(usual), 1e-12)
        return Anomaly(
            id=s.id, detector=self.kind, signal=self.signal, labels=labels, at=window.end, since=s.since, phase=phase,
            klass="drift" if self._model.drift else "outlier", observed=round(observed, 6), expected=round(usual, 6),
            unit=unit, score=round(gathered, 4), threshold=round(threshold, 4), n=n, impact=round(min(1.0, impact), 4),
            evidence=facts,
        )  # fmt: skip

    def snapshot(self) -> bytes:
        state = [
            [
                slot, list(s.labels), s.born, s.taught, list(s.scores), s.level.pack(), s.evidence, s.begin, s.n, s.id, s.since,
                s.quiet, s.away,
            ]
            for slot, s in self._series.items()
        ]  # fmt: skip
        return pack_state(self.kind, _VERSION, [self.params.model, state])

    def restore(self, state: bytes) -> None:
        """Shows new models what the old ones had learned: see Cost.

        Raises: SnapshotError for bytes of another detector or version; ConfigError when the snapshot is of another model.
        """
        model, packed = unpack_state(state, self.kind, _VERSION)
        if model != self.params.model:
            raise ConfigError(
                f"the snapshot is of {model}, not of {self.params.model}; start without it", where="river"
            )
        self._series = OrderedDict()
        for e in packed:
            s = _Series(tuple(e[1]), float(e[2]), None)
            s.taught = [float(x) for x in e[3]]
            s.made = self._rebuilt(s.taught)
            s.scores = deque(float(x) for x in e[4])
            s.ranked = sorted(s.scores)
            s.level, s.evidence, s.begin, s.n = Level.load(e[5]), float(e[6]), float(e[7]), int(e[8])
            s.id, s.since, s.quiet, s.away = str(e[9]), float(e[10]), int(e[11]), int(e[12])
            self._series[int(e[0])] = s


__all__ = ["COLUMNS", "Params", "RiverDetector"]
