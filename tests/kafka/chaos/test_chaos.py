"""Workers, standby and brokers that come, go, die and hang under load: the result is that of the embedded run on the same input.

Compared with ADR 5 in hand: every cell of every window, events, late ones and copies, anomalies, incidents and the course of each, directives,
what was decided to be done and what came of it, as far as it has come. Not compared: the moments of all these, what follows from them (which later
anomalies are consequences of our own redirect), and how often a guard said "not yet", since guards are asked at ticks, which fall otherwise between
the events. Also: what the database holds after all its owners against its
own log, read from the beginning.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.kafka.chaos.course import outage
from tests.kafka.chaos.harness import OWNER, Chaos, Fault, report
from tests.servers.kafka_broker import Cluster
from tests.servers.postgres import Postgres

WORKERS = [
    Fault(-4, "join", "c"),
    Fault(1, "kill", "b"),
    Fault(3, "return"),
    Fault(10, "kill", OWNER),
    Fault(12, "return"),
    Fault(20, "leave", "c"),
]
BROKER = [
    Fault(-3, "pause_broker", "1"),
    Fault(2, "resume_broker", "1"),
    Fault(10, "stop_broker", "1"),
    Fault(12, "start_broker", "1"),
    Fault(20, "leave", OWNER),
]


def episodes(random: Random, brokers: int) -> list[list[Fault]]:
    """Every kind of thing that happens, each as long as it lasts."""
    who = random.choice("ab")
    found = [
        [Fault(0, "join", "c"), Fault(random.uniform(8, 14), "leave", "c")],
        [Fault(0, "kill", who), Fault(random.uniform(0.5, 8), "return")],
        [Fault(0, "leave", who), Fault(random.uniform(0.5, 8), "return")],
        [Fault(0, "kill", OWNER), Fault(random.uniform(0.5, 8), "return")],
        [Fault(0, "leave", OWNER), Fault(random.uniform(0.5, 8), "return")],
        [Fault(0, "stop_broker", "1"), Fault(random.uniform(0.5, 5), "start_broker", "1")],
        [Fault(0, "kill_broker", "1"), Fault(random.uniform(0.5, 5), "start_broker", "1")],
        [Fault(0, "pause_broker", "1"), Fault(30, "resume_broker", "1")],
    ]
    if brokers > 1:
        number = str(random.randint(1, brokers))
        found.append([Fault(0, "kill_broker", number), Fault(random.uniform(10, 20), "start_broker", number)])
    return found


def schedule(seed: int, brokers: int = 1) -> list[Fault]:
    """Three or four episodes one after the other, with some seconds between them."""
    random = Random(seed)
    at, made = random.uniform(-6, 4), list[Fault]()
    for episode in random.sample(episodes(random, brokers), random.choice([3, 4])):
        made += [Fault(round(at + f.at_s, 1), f.verb, f.who) for f in episode]
        at = max(f.at_s for f in made) + random.uniform(2, 10)
    return made


@pytest.fixture
def database(postgres: Postgres) -> str:
    return postgres.migrated()


def check(cluster: Cluster, database: str, folder: Path, faults: list[Fault], lasts_s: float) -> None:
    chaos = Chaos(cluster, database, folder)
    found = chaos.run(outage(lasts_s), faults)
    assert not found, report(chaos, found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("faults", [WORKERS, BROKER], ids=["workers", "broker"])
def test_two_workers_come_to_the_result_of_the_embedded_run(
    own_kafka: Cluster, database: str, tmp_path: Path, faults: list[Fault]
) -> None:
    check(own_kafka, database, tmp_path, faults, 24.0)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(16))
def test_a_seeded_schedule_on_one_broker(
    own_kafka: Cluster, database: str, tmp_path: Path, seed: int
) -> None:
    faults = schedule(seed)
    check(own_kafka, database, tmp_path, faults, max(f.at_s for f in faults) + 15.0)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(100, 104))
def test_a_seeded_schedule_on_three_brokers(
    three_brokers: Cluster, database: str, tmp_path: Path, seed: int
) -> None:
    faults = schedule(seed, brokers=3)
    if not any(f.verb == "kill_broker" for f in faults):
        faults = [
            Fault(-5, "kill_broker", "2"),
            Fault(8, "start_broker", "2"),
            *(f for f in faults if f.at_s > 9),
        ]
    check(three_brokers, database, tmp_path, faults, max(f.at_s for f in faults) + 15.0)
