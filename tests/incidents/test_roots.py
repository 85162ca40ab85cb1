"""What is blamed: one test, one fault."""

from __future__ import annotations

import pytest

from flyball.core.anomaly import Anomaly
from flyball.core.events import Change, GpuSample, LlmCall
from flyball.core.incident import Severity
from tests.incidents._estate import T0, Calls, Lab, W, anomaly, traffic


def test_provider_that_fails_for_everyone_is_the_root_and_pages_once() -> None:
    lab = Lab()
    lab.quiet(12)
    ill = traffic(fails=0.6, where={"provider": "b"}, n=5)
    lab.step(
        ill,
        lab.on("llm.errors", "overloaded", provider="b"),
        lab.on("llm.errors", "overloaded", provider="b", model="b-large"),
        lab.on("llm.errors", "overloaded", app="bot"),
        lab.on("llm.errors", "server_error", provider="b"),
        lab.on("llm.latency", app="search"),
    )
    incident = lab.only()
    assert str(incident.root) == "provider:b"
    assert incident.scope == {"provider": "b"}
    assert (incident.severity, incident.page) == (Severity.HIGH, True)
    assert incident.title.startswith("b: 60 % of calls fail (overloaded) since 22:15")
    best = incident.candidates[0]
    assert "3 of 3 models fail" in best.facts_for
    assert "2 of 2 regions fail" in best.facts_for
    assert incident.confidence > 0.8
    assert incident.impact.n_tenants == 6
    assert incident.impact.failed_calls == 540 * 3 // 5
    assert incident.samples
    assert lab.paged == [incident.id]


@pytest.mark.parametrize(
    ("where", "klass", "labels", "root", "scope"),
    [
        ({"provider": "b", "model": "b-large"}, "overloaded", {"provider": "b"}, "model:b-large", {"provider": "b", "model": "b-large"}),
        ({"provider": "b", "region": "eu"}, "server_error", {"provider": "b"}, "region:eu", {"provider": "b", "region": "eu"}),
        ({"tenant": "t3"}, "auth", {"tenant": "t3"}, "tenant:t3", {"tenant": "t3"}),
        ({"tenant": "t3"}, "auth", {"provider": "b"}, "tenant:t3", {"tenant": "t3"}),
        ({"provider": "b"}, "quota_exhausted", {"app": "bot"}, "provider:b", {"provider": "b"}),
        ({"app": "bot"}, "bad_request", {"app": "bot"}, "prompt_version:bot@v1", {"prompt": "bot@v1"}),
    ],
)  # fmt: skip
def test_root_is_what_explains_most_with_least(
    where: dict[str, str], klass: str, labels: dict[str, str], root: str, scope: dict[str, str]
) -> None:
    lab = Lab()
    lab.quiet(12)
    lab.step(traffic(fails=0.8, klass=klass, where=where, n=5), lab.on("llm.errors", klass, **labels))
    incident = lab.only()
    assert (str(incident.root), incident.scope) == (root, scope)
    assert incident.page


def test_every_provider_failing_together_makes_us_suspect_ourselves() -> None:
    lab = Lab()
    lab.quiet(12)
    lab.step(
        traffic(fails=0.5, klass="connection", where={}),
        lab.on("llm.errors", "connection", provider="a"),
        lab.on("llm.errors", "connection", provider="b"),
    )
    incident = lab.only()
    assert str(incident.root) == "stream:egress"
    assert incident.severity is Severity.CRITICAL
    assert (
        incident.title
        == "all providers fail together (connection) since 22:15: suspect our own egress, DNS or release"
    )


def test_bad_requests_of_one_app_at_every_provider_are_not_our_egress() -> None:
    lab = Lab()
    lab.quiet(12)
    lab.step(
        traffic(fails=0.9, klass="server_error", where={"app": "batch"}, n=10),
        lab.on("llm.errors", "server_error", provider="a"),
        lab.on("llm.errors", "server_error", app="batch"),
    )
    assert lab.only().root.kind in ("app", "prompt_version", "team")


def test_new_prompt_version_that_doubles_the_tokens_is_the_root() -> None:
    lab = Lab()
    lab.quiet(12)
    grown = [
        *traffic(without={"app": "bot"}),
        *_with_prompt(traffic(tokens=2.0, where={"app": "bot"}), "bot", "bot@v2"),
    ]
    lab.feed(Change(at=lab.now, kind="prompt", summary="bot v2", labels={"prompt": "bot@v2"}))
    lab.step(
        grown,
        anomaly(
            "llm.input_tokens",
            {"app": "bot", "prompt": "bot@v2"},
            lab.now,
            observed=2000,
            expected=1000,
            impact=0.5,
        ),
        anomaly("llm.input_tokens", {"app": "bot"}, lab.now, observed=2000, expected=1000, impact=0.5),
        anomaly("llm.cost", {"app": "bot"}, lab.now, observed=0.02, expected=0.01, impact=0.5),
    )
    incident = lab.only()
    assert str(incident.root) == "prompt_version:bot@v2"
    assert incident.title.startswith("bot@v2: input tokens per call ×2.0")
    assert incident.changes[0].summary == "bot v2"
    assert incident.page


def _with_prompt(cells: list, app: str, prompt: str) -> list:  # type: ignore[type-arg]
    for c in cells:
        if c.labels["app"] == app:
            c.labels["prompt"] = prompt
    return [c for c in cells if c.labels["app"] == app]


def test_slow_provider_is_blamed_for_slow_apps() -> None:
    lab = Lab()
    lab.quiet(12)
    lab.step(
        traffic(slow=3.0, where={"provider": "a"}),
        anomaly("llm.latency", {"app": "bot"}, lab.now, observed=4.0, expected=2.0, n=500),
        anomaly("llm.latency", {"provider": "a"}, lab.now, observed=6.0, expected=2.0, n=900),
        anomaly("llm.ttft", {"provider": "a"}, lab.now, observed=3.0, expected=1.0, n=900),
    )
    incident = lab.only()
    assert str(incident.root) == "provider:a"
    assert "take ×3.0 as long" in incident.title
    assert lab.paged == [incident.id]


def test_app_that_multiplies_its_calls_is_blamed_for_the_rate_limits() -> None:
    lab = Lab()
    lab.quiet(12)
    storm = traffic(times=8, where={"app": "batch", "provider": "b"}, fails=0.7, klass="rate_limited")
    lab.step(
        storm,
        lab.on("llm.errors", "rate_limited", provider="b"),
        lab.on("llm.errors", "rate_limited", app="batch"),
    )
    incident = lab.only()
    assert incident.root.kind == "app", incident.candidates
    assert incident.root.name == "batch"
    assert lab.paged == [incident.id]


def test_tenant_whose_key_is_refused_is_not_part_of_an_outage_that_is_on() -> None:
    lab = Lab()
    lab.quiet(12)
    ill = traffic(fails=0.6, where={"provider": "b"}, n=5)
    first = lab.on("llm.errors", "overloaded", provider="b")
    lab.step(ill, first)
    both = [c for c in ill if c.labels["tenant"] != "t3"] + [
        Calls(5, {"auth": 5}, labels=c.labels) for c in ill if c.labels["tenant"] == "t3"
    ]
    lab.step(both, lab.again(first), lab.on("llm.errors", "auth", tenant="t3"))
    assert [str(i.root) for i in lab.open] == ["provider:b", "tenant:t3"]


def test_two_failing_gpus_of_one_node_are_the_node() -> None:
    lab = Lab()
    lab.step(None, _xid("g1"), _xid("g2"))
    incident = lab.only()
    assert str(incident.root) == "node:n1"
    assert lab.paged == [incident.id]


def test_one_failing_gpu_is_the_gpu() -> None:
    lab = Lab()
    lab.step(None, _xid("g1"))
    assert str(lab.only().root) == "gpu:g1"
    assert lab.only().title == "gpu g1 on n1: GPU fault (XID 79) since 22:13"


def _xid(gpu: str):  # type: ignore[no-untyped-def]
    return anomaly(
        "gpu.fault",
        {"gpu": gpu, "node": "n1"},
        T0,
        klass="restart_bm",
        observed=1,
        expected=0,
        evidence={"xid": 79},
    )


def test_third_looping_run_of_an_agent_makes_the_agent_the_root() -> None:
    lab = Lab()
    loops = [
        anomaly("agent.loop", {"run": f"r{i}", "agent": "coder", "app": "bot"}, T0, klass="repeat", n=12)
        for i in range(3)
    ]
    lab.step(None, loops[0])
    assert str(lab.only().root) == "run:r0"
    lab.step(None, loops[1])
    assert str(lab.only().root) == "run:r0"
    lab.step(None, loops[2])
    assert str(lab.only().root) == "agent:coder"
    assert len(lab.opened) == len(lab.paged) == 1


def test_outage_that_widens_keeps_its_incident_and_does_not_page_again() -> None:
    lab = Lab()
    lab.quiet(12)
    one = lab.on("llm.errors", "overloaded", provider="b", model="b-large")
    lab.step(traffic(fails=0.8, where={"model": "b-large"}, n=5), one)
    first = lab.only()
    assert str(first.root) == "model:b-large"
    for _ in range(4):
        every = lab.on("llm.errors", "overloaded", provider="b")
        lab.step(traffic(fails=0.8, where={"provider": "b"}, n=5), lab.again(one), every)
    assert str(lab.only().root) == "provider:b"
    assert lab.only().id == first.id
    assert lab.paged == [first.id]
    assert any("root is now provider:b, was model:b-large" in c.reason for c in lab.changes)


def test_without_any_window_the_labels_name_the_root() -> None:
    lab = Lab()
    lab.feed(anomaly("llm.errors", {"provider": "b", "model": "m"}, T0, klass="overloaded"))
    assert str(lab.only().root) == "provider:b"


def test_share_of_time_is_event_time() -> None:
    lab = Lab()
    lab.quiet(2)
    assert lab.now == T0 + 2 * W


def test_an_outage_after_cold_caches_is_an_incident_of_its_own_that_takes_them_over() -> None:
    lab = Lab()
    lab.quiet(12)
    cold = lab.on("llm.cache", "cold", provider="b")
    lab.step(traffic(), cold)
    for _ in range(4):
        lab.step(traffic(), lab.again(cold))
    fails = lab.on("llm.errors", "overloaded", provider="b")
    lab.step(traffic(fails=0.6, where={"provider": "b"}, n=20), fails, lab.again(cold))
    outage = lab.only()
    assert (outage.signal, str(outage.root), outage.page) == ("llm.errors", "provider:b", True)
    assert outage.since == fails.since
    assert lab.opened[1:] == [outage.id]
    assert any(c.new == "resolved" and f"part of {outage.id}" in c.reason for c in lab.changes)
    lab.step(traffic(), lab.again(fails, "off"), lab.again(cold))
    lab.quiet(7)
    assert lab.open == []


def test_every_provider_failing_takes_over_no_cold_caches_and_retries_join_it() -> None:
    lab = Lab()
    lab.quiet(12)
    cold = lab.on("llm.cache", "cold", provider="b")
    lab.step(traffic(), cold)
    for _ in range(4):
        lab.step(traffic(), lab.again(cold))
    ill = traffic(fails=0.8, klass="connection", where={}, n=10)
    lab.step(
        ill,
        lab.on("llm.errors", "connection", provider="a"),
        lab.on("llm.errors", "connection", provider="b"),
    )
    more = traffic(fails=0.8, klass="connection", where={}, n=30)
    lab.step(more, lab.on("llm.retries", "retry_storm", app="bot", provider="b"))
    assert sorted((str(i.root), i.signal, i.page) for i in lab.open) == [
        ("provider:b", "llm.cache", False), ("stream:egress", "llm.errors", True),
    ]  # fmt: skip


def test_an_app_that_one_provider_refuses_first_is_one_incident_and_one_page() -> None:
    lab = Lab()
    lab.quiet(12)
    refused = {"klass": "rate_limited", "n": 12}
    first = lab.on("llm.errors", "rate_limited", provider="b", app="bot")
    lab.step(traffic(fails=0.7, where={"app": "bot", "provider": "b"}, **refused), first)  # type: ignore[arg-type]
    lab.step(
        traffic(fails=0.7, where={"app": "bot"}, **refused),  # type: ignore[arg-type]
        lab.again(first),
        lab.on("llm.errors", "rate_limited", provider="a", app="bot"),
    )
    incident = lab.only()
    assert str(incident.root) == "app:bot"
    assert lab.paged == [incident.id]


def test_calls_under_way_when_a_version_came_do_not_make_a_second_incident() -> None:
    lab = Lab()
    lab.quiet(12)
    old = [
        c
        for c in traffic(tokens=1.7, where={"app": "bot"}, n=1)
        if c.labels["app"] == "bot" and c.labels["tenant"] == "t1"
    ]
    new = _with_prompt(traffic(tokens=1.9, where={"app": "bot"}), "bot", "bot@v2")
    cells = [*traffic(without={"app": "bot"}), *new, *old]
    lab.feed(Change(at=lab.now, kind="deploy", summary="bot v2", labels={"prompt": "bot@v2"}))
    version = lab.on("llm.input_tokens", "inflation", app="bot", prompt="bot@v2")
    lab.step(cells, version)
    for _ in range(3):
        lab.step(cells, lab.again(version))
    lab.step(
        cells,
        lab.again(version),
        anomaly("llm.input_tokens", {"app": "bot"}, version.since - 50.0, lab.now + W, klass="inflation"),
    )
    assert str(lab.only().root) == "prompt_version:bot@v2"


def test_retries_of_calls_that_fail_on_a_broken_gpu_belong_to_it() -> None:
    lab = Lab()
    lab.correlator.observe_events(
        [
            GpuSample(at=lab.now, node="n1", gpu="n1/g0", deployment="own-1"),
            LlmCall(at=lab.now, provider="own", deployment="own-1"),
        ]
    )
    own = {
        "provider": "own",
        "model": "m",
        "deployment": "own-1",
        "region": "dc",
        "tenant": "t1",
        "team": "x",
    }

    def cells(n: int, failed: int) -> list[Calls]:
        mine = [
            Calls(n, {"server_error": failed} if failed else {}, labels=own | {"app": app, "tenant": t})
            for app in ("bot", "search")
            for t in ("t1", "t2")
        ]
        return [*traffic(), *mine]

    lab.quiet(12, cells(10, 0))
    fault = anomaly(
        "gpu.fault",
        {"node": "n1", "gpu": "n1/g0"},
        lab.now,
        klass="reset_gpu",
        observed=79,
        expected=0,
        impact=1.0,
    )
    lab.step(cells(10, 6), fault)
    lab.step(cells(10, 6), lab.again(fault), lab.on("llm.errors", "server_error", deployment="own-1"))
    lab.step(
        cells(40, 25), lab.again(fault), lab.on("llm.retries", "retry_storm", app="search", provider="own")
    )
    assert str(lab.only().root) == "gpu:n1/g0"


def test_slow_calls_of_one_tenant_wake_nobody() -> None:
    lab = Lab()
    lab.quiet(12)
    slow = anomaly(
        "llm.ttft", {"tenant": "t1"}, lab.now, klass="slow", observed=3.0, expected=1.0, impact=0.6
    )
    lab.step(traffic(slow=3.0, where={"tenant": "t1"}), slow)
    assert (str(lab.only().root), lab.only().page) == ("tenant:t1", False)


def test_the_level_of_a_moment_wakes_nobody_where_calls_were_less_slow_since_it_began() -> None:
    lab = Lab()
    lab.quiet(12)
    since, slow = lab.now, traffic(slow=2.2, where={"provider": "a"})

    def now(multiple_since: float) -> Anomaly:
        return anomaly(
            "llm.latency", {"provider": "a"}, since, lab.now + W, klass="slow", observed=4.4, expected=2.0, n=900,
            evidence={"multiple_since": multiple_since}, phase="on" if lab.now == since else "still",
        )  # fmt: skip

    lab.step(slow, now(1.5))
    assert (str(lab.only().root), lab.only().page) == ("provider:a", False)
    lab.step(slow, now(1.9))
    assert lab.only().page


def test_one_who_burns_money_does_not_make_a_model_the_root_whose_others_only_wander() -> None:
    lab = Lab()
    lab.quiet(12)
    busy = traffic(times=8.0, where={"tenant": "t6", "model": "a-large"})
    for c in busy:
        if c.labels["model"] == "a-large":
            c.usd = 0.015
    burn = anomaly("llm.cost", {"tenant": "t6"}, lab.now, klass="velocity", observed=1.0, expected=0.1)
    lab.step(busy, burn)
    assert str(lab.only().root) == "tenant:t6"
