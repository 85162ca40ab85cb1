"""Exporters' pages become samples in our names and units; what a GPU does not support is absent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.events import GpuSample
from flyball.core.ports import Decoded, Format
from flyball.streams.formats.prometheus import Prometheus

PROMETHEUS = Prometheus()
FORMAT: Format = PROMETHEUS
AT = 1_800_000_000.0

DCGM = """
# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1",device="nvidia0",modelName="NVIDIA H100",Hostname="node-1",pod="llm-0",namespace="ml"} 87
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-2",device="nvidia1",modelName="NVIDIA H100",Hostname="node-1",pod="",namespace=""} 0
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-1",Hostname="node-1"} 1024
DCGM_FI_DEV_XID_ERRORS{gpu="0",UUID="GPU-1",Hostname="node-1"} 79
DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-1",Hostname="node-1"} 1980
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-1",Hostname="node-1"} 5000
DCGM_FI_DEV_POWER_VIOLATION{gpu="0",UUID="GPU-1",Hostname="node-1"} 2500000000
DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL{gpu="0",UUID="GPU-1",Hostname="node-1"} 2
DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL{gpu="0",UUID="GPU-1",Hostname="node-1"} 3
DCGM_FI_DEV_MEMORY_TEMP{gpu="0",UUID="GPU-1",Hostname="node-1"} 9223372036854775794
DCGM_FI_DEV_ENC_UTIL{gpu="0",UUID="GPU-1",Hostname="node-1"} 0
"""

VLLM = """
vllm:num_requests_running{engine="0",model_name="llama"} 5.0
vllm:num_requests_running{engine="1",model_name="llama"} 4.0
vllm:num_requests_waiting{engine="0",model_name="llama"} 12.0
vllm:kv_cache_usage_perc{engine="0",model_name="llama"} 0.91
vllm:kv_cache_usage_perc{engine="1",model_name="llama"} 0.40
vllm:num_preemptions_total{engine="0",model_name="llama"} 3.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="llama"} 0.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="llama"} 12.5
vllm:time_to_first_token_seconds_count{engine="0",model_name="llama"} 100.0
vllm:prompt_tokens_total{engine="0",model_name="llama"} 1e6
python_gc_objects_collected_total{generation="0"} 5
"""

SGLANG = """
sglang:num_running_reqs{model_name="qwen"} 7
sglang:num_queue_reqs{model_name="qwen"} 1
sglang:token_usage{model_name="qwen"} 0.5
sglang:num_retracted_requests_total{model_name="qwen"} 2
sglang:queue_time_seconds_sum{model_name="qwen"} 4.5
"""


def samples(text: str, at: float = AT, target: str = "gpu-exporter:9400") -> list[GpuSample]:
    decoded = PROMETHEUS.decode_at(text.encode(), at, target)
    assert decoded.rejected == []
    return [e for e in decoded.events if isinstance(e, GpuSample)]


def test_a_gpu_is_one_sample_in_base_units() -> None:
    first, second = samples(DCGM)
    assert first == GpuSample(
        at=AT,
        node="node-1",
        gpu="GPU-1",
        hardware="NVIDIA H100",
        pod="llm-0",
        namespace="ml",
        values={
            "gpu_util_ratio": 0.87,
            "fb_used_bytes": 1024 * 1024 * 1024.0,
            "xid": 79.0,
            "sm_clock_hz": 1.98e9,
            "energy_j_total": 5.0,
            "power_violation_s_total": 2.5,
            "nvlink_errors_total": 5.0,
        },
    )
    assert (second.gpu, second.pod, second.values) == ("GPU-2", "", {"gpu_util_ratio": 0.0})


def test_labels_before_and_after_the_renaming_are_one() -> None:
    renamed = DCGM.replace("Hostname=", "hostname=").replace("UUID=", "uuid=")
    assert samples(renamed) == samples(DCGM)


def test_a_mig_slice_is_a_gpu_of_its_own() -> None:
    line = 'DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-1",GPU_I_ID="%d",Hostname="n"} 0.5\n'
    assert [s.gpu for s in samples(line % 1 + line % 2)] == ["GPU-1/1", "GPU-1/2"]


def test_an_inference_server_is_one_sample_of_all_its_engines() -> None:
    (sample,) = samples(VLLM, target="llm:8000")
    assert (sample.deployment, sample.model, sample.gpu) == ("llm:8000", "llama", "")
    assert sample.values == {
        "requests_running": 9.0,
        "requests_waiting": 12.0,
        "kv_cache_ratio": 0.91,
        "preemptions_total": 3.0,
        "ttft_s_sum": 12.5,
        "ttft_s_count": 100.0,
        "prompt_tokens_total": 1e6,
    }


def test_sglang_is_read_by_its_own_names() -> None:
    (sample,) = samples(SGLANG)
    assert sample.values == {
        "requests_running": 7.0,
        "requests_waiting": 1.0,
        "kv_cache_ratio": 0.5,
        "preemptions_total": 2.0,
        "queue_s_sum": 4.5,
    }


def test_a_time_in_the_text_wins_and_without_any_the_sample_is_rejected() -> None:
    timed = 'vllm:num_requests_running{model_name="m"} 1 1800000005000\n'
    assert samples(timed)[0].at == 1_800_000_005.0
    assert [e.at for e in FORMAT.decode(timed.encode()).events] == [1_800_000_005.0]
    untimed = FORMAT.decode(b'vllm:num_requests_running{model_name="m"} 1\n')
    assert (untimed.events, [r.reason for r in untimed.rejected]) == ([], ["timestamp"])


@pytest.mark.parametrize(
    "line",
    [
        'vllm:num_requests_running{model_name="m" 1',
        'vllm:num_requests_running{model_name="m"} many',
        "vllm:num_requests_running",
    ],
)
def test_a_bad_line_is_told_and_the_others_count(line: str) -> None:
    decoded = PROMETHEUS.decode_at(f"{line}\nvllm:num_requests_waiting 2\n".encode(), AT)
    assert (len(decoded.events), [r.reason for r in decoded.rejected]) == (1, ["prometheus"])


def test_escapes_in_label_values_are_undone() -> None:
    (sample,) = samples('vllm:num_requests_running{model_name="a\\"b\\\\c,}"} 1\n')
    assert sample.model == 'a"b\\c,}'


def test_nan_is_no_value() -> None:
    assert PROMETHEUS.decode_at(b'vllm:num_requests_running{model_name="m"} NaN\n', AT) == Decoded(
        [], [], {"other_metric": 1}
    )


@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise(body: bytes) -> None:
    PROMETHEUS.decode_at(body, AT)


@given(st.text(alphabet='vllm:num_requests_running{}="\\ 0123456789.e-+NaInf\n', max_size=120))
def test_no_text_makes_it_raise(text: str) -> None:
    PROMETHEUS.decode_at(text.encode(), AT)
