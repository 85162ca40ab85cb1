"""Prometheus text exposition of dcgm-exporter, vLLM and SGLang: one `GpuSample` per GPU, one per server and model.

Only lines of metrics that we use are parsed further than their name: an inference server's page is mostly histogram
buckets. Counters and sums are taken as they stand (cumulative); what changed is the detectors' business.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

from flyball.core.events import EARLIEST, LATEST, Event, GpuSample
from flyball.core.gpu_metrics import UNSUPPORTED_ABOVE
from flyball.core.ports import Decoded, Rejected
from flyball.streams.formats._names import label
from flyball.streams.formats._options import FormatOptions

_MIB: Final = 1_048_576.0

_DCGM: Final[dict[str, tuple[str, float]]] = {
    "DCGM_FI_DEV_GPU_UTIL": ("gpu_util_ratio", 0.01),
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": ("gr_engine_active_ratio", 1.0),
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": ("tensor_active_ratio", 1.0),
    "DCGM_FI_PROF_DRAM_ACTIVE": ("dram_active_ratio", 1.0),
    "DCGM_FI_PROF_SM_ACTIVE": ("sm_active_ratio", 1.0),
    "DCGM_FI_DEV_FB_USED": ("fb_used_bytes", _MIB),
    "DCGM_FI_DEV_FB_FREE": ("fb_free_bytes", _MIB),
    "DCGM_FI_DEV_POWER_USAGE": ("power_w", 1.0),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("energy_j_total", 1e-3),
    "DCGM_FI_DEV_GPU_TEMP": ("gpu_temp_c", 1.0),
    "DCGM_FI_DEV_MEMORY_TEMP": ("memory_temp_c", 1.0),
    "DCGM_FI_DEV_SM_CLOCK": ("sm_clock_hz", 1e6),
    "DCGM_FI_DEV_XID_ERRORS": ("xid", 1.0),
    "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": ("ecc_dbe_total", 1.0),
    "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL": ("ecc_sbe_total", 1.0),
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": ("remapped_rows_uncorrectable", 1.0),
    "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS": ("remapped_rows_correctable", 1.0),
    "DCGM_FI_DEV_ROW_REMAP_FAILURE": ("row_remap_failure", 1.0),
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": ("nvlink_bandwidth_total", 1.0),
    "DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL": ("nvlink_errors_total", 1.0),
    "DCGM_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL": ("nvlink_errors_total", 1.0),
    "DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL": ("nvlink_errors_total", 1.0),
    "DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL": ("nvlink_errors_total", 1.0),
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": ("pcie_replay_total", 1.0),
    "DCGM_FI_DEV_POWER_VIOLATION": ("power_violation_s_total", 1e-9),
    "DCGM_FI_DEV_THERMAL_VIOLATION": ("thermal_violation_s_total", 1e-9),
}
"""dcgm-exporter's name → ours, and what its unit is multiplied by. Equal targets of one GPU are added up."""

_SERVING: Final[dict[str, str]] = {
    "num_requests_running": "requests_running", "num_running_reqs": "requests_running",
    "num_requests_waiting": "requests_waiting", "num_queue_reqs": "requests_waiting",
    "kv_cache_usage_perc": "kv_cache_ratio", "gpu_cache_usage_perc": "kv_cache_ratio", "token_usage": "kv_cache_ratio",
    "num_preemptions": "preemptions_total", "num_preemptions_total": "preemptions_total",
    "num_retracted_requests_total": "preemptions_total",
    "admission_rejections_total": "requests_aborted_total", "admission_rejections": "requests_aborted_total",
    "num_aborted_requests_total": "requests_aborted_total",
    "time_to_first_token_seconds_sum": "ttft_s_sum", "time_to_first_token_seconds_count": "ttft_s_count",
    "inter_token_latency_seconds_sum": "itl_s_sum", "inter_token_latency_seconds_count": "itl_s_count",
    "time_per_output_token_seconds_sum": "itl_s_sum", "time_per_output_token_seconds_count": "itl_s_count",
    "e2e_request_latency_seconds_sum": "e2e_s_sum", "e2e_request_latency_seconds_count": "e2e_s_count",
    "request_queue_time_seconds_sum": "queue_s_sum", "request_queue_time_seconds_count": "queue_s_count",
    "queue_time_seconds_sum": "queue_s_sum", "queue_time_seconds_count": "queue_s_count",
    "prefix_cache_queries_total": "prefix_cache_queries_total", "prefix_cache_queries": "prefix_cache_queries_total",
    "prefix_cache_hits_total": "prefix_cache_hits_total", "prefix_cache_hits": "prefix_cache_hits_total",
    "cached_tokens_total": "prefix_cache_hits_total",
    "prompt_tokens_total": "prompt_tokens_total", "prompt_tokens": "prompt_tokens_total",
    "generation_tokens_total": "generation_tokens_total", "generation_tokens": "generation_tokens_total",
}  # fmt: skip
"""vLLM's and SGLang's names without their prefix → ours. Old and new names never stand on one page."""

_HIGHEST: Final = frozenset({"kv_cache_ratio", "xid"})
"""Taken as the highest of several lines (engines, tensor-parallel ranks); everything else is added up."""

_LABEL: Final = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"')
_LINE: Final = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+(-?\d+))?\s*$")
_ESCAPES: Final = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


class _Sample:
    """What the lines of one GPU or one server have said so far."""

    __slots__ = ("at", "labels", "values")

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.values: dict[str, float] = {}
        self.at: float | None = None

    def take(self, name: str, value: float, at: float | None) -> None:
        before = self.values.get(name)
        if before is not None:
            value = max(before, value) if name in _HIGHEST else before + value
        self.values[name] = value
        if at is not None:
            self.at = at if self.at is None else max(self.at, at)


class Prometheus:
    """A scraped page. Exporters mostly write no times: `decode_at` is given the time of the scrape; `decode`
    takes the times in the text and rejects samples without one."""

    kind: ClassVar[str] = "prometheus"

    def __init__(self, options: FormatOptions | None = None) -> None:
        self._options = options or FormatOptions()

    def decode(self, body: bytes, content_type: str = "") -> Decoded:
        return self._decode(body, None, "")

    def decode_at(self, body: bytes, at: float, target: str = "") -> Decoded:
        """The page as scraped from `target` (host:port or a name) at `at`, seconds since the epoch; a time in the text wins."""
        return self._decode(body, at, target)

    def _decode(self, body: bytes, at: float | None, target: str) -> Decoded:
        rejected: list[Rejected] = []
        samples: dict[tuple[str, ...], _Sample] = {}
        ignored = 0
        for number, line in enumerate(body.decode("utf-8", "replace").splitlines()):
            if not line or line[0] == "#" or line.isspace():
                continue
            name = line[: line.find("{")] if "{" in line else line.split(None, 1)[0]
            known = _known(name.strip())
            if known is None:
                ignored += 1
                continue
            found = _LINE.match(line)
            value = _value(found[3]) if found is not None else None
            if found is None or value is None:
                detail = f'line {number + 1} is no sample; `name{{label="value"}} number` is expected.'
                rejected.append(Rejected("prometheus", detail, line.encode(), number))
                continue
            if abs(value) > UNSUPPORTED_ABOVE or value != value:
                ignored += 1  # the GPU does not have this field
                continue
            target_name, factor, is_gpu = known
            labels = {k.lower(): _unescaped(v) for k, v in _LABEL.findall(found[2] or "")}
            key, described = _gpu(labels, target) if is_gpu else _server(labels, target)
            sample = samples.get(key)
            if sample is None:
                sample = samples[key] = _Sample(described)
            else:
                for extra, text in described.items():
                    if text and not sample.labels.get(extra):
                        sample.labels[extra] = text
            sample.take(target_name, value * factor, float(found[4]) / 1e3 if found[4] else None)
        events: list[Event] = []
        for index, sample in enumerate(samples.values()):
            when = sample.at if sample.at is not None else at
            if when is None or not EARLIEST <= when < LATEST:
                said = "no time" if when is None else f"the time {when:.0f}"
                detail = f"a sample with {said}; give the time of the scrape, or timestamps in milliseconds in the text."
                rejected.append(Rejected("timestamp", detail, b"", index))
            else:
                events.append(GpuSample(at=when, values=sample.values, **sample.labels))
        if not samples and not rejected and not ignored and body.strip():
            rejected.append(Rejected("prometheus", "no sample line in the Prometheus text format.", body))
        return Decoded(events, rejected, {"other_metric": ignored} if ignored else {})


def _known(name: str) -> tuple[str, float, bool] | None:
    if name[:5] == "DCGM_":
        found = _DCGM.get(name)
        return (found[0], found[1], True) if found is not None else None
    prefix, _, rest = name.partition(":")
    if prefix in ("vllm", "sglang"):
        serving = _SERVING.get(rest)
        return (serving, 1.0, False) if serving is not None else None
    return None


def _value(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _unescaped(text: str) -> str:
    return label(re.sub(r'\\[\\"n]', lambda m: _ESCAPES[m[0]], text) if "\\" in text else text)


def _gpu(labels: dict[str, str], target: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Key and fields of a GPU. Exporters before and after a renaming write `Hostname`, `UUID` or `hostname`, `uuid`."""
    node = labels.get("hostname") or labels.get("node") or labels.get("instance") or target
    gpu = labels.get("uuid") or labels.get("gpu") or labels.get("device", "")
    if labels.get("gpu_i_id"):
        gpu = f"{gpu}/{labels['gpu_i_id']}"  # a MIG slice has metrics of its own
    described = {
        "node": node,
        "gpu": gpu,
        "hardware": labels.get("modelname", ""),
        "pod": labels.get("exported_pod") or labels.get("pod", ""),
        "namespace": labels.get("exported_namespace") or labels.get("namespace", ""),
    }
    return ("gpu", node, gpu), described


def _server(labels: dict[str, str], target: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Key and fields of an inference server and model; its engines and ranks are one."""
    deployment = target or labels.get("instance") or labels.get("server", "")
    model = labels.get("model_name") or labels.get("model", "")
    described = {
        "deployment": deployment,
        "model": model,
        "pod": labels.get("pod", ""),
        "namespace": labels.get("namespace", ""),
        "node": labels.get("node", ""),
    }
    return ("server", deployment, model), described
