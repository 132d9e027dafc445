"""Products with weights in codes of 4 or 8 bits, for NVIDIA GPUs, in Triton. `cuda_words` says how codes lie.

Few rows: reading the weight is all the time there is, and instructions for each weight are the scarce thing.
A 4-bit code becomes a number without arithmetic: it is put into the last bits of the number `offset` (128 in
bfloat16, 1024 in float16), whose units they count. Zero points and offsets are taken off once for each group,
after the product: sum x (q - z) = sum x (q + offset) - (z + offset) sum x, where the last sum is a product
with ones, which the tensor cores do beside the others. Scales are applied to sums as well.

More rows: the weight is made in registers, which the tensor cores take as their first operand; for that the
product is computed transposed. Many rows: the weight is written to memory for cuBLAS by `dequantize_kernel`.

Inputs may be split among programs (`SPLIT`). Each writes its sums; the last to arrive adds all of them in their
order, so that results do not depend on who was last.

Triton's interpreter knows no assembler, and computes wrongly in bfloat16: without `NATIVE` both are done without,
with the same bits as results.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(words, i, ELEMENT: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of 4 bits of the two halves of segment i, plus the offset, in ELEMENT.

    NATIVE: by one instruction for both, (words >> 4 i) & 0x000F000F | offset.
    """
    shifted = words >> (4 * i)
    if NATIVE:
        if tl.bfloat16 == ELEMENT:
            low, high = tl.inline_asm_elementwise(
                "{ .reg .b32 t; lop3.b32 t, $2, 0x000F000F, 0x43004300, 0xEA; mov.b32 {$0, $1}, t; }",
                "=h,=h,r",
                [shifted],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=1,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                "{ .reg .b32 t; lop3.b32 t, $2, 0x000F000F, 0x64006400, 0xEA; mov.b32 {$0, $1}, t; }",
                "=h,=h,r",
                [shifted],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=1,
            )
    else:
        bits: tl.constexpr = 0x4300 if tl.bfloat16 == ELEMENT else 0x6400
        low = ((shifted & 0xF) | bits).to(tl.int16).to(ELEMENT, bitcast=True)
        high = (((shifted >> 16) & 0xF) | bits).to(tl.int16).to(ELEMENT, bitcast=True)
    return low, high


@triton.jit
def _whole(words, i, ELEMENT: tl.constexpr):
    """Codes of 8 bits of segment i in ELEMENT, which holds them exactly."""
    return ((words >> (8 * i)) & 0xFF).to(tl.float32).to(ELEMENT)


@triton.jit
def _grid_of(scales_ptr, zeros_ptr, at, OFFSET: tl.constexpr, MIDDLE: tl.constexpr):
    """Scales, and zero points plus the offset, float32. MIDDLE: the zero point of all, or negative: each its own."""
    scale = tl.load(scales_ptr + at).to(tl.float32)
    if MIDDLE < 0:
        zero = tl.load(zeros_ptr + at).to(tl.float32) + OFFSET
    else:
        zero = tl.zeros_like(scale) + (MIDDLE + OFFSET)
    return scale, zero


@triton.jit
def _rows(x_ptr, m, k, rows, inputs, x_row, RAGGED: tl.constexpr):
    """x[m, k]; zeros beyond its rows and inputs."""
    ok = (m < rows)[:, None]
    if RAGGED:
        ok = ok & (k < inputs)[None, :]
    return tl.load(x_ptr + m[:, None] * x_row + k[None, :], mask=ok, other=0.0)


@triton.jit
def _columns(x_ptr, m, k, rows, inputs, x_row, RAGGED: tl.constexpr):
    """The same transposed, [k, m]."""
    ok = (m < rows)[None, :]
    if RAGGED:
        ok = ok & (k < inputs)[:, None]
    return tl.load(x_ptr + m[None, :] * x_row + k[:, None], mask=ok, other=0.0)


@triton.jit
def _finish(acc, bias, out_ptr, part_ptr, count_ptr, at, ok, size, counter, split, SPLIT: tl.constexpr):
    """Write a tile of sums, or the sum of all splits' if this program is the last to arrive.

    Args:
        acc, at, ok: sums, their places, whether those exist. bias: added at the end. size: elements of a part.
        counter: of this tile; zero before, and zero again after.
    """
    if SPLIT == 1:
        tl.store(out_ptr + at, (acc + bias).to(out_ptr.dtype.element_ty), mask=ok)
    else:
        tl.store(part_ptr + split * size + at, acc, mask=ok)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(count_ptr + counter, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros_like(acc)
            for other in range(SPLIT):
                # from the level 2 cache: the first belongs to one multiprocessor
                total += tl.load(part_ptr + other * size + at, mask=ok, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at, (total + bias).to(out_ptr.dtype.element_ty), mask=ok)
            tl.store(count_ptr + counter, 0)


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_split"])
def few_rows_kernel(
    out_ptr,
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    part_ptr,
    count_ptr,
    rows,
    outputs,
    inputs,
    padded,
    x_row,
    tiles,
    tiles_per_split,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    UNIT: tl.constexpr,
    MIDDLE: tl.constexpr,
    BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = x · Wᵀ + bias; grid (padded / BLOCK_N, SPLIT, ceil(rows / BLOCK_M)).

    Args:
        out_ptr: [rows, outputs], contiguous. x_ptr: [rows, inputs], `x_row` elements from row to row.
        words_ptr, scales_ptr, zeros_ptr: see `Words`; rows of `padded` elements. bias_ptr: [outputs].
        part_ptr: float32 [SPLIT, rows, outputs]. count_ptr: int32, zero, one for each tile of the result.
        tiles: of 128 inputs; `tiles_per_split` of them belong to a split. OFFSET: see above; 0 for 8 bits.
        RAGGED: the last tile goes beyond the inputs.
    """
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    R: tl.constexpr = 4 * BITS
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    ones = tl.full((R, BLOCK_N), 1.0, tl.float32).to(ELEMENT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        words = tl.load(words_ptr + (tile * R + r)[:, None] * padded + n[None, :], eviction_policy="evict_first")
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(4):
            k = tile * 128 + i * 32 + r
            x = _rows(x_ptr, m, k, rows, inputs, x_row, RAGGED)
            if BITS == 4:
                low, high = _halves(words, i, ELEMENT, NATIVE)
                part = tl.dot(x, low, part)
                sums = tl.dot(x, ones, sums)
                x = _rows(x_ptr, m, k + R, rows, inputs, x_row, RAGGED)
                part = tl.dot(x, high, part)
            else:
                part = tl.dot(x, _whole(words, i, ELEMENT), part)
            sums = tl.dot(x, ones, sums)
            if (i + 1) * 32 % UNIT == 0:
                unit = tile * (128 // UNIT) + i * 32 // UNIT
                scale, zero = _grid_of(scales_ptr, zeros_ptr, unit * padded + n, OFFSET, MIDDLE)
                acc += (part - sums * zero[None, :]) * scale[None, :]
                part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((1, BLOCK_N), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * outputs + n[None, :]
    ok = (m < rows)[:, None] & (n < outputs)[None, :]
    counter = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    _finish(acc, bias, out_ptr, part_ptr, count_ptr, at, ok, rows * outputs, counter, split, SPLIT)


@triton.jit
def _weight(code, scale, zero, NATIVE: tl.constexpr):
    """[BLOCK_N, R]: (code - zero) · scale in the code's dtype. The difference is exact there, the product rounded."""
    ELEMENT: tl.constexpr = code.dtype
    if NATIVE:
        return (code - zero.to(ELEMENT)[:, None]) * scale.to(ELEMENT)[:, None]
    else:
        scale = scale.to(ELEMENT).to(tl.float32)
        return ((code.to(tl.float32) - zero[:, None]) * scale[:, None]).to(ELEMENT)


@triton.jit
def _segment(words, i, scale, zero, ELEMENT: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """The weight of segment i: [BLOCK_N, 16, 2], halves last, or [BLOCK_N, 32]."""
    if BITS == 4:
        low, high = _halves(words, i, ELEMENT, NATIVE)
        return tl.join(_weight(low, scale, zero, NATIVE), _weight(high, scale, zero, NATIVE))
    else:
        return _weight(_whole(words, i, ELEMENT), scale, zero, NATIVE)


@triton.jit
def _joined(first, second, BITS: tl.constexpr):
    """Two segments of `_segment` -> [BLOCK_N, 64], in the order of inputs."""
    both = tl.join(first, second)
    if BITS == 4:
        return both.permute(0, 3, 2, 1).reshape(both.shape[0], 64)
    else:
        return both.permute(0, 2, 1).reshape(both.shape[0], 64)


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_split"])
def more_rows_kernel(
    out_ptr,
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    part_ptr,
    count_ptr,
    rows,
    outputs,
    inputs,
    padded,
    x_row,
    tiles,
    tiles_per_split,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    UNIT: tl.constexpr,
    MIDDLE: tl.constexpr,
    BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = x · Wᵀ + bias; grid (ceil(rows / BLOCK_M), SPLIT, padded / BLOCK_N). Arguments: see `few_rows_kernel`.

    q - z is exact in x's dtype; its product with the scale is rounded, as a dequantized weight's is.
    WIDE: products over 64 inputs instead of 16 or 32, for tensor cores that take large operands.
    """
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    R: tl.constexpr = 4 * BITS
    split = tl.program_id(1)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    depth: tl.constexpr = 64 if WIDE else R
    deep = tl.arange(0, depth)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        words = tl.load(words_ptr + (tile * R + r)[None, :] * padded + n[:, None])
        for i in tl.static_range(4):
            if i * 32 % UNIT == 0:
                unit = tile * (128 // UNIT) + i * 32 // UNIT
                scale, zero = _grid_of(scales_ptr, zeros_ptr, unit * padded + n, OFFSET, MIDDLE)
            k = tile * 128 + i * 32 + deep
            if WIDE:
                segment = _segment(words, i, scale, zero, ELEMENT, BITS, NATIVE)
                if i % 2 == 0:
                    before = segment
                else:
                    x = _columns(x_ptr, m, k - 32, rows, inputs, x_row, RAGGED)
                    acc = tl.dot(_joined(before, segment, BITS), x, acc)
            elif BITS == 4:
                low, high = _halves(words, i, ELEMENT, NATIVE)
                x = _columns(x_ptr, m, k, rows, inputs, x_row, RAGGED)
                acc = tl.dot(_weight(low, scale, zero, NATIVE), x, acc)
                x = _columns(x_ptr, m, k + R, rows, inputs, x_row, RAGGED)
                acc = tl.dot(_weight(high, scale, zero, NATIVE), x, acc)
            else:
                x = _columns(x_ptr, m, k, rows, inputs, x_row, RAGGED)
                acc = tl.dot(_weight(_whole(words, i, ELEMENT), scale, zero, NATIVE), x, acc)
    bias = tl.zeros((BLOCK_N, 1), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    at = m[None, :] * outputs + n[:, None]
    ok = (m < rows)[None, :] & (n < outputs)[:, None]
    counter = tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    _finish(acc, bias, out_ptr, part_ptr, count_ptr, at, ok, rows * outputs, counter, split, SPLIT)


@triton.jit(do_not_specialize=["first"])
def dequantize_kernel(
    out_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    first,
    outputs,
    inputs,
    padded,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    UNIT: tl.constexpr,
    MIDDLE: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows `first` to `first + outputs` of the weight, [outputs, inputs]; grid (ceil(outputs / BLOCK_N), tiles).

    The product with the scale is taken in float32, and rounded once. `first` is a multiple of BLOCK_N.
    """
    ELEMENT: tl.constexpr = out_ptr.dtype.element_ty
    R: tl.constexpr = 4 * BITS
    tile = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = first + row
    r = tl.arange(0, R)
    words = tl.load(words_ptr + (tile * R + r)[None, :] * padded + n[:, None])
    for i in tl.static_range(4):
        unit = tile * (128 // UNIT) + i * 32 // UNIT
        scale, zero = _grid_of(scales_ptr, zeros_ptr, unit * padded + n, OFFSET, MIDDLE)
        k = tile * 128 + i * 32 + r
        if BITS == 4:
            low, high = _halves(words, i, ELEMENT, NATIVE)
            _store_weight(out_ptr, low, scale, zero, row, k, outputs, inputs)
            _store_weight(out_ptr, high, scale, zero, row, k + R, outputs, inputs)
        else:
            _store_weight(out_ptr, _whole(words, i, ELEMENT), scale, zero, row, k, outputs, inputs)


@triton.jit
def _store_weight(out_ptr, code, scale, zero, row, k, outputs, inputs):
    weight = (code.to(tl.float32) - zero[:, None]) * scale[:, None]
    ok = (row < outputs)[:, None] & (k < inputs)[None, :]
    at = row[:, None].to(tl.int64) * inputs + k[None, :]
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), mask=ok)
