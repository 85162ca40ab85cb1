"""Why a total grew: an exact split into prompt growth, output growth, calls and mix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one component (a model, a prompt version) used per minute: calls, input tokens, output tokens."""

    calls: float
    input_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True)
class Split:
    """Change of tokens per minute, and the part of it that each factor explains. The parts sum to `change`."""

    before: float
    now: float
    prompt: float
    """Input tokens per call grew, at the same calls and mix."""
    output: float
    calls: float
    mix: float
    """Calls moved to components that use more (or fewer) tokens."""

    @property
    def change(self) -> float:
        return self.now - self.before

    def shares(self) -> dict[str, float]:
        """Parts as shares of the change; they sum to 1, and some are negative where factors pull apart. Empty without a change."""
        if abs(self.change) <= 1e-9 * max(abs(self.before), abs(self.now), 1.0):
            return {}
        parts = {"prompt": self.prompt, "output": self.output, "calls": self.calls, "mix": self.mix}
        return {name: part / self.change for name, part in parts.items()}


def log_mean(a: Floats, b: Floats) -> Floats:
    """(a - b) / ln(a / b), elementwise for positive values; a where both are equal.

    >>> float(log_mean(np.array([2.0]), np.array([2.0]))[0])
    2.0
    """
    ratio = np.log(a / b)
    same = np.abs(ratio) < 1e-8
    return np.where(same, (a + b) / 2, (a - b) / np.where(same, 1.0, ratio))


def split_tokens(before: Mapping[str, Usage], now: Mapping[str, Usage]) -> Split:
    """Splits the change of total tokens: calls and usage per call by the logarithmic mean, usage per call into its parts.

    Tokens = calls * usage per call. The outer split is the additive logarithmic mean Divisia index, exact for any change. Usage per call
    is a mean over components; its change is split by Bennet's symmetric rule: growth of input and of output within each
    component at mean shares, and mix, calls that moved to components that use more. A component that is new (or gone) is given
    the average per-call usage of the side where it is missing. (An index of logarithms throughout would need a stand-in
    for the share 0 and would call all calls of a new model "mix", whatever they use.)

    Misleads when a new component *is* the change under another name (a renamed model): growth is then half mix.

    Source: Ang (2015), "LMDI decomposition approach: a guide for implementation"; Bennet (1920), "The theory of measurement of
    changes in cost of living".
    """
    n0, n1 = _calls(before), _calls(now)
    t0, t1 = _tokens(before), _tokens(now)
    if n0 <= 0 or n1 <= 0 or t0 <= 0 or t1 <= 0:
        # From nothing or to nothing: there is no usage per call to compare, so calls it is.
        return Split(t0, t1, prompt=0.0, output=0.0, calls=t1 - t0, mix=0.0)
    average0, average1 = _per_call(before.values(), n0), _per_call(now.values(), n1)
    prompt = output = mix = 0.0
    for name in sorted({*before, *now}):
        u0, u1 = before.get(name), now.get(name)
        share0, share1 = (u0.calls / n0 if u0 else 0.0), (u1.calls / n1 if u1 else 0.0)
        in0, out0 = _per_call([u0], u0.calls) if u0 and u0.calls > 0 else average0
        in1, out1 = _per_call([u1], u1.calls) if u1 and u1.calls > 0 else average1
        share = (share0 + share1) / 2
        prompt += share * (in1 - in0)
        output += share * (out1 - out0)
        mix += (share1 - share0) * (in0 + out0 + in1 + out1) / 2
    per_call0, per_call1 = np.array([t0 / n0]), np.array([t1 / n1])
    weight = float(log_mean(np.array([t1]), np.array([t0]))[0])
    calls = weight * math.log(n1 / n0)
    scale = weight / float(log_mean(per_call1, per_call0)[0])
    prompt, output, mix = prompt * scale, output * scale, mix * scale
    # Tokens told without a single call, and rounding: to mix, so that the parts sum to the change.
    return Split(t0, t1, prompt, output, calls, mix + (t1 - t0) - (calls + prompt + output + mix))


def _calls(side: Mapping[str, Usage]) -> float:
    return sum(u.calls for u in side.values())


def _tokens(side: Mapping[str, Usage]) -> float:
    return sum(u.input_tokens + u.output_tokens for u in side.values())


def _per_call(usages: Iterable[Usage], calls: float) -> tuple[float, float]:
    """Input and output tokens per call."""
    listed = list(usages)
    return sum(u.input_tokens for u in listed) / calls, sum(u.output_tokens for u in listed) / calls
