"""Bodies, read with a limit that also holds after decompression: a gzip bomb costs its sender, not us."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import zstandard
from fastapi import Request

_STEP: Final = 1 << 20


class BodyError(Exception):
    """A body that is not taken; `status` is the HTTP answer."""

    def __init__(self, status: int, what: str) -> None:
        self.status, self.what = status, what
        super().__init__(what)


async def read_body(request: Request, limit: int, grew: Callable[[int], None]) -> bytes:
    """The body as sent, at most `limit` bytes.

    Args:
        grew: hears of every piece before it is kept; may raise to end the reading.

    Raises: BodyError 413.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyError(
            413, f"body of {declared} bytes; the limit is {limit} (limits.body_bytes); send smaller batches"
        )
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise BodyError(413, f"body of more than {limit} bytes (limits.body_bytes); send smaller batches")
        grew(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its content encoding. Never holds more than `limit` + 1 MiB decompressed.

    Raises: BodyError 413 when it grows over the limit, 400 when damaged, 415 for another encoding.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _inflate(body, limit)
    if encoding == "zstd":
        return _unzstd(body, limit)
    raise BodyError(415, f"content encoding {encoding!r}; use gzip, deflate, zstd or none")


def _inflate(body: bytes, limit: int) -> bytes:
    out, size, rest = [], 0, body
    try:
        while rest:
            stream = zlib.decompressobj(wbits=47)  # gzip or zlib, told by the header
            while rest and not stream.eof:
                part = stream.decompress(rest, _STEP)
                size += len(part)
                if size > limit:
                    raise BodyError(
                        413, f"body grows over {limit} bytes (limits.body_bytes) when decompressed"
                    )
                out.append(part)
                rest = stream.unconsumed_tail
                if not part and not rest:
                    break
            if not stream.eof:
                raise BodyError(400, "gzip body ends early; it was cut on its way")
            rest = stream.unused_data
    except zlib.error as e:
        raise BodyError(400, f"gzip body is damaged ({e})") from e
    return b"".join(out)


def _unzstd(body: bytes, limit: int) -> bytes:
    out, size = [], 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
            body, read_across_frames=True
        ) as reader:
            while part := reader.read(_STEP):
                size += len(part)
                if size > limit:
                    raise BodyError(
                        413, f"body grows over {limit} bytes (limits.body_bytes) when decompressed"
                    )
                out.append(part)
    except zstandard.ZstdError as e:
        raise BodyError(400, f"zstd body is damaged ({e})") from e
    return b"".join(out)
