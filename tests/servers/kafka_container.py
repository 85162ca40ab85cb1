"""Kafka in a container, by testcontainers. Where the public image cannot be pulled, a stand-in is made of this machine's Java and the jars.

The public image is Kafka's jars and Kafka's own wrapper class, which makes the properties of `KAFKA_…` variables; so is the stand-in.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.processes import answers, free_port
from tests.servers.docker_engine import Engine, NoEngine, engine
from tests.servers.kafka_broker import CannotStart, jars

IMAGE: Final = "apache/kafka:4.3.0"
_RUN: Final = """#!/bin/sh
set -e
java=@JAVA@
$java -cp '/opt/kafka/libs/*' kafka.docker.KafkaDockerWrapper setup --default-configs-dir /opt/kafka/defaults \
  --mounted-configs-dir /opt/kafka/mounted --final-configs-dir /opt/kafka/config
exec $java -Xmx512m -cp '/opt/kafka/libs/*' kafka.Kafka /opt/kafka/config/server.properties
"""
_LOGGING: Final = "Configuration:\n  Appenders: {}\n  Loggers:\n    Root:\n      level: ERROR\n"


@contextlib.contextmanager
def kafka_container() -> Iterator[str]:
    """The address of a broker in a container, on the host's network. Raises: CannotStart."""
    try:
        with engine() as own:
            name = os.environ.get("FLYBALL_TEST_KAFKA_IMAGE", IMAGE)
            if not own.has_image(name):
                with contextlib.suppress(NoEngine):
                    own.docker("pull", "-q", name)
            if not own.has_image(name):
                make_image(own, name)
            with _container(own, name) as address:
                yield address
    except NoEngine as e:
        raise CannotStart(str(e)) from e


@contextlib.contextmanager
def _container(own: Engine, image: str) -> Iterator[str]:
    try:
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer
    except ImportError as e:
        raise CannotStart("testcontainers is not installed") from e
    port, controller = free_port(), free_port()
    variables = {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_LISTENERS": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": f"1@127.0.0.1:{controller}",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "4",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS": "1000",
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        "CLUSTER_ID": "4L6g3nShT-eMCtK--X86sw",
    }
    testcontainers_config.ryuk_disabled = (
        True  # its image would have to be pulled; the container is ended below
    )
    container: Any = DockerContainer(
        image, docker_client_kw={"environment": own.environ}, network_mode="host"
    )
    for name, value in variables.items():
        container.with_env(name, value)
    with container:
        end = time.monotonic() + 90
        while not answers(port):
            if time.monotonic() > end or container.get_wrapped_container().status == "exited":
                raise CannotStart(f"the container does not listen: {container.get_logs()}")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"


def make_image(own: Engine, name: str) -> None:
    """The stand-in: Java with the libraries it loads, a shell, the jars."""
    java = Path(shutil.which("java") or "/").resolve()
    home = java.parent.parent
    with tempfile.TemporaryDirectory(prefix="flyball-image-") as folder:
        root = Path(folder)
        for name_ in ("opt/kafka/defaults", "opt/kafka/mounted", "opt/kafka/config", "tmp", "bin"):
            (root / name_).mkdir(parents=True, exist_ok=True)
        copy_tree(home, root, leave_out=("jmods", "src.zip", "demo", "man", "docs"))
        copy_tree(jars(), root / "opt/kafka/libs", whole_path=False)
        shell = Path(shutil.which("sh") or "/bin/sh").resolve()
        shutil.copy(shell, root / "bin/sh")
        for library in libraries([java, shell, *home.rglob("*.so")]):
            target = root / library.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(library, target)
        (root / "opt/kafka/run.sh").write_text(_RUN.replace("@JAVA@", str(java)))
        for file in ("log4j2.yaml", "tools-log4j2.yaml"):
            (root / "opt/kafka/defaults" / file).write_text(_LOGGING)
        (root / "opt/kafka/defaults/server.properties").write_text("log.dirs=/tmp/kafka\n")
        command = f'tar -C "{root}" -c . | docker import -c \'ENTRYPOINT ["/bin/sh", "/opt/kafka/run.sh"]\' - {name}'
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], env=own.environ, capture_output=True, text=True
        )
        if done.returncode:
            raise NoEngine(f"the stand-in for {name} cannot be made: {done.stderr[-500:]}")


def copy_tree(source: Path, root: Path, *, leave_out: tuple[str, ...] = (), whole_path: bool = True) -> None:
    """Follows links, as much of Debian's Java lies elsewhere; a link to nowhere is left out."""
    target = root / source.relative_to("/") if whole_path else root
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*leave_out), ignore_dangling_symlinks=True)


def libraries(programs: list[Path]) -> set[Path]:
    """What the loader would load for these."""
    listed = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True).stdout
    return {Path(p) for p in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listed, re.M)}
