"""Live driving and export, against a fake server through httpx's own transport seam and a clock that we hold."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec
import pytest

from flyball.core.errors import ConfigError
from flyball.core.events import Event
from flyball.lab.estate import default_estate
from flyball.lab.export import write_ndjson
from flyball.lab.faults import AnyFault, ProviderOutage
from flyball.lab.live import LiveLab, Tick
from flyball.lab.sim import START_AT, Simulator
from tests.lab.helpers import lease

_line = msgspec.json.Decoder(Event)


class Server:
    """Takes events and serves one lease, as Flyball does."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        self.not_modified = 0
        self.status = 200
        self.leases = [lease("redirect", {"provider": "b"}, START_AT, to={"provider": "a"})]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/events":
            self.bodies.append((request.headers["X-Flyball-Sender"], request.content))
            return httpx.Response(self.status)
        if request.url.path == "/v1/directives":
            if request.headers.get("If-None-Match") == '"1"':
                self.not_modified += 1
                return httpx.Response(304)
            return httpx.Response(200, content=msgspec.json.encode(self.leases), headers={"ETag": '"1"'})
        return httpx.Response(200)


class Clock:
    """Time that passes only while the lab waits."""

    def __init__(self) -> None:
        self.now = START_AT

    def __call__(self) -> float:
        return self.now

    async def pause(self, seconds: float) -> None:
        self.now += seconds


def live(server: Server, **more: object) -> tuple[LiveLab, Clock]:
    clock = Clock()
    made = LiveLab(
        "http://flyball.test",
        rate=10.0,
        transport=httpx.MockTransport(server),
        clock=clock,
        pause=clock.pause,
    )
    for name, value in more.items():
        setattr(made, name, value)
    return made, clock


def test_every_sender_posts_its_own_events_and_the_lease_takes_hold() -> None:
    server, ticks = Server(), list[Tick]()
    lab, _ = live(server)
    last = asyncio.run(lab.run(60.0, ticks.append))
    events = [_line.decode(line) for _, body in server.bodies for line in body.splitlines()]
    assert last.events_sent == len(events) > 100
    assert {"gateway-1", "gateway-4", "dcgm-node-1"} <= {sender for sender, _ in server.bodies}
    assert [d.id for d in last.directives] == ["redirect-1"]
    assert last.applied["redirect-1"] > 10
    assert server.not_modified > 50
    assert len(ticks) == 121
    assert ticks[-1].elapsed_s == 60.0


def test_leases_are_read_from_the_control_that_is_in_charge() -> None:
    server = Server()
    asked: list[str] = []

    def cluster(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.url.host} {request.url.path}")
        if request.url.host == "dead.test":
            raise httpx.ConnectError("connection refused", request=request)
        if request.url.host == "standby.test":
            return httpx.Response(503)
        return server(request)

    clock = Clock()
    lab = LiveLab(
        "http://ingest.test",
        rate=10.0,
        controls=["http://dead.test", "http://standby.test/", "http://owner.test"],
        transport=httpx.MockTransport(cluster),
        clock=clock,
        pause=clock.pause,
    )
    last = asyncio.run(lab.run(60.0))
    assert not last.problem
    assert last.applied["redirect-1"] > 10
    assert {"owner.test /v1/directives", "owner.test /v1/enforced", "ingest.test /v1/events"} <= set(asked)
    assert not {"ingest.test /v1/directives", "owner.test /v1/events"} & set(asked)


def test_a_server_that_refuses_is_told_of_and_the_run_goes_on() -> None:
    server = Server()
    server.status = 429
    lab, _ = live(server)
    last = asyncio.run(lab.run(20.0))
    assert last.events_sent == 0
    assert last.events_refused > 10


def test_faults_are_given_relative_to_the_start_of_the_run() -> None:
    def faults(start: float) -> Sequence[AnyFault]:
        return [ProviderOutage("c", 0.9, start + 10)]

    server = Server()
    lab, _ = live(server, faults=faults)
    asyncio.run(lab.run(60.0))
    events = [json.loads(line) for _, body in server.bodies for line in body.splitlines()]
    failed = [e for e in events if e.get("provider") == "c" and e.get("error_code") == "529"]
    assert failed
    assert min(e["at"] for e in failed) > START_AT + 9.5


def test_no_server_is_one_clear_sentence() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    lab = LiveLab("http://flyball.test", transport=httpx.MockTransport(refuse))
    with pytest.raises(ConfigError, match=r"no Flyball at http://flyball\.test"):
        asyncio.run(lab.run(1.0))


@pytest.mark.parametrize("name", ["a.ndjson", "a.ndjson.gz", "a.ndjson.zst"])
def test_a_file_holds_native_events_and_is_the_same_for_the_same_seed(tmp_path: Path, name: str) -> None:
    written = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        count = write_ndjson(Simulator(default_estate(5.0), 1), path, 120.0)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    if name.endswith(".gz"):
        lines = gzip.decompress(written[0]).splitlines()
        assert len(lines) == count
        assert all(_line.decode(line).at for line in lines)
