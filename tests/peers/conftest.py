"""The environment of the real peers: made by `tests/peers.sh` where servers are required, used where it is there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def peers_python() -> str:
    """Python of an environment with the LiteLLM proxy, the OpenAI SDK and two instrumentations of it."""
    key = subprocess.run(
        ["cksum"],
        stdin=(ROOT / "requirements/peers.txt").open("rb"),
        capture_output=True,
        text=True,
        check=True,
    )
    cache = Path(
        os.environ.get("FLYBALL_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flyball"
    )
    home = cache / f"peers-{key.stdout.split()[0]}"
    if (home / ".ready").exists():
        return str(home / "bin/python")
    if os.environ.get("FLYBALL_REQUIRE_SERVERS") != "1":
        require_server("litellm", "its environment (800 MB) is not there; `bash tests/peers.sh` makes it")
    made = subprocess.run(["bash", str(ROOT / "tests/peers.sh")], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        require_server("litellm", made.stderr[-500:])
    return made.stdout.strip().splitlines()[-1]
