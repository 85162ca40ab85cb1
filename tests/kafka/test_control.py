"""The role `control`: what it serves, what it publishes, who has it, and what a replay does."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path

import httpx
import msgspec
import psycopg
from kafka import KafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from flyball.core.events import Batch, LlmCall
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import newest, replay
from tests.kafka._topics import events_in, records
from tests.kafka._workers import Worker, database, just_now, moved, produce, published, worker
from tests.servers.kafka_ways import Kafka
from tests.servers.postgres import Postgres

ACTING = {"MODE": "auto", "MODES": '{"provider-failover": "auto"}'}
METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"


def made(config: KafkaConfig, partitions: int = 4) -> KafkaConfig:
    create_topics(config, wanted(partitions))
    return config


def deeds(of: Worker) -> Counter[str]:
    """What was begun, as the ledger has it."""
    lines = [line["body"] for line in of.get("/v1/ledger?limit=1000")]
    return Counter(x for b in lines if (x := b.get("decision") or b.get("change")) in ("run", "granted"))


# --- what goes out -----------------------------------------------------------------------------------------------------


def test_a_lease_that_is_granted_is_shown_and_published_and_so_is_all_that_led_to_it(
    kafka: Kafka, postgres: Postgres, tmp_path: Path
) -> None:
    config, acting = made(kafka.config()), ACTING | database(postgres.migrated())
    # It ends a little after now: what comes last is of now when the worker has got there.
    produce(config, moved(just_now().bodies, time.time() + 20.0))
    with worker(config, tmp_path, **acting) as control:
        (lease,) = control.until(lambda: control.get("/v1/directives"), 60.0)
        control.until(lambda: published(config, "directives"), 20.0)
        (incident,) = control.get("/v1/incidents")
        assert control.stop() == 0, control.said()
    told = published(config, "directives")[-1]
    assert (told.key, told.value, told.headers["owner"]) == (lease["id"], lease | {"owner": 1}, "1")
    incidents = published(config, "incidents")
    assert {x.key for x in incidents} == {incident["id"]} == {lease["incident"]}
    assert incidents[0].value["to"] == "open"
    assert [x.headers["id"] for x in incidents] == [f"{x.key}/{x.value['revision']}" for x in incidents]
    assert len({x.headers["id"] for x in incidents}) == len(incidents)
    outcomes = published(config, "outcomes")
    assert {x.value["kind"] for x in outcomes} >= {"decision", "directive"}
    assert len({x.headers["id"] for x in outcomes}) == len(outcomes)
    anomalies = published(config, "anomalies")
    assert any(x.value["signal"] == "llm.errors" and "provider=b" in x.key for x in anomalies)
    # The next owner says nothing twice, and that the lease is its own now.
    with worker(config, tmp_path, **acting) as control:
        control.until(lambda: [x.headers["owner"] for x in published(config, "directives")][-1] == "2", 30.0)
        httpx.post(f"{control.url}/v1/directives/all/release").raise_for_status()
        control.until(lambda: published(config, "directives")[-1].value is None, 20.0)
        assert control.get("/v1/directives") == []
    assert published(config, "directives")[-1].key == lease["id"]
    again = [x.headers["id"] for t in ("anomalies", "incidents", "outcomes") for x in published(config, t)]
    assert len(again) == len(set(again))


# --- what comes in -----------------------------------------------------------------------------------------------------


def test_events_over_http_go_the_way_of_all_others_and_count_once(kafka: Kafka, tmp_path: Path) -> None:
    config, now = made(kafka.config()), time.time()
    calls = [LlmCall(at=now + i / 10, id=f"call-{i}", provider="a", model="m", app="x") for i in range(20)]
    body = b"\n".join(msgspec.json.encode(c) for c in calls) + b"\n{broken"
    produce(config, [Batch(calls, "gateway", now)])
    with worker(config, tmp_path) as control:
        control.until(lambda: control.get("/readyz"))
        taken = httpx.post(f"{control.url}/v1/events", content=body).json()
        assert (taken["accepted"], taken["rejected"]) == (20, 1)
        control.until(lambda: control.status().get("duplicates") == 20)
        status = control.status()
        page = httpx.get(f"{control.url}/metrics").text
        assert control.stop() == 0, control.said()
    assert (status["role"], status["events"], status["rejected"]) == (
        "control",
        {"llm_call": 20},
        {"json": 1},
    )
    assert (len(events_in(config)), newest(config, 1)[0].body) == (40, b"{broken")
    # A letter of ingest stood in no topic: sent once more, it goes to that of its events.
    assert replay(config, newest(config, 1)) == 1
    (again,) = [r for r in records(config, ["llm-calls"]) if r.value == b"{broken"]
    assert dict(again.headers)["flyball-format"] == b"native"
    shown = {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }
    assert shown["flyball_received_events_total", "native"] == 20
    assert shown["flyball_window_stage_events_total",] == 40
    assert shown["flyball_portions_total",] > 0
    assert shown["flyball_kafka_reachable",] == shown["flyball_owner_epoch",] == 1
    documented = set(re.findall(r"^\| `(flyball_\w+)`", METRICS.read_text(), re.MULTILINE))
    assert {name for name, *_ in shown} <= documented


def test_what_is_no_portion_is_put_aside_told_and_stops_nothing(kafka: Kafka, tmp_path: Path) -> None:
    config = made(kafka.config())
    producer = KafkaProducer(**config.for_kafka_python(), acks="all")
    producer.send(config.topic("windows"), b"no portion", headers=[("from", b"elsewhere")]).get(30)
    producer.close()
    produce(config, just_now().bodies[:200])
    with worker(config, tmp_path) as control:
        control.until(lambda: control.count("events") > 0)
        (incident,) = control.until(
            lambda: [i for i in control.get("/v1/incidents") if i["signal"] == "stream.poison"]
        )
        assert control.stop() == 0, control.said()
    assert "elsewhere" not in json.dumps(incident)
    (letter,) = newest(config, 10)
    assert (letter.topic, letter.partition, letter.offset, letter.reason, letter.body) == (
        config.topic("windows"), 0, 0, "portion", b"no portion",
    )  # fmt: skip
    assert letter.headers == (("from", b"elsewhere"),)


# --- who has it --------------------------------------------------------------------------------------------------------


def test_a_standby_takes_over_from_one_that_is_killed_and_from_one_that_stops(
    kafka: Kafka, postgres: Postgres, tmp_path: Path
) -> None:
    config = made(kafka.config())
    settings: dict[str, str] = {"DATABASE": postgres.migrated()}
    with worker(config, tmp_path / "a", **settings) as a, worker(config, tmp_path / "b", **settings) as b:
        owner, standby = a.until(
            lambda: next(
                ((x, y) for x, y in ((a, b), (b, a)) if (x.role(), y.role()) == ("control", "standby")), None
            )
        )
        ready = httpx.get(f"{standby.url}/readyz")
        assert (ready.status_code, ready.json()["role"]) == (503, "standby")
        assert "has control (epoch 1)" in ready.json()["why"]
        assert httpx.get(f"{standby.url}/healthz").status_code == 200
        assert httpx.get(f"{standby.url}/v1/directives").status_code == 503
        # It takes telemetry in, and shares in the window stage.
        produce(config, just_now().bodies[: len(just_now().bodies) // 2])
        event = msgspec.json.encode(LlmCall(at=time.time(), id="by-standby", provider="a", model="m"))
        assert httpx.post(f"{standby.url}/v1/events", content=event).json()["accepted"] == 1
        owner.until(lambda: owner.count("events") > 100)
        owner.kill()
        standby.until(lambda: standby.role() == "control" and standby.get("/readyz"), 30.0)
        assert standby.status()["epoch"] == 2
        with worker(config, tmp_path / "c", **settings) as c:
            c.until(lambda: c.role() == "standby")
            assert standby.stop() == 0, standby.said()
            c.until(lambda: c.role() == "control", 30.0)
            assert c.status()["epoch"] == 3
            total = 1 + sum(len(x.events) for x in just_now().bodies[: len(just_now().bodies) // 2])
            c.until(lambda: c.count("events") + c.count("duplicates") == total)
            assert c.stop() == 0, c.said()


def test_who_was_fenced_off_ends_with_one_plain_message(kafka: Kafka, postgres: Postgres, tmp_path: Path) -> None:  # fmt: skip
    config, url = made(kafka.config()), postgres.migrated()
    with worker(config, tmp_path, DATABASE=url) as old:
        old.until(lambda: old.get("/readyz"))
        with psycopg.connect(url, autocommit=True) as c:
            c.execute("update owner set epoch = epoch + 1, holder = 'other:1'")
        assert old.process.wait(60) == 1
    said = old.said()
    assert said.splitlines()[-1] == (
        "flyball: stopped by Fenced: other:1 has taken over (epoch 2, this process had 1); nothing more is stored here"
    )
    assert "Traceback" not in said


# --- all of it once more -----------------------------------------------------------------------------------------------


def test_a_whole_topic_read_again_by_a_fresh_group_opens_the_same_incidents_and_does_nothing_again(
    kafka: Kafka, tmp_path: Path
) -> None:
    config = made(kafka.config())
    bodies = moved(just_now().bodies, time.time() + 20.0)
    total = sum(len(b.events) for b in bodies)
    produce(config, bodies)

    def through(by: Worker) -> bool:
        """Whether all was read again, and all that came of it is taken."""
        shown = by.metrics()
        return (
            shown.get("flyball_window_stage_events_total") == total
            and shown["flyball_portions_lag"] == shown["flyball_publications_waiting"] == 0.0
            and by.status()["watermark"] > (bodies[-1].received_at or 0.0) - 30.0
        )

    with worker(config, tmp_path / "a", **ACTING) as first:
        first.until(lambda: first.get("/v1/directives"))
        first.until(lambda: through(first))
        incidents, done, leases = first.get("/v1/incidents"), deeds(first), first.get("/v1/directives")
        assert first.stop() == 0, first.said()
    assert done == {"run": 1, "granted": 1}
    ids = [i["id"] for i in incidents]
    # The same database: what was done is known.
    with worker(config, tmp_path / "a", KAFKA_GROUPS="again", **ACTING) as second:
        second.until(lambda: through(second))
        assert second.count("events") == total
        assert [i["id"] for i in second.get("/v1/incidents")] == ids
        assert deeds(second) == done
        assert [x["id"] for x in second.get("/v1/directives")] == [x["id"] for x in leases]
        assert second.stop() == 0, second.said()
    # Another database: nothing is known, and yet all of it has the same names.
    with worker(config, tmp_path / "b", KAFKA_GROUPS="once-more", **ACTING) as third:
        third.until(lambda: through(third))
        assert [i["id"] for i in third.get("/v1/incidents")] == ids
        assert third.stop() == 0, third.said()
    assert {x.key for x in published(config, "incidents")} == set(ids)


# --- without control ---------------------------------------------------------------------------------------------------


def test_a_worker_without_control_shows_how_it_is_and_who_knows_the_rest(
    kafka: Kafka, tmp_path: Path
) -> None:
    config = made(kafka.config())
    with worker(config, tmp_path, "--roles", "windows") as windows:
        windows.until(lambda: windows.get("/readyz"))
        assert windows.role() == "windows"
        assert windows.metrics()["flyball_partitions"] == 13
        answer = httpx.get(f"{windows.url}/v1/incidents")
        assert (answer.status_code, "control role" in answer.json()["error"]) == (503, True)
        assert windows.stop() == 0, windows.said()
    assert not (tmp_path / "flyball.sqlite3").exists()
