"""A Docker engine for tests: the one that is there, or one of our own on its own socket and folder, ended by its process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.processes import stop


class NoEngine(Exception):
    """No Docker engine can be had here; the text says why."""


@dataclass(frozen=True)
class Engine:
    """An engine that answers at `host`, such as unix:///run/docker.sock."""

    host: str

    @property
    def environ(self) -> dict[str, str]:
        """What the docker command, compose and testcontainers read.

        The reaper of testcontainers is an image that has to be pulled; BuildKit is a part of its own that Debian does not bring.
        """
        ours = {"DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "0", "TESTCONTAINERS_RYUK_DISABLED": "true"}
        return os.environ | ours

    def docker(self, *words: str) -> str:
        done = subprocess.run(["docker", *words], env=self.environ, capture_output=True, text=True)
        if done.returncode:
            raise NoEngine(f"docker {' '.join(words)}: {done.stderr[-500:]}")
        return done.stdout.strip()

    def has_image(self, name: str) -> bool:
        return bool(self.docker("images", "-q", name))


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """The engine of DOCKER_HOST or of the machine; else a new one, which needs root. Raises: NoEngine."""
    if shutil.which("docker") is None:
        raise NoEngine(
            "docker is not installed; on Debian: apt-get install --no-install-recommends docker.io iptables"
        )
    there = Engine(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    with contextlib.suppress(NoEngine):
        there.docker("info")
        yield there
        return
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        raise NoEngine(f"no engine answers at {there.host}, and starting one needs dockerd and root")
    # A socket's path must be short, and the folder outlive nothing: not pytest's.
    folder = Path(tempfile.mkdtemp(prefix="flyball-docker-"))
    try:
        with _own(folder) as own:
            yield own
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _own(folder: Path) -> Iterator[Engine]:
    own = Engine(f"unix://{folder}/sock")
    command = [
        "dockerd",
        "--data-root",
        f"{folder}/data",
        "--exec-root",
        f"{folder}/exec",
        "-p",
        f"{folder}/pid",
        "-H",
        own.host,
    ]
    if shutil.which("setpriv"):  # never outlives the tests, however they end
        command = ["setpriv", "--pdeathsig", "TERM", *command]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(NoEngine):
                own.docker("info")
                break
            if process.poll() is not None or time.monotonic() > end:
                raise NoEngine(f"dockerd does not start: {log.read_text()[-500:]}")
            time.sleep(0.1)
        yield own
    finally:
        stop(process, 60.0)
        # The daemon leaves the namespace of the host's network mounted, which keeps the folder.
        subprocess.run(["umount", f"{folder}/exec/netns/default"], capture_output=True)
