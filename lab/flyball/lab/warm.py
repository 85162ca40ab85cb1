"""Estates that have run quietly for a while, with the governor that followed them: simulated once, copied for each scenario."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flyball.core.estate import Governor
from flyball.core.events import Batch
from flyball.lab.estate import default_estate
from flyball.lab.scenario import Lab
from flyball.lab.sim import START_AT, Simulator


class Copied(Governor, Protocol):
    """A governor whose state can be taken over by another."""

    def snapshot(self) -> bytes: ...
    def restore(self, data: bytes) -> None: ...


class Warm:
    """The warm-up of a lab, kept by what it depends on.

    Args:
        quiet: makes the governor that follows the warm-up; it should not act.
        keep: how many warm-ups are kept; the oldest goes first.
    """

    def __init__(self, quiet: Callable[[], Copied], keep: int = 8) -> None:
        self._quiet, self._keep = quiet, keep
        self._kept: dict[tuple[int, float, float, float], tuple[Simulator, bytes]] = {}

    def lab(
        self,
        governor: Copied,
        seed: int,
        rate: float,
        warmup_s: float,
        *,
        start_at: float = START_AT,
        hear: Callable[[Batch], None] | None = None,
    ) -> Lab:
        """A lab at its zero, with `governor` in the state of one that saw the warm-up."""
        sim, state = self._warmed(seed, rate, warmup_s, start_at)
        governor.restore(state)
        return Lab(lambda: governor, seed=seed, sim=sim.copy(), hear=hear)

    def simulator(self, seed: int, rate: float, warmup_s: float, *, start_at: float = START_AT) -> Simulator:
        """The estate alone: what happens when nobody does anything."""
        return self._warmed(seed, rate, warmup_s, start_at)[0].copy()

    def _warmed(self, seed: int, rate: float, warmup_s: float, start_at: float) -> tuple[Simulator, bytes]:
        key = (seed, rate, warmup_s, start_at)
        if key not in self._kept:
            if len(self._kept) >= self._keep:
                del self._kept[next(iter(self._kept))]
            quiet = self._quiet()
            lab = Lab(
                lambda: quiet, seed=seed, estate=default_estate(rate), warmup=warmup_s, start_at=start_at
            ).run(0)
            self._kept[key] = (lab.sim, quiet.snapshot())
        return self._kept[key]
