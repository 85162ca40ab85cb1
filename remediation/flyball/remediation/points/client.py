"""A small client for enforcement points: holds the set of live directives, and lets go by itself.

    client = PointClient("http://flyball:4390", token=TOKEN, point="gateway-1")
    client.start()
    …
    effect = client.apply({"provider": "b", "model": "m", "tenant": "t3"}, key=session_id)

It converges by ETag and long poll, in threads of its own: `apply` never waits for the network. When the server cannot be reached it
keeps the last set, and each lease in it only until its own expiry: a dead Flyball leaves nothing in force. With `keep`, the set
survives a restart of the point as well.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeGuard

import httpx

from flyball.remediation.points.buckets import Buckets
from flyball.remediation.points.matching import KINDS, Effect, Index, Reachable, apply, is_number

Polled = Literal["changed", "unchanged", "unreachable"]
REPORT_EVERY_S: Final = 1.5
"""At most so long after a call was blocked, limited, capped or redirected the server hears of it."""
HEARTBEAT_S: Final = 15.0
"""How often a point that holds leases says so when nothing is new."""
MAX_LEASE_S: Final = 7 * 86400.0
"""What would last longer is a mistake (milliseconds, say), and not obeyed."""
_MAX_SET: Final = 10_000
_MAX_BACKOFF_S: Final = 5.0
_log = logging.getLogger("flyball.point")


class _Clock(Protocol):
    def now(self) -> float: ...
    def monotonic(self) -> float: ...


class SystemClock:
    """The clocks of this machine: seconds since the epoch, and seconds that never go back."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class Lease:
    """A directive as a point holds it; `expires_at` is by the point's own clock."""

    id: str
    kind: str
    scope: dict[str, str]
    params: dict[str, Any]
    expires_at: float
    epoch: int = 1
    exempt: tuple[dict[str, str], ...] = ()
    deadline: float = field(default=float("inf"), compare=False)
    """As `expires_at`, by the clock that never goes back: setting the wall clock back stretches no lease."""


class _Held:
    """A set of leases with its index, and the moment from which on one of them is over."""

    __slots__ = ("deadline", "index", "leases", "until")

    def __init__(self, leases: tuple[Lease, ...]) -> None:
        self.leases = leases
        self.index = Index(leases)
        self.until = min((lease.expires_at for lease in leases), default=float("inf"))
        self.deadline = min((lease.deadline for lease in leases), default=float("inf"))


class PointClient:
    """Holds the directives for one enforcement point. `apply`, `charge` and `live` may be called from any thread.

    Args:
        url: of Flyball; token: bearer token, where it asks for one.
        clock: wall time and monotonic time. transport: for tests, or a proxy of one's own.
        point: how the point names itself in its reports.
        wait_s: how long one poll may wait for news.
        keep: file that the set is kept in over restarts; None keeps nothing.
        limit_share: part of every limit that this process enforces: a third each for three equal ones. Nobody counts for all of
            them together, so with the default of 1 each of them lets the whole limit through.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: _Clock | None = None,
        token: str = "",
        transport: httpx.BaseTransport | None = None,
        point: str = "point",
        wait_s: float = 25.0,
        keep: Path | None = None,
        limit_share: float = 1.0,
    ) -> None:
        if not 0.0 < limit_share <= 1.0:
            raise ValueError(f"limit_share is {limit_share:g}; must be over 0 and at most 1")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=url,
            headers=headers,
            transport=transport,
            timeout=httpx.Timeout(10.0, read=wait_s + 10.0),
        )
        self._clock: _Clock = clock if clock is not None else SystemClock()
        self._point = point
        self._wait_s = wait_s
        self._keep = keep
        self._etag = ""
        self._lock = threading.Lock()
        self._buckets = Buckets(self._clock.monotonic, limit_share)
        self._held = _Held(self._read_kept())
        self._epochs: dict[str, tuple[int, float]] = {
            lease.id: (lease.epoch, lease.expires_at) for lease in self._held.leases
        }
        """Of leases that are held or were lately: their highest epoch, and when they would have been over."""
        self._buckets.keep(self._held.leases)
        self._applied: dict[str, int] = {}
        self._told: tuple[Lease, ...] = ()
        self._report_due = float("-inf")
        self._stop = threading.Event()
        self.skew_s = 0.0
        """Server's clock less ours, as measured at the last answer."""
        self.last_error = ""

    # --- asking ---------------------------------------------------------------------------------------------------

    def poll(self) -> Polled:
        """One long poll. `unreachable` leaves the set as it was; `last_error` says why."""
        headers = {"If-None-Match": self._etag} if self._etag else {}
        try:
            answer = self._http.get("/v1/directives", params={"wait": f"{self._wait_s:g}"}, headers=headers)
            if answer.status_code == 304:
                self.last_error = ""
                return "unchanged"
            answer.raise_for_status()
            listed = answer.json()
        except (httpx.HTTPError, json.JSONDecodeError, UnicodeDecodeError) as e:
            self.last_error = f"{type(e).__name__}: {e}"
            return "unreachable"
        if isinstance(listed, dict):
            listed = listed.get("directives")
        if not isinstance(listed, list) or len(listed) > _MAX_SET:
            self.last_error = "the answer is no list of directives"
            return "unreachable"
        self._measure_skew(answer.headers.get("Date", ""))
        changed = self._take(listed)
        self._etag = answer.headers.get("ETag", "")
        self.last_error = ""
        return "changed" if changed else "unchanged"

    def start(self) -> None:
        """Polls and reports in threads of its own, which end with the process or with `close`."""
        threading.Thread(target=self.run, args=(self._stop,), name="flyball-point", daemon=True).start()

    def close(self) -> None:
        """Ends what `start` began; a poll that waits for news ends with it within `wait_s`."""
        self._stop.set()

    def run(self, stop: threading.Event) -> None:
        """Polls and reports until `stop` is set; backs off up to 5 s while the server is not reached."""
        reporter = threading.Thread(
            target=self._report_until, args=(stop,), name="flyball-point-reports", daemon=True
        )
        reporter.start()
        wait, lost = 0.25, False
        while not stop.is_set():
            polled = self.poll()
            if polled == "unreachable":
                if not lost:
                    _log.warning("point.lost held=%d error=%s", len(self.live()), self.last_error)
                lost = True
                stop.wait(wait)
                wait = min(wait * 2.0, _MAX_BACKOFF_S)
                continue
            if lost:
                _log.warning("point.found held=%d", len(self.live()))
            wait, lost = 0.25, False
            if polled == "changed":
                _log.info(
                    "point.changed directives=%s", ",".join(lease.id for lease in self.live()) or "none"
                )
                self.report_if_due()  # "in force" is heard of at once
            if self._wait_s <= 0.0:
                stop.wait(1.0)
        reporter.join(HEARTBEAT_S)
        self._http.close()

    def _report_until(self, stop: threading.Event) -> None:
        while not stop.wait(REPORT_EVERY_S):
            self.report_if_due()

    def report_if_due(self) -> bool | None:
        """Reports when something is new: the set, or what was done; and now and then while leases are held.

        Returns: None when nothing was due, else as `report`.
        """
        now = self._clock.monotonic()
        with self._lock:
            new = bool(self._applied) or self._held.leases != self._told
            if not new and not (self._held.leases and now >= self._report_due):
                return None
        return self.report()

    def report(self) -> bool:
        """Tells the server which leases are held, and how many calls each was applied to since the last report.

        Returns: False when it was not taken; the counts are then kept for the next time.
        """
        held = self._held.leases
        with self._lock:
            taken, self._applied = self._applied, {}
        counts = {**{lease.id: 0 for lease in self.live()}, **taken}
        body = {"point": self._point, "at": self._clock.now() + self.skew_s, "directives": counts}
        try:
            self._http.post("/v1/enforced", json=body).raise_for_status()
        except httpx.HTTPError as e:
            self.last_error = f"{type(e).__name__}: {e}"
            with self._lock:
                for key, count in taken.items():
                    self._applied[key] = self._applied.get(key, 0) + count
            return False
        with self._lock:
            self._told = held
            self._report_due = self._clock.monotonic() + HEARTBEAT_S
        return True

    # --- obeying --------------------------------------------------------------------------------------------------

    def live(self) -> list[Lease]:
        """Leases in force now."""
        return list(self._current().leases)

    def apply(self, labels: Mapping[str, str], key: str, reachable: Reachable | None = None) -> Effect:
        """What to do with one call; counts it for the next report. Never waits.

        Args:
            labels: of the call, as base labels. key: what shares are chosen by: session or run, else the call's own id.
            reachable: whether the gateway can send a call to where labels say; what it cannot do is not counted as done.
        """
        effect = self.decide(labels, key, reachable)
        if effect.applied:
            self.count(effect.applied)
        return effect

    def decide(
        self,
        labels: Mapping[str, str],
        key: str,
        reachable: Reachable | None = None,
        kinds: Container[str] = KINDS,
    ) -> Effect:
        """As `apply`, without counting it for the report."""
        held = self._current()
        if not held.leases:
            return Effect(labels)
        return apply(held.index, labels, key, gate=self._buckets, reachable=reachable, kinds=kinds)

    def count(self, directives: Iterable[str]) -> None:
        """Counts one call for each of these directives in the next report."""
        with self._lock:
            for directive in directives:
                self._applied[directive] = self._applied.get(directive, 0) + 1

    def charge(self, effect: Effect, *, tokens: float | None = None, usd: float | None = None) -> None:
        """What a call that was let through has cost: 0 when it failed for nothing, None where nobody knows.

        To be told of every call: what calls cost on average is what a new limit reckons with until its own are charged.
        """
        self._buckets.charge(effect.charges, tokens, usd)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _current(self) -> _Held:
        """The leases in force now; those that are over are dropped here, whether or not the server is heard."""
        held = self._held
        if not held.leases:
            return held
        now, monotonic = self._clock.now(), self._clock.monotonic()
        if now < held.until and monotonic < held.deadline:
            return held
        with self._lock:
            leases = tuple(x for x in self._held.leases if x.expires_at > now and x.deadline > monotonic)
            self._held = _Held(leases)
            return self._held

    def _take(self, listed: list[Any]) -> bool:
        now, monotonic = self._clock.now(), self._clock.monotonic()
        with self._lock:
            held = {lease.id: lease for lease in self._held.leases}
            self._epochs = {k: v for k, v in self._epochs.items() if v[1] > now}
            taken: dict[str, Lease] = {}
            for raw in listed:
                lease = _lease(raw, self.skew_s, now, monotonic)
                if lease is None or lease.expires_at <= now:
                    continue  # what is not understood is not obeyed
                known = held.get(lease.id)
                if self._epochs.get(lease.id, (0, 0.0))[0] > lease.epoch:
                    # A server that lags behind must not bring back an older state of a lease.
                    if known is not None:
                        taken[lease.id] = known
                    continue
                # Told again without a change it keeps its deadline: our clock was set back, not the lease renewed.
                taken[lease.id] = known if known == lease and known is not None else lease
                self._epochs[lease.id] = (lease.epoch, lease.expires_at)
            leases = tuple(taken[key] for key in sorted(taken))
            changed = leases != self._held.leases
            self._held = _Held(leases)
        if changed:
            self._buckets.keep(leases)
            self._write_kept(leases)
        return changed

    def _measure_skew(self, date: str) -> None:
        """The `Date` header counts whole seconds: differences below two are no skew."""
        try:
            server = parsedate_to_datetime(date).timestamp()
        except (TypeError, ValueError):
            return
        skew = server - self._clock.now()
        self.skew_s = skew if abs(skew) >= 2.0 else 0.0

    def _read_kept(self) -> tuple[Lease, ...]:
        if self._keep is None:
            return ()
        try:
            raw = json.loads(self._keep.read_text("utf-8"))
        except (OSError, ValueError):
            return ()  # nothing kept, or damaged: the server will say
        now, monotonic = self._clock.now(), self._clock.monotonic()
        leases = (_lease(item, 0.0, now, monotonic) for item in raw) if isinstance(raw, list) else ()
        return tuple(lease for lease in leases if lease is not None and lease.expires_at > now)

    def _write_kept(self, leases: tuple[Lease, ...]) -> None:
        if self._keep is None:
            return
        beside = self._keep.with_name(
            f"{self._keep.name}.{os.getpid()}.new"
        )  # several processes may share the file
        kept = [{name: getattr(lease, name) for name in _KEPT} for lease in leases]
        try:
            beside.write_text(json.dumps(kept), "utf-8")
            os.replace(beside, self._keep)
        except OSError as e:
            self.last_error = f"cannot keep the set: {e}"


_KEPT: Final = ("id", "kind", "scope", "params", "expires_at", "epoch", "exempt")


def _lease(raw: Any, skew_s: float, now: float, monotonic: float) -> Lease | None:
    """A lease of the server's JSON, with its expiry by our clocks; None when it is not one."""
    if not isinstance(raw, dict):
        return None
    identity, kind, scope, params = raw.get("id"), raw.get("kind"), raw.get("scope"), raw.get("params")
    expires_at, epoch, exempt = raw.get("expires_at"), raw.get("epoch", 1), raw.get("exempt") or []
    if not (isinstance(identity, str) and isinstance(kind, str) and isinstance(params, dict)):
        return None
    if not is_number(expires_at) or not isinstance(epoch, int):
        return None
    if not _is_scope(scope) or not isinstance(exempt, list) or not all(_is_scope(e) for e in exempt):
        return None  # without its exemptions it would apply to those who are exempt
    ours = float(expires_at) - skew_s
    if not ours - now < MAX_LEASE_S:
        return None  # without an end in sight it is no lease
    return Lease(
        identity,
        kind,
        dict(scope),
        params,
        ours,
        epoch,
        tuple(dict(e) for e in exempt),
        monotonic + ours - now,
    )


def _is_scope(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, str) for v in value.values())
