"""Snapshots of fronts in the compacted topic `flyball.state`.

A snapshot is some records, in one of two slots in turn, and a mark that names the slot, all of one key space and in one partition. A mark
never points at half of a snapshot, also when compaction runs meanwhile. Where two processes write at once, because one of them
does not know yet that the partition is no longer its own, pieces of both may meet: the mark's checksum tells.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from typing import Any, Final

import msgspec
import structlog

from flyball.streams.kafka.client import Place, Writer, read_all
from flyball.streams.kafka.config import KafkaConfig

TOPIC: Final = "state"
_CHUNK: Final = 4 << 20
_log = structlog.get_logger(__name__)


class _Mark(msgspec.Struct, array_like=True, frozen=True):
    """Where the newest whole snapshot is, and which record it follows."""

    slot: int
    chunks: int
    last: int
    checksum: int


class Snapshots:
    """Writes and reads them. `start` first."""

    def __init__(self, config: KafkaConfig, writer: Writer) -> None:
        self._config, self._writer = config, writer
        self._partitions = 1
        self._slots: dict[Place, int] = {}
        """Of each place, the slot that its newest mark names."""
        self._chunks: dict[tuple[Place, int], int] = {}
        """Records that stand in a slot."""

    async def start(self) -> None:
        self._partitions = await self._writer.partitions(TOPIC)

    async def load(
        self, places: Collection[Place], progress: Callable[[], None] = lambda: None
    ) -> dict[Place, bytes]:
        """The newest whole snapshot of each place that has one.

        Args:
            progress: called as records come.

        Raises: KafkaError.
        """
        which = sorted({self._partition(p) for p in places})
        found = await read_all(self._config, [Place(self._config.topic(TOPIC), p) for p in which], progress)
        newest = {r.key.decode("utf-8", "replace"): r.value for r in found if r.key is not None}
        return {p: state for p in places if (state := self._whole(p, newest)) is not None}

    def _whole(self, place: Place, newest: dict[str, bytes | None]) -> bytes | None:
        for slot in (0, 1):
            prefix = f"{self._name(place)}#{slot}."
            standing = [
                int(k.removeprefix(prefix))
                for k, v in newest.items()
                if v is not None and k.startswith(prefix)
            ]
            self._chunks[place, slot] = max(standing, default=-1) + 1
        raw = newest.get(self._name(place))
        if raw is None:
            return None
        try:
            mark = msgspec.msgpack.decode(raw, type=_Mark)
        except msgspec.DecodeError as e:
            _log.warning("state.unreadable", partition=str(place), why=f"not a mark: {e}")
            return None
        self._slots[place] = mark.slot
        state = b"".join(
            newest.get(f"{self._name(place)}#{mark.slot}.{k}") or b"" for k in range(mark.chunks)
        )
        if zlib.crc32(state) != mark.checksum:
            _log.warning("state.unreadable", partition=str(place), why="pieces of it are missing or damaged")
            return None
        return state

    async def save(self, place: Place, state: bytes, last: int) -> list[Any]:
        """Puts a snapshot on its way. Await all of what it returns; then it is there."""
        slot = 1 - self._slots.get(place, 1)
        which = self._partition(place)
        chunks = [state[i : i + _CHUNK] for i in range(0, len(state), _CHUNK)]
        had = self._chunks.get((place, slot), 0)
        sent = [
            await self._writer.send(
                TOPIC, chunk, key=f"{self._name(place)}#{slot}.{k}".encode(), partition=which
            )
            for k, chunk in enumerate(chunks)
        ]
        # Removed before the mark: what is left of a longer one would stay for ever.
        sent += [
            await self._writer.send(
                TOPIC, None, key=f"{self._name(place)}#{slot}.{k}".encode(), partition=which
            )
            for k in range(len(chunks), had)
        ]
        mark = msgspec.msgpack.encode(_Mark(slot, len(chunks), last, zlib.crc32(state)))
        # In the same partition, whose order an idempotent producer keeps: the mark is never there without the rest.
        sent.append(await self._writer.send(TOPIC, mark, key=self._name(place).encode(), partition=which))
        self._slots[place], self._chunks[place, slot] = slot, len(chunks)
        return sent

    def _name(self, place: Place) -> str:
        """Other groups have snapshots of their own: a new one begins at the topics' start."""
        return f"{self._config.groups}:{place}" if self._config.groups else str(place)

    def _partition(self, place: Place) -> int:
        return place.partition % self._partitions


__all__ = ["Snapshots"]
