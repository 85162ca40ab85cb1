"""The three ways to a real Kafka: an address that is given, jars from Maven Central, a container."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flyball.streams.kafka.config import KafkaConfig
from tests.servers.kafka_broker import CannotStart, Cluster, running_cluster
from tests.servers.kafka_container import kafka_container

_numbers = itertools.count(1)


def new_prefix() -> str:
    """Of topic names that no other test has."""
    return f"t{uuid.uuid4().hex[:8]}-{next(_numbers)}."


@dataclass(frozen=True)
class Kafka:
    """A broker that tests share. Nobody stops or pauses it; tests keep apart by the prefix of their topics."""

    bootstrap: str
    way: str
    cluster: Cluster | None = field(default=None, repr=False)

    def config(self, prefix: str = "") -> KafkaConfig:
        """A client's configuration, by default with a prefix that nobody else has."""
        return KafkaConfig(self.bootstrap, prefix=prefix or new_prefix())


@contextlib.contextmanager
def by_address(folder: Path, environ: Mapping[str, str]) -> Iterator[Kafka]:
    address = environ.get("FLYBALL_TEST_KAFKA", "")
    if not address:
        raise CannotStart("FLYBALL_TEST_KAFKA is not set")
    yield Kafka(address, "address")


@contextlib.contextmanager
def by_jars(folder: Path, environ: Mapping[str, str]) -> Iterator[Kafka]:
    with running_cluster(folder) as cluster:
        yield Kafka(cluster.bootstrap, "jars", cluster)


@contextlib.contextmanager
def by_container(folder: Path, environ: Mapping[str, str]) -> Iterator[Kafka]:
    with kafka_container() as address:
        yield Kafka(address, "container")


WAYS = {"address": by_address, "jars": by_jars, "container": by_container}
"""In the order in which they are tried."""


@contextlib.contextmanager
def any_kafka(
    folder: Path, environ: Mapping[str, str] = os.environ, ways: Iterable[str] = WAYS
) -> Iterator[Kafka]:
    """The first way that works. Raises: CannotStart with the reasons of all."""
    reasons = []
    with contextlib.ExitStack() as stack:
        for name in ways:
            try:
                found = stack.enter_context(WAYS[name](folder, environ))
            except CannotStart as e:
                reasons.append(f"{name}: {e}")
                continue
            yield found
            return
    raise CannotStart("; ".join(reasons))
