"""GPU faults: XIDs as edges, ECC and row remapping, link errors, and clocks held down by heat or power."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, ClassVar, Final, Literal

import yaml

from flyball.core.anomaly import Anomaly, Phase, anomaly_id
from flyball.core.codec import pack_state, unpack_state
from flyball.core.errors import ConfigError
from flyball.core.events import Event, GpuSample
from flyball.core.gpu_metrics import UNSUPPORTED_ABOVE
from flyball.detectors._budget import PageBudget
from flyball.detectors._gates import Counter, Dwell, Gate, Level

_VERSION: Final = 1
_Facts = dict[str, float | int | str | list[str]]
_LABELS: Final = ("node", "gpu", "hardware", "pod", "namespace", "deployment", "model", "app", "team")
_RECENT: Final = 512  # XID edges remembered over all GPUs


@dataclass(frozen=True, slots=True)
class Params:
    """Settings of `gpu_fault`.

    Args:
        memory_s: how long an XID on a GPU counts as "the same again".
        together_s: XIDs on several GPUs of one workload within this are one cause.
        ignored_rate: XIDs of the bucket `ignore` on one GPU within `memory_s` that are told after all.
        calm_s: how long the last XID must read 0 before a fault that a reset clears is over.
        pcie_replays_per_min, nvlink_errors_per_min: more than this, for as long as `dwell` says, is a fault.
        thermal_ratio: share of time that clocks are held down by heat, over which `gpu.throttle` is told.
        power_ratio: how much more of the time than learned they are held down by power. Many GPUs always run at their cap.
        dwell: of the rates and of throttling.
        warmup: samples from which the usual power capping is learned.
        still_every_s: the least time between two `still`.
        max_gpus: GPUs remembered; the one silent longest is forgotten first.

    Raises: ConfigError for values out of range.
    """

    memory_s: float = 86_400.0
    together_s: float = 600.0
    ignored_rate: int = 3
    calm_s: float = 300.0
    pcie_replays_per_min: float = 60.0
    nvlink_errors_per_min: float = 10.0
    thermal_ratio: float = 0.2
    power_ratio: float = 0.3
    dwell: Dwell = field(default_factory=lambda: Dwell(dwell_s=60.0, samples=3, recover_s=120.0))
    warmup: int = 10
    still_every_s: float = 30.0
    max_gpus: int = 20_000

    def __post_init__(self) -> None:
        for name in (
            "memory_s",
            "together_s",
            "pcie_replays_per_min",
            "nvlink_errors_per_min",
            "thermal_ratio",
            "power_ratio",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}", where="gpu_fault")
        for name in ("ignored_rate", "warmup", "max_gpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}", where="gpu_fault")


@dataclass(frozen=True, slots=True)
class _Bucket:
    name: str
    blame: str
    action: str
    impact: float
    hold_s: float
    clears: bool


class XidTable:
    """The packaged table of XIDs: bucket, default action and blame of each; see `xid.yaml`."""

    def __init__(self) -> None:
        text = resources.files("flyball.detectors").joinpath("xid.yaml").read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        self._buckets = {
            name: _Bucket(
                name,
                b["blame"],
                b["action"],
                float(b["impact"]),
                float(b["hold_s"]),
                bool(b.get("clears", False)),
            )
            for name, b in data["buckets"].items()
        }
        self._bucket_of: dict[int, str] = {}
        for bucket, xids in data["of_bucket"].items():
            for xid in xids:
                if xid in self._bucket_of:
                    raise ConfigError(
                        f"XID {xid} stands in {self._bucket_of[xid]} and in {bucket}", where="xid.yaml"
                    )
                self._bucket_of[int(xid)] = bucket
        self._names: dict[int, str] = {int(k): str(v) for k, v in data["names"].items()}
        self.pairs: Mapping[Any, Any] = data["pairs"]
        self.within_s = float(data["pairs"]["within_s"])
        self.recovery_actions: dict[int, str] = {int(k): str(v) for k, v in data["recovery_actions"].items()}

    def bucket(self, xid: int) -> _Bucket:
        return self._buckets[self._bucket_of.get(xid, "unknown")]

    def named(self, bucket: str) -> _Bucket:
        return self._buckets[bucket]

    def name(self, xid: int) -> str:
        return self._names.get(xid, f"XID {xid}")


@dataclass(frozen=True, slots=True)
class _Edge:
    """One XID as it came up."""

    at: float
    gpu: str
    node: str
    workload: str
    xid: int


@dataclass(slots=True)
class _Fault:
    """A fault that was told and is not over."""

    id: str
    signal: str
    klass: str
    labels: dict[str, str]
    since: float
    last_at: float
    said_at: float
    hold_s: float
    clears: bool
    count: int
    impact: float
    observed: float
    unit: str
    facts: _Facts


class _Gpu:
    __slots__ = ("cleared_at", "counters", "faults", "gates", "last_at", "levels", "xid")

    def __init__(self) -> None:
        self.last_at = -math.inf
        self.xid: int | None = None
        self.cleared_at = -math.inf
        self.counters: dict[str, Counter] = {}
        self.gates: dict[str, Gate] = {}
        self.levels: dict[str, Level] = {}
        self.faults: dict[str, _Fault] = {}


class GpuFault:
    """Tells GPU faults from the exporter's gauges and counters.

    `gpu.fault`: `klass` is the XID's bucket (`restart_app`, `reset_gpu`, `restart_bm`, …), or `ecc_dbe`, `row_remap_failure`,
    `pcie_replay`, `nvlink`. `gpu.throttle`: `thermal` or `power`. The evidence names the XID, the default action and where to
    look first (`suspect`): the same XID again on one GPU speaks for hardware, on several GPUs of one workload for
    the workload.

    The exporter shows the last XID and never clears it, so an XID is told when the value changes. The first sample of a GPU only
    says where it stands: an XID that was there before is not told again at every start.

    When it misleads: the same XID twice in a row cannot be seen, nor two XIDs between scrapes. An exporter that restarts
    shows 0 and looks like a reset. `count` is therefore a lower bound.

    Args:
        params: see `Params`.
        budget: accepted so that all detectors are made alike; these are rules without probability.

    Raises: ConfigError when params or the packaged table are out of order.
    Source: NVIDIA's XID catalogue (October 2025), by way of `xid.yaml`.
    """

    kind: ClassVar[str] = "gpu_fault"
    reads: ClassVar[Literal["events"]] = "events"
    types: ClassVar[tuple[type, ...]] = (GpuSample,)

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params or Params()
        self.table = XidTable()
        self._gpus: OrderedDict[str, _Gpu] = OrderedDict()
        self._edges: deque[_Edge] = deque(maxlen=_RECENT)

    def feed(self, batch: Sequence[Event]) -> list[Anomaly]:
        """Samples in order; samples of inference servers (no GPU) are passed over."""
        out: list[Anomaly] = []
        for event in batch:
            if type(event) is GpuSample and event.gpu and event.values:
                self._sample(event, out)
        return out

    def tick(self, now: float) -> list[Anomaly]:
        """Nothing follows from time alone: a GPU that went silent is neither well nor ill."""
        return []

    def _sample(self, s: GpuSample, out: list[Anomaly]) -> None:
        # The UUID is the GPU wherever it is scraped from; an index means something only on its node.
        key = s.gpu if len(s.gpu) > 8 else f"{s.node}/{s.gpu}"
        gpu = self._gpus.get(key)
        first = gpu is None
        if gpu is None:
            gpu = self._gpus[key] = _Gpu()
            while len(self._gpus) > self.params.max_gpus:
                self._gpus.popitem(last=False)
        else:
            self._gpus.move_to_end(key)
        if s.at < gpu.last_at:
            return  # a late sample would look like a change back and forth
        gpu.last_at = s.at
        values = {k: v for k, v in s.values.items() if math.isfinite(v) and v < UNSUPPORTED_ABOVE}
        self._xid(s, key, gpu, values, first, out)
        self._counted(s, gpu, values, out)
        self._rates(s, gpu, values, out)
        self._throttle(s, gpu, values, out)
        self._age(s, gpu, out)

    def _xid(
        self, s: GpuSample, key: str, gpu: _Gpu, values: Mapping[str, float], first: bool, out: list[Anomaly]
    ) -> None:
        if "xid" not in values:
            return
        xid, before = int(values["xid"]), gpu.xid
        gpu.xid = xid
        if xid == 0:
            if before != 0:
                gpu.cleared_at = s.at
            return
        gpu.cleared_at = -math.inf
        if first or xid == before:
            return
        edge = _Edge(
            s.at, key, s.node, s.deployment or (f"{s.namespace}/{s.pod}" if s.pod else "") or s.app, xid
        )
        near = [e for e in self._edges if 0 <= s.at - e.at <= self.params.memory_s]
        self._edges.append(edge)
        self._tell_xid(s, gpu, edge, near, values, out)

    def _tell_xid(
        self,
        s: GpuSample,
        gpu: _Gpu,
        edge: _Edge,
        near: Sequence[_Edge],
        values: Mapping[str, float],
        out: list[Anomaly],
    ) -> None:
        bucket, facts = self._explain(edge, near, values)
        if bucket.name == "ignore":
            seen = 1 + sum(e.gpu == edge.gpu and self.table.bucket(e.xid).name == "ignore" for e in near)
            if seen < self.params.ignored_rate:
                return
            facts["seen"] = seen
        pair = self.table.pairs.get(edge.xid, {})
        if pair.get("consequence"):
            for fault in gpu.faults.values():
                if fault.unit == "xid" and s.at - fault.last_at <= self.table.within_s:
                    fault.facts["followed_by"] = f"XID {edge.xid} ({self.table.name(edge.xid)})"
                    fault.last_at = s.at
                    return
        self._tell(s, gpu, "gpu.fault", bucket.name, bucket, float(edge.xid), "xid", facts, out)

    def _explain(
        self, edge: _Edge, near: Sequence[_Edge], values: Mapping[str, float]
    ) -> tuple[_Bucket, _Facts]:
        """The bucket that an XID falls into with what is around it, and the facts for a person."""
        table, p = self.table, self.params
        bucket = table.bucket(edge.xid)
        again = [e for e in near if e.gpu == edge.gpu and e.xid == edge.xid]
        others = sorted(
            {
                e.gpu
                for e in near
                if e.xid == edge.xid and e.gpu != edge.gpu and edge.at - e.at <= p.together_s
                and e.workload == edge.workload and edge.workload
            }
        )  # fmt: skip
        beside = [e for e in near if e.node == edge.node and edge.at - e.at <= table.within_s]
        suspect, why, action = bucket.blame, "the XID's bucket", bucket.action
        if others:
            suspect, why = "workload", f"the same XID on {len(others) + 1} GPUs of {edge.workload}"
        elif again:
            workloads = {e.workload for e in again} | {edge.workload}
            suspect = "gpu"
            why = f"the same XID {len(again) + 1} times on this GPU" + (
                f", under {len(workloads)} workloads" if len(workloads) > 1 else ""
            )
        pair = table.pairs.get(edge.xid)
        if pair:
            bucket, action, suspect, why = self._paired(edge, beside, pair, bucket, suspect, why)
        facts: _Facts = {
            "xid": edge.xid,
            "name": table.name(edge.xid),
            "bucket": bucket.name,
            "action": action,
            "suspect": suspect,
            "why": why,
            "same_gpu_before": len(again),
        }
        if others:
            facts["other_gpus"] = others[:8]
        if beside:
            facts["xids_beside"] = sorted({f"{e.xid} on {e.gpu}" for e in beside})[:8]
        if "recovery_action" in values:
            # What the driver itself asks for outranks any table.
            asked = table.recovery_actions.get(int(values["recovery_action"]), "unknown")
            facts["recovery_action"] = asked
            if asked not in ("none", "unknown"):
                facts["action"] = asked
        return bucket, facts

    def _paired(
        self,
        edge: _Edge,
        beside: Sequence[_Edge],
        pair: Mapping[Any, Any],
        bucket: _Bucket,
        suspect: str,
        why: str,
    ) -> tuple[_Bucket, str, str, str]:
        for other, then in pair.get("with", {}).items():
            if any(e.xid == other and e.gpu == edge.gpu for e in beside):
                found = self.table.named(then["bucket"])
                return found, str(then["action"]), found.blame, f"together with XID {other}"
        several = pair.get("several_gpus")
        gpus = {e.gpu for e in beside if e.xid == edge.xid} | {edge.gpu}
        if several and len(gpus) > 1:
            return bucket, str(several["action"]), str(several["blame"]), f"{len(gpus)} GPUs of the node"
        return (
            bucket,
            str(pair.get("alone", bucket.action)),
            suspect,
            why if why != "the XID's bucket" else "no XID beside it",
        )

    def _counted(self, s: GpuSample, gpu: _Gpu, values: Mapping[str, float], out: list[Anomaly]) -> None:
        reset = self.table.named("reset_gpu")
        if "ecc_dbe_total" in values:
            step = gpu.counters.setdefault("ecc_dbe", Counter()).step(values["ecc_dbe_total"], s.at)
            if step is not None and step[0] > 0:
                facts: _Facts = {
                    "errors": step[0],
                    "within_s": round(step[1], 3),
                    "suspect": "gpu",
                    "action": reset.action,
                }
                self._tell(s, gpu, "gpu.fault", "ecc_dbe", reset, step[0], "errors", facts, out)
        if values.get("row_remap_failure", 0.0) >= 1.0:
            # A state, not an event: true at the first sample means true now.
            action = "drain the GPU and contact support: no spare rows are left"
            facts = {"row_remap_failure": values["row_remap_failure"], "suspect": "gpu", "action": action}
            self._tell(s, gpu, "gpu.fault", "row_remap_failure", reset, 1.0, "failures", facts, out)

    def _rates(self, s: GpuSample, gpu: _Gpu, values: Mapping[str, float], out: list[Anomaly]) -> None:
        p = self.params
        for klass, metric, limit in (
            ("pcie_replay", "pcie_replay_total", p.pcie_replays_per_min),
            ("nvlink", "nvlink_errors_total", p.nvlink_errors_per_min),
        ):
            if metric not in values:
                continue
            step = gpu.counters.setdefault(klass, Counter()).step(values[metric], s.at)
            if step is None:
                continue
            rate = 60.0 * step[0] / step[1]
            gate = gpu.gates.setdefault(klass, Gate())
            phase = gate.step(s.at, rate > limit, rate <= 0.5 * limit, p.dwell)
            facts: _Facts = {
                "per_min": round(rate, 3),
                "limit_per_min": limit,
                "suspect": "gpu",
                "metric": metric,
            }
            self._gated(s, gate, phase, "gpu.fault", klass, rate, limit, "per_min", 0.5, facts, out)

    def _throttle(self, s: GpuSample, gpu: _Gpu, values: Mapping[str, float], out: list[Anomaly]) -> None:
        p = self.params
        for klass, metric in (("thermal", "thermal_violation_s_total"), ("power", "power_violation_s_total")):
            if metric not in values:
                continue
            step = gpu.counters.setdefault(klass, Counter()).step(values[metric], s.at)
            if step is None:
                continue
            ratio = min(1.0, step[0] / step[1])
            level = gpu.levels.setdefault(klass, Level())
            gate = gpu.gates.setdefault(klass, Gate())
            usual = level.mean if klass == "power" else 0.0
            limit = p.thermal_ratio if klass == "thermal" else usual + p.power_ratio
            ready = klass == "thermal" or level.n >= p.warmup
            over = ready and ratio > limit
            phase = gate.step(s.at, over, ratio <= (usual + limit) / 2, p.dwell)
            facts: _Facts = {
                "held_down_ratio": round(ratio, 4),
                "usual_ratio": round(usual, 4),
                "metric": metric,
            }
            if "gpu_temp_c" in values:
                facts["gpu_temp_c"] = values["gpu_temp_c"]
            if "power_w" in values:
                facts["power_w"] = values["power_w"]
            self._gated(
                s, gate, phase, "gpu.throttle", klass, ratio, limit, "ratio", min(1.0, ratio), facts, out
            )
            if not over and not gate.is_open:
                level.learn(ratio)  # what is anomalous does not teach

    def _gated(
        self, s: GpuSample, gate: Gate, phase: Phase | None, signal: str, klass: str, observed: float, limit: float,
        unit: str, impact: float, facts: _Facts, out: list[Anomaly],
    ) -> None:  # fmt: skip
        if phase is None:
            return
        labels = _labels(s)
        out.append(
            Anomaly(
                id=anomaly_id(self.kind, signal, klass, {"gpu": s.gpu, "node": s.node}, gate.since), detector=self.kind,
                signal=signal, labels=labels, at=s.at, since=gate.since, phase=phase, klass=klass, observed=observed,
                expected=limit, unit=unit, score=round(observed / limit, 4), threshold=1.0, n=gate.over_samples,
                impact=round(impact, 4), evidence=facts,
            )
        )  # fmt: skip
        if phase == "off":
            gate.close()

    def _tell(
        self, s: GpuSample, gpu: _Gpu, signal: str, klass: str, bucket: _Bucket, observed: float, unit: str,
        facts: _Facts, out: list[Anomaly],
    ) -> None:  # fmt: skip
        fault = gpu.faults.get(klass)
        if fault is None:
            labels = _labels(s)
            name = anomaly_id(self.kind, signal, klass, labels, s.at)
            fault = gpu.faults[klass] = _Fault(
                name, signal, klass, labels, s.at, s.at, s.at, bucket.hold_s, bucket.clears, 1, bucket.impact, observed, unit,
                facts,
            )  # fmt: skip
            out.append(self._say(fault, "on", s.at))
            return
        fault.count += 1
        fault.last_at, fault.observed, fault.facts = s.at, observed, facts
        if s.at - fault.said_at >= self.params.still_every_s:
            fault.said_at = s.at
            out.append(self._say(fault, "still", s.at))

    def _age(self, s: GpuSample, gpu: _Gpu, out: list[Anomaly]) -> None:
        for klass, fault in list(gpu.faults.items()):
            cleared = fault.clears and fault.unit == "xid" and s.at - gpu.cleared_at >= self.params.calm_s
            cleared = cleared and gpu.cleared_at >= fault.last_at
            if cleared or s.at - fault.last_at >= fault.hold_s:
                why = "the last XID reads 0 again" if cleared else f"nothing new for {fault.hold_s:.0f} s"
                fault.facts = {**fault.facts, "over": why}
                out.append(self._say(fault, "off", s.at))
                del gpu.faults[klass]
            elif s.at - fault.said_at >= self.params.still_every_s:
                fault.said_at = s.at
                out.append(self._say(fault, "still", s.at))

    def _say(self, f: _Fault, phase: Phase, at: float) -> Anomaly:
        return Anomaly(
            id=f.id, detector=self.kind, signal=f.signal, labels=dict(f.labels), at=at, since=f.since, phase=phase,
            klass=f.klass, observed=f.observed, expected=0.0, unit=f.unit, score=1.0, threshold=1.0, n=f.count,
            impact=f.impact, evidence={**f.facts, "count": f.count},
        )  # fmt: skip

    def snapshot(self) -> bytes:
        gpus = [[key, _pack_gpu(gpu)] for key, gpu in self._gpus.items()]
        edges = [[e.at, e.gpu, e.node, e.workload, e.xid] for e in self._edges]
        return pack_state(self.kind, _VERSION, [gpus, edges])

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError for bytes of another detector or version."""
        gpus, edges = unpack_state(state, self.kind, _VERSION)
        self._gpus = OrderedDict((key, _load_gpu(packed)) for key, packed in gpus)
        self._edges = deque((_Edge(float(e[0]), e[1], e[2], e[3], int(e[4])) for e in edges), maxlen=_RECENT)


def _labels(s: GpuSample) -> dict[str, str]:
    return {name: value for name in _LABELS if (value := str(getattr(s, name)))}


def _pack_gpu(g: _Gpu) -> list[Any]:
    return [
        g.last_at,
        g.xid,
        g.cleared_at,
        {k: c.pack() for k, c in g.counters.items()},
        {k: c.pack() for k, c in g.gates.items()},
        {k: c.pack() for k, c in g.levels.items()},
        [
            [f.id, f.signal, f.klass, f.labels, f.since, f.last_at, f.said_at, f.hold_s, f.clears, f.count, f.impact,
             f.observed, f.unit, f.facts]
            for f in g.faults.values()
        ],
    ]  # fmt: skip


def _load_gpu(s: Sequence[Any]) -> _Gpu:
    g = _Gpu()
    g.last_at, g.xid, g.cleared_at = float(s[0]), None if s[1] is None else int(s[1]), float(s[2])
    g.counters = {k: Counter.load(v) for k, v in s[3].items()}
    g.gates = {k: Gate.load(v) for k, v in s[4].items()}
    g.levels = {k: Level.load(v) for k, v in s[5].items()}
    g.faults = {f[2]: _Fault(*f) for f in s[6]}
    return g


__all__ = ["GpuFault", "Params", "XidTable"]
