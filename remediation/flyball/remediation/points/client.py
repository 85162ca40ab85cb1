"""A small client for enforcement points: holds the set of live directives, and lets go by itself.

    client = PointClient("http://flyball:4390", clock=SystemClock())
    threading.Thread(target=client.run, args=(stop,), daemon=True).start()
    …
    effect = client.apply({"provider": "b", "model": "m"}, key=session_id)

It converges by ETag and long poll. When the server cannot be reached it keeps the last set, and each lease in it only until
its own expiry: a dead Flyball leaves nothing in force. With `keep`, the set survives a restart of the point as well.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx

from flyball.remediation.points.matching import Effect, apply

Polled = Literal["changed", "unchanged", "unreachable"]
_MAX_SET = 10_000


class _Clock(Protocol):
    def now(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Lease:
    """A directive as a point holds it; `expires_at` is by the point's own clock."""

    id: str
    kind: str
    scope: dict[str, str]
    params: dict[str, Any]
    expires_at: float
    epoch: int = 1


class PointClient:
    """Holds the directives for one enforcement point. `apply` and `live` may be called from any thread.

    Args:
        url: of Flyball; token: bearer token, where it asks for one.
        clock: wall time. transport: for tests, or a proxy of one's own.
        point: how the point names itself in its reports.
        wait_s: how long one poll may wait for news.
        keep: file that the set is kept in over restarts; None keeps nothing.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: _Clock,
        token: str = "",
        transport: httpx.BaseTransport | None = None,
        point: str = "point",
        wait_s: float = 25.0,
        keep: Path | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=url,
            headers=headers,
            transport=transport,
            timeout=httpx.Timeout(10.0, read=wait_s + 10.0),
        )
        self._clock = clock
        self._point = point
        self._wait_s = wait_s
        self._keep = keep
        self._etag = ""
        self._lock = threading.Lock()
        self._leases: tuple[Lease, ...] = self._read_kept()
        self._applied: dict[str, int] = {}
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

    def run(self, stop: threading.Event, report_every_s: float = 10.0) -> None:
        """Polls and reports until `stop` is set; backs off up to 15 s while the server is not reached."""
        wait, reported = 0.5, self._clock.now()
        while not stop.is_set():
            if self.poll() == "unreachable":
                stop.wait(wait)
                wait = min(wait * 2.0, 15.0)
                continue
            wait = 0.5
            if self._wait_s <= 0.0:
                stop.wait(1.0)
            if self._clock.now() - reported >= report_every_s:
                self.report()
                reported = self._clock.now()
        self._http.close()

    def report(self) -> bool:
        """Tells the server which leases are held, and how many calls each was applied to since the last report.

        Returns: False when it was not taken; the counts are then kept for the next time.
        """
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
        return True

    # --- obeying --------------------------------------------------------------------------------------------------

    def live(self) -> list[Lease]:
        """Leases in force now."""
        now = self._clock.now()
        return [lease for lease in self._leases if lease.expires_at > now]

    def apply(self, labels: Mapping[str, str], key: str) -> Effect:
        """What to do with one call; counts it for the next report."""
        effect = apply(self.live(), labels, key)
        if effect.applied:
            with self._lock:
                for directive in effect.applied:
                    self._applied[directive] = self._applied.get(directive, 0) + 1
        return effect

    # --- inside ---------------------------------------------------------------------------------------------------

    def _take(self, listed: list[Any]) -> bool:
        held = {lease.id: lease for lease in self._leases}
        taken: dict[str, Lease] = {}
        for raw in listed:
            lease = _lease(raw, self.skew_s)
            if lease is None:
                continue  # what is not understood is not obeyed
            known = held.get(lease.id)
            # A server that lags behind must not bring back an older state of a lease.
            taken[lease.id] = known if known is not None and known.epoch > lease.epoch else lease
        leases = tuple(taken[key] for key in sorted(taken))
        changed = leases != self._leases
        self._leases = leases
        if changed:
            self._write_kept()
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
        leases = (_lease(item, 0.0) for item in raw) if isinstance(raw, list) else ()
        return tuple(lease for lease in leases if lease is not None)

    def _write_kept(self) -> None:
        if self._keep is None:
            return
        beside = self._keep.with_name(self._keep.name + ".new")
        try:
            beside.write_text(json.dumps([asdict(lease) for lease in self._leases]), "utf-8")
            os.replace(beside, self._keep)
        except OSError as e:
            self.last_error = f"cannot keep the set: {e}"


def _lease(raw: Any, skew_s: float) -> Lease | None:
    """A lease of the server's JSON, with its expiry by our clock; None when it is not one."""
    if not isinstance(raw, dict):
        return None
    identity, kind, scope, params = raw.get("id"), raw.get("kind"), raw.get("scope"), raw.get("params")
    expires_at, epoch = raw.get("expires_at"), raw.get("epoch", 1)
    if not (isinstance(identity, str) and isinstance(kind, str) and isinstance(params, dict)):
        return None
    if not isinstance(expires_at, int | float) or isinstance(expires_at, bool) or not isinstance(epoch, int):
        return None
    if not isinstance(scope, dict) or not scope or not all(isinstance(v, str) for v in scope.values()):
        return None
    return Lease(
        identity, kind, {str(k): v for k, v in scope.items()}, params, float(expires_at) - skew_s, epoch
    )
