"""The role `windows` on a real broker: what it tells equals windows made in one piece, whoever comes, goes or dies."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from flyball.core.entities import Entity
from flyball.core.events import LlmCall
from flyball.core.incident import IncidentChange, State
from flyball.streams.kafka.admin import connected
from flyball.streams.kafka.breaker import PoisonSettings
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import from_record
from flyball.streams.portion import Halt, Portion
from tests.app._runtime import make_pipeline
from tests.kafka._topics import records
from tests.kafka._windows import (
    CALLS,
    END,
    NOW,
    QUICK,
    WINDOWS,
    assert_same,
    calls,
    end,
    in_one_piece,
    line,
    made,
    merge,
    put,
    put_calls,
    run,
    running,
    said,
    said_until,
)


def test_two_of_a_group_share_the_partitions_and_lose_or_double_nothing_as_they_come_and_go(
    kafka_config: KafkaConfig,
) -> None:
    config, all_calls = made(kafka_config, 4), calls(0, 1200)

    async def go() -> None:
        put_calls(config, 4, all_calls[:400])
        async with running(config) as first:
            await first.until(lambda: first.role.figures().events >= 400)
            async with running(config) as second:
                await second.until(lambda: 0 < len(second.role.figures().owned) < 13)
                await first.until(lambda: 0 < len(first.role.figures().owned) < 13)
                await asyncio.to_thread(put_calls, config, 4, all_calls[400:800])
                await first.end()
                assert await asyncio.to_thread(members, config) == 1, "left at once, not missed after a while"
                await second.owns(13)
                await asyncio.to_thread(put_calls, config, 4, all_calls[800:])
                await asyncio.to_thread(end, config, 4)
                portions = await said_until(config, ends(config, 4, 76), second)
                assert second.role.figures().rebalances >= 2
                await second.end()
        windows, merger = merge(portions)
        assert_same(windows, in_one_piece(all_calls))
        assert (merger.totals["llm_call"], merger.stats.late, merger.missed) == (1204, 0, 0)

    run(go())


def test_a_backlog_of_full_records_is_taken_in_turns(kafka_config: KafkaConfig) -> None:
    """Between them portions are told and state is stored, and no more is held at once."""
    config, all_calls = made(kafka_config, 1), calls(0, 40_000, step_s=0.001)
    put_calls(config, 1, all_calls, a_record=100)

    async def go() -> None:
        async with running(config, replace(QUICK, cut_s=0.005)) as role:
            portions = await said_until(config, ends(config, 1, 400), role)
            await role.end()
        assert len([p for p in portions if p.first <= p.last]) >= 3

    run(go())


def test_after_a_sudden_end_the_newest_snapshot_is_read_on_from(kafka_config: KafkaConfig) -> None:
    config, all_calls = made(kafka_config, 2), calls(0, 600)

    async def go() -> None:
        put_calls(config, 2, all_calls[:200])
        async with running(config) as first:
            await first.until(lambda: first.role.figures().events >= 200)
            stored = first.role.figures().snapshots
            await first.until(lambda: first.role.figures().snapshots > stored)
            await asyncio.to_thread(put_calls, config, 2, all_calls[200:400])
            await first.until(lambda: first.role.figures().events >= 300)
            await first.die()
        put_calls(config, 2, all_calls[400:])
        end(config, 2)
        async with running(config) as second:
            portions = await said_until(config, ends(config, 2, 76), second)
            # It has not begun at the beginning.
            assert second.role.figures().events < 602
            await second.end()
        windows, merger = merge(portions)
        assert_same(windows, in_one_piece(all_calls))
        assert (merger.totals["llm_call"], merger.stats.late, merger.missed) == (602, 0, 0)

    run(go())


def test_time_goes_on_in_a_partition_that_was_taken_over_although_nothing_more_comes(
    kafka_config: KafkaConfig,
) -> None:
    config, all_calls = made(kafka_config, 1), calls(0, 20)

    async def go() -> None:
        # It arrived so late that the window is to close when it has been quiet for three seconds.
        waits_s = WINDOWS.window_s + WINDOWS.max_delay_s
        put(config, 0, [b"\n".join(map(line, all_calls))], received_at=NOW + waits_s - 3.0)
        async with running(config) as first:
            await first.until(lambda: first.role.figures().snapshots > 0)
            await first.die()
        async with running(config) as second, asyncio.timeout(40.0):
            while not any(p.partials for p in await said(config)):
                await second.until(lambda: True)
                await asyncio.sleep(0.1)
            told = await said(config)
        windows, _ = merge(told)
        assert_same(windows, in_one_piece(all_calls))

    run(go())


@pytest.mark.parametrize("damage", ["mark", "piece", "gone"])
def test_without_a_readable_snapshot_the_committed_offset_will_do(
    kafka_config: KafkaConfig, damage: str
) -> None:
    config, all_calls = made(kafka_config, 1), calls(0, 400)
    place = f"{config.topic(CALLS)}/0"

    async def go() -> None:
        put_calls(config, 1, all_calls[:200])
        async with running(config) as first:
            await first.until(lambda: first.role.figures().events >= 200)
            await first.end()
        state = {r.key: r.value for r in records(config, ["state"]) if r.key.startswith(place.encode())}
        ruined = {
            "mark": {place.encode(): b"what?"},
            "piece": {k: v[:-7] + b"garbage" for k, v in state.items() if b"#" in k},
            "gone": {place.encode(): None},
        }[damage]
        assert ruined
        put(config, 0, ruined.values(), topic="state", keys=list(ruined))
        put_calls(config, 1, all_calls[200:])
        end(config, 1)
        async with running(config) as second:
            portions = await said_until(config, ends(config, 1, 101), second)
            # Windows that had been closed are not read again, those that were open are.
            assert 201 < second.role.figures().events < 401
            await second.end()
        windows, merger = merge(portions)
        assert_same(windows, in_one_piece(all_calls))
        assert (merger.stats.late, merger.missed) == (0, 0)

    run(go())


def test_late_calls_are_counted_and_stand_in_a_topic_with_why_and_how_late(kafka_config: KafkaConfig) -> None:
    config = made(kafka_config, 1)
    in_time, late = calls(0, 200), LlmCall(at=NOW + 3.0, id="late", provider="a", model="m0")

    async def go() -> None:
        put_calls(config, 1, in_time)
        put(config, 0, [b"\n".join([line(LlmCall(at=NOW + 50.0, id="good")), line(late)])], received_at=NOW + 50.0, headers=[("sender", b"gw")])  # fmt: skip
        end(config, 1)
        async with running(config) as role:
            portions = await said_until(config, ends(config, 1, 52), role)
            assert role.role.figures().late == 1
            await role.end()
        windows, merger = merge(portions)
        assert_same(windows, in_one_piece([*in_time, LlmCall(at=NOW + 50.0, id="good")]))
        assert merger.stats.late == 1

    run(go())
    (told,) = records(config, ["late"])
    headers = {name: value.decode() for name, value in told.headers}
    assert msgspec.json.decode(told.value, type=LlmCall) == late
    assert (headers["reason"], headers["sender"]) == ("window_closed", "gw")
    assert (headers["topic"], headers["partition"]) == (config.topic(CALLS), "0")
    assert (headers["offset"], headers["index"]) == ("50", "1")
    # 49.75 s is the newest before it, of which 2 s are waited for.
    assert float(headers["behind_s"]) == 49.75 - 2.0 - 3.0


def test_what_cannot_be_taken_goes_to_the_dead_letters_with_bytes_reason_and_place(
    kafka_config: KafkaConfig,
) -> None:
    config, good = made(kafka_config, 1), calls(0, 2)
    own = [("content-type", b"application/x-ndjson"), ("x", b"y")]

    async def go() -> None:
        put(config, 0, [b"\n".join([line(good[0]), b'{"type": "llm_call"', line(good[1])])], headers=own)
        put(config, 0, [b"\xff\x00 no event"], received_at=None)
        end(config, 1)
        async with running(config) as role:
            portions = await said_until(config, ends(config, 1, 3), role)
            assert sum(role.role.figures().rejected.values()) == 2
            assert not role.role.figures().halts
            await role.end()
        assert_same(merge(portions)[0], in_one_piece(good))

    run(go())
    found = [
        from_record(r.partition, r.offset, r.value, r.headers) for r in records(config, ["dead-letters"])
    ]
    assert [(x.topic, x.partition, x.offset, x.index) for x in found] == [
        (config.topic(CALLS), 0, 0, 1), (config.topic(CALLS), 0, 1, 0),
    ]  # fmt: skip
    assert [x.body for x in found] == [b'{"type": "llm_call"', b"\xff\x00 no event"]
    assert all(x.reason and x.detail for x in found)
    assert found[0].headers[-2:] == tuple(own)


POISON = PoisonSettings(ratio=0.5, least=10, retry_s=0.5)


def test_a_partition_of_bad_input_stands_keeps_its_place_and_is_not_emptied(
    kafka_config: KafkaConfig,
) -> None:
    config, good = made(kafka_config, 2), calls(0, 400)
    patient = replace(QUICK, poison=replace(POISON, retry_s=3600.0), stuck_s=1.5)
    bad = f"{config.topic(CALLS)}/0"

    async def go() -> None:
        put(config, 0, [line(c) for c in good[:4]])
        put(config, 0, [b"garbage %d" % i for i in range(300)])
        put(config, 1, [line(c) for c in good[4:200]], received_at=good[199].at)
        async with running(config, patient) as role:
            await role.until(lambda: bool(role.role.figures().halts))
            halt = role.role.figures().halts[bad]
            assert (halt.bad, halt.of, halt.reason) == (6, 10, "json")
            assert halt.offset == 9
            # The other one goes on, and the watchdog knows that this one stands on purpose: longer than `stuck_s`.
            await asyncio.to_thread(put, config, 1, [line(c) for c in good[200:]], received_at=good[-1].at)
            await role.until(lambda: role.role.figures().events == 400)
            await asyncio.sleep(2 * patient.stuck_s)
            assert role.role.figures().lag[bad] == 295
            await role.end()
        portions = await said(config)
        last = [p for p in portions if p.source == bad][-1]
        assert (last.last, last.halt) == (8, halt)

    run(go())
    assert len(records(config, ["dead-letters"])) == 5


def test_a_partition_that_stood_goes_on_when_its_input_is_good_and_has_lost_nothing(
    kafka_config: KafkaConfig,
) -> None:
    config, good = made(kafka_config, 1), calls(0, 240)
    quick = replace(QUICK, poison=POISON)

    async def go() -> None:
        put(config, 0, [line(c) for c in good[:40]], received_at=good[39].at)
        put(config, 0, [b"garbage %d" % i for i in range(70)], received_at=good[39].at)
        put(config, 0, [line(c) for c in good[40:]], received_at=good[-1].at)
        end(config, 1)
        async with running(config, quick) as first:
            await first.until(lambda: first.role.figures().stopped >= 2)
            await first.end()
        # It is given away while it stands, and the next one knows.
        async with running(config, quick) as second:
            await second.owns(4)
            portions = await said_until(config, ends(config, 1, 311), second)
            await second.until(lambda: not second.role.figures().halts)
            await second.end()
        portions = await said(config)
        windows, merger = merge(portions)
        assert_same(windows, in_one_piece(good))
        assert (merger.totals["llm_call"], merger.stats.late, merger.missed) == (241, 0, 0)
        told = [p.halt for p in portions if p.source.endswith("calls/0")]
        changes = [b for a, b in itertools.pairwise([None, *told]) if (a is None) != (b is None)]
        assert [isinstance(c, Halt) for c in changes] == [True, False], "told once, and once that it is over"
        incidents = [c.incident for c in control(portions)]
        assert len({i.id for i in incidents}) == 1
        assert (incidents[0].root, incidents[0].signal) == (Entity("stream", "flyball"), "stream.poison")
        assert incidents[0].evidence["record"] == 80, "as many bad ones as good ones before it"
        assert incidents[-1].state is State.RESOLVED

    run(go())
    letters = [dict(r.headers)["offset"] for r in records(config, ["dead-letters"])]
    assert sorted(map(int, letters)) == list(range(40, 110)), "each bad one, once"


def control(portions: Sequence[Portion]) -> list[IncidentChange]:
    """What is said of incidents when the portions come, and in the minutes after."""
    pipeline = make_pipeline()
    found = [c for p in portions for c in pipeline.feed_portion(p, END).changes]
    return found + [c for s in range(0, 200, 10) for c in pipeline.tick(END + s).changes]


def members(config: KafkaConfig) -> int:
    group = config.group("windows")
    with connected(config) as admin:
        return len(admin.describe_groups([group])[group]["members"])


def ends(config: KafkaConfig, partitions: int, n: int) -> dict[str, int]:
    return {f"{config.topic(CALLS)}/{p}": n for p in range(partitions)}
