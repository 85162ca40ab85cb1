"""A worker whose brokers or group stand still: it waits as long as is bearable, then says why and ends."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.windows_role import Stuck
from flyball.streams.kafka.worker import Worker
from tests.conftest import require_server
from tests.kafka._windows import (
    CALLS,
    QUICK,
    Running,
    assert_same,
    calls,
    end,
    in_one_piece,
    made,
    make_role,
    merge,
    put_calls,
    run,
    running,
    said_until,
)
from tests.kafka._workers import worker
from tests.servers.kafka_broker import CannotStart, Cluster, running_cluster
from tests.servers.kafka_ways import new_prefix

IMPATIENT = replace(QUICK, stuck_s=3.0)


def fresh(cluster: Cluster, partitions: int) -> KafkaConfig:
    return made(cluster.config(prefix=new_prefix()), partitions)


def loses_nothing(
    config: KafkaConfig, disturb: Callable[[Running], Awaitable[None]], after: int = 200
) -> None:
    """A worker that is disturbed once `after` of 400 calls were read counts them as one that was not."""
    all_calls = calls(0, 400)

    async def go() -> None:
        put_calls(config, 2, all_calls[:200])
        async with running(config) as role:
            await role.until(lambda: role.role.figures().events >= after)
            await disturb(role)
            await asyncio.to_thread(put_calls, config, 2, all_calls[200:])
            await asyncio.to_thread(end, config, 2)
            portions = await said_until(config, {f"{config.topic(CALLS)}/{p}": 51 for p in (0, 1)}, role)
            await role.end()
        windows, merger = merge(portions)
        assert_same(windows, in_one_piece(all_calls))
        assert (merger.totals["llm_call"], merger.stats.late, merger.missed) == (402, 0, 0)

    run(go())


def test_a_broker_that_pauses_ends_no_worker_and_loses_nothing(own_kafka: Cluster) -> None:
    """Longer than a session: the broker puts the member out of its group when it wakes."""
    node = own_kafka.nodes[0]

    async def pause(role: Running) -> None:
        node.pause()
        try:
            await asyncio.sleep(12.0)
            assert not role.task.done()
        finally:
            node.resume()

    loses_nothing(fresh(own_kafka, 2), pause)


@pytest.mark.soak
def test_a_broker_that_is_killed_and_started_again_ends_no_worker_and_loses_nothing(
    own_kafka: Cluster,
) -> None:
    node = own_kafka.nodes[0]

    async def start_again(role: Running) -> None:
        node.kill()
        node.start(wait=False)  # on this thread: it lives as long as the one that started it
        await asyncio.to_thread(node.wait)

    loses_nothing(fresh(own_kafka, 2), start_again, after=100)


def test_no_broker_that_answers_ends_the_worker_with_that_reason(own_kafka: Cluster) -> None:
    config, (node,) = fresh(own_kafka, 1), own_kafka.nodes

    async def go() -> None:
        async with running(config, IMPATIENT) as role:
            await role.owns(4)
            node.pause()
            try:
                with pytest.raises(Stuck, match=r"no broker has answered for \d+ s"):
                    await role.task
            finally:
                node.resume()

    run(go())


@pytest.fixture(scope="module")
def groupless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node that takes records but no groups: their topic is to have more copies than there are nodes."""
    with contextlib.ExitStack() as stack:
        try:
            folder: Path = tmp_path_factory.mktemp("kafka")
            yield stack.enter_context(running_cluster(folder, offsets_topic_replication_factor="3"))
        except CannotStart as e:
            require_server("kafka", str(e))


def test_a_group_that_cannot_be_joined_ends_the_worker_with_that_reason(groupless: Cluster) -> None:
    config = fresh(groupless, 1)

    async def go() -> None:
        async with running(config, IMPATIENT) as role:
            with pytest.raises(Stuck, match=r"group could not be joined for \d+ s .*although brokers answer"):
                await role.task

    run(go())


def test_the_process_that_hosts_it_ends_with_it(groupless: Cluster) -> None:
    """Faust's application stops the other roles, and the reason goes to whoever started it."""
    config = fresh(groupless, 1)
    others: list[str] = []

    async def other(stop: asyncio.Event) -> None:
        await stop.wait()
        others.append("stopped in order")

    async def go() -> None:
        role = make_role(config, IMPATIENT)
        worker = Worker(config, {"windows": role.run, "other": other})
        with pytest.raises(Stuck, match="could not be joined"):
            await worker.run()

    run(go())
    assert others == ["stopped in order"]


def test_the_command_ends_with_one_line_that_says_why(groupless: Cluster, tmp_path: Path) -> None:
    config = fresh(groupless, 1)
    settings = {"KAFKA_STUCK_S": "3", "KAFKA_PARTITIONS": "1"}
    with worker(config, tmp_path, "--roles", "windows", **settings) as running_one:
        assert running_one.process.wait(60) == 1
        lines = [x for x in running_one.said().splitlines() if not x.startswith("{")]
    (said,) = lines
    assert re.search(r"group could not be joined for \d+ s \(group " + config.group("windows"), said)


def test_a_member_without_partitions_is_not_stuck_and_takes_over_when_one_leaves(own_kafka: Cluster) -> None:
    config, all_calls = fresh(own_kafka, 1), calls(0, 80)

    async def go() -> None:
        async with contextlib.AsyncExitStack() as stack:
            members = [await stack.enter_async_context(running(config, IMPATIENT)) for _ in range(5)]

            def owned() -> list[int]:
                return sorted(len(m.role.figures().owned) for m in members if not m.task.done())

            await members[0].until(lambda: owned() == [0, 1, 1, 1, 1])
            await asyncio.sleep(1.5 * IMPATIENT.stuck_s)
            assert owned() == [0, 1, 1, 1, 1]
            mine = f"{config.topic(CALLS)}/0"
            reader = next(m for m in members if mine in m.role.figures().owned)
            await asyncio.to_thread(put_calls, config, 1, all_calls)
            await reader.until(lambda: reader.role.figures().events == 80)
            await reader.end()
            rest = [m for m in members if m is not reader]
            await rest[0].until(lambda: owned() == [1, 1, 1, 1])
            await asyncio.to_thread(end, config, 1)
            windows, _ = merge(await said_until(config, {mine: 21}))
            assert_same(windows, in_one_piece(all_calls))

    run(go())
