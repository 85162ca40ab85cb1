"""Real brokers for these tests. `kafka` is shared and lasts the session; clusters that a test may break are its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from flyball.streams.kafka.config import KafkaConfig
from tests.conftest import require_server
from tests.servers.kafka_broker import CannotStart, Cluster, running_cluster
from tests.servers.kafka_ways import Kafka, any_kafka


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """One broker for all: keep apart by `kafka.config()`, whose prefix is new each time."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(any_kafka(tmp_path_factory.mktemp("kafka")))
        except CannotStart as e:
            require_server("kafka", str(e))
            raise
        yield found


@pytest.fixture
def kafka_config(kafka: Kafka) -> KafkaConfig:
    """Configuration of a client, with topics that no other test sees."""
    return kafka.config()


@pytest.fixture(scope="module")
def own_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node for this module alone, to be paused, killed and started again: `.nodes[0]`."""
    yield from _cluster(tmp_path_factory, 1, secured=False)


@pytest.fixture(scope="module")
def three_brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes for this module alone; topics have three copies, two of which must have a record."""
    yield from _cluster(tmp_path_factory, 3, secured=False)


@pytest.fixture(scope="session")
def secured_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node with listeners SSL, SASL_PLAINTEXT and SASL_SSL: `.config("SASL_SSL", "SCRAM-SHA-512")`."""
    yield from _cluster(tmp_path_factory, 1, secured=True)


def _cluster(factory: pytest.TempPathFactory, nodes: int, *, secured: bool) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(running_cluster(factory.mktemp("kafka"), nodes, secured))
        except CannotStart as e:
            require_server("kafka", str(e))
            raise
        yield found
