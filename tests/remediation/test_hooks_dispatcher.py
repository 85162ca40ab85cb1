"""Each start reaches a hook at most once, each cancel and undo until it is answered, and every one has an end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from flyball.core.directives import Operation
from flyball.remediation.hooks import Dispatcher, HookClient, HookDispatchSettings
from tests.remediation._hooks import AT, Fault, Killed, MemoryStore, Platform, Time, hook, operation


@dataclass
class World:
    """A queue, a hook and a clock, and dispatchers that live one after the other."""

    platform: Platform = field(default_factory=Platform)
    store: MemoryStore = field(default_factory=MemoryStore)
    clock: Time = field(default_factory=Time)
    wanted: Callable[[Operation], bool] = lambda op: True
    settings: HookDispatchSettings = field(default_factory=HookDispatchSettings)
    deaths: int = 0

    def live(self, upto_s: float = 0.0) -> World:
        """Does what is due, again and again until `upto_s` later; a death in between is followed by another life."""
        end = self.clock.at + upto_s
        while True:
            try:
                asyncio.run(self._drain())
            except Killed:
                self.deaths += 1
                self.store.die_at = self.platform.die_at = -1
                continue
            coming = [e.due_at for e in self.store.open]
            if not coming or min(coming) > end:
                self.clock.at = end
                return self
            self.clock.at = max(self.clock.at, min(coming))

    async def _drain(self) -> None:
        async with httpx.AsyncClient(transport=self.platform, trust_env=False) as client:
            dispatcher = Dispatcher(
                self.store,
                HookClient([hook()], client, self.clock),
                lambda op: self.wanted(op),
                clock=self.clock,
                rng=random.Random(1),
                settings=self.settings,
            )
            await dispatcher.drain()

    @property
    def starts(self) -> int:
        return sum(p["verb"] == "start" and not p["dry_run"] for p in self.platform.posts)


def world(*faults: Fault, op: Operation | None = None, **platform: Any) -> World:
    made = World(Platform(faults=list(faults), **platform))
    made.store.put(op or operation())
    return made


# --- start ---------------------------------------------------------------------------------------------------------


def test_a_start_is_sent_and_asked_about_until_it_ends() -> None:
    w = world(ends="")
    w.live()
    assert w.store.statuses() == ["accepted"]
    w.live(60)
    w.platform.ends = "succeeded"
    w.live(600)
    assert (w.store.statuses(), w.starts, w.store.open) == (["accepted", "succeeded"], 1, [])


@pytest.mark.parametrize(
    "status", ["succeeded", "failed_applied", "failed_not_applied", "rejected", "unsupported"]
)
def test_an_immediate_end_is_told_and_not_asked_about(status: str) -> None:
    w = world(answers=status).live(600)
    assert (w.store.statuses(), w.platform.requests) == ([status], 1)


@pytest.mark.parametrize("fault", ["no_connection", "http_429", "http_503"])
def test_what_was_certainly_not_taken_is_told_once_and_not_sent_again(fault: Fault) -> None:
    """The executor orders the next attempt, or does not."""
    w = world(fault).live(600)
    assert (len(w.store.reports), w.platform.requests, w.store.open) == (1, 1, [])
    assert w.store.reports[0].status in ("not_reached", "rejected")


@pytest.mark.parametrize("fault", ["no_answer", "http_500", "gibberish"])
def test_a_lost_answer_is_asked_for_and_the_start_is_not_sent_again(fault: Fault) -> None:
    w = world(fault, answers="succeeded").live(600)
    assert (w.store.statuses(), w.starts, w.platform.done["OP-1", "start"]) == (["succeeded"], 1, 1)


def test_a_start_that_may_have_been_lost_is_told_as_unknown_after_a_while_and_not_sent_again() -> None:
    w = world("not_taken")
    w.live(5)
    assert w.store.statuses() == []
    w.live(600)
    assert w.store.statuses() == ["ambiguous"]
    w.live(10_000)
    assert (w.store.statuses(), w.starts, w.store.open) == (["ambiguous"], 0, [])


def test_what_was_unknown_is_told_when_the_hook_answers_again() -> None:
    silent: list[Fault] = ["no_connection"] * 12
    w = world("no_answer", *silent)
    w.live(60)
    assert w.store.statuses() == ["ambiguous"]
    w.live(1200)
    assert (w.store.statuses()[-1], w.starts, w.store.open) == ("succeeded", 1, [])


def test_a_hook_that_forgets_what_it_accepted_leaves_it_unknown() -> None:
    w = world()
    w.live()
    w.platform.status.clear()
    w.live(60)
    assert w.store.statuses() == ["accepted", "ambiguous"]


def test_an_operation_that_never_ends_is_given_up_after_its_deadline() -> None:
    w = world(ends="").live(20_000)
    assert (w.store.statuses(), w.store.open) == (["accepted", "ambiguous"], [])


def test_a_hook_that_says_itself_that_it_does_not_know_is_asked_further() -> None:
    w = world(answers="ambiguous")
    w.live(30)
    assert w.store.statuses() == ["ambiguous"]
    w.platform.status["OP-1", "start"] = "failed_applied"
    w.live(600)
    assert w.store.statuses() == ["ambiguous", "failed_applied"]


def test_after_its_deadline_a_start_is_not_sent() -> None:
    w = world(op=operation(deadline=AT - 1)).live()
    assert (w.store.statuses(), w.store.reports[0].code, w.platform.requests) == (
        ["cancelled"],
        "deadline",
        0,
    )


def test_what_is_not_wanted_any_more_is_not_sent() -> None:
    w = world()
    w.wanted = lambda op: False
    w.live()
    assert (w.store.statuses(), w.store.reports[0].code, w.platform.requests) == (
        ["cancelled"],
        "not_wanted",
        0,
    )


def test_a_stop_that_comes_while_the_start_is_being_marked_still_holds_it_back() -> None:
    w = world()
    w.wanted = lambda op: w.store.calls == 0
    w.live()
    assert (w.store.calls > 0, w.store.statuses(), w.platform.requests) == (True, ["cancelled"], 0)


def test_a_start_that_somebody_else_has_marked_is_left_alone() -> None:
    w = world()

    class Late(MemoryStore):
        async def mark_sending(self, operation: Operation, at: float) -> bool:
            self.entry(operation).finished = True
            return await super().mark_sending(operation, at)

    w.store = Late(w.store.entries)
    w.live()
    assert (w.platform.requests, w.store.reports) == (0, [])


def test_a_dry_run_is_told_and_over() -> None:
    w = world(op=operation(dry_run=True)).live(600)
    (report,) = w.store.reports
    assert (report.status, report.dry_run, report.predicted) == ("accepted", True, {"nodes": 1})
    assert (w.platform.requests, w.store.open) == (1, [])


def test_a_dry_run_whose_answer_is_lost_by_a_crash_may_be_sent_again() -> None:
    w = world(op=operation(dry_run=True), die_at=1, die_after=True).live(600)
    assert (w.deaths, [r.status for r in w.store.reports], w.store.open) == (1, ["not_reached"], [])


# --- cancel, undo --------------------------------------------------------------------------------------------------


def test_a_cancel_of_what_was_never_sent_is_told_without_asking_the_hook() -> None:
    w = world()
    w.wanted = lambda op: False
    w.store.put(operation(verb="cancel", epoch=2))
    w.live(600)
    assert (w.store.statuses("cancel"), w.store.statuses("start"), w.platform.requests) == (
        ["cancelled"],
        ["cancelled"],
        0,
    )


def test_a_cancel_is_sent_when_the_start_may_have_been() -> None:
    w = world(ends="")
    w.live()
    w.store.put(operation(verb="cancel", epoch=2))
    w.live(600)
    assert (w.store.statuses("cancel"), w.store.statuses("start")) == (
        ["cancelled"],
        ["accepted", "cancelled"],
    )


@pytest.mark.parametrize("verb", ["cancel", "undo"])
@pytest.mark.parametrize("fault", ["no_answer", "not_taken", "http_500", "gibberish"])
def test_recovery_without_a_clear_answer_is_repeated(fault: Fault, verb: Any) -> None:
    w = world(ends="succeeded").live(60)
    w.platform.faults = [fault, fault]
    w.store.put(operation(verb=verb, epoch=2))
    w.live(60)
    assert (w.store.statuses(verb)[-1], w.store.open) == ("succeeded", [])
    assert "ambiguous" not in w.store.statuses(verb)
    assert w.platform.done["OP-1", "undo"] == (verb == "undo")


def test_recovery_that_gets_no_clear_answer_for_long_is_told_and_goes_on() -> None:
    w = world(answers="succeeded").live()
    w.platform.faults = ["not_taken"] * 8
    w.store.put(operation(verb="undo", epoch=2))
    w.live(1200)
    assert w.store.statuses("undo") == ["ambiguous", "succeeded"]


@pytest.mark.parametrize("verb", ["cancel", "undo"])
def test_recovery_is_neither_held_back_by_a_stop_nor_by_a_deadline(verb: Any) -> None:
    w = world(answers="succeeded").live()
    w.wanted = lambda op: False
    w.store.put(operation(verb=verb, epoch=2, deadline=AT - 1))
    w.live(60)
    assert w.store.statuses(verb) == ["succeeded"]


def test_recovery_is_given_up_in_words_when_there_is_no_end_to_it() -> None:
    w = world(answers="succeeded").live()
    w.platform.faults = ["not_taken"] * 1000
    w.store.put(operation(verb="undo", epoch=2))
    w.live(10_000)
    assert (w.store.statuses("undo"), w.store.open) == (["ambiguous", "ambiguous"], [])


def test_an_undo_that_a_crash_cut_off_is_sent_again() -> None:
    w = world(answers="succeeded").live()
    w.store.put(operation(verb="undo", epoch=2))
    w.platform.die_at, w.platform.die_after = w.platform.requests + 1, True
    w.live(60)
    assert (w.deaths, w.store.statuses("undo"), w.platform.done["OP-1", "undo"]) == (1, ["succeeded"], 1)


def test_recovery_does_not_wait_for_the_turn_of_starts() -> None:
    """Four starts hang at the hook, as many as it is sent at once; an undo of another operation passes them."""

    class Hanging(Platform):
        released = asyncio.Event()

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if b'"verb":"start"' in await request.aread():
                await self.released.wait()
            answer = await super().handle_async_request(request)
            if b'"verb":"undo"' in await request.aread():
                self.released.set()
            return answer

    w = world()
    w.platform = Hanging(answers="succeeded")
    for number in range(6):
        w.store.put(operation(f"OP-S{number}"))
    w.store.put(operation("OP-U", "undo", at=AT + 1))
    w.live(60)
    assert w.store.statuses("undo") == ["succeeded"]
    assert len(w.store.statuses("start")) == 7


# --- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_crash_around_any_write_starts_nothing_twice(call: int, after: bool) -> None:
    w = world()
    w.store.die_at, w.store.die_after = call, after
    w.live(10_000)
    assert w.deaths == (1 if w.store.calls > call else w.deaths)
    assert (w.starts <= 1, w.platform.done["OP-1", "start"] <= 1, w.store.open) == (True, True, [])
    assert w.store.statuses()[-1] == ("succeeded" if w.starts else "ambiguous")


@pytest.mark.parametrize("after", [False, True], ids=["before it arrived", "after it was taken"])
def test_a_crash_while_sending_is_asked_about_and_never_sent_again(after: bool) -> None:
    w = world(die_at=1, die_after=after).live(10_000)
    assert (w.deaths, w.starts) == (1, int(after))
    assert w.store.statuses()[-1] == ("succeeded" if after else "ambiguous")
    assert w.store.open == []


FAULTS = st.sampled_from(["", "", "no_connection", "no_answer", "not_taken", "http_500", "http_503", "http_429", "gibberish"])  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    faults=st.lists(FAULTS, max_size=12),
    ends=st.sampled_from(["succeeded", "failed_applied", ""]),
    later=st.lists(st.sampled_from(["cancel", "undo", "retry"]), max_size=3),
    gaps=st.lists(st.floats(0, 400), min_size=3, max_size=3),
    crash=st.tuples(st.booleans(), st.integers(-1, 8), st.booleans()),
)
def test_whatever_fails_and_wherever_it_is_killed_nothing_is_done_twice_and_everything_ends(
    faults: list[Fault],
    ends: str,
    later: list[Any],
    gaps: list[float],
    crash: tuple[bool, int, bool],
) -> None:
    w = World(Platform(faults=list(faults), ends=ends))
    w.store.put(operation())
    at_store, number, after = crash
    victim: Any = w.store if at_store else w.platform
    victim.die_at, victim.die_after = number, after
    attempt = 1
    for epoch, (verb, gap) in enumerate(zip(later, gaps, strict=False), 2):
        w.live(gap)
        said = [(r.attempt, r.status) for r in w.store.reports if r.verb == "start"]
        if verb != "retry":
            w.store.put(operation(verb=verb, epoch=epoch))
        elif said[-1:] == [(attempt, "not_reached")]:
            attempt += 1
            w.store.put(operation(attempt=attempt, epoch=epoch))
    w.live(20_000)
    assert all(count == 1 for count in w.platform.done.values())
    assert len([p for p in w.platform.posts if p["verb"] == "start"]) <= 1
    assert w.store.open == []
    told = {(r.id, r.verb, r.attempt) for r in w.store.reports}
    assert told == set(w.store.entries)


def test_run_goes_on_until_it_is_stopped_and_finishes_what_it_sends() -> None:
    w = world(answers="succeeded")

    async def main() -> None:
        stop = asyncio.Event()
        async with httpx.AsyncClient(transport=w.platform, trust_env=False) as client:
            sender = HookClient([hook()], client, w.clock)
            dispatcher = Dispatcher(w.store, sender, lambda op: True, clock=w.clock, rng=random.Random(1), settings=replace(w.settings, poll_s=60.0))  # fmt: skip
            running = asyncio.create_task(dispatcher.run(stop))
            while not w.store.reports:
                await asyncio.sleep(0)
            w.store.put(operation("OP-2"))
            dispatcher.wake()
            while len(w.store.reports) < 2:
                await asyncio.sleep(0)
            stop.set()
            await running
            assert dispatcher.counts["succeeded"] == 2

    asyncio.run(main())
