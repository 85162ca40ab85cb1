"""Rows of the tables that `flyball lab score` prints; benchmarks use the same form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is value / baseline where there is a baseline; `bar` is what `holds` was held to."""

    name: str
    value: float | None
    unit: str
    baseline: float | None
    ratio: float | None
    bar: float | None
    holds: bool | None


def told(name: str, value: float | None, unit: str) -> Row:
    """A figure without a bar."""
    return Row(name, value, unit, None, None, None, None)


def at_most(name: str, value: float | None, unit: str, bar: float) -> Row:
    shown = None if value is None else round(value, 2)
    return Row(name, shown, unit, None, None, bar, value is not None and value <= bar)


def at_least(name: str, value: float, unit: str, bar: float) -> Row:
    return Row(name, value, unit, None, None, bar, value >= bar)


@dataclass
class Table:
    """The rows, and what was simulated for them."""

    rows: list[Row]
    simulated: str

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(r) for r in self.rows]

    def holds(self) -> bool:
        return all(r.holds is not False for r in self.rows)


def run_all(
    work: Callable[[Job], Result], todo: Sequence[Job], processes: int, chunk: int = 1
) -> Iterator[Result]:
    """The results in the order of the jobs, whatever the number of processes. `chunk`: jobs that one process takes at a time."""
    if processes <= 1:
        yield from map(work, todo)
        return
    with ProcessPoolExecutor(max_workers=processes) as pool:
        yield from pool.map(work, todo, chunksize=chunk)
