"""FP8 weights times activations that are rounded to FP8, by `torch._scaled_mm`.

Every row of x gets a scale of its own, or every 128 elements of it where the weight's scales go by block; so a
row's result does not depend on its neighbours. `scaled_mm` says where this can be done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from quire_quant.float8_kernels import quantize_rows_kernel
from quire_quant.scaled_mm import BLOCK

ROWS = 4
"""With scales for parts of rows, cuBLAS wants a multiple of so many rows."""


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """A layer's state.

    Attributes:
        weight: float8 [N, K], contiguous. scale: float32 [N, 1], or [N / 128, K / 128] for blocks; contiguous.
    """

    weight: Tensor
    scale: Tensor

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x bfloat16 [T, K] -> [T, N]."""
        rows, inputs = x.shape
        if not rows:
            return x.new_empty(0, len(self.weight))
        blocks = self.scale.shape[1] > 1
        small, scales = rounded(x, BLOCK[1] if blocks else inputs)
        # The other operand's scales run along the columns: [1, N], or [K / 128, N / 128] with strides (1, K / 128).
        product: Tensor = torch._scaled_mm(
            small,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.scale.t(),
            bias=None if blocks else bias,
            out_dtype=x.dtype,
        )
        return product[:rows] + bias if blocks and bias is not None else product[:rows]


def rounded(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [T, K] -> float8 [T, K] and float32 [T, K / group]: x / scale, the largest of each group being 448.

    For groups smaller than a row T is padded to a multiple of ROWS, and scales lie with strides (1, T).
    """
    if group < x.shape[1]:
        x = pad(x, (0, 0, 0, -len(x) % ROWS))
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, groups = len(x), x.shape[1] // group
    small = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    scales = scales.t() if groups > 1 else scales.view(rows, 1)
    block = int(triton.next_power_of_2(group))
    quantize_rows_kernel[(rows, groups)](
        small,
        scales,
        x,
        x.stride(0),
        scales.stride(0),
        scales.stride(1),
        SIZE=group,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return small, scales
