"""A planner over a small world with an outage of provider b, and an action whose resolution a test can choose."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from flyball.core.directives import Approval, Decision, Outcome, StopChange
from flyball.core.incident import Incident
from flyball.core.plans import Effect, Frozen, HookCall, Plan, PlanContext, Refusal
from flyball.remediation.actions import registry
from flyball.runbooks.loader import RunbookSet, load_texts
from flyball.runbooks.planner import Item, Planned, Planner
from flyball.runbooks.standing import PlannerSettings
from tests.remediation._estate import World, change, incident

YAML = """
runbook: v1
name: failover
owner: platform
when: incident.root.kind == "provider" && incident.severity >= HIGH
mode: auto
limits: {cooldown: 30m, runs: 3/1h, attempts: 2, blast: {traffic: 60%, tenants: 20}}
steps:
  - redirect: {from: $incident.root, to: best_healthy, share: [25%, 100%], for: 1h}
"""
TOUCH = """
runbook: v1
name: touch
owner: platform
when: incident.severity >= HIGH
mode: auto
limits: {cooldown: 30m, runs: 3/1h, attempts: 2, blast: {traffic: 100%}}
steps:
  - touch: {}
"""


class Touch:
    """Limits the root, as its params say: `scope`, `share`, `gpus`, `must_ask`, `of_now` (a figure that follows live traffic)."""

    kind: ClassVar[str] = "touch"
    effect: ClassVar[Effect] = "limit"
    references: ClassVar[frozenset[str]] = frozenset()

    class Params(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)
        scope: dict[str, str] | None = None
        share: float = 1.0
        gpus: int | None = None
        must_ask: str = ""
        of_now: float | None = None
        targets: list[str] | None = None

    @classmethod
    def freeze(cls, params: BaseModel, context: PlanContext) -> Frozen | Refusal:
        assert isinstance(params, cls.Params)
        root = context.incident.root
        scope = {root.label: root.name} if params.scope is None else params.scope
        amount = 10.0
        if params.of_now is not None:
            amount = params.of_now * context.estate.attempts(scope, 60.0)
        targets = params.targets
        return Frozen(
            scope=scope,
            stages=({"requests_per_min": amount},),
            source=scope,
            target=scope,
            hold_s=600.0,
            lease_s=300.0,
            locks=(str(root),),
            max_share=params.share,
            gpus=params.gpus,
            must_ask=params.must_ask,
            hook=None if targets is None else HookCall(hook="h", action="drain", targets=tuple(targets)),
        )


class Drain(Touch):
    """The same as what a hook does."""

    kind: ClassVar[str] = "drain"
    effect: ClassVar[Effect] = "operation"


class Actions:
    """The real actions, `touch` and `drain`."""

    def __init__(self) -> None:
        self._real = registry()

    def kinds(self) -> list[str]:
        return sorted([*self._real.kinds(), Touch.kind, Drain.kind])

    def get(self, kind: str) -> Any:
        return {"touch": Touch, "drain": Drain}.get(kind) or self._real.get(kind)


ACTIONS = Actions()


def book(text: str = YAML, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def books(*texts: str) -> RunbookSet:
    return load_texts({f"{i}.yaml": text for i, text in enumerate(texts)}, actions=ACTIONS)


class Desk:
    """Two minutes of calm traffic of providers a, b and c, then 20 s in which b fails.

    Args:
        what: texts of runbooks (YAML where none is given), and changes to them as (old, new).
    """

    def __init__(
        self,
        *what: str | tuple[str, str],
        ceiling: str = "auto",
        settings: PlannerSettings | None = None,
        **more: Any,
    ) -> None:
        self.world = World({"a": 200, "b": 200, "c": 100})
        texts = [w for w in what if isinstance(w, str)] or [YAML]
        self.set = books(*(book(text, *(w for w in what if not isinstance(w, str))) for text in texts))
        self.ceiling, self.settings = ceiling, settings or PlannerSettings()
        self.planner = Planner(self.set, ceiling, self.settings, **more)
        self.world.advance(windows=12)
        self.world.fails["b"] = 0.6
        self.world.advance(windows=2)

    def incident(self, name: str = "b", **more: Any) -> Incident:
        return incident(name, **{"at": self.world.now, **more})

    def news(self, i: Incident | None = None) -> list[Planned]:
        return self.say(change(i or self.incident(), self.world.now))

    def say(self, *items: Item) -> list[Planned]:
        return self.planner.feed(items, self.world.estate, self.world.now)

    def stop(self, scope: str = "all", change: Any = "stop") -> list[Planned]:
        return self.say(StopChange(change=change, scope=scope, by="ana", at=self.world.now))

    def answer(self, plan: Plan | str | None, by: str = "ana", **more: Any) -> tuple[Decision, Plan | None]:
        assert plan is not None
        hash_ = plan if isinstance(plan, str) else plan.plan_hash
        return self.say(
            Approval(**{"waiting": hash_, "approve": True, "by": by, "at": self.world.now, **more})
        )[0]

    def tick(self, windows: int = 1) -> list[Planned]:
        out: list[Planned] = []
        for _ in range(windows):
            self.world.advance()
            out += self.planner.tick(self.world.now, self.world.estate)
        return out

    def out(self, plan: Plan | None, result: Any, *, ended: bool = False, step: str = "") -> None:
        assert plan is not None
        outcome = Outcome(
            at=self.world.now, incident=plan.incident, runbook=plan.runbook, step=step or plan.steps[0].id,
            action=plan.steps[0].action, result=result, values={"plan": plan.plan_hash, "plan_ended": ended},
        )  # fmt: skip
        assert self.say(outcome) == []

    def end(self, plan: Plan | None, result: Any = "released") -> None:
        self.out(plan, result, ended=True)


def verdicts(planned: list[Planned]) -> list[tuple[str, str]]:
    return [(d.decision.value, d.reason) for d, _ in planned]


def one(planned: list[Planned]) -> tuple[Decision, Plan | None]:
    assert len(planned) == 1, verdicts(planned)
    return planned[0]
