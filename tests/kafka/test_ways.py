"""Each way to a real Kafka gives the same thing: a broker that takes topics. CI runs them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyball.streams.kafka import admin
from tests.conftest import require_server
from tests.servers.kafka_broker import CannotStart, running_cluster
from tests.servers.kafka_ways import Kafka, any_kafka, by_container


def takes_topics(kafka: Kafka) -> bool:
    config = kafka.config()
    return {c.did for c in admin.create_topics(config, admin.wanted(2))} == {"made"}


def test_an_address_that_is_given_is_taken_and_nothing_is_started(tmp_path: Path) -> None:
    try:
        with running_cluster(tmp_path / "elsewhere") as cluster:
            environ = {"FLYBALL_TEST_KAFKA": cluster.bootstrap}
            with any_kafka(tmp_path, environ) as found:
                assert (found.way, found.bootstrap, found.cluster) == ("address", cluster.bootstrap, None)
                assert takes_topics(found)
            assert cluster.nodes[0].process is not None
            assert cluster.nodes[0].process.poll() is None  # it is not ours to end
    except CannotStart as e:
        require_server("kafka", str(e))


def test_without_an_address_a_broker_is_started_from_jars_and_ended(tmp_path: Path) -> None:
    try:
        with any_kafka(tmp_path, {}) as found:
            assert takes_topics(found)
            cluster = found.cluster
    except CannotStart as e:
        require_server("kafka", str(e))
    if found.way == "jars":
        assert cluster is not None
        assert cluster.nodes[0].process is not None
        assert cluster.nodes[0].process.poll() is not None


def test_a_container_is_a_broker_too(tmp_path: Path) -> None:
    try:
        with by_container(tmp_path, {}) as found:
            assert found.way == "container"
            assert takes_topics(found)
    except CannotStart as e:
        require_server("docker", str(e))


def test_where_no_way_works_every_reason_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(CannotStart, match=r"^address: FLYBALL_TEST_KAFKA is not set$"),
        any_kafka(tmp_path, {}, ("address",)),
    ):
        pass
