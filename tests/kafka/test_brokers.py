"""What the tests' own brokers do when they are killed, paused and started again."""

from __future__ import annotations

from flyball.streams.kafka import admin
from flyball.streams.kafka.reach import why_unreachable
from tests.processes import eventually
from tests.servers.kafka_broker import Cluster
from tests.servers.kafka_ways import new_prefix


def test_a_broker_that_was_killed_comes_back_with_its_topics(own_kafka: Cluster) -> None:
    config, (node,) = own_kafka.config(prefix=new_prefix()), own_kafka.nodes
    topics = admin.wanted(2, ["llm-calls"])
    admin.create_topics(config, topics)
    node.kill()
    assert "no broker listens there" in why_unreachable(config, timeout_s=0.5)
    node.start()
    assert eventually(lambda: not admin.check_cluster(config, topics))


def test_with_one_of_three_brokers_killed_topics_are_made_and_read(three_brokers: Cluster) -> None:
    config = three_brokers.config(prefix=new_prefix())
    admin.create_topics(config, admin.wanted(2, ["llm-calls"]))
    three_brokers.nodes[2].kill()
    assert eventually(lambda: not admin.check_cluster(config, admin.wanted(2, ["llm-calls"])), deadline_s=60)
    three_brokers.nodes[2].start()
    three_brokers.wait_whole()
