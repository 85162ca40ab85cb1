"""Where an event's labels come from: ordered lists of sources, the first that is present wins.

A source is one of

- `a.b.c`: for LiteLLM the path into the record; for OTLP the attribute of that name, of the span, else of its resource
  (attribute names hold dots themselves);
- `a.b@c.d`: name and version, joined as `name@version`; the name alone where the version is missing;
- `tag:x`: for LiteLLM the request tag `x:value`;
- `=label`: what another label (`app`, `team`, …) was found to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from flyball.core.errors import ConfigError, did_you_mean

LABELS: Final[tuple[str, ...]] = ("team", "app", "tenant", "prompt", "run", "key", "agent", "region")
"""Labels that rules fill, in the order in which they are resolved; a `=label` may only name an earlier one."""

Rules = Mapping[str, tuple[str, ...]]

LITELLM: Final[Rules] = {
    "team": ("metadata.user_api_key_team_alias", "metadata.user_api_key_team_id"),
    "app": ("metadata.requester_metadata.app", "tag:app", "metadata.user_api_key_alias"),
    "tenant": ("end_user", "=team"),
    "prompt": (
        "metadata.prompt_management_metadata.prompt_id@metadata.prompt_management_metadata.prompt_version",
        "tag:prompt",
    ),
    "run": ("metadata.requester_metadata.session_id", "session_id", "trace_id"),
    "key": ("metadata.user_api_key_alias", "metadata.user_api_key_hash"),
    "agent": ("metadata.requester_metadata.agent", "tag:agent"),
    "region": ("metadata.requester_metadata.region", "tag:region"),
}

OTLP: Final[Rules] = {
    "team": (
        "team.name",
        "metadata.user_api_key_team_alias",
        "metadata.user_api_key_team_id",
        "traceloop.association.properties.team",
        "ai.telemetry.metadata.team",
    ),
    "app": ("service.name",),
    "tenant": (
        "user.id",
        "enduser.id",
        "traceloop.association.properties.user_id",
        "ai.telemetry.metadata.userId",
        "langfuse.user.id",
        "=team",
    ),
    "prompt": (
        "gen_ai.prompt.name@gen_ai.prompt.version",
        "traceloop.prompt.key@traceloop.prompt.version",
        "prompt.id@llm.prompt_template.version",
    ),
    "run": (
        "gen_ai.conversation.id",
        "session.id",
        "traceloop.association.properties.session_id",
        "traceloop.association.properties.conversation_id",
        "traceloop.association.properties.thread_id",
        "ai.telemetry.metadata.sessionId",
        "langfuse.session.id",
        "gen_ai.agent.call.id",
    ),
    "key": ("metadata.user_api_key_alias", "metadata.user_api_key_hash"),
    "agent": ("gen_ai.agent.name", "agent.name", "ai.telemetry.functionId"),
    "region": ("cloud.region",),
}


@dataclass(frozen=True, slots=True)
class LabelRules:
    """The rules of both sources of labels. A label that a person overrides replaces the whole list for it.

    Raises: ConfigError for an unknown label, an empty source, or a `=label` that is not resolved before.

    >>> LabelRules.of(litellm={"app": ["metadata.requester_metadata.service"]}).litellm["app"]
    ('metadata.requester_metadata.service',)
    """

    litellm: Rules = field(default_factory=lambda: LITELLM)
    otlp: Rules = field(default_factory=lambda: OTLP)

    def __post_init__(self) -> None:
        for where, rules in (("labels.litellm", self.litellm), ("labels.otlp", self.otlp)):
            for label, sources in rules.items():
                if label not in LABELS:
                    raise ConfigError(f"unknown label {label!r}{did_you_mean(label, LABELS)}", where=where)
                for source in sources:
                    _check(source, label, f"{where}.{label}")

    @classmethod
    def of(
        cls,
        litellm: Mapping[str, list[str]] | None = None,
        otlp: Mapping[str, list[str]] | None = None,
    ) -> LabelRules:
        """The default rules with some labels' sources replaced: what a setting gives."""
        return cls(
            litellm={**LITELLM, **{k: tuple(v) for k, v in (litellm or {}).items()}},
            otlp={**OTLP, **{k: tuple(v) for k, v in (otlp or {}).items()}},
        )


def _check(source: str, label: str, where: str) -> None:
    if source.startswith("="):
        other = source[1:]
        if other not in LABELS or LABELS.index(other) >= LABELS.index(label):
            earlier = LABELS[: LABELS.index(label)]
            raise ConfigError(
                f"{source!r} is not a label resolved before {label!r}; can be: {', '.join(earlier)}",
                where=where,
            )
    elif not source or any(not part for part in source.removeprefix("tag:").replace("@", ".").split(".")):
        raise ConfigError(
            f"{source!r} is no source; write a path such as 'metadata.team', 'tag:team' or '=team'",
            where=where,
        )
