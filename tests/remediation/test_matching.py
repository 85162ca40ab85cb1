"""What directives make of one call: order, tightness, exemptions; and that nobody else's calls are ever touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.directives import Directive
from flyball.remediation.points import Buckets, Effect, Index, apply, chosen
from flyball.remediation.points.matching import limits_of

NOW = 1_700_000_000.0
CALL = {"provider": "b", "model": "big", "app": "shop", "tenant": "t1", "run": "r-1"}


def directive(
    id: str, kind: Any, scope: dict[str, str], /, exempt: tuple[dict[str, str], ...] = (), **params: Any
) -> Directive:
    return Directive(
        id=id, kind=kind, scope=scope, params=params, granted_at=NOW, expires_at=NOW + 300.0, incident="INC-1",
        runbook="r", step="s", exempt=exempt,
    )  # fmt: skip


def gate(*directives: Directive, share: float = 1.0) -> Buckets:
    """Counters whose time stands still: what is spent stays spent."""
    buckets = Buckets(lambda: 0.0, share)
    buckets.keep(directives)
    return buckets


def do(*directives: Directive, call: Mapping[str, str] = CALL, key: str = "s-1", **more: Any) -> Effect:
    return apply(directives, call, key, NOW, **more)


# --- one kind ------------------------------------------------------------------------------------------------------


def test_a_block_stops_the_call_and_says_by_which_directive() -> None:
    effect = do(directive("DIR-1", "block", {"run": "r-1"}, reason="incident INC-1"))
    assert (effect.status, effect.refused) == (403, "stopped by directive DIR-1: incident INC-1")
    assert effect.applied == ("DIR-1",)
    assert do(directive("DIR-1", "block", {"run": "r-2"})).refused == ""
    assert (
        do(directive("DIR-1", "block", {"run": "r-1"})).refused
        == "stopped by directive DIR-1: run=r-1 is blocked"
    )


def test_a_limit_lets_so_much_through_and_says_when_to_come_back() -> None:
    limit = directive("DIR-1", "limit", {"tenant": "t1"}, requests_per_min=30.0)
    counts = gate(limit)
    effects = [do(limit, gate=counts) for _ in range(6)]
    assert [e.status for e in effects] == [0, 0, 0, 0, 0, 429], "ten seconds of it at once"
    assert effects[-1].retry_after_s == 2.0
    assert effects[-1].refused == (
        "stopped by directive DIR-1: tenant=t1 is over its limit of requests per minute; come back in 2 s"
    )
    assert (effects[0].applied, effects[-1].applied) == ((), ("DIR-1",)), (
        "what was refused is what is reported"
    )


def test_without_anybody_who_counts_no_limit_is_enforced() -> None:
    assert do(directive("DIR-1", "limit", {"tenant": "t1"}, requests_per_min=0.1)).refused == ""


def test_only_limits_of_tokens_and_dollars_are_charged_afterwards() -> None:
    limits = (
        directive("DIR-1", "limit", {"tenant": "t1"}, requests_per_min=60.0),
        directive("DIR-2", "limit", {"app": "shop"}, tokens_per_min=60.0),
        directive("DIR-3", "limit", {"model": "big"}, usd_per_hour=60.0, requests_per_min=60.0),
    )
    assert do(*limits, gate=gate(*limits)).charges == ("DIR-2", "DIR-3")


def test_a_cap_says_what_a_call_may_produce_and_where_it_goes() -> None:
    effect = do(directive("DIR-1", "cap", {"tenant": "t1"}, output_tokens=256, model="small"))
    assert (effect.max_output_tokens, effect.labels["model"], effect.labels["provider"]) == (
        256,
        "small",
        "b",
    )
    assert effect.why == {"DIR-1": "cap to at most 256 output tokens and model small"}
    assert not effect.redirected


def test_a_cap_to_the_model_that_is_used_anyway_does_nothing() -> None:
    effect = do(directive("DIR-1", "cap", {"tenant": "t1"}, model="big"))
    assert (effect.applied, effect.labels) == ((), CALL)


# --- several -------------------------------------------------------------------------------------------------------


def test_a_block_comes_before_everything_and_costs_no_limit_anything() -> None:
    limit = directive("DIR-1", "limit", {"tenant": "t1"}, requests_per_min=6.0)
    block = directive("DIR-2", "block", {"run": "r-1"})
    counts = gate(limit)
    assert all(do(limit, block, gate=counts).status == 403 for _ in range(5))
    assert do(limit, gate=counts).status == 0


def test_a_call_that_one_limit_refuses_costs_nothing_at_the_others() -> None:
    wide = directive("DIR-1", "limit", {"app": "shop"}, requests_per_min=12.0)
    narrow = directive("DIR-2", "limit", {"tenant": "t1"}, requests_per_min=6.0)
    counts = gate(wide, narrow)
    assert [do(wide, narrow, gate=counts).status for _ in range(5)] == [0, 429, 429, 429, 429]
    assert do(wide, call={**CALL, "tenant": "t2"}, gate=counts).status == 0, "one of two was left"


def test_limits_hold_before_redirects_and_caps_see_where_the_call_goes() -> None:
    redirect = directive("DIR-1", "redirect", {"provider": "b"}, to={"provider": "a"})
    there = directive("DIR-2", "cap", {"provider": "a"}, output_tokens=100)
    here = directive("DIR-3", "cap", {"provider": "b"}, output_tokens=10)
    effect = do(redirect, there, here)
    assert (effect.labels["provider"], effect.max_output_tokens) == ("a", 100)
    assert effect.applied == ("DIR-1", "DIR-2")
    limit = directive("DIR-4", "limit", {"provider": "b"}, requests_per_min=6.0)
    counts = gate(limit)
    assert [do(redirect, limit, gate=counts).status for _ in range(2)] == [0, 429]


def test_the_tightest_cap_holds_and_the_most_specific_names_the_model() -> None:
    caps = (
        directive("DIR-1", "cap", {"tenant": "t1"}, output_tokens=100, model="wide"),
        directive("DIR-2", "cap", {"tenant": "t1", "app": "shop"}, output_tokens=500, model="narrow"),
    )
    effect = do(*caps)
    assert (effect.max_output_tokens, effect.labels["model"]) == (100, "narrow")


def test_the_most_specific_redirect_that_the_gateway_can_follow_acts() -> None:
    wide = directive("DIR-1", "redirect", {"provider": "b"}, to={"provider": "a"})
    narrow = directive("DIR-2", "redirect", {"provider": "b", "app": "shop"}, to={"provider": "c"})
    assert do(wide, narrow).labels["provider"] == "c"
    effect = do(wide, narrow, reachable=lambda to: to["provider"] != "c")
    assert (effect.labels["provider"], effect.applied) == ("a", ("DIR-1",))
    effect = do(wide, narrow, reachable=lambda to: False)
    assert (effect.labels, effect.applied) == (CALL, ())


def test_a_model_that_the_gateway_does_not_serve_there_is_not_reported_as_used() -> None:
    cap = directive("DIR-1", "cap", {"tenant": "t1"}, model="small")
    assert do(cap, reachable=lambda to: False).applied == ()


def test_exempt_scopes_are_left_alone_wherever_the_call_goes() -> None:
    exempt = ({"tenant": "t1"},)
    every = (
        directive("DIR-1", "block", {"app": "shop"}, exempt),
        directive("DIR-2", "limit", {"app": "shop"}, exempt, requests_per_min=0.1),
        directive("DIR-3", "redirect", {"provider": "b"}, exempt, to={"provider": "a", "tenant": "t9"}),
        directive("DIR-4", "cap", {"app": "shop"}, exempt, output_tokens=1),
    )
    effect = do(*every, gate=gate(*every))
    assert (effect.labels, effect.applied, effect.refused) == (CALL, (), "")
    assert do(*every, call={**CALL, "tenant": "t2"}, gate=gate(*every)).status == 403


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("limit", {}),
        ("limit", {"requests_per_min": 0}),
        ("limit", {"requests_per_min": -1}),
        ("limit", {"requests_per_min": "5"}),
        ("limit", {"requests_per_min": True}),
        ("limit", {"requests_per_min": float("nan")}),
        ("limit", {"requests_per_min": float("inf")}),
        ("limit", {"requests_per_min": 5e-324}),
        ("limit", {"requests_per_hour": 1}),
        ("cap", {"output_tokens": 0}),
        ("cap", {"output_tokens": "9"}),
        ("cap", {"output_tokens": True}),
        ("cap", {"model": ""}),
        ("cap", {"model": 7}),
        ("throttle", {"requests_per_min": 1}),
    ],
    ids=str,
)
def test_what_is_not_understood_is_not_obeyed(kind: str, params: dict[str, Any]) -> None:
    one = directive("DIR-1", kind, {"tenant": "t1"}, **params)
    counts = gate(one)
    for _ in range(3):
        effect = do(one, gate=counts)
        assert (effect.labels, effect.applied, effect.refused, effect.max_output_tokens) == (
            CALL,
            (),
            "",
            None,
        )


# --- properties ----------------------------------------------------------------------------------------------------

TENANTS = ("t1", "t2", "t3")
NAMES = {"provider": ("a", "b"), "model": ("big", "small"), "app": ("shop", "help"), "tenant": TENANTS}
calls = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in NAMES.items()})


def scopes(tenant: str | None = None) -> st.SearchStrategy[dict[str, str]]:
    """Some labels; always of one tenant when one is given."""
    some = st.fixed_dictionaries({}, optional={n: st.sampled_from(v) for n, v in NAMES.items()})
    if tenant is not None:
        return some.map(lambda s: {**s, "tenant": tenant})
    return some.filter(bool)


def directives(
    scope: st.SearchStrategy[dict[str, str]], exempt: tuple[dict[str, str], ...] = ()
) -> st.SearchStrategy[list[Directive]]:
    kinds: st.SearchStrategy[tuple[str, dict[str, Any]]] = st.one_of(
        st.just(("block", {})),
        st.sampled_from((0.5, 6.0, 60.0)).map(lambda n: ("limit", {"requests_per_min": n})),
        st.sampled_from((1.0, 1000.0)).map(lambda n: ("limit", {"tokens_per_min": n, "usd_per_hour": n})),
        st.tuples(st.sampled_from("ab"), st.floats(0.0, 1.0)).map(
            lambda t: ("redirect", {"to": {"provider": t[0]}, "share": t[1]})
        ),
        st.sampled_from((1, 64)).map(lambda n: ("cap", {"output_tokens": n, "model": "small"})),
    )
    made = st.lists(st.tuples(kinds, scope), max_size=8)
    return made.map(
        lambda found: [
            directive(f"DIR-{i}", kind, scope, exempt, **params)
            for i, ((kind, params), scope) in enumerate(found)
        ]
    )


@given(directives(scopes("t1")), st.lists(calls, max_size=30))
def test_no_innocent_tenant_starves(found: list[Directive], stream: list[dict[str, str]]) -> None:
    """Whatever is done to one tenant, calls of the others are never refused, changed, counted or charged."""
    index, counts = Index(found), gate(*found)
    for i, call in enumerate(stream):
        effect = apply(index, call, f"s-{i}", NOW, gate=counts)
        if call["tenant"] != "t1":
            assert (effect.labels, effect.applied, effect.refused) == (call, (), "")
            assert (effect.max_output_tokens, effect.charges) == (None, ())


@given(directives(scopes(), ({"tenant": "t2"},)), st.lists(calls, max_size=30))
def test_an_exempt_tenant_is_never_touched(found: list[Directive], stream: list[dict[str, str]]) -> None:
    index, counts = Index(found), gate(*found)
    for i, call in enumerate(stream):
        effect = apply(index, call, f"s-{i}", NOW, gate=counts)
        if call["tenant"] == "t2":
            assert (effect.labels, effect.applied, effect.refused) == (call, (), "")


@given(directives(scopes()), calls, st.text(max_size=8))
def test_the_index_finds_what_looking_at_every_directive_finds(
    found: list[Directive], call: dict[str, str], key: str
) -> None:
    def is_selected(d: Directive) -> bool:
        return bool(d.scope) and all(call.get(k) == v for k, v in d.scope.items())

    assert {d.id for d in Index(found).matching(call)} == {d.id for d in found if is_selected(d)}


@given(directives(scopes()), calls, st.text(max_size=8))
def test_what_is_done_to_a_call_does_not_depend_on_the_order_of_the_directives(
    found: list[Directive], call: dict[str, str], key: str
) -> None:
    assert apply(found, call, key, NOW) == apply(found[::-1], call, key, NOW)


@given(
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.text(max_size=12), min_size=1, max_size=50, unique=True),
)
def test_a_ramp_only_ever_takes_more_sessions_along(shares: list[float], keys: list[str]) -> None:
    taken: set[str] = set()
    for share in shares:
        now = {key for key in keys if chosen("DIR-1", share, key)}
        assert taken <= now
        taken = now


@given(
    st.dictionaries(
        st.sampled_from(("requests_per_min", "usd_per_hour", "x")), st.floats() | st.text() | st.booleans()
    )
)
def test_limits_are_numbers_over_zero_or_nothing(params: dict[str, Any]) -> None:
    assert all(0.0 < value < float("inf") for value in limits_of(params).values())
