"""What the actions share."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

from flyball.core.incident import Incident

PROBE_SHARE: Final = 0.05
"""Share of the traffic that is always left in place: without it nobody could see that the primary has recovered."""

ROOT_REFERENCE: Final = "$incident.root"


class ActionParams(BaseModel):
    """Base of every action's `Params`: unknown fields are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def root_scope(incident: Incident) -> dict[str, str]:
    """The labels that select the traffic of the incident's root."""
    return {incident.root.label: incident.root.name} if incident.root.name else {}
