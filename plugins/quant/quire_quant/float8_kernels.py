"""Activations in float8 (e4m3), for products by `torch._scaled_mm`: one launch instead of six."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_rows_kernel(
    out_ptr, scale_ptr, x_ptr, x_row, scale_row, scale_group, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """x / scale of one group of one row, whose largest element becomes 448; grid (rows, groups).

    Args:
        out_ptr: float8 [rows, groups · SIZE], contiguous. x_ptr: the same shape, `x_row` elements from row to row.
        scale_ptr: float32, `scale_row` elements from row to row and `scale_group` from group to group.
        BLOCK: power of two, at least SIZE.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + group * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(x), 0)
    scale = tl.where(top == 0.0, 1.0, top / 448.0)
    small = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    at = out_ptr + (row * tl.num_programs(1) + group) * SIZE + i
    tl.store(at, small.to(out_ptr.dtype.element_ty), mask=i < SIZE)
    tl.store(scale_ptr + row * scale_row + group * scale_group, scale)
