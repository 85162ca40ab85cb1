"""docker-compose.yml as tests read it and drive it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.servers.docker_engine import Engine, NoEngine

ROOT: Final = Path(__file__).parents[2]
FILE: Final = ROOT / "docker-compose.yml"
OURS: Final = ("topics", "database", "ingest", "worker", "control-1", "control-2", "load")
"""Services that run Flyball's own image."""
_VARIABLE: Final = re.compile(r"\$\{(\w+):-([^}]*)\}")


def variables() -> dict[str, str]:
    """Variables of the file with the values that stand there."""
    return dict(_VARIABLE.findall(FILE.read_text()))


def substituted(environ: Mapping[str, str]) -> dict[str, Any]:
    """The file as compose reads it with these variables."""
    text = _VARIABLE.sub(lambda m: environ.get(m[1]) or m[2], FILE.read_text())
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def panel_queries() -> list[tuple[str, str]]:
    """(title of the panel, PromQL) of the dashboard, with Grafana's own variables set."""
    board = json.loads((ROOT / "deploy/grafana/dashboards/flyball.json").read_text())
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "1m"))
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]


@dataclass(frozen=True)
class Compose:
    """One project of the file on an engine, under a name that nobody else has."""

    engine: Engine
    project: str
    environ: Mapping[str, str]

    def __call__(self, *words: str) -> str:
        """Raises: AssertionError with what compose said."""
        done = subprocess.run(
            [*command(), "-p", self.project, "-f", str(FILE), *words],
            env={**self.engine.environ, "COMPOSE_DOCKER_CLI_BUILD": "0", **self.environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"compose {' '.join(words)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What the engine knows of a service's containers, stopped ones included."""
        ids = self.engine.docker(
            "ps", "-aq", "--filter", f"label=com.docker.compose.project={self.project}",
            "--filter", f"label=com.docker.compose.service={service}",
        ).split()  # fmt: skip
        found: list[dict[str, Any]] = json.loads(self.engine.docker("inspect", *ids)) if ids else []
        return found


def command() -> list[str]:
    """Compose as this machine has it. Raises: NoEngine."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    there = subprocess.run(["docker", "compose", "version"], capture_output=True, env=dict(os.environ))
    if there.returncode == 0:
        return ["docker", "compose"]
    raise NoEngine(
        "compose is not installed; on Debian: apt-get install --no-install-recommends docker-compose"
    )
