"""The life of an incident as a table: which step leads from which state to which, and what is refused.

open → acknowledged → mitigating → verifying → resolved; reopened is open again, with a counter. People act through
`ack`, `resolve`, `reopen` and `silence`; everything else follows from telemetry and from what remediation reports.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.incident import State


class Step(StrEnum):
    """What can happen to an incident. `ease` is the end of the last directive while the trouble goes on."""

    ACK = "ack"
    MITIGATE = "mitigate"
    VERIFY = "verify"
    DOUBT = "doubt"
    EASE = "ease"
    RESOLVE = "resolve"
    REOPEN = "reopen"


TABLE: Final[dict[tuple[State, Step], State]] = {
    (State.OPEN, Step.ACK): State.ACKNOWLEDGED,
    (State.OPEN, Step.MITIGATE): State.MITIGATING,
    (State.OPEN, Step.RESOLVE): State.RESOLVED,
    (State.ACKNOWLEDGED, Step.MITIGATE): State.MITIGATING,
    (State.ACKNOWLEDGED, Step.RESOLVE): State.RESOLVED,
    # Somebody takes an incident that is already being mitigated: who it is is noted, the state stays.
    (State.MITIGATING, Step.ACK): State.MITIGATING,
    (State.MITIGATING, Step.VERIFY): State.VERIFYING,
    (State.MITIGATING, Step.EASE): State.OPEN,
    (State.MITIGATING, Step.RESOLVE): State.RESOLVED,
    (State.VERIFYING, Step.ACK): State.VERIFYING,
    (State.VERIFYING, Step.DOUBT): State.MITIGATING,
    (State.VERIFYING, Step.EASE): State.OPEN,
    (State.VERIFYING, Step.RESOLVE): State.RESOLVED,
    (State.RESOLVED, Step.REOPEN): State.OPEN,
}
"""(state, step) → state. What is not here is refused."""

COMMANDS: Final[dict[str, Step | None]] = {
    "ack": Step.ACK,
    "acknowledge": Step.ACK,
    "resolve": Step.RESOLVE,
    "reopen": Step.REOPEN,
    "silence": None,
}
"""What people may ask for. `silence` changes no state."""

_WHY_NOT: Final[dict[tuple[State, Step], str]] = {
    (State.ACKNOWLEDGED, Step.ACK): "it is acknowledged already",
    (State.RESOLVED, Step.ACK): "it is resolved; reopen it first",
    (State.RESOLVED, Step.RESOLVE): "it is resolved already",
}


def allowed(state: State, step: Step) -> bool:
    return (state, step) in TABLE


def advance(state: State, step: Step, incident: str = "") -> State:
    """The state after a step.

    Raises: ConfigError, with what would be right, when the table does not know the step from this state.

    >>> advance(State.OPEN, Step.ACK)
    <State.ACKNOWLEDGED: 'acknowledged'>
    """
    new = TABLE.get((state, step))
    if new is None:
        why = _WHY_NOT.get((state, step))
        if why is None:
            steps = ", ".join(str(s) for s in Step if (state, s) in TABLE)
            why = f"it is {state}, from where it can only: {steps}"
        raise ConfigError(f"cannot {step} {incident or 'the incident'}: {why}", code="IN101")
    return new


def command_step(kind: str) -> Step | None:
    """The step of a person's command; None for `silence`. Raises: ConfigError for a word that is no command."""
    if kind not in COMMANDS:
        raise ConfigError(f"unknown command {kind!r}{did_you_mean(kind, COMMANDS)}", code="IN100")
    return COMMANDS[kind]
