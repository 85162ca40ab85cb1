"""How a call looks inside the LiteLLM proxy before it is made: its labels, and where a group's calls could go instead.

Labels are named as Flyball's `litellm` format names them when the proxy reports the call afterwards, by the same rules
(`labels.litellm` in flyball.yaml): a directive's scope must select the calls that the incident was about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

LABELS: Final = ("team", "app", "tenant", "prompt", "run", "key", "agent", "region")
"""In the order in which they are resolved; a rule `=team` may only name an earlier one."""
RULES: Final[dict[str, tuple[str, ...]]] = {
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
"""The same as the format's own; a test holds them together."""
MAX_LABEL: Final = 512
PROVIDERS: Final[dict[str, str]] = {
    "bedrock_converse": "bedrock", "amazon_bedrock": "bedrock", "azure_text": "azure", "google_ai_studio": "gemini",
    "vertex_ai_beta": "vertex_ai", "cohere_chat": "cohere", "text-completion-openai": "openai", "together_ai": "together",
    "fireworks_ai": "fireworks", "mistralai": "mistral", "x_ai": "xai", "watsonx_ai": "watsonx", "moonshotai": "moonshot",
}  # fmt: skip
"""LiteLLM's names of providers that Flyball writes in another way."""
SPREAD: Final = frozenset({"provider", "model", "deployment"})
"""Labels that a redirect or a cap can change here: they follow from the model group."""


def provider_name(raw: str) -> str:
    """LiteLLM's provider as Flyball names it."""
    name = raw.strip().lower()
    return PROVIDERS.get(name, name)[:MAX_LABEL]


def model_name(raw: str) -> str:
    """The model without the provider before it: `openai/gpt-4.1` is `gpt-4.1`."""
    head, slash, tail = raw.partition("/")
    return (tail if slash and tail and head.replace("_", "").isalnum() else raw)[:MAX_LABEL]


# --- labels ------------------------------------------------------------------------------------------------------


def record_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """A request as the proxy holds it before the call, in the shape of the record that it reports afterwards."""
    own, litellm = _mapping(data.get("metadata")), _mapping(data.get("litellm_metadata"))
    # Some routes keep the proxy's own notes apart, because `metadata` is part of what the provider gets.
    notes = litellm if "user_api_key" in litellm or "requester_metadata" in litellm else own
    key = notes.get("user_api_key")
    metadata = dict(notes)
    if not notes.get("user_api_key_hash") and isinstance(key, str) and len(key) == 64:
        metadata["user_api_key_hash"] = key
    if notes is own and not notes.get("requester_metadata"):
        metadata["requester_metadata"] = own.get("metadata")
    if data.get("prompt_id"):
        metadata["prompt_management_metadata"] = {"prompt_id": data["prompt_id"]}
    return {
        "metadata": metadata,
        "end_user": notes.get("user_api_key_end_user_id"),
        "session_id": None,
        "trace_id": data.get("litellm_session_id")
        or data.get("litellm_trace_id")
        or notes.get("session_id")
        or notes.get("trace_id"),
        "request_tags": own.get("tags") or litellm.get("tags"),
    }


def labels_of(record: Mapping[str, Any], rules: Mapping[str, Sequence[str]] = RULES) -> dict[str, str]:
    """The labels of a record by the rules; the first source that is present wins.

    >>> labels_of({"end_user": "t3", "metadata": {"user_api_key_alias": "shop"}})["tenant"]
    't3'
    """
    found: dict[str, str] = {}
    for name in LABELS:
        for source in rules.get(name, ()):
            value = _read(source, record, found)
            if value:
                found[name] = value[:MAX_LABEL]
                break
    return found


def _read(source: str, record: Mapping[str, Any], found: Mapping[str, str]) -> str:
    if source.startswith("="):
        return found.get(source[1:], "")
    if source.startswith("tag:"):
        return _tag(record.get("request_tags"), source[4:])
    path, _, version_path = source.partition("@")
    value = _at(record, path)
    version = _at(record, version_path) if value and version_path else ""
    return f"{value}@{version}" if version else value


def _at(record: Mapping[str, Any], path: str) -> str:
    here: Any = record
    for step in path.split("."):
        if not isinstance(here, Mapping):
            return ""
        here = here.get(step)
    if isinstance(here, str):
        return here
    return str(here) if isinstance(here, int | float) and not isinstance(here, bool) else ""


def _tag(tags: Any, name: str) -> str:
    for tag in tags if isinstance(tags, list) else ():
        if isinstance(tag, str) and tag.startswith(f"{name}:"):
            return tag[len(name) + 1 :].strip()
    return ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# --- groups ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment behind a model group, as events name its provider, model and id."""

    provider: str
    model: str
    name: str


ProviderOf = Callable[[Mapping[str, Any]], tuple[str, str]]
"""`litellm_params` of a deployment → (model, provider) as LiteLLM will report them; empty where it cannot tell."""


class Groups:
    """The proxy's model groups, and which of them can stand in for which.

    Where a group's calls may go, in this order: what the setting names, what the router's own `fallbacks` name, a group of which
    every deployment serves the same models, and for a cap the group of that name.
    """

    def __init__(
        self,
        model_list: Sequence[Any],
        provider_of: ProviderOf,
        *,
        alternates: Mapping[str, Sequence[str]] | None = None,
        fallbacks: Sequence[Any] = (),
        aliases: Mapping[str, Any] | None = None,
    ) -> None:
        self._provider_of = provider_of
        self._groups: dict[str, list[Deployment]] = {}
        for item in model_list:
            entry = _mapping(item)
            name = entry.get("model_name")
            if isinstance(name, str):
                self._groups.setdefault(name, []).append(self.deployment(entry))
        self._aliases = {a: _alias_target(t) for a, t in (aliases or {}).items()}
        self._alternates: dict[str, list[str]] = {k: list(v) for k, v in (alternates or {}).items()}
        for entry in fallbacks:
            for group, others in _mapping(entry).items():
                if isinstance(others, list):
                    self._alternates.setdefault(group, []).extend(o for o in others if isinstance(o, str))
        self._found: dict[tuple[str, tuple[tuple[str, str], ...]], str] = {}

    def deployment(self, entry: Mapping[str, Any]) -> Deployment:
        """One entry of the router's model list."""
        model, provider = self._provider_of(_mapping(entry.get("litellm_params")))
        identity = str(_mapping(entry.get("model_info")).get("id") or "")
        group = str(entry.get("model_name") or "")
        short = identity if len(identity) <= 40 else identity[:12]
        return Deployment(provider_name(provider), model_name(model), f"{group}/{short}" if short else group)

    def labels(self, group: str) -> dict[str, str]:
        """Labels that every deployment of a group agrees on; where they differ, nobody knows yet where the call will go."""
        deployments = self._of(group)
        found = {
            "provider": {d.provider for d in deployments},
            "model": {d.model for d in deployments},
            "deployment": {d.name for d in deployments},
        }
        return {
            name: next(iter(values))
            for name, values in found.items()
            if len(values) == 1 and "" not in values
        }

    def target(self, group: str, wanted: Mapping[str, str]) -> str:
        """The group to which calls of `group` go so that they have the wanted labels; empty when there is none.

        Never a group that could send the call anywhere else: all of its deployments must fit.
        """
        key = (group, tuple(sorted(wanted.items())))
        if key not in self._found:
            if len(self._found) >= 10_000:
                self._found.clear()
            self._found[key] = self._find(group, wanted)
        return self._found[key]

    def _find(self, group: str, wanted: Mapping[str, str]) -> str:
        if not wanted or not set(wanted) <= SPREAD:
            return ""
        own = self._aliases.get(group, group)
        named = [*self._alternates.get(own, ()), *self._alternates.get("*", ())]
        models = {d.model for d in self._of(own)}
        alike = [g for g in sorted(self._groups) if {d.model for d in self._groups[g]} == models]
        if "model" in wanted:
            alike = [wanted["model"], *self._same_provider_first(own)]
        candidates: list[str] = [*named, *alike]
        for candidate in candidates:
            there = self._groups.get(candidate, [])
            # A wildcard is no name that a call could be sent to.
            if (
                there
                and candidate != own
                and "*" not in candidate
                and all(_fits(d, wanted, candidate) for d in there)
            ):
                return candidate
        return ""

    def _same_provider_first(self, group: str) -> list[str]:
        providers = {d.provider for d in self._of(group)}
        return sorted(self._groups, key=lambda g: ({d.provider for d in self._groups[g]} != providers, g))

    def _of(self, group: str) -> list[Deployment]:
        group = self._aliases.get(group, group)
        if group in self._groups:
            return self._groups[group]
        for name, deployments in self._groups.items():
            if name.endswith("*") and group.startswith(name[:-1]):
                # A wildcard group serves what it is asked for.
                return [Deployment(d.provider, model_name(group), d.name) for d in deployments]
        return []


def _fits(deployment: Deployment, wanted: Mapping[str, str], group: str) -> bool:
    for name, value in wanted.items():
        if name == "model":
            if value not in (deployment.model, group):
                return False
        elif name == "provider":
            if deployment.provider != value:
                return False
        elif deployment.name != value:
            return False
    return True


def _alias_target(target: Any) -> str:
    named: Any = _mapping(target).get("model") if isinstance(target, Mapping) else target
    return named if isinstance(named, str) else ""
