"""What a person may set about incidents. Every threshold of the severity rules stands here, with its unit."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from flyball.core.incident import Severity


def _vanish() -> dict[str, float]:
    return {"run": 300.0, "prompt_version": 900.0, "agent": 3600.0, "tenant": 21600.0, "app": 86400.0}


class SeveritySettings(BaseModel):
    """When an incident is how bad. A rule that reaches HIGH pages under the default `page_at`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failed_ratio_high: float = Field(0.10, gt=0, le=1)
    """Share of the root's calls that fail, from which on the incident is HIGH."""
    failed_ratio_medium: float = Field(0.02, gt=0, le=1)
    rate_limited_ratio_high: float = Field(0.20, gt=0, le=1)
    """Rate limits are waited out by clients: a larger share has to fail before a person is woken."""
    failed_calls_high: int = Field(10, ge=1)
    """Fewer failed calls than this never page, whatever their share."""
    failed_at_once_ratio: float = Field(0.15, gt=0, le=1)
    """Share of which the calls so far must leave no doubt (99 %) for the incident to be HIGH at once."""
    failed_lasts_s: float = Field(60.0, ge=0)
    """How long a smaller one, or one seen in few calls, must last: providers have spells of half a minute several times a day,
    which are over before anybody could look."""
    failed_estate_critical: float = Field(0.5, gt=0, le=1)
    """Share of all calls of the estate that fail, from which on the incident is CRITICAL."""
    slow_factor_high: float = Field(1.8, gt=1)
    """Latency or time to first token against the expected one."""
    slow_calls_high: int = Field(20, ge=1)
    token_factor_high: float = Field(1.7, gt=1)
    token_factor_medium: float = Field(1.2, gt=1)
    token_calls_high: int = Field(20, ge=1)
    excess_usd_per_min_high: float = Field(1.0, gt=0)
    """Money above the expected, from which on token and cost incidents are HIGH whatever the factor."""
    excess_usd_high: float = Field(20.0, ge=0)
    """Incidents about nothing but cost must have cost so much more besides: a client's burst of a minute wakes nobody."""
    retry_factor_high: float = Field(1.8, gt=1)
    """Calls against the expected number of calls."""
    loop_usd_per_min_high: float = Field(0.0, ge=0)
    """A confirmed loop at this velocity or above is HIGH; 0 means that every confirmed loop pages."""
    weak_loop_s: float = Field(120.0, ge=0)
    """How long a streak of failures or of no progress must last before it pages; repeats and cycles page at once."""
    spend_usd_per_min_high: float = Field(1.0, ge=0)
    """For runs that spend much, fan out or grow without looping."""
    gpu_impact_high: float = Field(0.5, ge=0, le=1)
    """`Anomaly.impact` of a GPU fault from which on hardware is lost, not only an application."""
    serving_impact_high: float = Field(0.9, gt=0)
    """`Anomaly.impact` of a saturated inference server from which on it is HIGH by itself."""


class IncidentSettings(BaseModel):
    """How anomalies become incidents, how long these live, and who is woken. All spans are event time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    page_at: Severity = Severity.HIGH
    """Severity from which on an incident wakes a person."""
    quiet_s: float = Field(60.0, ge=0)
    """All anomalies must be off this long, with data, before an incident resolves."""
    reopen_s: float = Field(900.0, ge=0)
    """The same trouble within this long after resolution reopens the incident."""
    update_s: float = Field(30.0, gt=0)
    """At most one update in place per incident and this span, unless something important changed."""
    consequence_s: float = Field(600.0, ge=0)
    """How long after a change of one of our own directives its side effects belong to the incident that caused it."""
    changes_s: float = Field(3600.0, ge=0)
    """Changes this long before and after the start of an incident are shown with it."""
    vanish_s: dict[str, float] = Field(default_factory=_vanish)
    """Root kinds whose silence means that nobody suffers any more, and after how long. Other kinds never resolve by silence."""
    explained_ratio: float = Field(0.5, gt=0, le=1)
    """Share of an anomaly's excess that must lie within an incident's scope for it to join."""
    root_margin: float = Field(0.2, ge=0, le=1)
    """By how much another root must be more likely before an open incident changes its root."""
    runs_to_agent: int = Field(3, ge=2)
    """From so many looping runs of one agent on, the agent is the root, not a run."""
    gpus_to_node: int = Field(2, ge=2)
    """From so many failing GPUs of one node on, the node is the root."""
    ring_windows: int = Field(90, ge=6)
    ring_rows: int = Field(200_000, ge=1_000)
    """Bound on rows (cell × window) kept in full; older ones melt into the decayed baseline."""
    baseline_half_life_s: float = Field(1800.0, gt=0)
    max_cells: int = Field(250_000, ge=1_000)
    max_open: int = Field(500, ge=1)
    """Over this many open incidents, further anomalies that no incident explains are only counted."""
    max_members: int = Field(2_000, ge=10)
    """Anomalies remembered per incident; further ones count, but are not kept."""
    max_names: int = Field(20_000, ge=100)
    """Apps and tenants counted exactly per incident."""
    history: int = Field(1_000, ge=0)
    """Resolved incidents remembered, for reopening and for "seen before"."""
    max_runs: int = Field(20_000, ge=100)
    max_edges: int = Field(50_000, ge=100)
    severity: SeveritySettings = SeveritySettings()
