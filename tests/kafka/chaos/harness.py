"""Two workers under load, things that happen to them and to their brokers, and a comparison with the embedded run at the end.

A worker that ends by itself is started again, as a supervisor would; one that was killed stays down until the schedule brings it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import httpx

from flyball.app.store import owner
from flyball.app.store.database import reading
from flyball.core.errors import Ambiguous, NotAccepted
from flyball.core.events import Batch
from flyball.streams.kafka.admin import create_topics, wanted
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.producer import Producer, ProducerSettings
from tests.kafka.chaos.course import GIVEN, Course, differences, embedded, from_log
from tests.processes import eventually, free_port
from tests.servers.kafka_broker import Cluster

PARTITIONS: Final = 8
_DRAIN_S: Final = 120.0
_END_S: Final = 40.0
OWNER: Final = "owner"
"""The worker that holds the database, whichever it is by then."""

Verb = Literal[
    "join", "leave", "kill", "return", "pause_broker", "resume_broker", "stop_broker", "kill_broker", "start_broker",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens `at_s` seconds after the outage began (before it, when negative).

    who: a worker (`join`, `leave`, `kill`), or the number of a broker. `return` starts all workers that were killed.
    """

    at_s: float
    verb: Verb
    who: str = ""

    def __str__(self) -> str:
        return f"{self.at_s:g}s {self.verb} {self.who}".rstrip()


@dataclass
class Worker:
    """A place where `flyball worker` runs: one life after the other."""

    name: str
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = False
    ends: list[int] = field(default_factory=list)
    """Exit codes of lives that nobody asked to end."""

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, command: list[str], env: dict[str, str]) -> None:
        self.folder.mkdir(exist_ok=True)
        command = [*command, "--port", str(self.port)]
        if shutil.which("setpriv"):  # never outlives the tests, however they end
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=env | {"FLYBALL_DATA": str(self.folder)}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, cwd=self.folder,
            )  # fmt: skip
        self.wanted = True

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def status(self) -> dict[str, Any]:
        """What it says; empty when it does not answer, or does not own the database."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = httpx.get(f"http://127.0.0.1:{self.port}/v1/status", timeout=5.0)
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                return found if found.get("role") == "control" else {}
        return {}

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""


class Load:
    """Sends bodies when they are due, from a thread, as `flyball run --kafka` would; once more where Kafka does not acknowledge one, as its sender
    would that is answered 503."""

    def __init__(self, config: KafkaConfig, bodies: list[Batch]) -> None:
        self._config, self._bodies = config, bodies
        self.failure: BaseException | None = None
        self.again = 0
        """Bodies that were sent once more."""
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except BaseException as e:  # noqa: BLE001 - told to who waits
            self.failure = e

    async def _send(self) -> None:
        producer = Producer(self._config, ProducerSettings(acknowledged_s=_DRAIN_S, request_s=_DRAIN_S))
        await producer.start()
        futures: list[Future[int]] = []
        last = 0.0
        for body in self._bodies:
            arrives_at = body.received_at or 0.0
            if arrives_at > last + 1.0:
                # What lies minutes apart must not come to lie in one record, sender by sender.
                behind = arrives_at < time.time()
                waiting = [asyncio.wrap_future(f) for f in futures if behind and not f.done()]
                await asyncio.gather(*waiting, return_exceptions=True)
                last = arrives_at
            await asyncio.sleep(max(0.0, arrives_at - time.time()))
            futures.append(producer.append(producer.encode(body.events), body.sender, arrives_at))
        for body, future in zip(self._bodies, futures, strict=True):
            sent = future
            while True:
                try:
                    await asyncio.wrap_future(sent)
                    break
                except (Ambiguous, NotAccepted):
                    self.again += 1
                    sent = producer.append(producer.encode(body.events), body.sender, body.received_at or 0.0)
        if not await producer.stop(_DRAIN_S):
            raise AssertionError("not all was acknowledged")

    def join(self) -> None:
        self._thread.join(2 * _DRAIN_S)
        if self.failure is not None:
            raise self.failure
        assert not self._thread.is_alive(), "the load does not end"


class Chaos:
    """One run. `cluster`: its own; `database`: the address of an empty, migrated one."""

    def __init__(self, cluster: Cluster, database: str, folder: Path) -> None:
        self.cluster, self.database, self.folder = cluster, database, folder
        self.config = cluster.config(prefix=f"c{os.urandom(4).hex()}.")
        self.workers = {name: Worker(name, folder / name) for name in "abc"}
        self.told: list[str] = []
        """What happened, for who reads a failure."""
        create_topics(self.config, wanted(PARTITIONS))

    def run(self, course: Course, faults: list[Fault]) -> list[str]:
        """What is otherwise than in the embedded run. Raises: AssertionError where there is nothing to compare."""
        try:
            return self._run(course, faults)
        except AssertionError as e:
            raise AssertionError(report(self, [str(e)])) from e
        finally:
            for worker in self.workers.values():
                if worker.process is not None:
                    if worker.alive:
                        worker.process.kill()
                    worker.process.wait(10)
            for node in self.cluster.nodes:
                node.resume()
                if node.process is None or node.process.poll() is not None:
                    node.start()

    def _run(self, tape: Course, faults: list[Fault]) -> list[str]:
        quiet_ends_at = time.time()
        early = tape.at(quiet_ends_at, quiet_ends_at).early
        Load(self.config, early).join()
        self._start("a")
        self._start("b")
        known = sum(len(b.events) for b in early) * 9 // 10  # copies of calls count once
        assert self._until(lambda: self._through(known, 20), _DRAIN_S), self._status()
        course = tape.at(quiet_ends_at, time.time())
        load = Load(self.config, course.live)
        self._tell(f"the outage begins in {course.zero - time.time():.1f} s")
        for fault in sorted(faults, key=lambda f: f.at_s):
            self._until(lambda due=course.zero + fault.at_s: time.time() >= due, 600.0)
            self._tell(str(fault))
            self._happen(fault)
        load.join()
        self._tell(f"all is sent, {load.again} bodies more than once")
        wanted = embedded(course, course.ends_at + 30.0)
        total = sum(wanted.events.values())
        granted = min(1, len(wanted.directives))
        done = self._until(lambda: self._through(total, len(wanted.windows), granted), _DRAIN_S)
        self._tell("all is through" if done else f"not all came through: {self._status()}")
        self._end()
        found, ticked = from_log(self.database)
        wanted = embedded(course, max(ticked, course.ends_at) + 30.0)
        if load.again:
            # Copies of calls and steps are told by their ids; GPU samples and evaluations have none, and count twice.
            wanted.duplicates = found.duplicates
            for kind in ("gpu_sample", "evaluation"):
                assert found.events[kind] >= wanted.events[kind]
                wanted.events[kind] = found.events[kind]
        return differences(found, wanted)

    def _through(self, events: int, windows: int, directives: int = 0) -> bool:
        status = self._status()
        if int(status.get("directives", 0)) < directives:
            return False
        return sum(status.get("events", {}).values()) >= events and int(status.get("windows", 0)) >= windows

    def _status(self) -> dict[str, Any]:
        return next((s for w in self.workers.values() if w.alive and (s := w.status())), {})

    def _until(self, check: Any, deadline_s: float) -> bool:
        """As `eventually`, while workers that ended by themselves are started again."""

        def look() -> bool:
            for worker in self.workers.values():
                if worker.wanted and not worker.alive:
                    assert worker.process is not None
                    worker.ends.append(worker.process.returncode)
                    self._tell(
                        f"{worker.name} ended by itself ({worker.process.returncode}): {worker.tail()[-400:]}"
                    )
                    assert len(worker.ends) < 20, f"{worker.name} ends again and again: {worker.tail()}"
                    self._start(worker.name)
            return bool(check())

        return bool(eventually(look, deadline_s, 0.2))

    def _start(self, name: str) -> None:
        command = [
            sys.executable, "-m", "flyball.app", "worker", "--kafka", self.config.bootstrap, "--database", self.database,
            "--config", str(self._settings()),
        ]  # fmt: skip
        env = os.environ | {"FLYBALL_KAFKA_PREFIX": self.config.prefix}
        self.workers[name].start(command, env)

    def _settings(self) -> Path:
        path = self.folder / "flyball.yaml"
        if not path.exists():
            lines = [
                f"{k}: {v}"
                for k, v in (GIVEN | {"snapshot_every_s": 5.0, "hash_key": "of the tests"}).items()
            ]
            path.write_text("\n".join(lines).replace("'", "") + "\n")
        return path

    # --- what happens -------------------------------------------------------------------------------------------------

    def _happen(self, fault: Fault) -> None:
        if fault.verb.endswith("_broker"):
            node = self.cluster.nodes[int(fault.who) - 1]
            {
                "pause_broker": node.pause, "resume_broker": node.resume, "stop_broker": node.stop,
                "kill_broker": node.kill, "start_broker": node.start,
            }[fault.verb]()  # fmt: skip
        elif fault.verb == "join":
            self._start(fault.who)
        elif fault.verb == "return":
            for worker in self.workers.values():
                if worker.process is not None and not worker.wanted:
                    self._start(worker.name)
        else:
            worker = self._owner() if fault.who == OWNER else self.workers[fault.who]
            assert worker.process is not None
            worker.wanted = False
            if not worker.alive:
                self._tell(f"{worker.name} had ended before ({worker.process.returncode})")
                return
            worker.process.send_signal(signal.SIGTERM if fault.verb == "leave" else signal.SIGKILL)
            code = worker.process.wait(_END_S)
            self._tell(f"{worker.name} has ended ({code})")
            # Told to end before it had begun to listen for that, a process just ends.
            fine = (0, -signal.SIGTERM) if fault.verb == "leave" else (-signal.SIGKILL,)
            assert code in fine, worker.tail()

    def _owner(self) -> Worker:
        with reading(self.database) as c:
            _, who = owner.current(c)
        pid = int(who.rpartition(":")[2])
        found = [w for w in self.workers.values() if w.process is not None and w.process.pid == pid]
        assert found, f"{who} owns the database, and is none of ours"
        return found[0]

    def _end(self) -> None:
        for worker in self.workers.values():
            worker.wanted = False
            if worker.alive and worker.process is not None:
                worker.process.send_signal(signal.SIGTERM)
        for worker in self.workers.values():
            if worker.process is not None:
                worker.process.wait(_END_S)

    def _tell(self, what: str) -> None:
        self.told.append(f"{time.strftime('%H:%M:%S')} {what}")


def report(chaos: Chaos, found: list[str]) -> str:
    """For a failure: what happened, what is wrong, and where to read on."""
    return "\n".join([*chaos.told, "", *found, "", f"logs: {chaos.folder}/*/log"])


__all__ = ["OWNER", "Chaos", "Fault", "report"]
