"""From the first failing call to a lease that traffic obeys, and back: a real `flyball run` under live traffic of the lab.

Ten minutes of quiet traffic are sent ahead, then 60 % of one provider's calls fail for a while. The provider's runbook is the shipped one
in mode `auto`. Times are of this machine's clock; the outage begins with the first failing call or a moment before.

    python -m benchmarks live_outage
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import httpx

from flyball.app.tables import print_rows
from flyball.lab.faults import ProviderOutage
from flyball.lab.live import LiveLab, Tick
from tests.processes import flyball

BAR_S: Final = 20.0
_QUIET_S: Final = 20.0
_OUTAGE_S: Final = 110.0
_AFTER_S: Final = 150.0
_HISTORY_S: Final = 600.0


@dataclass
class Watch:
    """When, after the fault began, traffic first obeyed a lease and when the last lease was gone."""

    fault_at: float = 0.0
    obeyed_s: float | None = None
    gone_s: float | None = None
    problems: list[str] = field(default_factory=list)

    def see(self, tick: Tick) -> None:
        since = time.time() - self.fault_at
        if self.obeyed_s is None and any(tick.applied.values()):
            self.obeyed_s = since
        if self.obeyed_s is not None:
            self.gone_s = None if tick.directives else (self.gone_s or since)
        if tick.problem:
            self.problems.append(tick.problem)


async def live(url: str, watch: Watch) -> None:
    def faults(start: float) -> list[ProviderOutage]:
        watch.fault_at = start + _QUIET_S
        return [ProviderOutage("b", 0.6, watch.fault_at, watch.fault_at + _OUTAGE_S)]

    lab = LiveLab(url, 1, faults=faults, rate=20.0)
    await lab.run(_QUIET_S + _OUTAGE_S + _AFTER_S, watch.see, history_s=_HISTORY_S)


def run() -> list[dict[str, Any]]:
    """Rows in seconds. Raises: AssertionError when no lease was verified and released, or nobody was paged once."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        runbooks = Path(folder) / "runbooks"
        runbooks.mkdir()
        text = files("flyball.runbooks").joinpath("library/provider-failover.yaml").read_text("utf-8")
        (runbooks / "provider-failover.yaml").write_text(text.replace("mode: suggest", "mode: auto"), "utf-8")
        with flyball(Path(folder), "--runbooks", str(runbooks), "--mode", "auto") as url:
            asyncio.run(live(url, watch))
            status = httpx.get(f"{url}/v1/status").json()
    outcomes = status["outcomes"]
    if not (outcomes.get("verified") and outcomes.get("released")) or watch.obeyed_s is None:
        raise AssertionError(f"no lease was verified and released: {status}; {watch.problems[-3:]}")
    after_s = None if watch.gone_s is None else round(watch.gone_s - _OUTAGE_S, 1)
    row = {"unit": "s", "baseline": None, "ratio": None}
    return [
        {"name": "first failing call to a lease in force", "value": round(watch.obeyed_s, 1), **row, "bar": BAR_S, "holds": watch.obeyed_s <= BAR_S},
        {"name": "end of the outage to the last lease released", "value": after_s, **row, "bar": None, "holds": None},
        {"name": "pages of that outage", "value": status["pages"], **row, "unit": "pages", "bar": 1, "holds": status["pages"] == 1},
        {"name": "leases granted in that outage", "value": status["directives"], **row, "unit": "leases", "bar": None, "holds": None},
    ]  # fmt: skip


if __name__ == "__main__":
    print_rows(run())
