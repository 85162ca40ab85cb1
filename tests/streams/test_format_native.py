"""Our own NDJSON: all good lines count, each bad one is told by itself, content never passes."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.events import AgentStep, Change, Evaluation, GpuSample, LlmCall
from flyball.core.ports import Format
from flyball.streams.formats.native import NativeNdjson

FORMAT: Format = NativeNdjson()
AT = 1_800_000_000.0


def line(**fields: object) -> bytes:
    return json.dumps({"type": "llm_call", "at": AT, **fields}).encode()


def test_every_kind_of_event_comes_back_as_it_was_sent() -> None:
    events = [
        LlmCall(at=AT, id="r1", provider="openai", input_tokens=3),
        AgentStep(at=AT, run="r", tool="search"),
        GpuSample(at=AT, gpu="0", values={"xid": 79.0}),
        Change(at=AT, kind="deploy"),
        Evaluation(at=AT, name="helpful", score=0.5),
    ]
    decoded = FORMAT.decode(msgspec.json.Encoder().encode_lines(events))
    assert decoded.events == events
    assert decoded.rejected == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{not json", "json"),
        (line(input_tokens=-1), "negative"),
        (line(input_tokens="many"), "type"),
        (line(app="x" * 600), "too_long"),
        (line(input_tokens=10**13), "too_large"),
        (line(at=0.0), "timestamp"),
        (line(at=4_102_444_800.0), "timestamp"),
        (b'{"type":"llm_call"}', "missing_field"),
        (b'{"type":"llm_cal","at":1800000000}', "unknown_type"),
        (b"[1]", "type"),
        (b"\xff\xfe\x00", "json"),
    ],
)
def test_a_bad_line_is_told_and_the_good_ones_around_it_count(bad: bytes, reason: str) -> None:
    decoded = FORMAT.decode(b"\n".join([line(id="first"), bad, line(id="last")]))
    assert [e.id for e in decoded.events if isinstance(e, LlmCall)] == ["first", "last"]
    assert [(r.reason, r.index) for r in decoded.rejected] == [(reason, 1)]
    assert decoded.rejected[0].detail.endswith(".")


def test_an_array_and_an_event_over_several_lines_are_taken_too() -> None:
    array = FORMAT.decode(b"[" + line(id="a") + b"," + line(id="b", at=1.0) + b"]")
    assert (len(array.events), [r.reason for r in array.rejected]) == (1, ["timestamp"])
    spread = FORMAT.decode(json.dumps({"type": "llm_call", "at": AT}, indent=2).encode())
    assert len(spread.events) == 1


def test_an_empty_body_is_no_event_and_no_fault() -> None:
    assert FORMAT.decode(b"") == FORMAT.decode(b"\n \n")
    assert FORMAT.decode(b"").rejected == []


def test_unknown_fields_are_ignored_and_dead_letters_lose_them() -> None:
    good = FORMAT.decode(line(messages="my secret prompt"))
    assert "secret" not in repr(good.events)
    bad = FORMAT.decode(line(messages="my secret prompt", input_tokens=-3))
    assert b"secret" not in bad.rejected[0].data
    assert b"input_tokens" in bad.rejected[0].data


def test_template_syntax_and_shell_stay_plain_text() -> None:
    nasty = "{{ 7*7 }}; rm -rf / $(reboot) ${jndi:ldap://x}"
    (event,) = FORMAT.decode(line(app=nasty)).events
    assert isinstance(event, LlmCall)
    assert event.app == nasty


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"type":"llm_call","at":' + b"9" * 5000 + b"}"]
)
def test_deep_nesting_and_huge_numbers_are_refused_quietly(body: bytes) -> None:
    decoded = FORMAT.decode(body)
    assert decoded.events == []
    assert len(decoded.rejected) == 1


def test_the_schema_names_every_event_and_unit() -> None:
    schema = NativeNdjson().schema()
    assert {d["title"] for d in schema["$defs"].values()} == {
        "LlmCall",
        "AgentStep",
        "GpuSample",
        "Change",
        "Evaluation",
    }
    assert schema["$defs"]["LlmCall"]["properties"]["input_tokens"]


@given(st.binary(max_size=400))
def test_no_bytes_make_it_raise(body: bytes) -> None:
    FORMAT.decode(body)


@given(st.data())
def test_a_mutated_body_loses_no_untouched_line(data: st.DataObject) -> None:
    lines = [line(id=f"call-{i}", provider="openai") for i in range(5)]
    broken = data.draw(st.integers(0, 4))
    at = data.draw(st.integers(0, len(lines[broken]) - 1))
    byte = data.draw(st.integers(32, 126))
    lines[broken] = lines[broken][:at] + bytes([byte]) + lines[broken][at + 1 :]
    ids = {e.id for e in FORMAT.decode(b"\n".join(lines)).events if isinstance(e, LlmCall)}
    assert {f"call-{i}" for i in range(5) if i != broken} <= ids


def test_a_first_line_that_looks_like_an_array_does_not_take_the_others_with_it() -> None:
    decoded = FORMAT.decode(b"[" + line(id="a")[1:] + b"\n" + line(id="b"))
    assert [e.id for e in decoded.events if isinstance(e, LlmCall)] == ["b"]
    assert len(decoded.rejected) == 1
