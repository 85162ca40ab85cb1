"""Enforcement points: stable shares, no circles, and letting go without the server."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.directives import Directive
from flyball.remediation.points import PointClient, apply, chosen

NOW = 1_700_000_000.0


def directive(
    id: str = "DIR-1", source: str = "b", to: str = "a", share: float = 1.0, **more: Any
) -> Directive:
    fields: dict[str, Any] = {
        "kind": "redirect", "scope": {"provider": source}, "params": {"to": {"provider": to}, "share": share},
        "granted_at": NOW, "expires_at": NOW + 300.0, "incident": "INC-1", "runbook": "r", "step": "s",
    }  # fmt: skip
    return Directive(id=id, **{**fields, **more})


@given(st.text(max_size=12), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_wider_share_keeps_everyone_of_the_narrower_one(key: str, a: float, b: float) -> None:
    narrow, wide = sorted((a, b))
    assert not chosen("DIR-1", narrow, key) or chosen("DIR-1", wide, key)


def test_a_share_takes_about_its_share_of_the_keys() -> None:
    taken = sum(chosen("DIR-1", 0.25, f"session-{i}") for i in range(4000))
    assert 900 < taken < 1100


def test_a_matching_call_goes_to_the_target_and_keeps_its_other_labels() -> None:
    effect = apply([directive()], {"provider": "b", "app": "shop"}, "s1", NOW)
    assert effect.labels == {"provider": "a", "app": "shop"}
    assert effect.applied == ("DIR-1",)


def test_a_call_out_of_scope_stays_where_it_is() -> None:
    effect = apply([directive()], {"provider": "c"}, "s1", NOW)
    assert (effect.labels, effect.redirected) == ({"provider": "c"}, False)


def test_an_empty_scope_matches_nothing() -> None:
    assert not apply([directive(scope={})], {"provider": "b"}, "s1", NOW).redirected


def test_two_redirects_towards_each_other_send_no_call_in_a_circle() -> None:
    both = [directive("DIR-1", "a", "b"), directive("DIR-2", "b", "a")]
    assert apply(both, {"provider": "b"}, "s1", NOW).labels["provider"] == "a"


def test_the_most_specific_scope_acts() -> None:
    narrow = directive("DIR-9", scope={"provider": "b", "app": "shop"}, to="c")
    assert apply([directive(), narrow], {"provider": "b", "app": "shop"}, "s1", NOW).labels["provider"] == "c"


def test_an_expired_directive_is_not_obeyed() -> None:
    assert not apply([directive()], {"provider": "b"}, "s1", NOW + 300.0).redirected


def test_params_that_are_not_understood_are_not_obeyed() -> None:
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"to": "a"},
        {"to": {}},
        {"to": {"provider": "a"}, "share": "all"},
    )
    for params in variants:
        assert not apply([directive(params=params)], {"provider": "b"}, "s1", NOW).redirected


class Clock:
    """Both clocks move together unless a test sets the wall clock alone."""

    def __init__(self) -> None:
        self.at = NOW
        self.set_back_s = 0.0

    def now(self) -> float:
        return self.at - self.set_back_s

    def monotonic(self) -> float:
        return self.at - NOW


class Server:
    """The directives' API as a transport: answers with what it holds, or not at all."""

    def __init__(self) -> None:
        self.held: Any = []
        self.etag = 0
        self.down = False
        self.date = ""
        self.asked: list[httpx.Request] = []

    def hold(self, *held: Directive | dict[str, Any]) -> None:
        as_json = [
            h if isinstance(h, dict) else {f: getattr(h, f) for f in h.__struct_fields__} for h in held
        ]
        self.held = json.loads(json.dumps(as_json))
        self.etag += 1

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if self.down:
            raise httpx.ConnectError("refused")
        if request.url.path == "/v1/enforced":
            return httpx.Response(202)
        if request.headers.get("If-None-Match") == f'"{self.etag}"':
            return httpx.Response(304)
        headers = {"ETag": f'"{self.etag}"', **({"Date": self.date} if self.date else {})}
        return httpx.Response(200, json=self.held, headers=headers)


def client(server: Server, clock: Clock, **more: Any) -> PointClient:
    return PointClient(
        "http://flyball", clock=clock, transport=httpx.MockTransport(server), token="t", **more
    )


def test_a_client_converges_and_asks_with_the_etag() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock)
    server.hold(directive())
    assert point.poll() == "changed"
    assert point.poll() == "unchanged"
    assert server.asked[-1].headers["If-None-Match"] == '"1"'
    assert server.asked[-1].headers["Authorization"] == "Bearer t"
    assert point.apply({"provider": "b"}, "s1").labels == {"provider": "a"}
    server.hold()
    assert point.poll() == "changed"
    assert point.apply({"provider": "b"}, "s1").labels == {"provider": "b"}


def test_with_the_server_dead_a_lease_holds_until_its_expiry_and_no_longer() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock)
    server.hold(directive())
    point.poll()
    server.down = True
    assert point.poll() == "unreachable"
    clock.at = NOW + 299.0
    assert point.apply({"provider": "b"}, "s1").redirected
    clock.at = NOW + 300.0
    assert not point.apply({"provider": "b"}, "s1").redirected


def test_a_restart_of_the_point_keeps_the_set_until_expiry(tmp_path: Path) -> None:
    server, clock = Server(), Clock()
    server.hold(directive())
    client(server, clock, keep=tmp_path / "set.json").poll()
    server.down = True
    again = client(server, clock, keep=tmp_path / "set.json")
    assert again.apply({"provider": "b"}, "s1").redirected
    clock.at = NOW + 301.0
    assert again.live() == []
    (tmp_path / "set.json").write_text("{broken")
    assert client(server, clock, keep=tmp_path / "set.json").live() == []


def test_an_older_epoch_never_replaces_a_newer_one() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock)
    server.hold(directive(share=0.95, epoch=3))
    point.poll()
    server.hold(directive(share=0.25, epoch=2))
    point.poll()
    assert point.live()[0].params["share"] == 0.95


def test_a_clock_that_is_off_does_not_stretch_a_lease() -> None:
    server, clock = Server(), Clock()
    server.hold(directive())
    server.date = "Tue, 14 Nov 2023 22:14:20 GMT"  # NOW + 60 s: our clock is a minute behind
    point = client(server, clock)
    point.poll()
    assert point.skew_s == 60.0
    assert point.live()[0].expires_at == NOW + 240.0


def test_setting_the_wall_clock_back_stretches_no_lease() -> None:
    server, clock = Server(), Clock()
    server.hold(directive())
    point = client(server, clock)
    point.poll()
    clock.set_back_s = 3600.0
    clock.at = NOW + 299.0
    assert point.live()
    clock.at = NOW + 300.0
    assert point.live() == []


def test_a_wall_clock_that_jumps_ahead_lets_go_early() -> None:
    server, clock = Server(), Clock()
    server.hold(directive())
    point = client(server, clock)
    point.poll()
    clock.set_back_s = -301.0
    assert point.live() == []


def test_of_several_leases_each_ends_at_its_own_time() -> None:
    server, clock = Server(), Clock()
    server.hold(directive("DIR-1"), directive("DIR-2", expires_at=NOW + 100.0))
    point = client(server, clock)
    point.poll()
    clock.at = NOW + 100.0
    assert [lease.id for lease in point.live()] == ["DIR-1"]
    clock.at = NOW + 300.0
    assert point.live() == []


def test_an_older_state_of_a_lease_that_is_gone_does_not_come_back() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock)
    server.hold(directive(epoch=3))
    point.poll()
    server.hold()
    point.poll()
    server.hold(directive(epoch=2))
    point.poll()
    assert point.live() == []


def test_exemptions_are_obeyed_and_kept_over_a_restart(tmp_path: Path) -> None:
    server, clock = Server(), Clock()
    server.hold(directive(exempt=({"app": "shop"},)))
    client(server, clock, keep=tmp_path / "set.json").poll()
    server.down = True
    point = client(server, clock, keep=tmp_path / "set.json")
    assert point.apply({"provider": "b", "app": "help"}, "s1").redirected
    assert not point.apply({"provider": "b", "app": "shop"}, "s1").redirected


def test_a_lease_whose_exemptions_are_not_understood_is_not_obeyed() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock)
    raw = {"id": "x", "kind": "block", "scope": {"provider": "b"}, "params": {}, "expires_at": NOW + 9}
    server.hold({**raw, "exempt": [{}]})
    point.poll()
    assert point.live() == []
    server.hold({**raw, "exempt": []})
    point.poll()
    assert len(point.live()) == 1


def limit(**params: Any) -> Directive:
    return directive(kind="limit", scope={"tenant": "t1"}, params=params)


def test_a_client_counts_and_charges_for_its_limits_by_itself() -> None:
    server, clock = Server(), Clock()
    server.hold(limit(tokens_per_min=600.0))
    point = client(server, clock)
    point.poll()
    first = point.apply({"tenant": "t1"}, "s1")
    assert (first.refused, first.charges) == ("", ("DIR-1",))
    point.charge(first, tokens=400.0)
    second = point.apply({"tenant": "t1"}, "s1")
    assert (second.status, second.retry_after_s) == (429, 30.0)
    assert point.apply({"tenant": "t2"}, "s1").refused == ""
    clock.at += 31.0
    assert point.apply({"tenant": "t1"}, "s1").refused == ""


def test_a_new_limit_reckons_with_what_calls_cost_before_it() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock)
    point.charge(point.apply({"tenant": "t1"}, "s1"), usd=0.2)
    server.hold(limit(usd_per_hour=36.0))
    point.poll()
    assert [point.apply({"tenant": "t1"}, "s1").status for _ in range(2)] == [0, 429]


def test_one_of_three_equal_points_enforces_a_third() -> None:
    server, clock = Server(), Clock()
    server.hold(limit(requests_per_min=36.0))
    point = client(server, clock, limit_share=1 / 3)
    point.poll()
    assert [point.apply({"tenant": "t1"}, "s1").status for _ in range(3)] == [0, 0, 429]
    with pytest.raises(ValueError, match="over 0 and at most 1"):
        client(server, clock, limit_share=0.0)


def test_what_the_gateway_cannot_do_is_not_reported_as_done() -> None:
    server, clock = Server(), Clock()
    server.hold(directive())
    point = client(server, clock)
    point.poll()
    assert not point.apply({"provider": "b"}, "s1", lambda to: False).redirected
    point.report()
    assert json.loads(server.asked[-1].content)["directives"] == {"DIR-1": 0}


def test_a_report_is_due_when_the_set_is_new_when_something_was_done_and_now_and_then() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock)
    assert point.report_if_due() is None, "nothing is held, nothing was done"
    server.hold(directive())
    point.poll()
    assert point.report_if_due() is True
    assert point.report_if_due() is None
    point.apply({"provider": "b"}, "s1")
    assert point.report_if_due() is True
    assert json.loads(server.asked[-1].content)["directives"] == {"DIR-1": 1}
    clock.at += 14.0
    assert point.report_if_due() is None
    clock.at += 1.0
    assert point.report_if_due() is True
    server.hold()
    point.poll()
    server.down = True
    assert point.report_if_due() is False
    server.down = False
    assert point.report_if_due() is True, "that nothing is held any more is told, too"
    assert json.loads(server.asked[-1].content)["directives"] == {}
    assert point.report_if_due() is None


def test_many_threads_lose_no_count() -> None:
    server, clock = Server(), Clock()
    server.hold(
        directive(),
        directive("DIR-2", kind="limit", scope={"tenant": "t1"}, params={"requests_per_min": 6.0}),
    )
    point = client(server, clock)
    point.poll()

    def work() -> None:
        for i in range(500):
            point.apply({"provider": "b"}, f"s{i}")
            point.apply({"tenant": "t1"}, f"s{i}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    point.report()
    assert json.loads(server.asked[-1].content)["directives"] == {"DIR-1": 2000, "DIR-2": 1999}


@pytest.mark.parametrize(
    "expires_at", ["Infinity", "-Infinity", "NaN", "true", '"soon"', "null", "1700000060000"]
)
def test_a_lease_without_an_end_is_no_lease(expires_at: str) -> None:
    body = (
        '[{"id": "x", "kind": "block", "scope": {"provider": "b"}, "params": {}, "expires_at": '
        + expires_at
        + "}]"
    )
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    point = PointClient("http://flyball", clock=Clock(), transport=transport)
    point.poll()
    assert point.live() == []


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(("t1", "a", "m", 10**400, -(10**400)))
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(("to", "provider")), inner, max_size=3)
    ),
    max_leaves=6,
)
odd_params = st.dictionaries(
    st.sampled_from(("to", "share", "requests_per_min", "usd_per_hour", "output_tokens", "model", "reason")),
    values,
    max_size=4,
)
odd_directives = st.fixed_dictionaries(
    {
        "id": st.text(max_size=6), "kind": st.sampled_from(("redirect", "limit", "cap", "block", "other")),
        "scope": st.dictionaries(st.sampled_from(("tenant", "provider")), st.sampled_from(("t1", "a")), max_size=2),
        "params": odd_params, "expires_at": st.floats() | st.just(NOW + 60.0) | st.just(10**400),
    },
    optional={"epoch": values, "exempt": values},
)  # fmt: skip


@given(st.lists(odd_directives | values, max_size=5))
def test_whatever_the_server_says_calls_go_on(listed: list[Any]) -> None:
    clock = Clock()
    body = json.dumps(listed)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    point = PointClient("http://flyball", clock=clock, transport=transport)
    point.poll()
    call = {"tenant": "t1", "provider": "a", "model": "m"}
    for i in range(3):
        effect = point.apply(call, f"s{i}")
        point.charge(effect, tokens=1e9, usd=1e9)
        assert effect.status in (0, 403, 429)
        assert all(isinstance(v, str) for v in effect.labels.values())
    assert point.apply({"tenant": "t2", "provider": "c", "model": "m"}, "s").applied == ()
    clock.at = NOW + 8 * 86400.0
    assert point.live() == []


def test_nonsense_from_the_server_is_not_obeyed() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock)
    server.hold(directive())
    point.poll()
    server.hold({"id": 3}, {"id": "x", "kind": "redirect", "scope": {}, "params": {}, "expires_at": NOW + 9})
    assert point.poll() == "changed"
    assert point.live() == []
    server.held, server.etag = {"what": 1}, 99
    assert point.poll() == "unreachable"


def test_reports_say_what_was_applied_and_keep_counts_while_unheard() -> None:
    server, clock = Server(), Clock()
    point = client(server, clock, point="gw-1")
    server.hold(directive())
    point.poll()
    for i in range(3):
        point.apply({"provider": "b"}, f"s{i}")
    server.down = True
    assert not point.report()
    server.down = False
    assert point.report()
    body = json.loads(server.asked[-1].content)
    assert body == {"point": "gw-1", "at": NOW, "directives": {"DIR-1": 3}}


def test_the_loop_ends_when_it_is_told_to() -> None:
    server, clock = Server(), Clock()
    stop = threading.Event()
    stop.set()
    client(server, clock).run(stop)
    assert server.asked == []
