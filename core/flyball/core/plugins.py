"""Adding something is adding one file whose name is its `kind`; third parties use entry points."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from flyball.core.errors import ConfigError, did_you_mean


class Registry:
    """Everything of one family (`detectors`, `formats`, `notifiers`, `actions`) by kind; modules load when first asked for.

    A module `x.py` of the package provides kind `x` by one class whose `kind` is "x". Entry points of the group
    `flyball.<family>` provide more. A kind that exists twice stops start-up.

    Raises: ConfigError when two places provide the same kind.
    """

    def __init__(self, family: str, package: ModuleType, *, skip: tuple[str, ...] = ()) -> None:
        self.family = family
        self._package = package.__name__
        self._modules: dict[str, str] = {
            m.name: f"{package.__name__}.{m.name}"
            for m in pkgutil.iter_modules(package.__path__)
            if not m.name.startswith("_") and m.name not in skip
        }
        self._entries: dict[str, Any] = {}
        for entry in entry_points(group=f"flyball.{family}"):
            if entry.name in self._modules or entry.name in self._entries:
                raise ConfigError(
                    f"two {family} are called {entry.name!r}: one comes from {entry.value}; rename or uninstall one",
                    where=f"entry point flyball.{family}",
                )
            self._entries[entry.name] = entry

    def kinds(self) -> list[str]:
        return sorted([*self._modules, *self._entries])

    def get(self, kind: str) -> Any:
        """The class of this kind. Raises: ConfigError for an unknown kind, or a module without its class."""
        if kind in self._entries:
            return self._entries[kind].load()
        if kind not in self._modules:
            raise ConfigError(f"unknown {self.family.rstrip('s')} {kind!r}{did_you_mean(kind, self.kinds())}")
        module = importlib.import_module(self._modules[kind])
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and value.__module__ == module.__name__
                and getattr(value, "kind", None) == kind
            ):
                return value
        raise ConfigError(
            f"{module.__name__} has no class with kind = {kind!r}; one file, one kind, equal names"
        )
