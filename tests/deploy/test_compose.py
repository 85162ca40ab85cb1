"""The image is built and docker-compose.yml brought up on a real engine; events go in, incidents come out, and killing parts of it changes nothing.

Only Grafana stays unstarted: the queries of its dashboard are put to the Prometheus beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import msgspec
import pytest

from flyball.core.events import LlmCall
from tests.conftest import require_server
from tests.deploy.compose import Compose, command, panel_queries, variables
from tests.deploy.stand_ins import prepare
from tests.processes import eventually, free_port
from tests.servers import kafka_broker, postgres
from tests.servers.docker_engine import NoEngine, engine

pytestmark = pytest.mark.timeout(1800)
WORKERS: Final = 2
PORTS: Final = ("INGEST_PORT", "CONTROL_PORT", "STANDBY_PORT", "PROMETHEUS_PORT")
STARTED: Final = ("ingest", "worker", "control-1", "control-2", "prometheus")
SILENT: Final = (
    "flyball_rejected_events_total",
    "flyball_window_stage_rejected_total",
    "flyball_action_outcomes_total",
)
"""They count by reason or outcome what did not happen here."""


@dataclass
class Cluster:
    """What runs, reached as a sender and as a person would."""

    compose: Compose
    http: httpx.Client
    sent: int = 0
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, name: str, path: str) -> str:
        return f"http://127.0.0.1:{self.compose.environ[name]}{path}"

    def get(self, name: str, path: str, **query: str) -> Any:
        """What is answered with 200; None for anything else."""
        headers = {"Authorization": f"Bearer {variables()['PEOPLE_TOKEN']}"}
        with contextlib.suppress(httpx.TransportError):
            answer = self.http.get(self.url(name, path), headers=headers, params=query)
            if answer.status_code == 200:
                return answer.json()
        return None

    def owner(self) -> str:
        """The variable with the port of the control that decides; empty while none does."""
        return next((n for n in ("CONTROL_PORT", "STANDBY_PORT") if self.get(n, "/readyz")), "")

    def send(self, failing: str) -> None:
        """Twenty calls that `failing` did not answer, and twenty that another did."""
        calls = [
            LlmCall(
                at=time.time(), id=f"call-{n}", provider=failing if n % 2 else "steady", model="m", app="shop",
                tenant=f"t{n % 7}", error="server_error" if n % 2 else "", latency_s=0.3,
            )
            for n in itertools.islice(self.numbers, 40)
        ]  # fmt: skip
        answer = self.http.post(
            self.url("INGEST_PORT", "/v1/events"),
            content=msgspec.json.Encoder().encode_lines(calls),
            headers={
                "Authorization": f"Bearer {variables()['GATEWAYS_TOKEN']}",
                "Content-Type": "application/x-ndjson",
            },
        )
        assert answer.status_code == 200, answer.text
        self.sent += len(calls)

    def outage_of(self, provider: str) -> dict[str, Any]:
        """The incident that comes of it while calls go on failing. Raises: AssertionError with what the processes said."""

        def told() -> list[dict[str, Any]]:
            self.send(provider)
            found = self.get(self.owner() or "CONTROL_PORT", "/v1/incidents") or []
            return [i for i in found if i["root"] == {"kind": "provider", "name": provider}]

        found = eventually(told, 120.0, 1.0)
        assert isinstance(found, list)
        assert found, self.compose("logs", "--tail", "30", "ingest", "worker", "control-1", "control-2")
        one: dict[str, Any] = found[0]
        return one

    def judged(self) -> int:
        """Calls that the owner has in its windows; every call counts once."""
        status = self.get(self.owner() or "CONTROL_PORT", "/v1/status")
        return int(status["events"].get("llm_call", 0)) if status else 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        try:
            own = stack.enter_context(engine())
            command()
            images = prepare(own)
        except (NoEngine, kafka_broker.CannotStart, postgres.CannotStart) as e:
            require_server("docker compose", str(e))
            raise
        ports = {name: str(free_port()) for name in PORTS}
        project = f"flyball-test-{free_port()}"
        compose = Compose(own, project, {**images, **ports, "FLYBALL_IMAGE": project, "LOAD_RATE": "10"})
        stack.callback(compose, "--profile", "load", "down", "-v", "--remove-orphans", "-t", "5")
        compose("build")
        compose("up", "-d", "--scale", f"worker={WORKERS}", *STARTED)
        with httpx.Client(trust_env=False, timeout=10.0) as http:
            made = Cluster(compose, http)
            up = eventually(lambda: made.owner() and made.get("INGEST_PORT", "/readyz"), 120.0, 0.5)
            assert up, compose("logs", "--tail", "40")
            yield made


def test_what_was_to_be_done_once_is_done_and_the_rest_is_healthy(cluster: Cluster) -> None:
    for service in ("topics", "database"):
        assert [c["State"]["ExitCode"] for c in cluster.compose.containers(service)] == [0]

    def unhealthy() -> list[str]:
        of = [c for s in STARTED for c in cluster.compose.containers(s)]
        return [c["Name"] for c in of if c["State"]["Health"]["Status"] != "healthy"]

    assert eventually(lambda: not unhealthy(), 120.0, 1.0), unhealthy()
    assert len(cluster.compose.containers("worker")) == WORKERS


def test_nobody_is_root_and_nothing_but_volumes_is_written(cluster: Cluster) -> None:
    for service in (*STARTED, "topics", "database", "postgres", "kafka"):
        for container in cluster.compose.containers(service):
            host, user = container["HostConfig"], container["Config"]["User"]
            assert user not in ("", "root", "0"), service
            assert host["ReadonlyRootfs"] == (service != "kafka"), service
            assert host["CapDrop"] == ["ALL"]
            assert {b["HostIp"] for ports in (host["PortBindings"] or {}).values() for b in ports} <= {
                "127.0.0.1"
            }


def test_an_outage_that_ingest_hears_of_is_an_incident_at_control(cluster: Cluster) -> None:
    incident = cluster.outage_of("first")
    assert "100 %" in incident["title"]


def test_a_worker_killed_is_replaced_by_the_others_and_no_call_is_lost_or_counted_twice(
    cluster: Cluster,
) -> None:
    victim = cluster.compose.containers("worker")[0]
    cluster.compose.engine.docker("kill", "-s", "KILL", victim["Id"])
    cluster.outage_of("second")
    assert eventually(lambda: cluster.judged() == cluster.sent, 90.0, 0.5), (cluster.judged(), cluster.sent)
    alive = [c["State"]["Running"] for c in cluster.compose.containers("worker")]
    assert sorted(alive) == [False, True]


def test_the_standby_takes_over_from_a_killed_owner_with_all_that_was_known(cluster: Cluster) -> None:
    owner = cluster.owner()
    before = cluster.get(owner, "/v1/incidents")
    service = "control-1" if owner == "CONTROL_PORT" else "control-2"
    cluster.compose.engine.docker("kill", "-s", "KILL", cluster.compose.containers(service)[0]["Id"])
    assert eventually(lambda: cluster.owner() not in ("", owner), 60.0, 0.2)
    after = {i["id"] for i in cluster.get(cluster.owner(), "/v1/incidents")}
    assert {i["id"] for i in before} <= after
    cluster.outage_of("third")
    assert eventually(lambda: cluster.judged() == cluster.sent, 90.0, 0.5), (cluster.judged(), cluster.sent)


def test_what_was_killed_comes_back_by_up_and_the_lab_sends_load(cluster: Cluster) -> None:
    cluster.compose("--profile", "load", "up", "-d", "--scale", f"worker={WORKERS}", *STARTED, "load")
    for service in ("worker", "control-1", "control-2", "load"):
        assert all(c["State"]["Running"] for c in cluster.compose.containers(service)), service

    def sent() -> list[str]:
        (load,) = cluster.compose.containers("load")
        lines = cluster.compose.engine.docker("logs", load["Id"]).splitlines()
        return [line for line in lines if "events" in line and " 0 events" not in line]

    assert eventually(sent, 60.0, 1.0)
    assert not any(";" in line for line in sent()), sent()  # it tells a problem behind a semicolon


def test_every_query_of_the_dashboard_is_answered_by_prometheus(cluster: Cluster) -> None:
    def empty() -> list[str]:
        found = []
        for panel, query in panel_queries():
            answer = cluster.get("PROMETHEUS_PORT", "/api/v1/query", query=query)
            assert answer is not None, f"{panel}: Prometheus does not take {query}"
            if not answer["data"]["result"] and not any(name in query for name in SILENT):
                found.append(f"{panel}: {query}")
        return found

    assert eventually(lambda: not empty(), 90.0, 1.0), empty()


def test_prometheus_finds_every_process_by_its_role(cluster: Cluster) -> None:
    def up() -> dict[str, int]:
        query = 'sum by (role) (up{job="flyball"})'
        found = cluster.get("PROMETHEUS_PORT", "/api/v1/query", query=query)["data"]["result"]
        return {r["metric"]["role"]: int(r["value"][1]) for r in found}

    wanted = {"ingest": 1, "worker": WORKERS, "control": 2}
    assert eventually(lambda: up() == wanted, 90.0, 1.0), up()


def test_prometheus_evaluates_every_alert_and_none_of_them_cries_now(cluster: Cluster) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = cluster.get("PROMETHEUS_PORT", "/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    assert eventually(lambda: {r["health"] for r in rules()} == {"ok"}, 60.0), rules()
    assert [r["name"] for r in rules() if r["state"] == "firing"] == []


def test_the_first_process_of_a_container_ends_when_it_is_told_to(cluster: Cluster) -> None:
    own = cluster.compose.engine
    for service in ("load", "worker"):
        one = cluster.compose.containers(service)[0]["Id"]
        own.docker("stop", "-t", "100", one)
        # 143: by the signal, which a process with the number 1 has to take itself; 137 would be killed.
        assert own.docker("inspect", "-f", "{{.State.ExitCode}}", one) == (
            "143" if service == "load" else "0"
        )


def test_down_leaves_nothing(cluster: Cluster) -> None:
    cluster.compose("--profile", "load", "down", "-v", "-t", "40")
    own, mine = cluster.compose.engine, f"label=com.docker.compose.project={cluster.compose.project}"
    assert own.docker("ps", "-aq", "--filter", mine) == ""
    assert own.docker("volume", "ls", "-q", "--filter", mine) == ""
    assert own.docker("network", "ls", "-q", "--filter", mine) == ""
