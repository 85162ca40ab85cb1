"""What the LiteLLM guard does with a call, without LiteLLM: so that it is tested without a proxy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flyball.remediation.points._litellm_calls import RULES, Groups, labels_of, record_of
from flyball.remediation.points.client import PointClient
from flyball.remediation.points.matching import Effect

_OPEN: Final = 10_000
"""Calls under way that are remembered; beyond it the oldest is forgotten, and charged to nobody."""
_OUTPUT_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "completion": ("max_tokens", "max_completion_tokens"),
    "text_completion": ("max_tokens",),
    "anthropic_messages": ("max_tokens",),
    "responses": ("max_output_tokens",),
}
"""Kind of call → the fields that say how much it may produce; the first is set where none is."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call that is stopped: HTTP status, text for the caller, seconds to wait (0 where waiting does not help)."""

    status: int
    text: str
    retry_after_s: float


class Obeyer:
    """Applies the directives that a client holds to requests of a LiteLLM proxy. Never waits, never fails a call by itself.

    Args:
        groups: the proxy's model groups as they are now.
        rules: where labels come from, when they are not the default ones.
    """

    def __init__(
        self,
        client: PointClient,
        groups: Callable[[], Groups],
        rules: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._client = client
        self._groups = groups
        self._rules = {**RULES, **(rules or {})}
        self._open: OrderedDict[str, Effect] = OrderedDict()
        self._mixed: OrderedDict[str, tuple[dict[str, str], str]] = OrderedDict()

    # --- before the call ------------------------------------------------------------------------------------------

    def obey(self, data: dict[str, Any], call_type: str) -> Refusal | None:
        """Changes the request in place as the directives want it, or says why it is stopped."""
        if not self._client.live():
            return None
        group = data.get("model")
        group = group if isinstance(group, str) else ""
        groups = self._groups()
        own = groups.labels(group)
        labels = {**labels_of(record_of(data), self._rules), **own}
        call_id = _text(data.get("litellm_call_id"))
        key = labels.get("run") or call_id

        def reachable(target: Mapping[str, str]) -> bool:
            return bool(groups.target(group, _difference(labels, target)))

        effect = self._client.apply(labels, key, reachable)
        if effect.refused:
            return Refusal(effect.status, effect.refused, effect.retry_after_s)
        moved = _difference(labels, effect.labels)
        if moved:
            data["model"] = groups.target(group, moved)
        if effect.max_output_tokens is not None:
            _cap_output(data, call_type, effect.max_output_tokens)
        if call_id and effect.charges:
            _remember(self._open, call_id, effect)
        if call_id and not moved and "provider" not in own:
            _remember(self._mixed, call_id, (labels, key))
        return None

    def among(self, call_id: str, deployments: list[Any]) -> list[Any]:
        """Of a group that spans providers, the deployments that redirects leave to this call; all when none would be left."""
        asked = self._mixed.get(call_id)
        if asked is None or len(deployments) < 2:
            return deployments
        labels, key = asked
        groups = self._groups()
        named = [groups.deployment(d) if isinstance(d, Mapping) else None for d in deployments]
        providers = {d.provider for d in named if d is not None}
        kept: list[Any] = []
        left: dict[str, None] = {}
        for raw, one in zip(deployments, named, strict=True):
            if one is None:
                return deployments
            here = {**labels, "provider": one.provider, "model": one.model, "deployment": one.name}
            effect = self._client.decide(here, key, lambda to: to.get("provider") in providers, _REDIRECTS)
            if effect.redirected:
                left.update(dict.fromkeys(effect.applied))
            else:
                kept.append(raw)
        if not kept or not left:
            return deployments
        self._client.count(left)
        return kept

    # --- after it -------------------------------------------------------------------------------------------------

    def charge(self, call_id: str, tokens: float | None, usd: float | None) -> None:
        """What a call has cost, whether or not a limit let it through."""
        self._mixed.pop(call_id, None)
        self._client.charge(self._open.pop(call_id, _UNLIMITED), tokens=tokens, usd=usd)


_UNLIMITED: Final = Effect({})
_REDIRECTS: Final[Container[str]] = frozenset({"redirect"})


def _difference(labels: Mapping[str, str], target: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in target.items() if labels.get(k) != v}


def _cap_output(data: dict[str, Any], call_type: str, most: int) -> None:
    kind = call_type.removeprefix("a") if call_type != "anthropic_messages" else call_type
    fields = _OUTPUT_FIELDS.get(kind, ())
    present = [f for f in fields if data.get(f) is not None]
    for name in present or fields[:1]:
        wanted = data.get(name)
        is_less = isinstance(wanted, int | float) and not isinstance(wanted, bool) and wanted <= most
        if not is_less:
            data[name] = most


def _remember(where: OrderedDict[str, Any], key: str, value: Any) -> None:
    where[key] = value
    while len(where) > _OPEN:
        where.popitem(last=False)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
