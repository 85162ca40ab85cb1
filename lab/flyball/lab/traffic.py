"""What people and programs ask for, before anything answers: arrivals, tenants, tokens.

Arrivals are doubly stochastic, because real ones are: the rate of each app follows the day, drifts over minutes and
flickers over seconds, and single clients send bursts. Counts over 60 s have an index of dispersion in the tens, as the
public recordings of production traffic do; a Poisson process has 1. Tokens are lognormal with a Pareto tail.

Traffic is made in blocks of 60 s, each from (seed, block), so that it never depends on how far one looks at a time.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from flyball.lab._draws import Floats, Ints, Records, generator, mix, mix_int
from flyball.lab.estate import TENANT_SIGMA, Estate

BLOCK_S: Final = 60.0
BUCKET_S: Final = 10.0
KNOT_S: Final = 900.0
DAY_S: Final = 86_400.0
MAX_BURST: Final = 400.0

CALL: Final = np.dtype(
    [
        ("start", "f8"),
        ("first", "f8"),
        ("uid", "u8"),
        ("unit", "u8"),
        ("attempt", "i2"),
        ("app", "i2"),
        ("tenant", "i2"),
        ("provider", "i2"),
        ("model", "i2"),
        ("agent", "i2"),
        ("prompt", "i4"),
        ("run", "i4"),
        ("input", "i8"),
        ("prefix", "i8"),
        ("output", "i8"),
        ("stream", "?"),
        ("burst", "?"),
        ("tools", "?"),
        ("extra", "?"),
    ]
)
"""One logical call, or one further attempt of it. `uid` names the call, `unit` what a share is drawn on (the run, else
the call), `prefix` how many of the input tokens could come from a cache; `agent` and `run` are -1 outside agent runs;
`prompt` is -1 until the simulator knows which version is live; `extra` marks calls that only a fault makes."""


class Traffic:
    """The calls that do not belong to agent runs. `rate` is calls a second on average over a day."""

    def __init__(self, estate: Estate, seed: int, rate: float) -> None:
        self.estate, self.seed, self.rate = estate, seed, rate
        weights = np.array([a.weight for a in estate.apps])
        self._weights: Floats = weights / weights.sum()
        self._burstiness: Floats = np.array([a.burstiness for a in estate.apps])
        self._tenant_cdf: Floats = np.cumsum(estate.tenant_weights)
        apps = estate.apps
        self._sigma_in = np.array([a.input_sigma for a in apps])
        self._mu_in = np.log([a.input_median_tokens for a in apps])
        self._sigma_out = np.array([a.output_sigma for a in apps])
        self._mu_out = np.log([a.output_median_tokens for a in apps])
        self._system = np.array([a.system_tokens for a in apps], dtype=np.int64)
        self._tail_share = np.array([a.tail_share for a in apps])
        self._tail_alpha = np.array([a.tail_alpha for a in apps])
        self._stream = np.array([a.stream_share for a in apps])
        width = max(len(a.routes) for a in apps)
        self._route_cdf = np.ones((len(apps), width))
        self._route_provider = np.zeros((len(apps), width), dtype=np.int16)
        self._route_model = np.zeros((len(apps), width), dtype=np.int16)
        for i, app in enumerate(apps):
            total = sum(r.weight for r in app.routes)
            for j, route in enumerate(app.routes):
                self._route_cdf[i, j] = sum(r.weight for r in app.routes[: j + 1]) / total
                self._route_provider[i, j:] = estate.provider_index[route.provider]
                self._route_model[i, j:] = estate.model_index[route.model]
        # Some tenants write long, some short: the mix of tenants moves the averages, as it does in life.
        own = generator(seed, 4)
        self._tenant_in: Floats = np.exp(own.normal(0.0, TENANT_SIGMA, estate.n_tenants))
        self._tenant_out: Floats = np.exp(own.normal(0.0, 0.2, estate.n_tenants))
        self._knots: dict[int, Floats] = {}

    def daily(self, at: float) -> float:
        """The day's shape, mean 1: least at four in the morning UTC, most in the afternoon."""
        return 1.0 - self.estate.daily_amplitude * float(np.cos(2 * np.pi * (at - 4 * 3600.0) / DAY_S))

    def _knot(self, index: int) -> Floats:
        """float64[1 + n_apps]: drift of the whole estate, then of each app, at one knot; mean 1."""
        found = self._knots.get(index)
        if found is None:
            rng = generator(self.seed, 1, index)
            cv = np.concatenate([[0.15], 0.4 * self._burstiness])
            found = rng.gamma(1 / cv**2) * cv**2
            if len(self._knots) > 64:
                self._knots.clear()
            self._knots[index] = found
        return found

    def drift(self, at: float) -> Floats:
        """float64[1 + n_apps]: the slow part of the rates, interpolated between knots of 15 min."""
        position = at / KNOT_S
        low = int(position)
        share = position - low
        return self._knot(low) * (1 - share) + self._knot(low + 1) * share

    def route(self, app: Ints, draw: Floats) -> tuple[Ints, Ints]:
        """Provider and model of each call by its app's weights; `draw`: float64[n] in [0, 1)."""
        column = (draw[:, None] >= self._route_cdf[app]).sum(axis=1)
        return self._route_provider[app, column], self._route_model[app, column]

    def block(self, index: int) -> Records:
        """The calls of one block of 60 s, sorted by start; a client's burst may run past the block's end."""
        estate, rng = self.estate, generator(self.seed, 2, index)
        begin = index * BLOCK_S
        n_apps, n_buckets = len(estate.apps), int(BLOCK_S / BUCKET_S)
        drift = self.drift(begin)
        common = rng.gamma(1 / 0.12**2) * 0.12**2
        minute = rng.gamma(1 / self._burstiness**2) * self._burstiness**2
        flicker = rng.gamma(1 / 0.4**2, size=(n_buckets, n_apps)) * 0.4**2
        per_second = self.rate * self.daily(begin) * drift[0] * common * self._weights * drift[1:] * minute
        smooth = per_second * (1 - estate.burst_share) * BUCKET_S
        counts = rng.poisson(smooth * flicker)
        app = np.tile(np.arange(n_apps), n_buckets).repeat(counts.ravel())
        bucket = np.arange(n_buckets).repeat(counts.sum(axis=1))
        start = begin + (bucket + rng.random(len(app))) * BUCKET_S
        tenant = np.searchsorted(self._tenant_cdf, rng.random(len(app)), side="right")
        burst_start, burst_app, burst_tenant = self._bursts(rng, begin, per_second)
        start = np.concatenate([start, burst_start])
        app = np.concatenate([app, burst_app])
        tenant = np.minimum(np.concatenate([tenant, burst_tenant]), estate.n_tenants - 1)
        is_burst = np.arange(len(start)) >= len(start) - len(burst_start)
        order = np.argsort(start, kind="stable")
        return self._records(rng, index, start[order], app[order], tenant[order], is_burst[order])

    def _bursts(
        self, rng: np.random.Generator, begin: float, per_second: Floats
    ) -> tuple[Floats, Ints, Ints]:
        """Clients that send many calls at once: sizes are Pareto (alpha 1.5), mean about 15 calls within 2–30 s."""
        mean_size = 15.0
        expected = self.estate.burst_share * per_second * BLOCK_S / mean_size
        bursts = rng.poisson(expected)
        n = int(bursts.sum())
        size = np.minimum(5.0 * (1 - rng.random(n)) ** (-1 / 1.5), MAX_BURST).astype(np.int64)
        app = np.repeat(np.arange(len(bursts)), bursts).repeat(size)
        tenant = np.searchsorted(self._tenant_cdf, rng.random(n), side="right").repeat(size)
        length = (2.0 + 28.0 * rng.random(n)).repeat(size)
        first = (begin + BLOCK_S * rng.random(n)).repeat(size)
        return first + length * rng.random(len(app)), app, tenant

    def _records(
        self, rng: np.random.Generator, index: int, start: Floats, app: Ints, tenant: Ints, burst: Records
    ) -> Records:
        n = len(start)
        calls = np.zeros(n, dtype=CALL)
        calls["start"] = calls["first"] = start
        number = (np.uint64(index) << np.uint64(24)) + np.arange(n, dtype=np.uint64)
        calls["uid"] = calls["unit"] = mix(number ^ np.uint64(mix_int(self.seed)))
        calls["app"], calls["tenant"] = app, tenant
        calls["agent"] = calls["run"] = calls["prompt"] = -1
        calls["burst"] = burst
        calls["provider"], calls["model"] = self.route(app, rng.random(n))
        calls["stream"] = rng.random(n) < self._stream[app]
        written = (
            np.exp(self._mu_in[app] + self._sigma_in[app] * rng.standard_normal(n)) * self._tenant_in[tenant]
        )
        tail = rng.random(n) < self._tail_share[app]
        written *= np.where(tail, (1 - rng.random(n)) ** (-1 / self._tail_alpha[app]), 1.0)
        calls["prefix"] = self._system[app]
        calls["input"] = self._system[app] + np.minimum(written, 1e6).astype(np.int64)
        out = (
            np.exp(self._mu_out[app] + self._sigma_out[app] * rng.standard_normal(n))
            * self._tenant_out[tenant]
        )
        calls["output"] = np.clip(out, 1, 4096).astype(np.int64)
        return calls
