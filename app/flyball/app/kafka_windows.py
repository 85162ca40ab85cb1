"""From settings to the role `windows`. Imports the Kafka client: only for who runs one."""

from __future__ import annotations

from collections.abc import Mapping

from flyball.app.scrub import scrub
from flyball.app.settings import Settings
from flyball.app.wiring import pipeline_config
from flyball.core.ports import Decoded, Format
from flyball.streams.kafka.breaker import PoisonSettings
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.windows_role import RoleSettings, WindowsRole


class Decoder:
    """How values of the topics are read: as a record's headers say, else as the settings do."""

    def __init__(self, settings: Settings, formats: Mapping[str, Format]) -> None:
        self._by_topic, self._formats = settings.kafka.formats, formats

    def __call__(self, topic: str, value: bytes, headers: Mapping[str, bytes]) -> Decoded:
        content_type = headers.get("content-type", b"").decode("ascii", "replace")
        return self._formats[self._kind(topic, content_type, headers)].decode(value, content_type)

    def lines(self, topic: str, headers: Mapping[str, bytes]) -> bool:
        """Whether the value is lines of our own format."""
        content_type = headers.get("content-type", b"").decode("ascii", "replace")
        return self._kind(topic, content_type, headers) == "native"

    def _kind(self, topic: str, content_type: str, headers: Mapping[str, bytes]) -> str:
        kind = headers.get("flyball-format", b"").decode("ascii", "replace")
        if not kind and "protobuf" in content_type:
            kind = "otlp"
        if not kind and content_type.startswith("application/x-ndjson"):
            kind = "native"
        kind = kind or self._by_topic.get(topic, "native")
        return kind if kind in self._formats else "native"


def make_windows_role(config: KafkaConfig, settings: Settings, formats: Mapping[str, Format]) -> WindowsRole:
    """Raises: ConfigError when a setting is refused."""
    k = settings.kafka
    role = RoleSettings(
        snapshot_s=k.snapshot_s, idle_s=k.idle_s, stuck_s=k.stuck_s,
        poison=PoisonSettings(k.poison_ratio, k.poison_least, k.poison_window_s, k.poison_retry_s),
    )  # fmt: skip
    decoder = Decoder(settings, formats)
    kept = scrub if settings.retention.dead_letter_bytes else _nothing
    return WindowsRole(
        config, decoder, pipeline_config(settings).windows, role, lines=decoder.lines, kept=kept
    )


def _nothing(_body: bytes) -> None:
    """Of dead letters without bytes."""


__all__ = ["Decoder", "make_windows_role"]
