"""A small HTTP server on loopback that keeps what it was sent and answers as it was told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Received:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Answer:
    """`hang` never answers, though the request was read; `drop` closes without a word."""

    status: int = 200
    body: bytes = b"ok"
    headers: Mapping[str, str] = field(default_factory=dict)
    hang: bool = False
    drop: bool = False


@dataclass(slots=True)
class Receiver:
    """Answers with `answers` one after the other, then with `otherwise`."""

    url: str
    otherwise: Answer = Answer()
    answers: list[Answer] = field(default_factory=list)
    requests: list[Received] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ", 2)
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.requests.append(Received(method, path, headers, body))
            answer = self.answers.pop(0) if self.answers else self.otherwise
            if answer.hang:
                await reader.read()
            elif not answer.drop:
                lines = [
                    f"HTTP/1.1 {answer.status} X",
                    f"content-length: {len(answer.body)}",
                    "connection: close",
                ]
                lines += [f"{k}: {v}" for k, v in answer.headers.items()]
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + answer.body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


class NoNetwork(httpx.AsyncBaseTransport):
    """For tests whose channels need none; making a client with it reads no certificates, which is slow."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("there is no network in this test")


def offline_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=NoNetwork(), trust_env=False)


@asynccontextmanager
async def receiver(*answers: Answer, otherwise: Answer = Answer()) -> AsyncIterator[Receiver]:
    box = Receiver("", otherwise, list(answers))
    server = await asyncio.start_server(box.serve, "127.0.0.1", 0)
    box.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield box
    finally:
        server.close()
