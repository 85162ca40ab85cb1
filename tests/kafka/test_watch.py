"""When a role is said to be stuck, and when not; against brokers that are played."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from flyball.streams.kafka.client import KafkaError, Place
from flyball.streams.kafka.watch import Stuck, Watch

A, B = Place("flyball.llm-calls", 0), Place("flyball.llm-calls", 1)
STUCK_S = 0.4
"""At least ten turns, however long one of them takes on a busy machine."""


@dataclass
class Brokers:
    """Answers for partitions that have a leader."""

    offsets: dict[Place, int]
    leaderless: set[Place] = field(default_factory=set)
    asked: int = 0
    on_asked: Callable[[int], None] = lambda _n: None

    def sources(self) -> list[Place]:
        return sorted(self.offsets)

    async def ends(self, places: Iterable[Place]) -> dict[Place, int]:
        self.asked += 1
        self.on_asked(self.asked)
        if self.leaderless.intersection(places):
            raise KafkaError("no leader")
        return {p: self.offsets[p] for p in places}


@dataclass
class Role:
    """What is owned and how far it is; `work` moves it between two looks of the watch."""

    brokers: Brokers
    at: dict[Place, int]
    standing: set[Place] = field(default_factory=set)
    moving: set[Place] = field(default_factory=set)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(
            self.brokers, "flyball-windows", STUCK_S, 0.01, at=self._at, standing=lambda: self.standing, doing=lambda: "reading",
            step_s=STUCK_S / 10,
        )  # fmt: skip

    def _at(self) -> dict[Place, int]:
        for p in self.moving:
            self.at[p] += 1
        return self.at

    def stuck(self) -> str:
        """What the watch said, or nothing after three times as long as it bears."""

        async def go() -> None:
            self.watch.reads()
            await asyncio.wait_for(self.watch.run(), 3 * STUCK_S)

        try:
            asyncio.run(go())
        except TimeoutError:
            return ""
        except Stuck as e:
            return str(e)
        raise AssertionError("it ended without a reason")


def test_records_that_wait_while_nothing_is_taken_end_it_and_the_partition_is_named() -> None:
    role = Role(Brokers({A: 10, B: 10}), {A: 7, B: 10})
    assert re.fullmatch(
        r"nothing of flyball\.llm-calls/0 was taken for \d s, but 3 records wait there; at reading",
        role.stuck(),
    )
    assert role.watch.lag() == {A: 3, B: 0}


def test_one_that_moves_does_not_excuse_one_that_does_not() -> None:
    role = Role(Brokers({A: 10**9, B: 10}), {A: 0, B: 9}, moving={A})
    assert "llm-calls/1" in role.stuck()


@pytest.mark.parametrize(
    "role",
    [
        Role(Brokers({A: 10, B: 10}), {A: 10, B: 10}),
        Role(Brokers({A: 10**9}), {A: 0}, moving={A}),
        Role(Brokers({A: 10, B: 10}), {A: 0, B: 10}, standing={A}),
        Role(Brokers({A: 10, B: 10}), {}),
    ],
    ids=["all is read", "it moves", "it stands on purpose", "it owns nothing"],
)
def test_who_has_nothing_to_do_or_does_it_is_not_stuck(role: Role) -> None:
    assert role.stuck() == ""
    assert role.brokers.asked > 3


def test_who_stores_a_large_state_meanwhile_is_at_work() -> None:
    role = Role(Brokers({A: 10}), {A: 5})
    role.brokers.on_asked = lambda _: role.watch.at_work()
    assert role.stuck() == ""
    assert role.watch.lag() == {A: 5}


def test_a_partition_without_a_leader_ends_nothing_and_hides_nothing() -> None:
    role = Role(Brokers({A: 10, B: 10}, leaderless={A}), {A: 5, B: 10})
    assert role.stuck() == ""
    assert role.watch.lag() == {B: 0}
    role = Role(Brokers({A: 10, B: 10}, leaderless={A}), {A: 5, B: 8})
    assert "llm-calls/1" in role.stuck()


def test_brokers_of_which_none_answers_are_told_as_that() -> None:
    role = Role(Brokers({A: 10}, leaderless={A}), {A: 5})
    assert re.fullmatch(r"no broker has answered for \d s; at reading", role.stuck())


def test_what_is_waited_for_is_named_and_each_step_towards_it_gives_more_time() -> None:
    role = Role(Brokers({A: 10}), {})

    async def go(steps: int) -> None:
        role.watch.waits("the state of its partitions could not be read")
        role.brokers.asked, role.brokers.on_asked = 0, lambda n: role.watch.moved() if n <= steps else None
        await asyncio.wait_for(role.watch.run(), 60.0)

    for steps in (0, 50):
        with pytest.raises(Stuck, match=r"the state .* could not be read for \d s \(group flyball-windows\)"):
            asyncio.run(go(steps))
        assert role.brokers.asked >= steps + 10


def test_a_process_that_was_suspended_finds_its_time_where_it_was() -> None:
    role = Role(Brokers({A: 10}), {A: 5})
    role.brokers.on_asked = lambda n: time.sleep(2 * STUCK_S) if n == 3 else None
    assert "5 records wait" in role.stuck()
    assert role.brokers.asked >= 10
