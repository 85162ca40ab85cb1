"""The executor of a replay: does nothing to the world, and answers as if every directive were in force.

Recorded traffic does not move when a directive is granted, so whether it is in force cannot be measured; it is assumed
from the first whole window. Everything else is judged on the recorded traffic as it was: the target's health, the failing
primary (all of it stands for the slice left in place), recovery, renewal and expiry. What it cannot know: how the
target would have fared under the redirected load.
"""

from __future__ import annotations

from flyball.core.estate import Estate
from flyball.core.plans import PlanStep
from flyball.remediation.executor import Executor, _Stage
from flyball.remediation.verify import Answer


class ScriptedExecutor(Executor):
    """An `Executor` whose directives are in force by assumption."""

    def _in_force(self, stage: _Stage, step: PlanStep, estate: Estate) -> Answer:
        return "yes"
