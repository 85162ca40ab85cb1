"""What every format is built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flyball.streams.content import KeyedHash
from flyball.streams.labels import LabelRules
from flyball.streams.provider_errors import Classifier


@dataclass(frozen=True)
class FormatOptions:
    """Settings of decoding, the same for all formats.

    Args:
        labels: where app, tenant, team, prompt version and run come from.
        hash_key: secret key of the hashes that replace tool arguments and results.
        hash_ignore: tool → JSON fields left out of those hashes; `"*"` for every tool.
        classifier: provider errors → canonical classes.
    """

    labels: LabelRules = field(default_factory=LabelRules)
    hash_key: bytes = b""
    hash_ignore: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    classifier: Classifier = field(default_factory=Classifier)

    def hasher(self) -> KeyedHash:
        return KeyedHash(self.hash_key, self.hash_ignore)
