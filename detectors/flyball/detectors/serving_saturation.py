"""Inference servers at their limit: queue, KV cache, preemptions, time to first token."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from flyball.core.anomaly import Anomaly, anomaly_id
from flyball.core.codec import pack_state, unpack_state
from flyball.core.errors import ConfigError
from flyball.core.events import Event, GpuSample
from flyball.core.gpu_metrics import UNSUPPORTED_ABOVE
from flyball.detectors._budget import PageBudget
from flyball.detectors._gates import Counter, Dwell, Gate, Level

_VERSION: Final = 1
_Facts = dict[str, float | int | str | list[str]]
_LABELS: Final = ("deployment", "model", "node", "pod", "namespace", "hardware", "app", "team")
_KEY: Final = ("deployment", "model", "node", "pod")


@dataclass(frozen=True, slots=True)
class Params:
    """Settings of `serving_saturation`.

    Args:
        plateau_ratio: running requests are at their plateau from this share of the most that ran at once lately.
        peak_half_life_s: how fast that "most" is forgotten.
        kv_on_ratio, kv_off_ratio: KV cache is full above the one, and fine again below the other.
        preemptions_per_min: fewer are never told; above it, `preemptions_factor` times what is usual.
        ttft_z, ttft_factor: mean time to first token so many standard deviations (of its logarithm) above the learned level, and
            so many times it.
        ttft_requests: requests that a mean must rest on.
        warmup: values from which a level is learned before anything is judged by it.
        relearn_s: a level that stays away for so long is the new normal; the episode ends and learning starts anew.
        dwell: how long a condition must hold, and how long it must be gone.
        max_servers: servers remembered; the one silent longest is forgotten first.

    Raises: ConfigError for values out of range.
    """

    plateau_ratio: float = 0.9
    peak_half_life_s: float = 3600.0
    kv_on_ratio: float = 0.9
    kv_off_ratio: float = 0.8
    preemptions_per_min: float = 6.0
    preemptions_factor: float = 4.0
    ttft_z: float = 4.0
    ttft_factor: float = 2.0
    ttft_requests: int = 5
    warmup: int = 20
    relearn_s: float = 21_600.0
    dwell: Dwell = field(default_factory=Dwell)
    max_servers: int = 20_000

    def __post_init__(self) -> None:
        if not 0 < self.kv_off_ratio < self.kv_on_ratio <= 1:
            raise ConfigError(
                f"kv_off_ratio {self.kv_off_ratio} and kv_on_ratio {self.kv_on_ratio} must be 0 < off < on <= 1",
                where="serving_saturation",
            )
        if not 0 < self.plateau_ratio <= 1:
            raise ConfigError(
                f"plateau_ratio must be in (0, 1], not {self.plateau_ratio}", where="serving_saturation"
            )
        for name in ("peak_half_life_s", "preemptions_per_min", "ttft_z", "relearn_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} must be above 0, not {getattr(self, name)}", where="serving_saturation"
                )
        for name in ("preemptions_factor", "ttft_factor", "ttft_requests", "warmup", "max_servers"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 1, not {getattr(self, name)}", where="serving_saturation"
                )


class _Server:
    __slots__ = ("gates", "last_at", "peak", "preempted", "preemptions", "ttft", "ttft_base", "ttft_base_at")

    def __init__(self) -> None:
        self.last_at = -math.inf
        self.peak = 0.0
        self.gates: dict[str, Gate] = {}
        self.preempted = Counter()
        self.preemptions = Level()
        self.ttft = Level()
        self.ttft_base: tuple[float, float] | None = None
        """Sum and count of the histogram where the mean in the making begins."""
        self.ttft_base_at = -math.inf


@dataclass(frozen=True, slots=True)
class _Judged:
    """One condition at one sample."""

    signal: str
    klass: str
    over: bool
    calm: bool
    observed: float
    expected: float
    unit: str
    score: float
    threshold: float
    n: int
    impact: float
    facts: _Facts


class ServingSaturation:
    """Tells, per inference server, when requests wait, the KV cache is full, requests are preempted or first tokens come late.

    `serving.queue`: requests wait while as many run as ever run (`saturated`), or while none runs (`stalled`); waiting while the
    batch still fills is nothing. `serving.kv_cache`: usage above a level. `serving.preemptions`: more per minute than
    usual. `serving.ttft`: the mean since the last sample, from sum and count, against the server's own learned level. Everything must
    hold for a dwell time and be gone for one, with a gap between the two thresholds.

    Score: for queue, cache and preemptions observed over limit (a rule; 1 is enough); for TTFT nats of a normal tail, z²/2.

    When it misleads: right after a start the plateau is not known, and the first load looks like it; `dwell` bridges that.
    Longer prompts raise TTFT without any fault of the server. Counters that restart are noticed; sums that were reset
    twice between samples are not.

    Args:
        params: see `Params`.
        budget: accepted so that all detectors are made alike; these are rules and a fixed z.

    Raises: ConfigError when params are out of range.
    Source: waiting > 0 sustained and KV usage > 0.9, as llm-d and vLLM operators alert.
    """

    kind: ClassVar[str] = "serving_saturation"
    reads: ClassVar[Literal["events"]] = "events"
    types: ClassVar[tuple[type, ...]] = (GpuSample,)

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params or Params()
        self._servers: OrderedDict[tuple[str, ...], _Server] = OrderedDict()

    def feed(self, batch: Sequence[Event]) -> list[Anomaly]:
        """Samples in order; samples of GPUs are passed over."""
        out: list[Anomaly] = []
        for event in batch:
            if type(event) is GpuSample and not event.gpu and event.values:
                self._sample(event, out)
        return out

    def tick(self, now: float) -> list[Anomaly]:
        """Nothing follows from time alone: a server that went silent is neither well nor ill."""
        return []

    def _sample(self, s: GpuSample, out: list[Anomaly]) -> None:
        key = tuple(str(getattr(s, name)) for name in _KEY)
        server = self._servers.get(key)
        if server is None:
            server = self._servers[key] = _Server()
            while len(self._servers) > self.params.max_servers:
                self._servers.popitem(last=False)
        else:
            self._servers.move_to_end(key)
        if s.at <= server.last_at:
            return
        seconds = s.at - server.last_at if server.last_at > -math.inf else 0.0
        server.last_at = s.at
        values = {k: v for k, v in s.values.items() if math.isfinite(v) and 0.0 <= v < UNSUPPORTED_ABOVE}
        for judged in (
            self._queue(server, values, seconds),
            self._kv_cache(values),
            self._preemptions(server, values, s.at),
            self._ttft(server, values, s.at),
        ):
            if judged is not None:
                self._tell(s, server, judged, out)

    def _queue(self, server: _Server, values: Mapping[str, float], seconds: float) -> _Judged | None:
        if "requests_waiting" not in values:
            return None
        waiting = values["requests_waiting"]
        running = values.get("requests_running")
        server.peak *= 0.5 ** (seconds / self.params.peak_half_life_s)
        facts: _Facts = {"waiting": waiting}
        full = True
        if running is not None:
            server.peak = max(server.peak, running)
            full = running >= self.params.plateau_ratio * server.peak or running == 0
            facts |= {"running": running, "running_peak": round(server.peak, 2)}
        calm = waiting == 0 or (running is not None and 0 < running < 0.7 * server.peak)
        klass = "stalled" if running == 0 and waiting > 0 else "saturated"
        impact = waiting / (waiting + running) if running else (1.0 if running == 0 else 0.5)
        return _Judged(
            "serving.queue", klass, waiting >= 1 and full, calm, waiting, 0.0, "requests", max(1.0, waiting), 1.0,
            int(waiting), impact if waiting else 0.0, facts,
        )  # fmt: skip

    def _kv_cache(self, values: Mapping[str, float]) -> _Judged | None:
        ratio = values.get("kv_cache_ratio")
        if ratio is None:
            return None
        p = self.params
        facts: _Facts = {"kv_cache_ratio": round(ratio, 4), "limit_ratio": p.kv_on_ratio}
        impact = min(1.0, max(0.0, (ratio - p.kv_off_ratio) / (1.0 - p.kv_off_ratio)))
        return _Judged(
            "serving.kv_cache", "full", ratio > p.kv_on_ratio, ratio < p.kv_off_ratio, ratio, p.kv_on_ratio, "ratio",
            ratio / p.kv_on_ratio, 1.0, 1, impact, facts,
        )  # fmt: skip

    def _preemptions(self, server: _Server, values: Mapping[str, float], at: float) -> _Judged | None:
        if "preemptions_total" not in values:
            return None
        step = server.preempted.step(values["preemptions_total"], at)
        if step is None:
            return None
        p = self.params
        rate = 60.0 * step[0] / step[1]
        limit = max(p.preemptions_per_min, p.preemptions_factor * server.preemptions.mean)
        ready = server.preemptions.n >= p.warmup
        over = ready and rate > limit
        gate = server.gates.get("serving.preemptions")
        if not over and (gate is None or not gate.is_open):
            server.preemptions.learn(rate)
        facts: _Facts = {
            "per_min": round(rate, 3),
            "usual_per_min": round(server.preemptions.mean, 3),
            "limit_per_min": round(limit, 3),
        }
        return _Judged(
            "serving.preemptions", "preempted", over, rate <= 0.5 * limit, rate, server.preemptions.mean, "per_min",
            rate / limit, 1.0, int(step[0]), min(1.0, rate / (10.0 * limit)), facts,
        )  # fmt: skip

    def _ttft(self, server: _Server, values: Mapping[str, float], at: float) -> _Judged | None:
        if "ttft_s_sum" not in values or "ttft_s_count" not in values:
            return None
        p, now = self.params, (values["ttft_s_sum"], values["ttft_s_count"])
        base = server.ttft_base
        if base is None or now[1] < base[1] or now[0] < base[0]:
            server.ttft_base, server.ttft_base_at = now, at
            return None
        n = now[1] - base[1]
        if n < p.ttft_requests:
            return None  # the mean in the making goes on until it rests on enough
        server.ttft_base, server.ttft_base_at = now, at
        mean_s = max(1e-6, (now[0] - base[0]) / n)
        level = server.ttft
        z = level.z(math.log(mean_s), 0.25) if level.n >= p.warmup else 0.0
        expected_s = math.exp(level.mean) if level.n else mean_s
        over = z >= p.ttft_z and mean_s >= p.ttft_factor * expected_s
        gate = server.gates.get("serving.ttft")
        is_open = gate is not None and gate.is_open
        if not over and not is_open and z < 3.0:
            level.learn(math.log(mean_s))  # scored before learned; what is anomalous does not teach
        facts: _Facts = {
            "ttft_s": round(mean_s, 4),
            "usual_ttft_s": round(expected_s, 4),
            "requests": int(n),
            "z": round(z, 2),
        }
        calm = z < 0.5 * p.ttft_z or mean_s < 1.2 * expected_s
        return _Judged(
            "serving.ttft", "slow", over, calm, mean_s, expected_s, "s", max(0.0, z) ** 2 / 2, p.ttft_z**2 / 2, int(n),
            max(0.0, 1.0 - expected_s / mean_s), facts,
        )  # fmt: skip

    def _tell(self, s: GpuSample, server: _Server, j: _Judged, out: list[Anomaly]) -> None:
        gate = server.gates.setdefault(j.signal, Gate())
        phase = gate.step(s.at, j.over, j.calm, self.params.dwell)
        facts = j.facts
        level = {"serving.preemptions": server.preemptions, "serving.ttft": server.ttft}.get(j.signal)
        if level is not None and gate.is_open and s.at - gate.since >= self.params.relearn_s:
            phase, facts = (
                "off",
                {**facts, "over": f"away for {self.params.relearn_s:.0f} s: taken as the new normal"},
            )
            level.n, level.mean, level.var = 0, 0.0, 0.0
        if phase is None:
            return
        labels = {name: value for name in _LABELS if (value := str(getattr(s, name)))}
        identity: dict[str, str] = {name: labels[name] for name in _KEY if name in labels}
        out.append(
            Anomaly(
                id=anomaly_id(self.kind, j.signal, "", identity, gate.since), detector=self.kind, signal=j.signal,
                labels=labels, at=s.at, since=gate.since, phase=phase, klass=j.klass, observed=round(j.observed, 6),
                expected=round(j.expected, 6), unit=j.unit, score=round(j.score, 4), threshold=round(j.threshold, 4),
                n=j.n, impact=round(min(1.0, j.impact), 4), evidence=facts,
            )
        )  # fmt: skip
        if phase == "off":
            gate.close()

    def snapshot(self) -> bytes:
        return pack_state(
            self.kind, _VERSION, [[list(key), _pack(server)] for key, server in self._servers.items()]
        )

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError for bytes of another detector or version."""
        self._servers = OrderedDict(
            (tuple(key), _load(packed)) for key, packed in unpack_state(state, self.kind, _VERSION)
        )


def _pack(s: _Server) -> list[Any]:
    return [
        s.last_at, s.peak, {k: g.pack() for k, g in s.gates.items()}, s.preempted.pack(), s.preemptions.pack(), s.ttft.pack(),
        s.ttft_base, s.ttft_base_at,
    ]  # fmt: skip


def _load(s: Sequence[Any]) -> _Server:
    server = _Server()
    server.last_at, server.peak = float(s[0]), float(s[1])
    server.gates = {k: Gate.load(g) for k, g in s[2].items()}
    server.preempted, server.preemptions, server.ttft = Counter.load(s[3]), Level.load(s[4]), Level.load(s[5])
    server.ttft_base = None if s[6] is None else (float(s[6][0]), float(s[6][1]))
    server.ttft_base_at = float(s[7])
    return server


__all__ = ["Params", "ServingSaturation"]
