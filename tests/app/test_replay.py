"""`flyball replay`: the same stages in event time, the same output byte for byte."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from flyball.lab import Simulator, default_estate, write_ndjson
from flyball.lab.faults import ProviderOutage
from flyball.lab.sim import START_AT

OUTAGE_AT = START_AT + 300


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten minutes of lab traffic with an outage of provider b in the middle."""
    path = tmp_path_factory.mktemp("recording") / "outage.ndjson"
    simulator = Simulator(default_estate(rate=20.0), seed=11)
    simulator.add_fault(ProviderOutage("b", 0.7, OUTAGE_AT, OUTAGE_AT + 150))
    write_ndjson(simulator, path, 600)
    return path


def replay(*arguments: str | Path, code: int = 0) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "flyball.app", "replay", *map(str, arguments)],
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr.decode()[-2000:]
    return done.stdout if code == 0 else done.stderr


def objects(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def runbooks_in_auto(folder: Path) -> Path:
    from importlib.resources import files

    text = (files("flyball.runbooks") / "library" / "provider-failover.yaml").read_text()
    assert "\nmode: suggest\n" in text
    path = folder / "runbooks" / "provider-failover.yaml"
    path.parent.mkdir()
    path.write_text(text.replace("\nmode: suggest\n", "\nmode: auto\n"))
    return path.parent


def test_an_outage_is_paged_once_and_redirected_in_auto(recording: Path, tmp_path: Path) -> None:
    found = objects(replay(recording, "--json", "--mode", "auto", "--runbooks", runbooks_in_auto(tmp_path)))
    incidents = [o for o in found if o["type"] == "incident" and o["page"]]
    assert [(i["root"], i["signal"]) for i in incidents] == [
        ({"kind": "provider", "name": "b"}, "llm.errors")
    ]
    assert OUTAGE_AT < incidents[0]["at"] <= OUTAGE_AT + 40
    assert {d["decision"] for d in found if d["type"] == "decision"} >= {"run"}
    granted = [d for d in found if d["type"] == "directive"]
    assert granted[0]["kind"] == "redirect"
    assert granted[0]["scope"] == {"provider": "b"}
    assert granted[0]["expires_at"] > granted[0]["at"]
    summary = found[-1]
    assert summary["type"] == "summary"
    assert summary["pages"] == 1
    assert summary["directives"] == 1
    assert summary["events"]["llm_call"] > 5000
    assert summary["late"] == 0


KINDS = {
    "limit": ("limit: {scope: $incident.root, requests_per_min: 50%, for: 30m}", {"provider": "b"}),
    "cap": ("cap: {scope: $incident.root, output_tokens: 200, for: 30m}", {"provider": "b"}),
    "block": ("block: {scope: {tenant: t2}, for: 30m}", {"tenant": "t2"}),
    "hook": ("hook: {name: nodes, action: drain, targets: $incident.root, for: 30m}", {}),
}
"""What a step is written as, and the scope that comes of it."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_directive_is_printed_in_the_same_shape(
    recording: Path, tmp_path: Path, kind: str
) -> None:
    step, scope = KINDS[kind]
    (tmp_path / "mine.yaml").write_text(
        f"""
runbook: v1
name: mine
owner: us
when: incident.root.kind == "provider" && incident.signal == "llm.errors"
mode: auto
limits: {{blast: {{traffic: 100%, tenants: 1000}}}}
steps:
  - {step}
    verify: {{within: 3m, expect: 'calls_per_min("from") > 1', against: nothing}}
"""
    )
    found = objects(replay(recording, "--json", "--mode", "auto", "--runbooks", tmp_path))
    decided = [o for o in found if o["type"] == "decision" and o["runbook"] == "mine"]
    assert "run" in {d["decision"] for d in decided}, decided
    assert {"at", "incident", "runbook", "decision", "reason"} <= set(decided[0])
    if kind == "hook":
        asked = [o for o in found if o["type"] == "operation"]
        assert (asked[0]["verb"], asked[0]["targets"]) == ("start", ["provider:b"])
        return
    granted = [o for o in found if o["type"] == "directive" and o["change"] == "granted"]
    assert {o["kind"] for o in granted} == {kind}
    assert granted[0]["scope"] == scope
    assert {"at", "id", "kind", "scope", "params", "expires_at", "incident", "runbook"} <= set(granted[0])
    assert found[-1]["directives"] == len(granted)


def test_without_word_nothing_is_done_but_suggested(recording: Path) -> None:
    found = objects(replay(recording, "--json"))
    assert {d["decision"] for d in found if d["type"] == "decision"} <= {"suggest", "refuse", "hold"}
    assert found[-1]["directives"] == 0


def test_twice_the_same_input_gives_the_same_bytes_whatever_the_packing(
    recording: Path, tmp_path: Path
) -> None:
    plain = recording.read_bytes()
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.ndjson.zst").write_bytes(zstandard.compress(plain))
    half = plain.index(b"\n", len(plain) // 2) + 1
    (tmp_path / "second.ndjson").write_bytes(plain[half:])
    (tmp_path / "first.ndjson").write_bytes(plain[:half])
    expected = replay(recording, "--json")
    assert replay(recording, "--json") == expected
    assert replay(tmp_path / "a.ndjson.gz", "--json") == expected
    assert replay(tmp_path / "a.ndjson.zst", "--json") == expected
    assert replay(tmp_path / "second.ndjson", tmp_path / "first.ndjson", "--json") == expected


def test_poison_is_counted_and_the_rest_is_read(recording: Path, tmp_path: Path) -> None:
    lines = recording.read_bytes().splitlines(keepends=True)
    lines[10:10] = [
        b"{not json}\n",
        b'{"type":"llm_call","at":-5}\n',
        b'{"type":"llm_call","at":1790000001,"input_tokens":-3}\n',
    ]
    (tmp_path / "poison.ndjson").write_bytes(b"".join(lines))
    summary = objects(replay(tmp_path / "poison.ndjson", "--json"))[-1]
    assert sum(summary["rejected"].values()) == 3
    assert summary["events"] == objects(replay(recording, "--json"))[-1]["events"]


def test_text_for_people_ends_with_what_would_have_been_paged(recording: Path) -> None:
    text = replay(recording).decode()
    assert "PAGE" in text
    assert "pages" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (gzip.compress(b"x" * 5000, mtime=0)[:-20], "damaged or cut short")],
    ids=["missing", "cut"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.ndjson.gz"
    if content is not None:
        path.write_bytes(content)
    message = replay(path, code=2).decode()
    assert words in message
    assert "x.ndjson.gz" in message
    assert "Traceback" not in message


def test_an_empty_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert objects(replay(tmp_path / "empty", "--json"))[-1]["events"] == {}
