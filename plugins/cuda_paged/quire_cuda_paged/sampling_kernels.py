"""Sampling in Triton, without sorting: one program per row walks the row's logits a few times.

What is to be kept (top-k, top-p) is known by one threshold, which is searched for: logits are mapped to
integers in the same order, and the range in which the threshold lies is cut into nine by each walk.
The definition of the candidates and of the draw is the reference sampler's, ties and all. Sums are
float64, as there: in float32 the draw would land on a neighbour now and then where many tokens are likely.
"""

from __future__ import annotations

import triton
import triton.language as tl

PIVOTS = tl.constexpr(8)
"""Places in which a walk cuts the range; it takes 32 / log2(PIVOTS + 1) walks at most."""
LOWEST_KEY = tl.constexpr(-(2**31))
HIGHEST_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def _key(x):
    """int32 in the order of float32 x; both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _weight(x, largest, temperature):
    """exp((x - largest) / temperature), in float64."""
    return tl.exp(x.to(tl.float64) / temperature - largest)


@triton.jit
def _search(
    logits_ptr, low, high, kept, goal, largest, temperature,
    MASS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key t in [low, high) with f(t) >= goal, or another that parts the logits in the same way.

    f(t) is the number of logits with keys of at least t, or with MASS the weight of those at or above `kept`.
    f(low) >= goal must hold. `largest` is the largest logit over the temperature.
    """
    pivot = tl.arange(0, PIVOTS)
    lane = tl.arange(0, BLOCK)
    low = low.to(tl.int64)
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        cuts = tl.minimum(low + (pivot + 1).to(tl.int64) * step, high - 1).to(tl.int32)
        first, last = low.to(tl.int32), (high - 1).to(tl.int32)
        if MASS:
            sums = tl.zeros([BLOCK, PIVOTS], tl.float64)
        else:
            sums = tl.zeros([BLOCK, PIVOTS], tl.int32)
        least = tl.full([BLOCK], HIGHEST_KEY, tl.int32)
        most = tl.full([BLOCK], LOWEST_KEY, tl.int32)
        for start in tl.range(0, VOCAB, BLOCK):
            inside = start + lane < VOCAB
            x = tl.load(logits_ptr + start + lane, mask=inside, other=float("-inf"))
            key = _key(x)
            if MASS:
                counted = tl.where(inside & (key >= kept), _weight(x, largest, temperature), 0.0)
            else:
                counted = inside.to(tl.int32)
            sums += tl.where(key[:, None] >= cuts[None, :], counted[:, None], 0)
            between = inside & (key >= first) & (key <= last)
            least = tl.minimum(least, tl.where(between, key, HIGHEST_KEY))
            most = tl.maximum(most, tl.where(between, key, LOWEST_KEY))
        found = tl.sum(sums, 0)
        reached = found >= goal
        low = tl.maximum(low, tl.max(tl.where(reached, cuts, LOWEST_KEY), 0).to(tl.int64))
        high = tl.minimum(high, tl.min(tl.where(reached, HIGHEST_KEY, cuts), 0).to(tl.int64))
        # The range also shrinks to the keys that are there; between two of them every threshold does the same.
        low = tl.maximum(low, tl.minimum(tl.min(least, 0).to(tl.int64), high - 1))
        high = tl.maximum(tl.minimum(high, tl.max(most, 0).to(tl.int64) + 1), low + 1)
        if not MASS:
            high = tl.where(tl.max((found == goal).to(tl.int32), 0) > 0, low + 1, high)
    return low.to(tl.int32)


@triton.jit
def _uniform(seed, position):
    """float64 in [0, 1): the stream that `quire.sampling.philox` documents."""
    words = position.to(tl.uint64)
    c0, c1 = words.to(tl.uint32), (words >> 32).to(tl.uint32)
    zero = c0 * 0
    x0, x1, _, _ = tl.philox(seed.to(tl.uint64), c0, c1, zero, zero)
    return ((x0 >> 5).to(tl.float64) * 67108864.0 + (x1 >> 6).to(tl.float64)) * (1.0 / 9007199254740992.0)


@triton.jit
def sample_kernel(
    out_ptr, logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, row_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One token per row; grid (R,).

    Args:
        out_ptr: int64 [R]. logits_ptr: float32 [R, VOCAB], `row_stride` elements from row to row.
        temperature_ptr, top_p_ptr, min_p_ptr: float32 [R]. top_k_ptr: int32 [R]. seed_ptr, position_ptr: int64 [R].
        BLOCK: logits per turn. BLOCKS: power of two; BLOCK · BLOCKS is at least VOCAB.
    """
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * row_stride
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], VOCAB, tl.int32)
    for start in tl.range(0, VOCAB, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < VOCAB, other=float("-inf"))
        place = tl.where(x > best, start + lane, place)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, place, VOCAB), 0)
    temperature = tl.load(temperature_ptr + row).to(tl.float64)
    if temperature > 0.0:
        largest = top.to(tl.float64) / temperature
        token = _draw(
            logits, top, largest, temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row).to(tl.float64),
            tl.load(min_p_ptr + row).to(tl.float64), _uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row)),
            VOCAB, BLOCK, BLOCKS,
        )  # fmt: skip
    # A row without a finite logit has no token; what it gets is within the vocabulary.
    tl.store(out_ptr + row, tl.minimum(token, VOCAB - 1).to(tl.int64))


@triton.jit
def _draw(
    logits, top, largest, temperature, top_k, top_p, min_p, u,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token that u stands for, by inverse transform in vocabulary order over the candidates."""
    kept = tl.full([], LOWEST_KEY, tl.int32)
    high = _key(top).to(tl.int64) + 1
    if (top_k > 0) & (top_k < VOCAB):
        kept = _search(logits, kept, high, kept, top_k, largest, temperature, False, VOCAB, BLOCK)
    if top_p < 1.0:
        sums = _block_sums(logits, largest, temperature, kept, 0.0, VOCAB, BLOCK, BLOCKS)
        goal = tl.sum(sums, 0) * top_p
        kept = _search(logits, kept, high, kept, goal, largest, temperature, True, VOCAB, BLOCK)
    sums = _block_sums(logits, largest, temperature, kept, min_p, VOCAB, BLOCK, BLOCKS)
    ends = tl.cumsum(sums, 0)
    goal = u * tl.sum(tl.where(tl.arange(0, BLOCKS) == BLOCKS - 1, ends, 0.0), 0)
    block = tl.arange(0, BLOCKS)
    # Rounding may put u times the mass behind the last candidate, which is then taken.
    last = tl.max(tl.where(sums > 0.0, block, 0), 0)
    chosen = tl.minimum(tl.sum((ends <= goal).to(tl.int32), 0), last)
    before = tl.sum(tl.where(block == chosen - 1, ends, 0.0), 0)
    lane = tl.arange(0, BLOCK)
    weights = _candidates(logits, chosen * BLOCK, largest, temperature, kept, min_p, VOCAB, BLOCK)
    inside = tl.sum((before + tl.cumsum(weights, 0) <= goal).to(tl.int32), 0)
    return chosen * BLOCK + tl.minimum(inside, tl.max(tl.where(weights > 0.0, lane, 0), 0))


@triton.jit
def _candidates(logits, start, largest, temperature, kept, min_p, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Weights of the logits [start, start + BLOCK) that are candidates, 0 for the others."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(logits + at, mask=at < VOCAB, other=float("-inf"))
    weights = _weight(x, largest, temperature)
    return tl.where((at < VOCAB) & (_key(x) >= kept) & (weights >= min_p), weights, 0.0)


@triton.jit
def _block_sums(
    logits, largest, temperature, kept, min_p, VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """float64 [BLOCKS]; the candidates' weight, block by block."""
    block = tl.arange(0, BLOCKS)
    sums = tl.zeros([BLOCKS], tl.float64)
    for index in tl.range(0, (VOCAB + BLOCK - 1) // BLOCK):
        weights = _candidates(logits, index * BLOCK, largest, temperature, kept, min_p, VOCAB, BLOCK)
        sums = tl.where(block == index, tl.sum(weights, 0), sums)
    return sums
