"""Bodies: limits hold before and after decompression."""

from __future__ import annotations

import gzip
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flyball.app.http.body import BodyError, decompress

LIMIT = 1 << 20


@given(st.binary(max_size=5000))
def test_every_encoding_gives_the_body_back(body: bytes) -> None:
    assert decompress(body, "", LIMIT) == body
    assert decompress(gzip.compress(body), "gzip", LIMIT) == body
    assert decompress(zlib.compress(body), "deflate", LIMIT) == body
    assert decompress(zstandard.compress(body), "zstd", LIMIT) == body


def test_two_gzip_members_are_one_body() -> None:
    assert decompress(gzip.compress(b"a") + gzip.compress(b"b"), "gzip", LIMIT) == b"ab"


@pytest.mark.parametrize(
    ("bomb", "encoding"),
    [(gzip.compress(b"0" * (50 * LIMIT)), "gzip"), (zstandard.compress(b"0" * (50 * LIMIT)), "zstd")],
    ids=["gzip", "zstd"],
)
def test_a_bomb_is_refused_without_being_blown_up(bomb: bytes, encoding: str) -> None:
    assert len(bomb) < LIMIT
    with pytest.raises(BodyError) as e:
        decompress(bomb, encoding, LIMIT)
    assert e.value.status == 413


@given(st.binary(min_size=1, max_size=200), st.sampled_from(["gzip", "zstd", "deflate"]))
def test_damaged_bodies_are_the_senders_error(body: bytes, encoding: str) -> None:
    status = 200
    try:
        decompress(body, encoding, LIMIT)
    except BodyError as e:
        status = e.status
    assert status in (200, 400, 413)


def test_a_body_cut_on_its_way_is_named_so() -> None:
    with pytest.raises(BodyError, match="ends early"):
        decompress(gzip.compress(b"x" * 1000)[:-10], "gzip", LIMIT)


def test_an_unknown_encoding_is_named() -> None:
    with pytest.raises(BodyError, match="'br'") as e:
        decompress(b"", "br", LIMIT)
    assert e.value.status == 415
