"""The role `windows` on a real broker: what it tells equals windows made in one piece, whoever comes, goes or dies."""

from __future__ import annotations

import asyncio

from flyball.streams.kafka.config import KafkaConfig
from tests.kafka._windows import (
    CALLS,
    assert_same,
    calls,
    end,
    in_one_piece,
    made,
    merge,
    put_calls,
    run,
    running,
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


def ends(config: KafkaConfig, partitions: int, n: int) -> dict[str, int]:
    return {f"{config.topic(CALLS)}/{p}": n for p in range(partitions)}
