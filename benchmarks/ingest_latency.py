"""How long a POST to `/v1/events` waits for its answer, under sustained load, from a second process.

`flyball run` as shipped, on loopback, with its database in the folder for temporary files. Eight exporters post bodies of 512 calls at a
steady rate; the time of an answer counts from when the body was due, so that a stall is not hidden by its own queue.

    python -m benchmarks ingest_latency
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import numpy as np

from benchmarks.pipeline_memory import bodies, traffic
from flyball.app.tables import print_rows
from tests.processes import flyball

BAR_P99_S: Final = 0.050
_EXPORTERS: Final = 8
_BODIES_A_SECOND: Final = 40
"""20,480 calls a second in all."""
_SECONDS: Final = 20
_WARM_S: Final = 4.0


def bodies_of_now(n: int) -> list[bytes]:
    """Bodies whose calls ended in these seconds, each with ids of its own."""
    begun = time.time()
    made = bodies([msgspec.structs.replace(c, span="", trace="") for c in traffic(512 * _BODIES_A_SECOND)])
    out = []
    for i in range(n):
        at = b'"at":%d' % int(begun + i / _BODIES_A_SECOND)
        body = made[i % len(made)].replace(b'"at":1700000000', at)
        out.append(body.replace(b"chatcmpl-P0000", b"chatcmpl-P%04d" % (i // len(made))))
    return out


async def exporter(
    client: httpx.AsyncClient, mine: list[tuple[float, bytes]], begun: float, took_s: list[float]
) -> None:
    for due, body in mine:
        await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
        response = await client.post("/v1/events", content=body)
        response.raise_for_status()
        if due >= _WARM_S:
            took_s.append(time.perf_counter() - begun - due)


async def load(url: str) -> list[float]:
    """Seconds from due to answered, of every body after the warm-up."""
    made = bodies_of_now(_BODIES_A_SECOND * _SECONDS)
    took_s: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        begun = time.perf_counter() + 0.2
        works = []
        for e in range(_EXPORTERS):
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30.0))
            mine = [(i / _BODIES_A_SECOND, made[i]) for i in range(e, len(made), _EXPORTERS)]
            works.append(exporter(client, mine, begun, took_s))
        await asyncio.gather(*works)
    return took_s


def run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, flyball(Path(folder)) as url:
        took_s = np.array(asyncio.run(load(url)))
        counted = httpx.get(f"{url}/v1/status").json()["lag_s"]
    p50, p99 = np.quantile(took_s, [0.5, 0.99])
    rate = f"{_BODIES_A_SECOND * 512:,} calls/s"
    return [
        {"name": f"answer to POST /v1/events at {rate}, p99", "value": round(float(p99), 4), "unit": "s",
         "baseline": round(float(p50), 4), "ratio": round(float(p99 / p50), 2), "bar": BAR_P99_S, "holds": bool(p99 <= BAR_P99_S)},
        {"name": f"lag of the stages at {rate}", "value": round(counted, 3), "unit": "s",
         "baseline": None, "ratio": None, "bar": None, "holds": None},
    ]  # fmt: skip


if __name__ == "__main__":
    print_rows(run())
    sys.exit()
