"""What the executor remembers: running plans, where each of their steps stands, and what is said about them."""

from __future__ import annotations

import hashlib
from typing import Any, Final, Literal

import msgspec

from flyball.core.codec import SnapshotError, pack_state, unpack_state
from flyball.core.directives import Outcome
from flyball.core.ids import short_id
from flyball.core.plans import Plan, PlanStep
from flyball.core.stops import Stops
from flyball.remediation.leases import Leases
from flyball.remediation.operations import Work

Result = Literal[
    "not_accepted",
    "applied",
    "failed",
    "ambiguous",
    "verified",
    "unverified",
    "undone",
    "released",
    "expired",
    "cancelled",
    "waiting",
]
Phase = Literal["asking", "sending", "acting", "held", "easing", "left", "undoing", "unclear", "over"]

_VERSION: Final = 2


class Stage(msgspec.Struct):
    """Where one step of a running plan stands.

    directive: id of its lease or operation. index: stage of the lease. before: figures just before it acted.
    phase: `asking` a person · `sending` an operation that is not done yet · `acting`, to be verified · `held`, verified or
    left behind by the next rung · `easing`, stepping down before it is let go · `left` in force after a failure, until
    it expires · `undoing` · `unclear`, nobody knows whether it is in force · `over`.
    more: what comes next is still to begin, since `proved_at`.
    ends: result and reason to be said once an operation is undone or cancelled.
    """

    directive: str = ""
    index: int = 0
    phase: Phase = "acting"
    granted_at: float = 0.0
    stage_at: float = 0.0
    deadline_at: float = 0.0
    """By when the last stage must be verified; of `asking` when it counts as a no; of `unclear` when it is given up."""
    before: dict[str, float] = {}
    in_force: bool = False
    reported_at: float | None = None
    applied_at: float | None = None
    """When a point last reported that it applied the lease to a call: redirected, capped, refused."""
    checked_at: float = 0.0
    more: bool = False
    proved_at: float = 0.0
    relapses: int = 0
    work: Work | None = None
    ends: tuple[Result, str] = ("cancelled", "")

    @property
    def effective(self) -> bool:
        """Whether it has, or may have, an effect on the world."""
        return self.phase not in ("asking", "over")


class Run(msgspec.Struct):
    """A plan that is being carried out. going: whether further stages and steps may begin."""

    plan: Plan
    stages: list[Stage] = []
    going: bool = True

    def pairs(self) -> list[tuple[Stage, PlanStep]]:
        return list(zip(self.stages, self.plan.steps, strict=False))

    @property
    def over(self) -> bool:
        begun_all = len(self.stages) == len(self.plan.steps)
        return all(s.phase == "over" for s in self.stages) and (begun_all or not self.going)


class News(msgspec.Struct):
    """What is known of an incident: its signal and class, who made the changes related to it, and when it was resolved."""

    at: float
    signal: str = ""
    actors: tuple[str, ...] = ()
    resolved_at: float | None = None
    klass: str = ""


class State(msgspec.Struct):
    runs: dict[str, Run] = {}
    done: dict[str, float] = {}
    incidents: dict[str, News] = {}
    leases: Leases = msgspec.field(default_factory=Leases)
    stops: Stops = msgspec.field(default_factory=Stops)
    now: float = 0.0


class _Sealed(msgspec.Struct):
    digest: bytes
    state: bytes


def pack(state: State) -> bytes:
    """With a digest: safety state that was damaged must never be read as something else."""
    body = msgspec.msgpack.encode(state)
    return pack_state("executor", _VERSION, _Sealed(_digest(body), body))


def unpack(data: bytes) -> State:
    """Raises: SnapshotError when the bytes are of another stage or version, damaged, or contradict themselves."""
    sealed: _Sealed = unpack_state(data, "executor", _VERSION, _Sealed)
    if _digest(sealed.state) != sealed.digest:
        raise SnapshotError(
            "snapshot of executor is damaged: its digest does not agree; rebuild it from the log"
        )
    try:
        state = msgspec.msgpack.decode(sealed.state, type=State)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as e:
        raise SnapshotError(f"snapshot of executor is damaged: {e}") from e
    wrong = _contradiction(state)
    if wrong:
        raise SnapshotError(f"snapshot of executor contradicts itself: {wrong}")
    return state


def _contradiction(state: State) -> str:
    held: set[str] = set()
    for key, run in state.runs.items():
        if key != run.plan.plan_hash or len(run.stages) > len(run.plan.steps):
            return f"plan {key} is not the one that runs under this name"
        for stage, step in run.pairs():
            mismatch = (step.kind == "operation") != (stage.work is not None)
            if stage.effective and (mismatch or not 0 <= stage.index < len(step.stages)):
                return f"step {step.id} of {key} stands nowhere"
            held.add(stage.directive)
    for key, lease in state.leases.live.items():
        if key != lease.id or not lease.scope or lease.epoch < 1 or key not in held:
            return f"lease {key} belongs to no running plan"
    return ""


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


def waiting_hash(plan: Plan, step: PlanStep) -> str:
    """What an answer to a step that asks refers to: bound to the plan's targets and params through its hash."""
    return short_id("STEP", plan.plan_hash, step.id, length=10)


def outcome(
    plan: Plan, step: PlanStep | None, at: float, result: Result, reason: str, values: dict[str, Any],
    stage: Stage | None = None,
) -> Outcome:  # fmt: skip
    """Every outcome carries the hash of its plan, and of what it speaks: the lease, or the operation."""
    more: dict[str, Any] = {"plan": plan.plan_hash}
    operation = stage is not None and stage.work is not None
    if stage is not None and operation:
        more["operation"] = stage.directive
    return Outcome(
        at=at,
        incident=plan.incident,
        runbook=plan.runbook,
        step=step.id if step else "",
        action=step.action if step else "",
        result=result,
        reason=reason,
        directive=stage.directive if stage is not None and not operation else "",
        values={**values, **more},
    )


def mark_end(out: list[Any], plan: Plan) -> None:
    """Marks the last outcome of a plan in what is about to be said as its last of all."""
    for i in range(len(out) - 1, -1, -1):
        said = out[i]
        if isinstance(said, Outcome) and said.values.get("plan") == plan.plan_hash:
            out[i] = msgspec.structs.replace(said, values={**said.values, "plan_ended": True})
            return


def params_of(step: PlanStep, index: int) -> dict[str, Any]:
    return {k: v for k, v in step.stages[index].items() if isinstance(v, int | float | str)}


def stage_text(step: PlanStep, index: int) -> str:
    """`stage 1/2: share=0.25`."""
    params = ", ".join(
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in params_of(step, index).items()
    )
    return f"stage {index + 1}/{len(step.stages)}: {params}"
