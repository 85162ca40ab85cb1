"""Real Apache Kafka for tests and benchmarks: one node or three, from jars, on loopback, ended by process id.

By hand, until Ctrl-C: `python -m tests.servers.kafka_broker [--nodes 3] [--secured]`; then, elsewhere,
`FLYBALL_TEST_KAFKA=127.0.0.1:PORT python -m pytest tests/kafka`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flyball.streams.kafka.admin import live_brokers
from flyball.streams.kafka.config import KafkaConfig, SaslMechanism, SecurityProtocol
from tests.processes import answers, stop

_POM: Final = Path(__file__).with_name("kafka.pom.xml")
_HEAP_MB: Final = {1: (256, 768), 3: (192, 384)}
_QUICK_START: Final = ("-XX:TieredStopAtLevel=1",)
"""A third less processor time until the broker listens, and a slower broker."""
USER: Final = "flyball"
PASSWORD: Final = "flyball-secret"
"""Name and password that a secured cluster knows, for PLAIN and both SCRAM mechanisms."""
GUEST: Final = "guest"
"""Who may log in there by PLAIN with the same password, and may do nothing."""


class CannotStart(Exception):
    """Kafka cannot be had here; the text says why."""


# --- jars ----------------------------------------------------------------------------------------------------------


def cache() -> Path:
    """The developer's cache folder, outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FLYBALL_CACHE") or Path(base) / "flyball")


def jars() -> Path:
    """Folder with Kafka's jars, fetched once by Maven. Raises: CannotStart."""
    home = cache() / f"kafka-{zlib.crc32(_POM.read_bytes()):08x}"
    for program in ("java", "openssl"):
        if shutil.which(program) is None:
            raise CannotStart(f"{program} is not installed")
    if (home / ".ready").exists():
        return home
    if shutil.which("mvn") is None:
        raise CannotStart("mvn is not installed, and the jars have not been fetched before")
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:  # several test processes may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / ".ready").exists():
            command = [
                "mvn", "-q", "-B", "-f", str(_POM), "dependency:copy-dependencies",
                f"-DoutputDirectory={home}", "-DincludeScope=runtime",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CannotStart(f"mvn could not fetch Kafka: {done.stdout[-500:]}{done.stderr[-500:]}")
            (home / ".ready").touch()
    return home


# --- one node ------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One broker, which is a controller too. Keeps ports and data over `kill` and `start`."""

    number: int
    folder: Path
    ports: dict[str, int]
    """Listener (PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL, CONTROLLER) → port."""
    heap_mb: tuple[int, int]
    for_load: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    @property
    def log(self) -> Path:
        return self.folder / "kafka.log"

    def start(self, wait: bool = True) -> None:
        command = [
            "java", f"-Xms{self.heap_mb[0]}m", f"-Xmx{self.heap_mb[1]}m", "-XX:+UseSerialGC", *([] if self.for_load else _QUICK_START),
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{jars()}/*", "kafka.Kafka", str(self.folder / "server.properties"),
        ]  # fmt: skip
        if shutil.which("setpriv"):  # a broker never outlives the tests, however they end
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        if wait:
            self.wait()

    def wait(self, deadline_s: float = 120.0) -> None:
        """Until the broker listens. Raises: CannotStart with the end of its log."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            if all(answers(port) for port in self.ports.values()):
                return
            if self.process is None or self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise CannotStart(f"broker {self.number} does not listen: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        """SIGTERM: hands its partitions over, then ends."""
        if self.process is not None:
            self.resume()
            stop(self.process, 30.0)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)


# --- a cluster -----------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """Brokers that know each other. `bootstrap` is the plain listener of all of them."""

    nodes: list[Node]
    secured: bool = False

    @property
    def bootstrap(self) -> str:
        return self.address("PLAINTEXT")

    @property
    def ca_file(self) -> Path:
        return self.nodes[0].folder.parent / "ca.pem"

    def address(self, protocol: SecurityProtocol) -> str:
        return ",".join(f"127.0.0.1:{node.ports[protocol]}" for node in self.nodes)

    def config(
        self,
        protocol: SecurityProtocol = "PLAINTEXT",
        mechanism: SaslMechanism = "PLAIN",
        prefix: str = "flyball.",
        **changes: Any,
    ) -> KafkaConfig:
        """How a client reaches the listener of this protocol; `changes` spoil it."""
        given: dict[str, Any] = {"bootstrap": self.address(protocol), "security_protocol": protocol}
        if protocol.startswith("SASL"):
            given |= {"sasl_mechanism": mechanism, "sasl_username": USER, "sasl_password": PASSWORD}
        if protocol.endswith("SSL"):
            given["ca_file"] = str(self.ca_file)
        return KafkaConfig(**{**given, "prefix": prefix, **changes})

    def start(self) -> None:
        for node in self.nodes:
            node.start(wait=False)
        for node in self.nodes:
            node.wait()
        self.wait_whole()

    def wait_whole(self, deadline_s: float = 120.0) -> None:
        """Until every broker is known to the cluster."""
        from kafka.admin import KafkaAdminClient
        from kafka.errors import KafkaError

        end = time.monotonic() + deadline_s
        seen: object = None
        while time.monotonic() < end:
            with contextlib.suppress(KafkaError):
                admin = KafkaAdminClient(bootstrap_servers=self.bootstrap, bootstrap_timeout_ms=5000)
                try:
                    seen = sorted(live_brokers(admin))
                finally:
                    admin.close()
                if seen == [node.number for node in self.nodes]:
                    return
            time.sleep(0.1)
        raise CannotStart(f"the cluster has brokers {seen}, not all of {len(self.nodes)}")

    def stop(self) -> None:
        """Ends all of them at once: nobody is left to hand partitions to."""
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                node.kill()


def broker_port() -> int:
    """A free port below those that the system gives to clients: one of these could have it when a killed broker wants it back."""
    for port in random.sample(range(15_000, 32_000), 200):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port
    raise CannotStart("no port is free")


def make_cluster(
    folder: Path, nodes: int = 1, secured: bool = False, for_load: bool = False, **properties: str
) -> Cluster:
    """Formatted storage and settings of a cluster that is not started yet.

    Args:
        secured: also listeners SSL, SASL_PLAINTEXT and SASL_SSL, for `USER` and `PASSWORD`.
        for_load: compile as servers do; for benchmarks.
        properties: of the brokers, with `_` for `.`; they win over what stands here.
    """
    kinds = ["PLAINTEXT", *(["SSL", "SASL_PLAINTEXT", "SASL_SSL"] if secured else []), "CONTROLLER"]
    ports = [{kind: broker_port() for kind in kinds} for _ in range(nodes)]
    folder.mkdir(parents=True, exist_ok=True)
    if secured:
        _make_certificate(folder)
    made = []
    identity = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    for number in range(1, nodes + 1):
        home = folder / f"broker-{number}"
        home.mkdir()
        values = _properties(number, home, ports, secured) | {
            k.replace("_", "."): v for k, v in properties.items()
        }
        path = home / "server.properties"
        path.write_text("".join(f"{k}={v}\n" for k, v in values.items()))
        _format(path, identity, secured)
        made.append(Node(number, home, ports[number - 1], _HEAP_MB[3 if nodes > 1 else 1], for_load))
    return Cluster(made, secured)


def _properties(number: int, home: Path, ports: list[dict[str, int]], secured: bool) -> dict[str, str]:
    nodes, own = len(ports), ports[number - 1]
    listeners = ",".join(f"{kind}://127.0.0.1:{port}" for kind, port in own.items())
    copies = str(min(nodes, 3))
    values = {
        "process.roles": "broker,controller",
        "node.id": str(number),
        "controller.quorum.voters": ",".join(f"{n}@127.0.0.1:{p['CONTROLLER']}" for n, p in enumerate(ports, 1)),
        "listeners": listeners,
        "advertised.listeners": ",".join(x for x in listeners.split(",") if not x.startswith("CONTROLLER")),
        "inter.broker.listener.name": "PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": ",".join(f"{k}:{'PLAINTEXT' if k == 'CONTROLLER' else k}" for k in own),
        "log.dirs": str(home / "data"),
        "auto.create.topics.enable": "false",
        "default.replication.factor": copies,
        "min.insync.replicas": "2" if nodes >= 3 else "1",
        "offsets.topic.replication.factor": copies,
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "2",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",  # the default of 6 s refuses the short sessions of tests
        "log.cleaner.backoff.ms": "500",
        "broker.session.timeout.ms": "9000",
        "log.cleaner.dedupe.buffer.size": str(8 << 20),
    }  # fmt: skip
    if secured:
        plain = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}="{PASSWORD}" user_{GUEST}="{PASSWORD}";'
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        values |= {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(home.parent / "broker.pem"),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:ANONYMOUS;User:{USER}",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
        }
        for listener in ("sasl_plaintext", "sasl_ssl"):
            values[f"listener.name.{listener}.plain.sasl.jaas.config"] = plain
            for bits in ("256", "512"):
                values[f"listener.name.{listener}.scram-sha-{bits}.sasl.jaas.config"] = scram
    return values


def _format(properties: Path, identity: str, secured: bool) -> None:
    command = ["java", *_QUICK_START, "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-cp", f"{jars()}/*",
               "kafka.tools.StorageTool", "format", "-t", identity, "-c", str(properties)]  # fmt: skip
    if secured:
        for bits in ("256", "512"):
            command += ["--add-scram", f"SCRAM-SHA-{bits}=[name={USER},password={PASSWORD}]"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotStart(f"the storage cannot be formatted: {done.stdout[-500:]}{done.stderr[-1000:]}")


def _make_certificate(folder: Path) -> None:
    """`ca.pem`, which clients trust, and `broker.pem`, which holds the key too: one self-signed certificate for loopback."""
    key, certificate = folder / "key.pem", folder / "ca.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-keyout", str(key), "-out", str(certificate),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    (folder / "broker.pem").write_text(key.read_text() + certificate.read_text())


@contextlib.contextmanager
def running_cluster(
    folder: Path, nodes: int = 1, secured: bool = False, for_load: bool = False, **properties: str
) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts. Raises: CannotStart."""
    for attempt in range(3):
        cluster = make_cluster(folder / f"cluster-{attempt}", nodes, secured, for_load, **properties)
        try:
            cluster.start()
        except CannotStart:
            cluster.stop()
            if attempt == 2:
                raise
            continue  # most likely a port that was free when chosen, and taken before the broker bound it
        except BaseException:
            cluster.stop()
            raise
        break
    try:
        yield cluster
    finally:
        cluster.stop()


def main(arguments: list[str]) -> None:
    nodes = 3 if "3" in arguments else 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        tempfile.TemporaryDirectory(prefix="flyball-kafka-") as folder,
        running_cluster(Path(folder), nodes, "--secured" in arguments, for_load=True) as cluster,
    ):
        print(cluster.bootstrap, flush=True)
        if cluster.secured:
            for protocol in ("SSL", "SASL_PLAINTEXT", "SASL_SSL"):
                print(
                    f"{protocol} {cluster.address(protocol)} {USER} {PASSWORD} {cluster.ca_file}", flush=True
                )
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
