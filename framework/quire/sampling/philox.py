"""Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The draw for the token at `position` of a request with `seed` is a pure function of the two, so it
does not depend on the batch, on preemption or on the device. Any sampler that wants the same
stream computes:

    key     = (low 32 bits of seed, high 32 bits of seed)
    counter = (low 32 bits of position, high 32 bits of position, 0, 0)
    x0, x1  = the first two words of philox4x32-10(counter, key)
    u       = (x0 >> 5) · 2^26 + (x1 >> 6), divided by 2^53: uniform in [0, 1)
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words per element, each int64 tensor holding values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1, c2, c3


def seeded_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 [R] in [0, 1) from int64 [R] seeds and positions."""
    zero = torch.zeros_like(seeds)
    counter = (positions & _MASK, (positions >> 32) & _MASK, zero, zero)
    x0, x1, _, _ = philox(counter, (seeds & _MASK, (seeds >> 32) & _MASK))
    return ((x0 >> 5) * 2**26 + (x1 >> 6)).double() / 2**53


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 by 32 bit product; int64 wraps, so it is put together from 16-bit halves."""
    low, high = x & 0xFFFF, x >> 16
    first, second = low * constant, high * constant
    middle = (first >> 16) + (second & _MASK)
    return (middle >> 16) + ((second >> 32) << 16) & _MASK, ((middle << 16) & _MASK) | (first & 0xFFFF)
