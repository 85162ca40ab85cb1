"""Flyball on Apache Kafka: all that speaks to a broker lives in this package.

Nothing here is imported before somebody asks for Kafka: the clients are an extra, `flyball[kafka]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from flyball.core.errors import ConfigError

CLIENTS: Final = ("faust-streaming", "aiokafka", "kafka-python", "confluent-kafka", "cramjam", "crc32c")


def require_clients(names: Iterable[str] = CLIENTS) -> None:
    """Raises: ConfigError that names the command, where the extra `kafka` is not installed."""
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise ConfigError(
            f"Kafka needs packages that are not installed ({', '.join(missing)}); pip install 'flyball[kafka]'"
        )


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
