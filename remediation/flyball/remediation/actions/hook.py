"""`hook`: asks a platform team's own automation for what no lease can do: drain a node, roll back a prompt."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Final

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from flyball.core.entities import ENTITY_KINDS, LABEL_OF, Entity
from flyball.core.plans import DurationS, Effect, Frozen, HookCall, PlanContext, Refusal
from flyball.remediation.actions._action import (
    CALL_LABELS,
    MIN_LEASE_S,
    REST,
    ROOT_REFERENCE,
    SEEN_S,
    ActionParams,
    baseline_of,
    check_name,
    root_scope,
    traffic_scope,
)

_WORD: Final = re.compile(r"[a-z0-9](?:[a-z0-9_.-]{0,62}[a-z0-9])?", re.ASCII)
MAX_TARGETS: Final = 100
MAX_PARAMS_BYTES: Final = 8192


def _targets(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Target = Annotated[str, Field(min_length=1, max_length=512)]


class Hook:
    """Asks a remediation hook of the settings to do something to targets that are resolved once and frozen.

    Targets are written `kind:name`. What was done is undone by the hook when `for` is over, or earlier when the incident is resolved.
    """

    kind: ClassVar[str] = "hook"
    effect: ClassVar[Effect] = "operation"
    references: ClassVar[frozenset[str]] = frozenset({ROOT_REFERENCE})

    class Params(ActionParams):
        """Written `hook: {name: drain-node, action: drain, targets: $incident.root, for: 1h}`."""

        name: str = Field(description="which hook, as the settings name it")
        action: str = Field(description="what it is asked to do: a word that the hook knows")
        targets: Annotated[
            tuple[Target, ...],
            BeforeValidator(_targets, json_schema_input_type=Target | list[Target]),
        ] = Field(
            (ROOT_REFERENCE,),
            description="`$incident.root`, or a list of names such as `node:gpu-7`",
            validate_default=True,
        )
        given: dict[str, Any] = Field(
            {}, alias="with", description="values handed to the hook as they are; literals only"
        )
        hold: DurationS = Field(3600.0, alias="for", description="when it is undone at the latest")
        dry_run: bool = Field(
            True, description="asks the hook first what it would do, and compares the targets"
        )

        @field_validator("name", "action")
        @classmethod
        def _a_word(cls, value: str) -> str:
            if not _WORD.fullmatch(value):
                raise ValueError(f"{value[:60]!r} is no name; write lower case words such as drain-node")
            return value

        @field_validator("targets")
        @classmethod
        def _known_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
            if not 1 <= len(value) <= MAX_TARGETS:
                raise ValueError(f"targets are one to {MAX_TARGETS}; none is refused, never read as all")
            for target in value:
                if target != ROOT_REFERENCE:
                    check_name(target, "a target")
            if len(set(value)) != len(value):
                raise ValueError("a target is named twice")
            return value

        @field_validator("given")
        @classmethod
        def _plain_values(cls, value: dict[str, Any]) -> dict[str, Any]:
            try:
                text = json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as e:
                raise ValueError("`with` takes texts, numbers, yes or no, and lists of them") from e
            if len(text) > MAX_PARAMS_BYTES:
                raise ValueError(f"`with` is longer than {MAX_PARAMS_BYTES} bytes of JSON")
            if re.search(r'"\$', text):
                raise ValueError("`with` takes literals only; what the incident is about goes into targets")
            return value

        @field_validator("hold")
        @classmethod
        def _long_enough(cls, value: float) -> float:
            if value < MIN_LEASE_S:
                raise ValueError("`for` must be at least 30s")
            return value

    @classmethod
    def freeze(cls, params: BaseModel, context: PlanContext) -> Frozen | Refusal:
        """Resolves the targets, and how many GPUs they hold.

        Returns: Refusal `no_target` when the root names nothing, `unmeasured` when the GPUs of a node or GPU are not known.
        """
        if not isinstance(params, cls.Params):
            return Refusal("bad_params", f"{type(params).__name__} is not a hook's", {})
        root = context.incident.root
        scope = root_scope(context.incident)
        if not scope or root.name == REST:
            return Refusal(
                "no_target", f"the root {root} is nothing that can be acted on", {"root": str(root)}
            )
        targets = tuple(dict.fromkeys(str(root) if t == ROOT_REFERENCE else t for t in params.targets))
        gpus = _gpus(targets, context)
        if isinstance(gpus, Refusal):
            return gpus
        measured = _served_on(root, context) or traffic_scope(context.incident) or scope
        return Frozen(
            scope=scope,
            stages=({},),
            source=measured,
            target=measured,
            hold_s=params.hold,
            lease_s=params.hold,
            locks=targets,
            # What no call carries takes no share of the calls away by itself; its GPUs are counted instead.
            max_share=1.0 if root.label in CALL_LABELS else 0.0,
            release="resolved",
            hook=HookCall(
                hook=params.name,
                action=params.action,
                targets=targets,
                params=dict(params.given),
                dry_run_first=params.dry_run,
            ),
            baseline=baseline_of(context.incident),
            gpus=gpus,
        )


def _served_on(root: Entity, context: PlanContext) -> dict[str, str]:
    """The inference server on a GPU or node, as its samples name it: what becomes of its calls is how a drain is proved."""
    for name in context.estate.values("deployment", {}, SEEN_S) if root.kind in ("gpu", "node") else ():
        if context.estate.gpus({root.kind: root.name, "deployment": name}, SEEN_S):
            return {"deployment": name}
    return {}


def entity_of(target: str) -> Entity | None:
    """The entity that a target names; None for a name of the hook's own."""
    kind, _, name = target.partition(":")
    return Entity(kind, name) if kind in ENTITY_KINDS and name else None


def _gpus(targets: tuple[str, ...], context: PlanContext) -> int | Refusal | None:
    """How many GPUs the targets hold; None when they are nothing that holds any."""
    held: set[str] = set()
    counted = False
    for target in targets:
        entity = entity_of(target)
        if entity is None or entity.kind not in ("gpu", "node", "deployment"):
            continue
        found = context.estate.gpus({LABEL_OF.get(entity.kind, entity.kind): entity.name}, SEEN_S)
        if not found and entity.kind != "deployment":
            return Refusal(
                "unmeasured",
                f"{target} told of no GPU in 5 min: how many are touched is not known",
                {"target": target},
            )
        held.update(found)
        counted = counted or bool(found)
    return len(held) if counted else None
