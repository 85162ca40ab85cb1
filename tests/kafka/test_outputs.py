"""What control publishes: everything that was stored, also when it ended in between; and what time it takes it to be."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from kafka import KafkaProducer

from flyball.app.embedded import Embedded
from flyball.app.outputs import WRITTEN, Outputs, publications_of
from flyball.app.portions import Times
from flyball.app.store import publications
from flyball.core.directives import Release
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.portion import Portion
from tests.app._runtime import SetClock, incident, started
from tests.kafka._workers import published
from tests.servers.kafka_ways import Kafka

HOUR_S = 3600.0


def publish(config: KafkaConfig, runtime: Embedded) -> Outputs:
    """Everything that is stored by now, as at a stop."""

    async def go() -> Outputs:
        outputs, stop = Outputs(config, runtime), asyncio.Event()
        stop.set()
        await outputs.run(stop)
        return outputs

    return asyncio.run(go())


def left(runtime: Embedded) -> int:
    with runtime.reader.connect() as c:
        return publications.count(c)


def test_what_was_stored_and_not_published_is_by_the_next_owner(
    kafka: Kafka, tmp_path: Path, where: Path | str
) -> None:
    config, clock = kafka.config(), SetClock()
    create_topics(config, wanted(1, WRITTEN))
    producer = KafkaProducer(**config.for_kafka_python(), acks="all")
    producer.send(config.topic("directives"), key=b"DIR-OF-BEFORE", value=b"{}").get(30)
    producer.close()
    with started(where, clock, publish=publications_of) as runtime:
        name = incident(runtime, clock)
        waiting = left(runtime)  # and here it ends, before anything was published
        _, live = runtime.board.read()
    assert waiting > 5
    assert len(live) == 1
    with started(where, clock, publish=publications_of) as runtime:
        outputs = publish(config, runtime)
        assert left(runtime) == 0
        again = publish(config, runtime)
        runtime.order(Release(subject="", by="ann", at=clock.at)).result(30)
        publish(config, runtime)
    assert sum(outputs.published[t] for t in WRITTEN if t != "directives") == waiting
    assert again.published == {}
    first, gone, lease, end = published(config, "directives")
    assert (first.key, gone.key, gone.value) == ("DIR-OF-BEFORE", "DIR-OF-BEFORE", None)
    assert lease.value["id"] == lease.key == end.key == live[0].id
    assert (lease.value["owner"], lease.headers["owner"], end.value, end.headers["owner"]) == (
        2,
        "2",
        None,
        "2",
    )
    told = [x for t in ("anomalies", "incidents", "outcomes") for x in published(config, t)]
    assert len({x.headers["id"] for x in told}) == len(told)
    assert {x.headers["owner"] for x in told} == {"1", "2"}  # who stored it, not who sent it
    (opened,) = [x for x in published(config, "incidents") if not x.value["from"]]
    assert (opened.key, opened.value["incident"]["id"]) == (name, name)
    assert "NaN" not in json.dumps([x.value for x in told])


def test_a_runtime_that_does_not_publish_stores_nothing_for_it(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        incident(runtime, clock)
        assert left(runtime) == 0


# --- what time it is -----------------------------------------------------------------------------------------------------


def portion(received_at: float | None, source: str = "a", *, idle: bool = False) -> Portion:
    return Portion(source=source, first=0, last=0, received_at=received_at, idle=idle)


def test_time_stands_still_before_the_first_portion_of_all() -> None:
    times = Times(True, {}, 0.0, 30.0)
    assert times.now(1000.0, behind=False) is None
    times.heard(portion(999.0), 999.5)
    assert times.now(1000.0, behind=False) == 1000.0


@pytest.mark.parametrize("behind", [False, True], ids=["windows", "portions"])
def test_behind_a_backlog_it_is_the_time_of_the_backlog(behind: bool) -> None:
    """`windows`: it is before the window stage; `portions`: it is here."""
    now = 10 * HOUR_S
    times = Times(True, {}, now, 30.0)
    for k in range(5):
        written_at = HOUR_S + k if behind else now + k
        times.heard(portion(HOUR_S + k - 10.0), written_at)
        times.heard(portion(HOUR_S + k, "b"), written_at)
        assert times.now(now + k, behind) == HOUR_S + k - 10.0  # the slowest
    times.heard(portion(HOUR_S + 4, idle=True), HOUR_S + 5 if behind else now + 5)
    times.heard(portion(HOUR_S + 4, "b", idle=True), HOUR_S + 5 if behind else now + 5)
    assert times.now(now + 5, behind=False) == now + 5


def test_a_partition_that_does_not_get_on_holds_time_back_no_longer_than_others() -> None:
    times = Times(True, {}, 0.0, 30.0)
    times.heard(portion(HOUR_S), 2 * HOUR_S)
    assert times.now(2 * HOUR_S + 29.0, behind=False) == HOUR_S
    times.heard(portion(HOUR_S), 2 * HOUR_S + 29.0)  # it stands, and says so again and again
    assert times.now(2 * HOUR_S + 31.0, behind=False) == 2 * HOUR_S + 31.0


def test_after_a_restart_what_was_behind_still_is_and_time_never_goes_back() -> None:
    times = Times(False, {"a": HOUR_S, "b": None}, 2 * HOUR_S, 30.0)
    assert times.now(2 * HOUR_S, behind=True) is None  # nothing was read yet
    assert times.now(2 * HOUR_S, behind=False) == HOUR_S
    times.heard(portion(2 * HOUR_S - 1.0), 2 * HOUR_S)
    assert times.now(2 * HOUR_S, behind=False) == 2 * HOUR_S
    times.heard(portion(HOUR_S + 1.0, "b"), 2 * HOUR_S)
    assert times.now(2 * HOUR_S + 1.0, behind=False) == 2 * HOUR_S


def test_a_clock_of_a_producer_that_is_ahead_moves_nothing() -> None:
    times = Times(False, {}, 0.0, 30.0)
    times.heard(portion(math.nextafter(9 * HOUR_S, 0)), 9 * HOUR_S)
    assert times.now(HOUR_S, behind=True) == HOUR_S
