"""Topics are made once, what differs is told, lag is read: on a real broker."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from flyball.core.errors import ConfigError
from flyball.streams.kafka import admin
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.reach import BrokerUnreachable
from flyball.streams.kafka.topics import TOPICS
from tests.processes import free_port


def did(changes: list[admin.Change]) -> set[str]:
    return {c.did for c in changes}


def test_all_topics_are_made_with_their_settings_and_a_second_time_nothing_changes(
    kafka_config: KafkaConfig,
) -> None:
    topics = admin.wanted(3)
    assert did(admin.create_topics(kafka_config, topics)) == {"made"}
    assert did(admin.create_topics(kafka_config, topics)) == {"as wanted"}
    assert admin.check_cluster(kafka_config, topics) == []
    with admin.connected(kafka_config) as client:
        seen = admin.describe(kafka_config, client, topics)
    assert set(seen) == set(TOPICS)
    assert (seen["llm-calls"].partitions, seen["windows"].partitions) == (3, 1)
    for name, topic in TOPICS.items():
        assert {k: seen[name].settings[k] for k in topic.settings()} == topic.settings()


def test_missing_topics_are_one_problem_that_names_them_and_the_command(kafka_config: KafkaConfig) -> None:
    admin.create_topics(kafka_config, admin.wanted(2, ["llm-calls"]))
    (found,) = admin.check_cluster(kafka_config, admin.wanted(2, ["llm-calls", "agent-steps", "windows"]))
    p = kafka_config.prefix
    assert (found.check, found.level) == ("topics", "bad")
    assert str(found) == (
        f"2 topics missing: {p}agent-steps, {p}windows; say `flyball topics create --kafka {kafka_config.bootstrap} --partitions 2`"
    )


def test_too_few_partitions_stop_a_start_with_one_message(kafka_config: KafkaConfig) -> None:
    admin.create_topics(kafka_config, admin.wanted(2, ["llm-calls"]))
    with pytest.raises(ConfigError) as e:
        admin.require_cluster(kafka_config, admin.wanted(4, ["llm-calls"]))
    assert f"topic {kafka_config.topic('llm-calls')} has 2 partitions, 4 are wanted" in str(e.value)
    assert "kafka.partitions to 2" in str(e.value)


def test_more_partitions_than_wanted_are_fine(kafka_config: KafkaConfig) -> None:
    admin.create_topics(kafka_config, admin.wanted(4, ["llm-calls"]))
    assert admin.check_cluster(kafka_config, admin.wanted(2, ["llm-calls"])) == []


def test_what_differs_is_told_left_alone_and_mended_when_asked(kafka_config: KafkaConfig) -> None:
    wrong = [
        replace(TOPICS["directives"], cleanup="delete", retention_s=60),
        replace(TOPICS["llm-calls"], partitions=2, retention_s=3600),
        replace(TOPICS["windows"], max_message_bytes=0),
    ]
    admin.create_topics(kafka_config, wrong)
    want = admin.wanted(3, ["directives", "llm-calls", "windows"])
    found = {(p.check, p.level) for p in admin.check_cluster(kafka_config, want)}
    assert found == {("cleanup", "bad"), ("partitions", "bad"), ("retention", "warn"), ("size", "bad")}
    told = admin.create_topics(kafka_config, want)
    assert did(told) == {"differs"}
    assert "keeps records for 1 hour, 7 days are wanted" in told[1].detail
    assert did(admin.create_topics(kafka_config, want, mend=True)) == {"mended"}
    assert did(admin.create_topics(kafka_config, want)) == {"as wanted"}


def test_several_bad_things_are_one_message_with_a_line_each(kafka_config: KafkaConfig) -> None:
    admin.create_topics(kafka_config, [replace(TOPICS["directives"], cleanup="delete", retention_s=60)])
    with pytest.raises(ConfigError) as e:
        admin.require_cluster(kafka_config, admin.wanted(1, ["directives", "changes"]))
    first, *rest = str(e.value).splitlines()
    assert first == "the Kafka cluster is not ready, 2 things:"
    assert len(rest) == 2


def test_a_wrong_address_is_one_problem_with_what_to_do() -> None:
    config = KafkaConfig(f"127.0.0.1:{free_port()}")
    (found,) = admin.check_cluster(config, admin.wanted(1), timeout_s=1.0)
    assert (found.check, found.level) == ("address", "bad")
    assert "refuses the connection: no broker listens there" in found.what
    assert "correct the address (--kafka, FLYBALL_KAFKA)" in found.mend


def test_a_host_that_nobody_knows_is_told() -> None:
    with (
        pytest.raises(BrokerUnreachable, match="no host of this name is known"),
        admin.connected(KafkaConfig("no-such-host.invalid:9092")),
    ):
        pass


def test_one_node_of_several_that_is_down_does_not_matter(kafka_config: KafkaConfig) -> None:
    config = replace(kafka_config, bootstrap=f"127.0.0.1:{free_port()},{kafka_config.bootstrap}")
    assert [p.check for p in admin.check_cluster(config, admin.wanted(1, ["changes"]))] == ["topics"]


def test_the_brokers_clock_is_compared_with_ours(kafka_config: KafkaConfig) -> None:
    assert admin.clock_skew(kafka_config) is None  # its topic is not there yet
    admin.create_topics(kafka_config, admin.wanted(1, ["clock"]))
    skew_s = admin.clock_skew(kafka_config)
    assert skew_s is not None
    assert abs(skew_s) < 2.0
    (found,) = admin.check_clock(kafka_config, lambda: time.time() - 100)
    assert found.what.startswith("the broker's clock is +")
    assert admin.check_clock(kafka_config, time.time) == []


def test_lag_counts_what_is_committed_and_what_never_was(kafka_config: KafkaConfig) -> None:
    admin.create_topics(kafka_config, admin.wanted(2, ["llm-calls"]))
    assert admin.lags(kafka_config) == []
    topic, group = kafka_config.topic("llm-calls"), kafka_config.group("windows")

    async def work() -> None:
        async with AIOKafkaProducer(**kafka_config.for_aiokafka()) as producer:
            for n in range(7):
                await producer.send_and_wait(topic, b"{}", partition=n % 2)
        consumer = AIOKafkaConsumer(**kafka_config.for_aiokafka(), group_id=group, enable_auto_commit=False)
        await consumer.start()
        consumer.assign([TopicPartition(topic, 0)])
        await consumer.commit({TopicPartition(topic, 0): 3})
        await consumer.stop()

    asyncio.run(work())
    found = admin.lags(kafka_config)
    assert [(x.group, x.partition, x.committed, x.end, x.lag) for x in found] == [
        (group, 0, 3, 4, 1),
        (group, 1, None, 3, 3),
    ]


def test_the_version_of_the_broker_is_read(kafka_config: KafkaConfig) -> None:
    with admin.connected(kafka_config) as client:
        assert admin.broker_version(client) >= (4, 0)
