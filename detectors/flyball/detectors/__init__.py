"""Algorithms that say when a series departs from its normal: one algorithm, one file, one `kind`.

Third parties add theirs under the entry point group `flyball.detectors`.
"""

from __future__ import annotations

import pkgutil
import sys

from flyball.core.plugins import Registry
from flyball.core.ports import Detector
from flyball.detectors._budget import PageBudget
from flyball.detectors._episodes import CoolDown

__all__ = ["CoolDown", "PageBudget", "default_detectors", "registry"]

_BY_REQUEST = frozenset({"river"})
"""Kinds that need to be told what to watch: never on by default."""


def registry() -> Registry:
    """Every detector by kind; a module is imported when its kind is first asked for."""
    return Registry("detectors", sys.modules[__name__], skip=("conformance",))


def default_detectors(budget: PageBudget | None = None) -> list[Detector]:
    """One of each built-in kind with its default parameters, in the order of their names, sharing `budget`."""
    shared = budget if budget is not None else PageBudget()
    known = registry()
    builtin = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    kinds = [kind for kind in builtin if kind not in _BY_REQUEST and kind != "conformance"]
    return [known.get(kind)(budget=shared) for kind in kinds]
