"""The topics: what each is for, and how it must be set so that nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

_HOUR_S: Final = 3600
_DAY_S: Final = 24 * _HOUR_S

MAX_MESSAGE_BYTES: Final = 8 << 20
"""Largest record of `windows` and `state`; producers to them must allow as much (`max_request_size`)."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic as it is wanted.

    Args:
        name: without prefix.
        what: what stands in it, for people.
        partitions: a fixed number; None means the number that the settings say (`kafka.partitions`).
        cleanup: `compact` keeps the newest record of each key for ever, `delete` all records for `retention_s`.
        retention_s: least age that records reach; 0 where `compact` keeps them.
        taken_in: events of others come in here, in the format that `kafka.formats` names.
        max_message_bytes: 0 means the broker's default (1 MB).
        stamped: records carry the broker's time instead of the sender's.
    """

    name: str
    what: str
    partitions: int | None = None
    cleanup: Literal["delete", "compact"] = "delete"
    retention_s: int = 7 * _DAY_S
    taken_in: bool = False
    max_message_bytes: int = 0
    stamped: bool = False

    def settings(self) -> dict[str, str]:
        """The topic's configuration in the broker's words."""
        found: dict[str, str] = {"cleanup.policy": self.cleanup}
        if self.cleanup == "delete":
            found["retention.ms"] = str(self.retention_s * 1000)
        else:
            # The segment being written is never compacted: small ones keep what a restart reads short.
            found["segment.bytes"] = str(64 << 20)
            found["segment.ms"] = str(_HOUR_S * 1000)
            found["min.cleanable.dirty.ratio"] = "0.2"
        if self.max_message_bytes:
            found["max.message.bytes"] = str(self.max_message_bytes)
        if self.stamped:
            found["message.timestamp.type"] = "LogAppendTime"
        return found


TOPICS: Final = {
    t.name: t
    for t in (
        Topic("llm-calls", "LLM calls, by call identity", taken_in=True),
        Topic("agent-steps", "agent steps, by run", taken_in=True),
        Topic("gpu-samples", "GPU and inference samples, by node", taken_in=True),
        Topic("changes", "deploys, flags and other changes", 1, taken_in=True),
        Topic("windows", "partial windows on their way to control", 1, retention_s=_DAY_S, max_message_bytes=MAX_MESSAGE_BYTES),
        Topic("anomalies", "what detectors found, by scope", 1),
        Topic("incidents", "incidents and their changes, by incident", 1, retention_s=30 * _DAY_S),
        Topic("outcomes", "what was decided and done, by incident", 1, retention_s=30 * _DAY_S),
        Topic("directives", "what enforcement points must obey, by directive", 1, "compact", 0),
        Topic("state", "snapshots of the window stage, by source partition", None, "compact", 0, max_message_bytes=MAX_MESSAGE_BYTES),
        Topic("late", "events that came after their window was closed", 1),
        Topic("dead-letters", "what could not be taken, with its bytes and why", 1, retention_s=14 * _DAY_S, max_message_bytes=MAX_MESSAGE_BYTES),
        Topic("clock", "one record for each time that `flyball doctor` compares clocks", 1, retention_s=_HOUR_S, stamped=True),
    )
}  # fmt: skip
"""By name without prefix, in the order in which events pass them."""

TAKEN_IN: Final = tuple(t.name for t in TOPICS.values() if t.taken_in)
"""Topics that applications, collectors and our own ingest write to."""
