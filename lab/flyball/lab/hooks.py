"""The platform team's automation as the lab has it: takes operations, drains servers, and fails at it in the ways that such things fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from flyball.core.directives import Operation, OperationReport, OperationStatus
from flyball.lab.sim import Simulator

TAKES_S: Final = 4.0
"""From the acceptance of an operation to its end."""

HOOKS: Final = ("works", "fails", "half_done", "rejects", "silent")
"""`fails`: says that nothing was done; `half_done`: fails with the server drained; `silent`: accepts, and is not heard of again."""
_END: Final[dict[str, OperationStatus]] = {
    "works": "succeeded",
    "fails": "failed_not_applied",
    "half_done": "failed_applied",
}


@dataclass
class Hooks:
    """Answers operations. Each (id, verb) is done once; the answer is repeated."""

    sim: Simulator
    manner: str = "works"
    done: list[Operation] = field(default_factory=list)
    """What was really carried out, in order."""
    _due: list[tuple[float, Operation]] = field(default_factory=list)
    _taken: dict[tuple[str, str], OperationReport] = field(default_factory=dict)

    def send(self, operation: Operation, now: float) -> OperationReport:
        """The immediate answer; what becomes of it comes from `reports`."""
        if operation.dry_run:
            return self._answer(operation, now, "rejected" if self.manner == "rejects" else "accepted")
        known = self._taken.get((operation.id, operation.verb))
        if known is not None:
            return known
        if self.manner == "rejects" and operation.verb == "start":
            answer = self._answer(operation, now, "rejected")
        else:
            answer = self._answer(operation, now, "accepted")
            self._due.append((now + TAKES_S, operation))
        self._taken[(operation.id, operation.verb)] = answer
        return answer

    def reports(self, now: float) -> list[OperationReport]:
        """What came to its end by now."""
        over = [(at, op) for at, op in self._due if at <= now]
        self._due = [(at, op) for at, op in self._due if at > now]
        said = []
        for at, op in over:
            status: OperationStatus | None = _END.get(self.manner)
            if op.verb == "undo":
                # Recovery works whatever else does not.
                self._carry_out(op)
                status = "succeeded"
            elif op.verb == "cancel":
                status = "cancelled"
            elif status in ("succeeded", "failed_applied"):
                self._carry_out(op)
            if status is not None:
                said.append(self._answer(op, at, status))
        return said

    def _carry_out(self, op: Operation) -> None:
        self.done.append(op)
        for deployment in self._deployments(op):
            if op.verb == "undo":
                self.sim.gateway.drained.discard(deployment)
            else:
                self.sim.gateway.drained.add(deployment)

    def _deployments(self, op: Operation) -> list[str]:
        """What runs on the targets: `node:node-1`, `gpu:node-1/gpu-3`, `deployment:vllm-1`."""
        found = []
        for target in op.targets:
            kind, _, name = target.partition(":")
            node = name.partition("/")[0] if kind in ("gpu", "node") else ""
            found += [n.deployment for n in self.sim.estate.nodes if node == n.name or name == n.deployment]
        return found

    def _answer(self, op: Operation, at: float, status: OperationStatus) -> OperationReport:
        return OperationReport(
            id=op.id, verb=op.verb, at=at, status=status, attempt=op.attempt, targets=op.targets, dry_run=op.dry_run,
            undo_ref=f"undo-{op.id}" if status == "succeeded" and op.verb == "start" else "",
            predicted={"targets": len(op.targets)} if op.dry_run else {},
        )  # fmt: skip
