"""Bytes in and out: snapshots and the log. Never pickle."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from flyball.core.errors import FlyballError
from flyball.core.events import Event

T = TypeVar("T")

_batch_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(list[Event])
_SNAPSHOT_MAGIC: Final = "flyball"


class SnapshotError(FlyballError):
    """A snapshot that this version cannot read; the stage must be rebuilt from the log."""


def encode_events(events: list[Event]) -> bytes:
    """Events as one msgpack array: the value of a row of the log."""
    return _batch_encoder.encode(events)


def decode_events(data: bytes) -> list[Event]:
    """The inverse of `encode_events`. Raises: msgspec.DecodeError on damaged bytes."""
    return _batch_decoder.decode(data)


def pack_state(kind: str, version: int, state: Any) -> bytes:
    """A stage's state as versioned msgpack. Arrays go in as `array.tobytes()`.

    Args:
        kind: name of the stage; restoring into another kind is refused.
        version: of the layout; raise it when the meaning of `state` changes.
    """
    return msgspec.msgpack.encode((_SNAPSHOT_MAGIC, kind, version, state))


def unpack_state(data: bytes, kind: str, version: int, type: type[T] | Any = Any) -> Any:
    """The state of `pack_state`, decoded as `type`.

    Raises: SnapshotError when the bytes are of another stage or version, or damaged.
    """
    try:
        magic, found_kind, found_version, raw = msgspec.msgpack.decode(
            data, type=tuple[str, str, int, msgspec.Raw]
        )
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as e:
        raise SnapshotError(f"not a snapshot: {e}") from e
    if (magic, found_kind, found_version) != (_SNAPSHOT_MAGIC, kind, version):
        raise SnapshotError(f"snapshot of {found_kind} v{found_version}; this is {kind} v{version}")
    try:
        return msgspec.msgpack.decode(raw, type=type)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as e:
        raise SnapshotError(f"snapshot of {kind} v{version} is damaged: {e}") from e


__all__ = ["SnapshotError", "decode_events", "encode_events", "pack_state", "unpack_state"]
