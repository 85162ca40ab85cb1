"""What every runtime promises, one body for each: nothing lost or counted twice, exact sums, order, poison, lateness, back-pressure."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import Future
from random import Random
from typing import Any

import msgspec

from flyball.app.writer import Overloaded
from flyball.core.events import AgentStep, Event, LlmCall
from tests.app._runtime import NOW, outage, well
from tests.contract._runtimes import Memory, Runtime
from tests.streams.test_windows_properties import check

LATER = 60.0


def calls(random: Random, n: int, at: float) -> list[Event]:
    """Calls of about one moment. Their numbers are sixteenths, so that sums are exact in any order."""
    return [
        LlmCall(
            at=at + random.randrange(16) / 16, id=f"{random.getrandbits(64):x}", provider=random.choice("ab"),
            model=random.choice(["m", "n", ""]), app=random.choice(["shop", "chat"]), tenant=random.choice("tuvw"),
            error=random.choice(["", "", "", "timeout", "auth"]), input_tokens=random.randrange(4000),
            output_tokens=random.choice([None, 0, 17, 400]), cost_usd=random.randrange(1, 64) / 16,
            latency_s=random.randrange(1, 400) / 16,
        )
        for _ in range(n)
    ]  # fmt: skip


def stream(seed: int, seconds: int, senders: int = 3) -> list[tuple[float, str, list[Event]]]:
    """(arrival, sender, events) of bodies that several senders send every second."""
    random = Random(seed)
    return [
        (NOW + second + 1.25, f"gateway-{k}", calls(random, random.randrange(1, 12), NOW + second))
        for second in range(seconds)
        for k in range(senders)
    ]  # fmt: skip


def in_windows(runtime: Runtime) -> Counter[float]:
    """Start of each closed window → calls in it. A window that comes twice would be there twice."""
    found = runtime.seen().windows
    starts = [w.start for w in found]
    assert len(starts) == len(set(starts)), "a window came twice"
    assert starts == sorted(starts)
    return Counter({w.start: int(w.cells.calls.sum()) for w in found})


def test_nothing_is_lost_and_every_sum_is_exact(runtime: Runtime) -> None:
    given = stream(1, 45)
    for at, sender, events in given:
        runtime.give(events, sender, at)
    runtime.pass_time(NOW + 45 + LATER)
    everything = [e for _, _, events in given for e in events]
    seen = runtime.seen()
    assert seen.events == {"llm_call": len(everything)}
    assert (seen.late, seen.duplicates) == (0, 0)
    assert sum(in_windows(runtime).values()) == len(everything)
    check(seen.windows, [e for e in everything if isinstance(e, LlmCall)])


def test_what_is_sent_twice_counts_once(runtime: Runtime) -> None:
    given = stream(2, 25)
    for at, sender, events in given:
        runtime.give(events, sender, at)
        if sender == "gateway-1":  # its answer got lost
            runtime.give(events, sender, at + 0.5)
    runtime.pass_time(NOW + 25 + LATER)
    everything = [e for _, _, events in given for e in events]
    again = sum(len(events) for _, sender, events in given if sender == "gateway-1")
    seen = runtime.seen()
    assert seen.events == {"llm_call": len(everything)}
    assert seen.duplicates == again > 0
    check(seen.windows, [e for e in everything if isinstance(e, LlmCall)])


def test_a_restart_in_the_middle_loses_nothing_and_counts_nothing_twice(runtime: Runtime) -> None:
    given = stream(3, 35)
    for k, (at, sender, events) in enumerate(given):
        if k in (40, 90):
            runtime.restart()
        runtime.give(events, sender, at)
    runtime.restart()
    runtime.pass_time(NOW + 35 + LATER)
    everything = [e for _, _, events in given for e in events]
    seen = runtime.seen()
    assert seen.events == {"llm_call": len(everything)}
    assert sum(in_windows(runtime).values()) == len(everything)
    check(seen.windows, [e for e in everything if isinstance(e, LlmCall)])


def test_the_steps_of_a_run_stay_in_their_order(runtime: Runtime) -> None:
    random = Random(4)
    given: dict[str, list[str]] = {f"run-{k}": [] for k in range(7)}
    for second in range(30):
        body: list[Event] = list(calls(random, 3, NOW + second))
        for run, steps in random.sample(list(given.items()), 4):
            for _ in range(random.randrange(1, 4)):
                steps.append(f"{run}:{len(steps)}")
                body.append(AgentStep(at=NOW + second, run=run, agent="coder", tool="grep", id=steps[-1]))
        runtime.give(body, random.choice(["one", "other"]), NOW + second + 1.25)
    runtime.pass_time(NOW + 30 + LATER)
    found: dict[str, list[str]] = {run: [] for run in given}
    for event in runtime.seen().singles:
        if isinstance(event, AgentStep):
            found[event.run].append(event.id)
    assert found == given


def test_bad_lines_amid_good_ones_are_kept_and_the_good_ones_count(runtime: Runtime) -> None:
    good = calls(Random(5), 20, NOW)
    bad = {
        b'{"type": "llm_call", "at":': "json",
        b'{"type": "llm_call", "at": "soon"}': "type",
        b'{"type": "llm_call", "at": 12.0, "id": "long-ago"}': "timestamp",
    }
    lines = [msgspec.json.encode(e) for e in good]
    for k, line in enumerate(bad):
        lines.insert(5 * (k + 1), line)
    runtime.clock.at = NOW + 1.25
    runtime.give_lines(b"\n".join(lines))
    runtime.give(calls(Random(6), 5, NOW + 1))
    runtime.pass_time(NOW + 1 + LATER)
    seen = runtime.seen()
    assert seen.events == {"llm_call": 25}
    assert sum(in_windows(runtime).values()) == 25
    if runtime.keeps_poison:
        found = [(_what(body or b""), reason) for body, reason in seen.letters]
        assert found == [(_what(line), reason) for line, reason in bad.items()]
    else:
        assert Counter(reason for _, reason in seen.letters) == Counter(bad.values())


def _what(line: bytes) -> Any:
    """A line that is JSON may be written down with other spaces."""
    try:
        return json.loads(line)
    except ValueError:
        return line


def test_what_comes_after_its_window_closed_is_counted_and_in_no_window(runtime: Runtime) -> None:
    in_time, late, next_day = (calls(Random(7 + k), 12, at) for k, at in enumerate((NOW, NOW, NOW + 80)))
    runtime.give(in_time)
    runtime.pass_time(NOW + LATER)
    closed = in_windows(runtime)
    assert closed == {NOW: 12}
    runtime.give(late, received_at=NOW + LATER + 1)
    runtime.give(next_day)
    runtime.pass_time(NOW + 80 + LATER)
    seen = runtime.seen()
    assert seen.events == {"llm_call": 36}
    if runtime.sorts:
        assert (seen.late, in_windows(runtime)) == (0, {NOW: 24, NOW + 80: 12})
    else:
        assert (seen.late, in_windows(runtime)) == (12, {NOW: 12, NOW + 80: 12})


def test_more_than_may_wait_is_turned_away_and_loses_nothing_when_it_comes_again(runtime: Runtime) -> None:
    random = Random(10)
    bodies = [calls(random, 60, NOW + k // 10) for k in range(60)]
    waiting: list[Future[int]] = []
    refused = 0
    for body in bodies:
        while True:
            try:
                waiting.append(runtime.offer(body, received_at=NOW + 7))
                break
            except Overloaded:
                refused += 1
                assert waiting, "turned away with nothing before it"
                waiting.pop(0).result(60)
    for done in waiting:
        done.result(60)
    assert (refused > 0) == runtime.waits
    runtime.pass_time(NOW + 6 + LATER)
    everything = [e for body in bodies for e in body]
    seen = runtime.seen()
    assert seen.events == {"llm_call": len(everything)}
    assert sum(in_windows(runtime).values()) == len(everything)
    check(seen.windows, [e for e in everything if isinstance(e, LlmCall)])


def test_an_outage_is_the_same_incident_everywhere(runtime: Runtime) -> None:
    with Memory(runtime.folder) as reference:
        for r in (reference, runtime):
            for second in range(40):
                r.give(well(NOW + second) if second < 20 else outage(NOW + second))
            r.pass_time(NOW + 40 + LATER)
    wanted = reference.seen().opened
    assert len(wanted) == 1
    assert runtime.seen().opened == wanted
