"""Canonical names of `GpuSample.values`. Units stand in the names; counters end in `_total`.

GPU (per GPU): gpu_util_ratio, gr_engine_active_ratio, tensor_active_ratio, dram_active_ratio, sm_active_ratio, fb_used_bytes,
fb_free_bytes, power_w, energy_j_total, gpu_temp_c, memory_temp_c, sm_clock_hz, xid (the last XID, never cleared by the exporter),
ecc_dbe_total, ecc_sbe_total, remapped_rows_uncorrectable, remapped_rows_correctable, row_remap_failure, nvlink_bandwidth_total,
nvlink_errors_total, pcie_replay_total, power_violation_s_total, thermal_violation_s_total.

Inference server (per deployment and model): requests_running, requests_waiting, kv_cache_ratio, preemptions_total, requests_aborted_total,
ttft_s_sum, ttft_s_count (cumulative, of the exporter's histogram), itl_s_sum, itl_s_count, e2e_s_sum, e2e_s_count, queue_s_sum,
queue_s_count, prefix_cache_queries_total, prefix_cache_hits_total, prompt_tokens_total, generation_tokens_total.
"""

from __future__ import annotations

from typing import Final

UNSUPPORTED_ABOVE: Final = float(2**62)
"""dcgm-exporter writes huge sentinels for fields that a GPU does not have."""
