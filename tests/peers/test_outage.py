"""The whole way with nothing simulated but the providers: calls through a real LiteLLM proxy, a real `flyball run` that hears of them
and acts, the proxy that obeys, and the way back."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.peers.test_guard import OPENAI, OTHER, PLACE, Proxy, proxy
from tests.peers.test_real_input import QUICK
from tests.peers.upstream import Upstream
from tests.processes import eventually, flyball

GROUPS = (
    ("fine", OPENAI, "gpt-fine"),
    ("good", OPENAI, "gpt-good"),
    ("fine-elsewhere", OTHER, "gpt-fine"),
    ("good-elsewhere", OTHER, "gpt-good"),
)


class Traffic:
    """Four tenants that call both models at both providers, a little of everything all the time."""

    def __init__(self, gateway: Proxy) -> None:
        self._gateway = gateway
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(f"t{i}",)) for i in range(4)]

    def _call(self, tenant: str) -> None:
        for group in itertools.cycle(("fine", "good", "fine", "fine-elsewhere", "good", "good-elsewhere")):
            if self._stop.wait(0.1):
                return
            self._gateway.call(group, tenant)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.server("litellm")
@pytest.mark.timeout(900)
def test_an_outage_of_a_provider_is_left_through_a_real_proxy_and_returned_from(
    tmp_path: Path, peers_python: str
) -> None:
    runbooks = tmp_path / "runbooks"
    runbooks.mkdir()
    shipped = (files("flyball.runbooks") / "library" / "provider-failover.yaml").read_text()
    (runbooks / "failover.yaml").write_text(shipped.replace("mode: suggest", "mode: auto"))
    env = {**QUICK, "FLYBALL_RUNBOOKS": str(runbooks), "FLYBALL_MODE": "auto"}
    upstream = Upstream()
    with (
        flyball(tmp_path, env=env) as url,
        proxy(tmp_path, peers_python, upstream, url, GROUPS) as gateway,
        Traffic(gateway),
    ):

        def ask(path: str) -> Any:
            return httpx.get(f"{url}{path}", timeout=20).json()

        def moved() -> float:
            """Share of the newest calls that the healthy provider got."""
            newest = Counter(a.place for a in upstream.asked[-60:])
            return newest[PLACE[OTHER]] / max(1, newest.total())

        assert eventually(lambda: len(upstream.asked) >= 300, 120)
        assert moved() < 0.5, "a third of it goes there anyway"
        upstream.broken = {PLACE[OPENAI]}
        directives = eventually(lambda: ask("/v1/directives"), 90)
        assert isinstance(directives, list)
        assert directives, [ask("/v1/incidents"), ask("/v1/status")]
        assert [(d["kind"], d["scope"], d["params"]["to"]) for d in directives] == [
            ("redirect", {"provider": OPENAI}, {"provider": OTHER})
        ]
        assert eventually(lambda: moved() > 0.9, 90), "the whole of it, step by step"
        incident = directives[0]["incident"]

        def outcomes() -> list[str]:
            ledger = ask(f"/v1/incidents/{incident}")["ledger"]
            return [e["body"]["result"] for e in ledger if e["kind"] == "outcome"]

        assert eventually(lambda: "verified" in outcomes(), 60), outcomes()
        upstream.broken = set()
        assert eventually(lambda: not ask("/v1/directives"), 180), outcomes()
        assert eventually(lambda: moved() < 0.5, 30), "and back"
        said = outcomes()
    assert "released" in said
    assert not {"failed", "unverified", "undone", "ambiguous"} & set(said)
