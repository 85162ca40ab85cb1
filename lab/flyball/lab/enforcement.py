"""The simulated gateway as an enforcement point: which leases it holds, what they make of calls, and what it says about it.

What a directive means for one call is `flyball.remediation.points.matching`, as at every enforcement point; here are only the
calls, their order in time, and the ways in which a point can fail at its job.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flyball.core.directives import Directive, Enforced
from flyball.core.errorclass import CLASS_INDEX
from flyball.lab._draws import Ints, Mask, Records, mix, unit_interval
from flyball.lab.estate import Estate
from flyball.remediation.points.buckets import Buckets
from flyball.remediation.points.matching import Effect, Index, apply

if TYPE_CHECKING:
    from flyball.lab.gateway import Answers, Names

LOCAL: Final = CLASS_INDEX["gateway_local"]
WARMING_S: Final = 240.0
"""How fast caches fill where traffic has moved to."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a gateway takes what it is told.

    obeys: share of its calls, by pod or process, that directives reach. late_s: how long it takes until it hears of anything.
    reports: whether it tells what it holds. `sincere`: whether its report counts only what it did.
    """

    name: str
    obeys: float = 1.0
    late_s: float = 0.0
    reports: bool = True
    sincere: bool = True


MANNERS: Final[dict[str, Manner]] = {
    m.name: m
    for m in (
        Manner("well"),
        Manner("deaf", obeys=0.0, reports=False),
        Manner("half_deaf", obeys=0.5),
        Manner("late", late_s=45.0),
        Manner("hollow", obeys=0.0, sincere=False),
    )
}
"""`deaf` hears nothing; of `half_deaf` every other pod does; `late` takes 45 s; `hollow` reports what it does not do."""


@dataclass(slots=True)
class _Told:
    """What the gateway obeys from a moment on."""

    at: float
    leases: tuple[Directive, ...]
    index: Index


class Enforcement:
    """Holds leases and applies them to calls. One per gateway.

    A lease applies to a call that starts within [granted_at, expires_at), also when nobody has taken it back: the gateway
    lets go by itself.
    """

    def __init__(self, estate: Estate, names: Names, serves: Mask) -> None:
        self.estate, self.names, self.manner = estate, names, MANNERS["well"]
        self._serves = serves
        self._told = [_Told(float("-inf"), (), Index(()))]
        self._at = 0.0
        self._buckets = Buckets(self._clock)
        self._open: list[tuple[int, tuple[str, ...]]] = []
        self._applied: dict[str, int] = {}
        self._teams = [a.team for a in estate.apps]

    def __deepcopy__(self, memo: dict[int, Any]) -> Enforcement:
        """Raises: ValueError while leases are held: what was spent of a limit is not copied."""
        if self._told[-1].leases:
            raise ValueError("a gateway that holds leases cannot be copied")
        again = Enforcement(self.estate, copy.deepcopy(self.names, memo), self._serves)
        again.manner = self.manner
        return again

    def _clock(self) -> float:
        """The start of the call that is judged, and never back: of two rounds of attempts the later one may begin earlier."""
        return self._at

    # -- what it is told, and what it tells ---------------------------------------------------------------------

    def tell(self, directives: Iterable[Directive], now: float) -> None:
        """Replaces the set of live leases; of two with one id the higher epoch counts."""
        newest: dict[str, Directive] = {}
        for d in directives:
            if d.id not in newest or newest[d.id].epoch <= d.epoch:
                newest[d.id] = d
        leases = tuple(newest[i] for i in sorted(newest))
        if leases == self._told[-1].leases:
            return
        heard = now + self.manner.late_s if self.manner.late_s else float("-inf")
        if heard == float("-inf"):
            self._told = []
        self._told.append(_Told(heard, leases, Index(leases)))
        # Calls come up to some minutes after the moment they are judged by; older sets are of no use.
        while len(self._told) > 1 and self._told[1].at < now - 600.0:
            del self._told[0]
        self._at = max(self._at, now)
        self._buckets.keep({d.id: d for t in self._told for d in t.leases}.values())

    def report(self, at: float, point: str = "lab-gateway") -> Enforced | None:
        """What it holds, and how often each lease was applied since the last report; None from one that tells nothing."""
        applied, self._applied = self._applied, {}
        if not self.manner.reports:
            return None
        held = self._told[max(bisect_right([t.at for t in self._told], at) - 1, 0)].leases
        counts = {d.id: applied.get(d.id, 0) for d in held if d.granted_at <= at < d.expires_at}
        return Enforced(point=point, at=at, directives=counts | applied)

    # -- what it does -------------------------------------------------------------------------------------------

    def obey(self, a: Answers) -> None:
        """Blocks, limits, redirects and caps the attempts, in the order of their starts."""
        if not any(t.leases for t in self._told) or not len(a.calls):
            return
        reached = self._touched(a.calls)
        if not reached.any():
            return
        listens = unit_interval(mix(a.calls["uid"] ^ np.uint64(0xDEAF))) < self.manner.obeys
        rows = np.flatnonzero(reached)
        times = [t.at for t in self._told]
        for row in rows[np.argsort(a.calls["start"][rows], kind="stable")].tolist():
            start = float(a.calls["start"][row])
            told = self._told[max(bisect_right(times, start) - 1, 0)]
            begun = told.index
            if any(d.granted_at > start for d in told.leases):
                begun = Index(d for d in told.leases if d.granted_at <= start)
            self._at = max(self._at, start)
            if listens[row]:
                self._carry_out(a, row, begun, start)
            elif not self.manner.sincere:
                self._count(
                    apply(
                        begun, self._labels(a.calls, row), self._key(a.calls, row), start, gate=self._buckets
                    )
                )
        self._feel_pressure(a)

    def _carry_out(self, a: Answers, row: int, index: Index, start: float) -> None:
        labels = self._labels(a.calls, row)
        effect = apply(
            index, labels, self._key(a.calls, row), start, gate=self._buckets, reachable=self._can_serve
        )
        if not effect.applied and not effect.charges:
            return
        self._count(effect)
        calls = a.calls
        if effect.refused:
            a.refuse(row, effect.status)
            return
        if effect.redirected or effect.labels is not labels:
            calls["provider"][row] = self.estate.provider_index[effect.labels["provider"]]
            calls["model"][row] = self.estate.model_index[effect.labels["model"]]
        if effect.redirected:
            granted = next(
                (d.granted_at for t in self._told for d in t.leases if d.id == effect.applied[0]), start
            )
            # The new provider has none of our prefixes yet: its cache warms up over some minutes.
            a.cold[row] = 1.0 - np.exp(-max(start - granted, 0.0) / WARMING_S)
        if effect.max_output_tokens is not None:
            calls["output"][row] = min(int(calls["output"][row]), effect.max_output_tokens)
        if effect.charges:
            self._open.append((row, effect.charges))

    def settle(self, a: Answers) -> None:
        """Charges the limits with what the calls of this round have used; what failed has used nothing."""
        for row, names in self._open:
            usd = float(a.cost_usd[row])
            used = usd > 0.0 or not a.error[row]
            tokens = int(a.calls["input"][row] + a.output[row]) if used else 0
            self._buckets.charge(names, tokens=tokens, usd=usd)
        self._open = []

    def _count(self, effect: Effect) -> None:
        for name in effect.applied:
            self._applied[name] = self._applied.get(name, 0) + 1

    def _feel_pressure(self, a: Answers) -> None:
        """Who takes over how much, for those that break down under it."""
        for told in self._told:
            for d in told.leases:
                to = d.params.get("to", {})
                provider = self.estate.provider_index.get(str(to.get("provider", "")), -1)
                if d.kind != "redirect" or provider < 0:
                    continue
                start = a.calls["start"]
                mine = (
                    (a.calls["provider"] == provider)
                    & (start >= max(d.granted_at, told.at))
                    & (start < d.expires_at)
                )
                share = float(d.params.get("share", 1.0)) * self.manner.obeys
                a.pressure[mine] = np.maximum(a.pressure[mine], share)

    # -- calls as labels ----------------------------------------------------------------------------------------

    def _touched(self, calls: Records) -> Mask:
        """bool[n]: calls that some lease may apply to, where a redirect may have led them too."""
        mask: Mask = np.zeros(len(calls), dtype=bool)
        leases = {d.id: d for told in self._told for d in told.leases}
        for d in leases.values():
            mask |= self.matches(d.scope, calls)
        return mask

    def matches(self, scope: Mapping[str, str], calls: Records) -> Mask:
        """bool[n]: which calls carry all labels of `scope`. A label that the gateway does not know matches nothing."""
        e = self.estate
        mask: Mask = np.full(len(calls), bool(scope))
        for label, value in scope.items():
            if label in ("provider", "model", "app", "tenant", "agent"):
                index: dict[str, int] = getattr(e, f"{label}_index")
                mask &= calls[label] == index.get(value, -2)
            elif label == "team":
                mask &= np.isin(calls["app"], [i for i, t in enumerate(self._teams) if t == value])
            elif label == "key":
                mask &= calls["tenant"] == e.tenant_index.get(value.removeprefix("key-"), -2)
            elif label in ("prompt", "run"):
                known = self.names.prompts if label == "prompt" else self.names.runs
                mask &= calls[label] == (known.index(value) if value in known else -2)
            elif label == "region":
                names = [[r == value for r in p.regions] for p in e.providers]
                hit = np.array([any(row) for row in names])[calls["provider"]]
                place = np.array([row.index(True) if any(row) else -2 for row in names])[calls["provider"]]
                mask &= hit & (self.region(calls) == place)
            else:
                mask &= False
        return mask

    def region(self, calls: Records) -> Ints:
        n_regions = np.array([len(p.regions) for p in self.estate.providers])
        region: Ints = calls["tenant"] % n_regions[calls["provider"]]
        return region

    def _labels(self, calls: Records, row: int) -> dict[str, str]:
        e, call = self.estate, calls[row]
        app, tenant, agent, run = int(call["app"]), int(call["tenant"]), int(call["agent"]), int(call["run"])
        provider = e.providers[int(call["provider"])]
        labels = {
            "provider": provider.name,
            "model": e.models[int(call["model"])].name,
            "region": provider.regions[tenant % len(provider.regions)],
            "app": e.apps[app].name,
            "team": self._teams[app],
            "tenant": e.tenants[tenant],
            "key": f"key-{e.tenants[tenant]}",
            "prompt": self.names.prompts[int(call["prompt"])],
        }
        if agent >= 0:
            labels["agent"] = e.agents[agent].name
        if run >= 0:
            labels["run"] = self.names.runs[run]
        return labels

    def _key(self, calls: Records, row: int) -> str:
        run = int(calls["run"][row])
        return self.names.runs[run] if run >= 0 else f"{int(calls['uid'][row]):016x}"

    def _can_serve(self, labels: Mapping[str, str]) -> bool:
        provider = self.estate.provider_index.get(labels.get("provider", ""), -1)
        model = self.estate.model_index.get(labels.get("model", ""), -1)
        return provider >= 0 and model >= 0 and bool(self._serves[provider, model])
