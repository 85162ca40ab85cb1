"""GPU nodes and their inference servers, as an exporter scraped every 15 s tells of them.

Counters are sums over all earlier scrapes since the simulation began, so a sample depends on the seed and on its number
alone. A GPU that fell off the bus (XID 79) goes on saying `xid` and loses the rest, as dcgm-exporter shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from flyball.core.events import GpuSample
from flyball.lab._draws import generator
from flyball.lab.estate import Estate, GpuNode
from flyball.lab.faults import AnyFault, GpuThrottle, GpuXid, ServingSaturated
from flyball.lab.traffic import DAY_S

GIB: Final = float(2**30)
IGNORABLE_XID: Final = 43
"""An application was stopped: GPUs in good health report it now and then."""


class NodeState:
    """One node's counters and its server's; advanced by one scrape at a time."""

    def __init__(self, estate: Estate, seed: int, number: int) -> None:
        self.estate, self.seed, self.number = estate, seed, number
        self.node: GpuNode = estate.nodes[number]
        self._totals: dict[str, float] = {}
        self._last_xid = [0.0] * self.node.gpus
        self._queue = 0.0

    def _add(self, name: str, amount: float) -> float:
        self._totals[name] = self._totals.get(name, 0.0) + max(amount, 0.0)
        return self._totals[name]

    def scrape(
        self, at: float, index: int, faults: Sequence[AnyFault]
    ) -> tuple[list[GpuSample], list[AnyFault]]:
        """The node's samples at `at`, and the faults that they show."""
        rng = generator(self.seed, 5, self.number, index)
        live = [f for f in faults if f.start <= at < f.end]
        load = 0.55 * (1 - self.estate.daily_amplitude * np.cos(2 * np.pi * (at - 4 * 3600.0) / DAY_S))
        load = float(np.clip(load * rng.gamma(20) / 20, 0.02, 0.95))
        shown: list[AnyFault] = []
        samples = []
        for i, name in enumerate(self.node.gpu_names()):
            mine = [f for f in live if isinstance(f, GpuXid | GpuThrottle) and f.gpu == name]
            samples.append(self._gpu(at, i, name, load, mine, rng))
            shown += mine
        server = [
            f
            for f in live
            if isinstance(f, GpuXid | ServingSaturated) and f.deployment == self.node.deployment
        ]
        shown += [f for f in server if isinstance(f, ServingSaturated)]
        samples.append(self._server(at, load, server, rng))
        return samples, shown

    def _gpu(
        self,
        at: float,
        i: int,
        name: str,
        load: float,
        faults: list[GpuXid | GpuThrottle],
        rng: np.random.Generator,
    ) -> GpuSample:
        step_s, node = self.estate.scrape_s, self.node
        hot = any(isinstance(f, GpuThrottle) for f in faults)
        fallen = False
        busy = float(np.clip(load + 0.05 * rng.standard_normal(), 0.0, 1.0))
        if rng.random() < 0.15 * step_s / DAY_S / node.gpus:
            self._last_xid[i] = float(IGNORABLE_XID)
        if self._last_xid[i] != float(IGNORABLE_XID) and not any(isinstance(f, GpuXid) for f in faults):
            self._last_xid[i] = 0.0  # the fault is over: the GPU was reset
        for fault in faults:
            if isinstance(fault, GpuXid):
                self._last_xid[i], fallen = float(fault.xid), fault.xid == 79
        values = {"xid": self._last_xid[i]}
        if not fallen:
            power = 120.0 + 520.0 * busy + 10.0 * rng.standard_normal()
            used = (52.0 + 18.0 * busy) * GIB
            values |= {
                "gpu_util_ratio": min(1.0, busy * 1.25),
                "gr_engine_active_ratio": busy,
                "tensor_active_ratio": 0.35 * busy,
                "dram_active_ratio": 0.6 * busy,
                "fb_used_bytes": used,
                "fb_free_bytes": 80.0 * GIB - used,
                "power_w": max(power * (0.7 if hot else 1.0), 60.0),
                "energy_j_total": self._add(f"{i}.energy", power * step_s),
                "gpu_temp_c": (91.0 if hot else 38.0 + 30.0 * busy) + rng.standard_normal(),
                "memory_temp_c": (96.0 if hot else 46.0 + 34.0 * busy) + rng.standard_normal(),
                "sm_clock_hz": (1.08e9 if hot else 1.98e9 - 6e7 * busy) + 5e6 * rng.standard_normal(),
                "ecc_dbe_total": 0.0,
                "ecc_sbe_total": self._add(f"{i}.sbe", float(rng.random() < 2e-5)),
                "remapped_rows_uncorrectable": 0.0,
                "remapped_rows_correctable": 0.0,
                "row_remap_failure": 0.0,
                "nvlink_bandwidth_total": self._add(f"{i}.nvlink", 4e9 * busy * step_s),
                "pcie_replay_total": self._add(f"{i}.pcie", float(rng.random() < 1e-4)),
                "power_violation_s_total": self._add(f"{i}.power", 0.02 * step_s * max(busy - 0.85, 0.0)),
                "thermal_violation_s_total": self._add(f"{i}.thermal", 0.7 * step_s if hot else 0.0),
            }
        return GpuSample(
            at=at,
            node=node.name,
            gpu=name,
            hardware=node.hardware,
            pod=node.pod,
            namespace=node.namespace,
            # As an exporter tells it that maps pods to what they serve.
            deployment=node.deployment,
            values=values,
        )

    def _server(
        self, at: float, load: float, faults: list[GpuXid | ServingSaturated], rng: np.random.Generator
    ) -> GpuSample:
        step_s, node = self.estate.scrape_s, self.node
        saturated = any(isinstance(f, ServingSaturated) for f in faults)
        broken = any(isinstance(f, GpuXid) for f in faults)
        if saturated:
            self._queue = min(self._queue + 20.0 + 10.0 * rng.random(), 300.0)
        elif broken:
            self._queue = min(self._queue + 6.0 * rng.random(), 60.0)
        else:
            self._queue = (
                0.3 * self._queue if self._queue > 2 else float(rng.poisson(0.02 + 1.5 * max(load - 0.8, 0)))
            )
        done = (8.0 if broken else 20.0) * load * step_s
        ttft = 0.12 * (1 + 2 * max(load - 0.7, 0)) + self._queue * 0.05
        kv = (
            min(1.0, 0.97 + 0.03 * rng.random())
            if saturated
            else float(np.clip(0.25 + 0.5 * load, 0.05, 0.88))
        )
        tokens_in, tokens_out = done * 2400.0, done * 110.0
        values = {
            "requests_running": float(rng.poisson(48 if saturated else 36 * load * (0.5 if broken else 1.0))),
            "requests_waiting": float(int(self._queue)),
            "kv_cache_ratio": kv,
            "preemptions_total": self._add("preempt", float(rng.poisson(9.0)) if saturated else 0.0),
            "requests_aborted_total": self._add(
                "abort", float(rng.poisson(done * (0.3 if broken else 0.001)))
            ),
            "ttft_s_sum": self._add("ttft", done * ttft * float(rng.gamma(60) / 60)),
            "ttft_s_count": self._add("n", done),
            "itl_s_sum": self._add("itl", tokens_out * 0.009 * (1 + load)),
            "itl_s_count": self._add("itl_n", tokens_out),
            "e2e_s_sum": self._add("e2e", done * (ttft + 1.4)),
            "e2e_s_count": self._totals["n"],
            "queue_s_sum": self._add("queue", done * self._queue * 0.05),
            "queue_s_count": self._totals["n"],
            "prefix_cache_queries_total": self._add("queries", tokens_in),
            "prefix_cache_hits_total": self._add("hits", tokens_in * 0.4),
            "prompt_tokens_total": self._add("in", tokens_in),
            "generation_tokens_total": self._add("out", tokens_out),
        }
        return GpuSample(
            at=at, node=node.name, hardware=node.hardware, pod=node.pod, namespace=node.namespace,
            deployment=node.deployment, model=node.model, values=values,
        )  # fmt: skip
