"""What one agent of one run did lately, as hashes, and the loop patterns that can be read off it.

A lane is about 1 kB: a ring of the last 32 steps and a few counters that make every pattern O(1) a step. Hashes are
CRC-32 because they must be the same in every process; 32 steps clash by chance once in ten million rings.
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

RING: Final = 32
MAX_PERIOD: Final = 6
_PERIODS: Final = range(2, MAX_PERIOD + 1)
_CAP: Final = 60_000  # counters are unsigned 16-bit

# Two low bits of a ring entry say what kind of step it was, so that no second ring is needed.
POLL: Final = 1
"""The tool's name says that it waits for something."""
BLIND: Final = 2
"""Arguments or result were not reported: equality means less."""
_HASH: Final = 0xFFFF_FFFC

_POLL_NAME: Final = re.compile(
    r"(?:^|[^a-z])(?:await|wait|poll|polling|sleep|status|heartbeat|health|healthz|ping|keepalive|progress|ready|readiness)"
    r"(?:$|[^a-z])"
)
_PAGE_NAME: Final = re.compile(
    r"(?:^|[^a-z])(?:next|more|page|pages|scroll|fetch_more|continue|cursor)(?:$|[^a-z])"
)
_HANDOFF_NAME: Final = re.compile(r"^(?:transfer|handoff|hand_off|delegate)(?:_|$)")
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

TRANSIENT: Final = frozenset({"rate_limited", "overloaded", "timeout", "connection", "server_error"})
"""Error classes that are worth a retry with growing gaps."""


def words(name: str) -> str:
    """`getJobStatus` and `get-job-status` read alike.

    >>> words("getJobStatus")
    'get_job_status'
    """
    return _CAMEL.sub("_", name).lower().replace("-", "_")


@functools.lru_cache(maxsize=4096)
def is_polling_name(tool: str) -> bool:
    """Whether the tool's name says that it waits: wait, poll, status, sleep, heartbeat, …

    >>> is_polling_name("getJobStatus"), is_polling_name("search_orders"), is_polling_name("statusquo")
    (True, False, False)
    """
    return _POLL_NAME.search(words(tool)) is not None


@functools.lru_cache(maxsize=4096)
def is_paging_name(tool: str) -> bool:
    return _PAGE_NAME.search(words(tool)) is not None


@functools.lru_cache(maxsize=4096)
def is_handoff_name(tool: str) -> bool:
    """Tools by which frameworks pass the turn on: `transfer_to_billing`."""
    return _HANDOFF_NAME.match(words(tool)) is not None


def crc(*parts: str) -> int:
    return zlib.crc32("\x1f".join(parts).encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class Rules:
    """How much of each pattern is enough. The defaults come from what agent frameworks use and from recorded good runs.

    `repeats`: equal call and result in a row. `patient_after`: productive steps after which a run is given one more repeat.
    `blind_repeats`: the same where arguments or results are not reported.
    `varying_repeats`: equal calls in a row whose results differ only trivially (same size within 2 %).
    `poll_repeats`: for tools whose names say that they wait, and for machine-regular gaps of `regular_gap_s` or more.
    `backoff_repeats`: while the gaps between the repeats keep growing.
    `cycles`, `blind_cycles`: times that a period of 2 to 6 steps must be seen.
    `failures`: unsuccessful results (each success takes one off), plus one per `patience_steps` productive steps, at most
    `max_failures`, plus `several_more` where it is not one tool that fails. `returns`: times that the turn came back to the
    agent before last, nothing else happening.
    `stale`: steps in a row that all repeat an earlier call and result. `window`, `distinct_ratio`: fewer distinct steps
    than this share of the last `window`.
    """

    repeats: int = 3
    patient_after: int = 12
    blind_repeats: int = 6
    varying_repeats: int = 20
    poll_repeats: int = 120
    regular_gap_s: float = 30.0
    backoff_repeats: int = 30
    hasty_gap_s: float = 0.5
    hasty_repeats: int = 20
    cycles: int = 3
    blind_cycles: int = 5
    failures: int = 3
    patience_steps: int = 3
    max_failures: int = 8
    several_more: int = 2
    returns: int = 6
    stale: int = 8
    window: int = 20
    distinct_ratio: float = 0.3


@dataclass(slots=True)
class Mark:
    """A moment of a run: where a pattern began, and what had been spent by then."""

    at: float = 0.0
    step: int = 0
    tokens: int = 0
    usd: float = 0.0

    def pack(self) -> list[float | int]:
        return [self.at, self.step, self.tokens, self.usd]

    @classmethod
    def load(cls, state: Sequence[Any]) -> Mark:
        return cls(float(state[0]), int(state[1]), int(state[2]), float(state[3]))


@dataclass(frozen=True, slots=True)
class Finding:
    """One pattern at one step: `count` of `needed`; `facts["looks_like"]` names the look-alike that was considered."""

    klass: str
    count: float
    needed: float
    period: int
    begin: Mark
    facts: dict[str, float | int | str | list[str]]

    @property
    def strength(self) -> float:
        return self.count / self.needed


@dataclass(frozen=True, slots=True)
class Action:
    """One tool call as a lane sees it."""

    at: float
    tool: str
    args: str
    result: str
    size: int | None
    error: str
    polling: bool
    """The tool waits for something: by its name, or because the settings say so."""


class Lane:
    """The recent steps of one agent of one run."""

    __slots__ = (
        "adj", "adj_call", "adj_mark", "ats", "call_mark", "call_matches", "call_size_max", "call_size_min", "calls", "error", "fail",
        "fail_count", "fail_mark", "fail_tool", "mark", "matches", "n", "pairs", "productive", "run_productive", "settled", "stale", "tool",
    )  # fmt: skip

    def __init__(self) -> None:
        self.n = 0
        self.settled = 0
        self.calls = array("I", bytes(4 * RING))
        self.pairs = array("I", bytes(4 * RING))
        self.ats = array("d", bytes(8 * RING))
        self.matches = array("H", bytes(2 * len(_PERIODS)))
        self.call_matches = array("H", bytes(2 * len(_PERIODS)))
        self.adj = 0
        self.adj_call = 0
        self.call_size_min = 0
        self.call_size_max = 0
        self.stale = 0
        self.productive = 0
        self.run_productive = 0
        self.fail = 0.0
        self.fail_count = 0
        self.fail_tool = ""
        self.tool = ""
        self.error = ""
        self.mark = Mark()
        self.adj_mark = Mark()
        self.call_mark = Mark()
        self.fail_mark = Mark()

    def add(self, action: Action, begin: Mark) -> None:
        """Takes one step in. `begin` is the run as it was before it (its `at` is the step's own)."""
        known_result = bool(action.result) or action.size is not None
        blind = not action.args or not (action.result or action.error)
        result = action.result or (f"{action.size}b" if action.size is not None else "")
        flags = (POLL if action.polling else 0) | (BLIND if blind else 0)
        if action.args or known_result:
            call = crc(action.tool, action.args) if action.args else crc(action.tool, "", result)
            pair = crc(action.tool, action.args, result, action.error)
        else:
            # Nothing but the tool's name: no two steps may be called equal.
            call = pair = crc(action.tool, str(self.n), str(action.at))
        call, pair = (call & _HASH) | flags, (pair & _HASH) | flags
        # Only the ring decides what is new: bounded memory forgets, and a run that comes back after 32 steps did go on.
        novel = pair not in (self.pairs if self.n >= RING else self.pairs[: self.n])
        waited = self.n > 0 and bool(self.pairs[(self.n - 1) % RING] & POLL)
        self._count_equal(action, call, pair, begin)
        at = self.n % RING
        self.calls[at], self.pairs[at], self.ats[at] = call, pair, action.at
        self.n += 1
        self._count_failures(action, begin)
        good = novel and not action.error
        if good:
            self.productive = min(self.productive + 1, _CAP)
            self.run_productive = min(self.run_productive + 1, _CAP)
            self.mark = begin
        else:
            self.run_productive = 0
        if novel:
            self.stale = 0
        elif not flags and self.adj == 1 and not waited:
            # The same step over and over is `_repeat`'s matter, which knows polling from loops; so is what follows a wait.
            self.stale = min(self.stale + 1, _CAP)
        self.tool, self.error = action.tool, action.error

    def _count_equal(self, action: Action, call: int, pair: int, begin: Mark) -> None:
        n = self.n
        before = (n - 1) % RING
        size = action.size if action.size is not None else -1
        if self.adj_call and self.calls[before] == call:
            self.adj_call = min(self.adj_call + 1, _CAP)
            self.call_size_min, self.call_size_max = (
                min(self.call_size_min, size),
                max(self.call_size_max, size),
            )
        else:
            self.adj_call, self.call_mark = 1, begin
            self.call_size_min = self.call_size_max = size
        if self.adj and self.pairs[before] == pair:
            self.adj = min(self.adj + 1, _CAP)
        else:
            self.adj, self.adj_mark = 1, begin
        for i, period in enumerate(_PERIODS):
            j = (n - period) % RING
            enough = n >= period
            self.matches[i] = min(self.matches[i] + 1, _CAP) if enough and self.pairs[j] == pair else 0
            self.call_matches[i] = (
                min(self.call_matches[i] + 1, _CAP) if enough and self.calls[j] == call else 0
            )

    def _count_failures(self, action: Action, begin: Mark) -> None:
        if not action.error:
            self.fail = max(0.0, self.fail - 1.0)
            if self.fail == 0.0:
                self.fail_count = 0
            return
        if self.fail == 0.0:
            self.fail_mark = begin
        weight = 1.0
        if action.polling:
            weight = 0.1  # "not ready yet" is often told as an error
        elif action.error in TRANSIENT:
            weight = (
                0.2 if _growing(self.gaps(3)) else 0.5
            )  # what may pass is worth a retry, with back-off above all
        self.fail += weight
        self.fail_count = min(self.fail_count + 1, _CAP)
        self.fail_tool = action.tool if self.fail_count == 1 or self.fail_tool == action.tool else "*"

    def gaps(self, steps: int) -> list[float]:
        """Seconds between the last `steps` steps, oldest first."""
        k = min(steps, self.n, RING)
        ats = [self.ats[(self.n - k + i) % RING] for i in range(k)]
        return [b - a for a, b in itertools.pairwise(ats)]

    def last(self, k: int) -> list[int]:
        """The last `k` ring entries, oldest first."""
        k = min(k, self.n, RING)
        return [self.pairs[(self.n - k + i) % RING] for i in range(k)]

    def settle(self) -> None:
        """A person said something: what comes now is a new matter."""
        self.adj = self.adj_call = self.stale = self.fail_count = 0
        self.fail = 0.0
        self.settled = self.n
        self.matches = array("H", bytes(2 * len(_PERIODS)))
        self.call_matches = array("H", bytes(2 * len(_PERIODS)))

    def findings(self, rules: Rules) -> list[Finding]:
        """Every pattern that reached what it needs, strongest first."""
        found = [
            f
            for f in (
                self._repeat(rules),
                self._varying(rules),
                self._failing(rules),
                self._cycle(rules),
                self._stale(rules),
            )
            if f is not None and f.count >= f.needed
        ]
        found.sort(key=lambda f: -f.strength)
        return found

    def _repeat(self, rules: Rules) -> Finding | None:
        if self.adj < 2:
            return None
        flags = self.pairs[(self.n - 1) % RING] & ~_HASH
        gaps = self.gaps(self.adj)
        needed = rules.blind_repeats if flags & BLIND else rules.repeats
        if not flags and self.productive >= rules.patient_after:
            needed += 1
        alike, least = look_alike(gaps, bool(flags & POLL), rules)
        facts: dict[str, float | int | str | list[str]] = {
            "gap_median_s": round(_median(gaps), 3),
            "result": "not reported" if flags & BLIND else "the same every time",
        }
        if alike:
            facts["looks_like"] = alike
        return Finding("repeat", self.adj, max(needed, least), 1, self.adj_mark, facts)

    def _varying(self, rules: Rules) -> Finding | None:
        """Equal calls whose results differ by nothing but, say, a timestamp: sizes within 2 % of each other."""
        if self.adj_call < rules.varying_repeats or self.adj >= self.adj_call or is_paging_name(self.tool):
            return None
        if self.call_size_min < 0 or self.call_size_max > self.call_size_min * 1.02 + 8:
            return None
        flags = self.calls[(self.n - 1) % RING] & ~_HASH
        gaps = self.gaps(self.adj_call)
        alike, least = look_alike(gaps, bool(flags & POLL), rules)
        facts: dict[str, float | int | str | list[str]] = {
            "gap_median_s": round(_median(gaps), 3),
            "result": f"differs, but is always {self.call_size_min} to {self.call_size_max} bytes long",
        }
        if alike:
            facts["looks_like"] = alike
        return Finding("repeat", self.adj_call, max(rules.varying_repeats, least), 1, self.call_mark, facts)

    def _failing(self, rules: Rules) -> Finding | None:
        if not self.error or self.fail_count < rules.failures:
            return None
        needed = min(rules.max_failures, rules.failures + self.productive // rules.patience_steps)
        if self.fail_tool == "*":
            needed += rules.several_more  # failing with one thing after another is looking for a way as well
        facts: dict[str, float | int | str | list[str]] = {
            "unsuccessful": self.fail_count,
            "error": self.error,
            "productive_steps_before": self.productive,
            "tools_failing": "several" if self.fail_tool == "*" else self.fail_tool,
        }
        return Finding("failing", self.fail, needed, 1, self.fail_mark, facts)

    def _cycle(self, rules: Rules) -> Finding | None:
        fewest = min(rules.cycles, rules.blind_cycles) - 1
        for i, period in enumerate(_PERIODS):
            if max(self.matches[i], self.call_matches[i]) < fewest * period:
                continue
            turn = self.last(period)
            if len(set(turn)) < 2:
                continue  # one step over and over is a repeat
            polls = any(t & POLL for t in turn)
            blind = any(t & BLIND for t in turn)
            matches = self.call_matches[i] if blind else self.matches[i]
            times = matches // period + 1
            needed = rules.blind_cycles if blind else rules.cycles
            alike = ""
            if not polls and times >= needed:
                alike, least = look_alike(self.gaps(min(RING, period * times)), False, rules)
                needed = max(needed, least)
            if polls:
                needed, alike = (
                    max(needed, rules.poll_repeats),
                    "polling: a tool of the cycle waits for something",
                )
            if times < needed:
                continue
            facts: dict[str, float | int | str | list[str]] = {
                "distinct_steps": len(set(turn)),
                "gap_median_s": round(_median(self.gaps(RING)), 3),
                "result": "not reported" if blind else "the same in every turn",
            }
            if alike:
                facts["looks_like"] = alike
            return Finding("cycle", times, needed, period, self.mark, facts)
        return None

    def _stale(self, rules: Rules) -> Finding | None:
        if not self.stale:
            return None  # the newest step was new
        lately = self.last(min(rules.window, self.n - self.settled))
        # Runs of one step count once, and neither waits nor what follows them count at all.
        recent = [
            b
            for a, b in itertools.pairwise([0, *lately])
            if a != b and not (a & POLL) and not b & (POLL | BLIND)
        ]
        distinct = len(set(recent))
        thin = 2 * len(recent) >= rules.window and distinct < rules.distinct_ratio * len(recent)
        if self.stale < rules.stale and not thin:
            return None
        alike, least = look_alike(self.gaps(len(lately)), False, rules)
        facts: dict[str, float | int | str | list[str]] = {
            "stale_steps": self.stale,
            "distinct_steps": distinct,
            "of_last_steps": len(recent),
        }
        if alike:
            facts["looks_like"] = alike
        if self.stale >= rules.stale:
            return Finding("no_progress", self.stale, max(rules.stale, least), 0, self.mark, facts)
        needed = len(recent) - int(rules.distinct_ratio * len(recent))
        return Finding("no_progress", len(recent) - distinct, max(needed, least), 0, self.mark, facts)

    def pack(self) -> list[Any]:
        return [
            self.n, self.calls.tobytes(), self.pairs.tobytes(), self.ats.tobytes(), self.matches.tobytes(),
            self.call_matches.tobytes(), self.adj, self.adj_call, self.call_size_min, self.call_size_max, self.stale,
            self.productive, self.run_productive, self.fail, self.fail_count, self.fail_tool, self.tool, self.error,
            self.mark.pack(), self.adj_mark.pack(), self.call_mark.pack(), self.fail_mark.pack(), self.settled,
        ]  # fmt: skip

    @classmethod
    def load(cls, s: Sequence[Any]) -> Lane:
        lane = cls()
        lane.n = int(s[0])
        lane.calls, lane.pairs, lane.ats = array("I", s[1]), array("I", s[2]), array("d", s[3])
        lane.matches, lane.call_matches = array("H", s[4]), array("H", s[5])
        lane.adj, lane.adj_call, lane.call_size_min, lane.call_size_max, lane.stale = (
            int(x) for x in s[6:11]
        )
        lane.productive, lane.run_productive, lane.fail, lane.fail_count = (
            int(s[11]),
            int(s[12]),
            float(s[13]),
            int(s[14]),
        )
        lane.fail_tool, lane.tool, lane.error = str(s[15]), str(s[16]), str(s[17])
        lane.mark, lane.adj_mark, lane.call_mark, lane.fail_mark = (Mark.load(m) for m in s[18:22])
        lane.settled = int(s[22])
        return lane


def look_alike(gaps: Sequence[float], polling: bool, rules: Rules) -> tuple[str, int]:
    """Which innocent habit repeats with such gaps resemble, and how many repeats are then needed; ("", 0) for none."""
    if not gaps:
        return "", 0
    median = _median(gaps)
    if polling:
        if median < rules.hasty_gap_s:
            return f"polling, but every {median:.2g} s", rules.hasty_repeats
        return f"polling: the tool waits for something, every {median:.3g} s", rules.poll_repeats
    if _growing(gaps):
        return f"back-off: gaps grow from {gaps[0]:.3g} to {gaps[-1]:.3g} s", rules.backoff_repeats
    if median >= rules.regular_gap_s and max(gaps) - min(gaps) <= 0.2 * median:
        return f"heartbeat or polling: machine-regular gaps of {median:.3g} s", rules.poll_repeats
    return "", 0


def _growing(gaps: Sequence[float]) -> bool:
    """Back-off, with jitter and a ceiling: no gap much shorter than the one before it, and clearly longer in all.

    Only the last 31 gaps are known: a back-off that has long reached its ceiling looks regular, not growing.
    """
    if len(gaps) < 2 or gaps[-1] < 1.0:
        return False
    growth = 1.5 if len(gaps) == 2 else 2.0 if len(gaps) < 5 else 3.0
    steady = all(b >= 0.75 * a for a, b in itertools.pairwise(gaps))
    return steady and gaps[-1] >= growth * max(gaps[0], 1e-3)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    if not ordered:
        return 0.0
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
