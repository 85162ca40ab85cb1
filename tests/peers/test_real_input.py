"""Real peers send real telemetry: a LiteLLM proxy through its own callback, and an OpenAI SDK under two instrumentations."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from flyball.app.store.sqlite import open_reader
from flyball.app.store.store import read_log
from flyball.app.wiring import database_path
from flyball.core.codec import decode_events
from flyball.core.events import LlmCall
from tests.peers.upstream import FAILURES, Upstream, serving
from tests.processes import eventually, flyball, free_port, running

QUICK = {"FLYBALL_WINDOW_S": "2", "FLYBALL_LATENESS_S": "1", "FLYBALL_MAX_DELAY_S": "4"}
PRIVATE = "PRIVATE-WORDS"
EXPECTED_CLASS = {
    "rate-limited": "rate_limited", "overloaded-529": "overloaded", "overloaded-503": "overloaded",
    "quota": "quota_exhausted", "too-long": "context_too_long", "bad-key": "auth",
}  # fmt: skip


def stored_calls(folder: Path) -> list[LlmCall]:
    engine = open_reader(database_path(folder / "data"))
    calls: list[LlmCall] = []
    with engine.connect() as c:
        for row in read_log(c, 0, limit=100_000):
            if row.kind == "events":
                assert PRIVATE.encode() not in row.body
                calls += [e for e in decode_events(row.body) if isinstance(e, LlmCall)]
    engine.dispose()
    return calls


def status(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/v1/status").json()
    return found


def incidents(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{url}/v1/incidents").json()
    return found


@pytest.fixture
def litellm_config(tmp_path: Path) -> Any:
    def write(upstream: str) -> Path:
        models = ["ok", *FAILURES]
        lines = ["model_list:"]
        for name in models:
            lines += [
                f"  - model_name: {name}",
                f"    litellm_params: {{model: openai/gpt-{name}, api_base: '{upstream}/v1', api_key: none, max_retries: 0}}",
            ]
        lines += [
            "  - model_name: mocked",
            "    litellm_params: {model: openai/gpt-mocked, mock_response: 'hello'}",
            "router_settings: {num_retries: 0, disable_cooldowns: true}",
            "litellm_settings: {callbacks: ['generic_api'], num_retries: 0}",
        ]
        path = tmp_path / "litellm.yaml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.mark.server("litellm")
@pytest.mark.timeout(240)
def test_a_litellm_proxy_sends_its_callbacks_and_a_burst_of_failures_is_one_incident(
    tmp_path: Path, peers_python: str, litellm_config: Any
) -> None:
    upstream = Upstream()
    port = free_port()
    with serving(upstream.app) as upstream_url, flyball(tmp_path, env=QUICK) as url:
        proxy_url = f"http://127.0.0.1:{port}"
        command = [
            str(Path(peers_python).parent / "litellm"), "--config", str(litellm_config(upstream_url)), "--port", str(port),
            "--host", "127.0.0.1",
        ]  # fmt: skip
        env = {
            "GENERIC_LOGGER_ENDPOINT": f"{url}/ingest/litellm", "DEFAULT_FLUSH_INTERVAL_SECONDS": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "NO_PROXY": "127.0.0.1", "LITELLM_TELEMETRY": "False",
        }  # fmt: skip
        with running(command, f"{proxy_url}/health/liveliness", tmp_path / "litellm.log", env, cwd=tmp_path):
            sent: Counter[str] = Counter()

            def call(model: str, user: str) -> None:
                body = {
                    "model": model, "user": user, "messages": [{"role": "user", "content": PRIVATE}],
                    "metadata": {"app": "checkout-bot", "tags": ["prompt:greeting@3"]},
                }  # fmt: skip
                httpx.post(f"{proxy_url}/v1/chat/completions", json=body, timeout=30)
                sent[model] += 1

            for i in range(40):
                call("ok" if i % 2 else "mocked", f"tenant-{i % 4}")
            for name in FAILURES:
                call(name, "tenant-1")
            for i in range(40):
                call("overloaded-529", f"tenant-{i % 4}")
            total = sum(sent.values())
            eventually(lambda: status(url)["events"].get("llm_call", 0) >= total, 10)
            found = eventually(lambda: incidents(url), 30)
    calls = stored_calls(tmp_path)
    # The model is the deployment's own (`gpt-ok`), not the alias that the proxy was asked for.
    arrived = Counter(c.model.removeprefix("gpt-") for c in calls)
    # LiteLLM's exporter forgets what it logs while a POST of its own is under way, however quickly that is answered.
    assert arrived <= sent
    assert arrived.total() >= 0.9 * sent.total()
    assert set(arrived) == set(sent)
    by_model = {call.model.removeprefix("gpt-"): call for call in calls}
    for name, expected in EXPECTED_CLASS.items():
        assert by_model[name].error == expected, name
    good = by_model["ok"]
    assert (good.input_tokens, good.output_tokens, good.cache_read_tokens, good.error) == (120, 34, 64, "")
    assert good.app == "checkout-bot"
    assert good.tenant.startswith("tenant-")
    assert isinstance(found, list)
    assert [(i["class"], i["signal"]) for i in found if i["page"]] == [("overloaded", "llm.errors")]
    assert found[0]["root"]["kind"] in ("provider", "model", "deployment")


@pytest.mark.server("litellm")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["openai-v2", "openinference"])
def test_an_instrumented_openai_sdk_exports_spans_that_become_calls(
    tmp_path: Path, peers_python: str, kind: str
) -> None:
    good_calls, failures = 100, 60
    with serving(Upstream().app) as upstream, flyball(tmp_path, env=QUICK) as url:
        client = Path(__file__).with_name("sdk_client.py")
        subprocess.run(
            [peers_python, str(client), kind, upstream, url, str(good_calls), str(failures)],
            check=True,
            timeout=120,
        )
        eventually(lambda: status(url)["events"].get("llm_call", 0) >= good_calls + failures + 2, 30)
        found = eventually(lambda: incidents(url), 30)
    calls = stored_calls(tmp_path)
    assert Counter(c.error for c in calls) == {
        "": good_calls,
        "overloaded": failures,
        "quota_exhausted": 1,
        "context_too_long": 1,
    }
    good = next(c for c in calls if not c.error)
    assert (good.input_tokens, good.output_tokens) == (120, 34)
    assert good.app == f"shop-{kind}"
    assert isinstance(found, list)
    assert [i["class"] for i in found] == ["overloaded"]
