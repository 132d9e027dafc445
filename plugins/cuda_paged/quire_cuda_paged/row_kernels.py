"""What stands between a layer's matrix products, in Triton: norms, activations, rotation, the write to the cache.

Such work is bound by launches and by memory, never by arithmetic; each kernel reads its input once.
Arithmetic is float32. Results are rounded to the compute dtype where the reference operations round
them, so that a model gives the same tokens by either.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(x, like_ptr):
    """float32 x with the precision of the pointer's elements."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def rms_norm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    x_row,
    residual_row,
    eps,
    offset,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """RMS norm of one row, after the residual is added to it and the sum put in the residual's place; grid (T,).

    Args:
        out_ptr: [T, SIZE], contiguous. x_ptr: [T, SIZE]. weight_ptr: [SIZE]. residual_ptr: [T, SIZE], in and out.
        x_row, residual_row: elements from row to row. BLOCK: power of two, at least SIZE.
        OFFSET: `offset` is added to the weight, and the product taken before anything is rounded.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    x = tl.load(x_ptr + row * x_row + i, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = residual_ptr + row * residual_row + i
        x = _rounded(x + tl.load(at, mask=inside, other=0.0).to(tl.float32), residual_ptr)
        tl.store(at, x.to(residual_ptr.dtype.element_ty), mask=inside)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        result = normed * (weight + offset)
    else:
        result = _rounded(normed, out_ptr) * weight
    tl.store(out_ptr + row * SIZE + i, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_act_kernel(out_ptr, x_ptr, x_row, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(gate) · value; grid (T, ceil(SIZE / BLOCK)).

    Args:
        out_ptr: [T, SIZE], contiguous. x_ptr: [T, 2 · SIZE], gate first. x_row: elements from row to row.
        ACTIVATION: `silu`, `gelu` or `gelu_tanh`.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate = tl.load(x_ptr + row * x_row + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + row * x_row + SIZE + i, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # (1 + tanh(u)) / 2 is the logistic function of 2u
        active = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    result = _rounded(active, out_ptr) * value
    tl.store(out_ptr + row * SIZE + i, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, scale, weight, offset, like_ptr, NORM: tl.constexpr):
    """x · scale · weight as `HeadNorm` rounds it; NORM: 0 none, 1 plain, 2 with an offset."""
    if NORM == 1:
        x = _rounded(_rounded(x * scale, like_ptr) * weight, like_ptr)
    if NORM == 2:
        x = _rounded(x * scale * (weight + offset), like_ptr)
    return x


@triton.jit
def _as_cached(x, inverse_scale, LARGEST: tl.constexpr):
    """x; for a cache that has a limit the product, in float32, limited to [-LARGEST, LARGEST]; NaN stays."""
    if LARGEST > 0:
        x = x.to(tl.float32) * inverse_scale
        x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    return x


@triton.jit
def _normed_and_turned(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    head,
    head_ok,
    eps,
    offset,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    NORM: tl.constexpr,
):
    """float32 [heads, D_PAD] of one token's heads at x_ptr + head · D: normed, its first 2 · HALF elements rotated.

    An element and the one that it is turned with lie in different threads, so the latter is loaded too.
    """
    d = tl.arange(0, D_PAD)
    inside = head_ok[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + (head * D)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = 1.0
    weight = tl.zeros([D_PAD], tl.float32)
    if NORM > 0:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    x = _normed(x, scale, weight[None, :], offset, x_ptr, NORM)
    if HALF > 0:
        turns = d < 2 * HALF
        if NEOX:
            first = d < HALF
            partner = tl.where(first, d + HALF, d - HALF)
            angle = tl.where(first, d, d - HALF)
        else:
            first = d % 2 == 0
            partner = tl.where(first, d + 1, d - 1)
            angle = d // 2
        y = tl.load(x_ptr + (head * D)[:, None] + partner[None, :], mask=inside & turns[None, :], other=0.0)
        if NORM > 0:
            weight = tl.load(weight_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        y = _normed(y.to(tl.float32), scale, weight[None, :], offset, x_ptr, NORM)
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)[None, :]
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)[None, :]
        x = x * cos + tl.where(first[None, :], -y, y) * sin
    return x


@triton.jit
def prepare_qkv_kernel(
    turned_ptr,
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    qkv_row,
    cos_row,
    sin_row,
    k_slot: tl.int64,
    v_slot: tl.int64,
    q_eps,
    k_eps,
    q_offset,
    k_offset,
    k_inverse,
    v_inverse,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Norm, rotate and cache one token's heads, TILE of them; grid (T, query tiles + 2 · KV tiles).

    Args:
        turned_ptr: [T, HEADS + KV_HEADS, D], out: queries, then keys.
        qkv_ptr: [T, HEADS · D + KV_HEADS · (D + DV)], `qkv_row` elements from row to row.
        cos_ptr, sin_ptr: float32 [T, HALF], `cos_row` and `sin_row` elements from row to row.
        k_cache_ptr, v_cache_ptr: a slot's heads together, `k_slot` and `v_slot` elements from slot to slot.
        slots_ptr: int64 [T]. k_inverse, v_inverse: one over the scales of an 8-bit cache.
        Q_NORM, K_NORM: see `_normed`. LARGEST: number that an 8-bit cache holds; 0: the cache has no such limit.
    """
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    Q_TILES: tl.constexpr = (HEADS + TILE - 1) // TILE
    KV_TILES: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    qkv, turned = qkv_ptr + token * qkv_row, turned_ptr + token * ((HEADS + KV_HEADS) * D)
    cos, sin = cos_ptr + token * cos_row, sin_ptr + token * sin_row
    slot = tl.load(slots_ptr + token)
    d = tl.arange(0, D_PAD)
    if tile < Q_TILES:
        head = tile * TILE + tl.arange(0, TILE)
        ok = head < HEADS
        q = _normed_and_turned(
            qkv, q_weight_ptr, cos, sin, head, ok, q_eps, q_offset, D, D_PAD, HALF, NEOX, Q_NORM
        )  # fmt: skip
        at = (head * D)[:, None] + d[None, :]
        tl.store(turned + at, q.to(turned_ptr.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
    elif tile < Q_TILES + KV_TILES:
        head = (tile - Q_TILES) * TILE + tl.arange(0, TILE)
        ok = head < KV_HEADS
        k = _normed_and_turned(
            qkv + HEADS * D, k_weight_ptr, cos, sin, head, ok, k_eps, k_offset, D, D_PAD, HALF, NEOX, K_NORM
        ).to(turned_ptr.dtype.element_ty)  # fmt: skip
        at = (head * D)[:, None] + d[None, :]
        inside = ok[:, None] & (d < D)[None, :]
        tl.store(turned + HEADS * D + at, k, mask=inside)
        k = _as_cached(k, k_inverse, LARGEST).to(k_cache_ptr.dtype.element_ty)
        tl.store(k_cache_ptr + slot * k_slot + at, k, mask=inside)
    else:
        head = (tile - Q_TILES - KV_TILES) * TILE + tl.arange(0, TILE)
        dv = tl.arange(0, DV_PAD)
        at = (head * DV)[:, None] + dv[None, :]
        inside = (head < KV_HEADS)[:, None] & (dv < DV)[None, :]
        v = tl.load(qkv + (HEADS + KV_HEADS) * D + at, mask=inside, other=0.0)
        v = _as_cached(v, v_inverse, LARGEST).to(v_cache_ptr.dtype.element_ty)
        tl.store(v_cache_ptr + slot * v_slot + at, v, mask=inside)
