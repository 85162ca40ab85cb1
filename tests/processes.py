"""Processes that tests start, reach and end: always by their own id, always on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def answers(port: int) -> bool:
    """Whether anything listens on this port of loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, deadline_s: float = 90.0) -> None:
    """Until `url` answers 200. Raises: AssertionError with the end of the log when it does not, or the process ends."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=2.0).status_code == 200:
                return
        time.sleep(0.05)
    tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
    raise AssertionError(f"{url} does not answer (exit {process.poll()}):\n{tail}")


@contextlib.contextmanager
def running(
    command: list[str],
    ready_url: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    deadline_s: float = 90.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block lasts; ended with SIGTERM, then SIGKILL."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
    try:
        wait_for(ready_url, process, log, deadline_s)
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[Any], deadline_s: float = 20.0) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
    return process.returncode


@contextlib.contextmanager
def flyball(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """A running `flyball run` on a free port with its data in `folder`; gives its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "flyball.app", "run", "--port", str(port), "--data", str(folder / "data"), *arguments,
    ]  # fmt: skip
    with running(command, f"{url}/readyz", folder / "flyball.log", env):
        yield url


def eventually(check: object, deadline_s: float = 30.0, every_s: float = 0.1) -> object:
    """The first true result of `check()`, or its last result when the time is over."""
    assert callable(check)
    end = time.monotonic() + deadline_s
    while True:
        found = check()
        if found or time.monotonic() > end:
            return found
        time.sleep(every_s)
