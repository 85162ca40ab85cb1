"""What the parts that decide and act may ask about live traffic, and what one step of the whole pipeline gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flyball.core.anomaly import Anomaly
from flyball.core.columns import Window
from flyball.core.directives import (
    Decision,
    Directive,
    DirectiveChange,
    Enforced,
    Intervention,
    Operation,
    Outcome,
)
from flyball.core.events import Batch
from flyball.core.incident import IncidentChange


@dataclass(frozen=True, slots=True)
class Ratio:
    """k of n, over a span of event time. `n == 0` means no data, which is never success."""

    k: int
    n: int

    @property
    def value(self) -> float:
        return self.k / self.n if self.n else float("nan")


class Estate(Protocol):
    """Live windows, as questions. All spans end at the newest closed window."""

    def now(self) -> float:
        """End of the newest closed window; where only runs or GPUs are watched, a little before their newest sign. 0.0 before the
        first."""
        ...

    def errors(self, scope: Mapping[str, str], span_s: float) -> Ratio:
        """Calls that failed in a way that counts against provider health, of all attempts, in `scope`."""
        ...

    def calls(self, scope: Mapping[str, str], span_s: float) -> int:
        """Attempts and refusals alike. A scope of one `run` is answered from the newest steps of runs; any other label that
        windows do not carry selects nothing."""
        ...

    def attempts(self, scope: Mapping[str, str], span_s: float) -> int:
        """As `calls`, without those that an enforcement point or a gateway refused by itself."""
        ...

    def values(self, label: str, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        """Distinct values of one label (`provider`, `tenant`, …) within `scope`, most calls first. `run` only of all together."""
        ...

    def usd_per_hour(self, scope: Mapping[str, str], span_s: float) -> float | None:
        """None when no call in scope told its cost."""
        ...

    def tokens_per_min(self, scope: Mapping[str, str], span_s: float) -> float | None:
        """Input and output; None when no call in scope told its tokens."""
        ...

    def latency_s(self, scope: Mapping[str, str], span_s: float) -> float | None:
        """Mean over the successful calls; None when none told it."""
        ...

    def gpus(self, scope: Mapping[str, str], span_s: float) -> Sequence[str]:
        """`node/gpu` of those that reported within the span; by `node`, `gpu`, `deployment`."""
        ...


@dataclass(slots=True)
class Emissions:
    """What one record made the pipeline say, in order."""

    windows: list[Window] = field(default_factory=list)
    anomalies: list[Anomaly] = field(default_factory=list)
    changes: list[IncidentChange] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    directives: list[DirectiveChange] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    people: list[Intervention] = field(default_factory=list)

    def extend(self, other: Emissions) -> None:
        self.windows += other.windows
        self.anomalies += other.anomalies
        self.changes += other.changes
        self.decisions += other.decisions
        self.directives += other.directives
        self.outcomes += other.outcomes
        self.operations += other.operations
        self.people += other.people


class Governor(Protocol):
    """The whole pipeline as one object: what the lab drives and what every runtime hosts."""

    def feed(self, batch: Batch) -> Emissions: ...
    def tick(self, now: float) -> Emissions: ...
    def directives(self) -> Sequence[Directive]:
        """Leases in force now, by id."""
        ...

    def enforced(self, report: Enforced) -> Emissions:
        """An enforcement point says what it holds: "granted" and "in force" are two things."""
        ...
