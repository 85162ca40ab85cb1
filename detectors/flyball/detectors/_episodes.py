"""Episodes: from "away from normal" per window to on, still and off, with hysteresis; and the one shared cool-down."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from flyball.core.anomaly import Anomaly, Phase
from flyball.core.codec import pack_state, unpack_state
from flyball.core.errors import ConfigError

Bools = NDArray[np.bool_]
K = TypeVar("K", bound=Hashable)


class Step(msgspec.Struct, frozen=True):
    """Which rows changed phase in one window: indices into the arrays handed to `Episodes.step`, ascending."""

    on: NDArray[np.int64]
    still: NDArray[np.int64]
    off: NDArray[np.int64]


class Episodes:
    """Phases of many series at once, by slot. A series is away, or quiet, or neither (too little data to say).

    `on` at the first alarm; `still` in every later window that is away; `off` after `off_after` quiet windows with no
    window away between them that together hold at least `off_events` events. So a fault that comes and goes faster
    than `off_after` windows stays one episode. Windows without data are not fed, and change nothing.

    Args:
        off_after: quiet windows in a row before an episode ends; >= 1.
        off_events: events that those windows must hold together; recovery on one lucky call is none.
    """

    def __init__(self, off_after: int = 3, off_events: float = 0.0) -> None:
        if off_after < 1:
            raise ConfigError(f"off_after must be at least 1, not {off_after}")
        self.off_after = off_after
        self.off_events = off_events
        self.since: NDArray[np.float64] = np.full(0, np.nan)
        """float64[capacity]: when the episode began, seconds since the epoch; NaN while there is none."""
        self.n_open = 0
        """Slots with an episode."""
        self._quiet: NDArray[np.int16] = np.zeros(0, np.int16)
        self._quiet_events: NDArray[np.float32] = np.zeros(0, np.float32)

    def grow(self, capacity: int) -> None:
        more = capacity - len(self.since)
        if more > 0:
            self.since = np.concatenate([self.since, np.full(more, np.nan)])
            self._quiet = np.concatenate([self._quiet, np.zeros(more, np.int16)])
            self._quiet_events = np.concatenate([self._quiet_events, np.zeros(more, np.float32)])

    def forget(self, slots: NDArray[np.int64]) -> None:
        """The slots mean other series now: whatever was open in them ends without a word (there is nobody to speak of)."""
        if self.n_open:
            self.n_open -= int(np.count_nonzero(~np.isnan(self.since[np.unique(slots)])))
        self.since[slots] = np.nan
        self._quiet[slots] = 0
        self._quiet_events[slots] = 0.0

    def active(self, slots: NDArray[np.int64]) -> Bools:
        if not self.n_open:
            return np.zeros(len(slots), np.bool_)
        return ~np.isnan(self.since[slots])

    def step(
        self,
        slots: NDArray[np.int64],
        alarm: Bools,
        away: Bools,
        quiet: Bools,
        onset: NDArray[np.float64],
        events: NDArray[np.float64] | None = None,
    ) -> Step:
        """One window. All arguments have one row per series with data.

        Args:
            slots: int64[n], each at most once.
            alarm: opens an episode where none is open.
            away: keeps an open one going (weaker than `alarm`: hysteresis).
            quiet: back to normal in this window; rows neither away nor quiet change nothing.
            onset: float64[n], seconds since the epoch: what `since` becomes where an episode opens.
            events: float64[n], events that the window held; only needed with `off_events`.
        """
        self.grow(int(slots.max()) + 1 if len(slots) else 0)
        was = self.active(slots)
        on = np.flatnonzero(alarm & ~was)
        open_rows = np.flatnonzero(was)
        self.since[slots[on]] = onset[on]
        self.n_open += len(on)
        self._quiet[slots[on]] = 0
        self._quiet_events[slots[on]] = 0.0
        still = open_rows[away[open_rows] | alarm[open_rows]]
        self._quiet[slots[still]] = 0
        self._quiet_events[slots[still]] = 0.0
        calm = open_rows[(quiet & ~away & ~alarm)[open_rows]]
        at = slots[calm]
        self._quiet[at] = np.minimum(self._quiet[at] + 1, 32_000)
        if events is not None:
            self._quiet_events[at] += events[calm].astype(np.float32)
        done = (self._quiet[at] >= self.off_after) & (
            (self._quiet_events[at] >= self.off_events) if self.off_events > 0 else True
        )
        return Step(on=on, still=still, off=calm[done])

    def close(self, slots: NDArray[np.int64]) -> None:
        """To be called for `off` rows after their anomalies were made (which still need `since`)."""
        self.forget(slots)

    def pack(self) -> dict[str, bytes]:
        """Only the open ones: they are few."""
        slots = np.flatnonzero(~np.isnan(self.since))
        return {
            "slots": slots.astype("<i8").tobytes(),
            "since": self.since[slots].astype("<f8").tobytes(),
            "quiet": self._quiet[slots].astype("<i2").tobytes(),
            "events": self._quiet_events[slots].astype("<f4").tobytes(),
        }

    def load(self, state: dict[str, bytes]) -> None:
        slots = np.frombuffer(state["slots"], "<i8")
        self.since = np.full(int(slots.max()) + 1 if len(slots) else 0, np.nan)
        self._quiet = np.zeros(len(self.since), np.int16)
        self._quiet_events = np.zeros(len(self.since), np.float32)
        self.since[slots] = np.frombuffer(state["since"], "<f8")
        self._quiet[slots] = np.frombuffer(state["quiet"], "<i2")
        self._quiet_events[slots] = np.frombuffer(state["events"], "<f4")
        self.n_open = len(slots)


class KeyedEpisodes(Generic[K]):
    """The same, one series at a time under any key: for detectors that read events (runs, GPUs) and have few series open.

    >>> e = KeyedEpisodes[str](off_after=2)
    >>> [e.step("gpu0", at=t, away=t < 30) for t in (10.0, 20.0, 30.0, 40.0, 50.0)]
    ['on', 'still', None, 'off', None]
    """

    def __init__(self, off_after: int = 3) -> None:
        if off_after < 1:
            raise ConfigError(f"off_after must be at least 1, not {off_after}")
        self.off_after = off_after
        self._open: dict[K, tuple[float, int]] = {}
        self._ended: dict[K, float] = {}

    def step(self, key: K, at: float, away: bool | None, since: float | None = None) -> Phase | None:
        """`away` None: no data to judge by, which says nothing. `since` (default `at`) is when an opening episode began."""
        if away is None:
            return None
        if key not in self._open:
            if not away:
                return None
            self._open[key] = (at if since is None else since, 0)
            return "on"
        began, quiet = self._open[key]
        if away:
            self._open[key] = (began, 0)
            return "still"
        if quiet + 1 >= self.off_after:
            return self.end(key)
        self._open[key] = (began, quiet + 1)
        return None

    def end(self, key: K) -> Phase | None:
        """Ends the episode now, if one is open: `off`. Its `since` stays readable until the key's next step."""
        found = self._open.pop(key, None)
        if found is None:
            return None
        self._ended = {key: found[0]}
        return "off"

    def since(self, key: K) -> float:
        """When the open (or just ended) episode began. Raises: KeyError when there is none."""
        if key in self._open:
            return self._open[key][0]
        return self._ended[key]

    def is_open(self, key: K) -> bool:
        return key in self._open

    def keys(self) -> list[K]:
        """Keys with an open episode, oldest opening first."""
        return list(self._open)

    def pack(self) -> list[tuple[K, float, int]]:
        return [(key, since, quiet) for key, (since, quiet) in self._open.items()]

    def load(self, state: Sequence[Sequence[Any]]) -> None:
        """Keys that msgpack turned from tuples into lists become tuples again."""
        found: dict[Any, tuple[float, int]] = {}
        for key, since, quiet in state:
            found[tuple(key) if isinstance(key, list) else key] = (float(since), int(quiet))
        self._open = found
        self._ended = {}


_Key = tuple[str, str, str, tuple[tuple[str, str], ...]]


class _CoolDownState(msgspec.Struct):
    ended: list[tuple[_Key, str, float, float, int]]
    renamed: list[tuple[str, str, float, int]]


class CoolDown:
    """The one cool-down, outside the detectors: an episode that comes back soon is the same episode.

    After an `off`, an `on` of the same detector for the same signal, class and labels within `cooldown_s` gets the id and the
    `since` of the one that ended, and `evidence["reopened"]` counts how often; its `still` and `off` follow. So a fault that
    comes and goes is one episode, whatever the detector made of it. Holds nothing back.

    Misleads when two different faults of one kind hit the same thing within `cooldown_s`: they read as one.

    Args:
        cooldown_s: seconds of event time, >= 0; 0 turns it off.

    Raises: ConfigError when cooldown_s is negative.
    """

    kind: Final = "cool_down"

    def __init__(self, cooldown_s: float = 600.0) -> None:
        if not cooldown_s >= 0:
            raise ConfigError(f"cooldown_s must not be negative, is {cooldown_s}")
        self.cooldown_s = float(cooldown_s)
        self._ended: dict[_Key, tuple[str, float, float, int]] = {}
        self._renamed: dict[str, tuple[str, float, int]] = {}

    def feed(self, batch: Sequence[Anomaly]) -> list[Anomaly]:
        return [self._one(a) for a in batch]

    def _one(self, a: Anomaly) -> Anomaly:
        key: _Key = (a.detector, a.signal, a.klass, tuple(sorted(a.labels.items())))
        if a.phase == "on":
            before = self._ended.pop(key, None)
            if before is not None and before[0] != a.id and a.at - before[2] <= self.cooldown_s:
                self._renamed[a.id] = (before[0], before[1], before[3] + 1)
        renamed = self._renamed.get(a.id)
        if renamed is not None:
            first_id, since, times = renamed
            evidence = {**a.evidence, "reopened": times}
            if a.phase == "off":
                del self._renamed[a.id]
            a = msgspec.structs.replace(a, id=first_id, since=min(since, a.since), evidence=evidence)
        if a.phase == "off" and self.cooldown_s > 0:
            self._ended[key] = (a.id, a.since, a.at, renamed[2] if renamed else 0)
        return a

    def tick(self, now: float) -> list[Anomaly]:
        """Forgets what ended longer than `cooldown_s` before `now` (event time)."""
        late = [key for key, (_, _, at, _) in self._ended.items() if now - at > self.cooldown_s]
        for key in late:
            del self._ended[key]
        return []

    def snapshot(self) -> bytes:
        state = _CoolDownState(
            ended=[(key, *value) for key, value in self._ended.items()],
            renamed=[(key, *value) for key, value in self._renamed.items()],
        )
        return pack_state(self.kind, 1, state)

    def restore(self, state: bytes) -> None:
        """Raises: SnapshotError when the bytes are of another stage or damaged."""
        found = unpack_state(state, self.kind, 1, _CoolDownState)
        self._ended = {key: (id_, since, at, times) for key, id_, since, at, times in found.ended}
        self._renamed = {key: (id_, since, times) for key, id_, since, times in found.renamed}
