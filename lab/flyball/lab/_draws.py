"""Random numbers that depend on what they are for, never on when they are asked for.

Whole blocks of traffic come from a numpy `Generator` seeded by (seed, purpose, block). What happens to one call comes from
a counter-based hash of the call's own number, so that the size of the simulator's steps changes nothing.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]
Mask: TypeAlias = NDArray[np.bool_]
Records: TypeAlias = NDArray[Any]

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_M1: Final = np.uint64(0xBF58476D1CE4E5B9)
_M2: Final = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_INT_MASK: Final = (1 << 64) - 1


def mix(words: Words) -> Words:
    """SplitMix64's finaliser: uint64[...] to uint64[...], every bit depends on every bit.

    Source: Steele, Lea & Flood (2014), "Fast splittable pseudorandom number generators".
    """
    z = words + _GOLDEN
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


def mix_int(word: int) -> int:
    """`mix` of one Python integer."""
    z = (word + 0x9E3779B97F4A7C15) & _INT_MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _INT_MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _INT_MASK
    return z ^ (z >> 31)


def uniforms(words: Words, count: int, salt: int = 0) -> Floats:
    """float64[count, n] in [0, 1): `count` independent draws for each word. `salt` separates purposes."""
    salts = (np.arange(count, dtype=np.uint64) + np.uint64(salt + 1)) * _M1
    return unit_interval(mix(mix(words[None, :] ^ salts[:, None])))


def unit_interval(words: Words) -> Floats:
    """float64[...] in [0, 1) from the upper 53 bits of each word."""
    scaled: Floats = (words >> _S11).astype(np.float64) * 2.0**-53
    return scaled


def uniform_int(word: int, salt: int = 0) -> float:
    """One draw in [0, 1) for one Python integer."""
    return (mix_int(mix_int(word) ^ mix_int(salt + 1)) >> 11) * 2.0**-53


def normals(u1: Floats, u2: Floats) -> Floats:
    """Standard normal from two uniforms (Box-Muller, the cosine half)."""
    result: Floats = np.sqrt(-2.0 * np.log1p(-u1)) * np.cos(2.0 * np.pi * u2)
    return result


def generator(seed: int, *purpose: int) -> np.random.Generator:
    """A generator of its own for (seed, purpose…)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed & 0xFFFFFFFF, *purpose])))
