"""The simulated gateway and the providers behind it: where a call goes and what comes back.

Every draw is a function of the call's own number, so that the same call meets the same fate however it is stepped
through. What directives change is `flyball.lab.enforcement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from flyball.core.errorclass import CLASS_INDEX, CLASSES
from flyball.lab._draws import (
    Floats,
    Ints,
    Mask,
    Records,
    Words,
    mix_int,
    normals,
    uniforms,
)
from flyball.lab.enforcement import LOCAL, Enforcement
from flyball.lab.estate import Estate

_ATTEMPT: Final = np.uint64(0xD1342543DE82EF95)

CODES: Final[tuple[str, ...]] = (
    "", "400", "401", "402", "404", "408", "429", "499", "500", "502", "503", "504", "529",
    "insufficient_quota", "content_filter", "context_length_exceeded", "connection_error", "stream_error",
    "403_blocked", "429_limited",
)  # fmt: skip
CODE_INDEX: Final[dict[str, int]] = {c: i for i, c in enumerate(CODES)}

CODE_OF: Final[dict[str, str]] = {
    "rate_limited": "429", "quota_exhausted": "insufficient_quota", "overloaded": "503", "server_error": "500",
    "connection": "connection_error", "timeout": "408", "auth": "401", "not_found": "404",
    "context_too_long": "context_length_exceeded", "content_filter": "content_filter", "bad_request": "400",
    "stream_interrupted": "stream_error", "cancelled": "499",
}  # fmt: skip

PROVIDER_FLOOR: Final[dict[str, float]] = {
    "rate_limited": 0.003, "overloaded": 0.0009, "server_error": 0.0008, "connection": 0.0003, "timeout": 0.0004,
    "stream_interrupted": 0.0002,
}  # fmt: skip
CALLER_FLOOR: Final[dict[str, float]] = {"bad_request": 0.003, "content_filter": 0.002, "cancelled": 0.002}
FLOOR_CLASSES: Final = tuple(PROVIDER_FLOOR) + tuple(CALLER_FLOOR)

RETRIABLE: Final[tuple[str, ...]] = ("rate_limited", "overloaded", "server_error", "connection", "timeout")
_RETRIABLE: Final[Mask] = np.isin(np.array(CLASSES), RETRIABLE)
_FLOOR_INDEX: Final[Ints] = np.array([CLASS_INDEX[c] for c in FLOOR_CLASSES])
_CODE_OF_CLASS: Final[Ints] = np.array([CODE_INDEX[CODE_OF.get(c, "")] for c in CLASSES])
_FAST_S: Final[Floats] = np.array(
    [{"rate_limited": 0.15, "quota_exhausted": 0.12, "overloaded": 0.4, "server_error": 1.5, "connection": 2.0,
      "auth": 0.08, "not_found": 0.08, "context_too_long": 0.2, "content_filter": 0.3, "bad_request": 0.1,
      "gateway_local": 0.002}.get(c, 0.0) for c in CLASSES]
)  # fmt: skip
"""How long a refusal takes; 0 for the classes that take a part of the normal time."""
_TIMEOUT = CLASS_INDEX["timeout"]
_TOO_LONG, _OVERLOADED = CLASS_INDEX["context_too_long"], CLASS_INDEX["overloaded"]
_PARTIAL: Final[Mask] = np.isin(np.array(CLASSES), ("stream_interrupted", "cancelled"))
_FILTERED: Final = CLASS_INDEX["content_filter"]


@dataclass(slots=True)
class Answers:
    """What became of n attempts, as columns; faults may write to it before it is finished.

    `error` indexes CLASSES, `code` CODES. `slower` multiplies the time of a success. `input`, `output`, `cached`: tokens.
    `pressure`: the largest share that a redirect in force moves onto the call's provider.
    """

    calls: Records
    u: Floats
    error: Ints
    code: Ints
    slower: Floats
    latency_s: Floats
    ttft_s: Floats
    output: Ints
    cached: Ints
    cost_usd: Floats
    region: Ints
    deployment: Ints
    cold: Floats
    pressure: Floats
    max_retries: Ints
    backoff_s: Floats

    def fail(self, mask: Mask, classes: Ints, codes: Ints | None = None) -> None:
        """Fails the attempts of `mask` with `classes` (int64[n]); an attempt that the gateway blocked stays blocked."""
        mask = mask & (self.error != LOCAL)
        self.error[mask] = classes[mask]
        self.code[mask] = (_CODE_OF_CLASS[classes] if codes is None else codes)[mask]

    def refuse(self, row: int, status: int) -> None:
        """The gateway itself stops one attempt. SDKs are told not to try again (`x-should-retry: false`)."""
        self.error[row], self.code[row] = LOCAL, CODE_INDEX["403_blocked" if status == 403 else "429_limited"]


class AnswerFault(Protocol):
    """The part of a fault that the gateway sees."""

    def on_answers(self, estate: Estate, answers: Answers) -> Mask | None:
        """Writes to `answers`; returns which attempts show the fault, or None."""
        ...


class Names(Protocol):
    """Interned names of prompt versions and runs, which come up while the simulation goes."""

    prompts: list[str]
    runs: list[str]


class Gateway:
    """Routes attempts, obeys directives, answers for the providers. One per simulation."""

    def __init__(self, estate: Estate, seed: int, names: Names) -> None:
        self.estate, self.names = estate, names
        self._word = np.uint64(mix_int(seed ^ 0x6A7E))
        self._set_constants()
        self.enforcement = Enforcement(estate, names, self._serves)
        self.drained: set[str] = set()
        """Deployments that get no calls any more, because somebody drained them."""

    def _set_constants(self) -> None:
        e = self.estate
        self._ttft = np.array([p.ttft_s for p in e.providers])
        self._per_token = np.array([p.seconds_per_token for p in e.providers])
        self._floor = np.array([p.floor for p in e.providers])
        self._overloaded = np.array([CODE_INDEX[p.overloaded_code] for p in e.providers])
        self._n_regions = np.array([len(p.regions) for p in e.providers])
        self._n_deployments = np.array([len(p.deployments) for p in e.providers])
        self._speed = np.array([m.speed for m in e.models])
        self._context = np.array([m.context_tokens for m in e.models])
        ratio = np.array([p.price_ratio for p in e.providers])[:, None] / 1e6
        self._in_usd = ratio * np.array([m.price.input_usd for m in e.models])
        self._cached_usd = ratio * np.array([m.price.cached_input_usd for m in e.models])
        self._out_usd = ratio * np.array([m.price.output_usd for m in e.models])
        self._timeout = np.array([a.timeout_s for a in e.apps])
        self._max_retries = np.array([a.max_retries for a in e.apps])
        self._cache_share = np.array([a.cache_share for a in e.apps])
        self._serves = np.array([[m.name in p.models for m in e.models] for p in e.providers])
        self._caller_floor = np.array(list(CALLER_FLOOR.values()))
        self._provider_floor = np.array(list(PROVIDER_FLOOR.values()))

    # -- answers ------------------------------------------------------------------------------------------------

    def answer(self, calls: Records, faults: Sequence[AnswerFault]) -> tuple[Answers, list[Mask | None]]:
        """What becomes of attempts; `calls` is changed where a directive redirects or caps.

        Returns the answers, and per fault which attempts show it.
        """
        n = len(calls)
        words: Words = calls["uid"] + calls["attempt"].astype(np.uint64) * _ATTEMPT
        a = Answers(
            calls=calls, u=uniforms(words, 12), error=np.zeros(n, np.int64), code=np.zeros(n, np.int64),
            slower=np.ones(n), latency_s=np.zeros(n), ttft_s=np.zeros(n), output=np.zeros(n, np.int64),
            cached=np.zeros(n, np.int64), cost_usd=np.zeros(n), region=np.zeros(n, np.int64),
            deployment=np.zeros(n, np.int64), cold=np.ones(n), pressure=np.zeros(n),
            max_retries=self._max_retries[calls["app"]].copy(), backoff_s=np.zeros(n),
        )  # fmt: skip
        self.enforcement.obey(a)
        a.region = self.enforcement.region(calls)
        a.deployment = self._deployment(calls)
        a.backoff_s = 0.5 * 2.0 ** calls["attempt"] * (0.75 + 0.5 * a.u[0])
        busy = self._background(a)
        shown = [f.on_answers(self.estate, a) for f in faults]
        self._finish(a, busy)
        self.enforcement.settle(a)
        return a, shown

    def _deployment(self, calls: Records) -> Ints:
        """A tenant's calls stay on one server while it lives, as with prefix-aware balancing; from a drained one they go on to the next."""
        n = np.maximum(self._n_deployments[calls["provider"]], 1)
        place: Ints = calls["tenant"] // 2 % n
        for i, provider in enumerate(self.estate.providers):
            gone = [k for k, name in enumerate(provider.deployments) if name in self.drained]
            if 0 < len(gone) < len(provider.deployments):
                left = np.array([k for k in range(len(provider.deployments)) if k not in gone])
                moved = (calls["provider"] == i) & np.isin(place, gone)
                place[moved] = left[calls["tenant"][moved] % len(left)]
        return place

    def _modulations(self, calls: Records) -> tuple[Floats, Floats, Floats]:
        """Lognormal factors of mean 1 that stay for a while, which is what makes errors come in bunches.

        For a provider's errors (30 s), a tenant's errors (5 min) and a provider's speed (10 min); one hash for all three.
        """
        n, start = len(calls), calls["start"]
        words = np.empty((3, n), dtype=np.uint64)
        for row, (key, span_s) in enumerate(
            ((calls["provider"], 30.0), (calls["tenant"], 300.0), (calls["provider"], 600.0))
        ):
            slot = (start // span_s).astype(np.uint64) << np.uint64(20)
            words[row] = (slot + key.astype(np.uint64)) * np.uint64(4) + np.uint64(row)
        u = uniforms((words ^ self._word).ravel(), 2)
        z = normals(u[0], u[1]).reshape(3, n)
        sigma, cap = np.array([[1.0], [0.9], [0.12]]), np.array([[8.0], [8.0], [2.0]])
        factors = np.minimum(np.exp(sigma * z - sigma * sigma / 2), cap)
        return factors[0], factors[1], factors[2]

    def _background(self, a: Answers) -> Floats:
        """The floor of errors that is always there: bursty, by provider and by tenant, and short blips.

        Returns how busy each call's provider is, as a factor on times.
        """
        calls = a.calls
        provider = calls["provider"].astype(np.int64)
        of_provider, of_caller, busy = self._modulations(calls)
        split = len(PROVIDER_FLOOR)
        p = np.empty((len(calls), len(FLOOR_CLASSES)))
        p[:, :split] = (of_provider * self._floor[provider])[:, None] * self._provider_floor
        p[:, split:] = of_caller[:, None] * self._caller_floor
        p[:, 0] += 0.03 * calls["burst"]  # a client that sends hundreds at once meets its own limit
        p[:, 1] += self._blip(provider, calls["model"].astype(np.int64), calls["start"])
        column = (a.u[1][:, None] >= np.cumsum(p, axis=1)).sum(axis=1)
        failed = column < len(FLOOR_CLASSES)
        if failed.any():
            classes = _FLOOR_INDEX[np.minimum(column, len(FLOOR_CLASSES) - 1)]
            a.fail(failed, classes)
            own_code = failed & (classes == _OVERLOADED)
            a.code[own_code] = self._overloaded[provider[own_code]]
        too_long = (calls["input"] > self._context[calls["model"]]) & (a.error != LOCAL)
        a.error[too_long], a.code[too_long] = _TOO_LONG, CODE_INDEX["context_length_exceeded"]
        return busy

    def _blip(self, provider: Ints, model: Ints, at: Floats) -> Floats:
        """float64[n]: what a blip adds to the share of failures."""
        slot_s = 600.0
        key = (provider * 64 + model).astype(np.uint64) * np.uint64(0x85EB_CA6B)
        u = uniforms(key ^ (at // slot_s).astype(np.uint64) << np.uint64(24) ^ self._word, 4, salt=77)
        happens = u[0] < self.estate.blips_per_day * slot_s / 86_400.0 / 2.0
        begin = u[1] * (slot_s - 30.0)
        inside = (at % slot_s >= begin) & (at % slot_s < begin + 10.0 + 20.0 * u[2])
        return np.where(happens & inside, 0.05 + 0.1 * u[3], 0.0)

    def _finish(self, a: Answers, busy: Floats) -> None:
        """Times, tokens and cost, once it is settled which attempts fail."""
        calls, u = a.calls, a.u
        provider, model, app = calls["provider"], calls["model"], calls["app"]
        hit = u[2] < self._cache_share[app] * a.cold
        prefix = np.minimum(calls["prefix"], calls["input"])
        a.cached = np.where(hit & (prefix >= 256), prefix // 64 * 64, 0)
        speed = self._speed[model]
        first = (
            self._ttft[provider] * np.exp(0.35 * normals(u[3], u[4])) + (calls["input"] - a.cached) / 9000.0
        )
        a.ttft_s = first / speed * busy * a.slower
        rest = calls["output"] * self._per_token[provider] * np.exp(0.2 * normals(u[5], u[6])) / speed
        a.latency_s = a.ttft_s + rest * busy * a.slower
        limit = self._timeout[app]
        late = (a.latency_s > limit) & (a.error == 0)
        a.error[late], a.code[late] = _TIMEOUT, CODE_INDEX["408"]
        failed = a.error != 0
        fast = _FAST_S[a.error] * np.exp(0.4 * normals(u[7], u[8]))
        partial = _PARTIAL[a.error]
        a.output = np.where(failed, 0, calls["output"])
        a.output[partial] = (calls["output"][partial] * u[9][partial]).astype(np.int64)
        a.latency_s = np.where(partial, a.latency_s * (0.1 + 0.8 * u[9]), np.where(failed, fast, a.latency_s))
        a.latency_s = np.where(a.error == _TIMEOUT, limit, a.latency_s)
        paid = ~failed | partial | (a.error == _FILTERED)
        a.cost_usd = np.where(
            paid,
            (calls["input"] - a.cached) * self._in_usd[provider, model]
            + a.cached * self._cached_usd[provider, model]
            + a.output * self._out_usd[provider, model],
            0.0,
        )

    def retries(self, a: Answers) -> Mask:
        """bool[n]: the attempts that are followed by another."""
        again: Mask = _RETRIABLE[a.error] & (a.calls["attempt"] < a.max_retries)
        return again
