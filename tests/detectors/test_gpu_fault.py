"""XIDs as edges, and the other faults of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from flyball.core.anomaly import Anomaly
from flyball.core.errors import ConfigError
from flyball.core.events import GpuSample
from flyball.detectors.gpu_fault import GpuFault, Params, XidTable

T0 = 1_700_000_000.0
A, B = "GPU-aaaa-0001", "GPU-bbbb-0002"


def sample(at: float, gpu: str = A, *, node: str = "n1", pod: str = "llm-0", **values: float) -> GpuSample:
    return GpuSample(
        at=T0 + at,
        gpu=gpu,
        node=node,
        pod=pod,
        namespace="serving",
        values={k: float(v) for k, v in values.items()},
    )


def xids(*seen: int, gpu: str = A, start: float = 0.0, **more: Any) -> list[GpuSample]:
    return [sample(start + 30.0 * i, gpu, xid=x, **more) for i, x in enumerate(seen)]


def told(samples: Sequence[GpuSample], params: Params | None = None) -> list[Anomaly]:
    return GpuFault(params).feed(samples)


def opened(samples: Sequence[GpuSample], params: Params | None = None) -> list[Anomaly]:
    return [a for a in told(samples, params) if a.phase == "on"]


def test_an_xid_is_told_when_the_value_changes() -> None:
    found = opened(xids(0, 0, 79, 79, 79))
    assert [(a.signal, a.klass, a.observed, a.at) for a in found] == [
        ("gpu.fault", "restart_bm", 79.0, T0 + 60.0)
    ]
    assert found[0].evidence["suspect"] == "node"
    assert "reboot" in str(found[0].evidence["action"])
    assert found[0].labels == {"node": "n1", "gpu": A, "pod": "llm-0", "namespace": "serving"}


def test_an_old_xid_at_the_first_sample_is_not_told_again() -> None:
    assert told(xids(79, 79, 79)) == []
    assert [a.observed for a in opened(xids(31, 31, 79))] == [79.0]


def test_the_same_gpu_scraped_elsewhere_is_the_same_gpu() -> None:
    assert told([sample(0, node="n1", xid=79), sample(30, node="", xid=79)]) == []


@pytest.mark.parametrize(
    ("xid", "bucket", "suspect"),
    [(13, "restart_app", "workload"), (94, "restart_app", "workload"), (119, "reset_gpu", "gpu"), (95, "reset_gpu", "gpu"),
     (151, "restart_vm", "node"), (142, "contact_support", "gpu"), (999, "unknown", "unknown")],
)  # fmt: skip
def test_each_xid_falls_into_its_bucket(xid: int, bucket: str, suspect: str) -> None:
    found = opened(xids(0, xid))
    assert [(a.klass, a.evidence["suspect"]) for a in found] == [(bucket, suspect)]


def test_an_ignored_xid_is_told_only_when_it_keeps_coming() -> None:
    assert told(xids(0, 43, 0, 43, 0)) == []
    assert [a.klass for a in opened(xids(0, 43, 0, 43, 0, 63))] == ["ignore"]


def test_the_same_xid_on_several_gpus_of_one_workload_points_at_the_workload() -> None:
    found = opened(xids(0, 119) + xids(0, 119, gpu=B, start=60.0))
    assert [a.evidence["suspect"] for a in found] == ["gpu", "workload"]
    assert found[1].evidence["other_gpus"] == [A]


def test_the_same_xid_again_on_one_gpu_points_at_the_hardware() -> None:
    said = [a for a in told(xids(0, 31, 0, 31)) if a.at == T0 + 90.0]
    assert said[0].evidence["suspect"] == "gpu"
    assert said[0].evidence["same_gpu_before"] == 1


def test_a_consequence_joins_the_fault_that_it_follows() -> None:
    d = GpuFault()
    said = d.feed(xids(0, 79, 45))
    assert [a.klass for a in said if a.phase == "on"] == ["restart_bm"]
    assert "45" in str(d.feed(xids(45, 45, start=120.0))[-1].evidence["followed_by"])
    assert opened(xids(0, 45))[0].evidence["action"] == "restart the fabric manager"


def test_a_double_bit_error_is_decided_by_the_xid_beside_it() -> None:
    assert [a.klass for a in opened(xids(0, 94, 48))] == ["restart_app"]
    assert opened(xids(0, 64, 48))[0].klass == "reset_gpu"
    assert opened(xids(0, 48))[0].klass == "workflow"


def test_link_errors_on_several_gpus_of_a_node_point_at_the_fabric() -> None:
    found = opened(xids(0, 74) + xids(0, 74, gpu=B, start=31.0))
    assert found[1].evidence["suspect"] == "fabric"


def test_the_drivers_own_recovery_action_outranks_the_table() -> None:
    found = opened([sample(0, xid=0), sample(30, xid=154, recovery_action=2)])
    assert found[0].evidence["action"] == "reboot the node"


def test_a_fault_is_over_when_the_last_xid_is_back_at_zero_for_a_while() -> None:
    said = told(xids(0, 79, *([0] * 15)))
    assert [a.phase for a in said if a.phase != "still"] == ["on", "off"]
    assert said[-1].at - T0 >= 300.0
    assert len({a.id for a in said}) == 1


def test_a_workload_fault_is_over_when_nothing_new_comes() -> None:
    said = told(xids(0, *([31] * 30)))
    assert [a.phase for a in said if a.phase != "still"] == ["on", "off"]


def test_a_silent_gpu_says_nothing() -> None:
    d = GpuFault()
    d.feed(xids(0, 79))
    assert d.tick(T0 + 1e6) == []


def test_a_rising_double_bit_counter_and_a_failed_remap_are_told() -> None:
    assert [
        a.klass
        for a in opened(
            [sample(0, ecc_dbe_total=2), sample(30, ecc_dbe_total=2), sample(60, ecc_dbe_total=3)]
        )
    ] == ["ecc_dbe"]
    assert [a.klass for a in opened([sample(0, row_remap_failure=1)])] == ["row_remap_failure"]


def test_a_counter_that_starts_anew_is_no_burst() -> None:
    found = opened([sample(10.0 * i, pcie_replay_total=100_000.0 + i if i < 20 else i) for i in range(60)])
    assert found == []


def test_replays_that_go_on_are_told_and_end() -> None:
    total, samples = 0.0, []
    for i in range(60):
        total += 100.0 if 10 <= i < 30 else 0.0
        samples.append(sample(10.0 * i, pcie_replay_total=total))
    said = told(samples)
    assert [(a.klass, a.phase) for a in said if a.phase != "still"] == [
        ("pcie_replay", "on"),
        ("pcie_replay", "off"),
    ]
    assert said[0].since == T0 + 100.0


def test_clocks_held_down_by_heat_are_told_and_usual_power_capping_is_not() -> None:
    hot = [sample(10.0 * i, thermal_violation_s_total=6.0 * i, gpu_temp_c=91) for i in range(20)]
    assert [(a.signal, a.klass) for a in opened(hot)] == [("gpu.throttle", "thermal")]
    capped = [sample(10.0 * i, power_violation_s_total=8.0 * i) for i in range(100)]
    assert told(capped) == []
    more, total = [], 0.0
    for i in range(60):
        total += 9.0 if i >= 30 else 0.5
        more.append(sample(10.0 * i, power_violation_s_total=total))
    assert [a.klass for a in opened(more)] == ["power"]


def test_sentinels_and_late_samples_change_nothing() -> None:
    assert (
        told([sample(0, xid=0), sample(30, xid=9.3e18), sample(60, xid=float("nan")), sample(90, xid=0)])
        == []
    )
    assert told([sample(100, xid=0), sample(50, xid=79), sample(130, xid=0)]) == []


def test_every_xid_stands_in_one_bucket_and_has_an_action() -> None:
    table = XidTable()
    for xid in range(1, 170):
        assert table.bucket(xid).action
        assert 0.0 <= table.bucket(xid).impact <= 1.0
        assert table.name(xid)


@pytest.mark.parametrize("wrong", [{"memory_s": 0.0}, {"warmup": 0}, {"thermal_ratio": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Params(**wrong)
