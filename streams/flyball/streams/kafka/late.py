"""Records of the topic `flyball.late`: calls that came after their window was closed, as they were read, and why they stand there."""

from __future__ import annotations

from typing import Final

import msgspec

from flyball.streams.front import Late
from flyball.streams.kafka.client import Place

TOPIC: Final = "late"


def late_record(place: Place, sender: str, late: Late) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Value (one line of NDJSON) and headers. `topic`, `partition`, `offset` and `index` are an identity: after a crash the same call may be
    told once more.

    >>> from flyball.core.events import LlmCall
    >>> _, headers = late_record(Place("flyball.llm-calls", 3), "gw", Late(17, 0, LlmCall(at=5.0), 41.5))
    >>> dict(headers)["behind_s"], dict(headers)["offset"]
    (b'41.500', b'17')
    """
    told = {
        "reason": "window_closed", "behind_s": f"{late.behind_s:.3f}", "topic": place.topic, "partition": place.partition,
        "offset": late.offset, "index": late.index, "sender": sender, "content-type": "application/x-ndjson",
    }  # fmt: skip
    return msgspec.json.encode(late.event), [(name, str(value).encode()) for name, value in told.items()]


__all__ = ["TOPIC", "late_record"]
