"""Leases: once granted they only move forward, and always end."""

from __future__ import annotations

import msgspec
import pytest

from flyball.remediation.leases import Leases, directive_id
from tests.remediation.test_executor import plan

NOW = 1_700_000_000.0


def test_the_same_plan_and_step_give_the_same_id() -> None:
    p = plan(NOW)
    assert directive_id(p, p.steps[0]) == directive_id(plan(NOW + 99.0), p.steps[0])
    assert directive_id(p, p.steps[0]) != directive_id(plan(NOW, attempt=2), p.steps[0])


def test_every_change_of_a_lease_raises_its_epoch() -> None:
    leases, p = Leases(), plan(NOW)
    granted = leases.grant(p, p.steps[0], NOW, "x").directive
    renewed = leases.renew(granted.id, NOW + 10.0, NOW + 310.0, "x", p.steps[0].stages[1]).directive
    released = leases.release(granted.id, NOW + 20.0, "x").directive
    assert [granted.epoch, renewed.epoch, released.epoch] == [1, 2, 3]
    assert renewed.params["share"] == 0.95


def test_a_renewal_never_shortens_a_lease() -> None:
    leases, p = Leases(), plan(NOW)
    granted = leases.grant(p, p.steps[0], NOW, "x").directive
    assert leases.renew(granted.id, NOW, NOW + 1.0, "x").directive.expires_at == NOW + 300.0


def test_a_lease_lasts_no_longer_than_its_hold() -> None:
    p = plan(NOW, hold_s=120.0)
    assert Leases().grant(p, p.steps[0], NOW, "x").directive.expires_at == NOW + 120.0


def test_a_released_lease_is_over_at_once() -> None:
    leases, p = Leases(), plan(NOW)
    granted = leases.grant(p, p.steps[0], NOW, "x").directive
    assert leases.release(granted.id, NOW + 20.0, "x").directive.expires_at == NOW + 20.0
    assert leases.live == {}


def test_leases_expire_in_the_order_of_their_time() -> None:
    leases = Leases()
    late, soon = plan(NOW, lease_s=200.0), plan(NOW, lease_s=100.0, attempt=2)
    for p in (late, soon):
        leases.grant(p, p.steps[0], NOW, "x")
    assert leases.expire(NOW + 99.0) == []
    assert [c.at for c in leases.expire(NOW + 500.0)] == [NOW + 100.0, NOW + 200.0]


def test_who_is_left_out_is_part_of_the_lease_and_changes_only_by_a_renewal() -> None:
    leases, p = Leases(), plan(NOW)
    granted = leases.grant(p, p.steps[0], NOW, "x", ({"tenant": "t1"},)).directive
    assert granted.exempt == ({"tenant": "t1"},)
    kept = leases.renew(granted.id, NOW, NOW + 10.0, "x").directive
    changed = leases.renew(granted.id, NOW, NOW, "x", exempt=()).directive
    assert (kept.exempt, changed.exempt, changed.epoch) == (({"tenant": "t1"},), (), 3)


def test_an_expiry_raises_the_epoch_like_every_change() -> None:
    leases, p = Leases(), plan(NOW)
    leases.grant(p, p.steps[0], NOW, "x")
    assert [c.directive.epoch for c in leases.expire(NOW + 500.0)] == [2]


def test_a_lease_never_has_an_empty_scope() -> None:
    p = plan(NOW)
    empty = msgspec.structs.replace(p.steps[0], scope={"provider": ""})
    with pytest.raises(ValueError, match="an empty scope is never all"):
        Leases().grant(p, empty, NOW, "x")
