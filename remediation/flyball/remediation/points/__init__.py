"""Enforcement points: where directives take effect. Standard library and httpx only, so that any gateway can carry it."""

from __future__ import annotations

from flyball.remediation.points.buckets import Buckets
from flyball.remediation.points.client import Lease, PointClient
from flyball.remediation.points.matching import Effect, Index, apply, chosen

__all__ = ["Buckets", "Effect", "Index", "Lease", "PointClient", "apply", "chosen"]
