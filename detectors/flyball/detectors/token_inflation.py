"""Calls that use more tokens than is normal, with the reason: longer prompts, longer answers, more calls or another mix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from flyball.core.anomaly import Phase
from flyball.core.columns import Rollup, Window
from flyball.core.errors import ConfigError
from flyball.detectors._budget import PageBudget
from flyball.detectors._decompose import Usage, split_tokens
from flyball.detectors._level import Evidence, Level, LevelDetector, LevelParams, Reading, Watch, variance_of
from flyball.detectors._mix import CellCodes, CellRows, by_row, tenant_scale
from flyball.detectors._state import Bools, Column, Floats, Ints, Table, find_rollup, half_life_weight

_COLUMN: Final = {"llm.input_tokens": "input_tokens", "llm.output_tokens": "output_tokens"}
_APP: Final = ("app",)
_PROMPT: Final = ("app", "prompt")
_MODEL: Final = ("app", "model")
_AGENT: Final = ("app", "agent")
_SIBLINGS: Final = 64
"""Prompt versions of one app that are remembered as possible predecessors, newest last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(LevelParams):
    """See `LevelParams`; half as many again is the least that evidence is gathered for.

    Args:
        judge_agents: also judge calls that carry an agent label by their tokens per call. Off: in good agent runs the prompt grows
            tenfold from first to last call, so such calls are judged per step and run, elsewhere, and are left out here.
        head_start_ratio: share of the evidence for an alarm that a prompt version with a predecessor begins with, in [0, 1): what
            changes tokens is a new version far more often than an hour picked at random. It spends little of the page budget: at
            half of 19.5 nats, 10,000 new versions cost half a false page.
    """

    judge_agents: bool = False
    head_start_ratio: float = 0.5

    def __post_init__(self) -> None:
        LevelParams.__post_init__(self)
        if not isinstance(self.judge_agents, bool):
            raise ConfigError("token_inflation needs judge_agents true or false")
        if not 0 <= self.head_start_ratio < 1:
            raise ConfigError("token_inflation needs 0 <= head_start_ratio < 1")


class _Usage:
    """Normal calls, input and output tokens per window of each series, for the split of a change into its reasons."""

    def __init__(self) -> None:
        self.table = Table({"use": Column(width=3), "windows": Column()})

    def learn(self, rollup: Rollup, keep: float, teaches: Floats) -> None:
        self.table.align(rollup)
        ids, t = rollup.ids, self.table
        now = np.stack([rollup.calls, rollup.sums["input_tokens"], rollup.sums["output_tokens"]], axis=1)
        gain = (np.maximum(1 - keep, 1 / (t["windows"][ids] + 1)) * teaches).astype(np.float32)
        old = t["use"][ids]
        t["use"][ids] = old + gain[:, None] * (now.astype(np.float32) - old)
        t["windows"][ids] += teaches.astype(np.float32)

    def normal(self, slot: int, per_minute: float) -> Usage:
        calls, inputs, outputs = (float(v) * per_minute for v in self.table["use"][slot])
        return Usage(calls, inputs, outputs)

    def inherit(self, slot: int, donor: int) -> None:
        self.table["use"][slot] = self.table["use"][donor]
        self.table["windows"][slot] = self.table["windows"][donor]

    def known(self, slot: int) -> bool:
        return slot < len(self.table.born) and bool(self.table["windows"][slot] > 0)


class TokenInflation(LevelDetector):
    """Tokens per call depart from the normal of an app, prompt version, model within an app (or agent, if asked for).

    Signals `llm.input_tokens` and `llm.output_tokens`. Judges the mean of ln(tokens), so one giant prompt weighs little, and holds
    every tenant at a third of a window's calls, so that one client's burst weighs little too.
    A prompt version that is new starts with the normal of its predecessor (same name, other version), else of its app, widened by
    how much that app's prompts differ. With a predecessor it starts under suspicion besides (`head_start_ratio`): a version that
    doubles the tokens is seen in its first windows.

    Evidence: `split_prompt`, `split_output`, `split_calls`, `split_mix` are shares of the change of tokens per minute, against
    normal, and sum to 1; `tokens_per_min` and `baseline_tokens_per_min` are what changed.

    When it misleads: at app level a move of calls to a prompt that is longer by nature shows as inflation; `split_mix` says
    so where the prompts use different models.

    Source: Lucas & Crosier (1982), "Fast initial response for CUSUM quality-control schemes", for the head start.
    """

    kind: ClassVar[str] = "token_inflation"
    klass: ClassVar[str] = "inflation"
    unit: ClassVar[str] = "tokens/call"

    def __init__(self, params: Params | None = None, budget: PageBudget | None = None) -> None:
        self.params = params if params is not None else Params()
        scopes = [_APP, _PROMPT, _MODEL, *([_AGENT] if self.params.judge_agents else [])]
        super().__init__([Watch(signal, by) for signal in _COLUMN for by in scopes], self.params, budget)
        self._usage = {by: _Usage() for by in scopes}
        self._prompts: dict[str, list[tuple[str, int]]] = {}
        """app → [(prompt name, slot)], newest last."""
        self._cell_rows = {by: CellRows() for by in scopes}
        self._tenant, self._agent = CellCodes(("tenant",)), CellCodes(("agent",))
        self._seen = -np.inf
        """Start of the window that `_tenants` and `_ours` (bool[cells]: calls that no agent made) are of: caches."""
        self._tenants: Ints = np.zeros(0, np.int64)
        self._ours: Bools = np.zeros(0, np.bool_)
        self._models: tuple[float, dict[str, list[int]], dict[int, int]] = (-np.inf, {}, {})
        """Start of the window it was made for, app → slots of its models, slot → row: a cache."""

    # --- reading --------------------------------------------------------------------------------------------------

    def read(self, watch: Watch, rollup: Rollup, window: Window) -> Reading | None:
        name = _COLUMN[watch.signal]
        cells, n_rows = window.cells, len(rollup)
        if len(cells) and set(watch.by) <= set(cells.by) and "tenant" in cells.by:
            if self._seen != window.start:
                self._seen = window.start
                self._tenants = self._tenant.of(window)
                self._ours = (
                    self._agent.of(window) == 0 if "agent" in cells.by else np.ones(len(cells), np.bool_)
                )
            row = self._cell_rows[watch.by].of(window, rollup)
            if not self.params.judge_agents:
                row = np.where(self._ours, row, -1)
            told = cells.counts[name].astype(np.float64)
            scale = tenant_scale(row, self._tenants, told, n_rows)
            parts = (told, cells.sums[f"log_{name}"], cells.sums[f"log2_{name}"])
            calls, logs, squares = by_row(row, n_rows, *(scale * part for part in parts))
        else:
            calls = rollup.counts[name].astype(np.float64)
            logs, squares = rollup.sums[f"log_{name}"], rollup.sums[f"log2_{name}"]
        rows = np.flatnonzero(calls > 0.5)
        n = calls[rows]
        x = logs[rows] / n
        return Reading(rows, x, n, variance_of(n, x, squares[rows]))

    # --- a new prompt version ---------------------------------------------------------------------------------------

    def born(self, watch: Watch, rollup: Rollup, slots: Ints, window: Window) -> None:
        if watch.by != _PROMPT:
            return
        usage = self._usage[_PROMPT]
        if watch.signal == "llm.input_tokens":  # the first of the two watches over this roll-up
            usage.table.align(rollup)
            self._forget(set(slots.tolist()))
        apps = find_rollup(window, _APP)
        app_slots = {apps.labels[slot][0]: slot for slot in apps.ids.tolist()} if apps is not None else {}
        app_at, prompt_at = rollup.by.index("app"), rollup.by.index("prompt")
        level, app_level = self.levels[watch], self.levels[Watch(watch.signal, _APP)]
        for slot in slots.tolist():
            app, prompt = rollup.labels[slot][app_at], rollup.labels[slot][prompt_at]
            name = prompt.rpartition("@")[0] or prompt
            siblings = self._prompts.setdefault(app, [])
            known = [(n, s) for n, s in siblings if s != slot and _is_warm(level, s)]
            older = [s for n, s in known if n == name]
            if older:
                level.inherit(slot, level, older[-1])
                level.head_start(slot, self._head_start(window), window.start)
                usage.inherit(slot, older[-1])
            elif app in app_slots and _is_warm(app_level, app_slots[app]):
                means = level.mean(np.array([s for _, s in known], np.int64)).astype(np.float64)
                spread = float(np.var(means, ddof=1)) if len(means) > 1 else 0.0
                level.inherit(slot, app_level, app_slots[app], extra_variance=spread)
            if (name, slot) not in siblings:
                siblings.append((name, slot))
                del siblings[:-_SIBLINGS]

    def _head_start(self, window: Window) -> float:
        return self.params.head_start_ratio * self.budget.nats(self.period_s(window))

    def _forget(self, slots: set[int]) -> None:
        """Slots that came to mean other prompts are nobody's predecessors any more."""
        for app in list(self._prompts):
            self._prompts[app] = [(n, s) for n, s in self._prompts[app] if s not in slots]
            if not self._prompts[app]:
                del self._prompts[app]

    # --- why ------------------------------------------------------------------------------------------------------

    def learned(self, window: Window) -> None:
        keep = half_life_weight(window.end - window.start, self.params.half_life_s)
        for by, usage in self._usage.items():
            rollup = find_rollup(window, by)
            if rollup is None or not len(rollup):
                continue
            teaches = np.ones(len(rollup))
            for signal in _COLUMN:
                teaches[self.levels[Watch(signal, by)].suspect(rollup.ids)] = 0.0
            usage.learn(rollup, keep, teaches)

    def facts(self, watch: Watch, rollup: Rollup, row: int, window: Window, phase: Phase) -> Evidence:
        per_minute = 60.0 / (window.end - window.start)
        now = _usage_of(rollup, row, per_minute)
        facts: Evidence = {
            "calls_per_min": round(now.calls, 3),
            "tokens_per_min": round(now.input_tokens + now.output_tokens, 3),
            "input_tokens_per_call": round(now.input_tokens / max(now.calls, 1e-9), 3),
            "output_tokens_per_call": round(now.output_tokens / max(now.calls, 1e-9), 3),
        }
        usage = self._usage[watch.by]
        slot = int(rollup.ids[row])
        if phase != "on" or not usage.known(slot):
            return facts
        before, after = {"": usage.normal(slot, per_minute)}, {"": now}
        if watch.by == _APP:
            models = self._by_model(rollup.labels[slot][0], window, per_minute)
            if models is not None:
                before, after = models
        split = split_tokens(before, after)
        facts["baseline_tokens_per_min"] = round(split.before, 3)
        facts |= {f"split_{name}": round(share, 6) for name, share in split.shares().items()}
        return facts

    def _by_model(
        self, app: str, window: Window, per_minute: float
    ) -> tuple[dict[str, Usage], dict[str, Usage]] | None:
        """Normal and present usage of an app's models; None where the windows do not tell models apart."""
        rollup = find_rollup(window, _MODEL)
        if rollup is None:
            return None
        if self._models[0] != window.start:  # one walk over the labels, however many apps alarm in one window
            slots: dict[str, list[int]] = {}
            app_at = rollup.by.index("app")
            for slot, labels in enumerate(rollup.labels):
                slots.setdefault(labels[app_at], []).append(slot)
            rows = {slot: row for row, slot in enumerate(rollup.ids.tolist())}
            self._models = (window.start, slots, rows)
        _, slots, rows = self._models
        model_at, usage = rollup.by.index("model"), self._usage[_MODEL]
        before, after = {}, {}
        for slot in slots.get(app, ()):
            model = rollup.labels[slot][model_at]
            if usage.known(slot):
                before[model] = usage.normal(slot, per_minute)
            if slot in rows:
                after[model] = _usage_of(rollup, rows[slot], per_minute)
        return (before, after) if before and after else None

    # --- state ----------------------------------------------------------------------------------------------------

    def pack_more(self) -> Any:
        return {
            "usage": [[list(by), usage.table.pack()] for by, usage in self._usage.items()],
            "prompts": [[app, [list(p) for p in prompts]] for app, prompts in self._prompts.items()],
        }

    def load_more(self, state: Any) -> None:
        for by, packed in state["usage"]:
            self._usage[tuple(by)].table.load(packed)
        self._prompts = {app: [(name, slot) for name, slot in prompts] for app, prompts in state["prompts"]}
        self._cell_rows = {by: CellRows() for by in self._cell_rows}
        self._tenant, self._agent = CellCodes(("tenant",)), CellCodes(("agent",))
        self._seen = -np.inf
        self._models = (-np.inf, {}, {})


def _is_warm(level: Level, slot: int) -> bool:
    return slot < len(level.table.born) and bool(level.warm(np.array([slot]))[0])


def _usage_of(rollup: Rollup, row: int, per_minute: float) -> Usage:
    return Usage(
        float(rollup.calls[row]) * per_minute,
        float(rollup.sums["input_tokens"][row]) * per_minute,
        float(rollup.sums["output_tokens"][row]) * per_minute,
    )
