"""What docs/enforcement.md shows works as it stands there, and so does the example gateway."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from flyball.core.directives import Directive
from flyball.remediation.points import chosen
from flyball.remediation.points._litellm_calls import RULES
from flyball.remediation.points.matching import LIMITS
from tests.peers.upstream import Governor, Upstream, serving
from tests.processes import eventually, free_port, running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/enforcement.md").read_text()


def directive(id: str, kind: Any, scope: dict[str, str], /, **params: Any) -> Directive:
    now = time.time()
    return Directive(
        id=id, kind=kind, scope=scope, params=params, granted_at=now, expires_at=now + 300.0, incident="INC-1", runbook="r",
        step="s",
    )  # fmt: skip


@pytest.mark.timeout(60)
def test_the_ten_lines_for_a_gateway_of_ones_own_obey() -> None:
    found = re.search(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    assert found
    governor = Governor()
    governor.hold(
        directive("DIR-1", "block", {"tenant": "t1"}, reason="incident INC-1"),
        directive("DIR-2", "cap", {"tenant": "t2"}, output_tokens=64, model="small"),
    )
    with serving(governor.app) as url:
        scope: dict[str, Any] = {}
        exec(compile(found[1].replace("http://127.0.0.1:4390", url), "enforcement.md", "exec"), scope)
        try:
            assert eventually(lambda: governor.is_held("DIR-1", "DIR-2"), 20)
            sent: list[Any] = []

            def send(*to: Any) -> dict[str, float]:
                sent.append(to)
                return {"tokens": 10, "usd": 0.1}

            answers = [scope["handle"]({"model": "big", "user": user}, send) for user in ("t1", "t2", "t3")]
        finally:
            scope["point"].close()
            governor.hold()
    assert answers[0] == (403, "stopped by directive DIR-1: incident INC-1")
    assert [status for status, _ in answers[1:]] == [200, 200]
    assert sent == [("openai", "small", 64), ("openai", "big", None)]


@pytest.mark.timeout(60)
def test_the_example_gateway_obeys(tmp_path: Path) -> None:
    governor, upstream = Governor(), Upstream()
    governor.hold(
        directive("DIR-1", "block", {"run": "s-1"}),
        directive("DIR-2", "cap", {"tenant": "t2"}, output_tokens=64, model="gpt-small"),
        directive("DIR-3", "cap", {"tenant": "t3"}, model="gpt-unknown"),
        directive("DIR-4", "limit", {"tenant": "t4"}, tokens_per_min=60.0),
    )
    port = free_port()
    with serving(governor.app) as url, serving(upstream.app) as upstream_url:
        env = {"UPSTREAM": upstream_url, "FLYBALL_URL": url, "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, str(ROOT / "examples/enforcement-point/gateway.py"), str(port)]
        with running(command, f"{url}/v1/directives", tmp_path / "gateway.log", env):

            def call(tenant: str, session: str = "") -> httpx.Response:
                return httpx.post(
                    f"http://127.0.0.1:{port}/v1/chat/completions",
                    json={"model": "gpt-large", "max_tokens": 4000},
                    headers={"x-tenant": tenant, **({"x-session": session} if session else {})},
                    timeout=20,
                )

            assert eventually(lambda: governor.is_held("DIR-1", "DIR-2", "DIR-3", "DIR-4"), 20)
            assert call("t1").status_code == 200
            assert call("t1", "s-1").status_code == 403
            assert call("t2").status_code == 200
            assert call("t3").status_code == 200
            assert [call("t4").status_code for _ in range(2)] == [200, 429], "154 tokens are owed"
    assert [a[1:] for a in upstream.asked] == [
        ("gpt-large", 4000),
        ("gpt-small", 64),
        ("gpt-large", 4000),
        ("gpt-large", 4000),
    ]


def test_the_rule_for_shares_is_told_as_it_is() -> None:
    for i in range(200):
        raw = hashlib.blake2b(b"DIR-1\x00" + f"s-{i}".encode(), digest_size=8).digest()
        assert chosen("DIR-1", 0.3, f"s-{i}") == (int.from_bytes(raw, "big") < 0.3 * 2**64)
    assert "first eight bytes of BLAKE2b (digest size 8)" in PAGE


def test_every_variable_of_the_guard_is_told() -> None:
    source = (ROOT / "remediation/flyball/remediation/points/litellm.py").read_text()
    named = set(re.findall(r"FLYBALL_[A-Z_]+", source))
    assert named == set(re.findall(r"^\| `(FLYBALL_[A-Z_]+)`", PAGE, re.M))


def test_the_kinds_of_directives_and_the_labels_are_told() -> None:
    assert set(re.findall(r"^\| `([a-z]+)` \|", PAGE, re.M)) == {"redirect", "cap", "limit", "block"}
    assert set(RULES) >= {"tenant", "app", "run"}
    assert all(f"`{name}`" in PAGE for name in (*LIMITS, "output_tokens", "model", "to", "share", "reason"))
