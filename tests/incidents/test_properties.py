"""What holds for every input: the same in, the same out; a restart changes nothing; order within a window does not show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.anomaly import Anomaly
from flyball.core.codec import SnapshotError
from flyball.core.directives import Directive, DirectiveChange, Outcome
from flyball.core.errors import ConfigError
from flyball.core.events import AgentStep, Batch, Change, GpuSample
from flyball.core.incident import IncidentChange, State
from flyball.incidents.correlator import Correlator, Item
from flyball.incidents.lifecycle import TABLE, Step, advance
from flyball.incidents.settings import IncidentSettings
from tests.incidents._estate import T0, Lab, Slots, W, anomaly, traffic, window

SIGNALS = (
    ("llm.errors", "overloaded"), ("llm.errors", "auth"), ("llm.errors", "rate_limited"), ("llm.errors", "gateway_local"),
    ("llm.latency", ""), ("llm.input_tokens", ""), ("llm.cost", ""), ("llm.retries", "retry_storm"), ("agent.loop", "repeat"),
    ("gpu.fault", "reset_gpu"), ("serving.queue", ""), ("stream.silent", ""),
)  # fmt: skip
LABELS = (
    {"provider": "a"}, {"provider": "b"}, {"provider": "b", "model": "b-large"}, {"app": "bot"}, {"tenant": "t3"},
    {"app": "bot", "prompt": "bot@v1"}, {"run": "r1"}, {"run": "r2", "agent": "coder"}, {"gpu": "g1", "node": "n1"},
    {"gpu": "g2", "node": "n1"}, {"deployment": "vllm-1", "model": "m"}, {"sender": "gw"},
)  # fmt: skip


@dataclass(frozen=True)
class Minute:
    """One drawn window: which traffic is ill, which anomalies are stated, what else happens."""

    fails: float
    where: int
    stated: tuple[tuple[int, int, int], ...]
    other: int


minutes = st.lists(
    st.builds(
        Minute,
        st.sampled_from([0.0, 0.0, 0.3, 0.9]),
        st.integers(0, 4),
        st.lists(
            st.tuples(st.integers(0, len(SIGNALS) - 1), st.integers(0, len(LABELS) - 1), st.integers(0, 2)),
            max_size=4,
        ).map(tuple),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=14,
)
SETTINGS = IncidentSettings(quiet_s=20.0, reopen_s=60.0, ring_windows=8)


def feeds(drawn: Sequence[Minute]) -> list[list[Item]]:
    """The drawn minutes as what the pipeline would feed: windows and anomalies; `on`, `still`, `off` as they come."""
    slots, out = Slots(), list[list[Item]]()
    on: dict[tuple[int, int], float] = {}
    for i, m in enumerate(drawn):
        start = T0 + i * W
        items: list[Item] = [
            window(
                slots,
                start,
                traffic(
                    fails=m.fails, klass=("overloaded", "auth")[m.where % 2], where=dict(LABELS[m.where]), n=2
                ),
            )
        ]
        for s, where, phase in dict.fromkeys(m.stated):
            signal, klass = SIGNALS[s]
            since = on.setdefault((s, where), start)
            items.append(
                anomaly(
                    signal,
                    dict(LABELS[where]),
                    since,
                    start + W,
                    klass=klass,
                    phase=("on", "still", "off")[phase],
                )
            )
            if phase == 2:
                del on[(s, where)]
        out.append(items)
        extra: list[Item] = []
        if m.other == 1:
            extra.append(Change(at=start, kind="deploy", summary="x", labels={"app": "bot"}))
        if m.other == 2:
            extra.append(Batch([AgentStep(at=start, run="r1", agent="coder", app="bot")], sender="gw"))
        if m.other == 3:
            extra.append(Batch([GpuSample(at=start, gpu="g1", node="n1", deployment="vllm-1", model="m")]))
        out.append(extra)
    return out


def acts(c: Correlator, i: int, other: int) -> list[IncidentChange]:
    """What planner and executor would report about the first open incident."""
    found = c.open_incidents()
    if not found or other < 4:
        return []
    at, incident = T0 + (i + 1) * W, found[0].id
    d = Directive(
        id="DIR-1", kind="redirect", scope={"provider": "b"}, params={"to": {"provider": "a"}, "share": 0.5}, granted_at=at,
        expires_at=at + 600, incident=incident, runbook="r", step="s",
    )  # fmt: skip
    change = {4: "granted", 5: "renewed", 6: "released", 7: "expired"}.get(other)
    if change is not None:
        return c.feed([DirectiveChange(directive=d, at=at, change=change, reason="r")])  # type: ignore[arg-type]
    result: Literal["verified", "unverified"] = "verified" if other == 8 else "unverified"
    return c.feed(
        [Outcome(at=at, incident=incident, runbook="r", step="s", action="redirect", result=result)]
    )


def drive(
    drawn: Sequence[Minute], *, restart: Sequence[int] = (), shuffle: int | None = None
) -> tuple[list[bytes], Correlator]:
    c = Correlator(SETTINGS)
    rng = random.Random(shuffle)
    out: list[IncidentChange] = []
    for i, items in enumerate(feeds(drawn)):
        if i in restart:
            saved = c.snapshot()
            c = Correlator(SETTINGS)
            c.restore(saved)
        if shuffle is not None:
            first = [x for x in items if not isinstance(x, Anomaly)]
            rest = [x for x in items if isinstance(x, Anomaly)]
            rng.shuffle(rest)
            items = [*first, *rest]
        out += c.feed(items)
        if i % 2:
            out += acts(c, i // 2, drawn[i // 2].other)
            out += c.tick(T0 + (i // 2 + 1) * W)
    out += c.tick(T0 + 2000.0)
    return [msgspec.msgpack.encode(x) for x in out], c


@settings(max_examples=40, deadline=None)
@given(minutes)
def test_the_same_input_gives_the_same_output(drawn: list[Minute]) -> None:
    assert drive(drawn)[0] == drive(drawn)[0]


@settings(max_examples=40, deadline=None)
@given(minutes, st.lists(st.integers(0, 28), max_size=3))
def test_a_restart_at_any_point_changes_nothing_after(drawn: list[Minute], at: list[int]) -> None:
    plain, a = drive(drawn)
    restarted, b = drive(drawn, restart=at)
    assert plain == restarted
    assert a.incidents() == b.incidents()


@settings(max_examples=40, deadline=None)
@given(minutes, st.integers(0, 1000))
def test_order_of_anomalies_within_one_window_does_not_show(drawn: list[Minute], seed: int) -> None:
    assert drive(drawn)[0] == drive(drawn, shuffle=seed)[0]


@settings(max_examples=60, deadline=None)
@given(minutes)
def test_every_step_of_every_incident_stands_in_the_table(drawn: list[Minute]) -> None:
    changes = [msgspec.msgpack.decode(x, type=IncidentChange) for x in drive(drawn)[0]]
    legal = {(str(a), str(b)) for (a, _), b in TABLE.items()}
    state: dict[str, str] = {}
    revision: dict[str, int] = {}
    paged: dict[str, bool] = {}
    for c in changes:
        i = c.incident
        assert c.old == state.get(i.id, "")
        assert c.new == i.state
        assert c.reason
        assert c.old in ("", c.new) or (c.old, c.new) in legal
        assert i.revision == revision.get(i.id, 0) + 1
        assert i.page or not paged.get(i.id), "a page is never taken back"
        assert (i.resolved_at is not None) == (i.state is State.RESOLVED)
        state[i.id], revision[i.id], paged[i.id] = c.new, i.revision, i.page


@settings(max_examples=60, deadline=None)
@given(minutes)
def test_one_open_incident_per_root_and_signal_family(drawn: list[Minute]) -> None:
    _, c = drive(drawn)
    open_now = [(i.root, tuple(sorted(i.scope.items())), i.signal, i.klass) for i in c.open_incidents()]
    assert len(open_now) == len(set(open_now))


@given(st.sampled_from(list(State)), st.sampled_from(list(Step)))
def test_lifecycle_refuses_what_the_table_does_not_know(state: State, step: Step) -> None:
    if (state, step) in TABLE:
        assert advance(state, step) is TABLE[state, step]
    else:
        with pytest.raises(ConfigError, match="cannot"):
            advance(state, step)


def test_replay_gives_the_same_ids() -> None:
    ids = []
    for _ in range(2):
        lab = Lab()
        lab.quiet(12)
        lab.step(
            traffic(fails=0.6, where={"provider": "b"}), lab.on("llm.errors", "overloaded", provider="b")
        )
        ids.append(lab.only().id)
    assert ids[0] == ids[1]


def test_foreign_snapshot_is_refused() -> None:
    with pytest.raises(SnapshotError):
        Correlator().restore(b"nonsense")


def test_a_full_table_of_cells_forgets_the_past_and_not_the_present() -> None:
    lab = Lab(IncidentSettings(max_cells=1_000, ring_windows=6))
    for i in range(12):
        cells = traffic()
        for c in cells:
            c.labels["tenant"] += f"-{i}"
        lab.step(cells)
    ill = traffic(fails=0.6, where={"provider": "b"}, n=5)
    lab.step(ill, lab.on("llm.errors", "overloaded", provider="b"))
    assert str(lab.only().root) == "provider:b"
