"""Where alerts go: channels, who gets what, and the secrets that open them. Everything here is written by people."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.incident import Incident, IncidentChange, Severity, State
from flyball.core.plugins import Registry
from flyball.remediation.http_guard import Allowed

_STRICT = ConfigDict(extra="forbid", hide_input_in_errors=True)


def registry() -> Registry:
    """Every kind of notifier that is installed."""
    return Registry("notifiers", importlib.import_module("flyball.remediation.notifiers"))


def labels_of(incident: Incident) -> dict[str, str]:
    """What `match` in the settings looks at: the scope, the root, and `signal`, `class`, `root_kind`."""
    return {
        **incident.scope,
        incident.root.label: incident.root.name,
        "signal": incident.signal,
        "class": incident.klass,
        "root_kind": incident.root.kind,
    }


def matches(patterns: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether every label is there and fits its pattern (`*` and `?`); no patterns match everything."""
    return all(name in labels and fnmatchcase(labels[name], pattern) for name, pattern in patterns.items())


class OwnerRule(BaseModel):
    """Whose incidents these are. The first rule that matches names the owner."""

    model_config = _STRICT

    owner: str = Field(
        min_length=1, max_length=80, description="Name of the team, as in a channel's `owners`."
    )
    match: dict[str, str] = Field(
        default_factory=dict,
        description="Labels of the incident and patterns for them, e.g. `{provider: anthropic*}`; "
        "also `signal`, `class` and `root_kind`. All must fit; none given fits everything.",
    )


class Channel(BaseModel):
    """One place that alerts are sent to, and which ones.

    The settings of the kind may stand under `params` or beside the others: `{kind: slack, url: …}` is enough for a start.
    """

    model_config = _STRICT

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$",
        description="Name of the channel, each one once; the kind when not given.",
    )
    kind: str = Field(
        description="`terminal`, `slack`, `pagerduty`, `alertmanager`, `webhook`, or an installed one."
    )
    min_severity: Severity = Field(
        Severity.LOW,
        description="`low`, `medium`, `high` or `critical`; less severe incidents do not go here.",
    )
    owners: list[str] = Field(
        default_factory=list, description="Only incidents of these owners; everyone's when empty."
    )
    match: dict[str, str] = Field(
        default_factory=dict,
        description="Only incidents whose labels fit these patterns; see the owners' `match`.",
    )
    pages_only: bool | None = Field(
        None,
        description="Only incidents that may wake a person. Without a word: yes for kinds that wake people (`pagerduty`).",
    )
    params: SerializeAsAny[BaseModel] = Field(description="Settings of the kind; see docs/alerts.md.")

    @field_validator("min_severity", mode="before")
    @classmethod
    def _severity(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        words = {s.name.lower(): s for s in Severity} | {s.sev.lower(): s for s in Severity}
        if value.lower() not in words:
            raise ValueError(f"{value!r} is no severity; known: low, medium, high, critical")
        return words[value.lower()]

    @model_validator(mode="before")
    @classmethod
    def _params_of_kind(cls, data: object) -> object:
        """Reads `params` with the model of the kind, so that secrets are secrets from the first moment."""
        if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
            return data
        try:
            model: type[BaseModel] = registry().get(data["kind"]).Params
        except ConfigError as e:
            raise ValueError(e.what) from e
        given = data.get("params")
        beside = {k: v for k, v in data.items() if k not in cls.model_fields}
        rest = {"name": data["kind"]} | {k: v for k, v in data.items() if k in cls.model_fields}
        if isinstance(given, model) and not beside:
            return {**rest, "params": given}
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"params of a {data['kind']} channel are written as `name: value` lines")
        if twice := sorted(beside.keys() & (given or {}).keys()):
            raise ValueError(f"{twice[0]!r} stands both under `params` and beside it; keep one")
        try:
            params = model.model_validate((given or {}) | beside)
        except ValidationError as e:
            # Without its inputs: they can be secrets.
            raise ValueError("; ".join(_fault(x, model) for x in e.errors(include_input=False))) from None
        return {**rest, "params": params}

    @property
    def notifier_class(self) -> Any:
        return registry().get(self.kind)

    @property
    def edits(self) -> bool:
        return bool(self.notifier_class.edits(self.params))

    def wants(self, change: IncidentChange, owner: str) -> bool:
        """Whether a change that people are to hear of goes here, when nothing of its incident did before."""
        return change.notify and _wanted(self, change.incident, owner, labels_of(change.incident))

    @property
    def only_pages(self) -> bool:
        return bool(self.notifier_class.wakes) if self.pages_only is None else self.pages_only


def _fault(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    name = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{name}: no such setting{did_you_mean(name, model.model_fields)}"
    what = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {what}" if name else what


class EgressSettings(BaseModel):
    """What notifiers may reach beside the public internet; private and loopback addresses are refused otherwise."""

    model_config = _STRICT

    networks: list[str] = Field(
        default_factory=list, description="Networks that may be reached, e.g. `10.0.0.0/8` or `127.0.0.0/8`."
    )
    hosts: list[str] = Field(
        default_factory=list,
        description="Names that may point to private addresses, e.g. `alertmanager.monitoring.svc`.",
    )

    @model_validator(mode="after")
    def _networks_are_networks(self) -> EgressSettings:
        try:
            self.allowed()
        except ConfigError as e:
            raise ValueError(e.what) from e
        return self

    def allowed(self) -> Allowed:
        return Allowed.of(self.networks, self.hosts)


@dataclass(frozen=True, slots=True)
class Route:
    """That a change goes to a channel, and why, in the words that stand in the alert."""

    channel: str
    why: str
    owner: str


class NotifySettings(BaseModel):
    """Where alerts go."""

    model_config = _STRICT

    channels: list[Channel] = Field(default_factory=list, description="The places that alerts are sent to.")
    owners: list[OwnerRule] = Field(
        default_factory=list, description="Whose incidents are whose; the first rule that matches counts."
    )
    templates: Path | None = Field(
        None, description="Folder with own templates; a broken one is refused and the built-in one used."
    )
    egress: EgressSettings = Field(
        default_factory=EgressSettings, description="Private addresses that notifiers may reach."
    )

    @model_validator(mode="after")
    def _names_agree(self) -> NotifySettings:
        names = [c.name for c in self.channels]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two channels are called {twice[0]!r}; each needs a name of its own")
        known = {r.owner for r in self.owners}
        for channel in self.channels:
            if unknown := [o for o in channel.owners if o not in known]:
                raise ValueError(
                    f"channel {channel.name!r} wants incidents of {unknown[0]!r}, but no rule under `owners` names that owner"
                )
        return self

    def owner_of(self, incident: Incident) -> str:
        """The owner by the first rule that matches; empty when none does."""
        labels = labels_of(incident)
        return next((r.owner for r in self.owners if matches(r.match, labels)), "")

    def routes(self, change: IncidentChange, already: Collection[str] = ()) -> list[Route]:
        """The channels that a change goes to, in the order of the settings.

        Args:
            already: channels that had something of this incident before: they get how it goes on, even when it would not be
                sent there today, so that nothing stays open in a place that was told of it.

        A silenced incident goes nowhere new; where it is known, its end is told. Changes that nobody needs to hear of go only
        to channels that bring their message up to date in place.
        """
        incident = change.incident
        owner, labels = self.owner_of(incident), labels_of(incident)
        silenced = incident.silenced_until is not None and change.at < incident.silenced_until
        found = []
        for channel in self.channels:
            known = channel.name in already
            if not (change.notify or (known and channel.edits)):
                continue
            if silenced and not (known and (channel.edits or incident.state is State.RESOLVED)):
                continue
            if known or _wanted(channel, incident, owner, labels):
                found.append(Route(channel.name, _why(channel, owner), owner))
        return found


def _wanted(channel: Channel, incident: Incident, owner: str, labels: Mapping[str, str]) -> bool:
    return (
        incident.severity >= channel.min_severity
        and (incident.page or not channel.only_pages)
        and (not channel.owners or owner in channel.owners)
        and matches(channel.match, labels)
    )


def _why(channel: Channel, owner: str) -> str:
    parts = []
    if channel.min_severity > Severity.LOW:
        parts.append(f"severity ≥ {channel.min_severity.name.lower()}")
    if channel.only_pages:
        parts.append("pages")
    if channel.match:
        parts.append(" and ".join(f"{k} {v}" for k, v in channel.match.items()))
    what = ", ".join(parts) or "every incident"
    return (
        f"{what} on owner {owner} (channel {channel.name})" if owner else f"{what} (channel {channel.name})"
    )


def with_secrets(raw: Any, environ: Mapping[str, str], where: str = "notify") -> Any:
    """Settings as read from YAML, with every `{env: NAME}` replaced by that variable's value.

    So a file names its secrets without holding them. Raises: ConfigError for a variable that is not set.
    """
    if isinstance(raw, dict):
        if set(raw) == {"env"} and isinstance(raw["env"], str):
            if not environ.get(raw["env"]):
                raise ConfigError(
                    f"the variable {raw['env']} is not set; set it, or give the value itself", where=where
                )
            return environ[raw["env"]]
        return {k: with_secrets(v, environ, f"{where}.{k}") for k, v in raw.items()}
    if isinstance(raw, list):
        return [with_secrets(v, environ, f"{where}[{i}]") for i, v in enumerate(raw)]
    return raw
