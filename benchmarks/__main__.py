"""`python -m benchmarks [NAME…]`: measures, prints a table, writes `build/bench.json`. Exit code 1 when a bar does not hold.

A benchmark is a module of this folder with `run()`, which returns rows of `{"name","value","unit","baseline","ratio","bar","holds"}`;
`bar` is None where a figure is only told. One that needs data that is not here says so on standard error and returns no rows.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import benchmarks
from flyball.app.tables import print_rows
from flyball.core.errors import did_you_mean

OUT = Path("build") / "bench.json"


def names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]


def measure(wanted: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in wanted:
        module = importlib.import_module(f"benchmarks.{name}")
        if not hasattr(module, "run"):
            continue
        print(f"measuring {name}", file=sys.stderr, flush=True)
        found = module.run()
        print_rows(found) if found else print(f"{name}: no rows", file=sys.stderr)
        rows += found
    return rows


def main(arguments: list[str]) -> int:
    known = names()
    for name in arguments:
        if name not in known:
            print(f"no benchmark {name!r}{did_you_mean(name, known)}", file=sys.stderr)
            return 2
    rows = measure(arguments or known)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    missed = [r["name"] for r in rows if r["holds"] is False]
    print(f"\n{len(rows)} figures in {OUT}; bars missed: {', '.join(missed) or 'none'}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
