"""What a step of a runbook can do: one file, one kind."""

from __future__ import annotations

import sys

from flyball.core.plugins import Registry


def registry() -> Registry:
    """All actions, those of third parties (entry points `flyball.actions`) included."""
    return Registry("actions", sys.modules[__name__])
