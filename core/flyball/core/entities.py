"""The things an incident can be about, and the labels that name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

ENTITY_KINDS: Final[tuple[str, ...]] = (
    "provider",
    "model",
    "deployment",
    "region",
    "app",
    "prompt_version",
    "team",
    "tenant",
    "agent",
    "run",
    "tool",
    "gpu",
    "node",
    "key",
    "stream",
)
"""Every `root.kind`. `stream` is Flyball's own telemetry: a sender that stopped, a topic full of poison."""

LABEL_OF: Final[dict[str, str]] = {"prompt_version": "prompt", "stream": "sender"}
"""Entity kinds whose label in events has another name than the kind."""


class Entity(msgspec.Struct, frozen=True, order=True):
    """One named thing, e.g. provider `anthropic`; written `provider:anthropic`."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    @property
    def label(self) -> str:
        return LABEL_OF.get(self.kind, self.kind)

    def matches(self, labels: Mapping[str, str]) -> bool:
        return labels.get(self.label) == self.name


def entities_of(labels: Mapping[str, str]) -> list[Entity]:
    """The entities that a set of labels names, in the order of ENTITY_KINDS; empty labels name nothing."""
    return [Entity(k, labels[LABEL_OF.get(k, k)]) for k in ENTITY_KINDS if labels.get(LABEL_OF.get(k, k))]
