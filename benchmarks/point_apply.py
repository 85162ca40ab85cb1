"""What an enforcement point adds to one call: `PointClient.apply` with no, 10 and 1,000 live directives.

Told as a multiple of the least that any matching could do: one dictionary look-up per label of the call. Run as a script, or through
`make bench`, which calls `run()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

from flyball.remediation.points.client import PointClient

CALL = {
    "provider": "openai", "model": "gpt-4.1", "deployment": "fine/1", "region": "eu", "app": "checkout-bot", "prompt": "greeting@4",
    "team": "payments", "tenant": "tenant-3", "agent": "planner", "run": "s-17", "key": "checkout",
}  # fmt: skip
STRANGER = {**CALL, "provider": "mistral", "tenant": "tenant-x", "run": "s-x"}
CALLS, ROUNDS = 20_000, 7
NONE_BAR, MANY_BAR = 2.0, 10.0
"""Multiples of the loop: with no directives it must be near to nothing; with a thousand it must not grow with their number."""


def _directives(n: int) -> list[dict[str, Any]]:
    """Limits of tenants, blocked runs, caps of a tenant in an app, and one redirect, as a large estate under trouble has them."""
    shapes: list[tuple[str, Callable[[int], dict[str, str]], dict[str, Any]]] = [
        ("limit", lambda i: {"tenant": f"tenant-{i}"}, {"requests_per_min": 1e12}),
        ("block", lambda i: {"run": f"run-{i}"}, {"reason": "incident"}),
        ("cap", lambda i: {"tenant": f"tenant-{i}", "app": "checkout-bot"}, {"output_tokens": 512}),
    ]
    made = []
    for i in range(n):
        kind, scope, params = shapes[i % 3]
        made.append((kind, scope(i // 3), params))
    if n:
        made[-1] = ("redirect", {"provider": "openai"}, {"to": {"provider": "azure"}, "share": 0.5})
    return [
        {"id": f"DIR-{i}", "kind": k, "scope": s, "params": p, "expires_at": time.time() + 3600.0} for i, (k, s, p) in enumerate(made)
    ]  # fmt: skip


def _client(n: int) -> PointClient:
    listed = _directives(n)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=listed))
    client = PointClient("http://flyball", transport=transport)
    client.poll()
    assert len(client.live()) == n
    return client


def _per_call_s(work: Callable[[], None]) -> float:
    """Least mean of several rounds, in processor time: the machine may be busy with other things."""
    took = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        work()
        took.append((time.process_time() - begin) / CALLS)
    return min(took)


def _apply(client: PointClient, call: dict[str, str]) -> Callable[[], None]:
    def work() -> None:
        apply = client.apply
        for _ in range(CALLS):
            apply(call, "s-17")

    return work


def _loop() -> None:
    known = {name: {"another": 1} for name in CALL}
    for _ in range(CALLS):
        for name, value in CALL.items():
            known[name].get(value)


def run() -> list[dict[str, Any]]:
    base = _per_call_s(_loop)
    rows: list[dict[str, Any]] = []
    for n, call, what, bar in (
        (0, CALL, "no directives", NONE_BAR),
        (10, STRANGER, "10 directives, none of them for the call", MANY_BAR),
        (1000, STRANGER, "1,000 directives, none of them for the call", MANY_BAR),
        (10, CALL, "10 directives, some for the call", None),
        (1000, CALL, "1,000 directives, some for the call", None),
    ):
        took = _per_call_s(_apply(_client(n), call))
        rows.append(
            {
                "name": f"point, {what}", "value": round(took * 1e6, 2), "unit": "µs a call", "baseline": round(base * 1e6, 2),
                "ratio": round(took / base, 2), "bar": bar, "holds": None if bar is None else took / base <= bar,
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    from flyball.app.tables import print_rows

    print_rows(run())
