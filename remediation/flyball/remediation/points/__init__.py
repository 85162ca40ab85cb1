"""Enforcement points: where directives take effect. Standard library and httpx only, so that any gateway can carry it."""

from __future__ import annotations

from flyball.remediation.points.client import Lease, PointClient
from flyball.remediation.points.matching import Effect, apply, chosen

__all__ = ["Effect", "Lease", "PointClient", "apply", "chosen"]
