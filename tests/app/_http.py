"""The HTTP interface on a real runtime, served from a thread on loopback; and clients of it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from flyball.app.embedded import Embedded
from flyball.app.http.server import create_app
from flyball.app.settings import Settings
from flyball.app.wiring import make_formats
from tests.app._runtime import SetClock, started

TOKENS = [
    {"name": role, "token": f"{role}-token-0123456789", "roles": [role]}
    for role in ("ingest", "read", "enforce", "operate", "admin")
]


def bearer(role: str) -> dict[str, str]:
    return {"authorization": f"Bearer {role}-token-0123456789"}


class _Server(uvicorn.Server):
    """Leaves signals alone, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextlib.contextmanager
def served(
    folder: Path, clock: SetClock | None = None, *, given: dict[str, Any] | None = None, **more: Any
) -> Iterator[tuple[httpx.Client, Embedded]]:
    """`given`: settings. `more`: of the runtime."""
    settings = Settings.model_validate(given or {})
    with started(folder, clock, **more) as runtime, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = create_app(runtime, make_formats(settings, b"key of the tests"), settings)
        server = _Server(uvicorn.Config(app, log_level="critical", access_log=False, lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert server.listening.wait(30)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=30.0) as client:
                yield client, runtime
        finally:
            server.should_exit = True
            runtime.board.close()
            thread.join(30)
