"""The executor of a replay: does nothing to the world, and answers as if everything it orders were in force.

Recorded traffic does not move when a directive is granted, so whether it is in force cannot be measured; it is assumed
from the first whole window, and an operation is taken to succeed. A redirect is then judged on the recorded traffic as it was: the
target's health, the failing primary (all of it stands for the slice left in place). That a limit, a cap, a block or an
operation helps is assumed as well. Recovery, renewal and expiry go by the record: a limit is needed as long as what was asked
for lies over it, a block as long as somebody knocks. What it cannot know: how the target would have fared under the
redirected load, and what callers would have done once they were refused.
"""

from __future__ import annotations

from flyball.core.estate import Estate
from flyball.core.plans import PlanStep
from flyball.remediation.endings import ExecutorSettings
from flyball.remediation.executor import Executor
from flyball.remediation.recovery import Measured, Trouble, under_limit
from flyball.remediation.runs import Stage
from flyball.remediation.verify import Answer, Judgement


class Assumed(Measured):
    """Evidence of a replay: in force by assumption, judged on the record."""

    def in_force(self, stage: Stage, step: PlanStep, estate: Estate) -> Answer:
        return "yes"

    def judged(self, stage: Stage, step: PlanStep, estate: Estate, in_force: Answer) -> Judgement | None:
        if step.kind == "redirect":
            return super().judged(stage, step, estate, in_force)
        if estate.now() - stage.stage_at - self.settings.settle_s < self.settings.window_s:
            return None
        return Judgement(True, False, "assumed", {"in_force": "assumed"})

    def recovered(self, stage: Stage, step: PlanStep, estate: Estate, trouble: Trouble, now: float) -> Answer:
        if step.kind == "limit":
            return under_limit(step, stage.index, estate, self.settings)
        return super().recovered(stage, step, estate, trouble, now)

    def assumes(self, stage: Stage) -> bool:
        return True


class ScriptedExecutor(Executor):
    """An `Executor` whose directives and operations are in force by assumption."""

    def __init__(self, settings: ExecutorSettings | None = None) -> None:
        settings = settings or ExecutorSettings()
        super().__init__(settings, Assumed(settings.verify))
