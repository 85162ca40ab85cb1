"""What is bad in records, how much of it is too much, and what becomes of that; without a broker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.app.kafka_windows import Decoder
from flyball.app.scrub import scrub
from flyball.app.settings import Settings
from flyball.core.errors import ConfigError
from flyball.core.events import LlmCall
from flyball.core.ports import Decoded, Rejected
from flyball.streams.formats.native import NativeNdjson
from flyball.streams.front import Front
from flyball.streams.kafka.breaker import Breaker, PoisonSettings
from flyball.streams.kafka.client import Place
from flyball.streams.kafka.intake import Intake, Kept, Read, slices
from flyball.streams.kafka.owned import Owned
from flyball.streams.kafka.watch import End
from tests.kafka._windows import NOW, calls, line

PLACE = Place("flyball.llm-calls", 3)
STRICT = PoisonSettings(ratio=0.5, least=4, window_s=10.0)
BAD = Rejected("json", "not JSON", b"{")


@dataclass
class Record:
    offset: int
    value: bytes | None
    timestamp: int = int(NOW * 1000)
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()


def records(*values: bytes | None, **more: object) -> list[Record]:
    return [Record(i, v, **more) for i, v in enumerate(values)]  # type: ignore[arg-type]


DECODER = Decoder(Settings.model_construct(), {"native": NativeNdjson(), "otlp": NativeNdjson()})


@dataclass
class Counting:
    """The decoder of the settings, and how often it was asked."""

    asked: int = 0

    def __call__(self, topic: str, value: bytes, headers: Mapping[str, bytes]) -> Decoded:
        self.asked += 1
        return DECODER(topic, value, headers)


def read(
    some: Sequence[Record], decode: Counting | None = None, settings: PoisonSettings | None = None
) -> Read:
    decode = decode or Counting()
    intake = Intake("flyball.", decode, DECODER.lines)
    return intake.read(PLACE, some, Breaker(settings or PoisonSettings()))


# --- how much is too much --------------------------------------------------------------------------------------------


def test_a_few_bad_lines_conclude_nothing() -> None:
    breaker = Breaker(STRICT)
    breaker.take(NOW, 0, [BAD] * 3)
    assert not breaker.too_bad
    breaker.take(NOW, 0, [BAD])
    assert breaker.too_bad


def test_half_is_bearable_and_more_is_not() -> None:
    breaker = Breaker(STRICT)
    breaker.take(NOW, 10, [BAD] * 10)
    assert not breaker.too_bad
    breaker.take(NOW + 1, 0, [BAD])
    assert breaker.too_bad


def test_what_came_long_ago_does_not_excuse_what_comes_now() -> None:
    breaker = Breaker(STRICT)
    breaker.take(NOW, 1000, [])
    breaker.take(NOW + 5.0, 0, [BAD] * 4)
    assert not breaker.too_bad
    breaker.take(NOW + 10.5, 0, [BAD])
    assert breaker.too_bad
    assert breaker.halt(17, NOW).share == 1.0


def test_the_reason_is_the_most_frequent_one() -> None:
    breaker = Breaker(STRICT)
    breaker.take(NOW, 1, [BAD, BAD, Rejected("timestamp", "", b"")])
    halt = breaker.halt(17, NOW + 1.0)
    assert (halt.offset, halt.at, halt.reason, halt.bad, halt.of, halt.limit) == (17, NOW + 1.0, "json", 3, 4, 0.5)  # fmt: skip


def test_it_is_sure_again_once_enough_has_come_and_was_good() -> None:
    breaker = Breaker(STRICT)
    breaker.take(NOW, 0, [BAD] * 10)
    breaker.forget()
    assert not breaker.sure
    breaker.take(NOW, 3, [BAD])
    assert breaker.sure


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 5), st.integers(0, 5)), max_size=40))
def test_the_share_is_that_of_the_newest_seconds_in_whatever_order_things_come(
    takes: list[tuple[float, int, int]],
) -> None:
    """What comes within a second of the last one, or before it, stays as long as that does."""
    breaker = Breaker(STRICT)
    told: list[tuple[float, int, int]] = []
    for at, good, bad in takes:
        breaker.take(at, good, [BAD] * bad)
        second = told[-1][0] if told and at - told[-1][0] < 1.0 else at
        told.append((second, good, bad))
        if second == at:
            while at - told[0][0] > 10.0:
                told.pop(0)
        n, k = sum(g + b for _, g, b in told), sum(b for _, _, b in told)
        assert breaker.too_bad == (n >= 4 and k > 0.5 * n)


@pytest.mark.parametrize("wrong", [{"ratio": 1.5}, {"least": 0}, {"window_s": 0.0}, {"retry_s": -1.0}])
def test_settings_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"poison_{next(iter(wrong))}"):
        PoisonSettings(**wrong)  # type: ignore[arg-type]


# --- what is in records ----------------------------------------------------------------------------------------------


def test_records_of_a_line_each_are_read_together_and_keep_their_places() -> None:
    decode, those = Counting(), calls(0, 50)
    found = read(records(*map(line, those)), decode)
    assert decode.asked == 1
    assert found.senders[""].events == those
    assert found.senders[""].offset_array().tolist() == list(range(50))
    assert (found.taken, found.last, found.letters) == (50, 49, [])


@pytest.mark.parametrize("odd", [b"", None, b"{", b"a\nb", b"\n", b"[]"])
def test_one_odd_record_among_them_changes_nothing_for_the_others(odd: bytes | None) -> None:
    those = calls(0, 6)
    values = [*map(line, those[:3]), odd, *map(line, those[3:])]
    found = read(records(*values))
    assert found.senders[""].events == those
    assert found.senders[""].offset_array().tolist() == [0, 1, 2, 4, 5, 6]
    assert {x.offset for x in found.letters} <= {3}
    assert (found.taken, found.last) == (7, 6)


def test_two_lines_in_one_record_and_none_in_the_next_are_not_mistaken_for_one_each() -> None:
    a, b = calls(0, 2)
    found = read(records(line(a) + b"\n" + line(b), b""))
    assert found.senders[""].offset_array().tolist() == [0, 0]


values = st.sampled_from([line(c) for c in calls(0, 5)] + [b"", b"{", b"\n", b"\xff"])
some_headers = st.sampled_from(
    [(), (("sender", b"gw"),), (("sender", b"sdk"), ("traceparent", b"1")), (("sender", b"gw"), ("received_at", b"1800000001"))]
)  # fmt: skip
mixed = st.builds(
    lambda lines, headers, end: (b"\n".join(lines) + end, headers),
    st.lists(values, max_size=4), some_headers, st.sampled_from([b"", b"\n"]),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(mixed, min_size=1, max_size=12))
def test_read_together_or_one_by_one_makes_no_difference(
    some: list[tuple[bytes, Sequence[tuple[str, bytes]]]],
) -> None:
    all_records = [Record(i, value, headers=headers) for i, (value, headers) in enumerate(some)]
    together, apart = read(all_records), Read()
    for one in all_records:
        found = read([one])
        for sender, part in found.senders.items():
            apart.part({"sender": sender.encode()}).take(
                part.events, part.offsets, part.counts, part.received_at
            )
        apart.letters += found.letters
    assert together.senders.keys() == apart.senders.keys()
    for sender, part in apart.senders.items():
        assert together.senders[sender].events == part.events
        assert together.senders[sender].offset_array().tolist() == part.offset_array().tolist()
        assert together.senders[sender].received_at == part.received_at
    assert together.letters == apart.letters
    assert (together.taken, together.last) == (len(some), len(some) - 1)


def test_many_lines_of_several_senders_are_read_in_as_many_goes_as_there_are_senders() -> None:
    decode, those = Counting(), calls(0, 40)
    some = [
        Record(i, b"\n".join(map(line, those[2 * i : 2 * i + 2])) + b"\n", headers=(("sender", b"ab"[i % 2 : i % 2 + 1]), ("n", b"%d" % i)))
        for i in range(20)
    ]  # fmt: skip
    found = read(some, decode)
    assert decode.asked == 2
    assert found.senders["a"].offset_array().tolist() == [i for i in range(0, 20, 2) for _ in "ab"]
    assert found.senders["b"].events == [c for i in range(1, 20, 2) for c in those[2 * i : 2 * i + 2]]


def test_other_formats_are_never_read_together() -> None:
    """Two protobuf messages with a line break between them can be one message."""
    decode = Counting()
    read(records(*[b"x"] * 3, headers=(("content-type", b"application/x-protobuf"),)), decode)
    assert not DECODER.lines("llm-calls", {"content-type": b"application/x-protobuf"})
    assert decode.asked == 3


def test_senders_are_told_apart_and_the_arrival_is_the_header_or_the_records_own_time() -> None:
    one, other = calls(0, 2)
    some = [
        Record(0, line(one), headers=(("sender", b"gw"), ("received_at", b"1800000007.5"))),
        Record(1, line(other), headers=(("sender", b"sdk"), ("received_at", b"soon"))),
    ]
    found = read(some)
    assert {s: (p.events, p.offsets, p.received_at) for s, p in found.senders.items()} == {
        "gw": ([one], [0], 1_800_000_007.5), "sdk": ([other], [1], NOW),
    }  # fmt: skip


def test_nothing_from_the_record_on_that_is_too_much_is_taken() -> None:
    good = calls(0, 2)
    some = records(*map(line, good), b"{", b"\n".join([b"{", line(good[0]), b"{", b"{"]), line(good[0]))
    found = read(some, settings=STRICT)
    assert found.halt is not None
    assert (found.halt.offset, found.halt.bad, found.halt.of) == (3, 4, 7)
    assert (found.taken, found.last) == (3, 2)
    assert [x.offset for x in found.letters] == [2]
    assert found.senders[""].events == good


def test_a_format_that_raises_makes_a_dead_letter_of_the_record() -> None:
    def broken(topic: str, value: bytes, headers: Mapping[str, bytes]) -> Decoded:
        raise ZeroDivisionError("private content")

    found = Intake("flyball.", broken, lambda _t, _h: False).read(
        PLACE, records(b"x"), Breaker(PoisonSettings())
    )
    (letter,) = found.letters
    assert (letter.reason, letter.body, letter.index) == ("decoder_raised", b"x", -1)
    assert "ZeroDivisionError" in letter.detail
    assert "private" not in letter.detail


def test_bytes_that_no_record_can_hold_are_left_out_of_the_letter() -> None:
    found = read(records(b"{" + b"x" * (8 << 20)))
    (letter,) = found.letters
    assert (letter.body, letter.size) == (None, (8 << 20) + 1)
    assert "see the topic" in letter.detail


@pytest.mark.parametrize("kept", [scrub, lambda _body: None], ids=["scrubbed", "nothing"])
def test_a_letter_keeps_no_content(kept: Kept) -> None:
    def refuses(topic: str, value: bytes, headers: Mapping[str, bytes]) -> Decoded:
        return Decoded([], [Rejected("type", "startTime is no time", value)])

    body = b'{"startTime": "x", "messages": [{"content": "private"}]}'
    found = Intake("flyball.", refuses, lambda _t, _h: False, kept).read(
        PLACE, records(body), Breaker(PoisonSettings())
    )
    (letter,) = found.letters
    assert letter.size == len(body)
    assert (letter.body is None) == (kept is not scrub)
    assert b"private" not in (letter.body or b"")


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 3.0), max_size=30))
def test_slices_keep_all_records_in_order_and_span_half_a_second(times: list[float]) -> None:
    some = [Record(i, b"", timestamp=int((NOW + t) * 1000)) for i, t in enumerate(times)]
    found = list(slices(some))
    assert [r for part in found for r in part] == some
    assert all(abs(r.timestamp - part[0].timestamp) <= 500 for part in found for r in part)


def test_settings_and_headers_say_the_format() -> None:
    class Odd(NativeNdjson):
        def decode(self, body: bytes, content_type: str = "") -> Decoded:
            return Decoded([LlmCall(at=NOW, id=f"{len(body)} {content_type}")])

    settings = Settings.model_construct()
    settings.kafka.formats["changes"] = "odd"
    decoder = Decoder(settings, {"native": NativeNdjson(), "odd": Odd(), "otlp": Odd()})
    assert decoder("changes", b"abc", {}).events == [LlmCall(at=NOW, id="3 ")]
    assert decoder("llm-calls", line(calls(0, 1)[0]), {}).events == calls(0, 1)
    assert decoder("llm-calls", b"ab", {"flyball-format": b"odd"}).events == [LlmCall(at=NOW, id="2 ")]
    ndjson = {"content-type": b"application/x-ndjson"}
    assert decoder("changes", line(calls(0, 1)[0]), ndjson).events == calls(0, 1), "the header wins"
    assert decoder("changes", b"", {"content-type": b"application/x-protobuf"}).events[0].at == NOW
    assert decoder.lines("changes", ndjson)
    assert not decoder.lines("changes", {})


def test_that_little_came_counts_for_a_partition_only_once_a_broker_says_that_nothing_more_waits() -> None:
    owned = Owned(PLACE, Front(str(PLACE)), Breaker(STRICT), heard_at=100.0, resumed_at=100.0)
    owned.pass_time(End(100.2, owned.following), 0.5)
    assert owned.at_its_end_s == 0.0, "asked too soon"
    owned.pass_time(End(101.0, owned.following), 0.5)
    assert owned.at_its_end_s == 1.0
    owned.pass_time(End(150.0, owned.following), 0.5)
    assert (owned.at_its_end_s, owned.quiet_s) == (50.0, 2.0), "silence of the broker is not the partition's"
    owned.pass_time(End(151.0, owned.following + 3), 0.5)
    assert (owned.at_its_end_s, owned.quiet_s) == (0.0, 0.0)
