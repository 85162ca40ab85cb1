"""`flyball worker` that cannot start: one message that says what is wrong and what to do, an exit code that is not zero, no stack trace."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flyball.streams.kafka.admin import create_topics, wanted
from tests.kafka._workers import environment, worker
from tests.processes import free_port
from tests.servers.kafka_broker import Cluster
from tests.servers.kafka_ways import Kafka, new_prefix
from tests.servers.postgres import Postgres


def said(settings: dict[str, str], *arguments: str, program: str = "") -> tuple[int, list[str]]:
    """Exit code, and what was printed that is no line of the log."""
    start = ["-c", program] if program else ["-m", "flyball.app"]
    done = subprocess.run(
        [sys.executable, *start, "worker", *arguments], capture_output=True, text=True, timeout=120, env=settings,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("{")]


def ready(kafka: Kafka, folder: Path, **settings: str) -> dict[str, str]:
    """All that a start needs, but for `settings`."""
    config = kafka.config()
    create_topics(config, wanted(2))
    free = {"PORT": str(free_port()), "KAFKA_PARTITIONS": "2"}
    return environment(config, folder, **(free | settings))


class Place:
    """What a case may use to make itself."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path) -> None:
        self.request, self.folder = request, folder

    @property
    def kafka(self) -> Kafka:
        found: Kafka = self.request.getfixturevalue("kafka")
        return found

    def ready(self, **settings: str) -> dict[str, str]:
        return ready(self.kafka, self.folder, **settings)


def no_broker(at: Place) -> tuple[dict[str, str], str]:
    settings = environment(at.kafka.config(), at.folder, KAFKA=f"127.0.0.1:{free_port()}")
    return settings, "refuses the connection: no broker listens there; start it, or correct the address"


def no_such_host(at: Place) -> tuple[dict[str, str], str]:
    settings = environment(at.kafka.config(), at.folder, KAFKA="no-such-host.invalid:9092")
    return settings, "no host of this name is known; correct the address"


def wrong_password(at: Place) -> tuple[dict[str, str], str]:
    cluster: Cluster = at.request.getfixturevalue("secured_kafka")
    config = cluster.config("SASL_PLAINTEXT", "SCRAM-SHA-512", prefix=new_prefix())
    settings = environment(
        config, at.folder, KAFKA_SECURITY_PROTOCOL="SASL_PLAINTEXT", KAFKA_SASL_MECHANISM="SCRAM-SHA-512",
        KAFKA_SASL_USERNAME=config.sasl_username, KAFKA_SASL_PASSWORD="not-it",
    )  # fmt: skip
    return settings, "correct FLYBALL_KAFKA_SASL_USERNAME, FLYBALL_KAFKA_SASL_PASSWORD"


def no_topics(at: Place) -> tuple[dict[str, str], str]:
    return environment(at.kafka.config(), at.folder, PORT=str(free_port())), "flyball topics create"


def too_few_partitions(at: Place) -> tuple[dict[str, str], str]:
    return at.ready(KAFKA_PARTITIONS="3"), "2 partitions, 3 are wanted"


def unmigrated(at: Place) -> tuple[dict[str, str], str]:
    server: Postgres = at.request.getfixturevalue("postgres")
    return at.ready(DATABASE=server.empty()), "say `flyball database upgrade --database URL` once"


def no_database(at: Place) -> tuple[dict[str, str], str]:
    url = f"postgresql://flyball:secret@127.0.0.1:{free_port()}/flyball"
    return at.ready(DATABASE=url), "is it running, and are address, user and password right?"


def port_taken(at: Place) -> tuple[dict[str, str], str]:
    taken = socket.socket()
    at.request.addfinalizer(taken.close)
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return at.ready(PORT=str(taken.getsockname()[1])), "stop what listens there, or set another port"


def refused_runbook(at: Place) -> tuple[dict[str, str], str]:
    file = at.folder / "mine.yaml"
    file.write_text("runbook: v1\nname: mine\nwhen: incident.nonsense == 1\n")
    return at.ready(RUNBOOKS=f'["{file}"]'), "mine.yaml:"


@pytest.mark.parametrize(
    "case",
    [
        no_broker, no_such_host, wrong_password, no_topics, too_few_partitions, unmigrated, no_database, port_taken,
        refused_runbook,
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once_with_what_to_do(
    request: pytest.FixtureRequest, tmp_path: Path, case: Callable[[Place], tuple[dict[str, str], str]]
) -> None:
    settings, what = case(Place(request, tmp_path))
    code, lines = said(settings)
    assert code != 0
    assert what in "\n".join(lines)
    assert sum(line.startswith("flyball: ") for line in lines) == 1
    assert not [line for line in lines if "Traceback" in line or line.startswith("  File ")], lines
    assert "secret" not in "\n".join(lines)


WITHOUT = """
import sys
from importlib import metadata
found = metadata.version
def version(name):
    if name in {missing!r}:
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
for name in {modules!r}:
    sys.modules[name] = None
from flyball.app.cli import main
main()
"""


@pytest.mark.parametrize(
    ("missing", "modules", "what"),
    [
        (["aiokafka", "faust-streaming"], ["aiokafka", "faust"], "pip install 'flyball[kafka]'"),
        (["psycopg"], ["psycopg"], "pip install 'flyball[postgres]'"),
    ],
    ids=["kafka", "postgres"],
)
def test_a_missing_extra_is_named(
    kafka: Kafka, tmp_path: Path, missing: list[str], modules: list[str], what: str
) -> None:
    """As where the packages are not installed: neither their metadata nor their modules are found."""
    settings = ready(kafka, tmp_path, DATABASE="postgresql://flyball@127.0.0.1:1/flyball")
    code, lines = said(settings, program=WITHOUT.format(missing=missing, modules=modules))
    assert (code, len(lines)) == (2, 1), lines
    assert what in lines[0]


def test_a_second_control_on_the_same_file_is_refused(kafka: Kafka, tmp_path: Path) -> None:
    config = kafka.config()
    create_topics(config, wanted(2))
    with worker(config, tmp_path, KAFKA_PARTITIONS="2") as first:
        first.until(lambda: first.get("/readyz"))
        other = environment(config, tmp_path, PORT=str(free_port()), KAFKA_PARTITIONS="2")
        code, lines = said(other)
    assert (code, len(lines)) == (2, 1), lines
    assert f"is in use by the Flyball of process {first.process.pid}; stop that one" in lines[0]
