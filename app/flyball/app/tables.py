"""Tables of measured figures: the bench and the lab's score print the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def figure(value: float | str | None) -> str:
    """A figure as people read it; a bar that is no single number says itself."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of `{"name","value","unit","baseline","ratio","bar","holds"}`."""
    table = Table(box=None, pad_edge=False)
    for name in ("name", "value", "unit", "baseline", "ratio", "bar", "holds"):
        table.add_column(
            name, justify="left" if name in ("name", "unit", "holds") else "right", no_wrap=name == "name"
        )
    for r in rows:
        holds = {True: "yes", False: "NO", None: ""}[r["holds"]]
        table.add_row(
            r["name"],
            figure(r["value"]),
            r["unit"],
            figure(r["baseline"]),
            figure(r["ratio"]),
            figure(r["bar"]),
            holds,
        )
    Console(width=140, soft_wrap=True).print(table)
