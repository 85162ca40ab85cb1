"""`flyball run --kafka` as a process: what is answered 200 is in the topics, whatever is killed; what is not is told."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flyball.app.clock import SystemClock
from flyball.app.http.kafka import CONTROLS
from flyball.app.http.server import create_app
from flyball.app.kafka_ingest import KafkaIngest
from flyball.app.settings import Settings
from flyball.app.wiring import make_formats
from flyball.app.writer import Limits, Overloaded
from flyball.core.events import Event, LlmCall
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import newest
from flyball.streams.kafka.producer import WRITTEN
from tests.app._runtime import started
from tests.app.test_http import OTLP, litellm, ndjson, otlp_body, otlp_json
from tests.kafka._topics import EVENTS, batch_of, events_in, records
from tests.processes import eventually, free_port, running, stop
from tests.servers.kafka_broker import Cluster
from tests.servers.postgres import Postgres

KEY = "key of the tests"


def made(config: KafkaConfig, partitions: int = 4) -> KafkaConfig:
    create_topics(config, wanted(partitions, WRITTEN))
    return config


@contextmanager
def ingesting(folder: Path, config: KafkaConfig, **variables: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:  # fmt: skip
    """`flyball run --kafka` on a free port."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "flyball.app", "run", "--port", str(port), "--data", str(folder / "data"),
        "--kafka", config.bootstrap,
    ]  # fmt: skip
    env = {"FLYBALL_KAFKA__PREFIX": config.prefix, "FLYBALL_KAFKA__PARTITIONS": "4", "FLYBALL_HASH_KEY": KEY, **variables}  # fmt: skip
    with running(command, f"{url}/readyz", folder / "flyball.log", env) as process:
        yield url, process


def calls(first: int, n: int) -> list[Event]:
    return [LlmCall(at=time.time() // 1, id=f"call-{first + i}", model="m") for i in range(n)]


class Load:
    """Posts bodies one after another until told to end; remembers which were answered 200."""

    def __init__(self, url: str, sender: int) -> None:
        self._url, self._sender = url, sender
        self.acknowledged: list[str] = []
        self.answers: set[int] = set()
        self.enough = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._post)
        self._thread.start()

    def _post(self) -> None:
        with httpx.Client(base_url=self._url, timeout=40.0) as client:
            for first in itertools.count(self._sender * 1_000_000, 20):
                if self._end.is_set():
                    return
                body = ndjson(calls(first, 20))
                try:
                    answer = client.post(
                        "/v1/events", content=body, headers={"x-flyball-sender": f"load-{self._sender}"}
                    )
                except httpx.TransportError:
                    return  # killed: nobody was told anything
                self.answers.add(answer.status_code)
                if answer.status_code == 200:
                    self.acknowledged += [f"call-{first + i}" for i in range(20)]
                    if len(self.acknowledged) >= 200:
                        self.enough.set()

    def end(self) -> list[str]:
        self._end.set()
        self._thread.join(60)
        return self.acknowledged


# --- what arrives ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(kafka: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, KafkaConfig]]:
    """One process for the tests that leave it running."""
    config = made(kafka.config())
    with ingesting(tmp_path_factory.mktemp("ingest"), config) as (url, _):
        yield url, config


@pytest.mark.parametrize(
    ("kind", "path", "body", "content_type"),
    [
        ("native", "/v1/events", ndjson(calls(0, 3)), ""),
        ("litellm", "/ingest/litellm", json.dumps(litellm(3)).encode(), "application/json"),
        ("otlp", "/v1/traces", otlp_body(), OTLP),
        ("otlp", "/v1/traces", json.dumps(otlp_json()).encode(), "application/json"),
    ],
    ids=["native", "litellm", "otlp-protobuf", "otlp-json"],
)
def test_bodies_of_every_format_arrive_as_the_events_they_decode_to(
    shared: tuple[str, KafkaConfig], kind: str, path: str, body: bytes, content_type: str
) -> None:
    url, config = shared
    headers = {"content-type": content_type, "x-flyball-sender": kind} if content_type else {}
    assert httpx.post(f"{url}{path}", content=body, headers=headers).status_code == 200
    expected = make_formats(Settings(), KEY.encode())[kind].decode(body, content_type).events
    assert expected
    assert {repr(e) for e in expected} <= {repr(e) for e in events_in(config)}


def test_what_cannot_be_taken_goes_to_the_dead_letters_without_content(
    shared: tuple[str, KafkaConfig],
) -> None:
    url, config = shared
    body = (
        b'{"type":"llm_call","at":1800000000,"id":"good"}\n{"type":"llm_call","at":"x","messages":["secret"]}'
    )
    answer = httpx.post(f"{url}/v1/events", content=body)
    assert (answer.status_code, answer.json()["rejected"]) == (200, 1)
    (letter,) = newest(config, 1)
    assert (letter.reason, letter.topic, dict(letter.headers)["flyball-format"]) == ("type", "", b"native")
    assert letter.body == b'{"type": "llm_call", "at": "x"}'
    assert "secret" not in str(records(config, ["dead-letters"]))


def test_what_needs_the_database_is_answered_503_with_where_it_is_served(
    shared: tuple[str, KafkaConfig],
) -> None:
    url, _ = shared
    for method, path in (("GET", "/v1/incidents"), ("POST", "/v1/stops"), ("GET", "/v1/ledger/1")):
        answer = httpx.request(method, f"{url}{path}")
        assert answer.status_code == 503
        assert "a process with the control role" in answer.json()["error"]
    assert httpx.get(f"{url}/v1/nothing").status_code == 404


def test_with_a_database_given_incidents_and_the_ledger_are_read_beside_its_owner(
    kafka_config: KafkaConfig, postgres: Postgres, tmp_path: Path
) -> None:
    made(kafka_config)
    with ingesting(tmp_path, kafka_config, FLYBALL_DATABASE=postgres.migrated()) as (url, _):
        assert httpx.get(f"{url}/v1/incidents").json() == []
        assert httpx.get(f"{url}/v1/ledger", params={"limit": 3}).json() == []
        assert httpx.get(f"{url}/v1/incidents/none").status_code == 404
        assert httpx.post(f"{url}/v1/incidents/none", json={"kind": "ack"}).status_code == 503
        assert httpx.get(f"{url}/v1/directives").status_code == 503


def test_status_and_metrics_count_what_was_acknowledged(shared: tuple[str, KafkaConfig]) -> None:
    url, config = shared
    before = httpx.get(f"{url}/v1/status").json()["events"].get("llm_call", 0)
    httpx.post(f"{url}/v1/events", content=ndjson(calls(5000, 7)))
    status = httpx.get(f"{url}/v1/status").json()
    assert status["events"]["llm_call"] == before + 7
    assert (status["role"], status["ready"]) == ("ingest", True)
    assert status["kafka"]["address"] == config.bootstrap
    assert 'flyball_received_events_total{format="native"}' in httpx.get(f"{url}/metrics").text


def test_many_senders_keep_their_records_apart(shared: tuple[str, KafkaConfig]) -> None:
    url, config = shared
    loads = [Load(url, n) for n in range(20, 32)]
    for load in loads:
        assert load.enough.wait(60)
    told = {x for load in loads for x in load.end()}
    batches = [batch_of(r) for r in records(config, EVENTS)]
    mine = [b for b in batches if "load-" in b.sender]
    assert told <= {e.id for b in mine for e in b.events}  # type: ignore[union-attr]
    for batch in mine:
        number = int(batch.sender.rpartition("load-")[2])
        assert {int(e.id[5:]) // 1_000_000 for e in batch.events} == {number}  # type: ignore[union-attr]


def test_every_path_of_the_whole_is_served_or_told_about(tmp_path: Path) -> None:
    with started(tmp_path) as runtime:
        app = create_app(runtime, {}, Settings())
    paths = {p.split("/")[2] for p in app.openapi()["paths"] if p.startswith("/v1/")}
    assert paths - {"events", "traces", "metrics", "logs", "status"} == set(CONTROLS)


# --- what does not --------------------------------------------------------------------------------------------------


def test_killed_under_load_everything_that_was_answered_200_is_in_the_topics(
    kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    made(kafka_config)
    with ingesting(tmp_path, kafka_config) as (url, process):
        loads = [Load(url, n) for n in range(4)]
        for load in loads:
            assert load.enough.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        told = [x for load in loads for x in load.end()]
    found = [e.id for e in events_in(kafka_config)]  # type: ignore[union-attr]
    assert set(told) <= set(found)
    assert len(found) == len(set(found))


def test_sigterm_answers_what_is_under_way_and_exits_with_0(
    kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    made(kafka_config)
    with ingesting(tmp_path, kafka_config) as (url, process):
        loads = [Load(url, n) for n in range(4)]
        for load in loads:
            assert load.enough.wait(60)
        assert stop(process) == 0
        told = [x for load in loads for x in load.end()]
    found = [e.id for e in events_in(kafka_config)]  # type: ignore[union-attr]
    assert sorted(told) == sorted(found)
    assert '"drained": true' in (tmp_path / "flyball.log").read_text()


def test_while_the_broker_is_away_senders_are_told_and_nothing_acknowledged_is_lost(
    own_kafka: Cluster, tmp_path: Path
) -> None:
    config = made(own_kafka.config(prefix="away."))
    node = own_kafka.nodes[0]
    with ingesting(tmp_path, config) as (url, _):
        loads = [Load(url, n) for n in range(3)]
        for load in loads:
            assert load.enough.wait(60)
        node.kill()
        assert eventually(lambda: httpx.get(f"{url}/readyz").status_code == 503)
        answer = httpx.post(f"{url}/v1/events", content=ndjson(calls(0, 1)), timeout=60.0)
        assert answer.status_code == 503
        assert answer.json()["error"] == "no Kafka broker answers; nothing was taken; send it again"
        assert int(answer.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/healthz").status_code == 200
        node.start()
        assert eventually(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        told = [x for load in loads for x in load.end()]
        assert httpx.post(f"{url}/v1/events", content=ndjson(calls(9_000_000, 1))).status_code == 200
    # Bodies that were under way are acknowledged late, or their senders are told.
    assert {200} <= set().union(*(load.answers for load in loads)) <= {200, 503}
    found = [e.id for e in events_in(config)]  # type: ignore[union-attr]
    assert {*told, "call-9000000"} <= set(found)
    assert len(found) == len(set(found))


def test_over_the_memory_budget_senders_are_turned_away_litellm_last(
    own_kafka: Cluster,
) -> None:
    config = made(own_kafka.config(prefix="full."))
    node = own_kafka.nodes[0]

    async def work() -> None:
        intake = KafkaIngest(config, SystemClock(), Limits(pending_bytes=20_000))
        await intake.start()
        try:
            node.pause()
            waiting = [intake.ingest(calls(i * 100, 100), "s", time.time()) for i in range(2)]
            with pytest.raises(Overloaded, match="memory for bodies"):
                intake.ingest(calls(900, 100), "s", time.time())
            waiting.append(intake.ingest(calls(900, 100), "s", time.time(), patient=False))
            with pytest.raises(Overloaded):
                intake.ingest(calls(1000, 400), "s", time.time(), patient=False)
            node.resume()
            await asyncio.gather(*map(asyncio.wrap_future, waiting))
            assert intake.pending_bytes == 0
            intake.admit(20_000)
        finally:
            node.resume()
            await intake.stop(10.0)

    timed(work())


def timed(work: Awaitable[None]) -> None:
    async def run() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(run())


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "prefix", "says"),
    [
        (lambda k: f"127.0.0.1:{free_port()}", "flyball.", "refuses the connection"),
        (lambda k: k.bootstrap, "nobodys.", "topics missing: nobodys.llm-calls"),
        (lambda k: "nonsense", "flyball.", "is no address"),
    ],
    ids=["nobody listens", "no topics", "no address"],
)
def test_a_cluster_that_cannot_be_used_is_one_message_and_no_stack_trace(
    kafka: Any, tmp_path: Path, address: Callable[[Any], str], prefix: str, says: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flyball.app", "run", "--port", str(free_port()), "--data", str(tmp_path), "--kafka", address(kafka)],
        capture_output=True, text=True, timeout=90, env={**os.environ, "FLYBALL_KAFKA__PREFIX": prefix}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.startswith("flyball: ")
    assert "Traceback" not in done.stderr
