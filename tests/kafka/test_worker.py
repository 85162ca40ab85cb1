"""`flyball worker` on a real broker: the lab's events come to the incidents of the embedded run, also when it is killed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyball.core.events import TYPE_NAMES
from flyball.streams.kafka.admin import create_topics, wanted
from tests.kafka._workers import database, just_now, produce, worker
from tests.servers.kafka_ways import Kafka


@pytest.mark.parametrize(
    ("where", "killed"),
    [("sqlite", False), ("postgres", True)],
    indirect=["where"],
    ids=["undisturbed", "killed"],
)
def test_the_worker_finds_what_the_embedded_run_finds(
    kafka: Kafka, tmp_path: Path, where: Path | str, killed: bool
) -> None:
    reference, config = just_now(), kafka.config()
    create_topics(config, wanted(8))
    produce(config, reference.bodies)
    total = sum(reference.pipeline.counters.events.values())
    if killed:
        with worker(config, tmp_path, **database(where)) as first:
            first.until(lambda: first.count("events") > total // 4)
            first.kill()
    with worker(config, tmp_path, **database(where)) as second:
        second.until(lambda: second.count("windows") >= reference.windows)
        now = second.status()
        opened = [i["id"] for i in second.get("/v1/incidents")]
        assert second.stop() == 0, second.said()
    assert now["events"] == dict(reference.pipeline.counters.events)
    assert (now["windows"], now["late"], now["left_out"]) == (reference.windows, 0, 0)
    assert sorted(opened) == sorted(reference.opened)
    assert set(TYPE_NAMES.values()) >= now["events"].keys()
