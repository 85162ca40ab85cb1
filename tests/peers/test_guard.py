"""A real LiteLLM proxy obeys directives: with the guard in its config, against a server of directives over real HTTP."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from flyball.core.directives import Directive
from tests.peers.upstream import Governor, Upstream, serving
from tests.processes import eventually, free_port, running

ROOT = Path(__file__).parents[2]
OPENAI, OTHER = "openai", "hosted_vllm"
"""Two providers that speak the same language, so that one upstream can be both."""


MESSAGES = [{"role": "user", "content": "hi"}]


def directive(
    id: str, kind: Any, scope: dict[str, str], /, lasts_s: float = 300.0, **params: Any
) -> Directive:
    now = time.time()
    return Directive(
        id=id, kind=kind, scope=scope, params=params, granted_at=now, expires_at=now + lasts_s,
        incident="INC-1", runbook="r", step="s",
    )  # fmt: skip


GROUPS = (
    ("fine", OPENAI, "gpt-fine"),
    ("fine-elsewhere", OTHER, "gpt-fine"),
    ("small", OPENAI, "gpt-small"),
    ("mixed", OPENAI, "gpt-mixed"),
    ("mixed", OTHER, "gpt-mixed"),
)
"""Model group, provider, model: one model at both, one at the first only, and a group with deployments at both."""
PLACE = {OPENAI: "first", OTHER: "second"}


def config(folder: Path, upstream: str, groups: Iterable[tuple[str, str, str]]) -> Path:
    lines = ["model_list:"]
    for group, provider, model in groups:
        params = f"model: {provider}/{model}, api_base: '{upstream}/{PLACE[provider]}', api_key: none, max_retries: 0"
        lines.append(f"  - {{model_name: {group}, litellm_params: {{{params}}}}}")
    lines += [
        "router_settings: {num_retries: 0, disable_cooldowns: true}",
        "litellm_settings:",
        '  callbacks: ["generic_api", "flyball.remediation.points.litellm.guard"]',
        "  num_retries: 0",
    ]
    path = folder / "litellm.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class Proxy:
    url: str
    upstream: Upstream

    def call(
        self, model: str = "fine", tenant: str = "t1", session: str = "", **more: Any
    ) -> tuple[httpx.Response, Any]:
        """One call; returns the answer, and how it arrived upstream (None when it did not)."""
        metadata = {"app": "shop", **({"session_id": session} if session else {})}
        body = {
            "model": model, "user": tenant, "messages": MESSAGES, "metadata": metadata, **more,
        }  # fmt: skip
        before = len(self.upstream.asked)
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)
        arrived = self.upstream.asked[before:]
        return answer, arrived[0] if arrived else None


@contextlib.contextmanager
def proxy(
    folder: Path,
    python: str,
    upstream: Upstream,
    flyball: str,
    groups: Iterable[tuple[str, str, str]] = GROUPS,
) -> Iterator[Proxy]:
    port = free_port()
    with serving(upstream.app) as upstream_url:
        path = config(folder, upstream_url, groups)
        command = [str(Path(python).parent / "litellm"), "--config", str(path), "--port", str(port), "--host", "127.0.0.1"]  # fmt: skip
        env = {
            "FLYBALL_URL": flyball, "PYTHONPATH": str(ROOT / "remediation"),
            "GENERIC_LOGGER_ENDPOINT": f"{flyball}/ingest/litellm", "DEFAULT_FLUSH_INTERVAL_SECONDS": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "NO_PROXY": "127.0.0.1", "LITELLM_TELEMETRY": "False",
        }  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        # Its imports alone take 20 s of processor time.
        log = folder / "litellm.log"
        with running(command, f"{url}/health/liveliness", log, env, cwd=folder, deadline_s=240.0):
            yield Proxy(url, upstream)


@pytest.mark.server("litellm")
@pytest.mark.timeout(600)
def test_a_litellm_proxy_redirects_caps_limits_and_blocks_as_directives_want_it(
    tmp_path: Path, peers_python: str
) -> None:
    governor, upstream = Governor(), Upstream()
    with (
        serving(governor.app) as url,
        proxy(tmp_path, peers_python, upstream, url) as gateway,
    ):

        def hold(*held: Directive) -> None:
            governor.hold(*held)
            assert eventually(lambda: governor.is_held(*(d.id for d in held))), governor.reports[-1:]

        answer, arrived = gateway.call()
        assert (answer.status_code, arrived.place) == (200, "first")

        # A redirect moves calls to the group that serves the same model at the other provider; out of a group that spans
        # both it leaves only the other's deployments.
        hold(directive("DIR-redirect", "redirect", {"provider": OPENAI}, to={"provider": OTHER}, share=1.0))
        answer, arrived = gateway.call()
        assert (answer.status_code, arrived.place, arrived.model) == (200, "second", "gpt-fine")
        assert {gateway.call("mixed")[1].place for _ in range(8)} == {"second"}
        answer, arrived = gateway.call("small")
        assert (answer.status_code, arrived.place) == (200, "first"), "nobody else serves this model"
        assert eventually(lambda: governor.counted("DIR-redirect") == 9)

        # A cap reaches upstream, and changes the model.
        hold(
            directive("DIR-cap", "cap", {"tenant": "t1"}, output_tokens=64),
            directive("DIR-small", "cap", {"tenant": "t2"}, model="gpt-small"),
        )
        assert gateway.call(max_tokens=4000)[1].max_tokens == 64
        assert gateway.call(max_tokens=10)[1].max_tokens == 10
        assert gateway.call()[1].max_tokens == 64
        assert gateway.call(tenant="t2", max_tokens=4000)[1] == ("first", "gpt-small", 4000)
        assert gateway.call(tenant="t3", max_tokens=4000)[1] == ("first", "gpt-fine", 4000)

        # A block stops one session and no other.
        hold(directive("DIR-block", "block", {"run": "s-1"}, reason="incident INC-1"))
        answer, arrived = gateway.call(session="s-1")
        assert (answer.status_code, arrived) == (403, None)
        assert answer.json()["error"]["message"] == "stopped by directive DIR-block: incident INC-1"
        assert gateway.call(session="s-2")[0].status_code == 200
        assert gateway.call()[0].status_code == 200

        # A limit of requests stops one tenant and no other; a limit of tokens is charged after the call (154 each).
        hold(
            directive("DIR-limit", "limit", {"tenant": "t1"}, requests_per_min=1.0),
            directive("DIR-tokens", "limit", {"tenant": "t2"}, tokens_per_min=1.0),
        )
        codes = Counter(gateway.call(tenant="t1")[0].status_code for _ in range(5))
        assert codes == {200: 1, 429: 4}
        answer, _ = gateway.call(tenant="t1")
        assert answer.json()["error"]["message"].startswith(
            "stopped by directive DIR-limit: tenant=t1 is over"
        )
        assert gateway.call(tenant="t2")[0].status_code == 200
        assert eventually(lambda: gateway.call(tenant="t2")[0].status_code == 429)
        assert all(gateway.call(tenant="t3")[0].status_code == 200 for _ in range(5))
        assert eventually(lambda: governor.counted("DIR-limit") == 5)

        # Flyball reads what was refused as the gateway's own doing. LiteLLM's exporter forgets some records.
        refused = (
            governor.counted("DIR-block") + governor.counted("DIR-limit") + governor.counted("DIR-tokens")
        )
        eventually(lambda: len(governor.calls) >= len(upstream.asked) + refused, 10)
        by_error = {e: [c for c in governor.calls if c.error == e] for e in {c.error for c in governor.calls}}
        assert set(by_error) == {"", "gateway_local"}
        assert len(by_error["gateway_local"]) >= 0.7 * refused
        assert {c.tenant for c in by_error["gateway_local"]} == {"t1", "t2"}
        assert {c.provider for c in by_error[""]} == {OPENAI, OTHER}

        # Other kinds of calls name their tenant and their length in other ways.
        hold(
            directive("DIR-block", "block", {"tenant": "t1"}),
            directive("DIR-app", "block", {"app": "shop"}),
            directive("DIR-cap", "cap", {"tenant": "t2"}, output_tokens=64),
        )
        for route, body, who, length in (
            ("messages", {"messages": MESSAGES}, lambda t: {"metadata": {"user_id": t}}, "max_tokens"),
            ("responses", {"input": "hi"}, lambda t: {"user": t}, "max_output_tokens"),
            ("completions", {"prompt": "hi"}, lambda t: {"user": t}, "max_tokens"),
        ):

            def post(
                more: dict[str, Any], route: str = route, body: dict[str, Any] = body, length: str = length
            ) -> int:
                asked = {"model": "fine", length: 4000, **body, **more}
                return httpx.post(f"{gateway.url}/v1/{route}", json=asked, timeout=30).status_code

            before = len(upstream.asked)
            assert [post(who("t1")), post({"metadata": {"app": "shop"}})] == [403, 403], route
            assert len(upstream.asked) == before
            assert post(who("t2")) != 403
            assert upstream.asked[-1].max_tokens == 64, route


@pytest.mark.server("litellm")
@pytest.mark.timeout(600)
def test_a_litellm_proxy_lets_go_by_itself_when_the_server_is_gone_and_runs_without_one(
    tmp_path: Path, peers_python: str
) -> None:
    governor, upstream = Governor(), Upstream()
    nobody = f"http://127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as server:
        url = server.enter_context(serving(governor.app))
        with proxy(tmp_path, peers_python, upstream, url) as gateway:
            governor.hold(directive("DIR-block", "block", {"tenant": "t1"}, lasts_s=20.0))
            assert eventually(lambda: governor.is_held("DIR-block"))
            server.close()
            assert gateway.call(tenant="t1")[0].status_code == 403
            assert gateway.call(tenant="t2")[0].status_code == 200
            assert eventually(lambda: gateway.call(tenant="t1")[0].status_code == 200, 60)
    with proxy(tmp_path, peers_python, upstream, nobody) as gateway:
        assert gateway.call()[0].status_code == 200
